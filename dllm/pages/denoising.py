"""Denoising made visible: live in a terminal, and as a self-contained HTML animation.

Both colour a token by the confidence with which it was committed, on one ramp of light backgrounds under black text, so
that it reads the same on a dark and on a light screen.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from dllm.model import DiffusionLM
from dllm.sampler import CanvasStep, MDMGenerationConfig, OnStep, denoise, find_mask_token

# Backgrounds from unsure to sure; black text has a contrast of at least 7 on each.
RAMP = ("#f4a582", "#fdc98f", "#fdeaa7", "#d3ecab", "#a6dba0")
MASK_GLYPH = "▒"


def confidence_level(confidence: float, alg: str) -> int:
    """The place on RAMP, 0..4, of a confidence of this algorithm: probabilities and margins are shares already, and an
    entropy (sum of p log p) counts as the probability that has it when all words are equally likely."""
    share = math.exp(confidence) if alg == "entropy" else confidence
    return int(min(max(share, 0.0) * len(RAMP), len(RAMP) - 1))


class Slot(NamedTuple):
    """One position of a canvas."""

    token: int
    level: int | None  # the place on RAMP of a committed token; None: given, or masked
    fresh: bool = False  # committed by the last step


@dataclass(slots=True)
class Trace:
    """What happened to one row of a canvas. Fed to `denoise` as `on_step=trace`."""

    tokens: InitVar[Tensor]  # [L] int64, the canvas at first
    mask_token_id: int
    alg: str
    row: int = 0
    visible: Tensor | None = None  # [L] bool, False where there is padding; None: none
    frames: list[list[Slot]] = field(default_factory=list)  # the canvas at first, and after each step that changed it

    def __post_init__(self, tokens: Tensor):
        kept = tokens.cpu() if self.visible is None else tokens.cpu()[self.visible]
        self.frames.append([Slot(token, None) for token in kept.tolist()])

    def __call__(self, step: CanvasStep) -> None:
        """Note what the step changed; steps that changed nothing leave no mark."""
        visible = self.visible if step.visible is None else step.visible[self.row].cpu()
        tokens, kept = step.tokens[self.row].cpu(), step.kept[self.row].cpu()
        now = torch.full_like(kept, torch.inf) if step.confidence is None else step.confidence[self.row].cpu()
        if visible is not None:
            tokens, kept, now = tokens[visible], kept[visible], now[visible]
        frame = [Slot(token, confidence_level(sure, self.alg) if sure > -math.inf else None, sure == given > -math.inf)
                 for token, sure, given in zip(tokens.tolist(), kept.tolist(), now.tolist(), strict=True)]
        if [slot.token for slot in frame] != [slot.token for slot in self.frames[-1]]:
            self.frames.append(frame)

    @property
    def masked(self) -> int:
        return sum(slot.token == self.mask_token_id for slot in self.frames[-1])


def record(model: DiffusionLM, canvas: Tensor, config: MDMGenerationConfig) -> Trace:
    """Denoise one canvas [L] and keep what happened."""
    trace = Trace(canvas, find_mask_token(model, config), config.alg)
    denoise(model, canvas.unsqueeze(0), config, on_step=trace)
    return trace


def piece(tokenizer, token: int) -> str:
    """The text of a single token; a token that is only a part of a character reads as the replacement sign."""
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def render(trace: Trace, tokenizer) -> Text:
    """The canvas as coloured text."""
    text = Text()
    for slot in trace.frames[-1]:
        if slot.token == trace.mask_token_id:
            text.append(MASK_GLYPH, style="dim")
        elif slot.level is None:
            text.append(piece(tokenizer, slot.token))
        else:
            text.append(piece(tokenizer, slot.token),
                        style=f"{'bold ' if slot.fresh else ''}black on {RAMP[slot.level]}")
    return text


@contextmanager
def watch(tokenizer, canvas: Tensor, mask_token_id: int, alg: str, attention_mask: Tensor | None = None,
          console: Console | None = None) -> Iterator[OnStep]:
    """Show rows [B, L] being denoised: `with watch(...) as on_step: denoise(..., on_step=on_step)`.

    In a terminal the canvas is drawn after every step and stays, coloured, at the end. Elsewhere (a pipe, a file) only
    the final text is printed, without colours. `canvas` and `attention_mask` are what `denoise` gets.
    """
    console = console or Console()
    visible = [None] * len(canvas) if attention_mask is None else [row.bool().cpu() for row in attention_mask]
    traces = [Trace(row, mask_token_id, alg, index, shown)
              for index, (row, shown) in enumerate(zip(canvas, visible, strict=True))]
    steps = 0

    def note(step: CanvasStep) -> None:
        nonlocal steps
        steps = step.index + 1
        for trace in traces:
            trace(step)

    if not console.is_terminal:
        yield note
        for trace in traces:
            print(tokenizer.decode([slot.token for slot in trace.frames[-1]], skip_special_tokens=True,
                                   clean_up_tokenization_spaces=False), file=console.file)
        return

    def rows() -> list[Text]:
        return [render(trace, tokenizer) for trace in traces]

    def frame() -> Group:
        masked = sum(trace.masked for trace in traces)
        return Group(*rows(), Text(f"step {steps}, {masked} still masked", style="dim"), legend())

    with Live(frame(), console=console, auto_refresh=False, transient=True) as live:
        def on_step(step: CanvasStep) -> None:
            note(step)
            live.update(frame(), refresh=True)

        yield on_step
    for trace in traces:
        trace.frames[-1] = [slot._replace(fresh=False) for slot in trace.frames[-1]]
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
.denoise .gone { display: none; }
.denoise.order .slot[data-at]::after { content: attr(data-at); font-size: .65em; vertical-align: super; opacity: .75;
  margin: 0 .15em; }
.denoise label { display: flex; align-items: center; gap: .35rem; min-height: 2.25rem; color: var(--soft); }
.denoise .fresh { outline: 2px solid var(--accent); outline-offset: -1px; }
.denoise .controls { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .75rem 0 0; }
.denoise .controls input[type=range] { flex: 1 1 9rem; min-width: 6rem; accent-color: var(--accent); }
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
  const pre = root.querySelector("pre"), slider = root.querySelector("[type=range]");
  const output = root.querySelector("output"), play = root.querySelector("[data-do=play]");
  const slots = start.map(() => pre.appendChild(document.createElement("span")));
  const frames = [start.map(text => ({ text }))];   // the whole canvas after each step, so that any can be jumped to
  for (const changes of steps) {
    const next = frames.at(-1).map(slot => ({ ...slot, fresh: false }));
    for (const [position, text, level, fresh] of changes)
      next[position] = { text, level, fresh, at: frames.length };
    frames.push(next);
  }
  let now = -1, timer = null;
  const show = step => {
    now = Math.max(0, Math.min(frames.length - 1, step));
    frames[now].forEach((slot, i) => {
      const mask = slot.text === null, committed = !mask && slot.level != null;
      slots[i].textContent = mask ? "\\u00a0\\u00a0" : slot.text;
      slots[i].className = "slot" + (mask ? " mask" : committed ? " l" + slot.level : slot.text === "" ? " gone" : "")
        + (committed && slot.fresh && now < frames.length - 1 ? " fresh" : "");
      if (committed) slots[i].dataset.at = slot.at; else delete slots[i].dataset.at;
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
  root.querySelector("[type=checkbox]").addEventListener("change",
    event => root.classList.toggle("order", event.target.checked));
  slider.max = frames.length - 1;
  slider.addEventListener("input", () => { stop(); show(+slider.value); });
  show(0);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) go();
}
"""


