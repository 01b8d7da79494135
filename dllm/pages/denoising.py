"""Denoising made visible: live in a terminal, and as an animation for a page.

Both colour a token by the confidence with which it was committed, on one ramp of light backgrounds under black text, so
that it reads the same on a dark and on a light screen.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from itertools import pairwise
from typing import NamedTuple, TypedDict

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import CanvasStep, OnStep, denoise, find_mask_token
from dllm.model.transformer import Transformer
from dllm.pages.base import RAMP

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


def record(model: Transformer, canvas: Tensor, config: MDMGenerationConfig) -> Trace:
    """Denoise one canvas [L] and keep what happened."""
    trace = Trace(canvas, find_mask_token(model, config), config.alg)
    denoise(model, canvas.unsqueeze(0), config, on_step=trace)
    return trace


def piece(tokenizer, token: int) -> str:
    """The text of a single token; a token that is only a part of a character reads as the replacement sign."""
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def color_text(trace: Trace, tokenizer) -> Text:
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
        return [color_text(trace, tokenizer) for trace in traces]

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


class Animation(TypedDict):
    """A recorded denoising, as animation.js plays it."""

    start: list[str | None]  # the text of each position; None: masked
    steps: list[list[tuple[int, str | None, int | None, int]]]  # (position, text, place on RAMP, fresh), what changed


def animation(trace: Trace, tokenizer, shown: range | None = None) -> Animation:
    """What a page plays. `shown` are the positions to show (None: all), those that changed among them."""
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
    return {"start": start, "steps": steps}
