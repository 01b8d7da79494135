"""What denoising gives: the canvas after each step, and the whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dllm.generation.steps import Update


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    sequences: Tensor  # [B, L] int64
    history: list[Tensor] | None  # the canvas after each step, with output_history
    steps: int  # denoising steps taken, with those that needed no forward pass
    forwards: int  # forward passes of the model
    tokens_per_forward: float  # positions filled / forward passes, counted row by row
    confidence: Tensor  # [B, L] fp32 with which each token was committed (on the scale of `alg`), -inf where given
    attention_mask: Tensor | None = None  # [B, L] bool, False after a row's end; None: all rows fill the canvas

    def rows(self) -> list[Tensor]:
        """The tokens of each row on the CPU, without what is after its end."""
        rows = list(self.sequences.cpu())
        if self.attention_mask is None:
            return rows
        return [row[seen] for row, seen in zip(rows, self.attention_mask.cpu(), strict=True)]


class CanvasStep(NamedTuple):
    """The canvas after a denoising step."""

    index: int  # from 0
    tokens: Tensor  # [B, L] int64
    confidence: Tensor | None  # [B, L] fp32 of this step, -inf where not scored; None if nothing was scored
    kept: Tensor  # [B, L] fp32 with which each token was committed, -inf where none was committed
    visible: Tensor | None  # [B, L] bool, False after a row's end, if gaps can grow and shrink; else None
    # What the step deleted, and inserted after each token, of the canvas before it. None: no token has moved by edits.
    edits: Update | None = None


OnStep = Callable[[CanvasStep], None]