def animation(trace: Trace, tokenizer, shown: range | None = None) -> str:
    """HTML of a recorded denoising with play, step and slider controls.

    `shown` are the positions to show (None: all), those that changed among them. Goes into the body of a page that has
    ANIMATION_STYLE and, after it, ANIMATION_SCRIPT. Nothing is fetched.
    """
    def text(slot: Slot) -> str | None:
        return None if slot.token == trace.mask_token_id else piece(tokenizer, slot.token)

    width = max(len(frame) for frame in trace.frames)
    shown = shown or range(width)
    gone = Slot(-1, None)  # where the canvas is shorter than at another time
    frames = [[*frame, *[gone] * (width - len(frame))][shown.start:shown.stop] for frame in trace.frames]
    start = ["" if slot is gone else text(slot) for slot in frames[0]]
    if start and start[0]:
        start[0] = start[0].lstrip("\r\n")  # what is shown begins with a line, not with the end of the one before
    steps = [[(place, "" if now is gone else text(now), now.level, int(now.fresh))
              for place, (then, now) in enumerate(zip(before, after, strict=True)) if then[:2] != now[:2]]
             for before, after in pairwise(frames)]
    # In a script element only "</" and "<!--" can end or change the data; an escaped < means the same to JSON.
    payload = json.dumps({"start": start, "steps": steps}, separators=(",", ":")).replace("<", "\\u003c")
    last = len(steps)
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
<label><input type="checkbox"> order</label>
</div>
<div class="legend"><span>less sure</span>{swatches}<span>surer; grey is still hidden, the rest was given</span></div>
</div>"""
