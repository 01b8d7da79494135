"""Rows as a person can read them: where chunks begin, what is learnt, and what the model is given to read."""

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text
from torch import Tensor

from dllm.data.alignment import BLANK
from dllm.data.packing import Packed
from dllm.diffusion.corruption import corrupt
from dllm.training.batches import spread_times
from dllm_kernels import philox_uniform

MASK = "▒"  # one token
LEARNT = ("«", "»")  # around what is learnt, where not all is
DELETED, INSERTED = ("[-", "-]"), ("{+", "+}")  # as wdiff writes them


def show_rows(packed: Packed, tokenizer, seed: int, console: Console) -> None:
    """Print rows chunk by chunk: the text, then, if there is a mask token, a corrupted copy, as in a training step of
    these rows; of pairs, the edits."""
    if packed.before is not None:
        return show_pairs(packed, tokenizer, console)
    rows = int(packed.row[-1]) + 1
    uniform = philox_uniform(seed, packed.row, 0, packed.column)[..., 0]
    corruption = None if tokenizer.mask_token_id is None else corrupt(
        packed.tokens, packed.cu_seqlens, tokenizer.mask_token_id,
        times=spread_times(packed, packed.cu_seqlens, 0, rows, seed, 0), uniform=uniform, maskable=packed.trainable)
    counts = packed.row.bincount().tolist()
    bounds = packed.cu_seqlens.tolist()
    for first, end in zip(bounds, bounds[1:], strict=False):
        row, part = int(packed.row[first]), slice(first, end)
        if packed.column[first] == 0:
            learnt = "" if packed.trainable is None else f", {int(packed.trainable[packed.row == row].sum())} to learn"
            console.print(Text(f"row {row}: {counts[row]} tokens{learnt}", style="bold"), soft_wrap=True)
        console.print(Text(f"  chunk of {end - first} tokens", style="dim"), soft_wrap=True)
        marks = None if packed.trainable is None else packed.trainable[part]
        console.print(_paint(packed.tokens[part], marks, None, tokenizer), soft_wrap=True)
        if corruption is None:
            continue
        console.print(Text(f"  corrupted at t = {corruption.t[first]:.2f}", style="dim"), soft_wrap=True)
        console.print(_paint(packed.tokens[part], None, corruption.corrupted[part], tokenizer), soft_wrap=True)


def show_pairs(packed: Packed, tokenizer, console: Console) -> None:
    counts, bounds = packed.row.bincount().tolist(), packed.cu_seqlens.tolist()
    edits = (packed.before != packed.tokens).long()
    for first, end in zip(bounds, bounds[1:], strict=False):
        if packed.column[first] == 0:
            row = int(packed.row[first])
            console.print(Text(f"row {row}: {counts[row]} columns, {int(edits[packed.row == row].sum())} edits",
                               style="bold"), soft_wrap=True)
        console.print(Text(f"  chunk of {end - first} columns", style="dim"), soft_wrap=True)
        text = Text()
        for start, stop in _runs(edits[first:end]):
            part = slice(first + start, first + stop)
            before, after = (side[part][side[part] != BLANK] for side in (packed.before, packed.tokens))
            for tokens, (left, right), style in ((before, DELETED, "red"), (after, INSERTED, "green")):
                if edits[part.start] and len(tokens):
                    text.append(f"{left}{tokenizer.decode(tokens)}{right}", style=style)
            if not edits[part.start]:
                text.append(tokenizer.decode(after))
        console.print(text, soft_wrap=True)


def _runs(marks: Tensor) -> Iterator[tuple[int, int]]:
    """Start and end of each run of equal marks."""
    lengths = marks.unique_consecutive(return_counts=True)[1]
    return zip((lengths.cumsum(0) - lengths).tolist(), lengths.cumsum(0).tolist(), strict=True)


def _paint(tokens: Tensor, learnt: Tensor | None, masked: Tensor | None, tokenizer) -> Text:
    text = Text()
    marks = learnt if masked is None else masked
    for start, end in [(0, len(tokens))] if marks is None else _runs(marks):
        marked = marks is not None and bool(marks[start])
        if masked is not None and marked:
            text.append(MASK * (end - start), style="yellow")
        else:
            run = tokenizer.decode(tokens[start:end])
            text.append(f"{LEARNT[0]}{run}{LEARNT[1]}" if marked else run, style="green" if marked else "")
    return text
