"""Denoising made visible: live in a terminal, and as an animation for a page.

Both colour a token by the confidence with which it was committed, on one ramp of light backgrounds under black text, so
that it reads the same on a dark and on a light screen.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, TypedDict

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from dllm.generation.config import ENTROPIES, MDMGenerationConfig
from dllm.generation.output import CanvasStep, OnStep
from dllm.generation.renoising import Renoising
from dllm.generation.sampler import Denoising, begin, finish
from dllm.generation.steps import Update
from dllm.model.transformer import Transformer
from dllm.pages.base import DELETED, INSERTED, RAMP

MASK_GLYPH = "▒"
EDIT_STYLES = {"inserted": f"bold black on {INSERTED}", "deleted": f"strike black on {DELETED}"}


def confidence_level(confidence: float, alg: str) -> int:
    """The place on RAMP, 0..4, of a confidence of this algorithm: probabilities and margins are shares already, and an
    entropy (sum of p log p) counts as the probability that has it when all words are equally likely."""
    share = math.exp(confidence) if alg in ENTROPIES else confidence
    return int(min(max(share, 0.0) * len(RAMP), len(RAMP) - 1))


class Slot(NamedTuple):
    """One position of a canvas."""

    token: int
    level: int | None  # the place on RAMP of a committed token; None: given, or masked
    fresh: bool = False  # committed by the last step
    edit: Literal["inserted", "deleted"] | None = None  # by the last step


GONE = Slot(-1, None)  # where the canvas is shorter than at another time


@dataclass(slots=True)
class Trace:
    """What happened to one row of a canvas. Fed to `denoise` as `on_step=trace`."""

    tokens: InitVar[Tensor]  # [L] int64, the canvas at first
    mask_token_id: int
    alg: str
    row: int = 0
    visible: Tensor | None = None  # [L] bool, False where there is padding; None: none
    # The canvas at first, and after each step that changed it; with what a step of edits deleted.
    frames: list[list[Slot]] = field(default_factory=list)

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
        if step.edits is not None:
            frame = self._mark_edits(frame, step.edits)
        if [slot.token for slot in frame] != [slot.token for slot in self.now] or any(slot.edit for slot in frame):
            self.frames.append(frame)

    def _mark_edits(self, frame: list[Slot], edits: Update) -> list[Slot]:
        """The canvas after a step, with what the step inserted marked, and what it deleted in its place."""
        after, marked = iter(frame), []
        for slot, deleted, token in zip(self.now, edits.deleted[self.row].tolist(), edits.inserted[self.row].tolist(),
                                        strict=False):  # padding follows
            marked.append(slot._replace(edit="deleted") if deleted else next(after))
            if token >= 0:
                marked.append(next(after)._replace(edit="inserted"))
        return marked

    @property
    def now(self) -> list[Slot]:
        """The canvas after the last step, without marks of what it did."""
        return [slot._replace(fresh=False, edit=None) for slot in self.frames[-1] if slot.edit != "deleted"]

    @property
    def masked(self) -> int:
        return sum(slot.token == self.mask_token_id for slot in self.now)


def record(model: Transformer, canvas: Tensor, config: MDMGenerationConfig) -> Trace:
    """Denoise one canvas [L] and keep what happened."""
    denoising = begin(model, canvas.unsqueeze(0), config)
    trace = trace_rows(denoising)[0]
    finish(denoising, trace)
    return trace


def trace_rows(denoising: Denoising | Renoising) -> list[Trace]:
    """A trace of each row, from the canvas as it is now."""
    now = denoising.result()
    visible = denoising.layout.given_mask if now.attention_mask is None else now.attention_mask
    visible = [None] * len(now.sequences) if visible is None else visible.cpu()
    return [Trace(row, denoising.mask_token_id, denoising.config.method, index, shown)
            for index, (row, shown) in enumerate(zip(now.sequences, visible, strict=True))]


def pieces(tokenizer, slots: list[Slot]) -> list[str]:
    """The texts of single tokens; a token that is only a part of a character reads as the replacement sign. A special
    token that was given, such as the one before a text to edit, is not shown."""
    special = {*tokenizer.all_special_ids}
    return ["" if slot.token < 0 or slot.level is None and slot.token in special
            else tokenizer.decode([slot.token], clean_up_tokenization_spaces=False) for slot in slots]


def color_text(slots: list[Slot], mask_token_id: int, tokenizer) -> Text:
    """A canvas as coloured text."""
    text = Text()
    for slot, shown in zip(slots, pieces(tokenizer, slots), strict=True):
        masked = slot.token == mask_token_id
        shown = MASK_GLYPH if masked else shown
        if slot.edit is not None:
            text.append(shown, style=EDIT_STYLES[slot.edit])
        elif masked:
            text.append(shown, style="dim")
        elif slot.level is None:
            text.append(shown)
        else:
            text.append(shown, style=f"{'bold ' if slot.fresh else ''}black on {RAMP[slot.level]}")
    return text


@contextmanager
def watch(tokenizer, traces: list[Trace], console: Console | None = None) -> Iterator[OnStep]:
    """Show rows being denoised, and keep what happens: `with watch(...) as on_step: finish(denoising, on_step)`.

    In a terminal the canvas is drawn after every step and stays, coloured, at the end. Elsewhere (a pipe, a file) only
    the final text is printed, without colours. traces: the `trace_rows` of the `denoising`.
    """
    console = console or Console()
    edits = any(trace.alg == "edit" for trace in traces)
    steps = 0

    def note(step: CanvasStep) -> None:
        nonlocal steps
        steps = step.index + 1
        for trace in traces:
            trace(step)

    if not console.is_terminal:
        yield note
        for trace in traces:
            print(tokenizer.decode([slot.token for slot in trace.now], skip_special_tokens=True,
                                   clean_up_tokenization_spaces=False), file=console.file)
        return

    def draw(trace: Trace, slots: list[Slot]) -> Text:
        return color_text(slots, trace.mask_token_id, tokenizer)

    def frame() -> Group:
        left = f"{sum(len(trace.now) for trace in traces)} tokens" if edits else \
            f"{sum(trace.masked for trace in traces)} still masked"
        return Group(*(draw(trace, trace.frames[-1]) for trace in traces),
                     Text(f"step {steps}, {left}", style="dim"), legend(edits))

    with Live(frame(), console=console, auto_refresh=False, transient=True) as live:
        def on_step(step: CanvasStep) -> None:
            note(step)
            live.update(frame(), refresh=True)

        yield on_step
    console.print(*(draw(trace, trace.now) for trace in traces), legend(edits), sep="\n")


def legend(edits: bool) -> Text:
    kinds = [part for kind, style in EDIT_STYLES.items() for part in ((" ", ""), (f" {kind} ", style))]
    return Text.assemble(("confidence ", "dim"), *((f" {text} ", f"black on {color}") for color, text in
                                                   zip(RAMP, ("low", "", "", "", "high"), strict=True)),
                         *(kinds if edits else ()))


class Animation(TypedDict):
    """A recorded denoising, as animation.js plays it."""

    start: list[str | None]  # the text of each position; None: masked
    # What changed: (position, text, place on RAMP, what the step did: 1 committed, 2 inserted, 3 deleted, else 0).
    steps: list[list[tuple[int, str | None, int | None, int]]]


def animation(trace: Trace, tokenizer, shown: range | None = None) -> Animation:
    """What a page plays. `shown` are the positions to show (None: all), those that changed among them."""
    def texts(slots: list[Slot]) -> list[str | None]:
        return [None if slot.token == trace.mask_token_id else text
                for slot, text in zip(slots, pieces(tokenizer, slots), strict=True)]

    def mark(slot: Slot) -> int:
        return {"inserted": 2, "deleted": 3}.get(slot.edit, int(slot.fresh))

    frames = align(trace.frames if len(trace.now) == len(trace.frames[-1]) else [*trace.frames, trace.now])
    shown = shown or range(len(frames[0]))
    frames = [frame[shown.start:shown.stop] for frame in frames]
    start = texts(frames[0])
    if start and start[0]:
        start[0] = start[0].lstrip("\r\n")  # what is shown begins with a line, not with the end of the one before
    steps = []
    for before, after in pairwise(frames):
        places = [place for place, (then, now) in enumerate(zip(before, after, strict=True))
                  if then[:2] != now[:2] or now.edit == "deleted"]
        changed = [after[place] for place in places]
        steps.append([(place, text, slot.level, mark(slot))
                      for place, slot, text in zip(places, changed, texts(changed), strict=True)])
    return {"start": start, "steps": steps}


def align(frames: list[list[Slot]]) -> list[list[Slot]]:
    """The frames as one table, in which a token that others are inserted before stays in its column, and GONE is where
    there is none."""
    if not any(slot.edit for frame in frames for slot in frame):
        width = max(map(len, frames))
        return [[*frame, *[GONE] * (width - len(frame))] for frame in frames]
    order = [*range(len(frames[0]))]  # the columns from left to right, numbered as they come to be
    table = [dict(zip(order, frames[0], strict=True))]
    for frame in frames[1:]:
        stay = (column for column, slot in table[-1].items() if slot.edit != "deleted")
        row, column = {}, order[0]
        for slot in frame:
            if slot.edit == "inserted":
                order.insert(order.index(column) + 1, len(order))
            column = len(order) - 1 if slot.edit == "inserted" else next(stay)
            row[column] = slot
        table.append(row)
    return [[row.get(column, GONE) for column in order] for row in table]
