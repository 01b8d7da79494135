"""Which blocks of a block-causal model's canvas are denoised together (D2F, arXiv:2508.09192; multi-block decoding)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Window(NamedTuple):
    """At most so many blocks, from a row's first unfinished one on; the later ones begin while the earlier ones still
    have masked positions. L positions are N blocks."""

    block_length: int
    blocks: int
    enter_share: float
    full_share: float

    def split(self, x: Tensor, fill: float | bool) -> Tensor:
        """x [B, L] in blocks, [B, N, block_length]; the last one is filled up."""
        return F.pad(x, (0, -x.shape[1] % self.block_length), value=fill).unflatten(1, (-1, self.block_length))

    def open(self, masked: Tensor, editable: Tensor) -> tuple[Tensor, Tensor]:
        """Which blocks are denoised, and which commit at least one position a step: [B, N] bool each.

        A block joins once `enter_share` of the positions to fill of the one before it is filled; it must commit once
        `full_share` is. A row's first unfinished block always does both. masked, editable: [B, L] bool.
        """
        left, size = (self.split(x, False).sum(2) for x in (masked, editable))
        share = torch.where(size > 0, (size - left).double() / size, 1.0)
        number = torch.arange(left.shape[1], device=left.device)
        first = (left == 0).cumprod(1).sum(1, keepdim=True)
        before = F.pad(share, (1, -1), value=1.0)
        joined = ((before >= self.enter_share) | (number <= first)).cumprod(1).bool()
        return joined & (number < first + self.blocks), before >= self.full_share
