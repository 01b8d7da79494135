<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dllm: watch a text condense</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #2b6cb0; --bad: #c53030; }
@media (prefers-color-scheme: dark) { :root { --accent: #63b3ed; --bad: #fc8181; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; }
p { margin: .2rem 0 1rem; }
label { display: block; font-size: .85rem; }
textarea, input, select, button { font: inherit; width: 100%; padding: .4rem .6rem; border: 1px solid var(--line);
  border-radius: .4rem; background: var(--soft); color: inherit; }
input, select { height: 2.4rem; }
textarea, #canvas { font-family: ui-monospace, monospace; font-size: .9rem; }
.pair, .row { display: grid; gap: .7rem; grid-template-columns: 1fr 1fr; margin-bottom: .7rem; }
.row { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); align-items: end; }
@media (max-width: 34rem) { .pair { grid-template-columns: 1fr; } }
button { cursor: pointer; background: var(--accent); color: Canvas; border-color: transparent; font-weight: 600; }
button:disabled { opacity: .45; cursor: default; }
#stop { background: none; color: inherit; border-color: var(--line); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px; }
#canvas { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: .4rem;
  padding: .7rem; min-height: 8rem; margin: 0 0 .4rem; }
#canvas span { border-radius: .15rem; color: #111; }
#canvas .masked { color: inherit; opacity: .35; }
.given { opacity: .75; }
#status { min-height: 1.5rem; font-variant-numeric: tabular-nums; }
#status.error { color: var(--bad); font-weight: 600; }
.legend span { color: #111; padding: 0 .5rem; font-size: .8rem; }
</style>
</head>
<body>
<h1>Watch a text condense</h1>
<p>A diffusion language model fills all gaps at once, the surest first. Leave the second box empty to continue the
first, or write what comes after the gap.</p>
<form id="form">
  <div class="pair">
    <label>Before the gap <textarea id="prompt" rows="5" spellcheck="false">def add(a, b):
    """Return the sum."""
</textarea></label>
    <label>After the gap (optional) <textarea id="suffix" rows="5" spellcheck="false"></textarea></label>
  </div>
  <div class="row">
    <label>Tokens <input id="tokens" type="number" min="1" value="48" required></label>
    <label>Steps <input id="steps" type="number" min="1" placeholder="the server's"></label>
    <label>Method <select id="alg"><option value="">the server's</option><option>entropy</option>
      <option>maskgit_plus</option><option>topk_margin</option><option>p2</option><option>origin</option></select></label>
    <label>Temperature <input id="temperature" type="number" min="0" max="2" step="0.1" placeholder="the server's"></label>
    <label>Seed <input id="seed" type="number" placeholder="any"></label>
    <label id="keyfield" hidden>API key <input id="key" type="password" autocomplete="off"></label>
  </div>
  <div class="row">
    <button id="go" type="submit">Generate</button>
    <button id="stop" type="button" disabled>Stop</button>
  </div>
</form>
<div id="canvas" tabindex="0" role="region" aria-label="The text"></div>
<div id="status" role="status" aria-live="polite"></div>
<p class="legend" id="legend">Confidence: </p>
<script>
"use strict";
const $ = id => document.getElementById(id);
const RAMP = ["#f4a582", "#fdc98f", "#fdeaa7", "#d3ecab", "#a6dba0"], MASK = "\u2592";
["unsure", "", "", "", "sure"].forEach((word, i) => {
  const patch = document.createElement("span");
  patch.style.background = RAMP[i];
  patch.textContent = word || "\u00a0";
  $("legend").append(patch);
});
let running = null;

function tell(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "error" : "";
}

function draw(prompt, tokens, suffix) {
  const parts = document.createDocumentFragment();
  const add = (text, name, colour) => {
    const span = document.createElement("span");
    span.textContent = text;
    if (name) span.className = name;
    if (colour) span.style.background = colour;
    if (name === "given") span.style.color = "inherit";
    parts.append(span);
  };
  add(prompt, "given");
  for (const [text, confidence] of tokens) {
    if (text === null) { add(MASK, "masked"); continue; }
    // An entropy is at most 0: e to its power is the share that it stands for.
    const share = confidence === null ? 1 : confidence <= 0 ? Math.exp(confidence) : confidence;
    add(text, "", RAMP[Math.min(RAMP.length - 1, Math.max(0, Math.floor(share * RAMP.length)))]);
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
</script>
</body>
</html>
