"""Ulysses (arXiv:2309.14509): P processes share the positions of packed rows, for documents that are too long for one.

Everything but attention is computed on a part of the positions; attention on all of them, for a part of the heads.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single


def heads_to_positions(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L, H / P, E], all positions of this process's heads -> [B, L / P, H, E], all heads of its positions."""
    size = dist.get_world_size(group)
    parts = x.unflatten(1, (size, -1)).movedim(1, 0).contiguous()  # by the process that the positions belong to
    return all_to_all_single(torch.empty_like(parts), parts, group=group).movedim(0, 2).flatten(2, 3)


def positions_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L / P, H, E] -> [B, L, H / P, E]. Fewer heads than processes are repeated first, H = P of them."""
    size = dist.get_world_size(group)
    if x.shape[2] < size:
        x = x.repeat_interleave(size // x.shape[2], dim=2)
    parts = x.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
    return all_to_all_single(torch.empty_like(parts), parts, group=group).movedim(0, 1).flatten(1, 2)
