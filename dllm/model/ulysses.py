"""Ulysses (arXiv:2309.14509): P processes share the positions of packed rows, for documents that are too long for one.

Everything but attention is computed on a part of the positions; attention on all of them, for a part of the heads.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def heads_to_positions(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L, H / P, E], all positions of this process's heads -> [B, L / P, H, E], all heads of its positions."""
    size = dist.get_world_size(group)
    parts = x.unflatten(1, (size, -1)).movedim(1, 0).contiguous()  # by the process that the positions belong to
    return _Exchange.apply(parts, group).movedim(0, 2).flatten(2, 3)


def positions_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L / P, H, E] -> [B, L, H / P, E]. Fewer heads than processes are repeated first, H = P of them."""
    size = dist.get_world_size(group)
    if x.shape[2] < size:
        x = x.repeat_interleave(size // x.shape[2], dim=2)
    parts = x.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
    return _Exchange.apply(parts, group).movedim(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """parts [P, ...]: part p goes to process p, and its part for us comes back in its place. Its own transpose."""

    @staticmethod
    def forward(ctx, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradient.contiguous(), ctx.group), None
