"use strict";
const $ = id => document.getElementById(id);
const MASK = "\u2592", LEVELS = document.querySelectorAll(".legend .swatch").length;
let running = null;

function tell(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "error" : "";
}

function draw(prompt, tokens, suffix) {
  const parts = document.createDocumentFragment();
  const add = (text, name) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.className = name;
    parts.append(span);
  };
  add(prompt, "given");
  for (const [text, confidence] of tokens) {
    if (text === null) { add(MASK, "masked"); continue; }
    // An entropy is at most 0: e to its power is the share that it stands for.
    const share = confidence === null ? 1 : confidence <= 0 ? Math.exp(confidence) : confidence;
    add(text, "l" + Math.min(LEVELS - 1, Math.max(0, Math.floor(share * LEVELS))));
  }
  add(suffix, "given");
  $("canvas").replaceChildren(parts);
}

async function generate() {
  const number = id => $(id).value === "" ? undefined : Number($(id).value);
  const prompt = $("prompt").value, suffix = $("suffix").value, tokens = number("tokens");
  const diffusion = {steps: number("steps"), alg: $("alg").value || undefined};
  if (suffix) diffusion.length = tokens;
  const headers = {"Content-Type": "application/json"};
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  const began = performance.now();
  const response = await fetch("/v1/completions", {method: "POST", headers, signal: running.signal,
    body: JSON.stringify({prompt, suffix: suffix || undefined, max_tokens: tokens, temperature: number("temperature"),
      seed: number("seed"), stream: true, diffusing: true, stream_options: {include_usage: true}, diffusion})});
  if (!response.ok) {
    if (response.status === 401) $("keyfield").hidden = false;
    throw new Error((await response.json()).error.message);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", usage = null;
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: {")) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) usage = chunk.usage;
      if (chunk.diffusion) {
        draw(prompt, chunk.diffusion.tokens, suffix);
        tell(`step ${chunk.diffusion.step}`);
      }
    }
  }
  if (!usage) throw new Error("the connection ended before the text was complete");
  const seconds = (performance.now() - began) / 1000;
  tell(`done: ${usage.completion_tokens} tokens in ${usage.denoising_steps} steps, `
    + `${usage.tokens_per_forward} tokens per forward pass, ${seconds.toFixed(2)} s`);
}

$("form").addEventListener("submit", async event => {
  event.preventDefault();
  running = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  draw($("prompt").value, [], $("suffix").value);
  tell("waiting");
  try {
    await generate();
  } catch (error) {
    if (error.name === "AbortError") tell("stopped");
    else tell(error.message, true);
  }
  $("go").disabled = false;
  $("stop").disabled = true;
});
$("stop").addEventListener("click", () => running.abort());
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
