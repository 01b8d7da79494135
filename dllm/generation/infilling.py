"""Gaps between a prefix and a suffix: laid out as one canvas, denoised together, and their lengths chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dllm.errors import UserError
from dllm.generation.canvas import block_of_gap, block_of_text, counts_from_text, steps_of_block
from dllm.generation.checks import find_mask_token
from dllm.generation.config import ENTROPIES, MDMGenerationConfig
from dllm.generation.inputs import read_prompts
from dllm.generation.output import GenerationOutput, OnStep
from dllm.generation.renoising import Renoising
from dllm.generation.sampler import Denoising, finish
from dllm.generation.sampler import begin as begin_canvas
from dllm.model.transformer import Transformer


@dataclass(frozen=True, slots=True, eq=False)
class Gap:
    """`length` positions to fill between two sequences of tokens; "auto" leaves the number to `settle_length`."""

    prefix: Tensor  # [P] int64
    suffix: Tensor  # [S] int64
    length: int | Literal["auto"]
    text: Tensor | None = None  # [length] int64, the tokens there that are edited; None: masks

    def __post_init__(self):
        whole = isinstance(self.length, Integral) and not isinstance(self.length, bool)
        if self.length != "auto" and not (whole and self.length >= 1):
            raise UserError(f"length must be at least 1 or 'auto', not {self.length!r}: the number of tokens to "
                            "fill in")

    @property
    def positions(self) -> int:
        """Of the gap, with what is before and after it."""
        return len(self.prefix) + self.length + len(self.suffix)

    def inside(self, row: Tensor) -> Tensor:
        """The part of a row [P + n + S] between prefix and suffix, [n]."""
        return row[len(self.prefix):len(row) - len(self.suffix)]


class Filled(NamedTuple):
    gaps: list[Gap]  # with the lengths that were settled
    answers: list[Tensor]  # the tokens [n] of each gap on the CPU; num_return_sequences of a gap next to each other
    output: GenerationOutput  # of the whole canvas; attention_mask is None where every row fills it


def fill(model: Transformer, gaps: Sequence[Gap], config: MDMGenerationConfig | None = None, *,
         sequence: Tensor | None = None, on_step: OnStep | None = None) -> Filled:
    """Denoise gaps of any prefixes, suffixes and lengths together.

    sequence: [B] int64, the number by which each gap draws its random numbers; see `Denoising`.
    """
    config = config or MDMGenerationConfig()
    gaps = [settle_length(model, gap, config) for gap in gaps]
    denoising, visible = begin(model, gaps, config, sequence)
    out = finish(denoising, on_step)
    if out.attention_mask is None and not bool(visible.all()):
        visible = visible.repeat_interleave(config.num_return_sequences, 0)
        out = replace(out, attention_mask=visible.to(out.sequences.device))
    copies = config.num_return_sequences
    return Filled(gaps, [gaps[i // copies].inside(row) for i, row in enumerate(out.rows())], out)


def begin(model: Transformer, gaps: Sequence[Gap], config: MDMGenerationConfig,
          sequence: Tensor | None = None) -> tuple[Denoising | Renoising, Tensor]:
    """What `fill` denoises, for gaps whose lengths are settled; and where the canvas has no padding, [B, L] bool."""
    if (longest := max((gap.positions for gap in gaps), default=0)) > model.config.max_position_embeddings:
        raise UserError(f"a gap needs {longest} positions with what is before and after it, the model has "
                        f"{model.config.max_position_embeddings}; shorten the text or the gap")
    canvas, visible = lay_out(gaps, find_mask_token(model, config), aligned=config.cache != "none")
    return begin_canvas(model, canvas, config, visible, sequence, editable=find_texts(gaps, canvas)), visible


def read_rows(model: Transformer, ids: Any, name: str) -> list[Tensor]:
    """The tokens [P] of each row, without padding; see `read_prompts`."""
    ids, mask = read_prompts(model, ids, name=name)
    return list(ids) if mask is None else [row[real] for row, real in zip(ids, mask, strict=True)]


def infill(model: Transformer, prefix_ids: Any, suffix_ids: Any, *, length: int | str,
           generation_config: MDMGenerationConfig | None = None, on_step: OnStep | None = None) -> GenerationOutput:
    """Denoise `length` masked positions between prefix [B, P] or [P] and suffix [B, S] or [S], each as `read_prompts`
    takes them; see `settle_length` for the length "auto".

    Returns: sequences [B, P + length + S], padded on the right where lengths differ; attention_mask then says where
        each row ends.
    """
    prefixes, suffixes = (read_rows(model, ids, name) for ids, name in ((prefix_ids, "prefix_ids"),
                                                                        (suffix_ids, "suffix_ids")))
    if len(prefixes) != len(suffixes):
        raise UserError(f"there are {len(prefixes)} prefixes and {len(suffixes)} suffixes; give as many of each")
    gaps = [Gap(prefix, suffix, length) for prefix, suffix in zip(prefixes, suffixes, strict=True)]
    return fill(model, gaps, generation_config, on_step=on_step).output


def lay_out(gaps: Sequence[Gap], mask_token_id: int, *, aligned: bool = False) -> tuple[Tensor, Tensor]:
    """The canvas [B, L], a gap with its prefix and suffix in each row, and [B, L] bool, False where there is padding.

    aligned: let all gaps begin in the same column, as caches want it; else all rows begin in the first column.
    """
    rows = [torch.cat((gap.prefix, gap.prefix.new_full((gap.length,), mask_token_id) if gap.text is None else gap.text,
                       gap.suffix)) for gap in gaps]
    longest = max(len(gap.prefix) for gap in gaps) if aligned else 0
    starts = [longest - len(gap.prefix) if aligned else 0 for gap in gaps]
    width = max(start + len(row) for start, row in zip(starts, rows, strict=True))
    canvas = rows[0].new_zeros(len(rows), width)
    visible = torch.zeros_like(canvas, dtype=torch.bool)
    for index, (start, row) in enumerate(zip(starts, rows, strict=True)):
        canvas[index, start:start + len(row)] = row
        visible[index, start:start + len(row)] = True
    return canvas, visible


def find_texts(gaps: Sequence[Gap], canvas: Tensor) -> Tensor | None:
    """[B, L] bool: the texts to edit on the canvas that `lay_out` made of the gaps; None: the gaps hold masks."""
    if gaps[0].text is None:
        return None
    first, length = (torch.tensor(values).unsqueeze(1) for values in (
        [len(gap.prefix) for gap in gaps], [gap.length for gap in gaps]))
    place = torch.arange(canvas.shape[1])
    return (place >= first) & (place < first + length)


def settle_length(model: Transformer, gap: Gap, config: MDMGenerationConfig) -> Gap:
    """The gap with a number in the place of the length "auto": the shortest of `config.infill_lengths` where gaps
    expand, else `choose_length`."""
    if gap.length != "auto":
        return gap
    if model.config.canvas_length is not None:
        raise UserError("this model (DiffusionGemma) continues texts, and has no length of a gap to choose; give a "
                        "number")
    if config.edits:  # as many tokens as come to be
        room = model.config.max_position_embeddings - len(gap.prefix) - len(gap.suffix)
        return replace(gap, length=max(1, min(config.max_infill_length, room)))
    expands = config.expand_token_id is not None
    return replace(gap, length=min(config.infill_lengths) if expands else choose_length(model, gap, config))


def fits(model: Transformer, gap: Gap, config: MDMGenerationConfig) -> bool:
    """Whether a gap fits into the model's positions, and the config's blocks, steps and constraint fit the gap."""
    if gap.positions > model.config.max_position_embeddings:
        return False
    block, of_text = block_of_gap(model, config), block_of_text(model, config)
    if counted := block or of_text:
        blocks = -(-gap.length // counted)
        if of_text and counts_from_text(model, config):
            last = (len(gap.prefix) + gap.length - 1) // of_text
            # Masked positions may complete the last block of the row, which is then one more to fill.
            completed = gap.positions % of_text > 0 and gap.positions // of_text > last
            blocks = last - len(gap.prefix) // of_text + 1 + completed
        try:
            steps_of_block(config, counted, blocks, even=block is not None)
        except UserError:
            return False
    return gap.length % (block or 1) == 0 and (config.constraint is None or config.constraint.fits(gap.length))


def choose_length(model: Transformer, gap: Gap, config: MDMGenerationConfig) -> int:
    """The length of `config.infill_lengths` whose infilling the model is surest of.

    All candidates are denoised in one batch, one row each, and compared by the mean over their tokens of the logarithm
    of the confidence with which each was committed (of minus entropies: of the confidence itself, a logarithm).
    Measured on a model that knew its texts by heart (24 texts, 12 candidates), it found 79% of the lengths; the mean of
    the first step's confidences found 73%, the sum instead of the mean 60%. A model that knows little, as the demo's,
    gives no information about the length by any of them.

    Lengths are left out that leave the model's positions, or that block_length, steps or constraint do not allow.
    Raises: UserError if none is left.
    """
    config = replace(config, num_return_sequences=1, output_history=False)
    lengths = [n for n in config.infill_lengths if fits(model, replace(gap, length=n), config)]
    if not lengths:
        raise UserError(f"none of infill_lengths {list(config.infill_lengths)} can be filled as the model's "
                        f"{model.config.max_position_embeddings} positions, block_length, steps and constraint want "
                        "it; choose others, or give a length")
    out = fill(model, [replace(gap, length=n) for n in lengths], config).output
    filled = out.confidence.isfinite()
    sure = out.confidence.where(filled, 1.0)
    sure = sure if config.method in ENTROPIES else sure.clamp(min=1e-9).log()
    mean = (sure * filled).sum(1) / torch.tensor(lengths, device=filled.device)
    return lengths[int(mean.argmax())]
