"""Denoising made visible: live in a terminal, and as a self-contained HTML animation.

Both colour a token by the confidence with which it was committed, on one ramp of light backgrounds under black text, so
that it reads the same on a dark and on a light screen.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from dllm.model import DiffusionLM
from dllm.sampler import MDMGenerationConfig, OnStep, denoise, find_mask_token

# Backgrounds from unsure to sure; black text has a contrast of at least 7 on each.
RAMP = ("#f4a582", "#fdc98f", "#fdeaa7", "#d3ecab", "#a6dba0")
MASK_GLYPH = "▒"


def confidence_level(confidence: float, alg: str) -> int:
    """The place on RAMP, 0..4, of a confidence of this algorithm: probabilities and margins are shares already, and an
    entropy (sum of p log p) counts as the probability that has it when all words are equally likely."""
    share = math.exp(confidence) if alg == "entropy" else confidence
    return int(min(max(share, 0.0) * len(RAMP), len(RAMP) - 1))


@dataclass(slots=True)
class Trace:
    """What happened to one row of a canvas. Fed to `denoise` as `on_step=trace`."""

    tokens: Tensor  # [L] int64, the canvas at first, then after the last step seen
    mask_token_id: int
    alg: str
    row: int = 0
    levels: dict[int, int] = field(default_factory=dict)  # position -> place on RAMP of its committed token
    steps: list[list[tuple[int, int, int]]] = field(default_factory=list)  # what each changed: (position, token, level)
    fresh: frozenset[int] = frozenset()  # the positions that the last step changed

    def __call__(self, index: int, tokens: Tensor, confidence: Tensor | None) -> None:
        """Note what the step changed; steps that changed nothing leave no mark."""
        after = tokens[self.row].cpu()
        changed = (after != self.tokens).nonzero().flatten().tolist()
        changes = []
        for position in changed:
            level = 0 if confidence is None else confidence_level(float(confidence[self.row, position]), self.alg)
            changes.append((position, int(after[position]), level))
            self.levels[position] = level
        self.tokens = after
        if changes:
            self.steps.append(changes)
            self.fresh = frozenset(changed)


def record(model: DiffusionLM, canvas: Tensor, config: MDMGenerationConfig) -> Trace:
    """Denoise one canvas [L] and keep what happened."""
    trace = Trace(canvas.cpu(), find_mask_token(model, config), config.alg)
    denoise(model, canvas.unsqueeze(0), config, on_step=trace)
    return trace


def piece(tokenizer, token: int) -> str:
    """The text of a single token; a token that is only a part of a character reads as the replacement sign."""
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def render(trace: Trace, tokenizer, visible: Tensor | None = None) -> Text:
    """The canvas as coloured text; `visible` [L] bool leaves padding out."""
    text = Text()
    for position, token in enumerate(trace.tokens.tolist()):
        if visible is not None and not visible[position]:
            continue
        if token == trace.mask_token_id:
            text.append(MASK_GLYPH, style="dim")
        elif position not in trace.levels:
            text.append(piece(tokenizer, token))
        else:
            style = f"{'bold ' if position in trace.fresh else ''}black on {RAMP[trace.levels[position]]}"
            text.append(piece(tokenizer, token), style=style)
    return text


@contextmanager
def watch(tokenizer, canvas: Tensor, mask_token_id: int, alg: str, attention_mask: Tensor | None = None,
          console: Console | None = None) -> Iterator[OnStep]:
    """Show rows [B, L] being denoised: `with watch(...) as on_step: denoise(..., on_step=on_step)`.

    In a terminal the canvas is drawn after every step and stays, coloured, at the end. Elsewhere (a pipe, a file) only
    the final text is printed, without colours. `canvas` and `attention_mask` are what `denoise` gets.
    """
    console = console or Console()
    traces = [Trace(row.cpu(), mask_token_id, alg, index) for index, row in enumerate(canvas)]
    visible = [None] * len(canvas) if attention_mask is None else [row.bool().cpu() for row in attention_mask]
    steps = 0

    def rows() -> list[Text]:
        return [render(trace, tokenizer, shown) for trace, shown in zip(traces, visible, strict=True)]

    def note(index: int, tokens: Tensor, confidence: Tensor | None) -> None:
        nonlocal steps
        steps = index + 1
        for trace in traces:
            trace(index, tokens, confidence)

    if not console.is_terminal:
        yield note
        for trace, shown in zip(traces, visible, strict=True):
            kept = trace.tokens if shown is None else trace.tokens[shown]
            print(tokenizer.decode(kept.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False),
                  file=console.file)
        return

    def frame() -> Group:
        masked = sum(int((trace.tokens == mask_token_id).sum()) for trace in traces)
        return Group(*rows(), Text(f"step {steps}, {masked} still masked", style="dim"), legend())

    with Live(frame(), console=console, auto_refresh=False, transient=True) as live:
        def on_step(index: int, tokens: Tensor, confidence: Tensor | None) -> None:
            note(index, tokens, confidence)
            live.update(frame(), refresh=True)

        yield on_step
    for trace in traces:
        trace.fresh = frozenset()
    console.print(*rows(), legend(), sep="\n")


def legend() -> Text:
    return Text.assemble(("confidence ", "dim"), *((f" {text} ", f"black on {color}") for color, text in
                                                   zip(RAMP, ("low", "", "", "", "high"), strict=True)))


# For a page's <style> and, after the animations, its <script>. The page sets --accent, --mask, --line, --card, --soft.
ANIMATION_STYLE = """
.denoise pre { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; margin: 0; }
.denoise .slot { border-radius: 3px; }
.denoise .mask { background: var(--mask); color: transparent; }
.denoise .l0, .denoise .l1, .denoise .l2, .denoise .l3, .denoise .l4 { color: #111; }
""" + "".join(f".denoise .l{level} {{ background: {color}; }}\n" for level, color in enumerate(RAMP)) + """
.denoise .fresh { outline: 2px solid var(--accent); outline-offset: -1px; }
.denoise .controls { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .75rem 0 0; }
.denoise .controls input { flex: 1 1 9rem; min-width: 6rem; accent-color: var(--accent); }
.denoise button { font: inherit; min-width: 2.75rem; min-height: 2.25rem; padding: 0 .75rem; border-radius: 6px;
  border: 1px solid var(--line); background: var(--card); color: inherit; cursor: pointer; }
.denoise button:hover { border-color: var(--accent); }
.denoise :is(button, input):focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.denoise output { min-width: 7.5rem; font-variant-numeric: tabular-nums; color: var(--soft); }
.denoise .legend { display: flex; flex-wrap: wrap; gap: .3rem .5rem; align-items: center; color: var(--soft);
  font-size: .85rem; margin-top: .6rem; }
.denoise .legend span.swatch { display: inline-block; width: 1.6rem; height: .9rem; border-radius: 3px; }
"""

ANIMATION_SCRIPT = """
for (const root of document.querySelectorAll(".denoise")) {
  const { start, steps } = JSON.parse(root.querySelector("script").textContent);
  const pre = root.querySelector("pre"), slider = root.querySelector("input"), output = root.querySelector("output");
  const play = root.querySelector("[data-do=play]");
  const slots = start.map(text => {
    const slot = document.createElement("span");
    if (text !== null) slot.textContent = text;
    pre.append(slot);
    return slot;
  });
  const state = () => start.map(text => text === null ? { mask: true } : { text });
  const frames = [state()];                 // the whole canvas after each step: steps are few, and any can be jumped to
  for (const changes of steps) {
    const next = frames.at(-1).map(slot => ({ ...slot, fresh: false }));
    for (const [position, text, level] of changes)
      next[position] = text === null ? { mask: true } : { text, level, fresh: true };
    frames.push(next);
  }
  let now = -1, timer = null;
  const show = step => {
    now = Math.max(0, Math.min(frames.length - 1, step));
    frames[now].forEach((slot, i) => {
      if (start[i] !== null && slot.level === undefined) return;   // given text never changes
      slots[i].textContent = slot.mask ? "\\u00a0\\u00a0" : slot.text;
      const fresh = slot.fresh && now < frames.length - 1 ? " fresh" : "";
      slots[i].className = slot.mask ? "slot mask" : "slot l" + slot.level + fresh;
    });
    slider.value = now;
    output.textContent = "step " + now + " of " + (frames.length - 1);
    root.dataset.step = now;
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  const go = () => {
    if (now === frames.length - 1) show(0);
    play.textContent = "Pause";
    const next = () => { show(now + 1); if (now === frames.length - 1) stop(); };
    timer = setInterval(next, Math.max(60, Math.min(400, 9000 / frames.length)));
  };
  const act = {
    play: () => timer ? stop() : go(),
    back: () => { stop(); show(now - 1); },
    on: () => { stop(); show(now + 1); },
  };
  for (const button of root.querySelectorAll("button")) button.addEventListener("click", act[button.dataset.do]);
  slider.max = frames.length - 1;
  slider.addEventListener("input", () => { stop(); show(+slider.value); });
  show(0);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) go();
}
"""


def animation(trace: Trace, tokenizer, start: Sequence[int], shown: range | None = None) -> str:
    """HTML of a recorded denoising with play, step and slider controls.

    `start` are the tokens [L] it began with, `shown` the positions to show (None: all), those that changed among them.
    Goes into the body of a page that has ANIMATION_STYLE and, after it, ANIMATION_SCRIPT. Nothing is fetched.
    """
    def text(token: int) -> str | None:
        return None if token == trace.mask_token_id else piece(tokenizer, token)

    shown = shown or range(len(start))
    given = [text(start[position]) for position in shown]
    if given and given[0]:
        given[0] = given[0].lstrip("\r\n")  # what is shown begins with a line, not with the end of the one before
    data = {"start": given,
            "steps": [[(shown.index(position), text(token), level) for position, token, level in step]
                      for step in trace.steps]}
    # In a script element only "</" and "<!--" can end or change the data; an escaped < means the same to JSON.
    payload = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    last = len(trace.steps)
    swatches = "".join(f'<span class="swatch" style="background:{color}"></span>' for color in RAMP)
    return f"""<div class="denoise" data-step="0">
<script type="application/json">{payload}</script>
<pre></pre>
<div class="controls">
<button type="button" data-do="play">Play</button>
<button type="button" data-do="back" aria-label="one step back">&#8592;</button>
<button type="button" data-do="on" aria-label="one step on">&#8594;</button>
<input type="range" min="0" max="{last}" value="0" step="1" aria-label="step">
<output aria-live="off">step 0 of {last}</output>
</div>
<div class="legend"><span>less sure</span>{swatches}<span>surer; grey is still hidden, the rest was given</span></div>
</div>"""
