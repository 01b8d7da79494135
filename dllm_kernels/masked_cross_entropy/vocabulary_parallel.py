"""The loss where each process of a group holds a slice of the words (vocabulary parallelism, arXiv:1909.08053).

Every process takes the cross-entropy over its own words, with a target of its own, by any backend. That gives the
normaliser of its slice, lse_r = nll + z[target]; the whole one is logsumexp over the processes of lse_r: what crosses
between them is a few numbers per position. The gradients follow by themselves: of a slice's words from lse_r, of the
hidden states as the sum over the processes.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def count_words(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """How many words each process holds, int64, the same in each."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
    sizes[dist.get_rank(group)] = len(weight)
    dist.all_reduce(sizes, group=group)
    return sizes


def combine(slice_loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, targets: Tensor,
            corrupted: Tensor, bias: Tensor | None, softcap: float | None, sizes: Tensor,
            group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """nll and logsumexp [N] over the words of all processes, the same in each, 0 where not corrupted.

    Args:
        slice_loss: (hidden, targets within this slice) -> nll [N] over this slice's words, 0 where not corrupted.
        hidden: [N, D], the same in every process; its gradient is the whole one in each.
        weight, bias: [Vr, D] and [Vr], the words of this process, which follow those of the process before it.
        targets: [N] int64 in [0, sum of Vr); out of it, nll is NaN.
        sizes: Vr of all processes, from `count_words`.
    """
    hidden = _SumGradients.apply(hidden, group)
    place = targets - sizes[:dist.get_rank(group)].sum()
    mine = corrupted & (place >= 0) & (place < len(weight))
    own_target = torch.where(mine, place, 0)
    # Positions that are not corrupted may hold anything, also NaN: they must not be multiplied.
    rows = torch.where(corrupted.unsqueeze(1), hidden, 0).to(torch.promote_types(hidden.dtype, torch.float32))
    z = (rows * weight[own_target]).sum(1)
    if bias is not None:
        z = z + bias[own_target]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse_of_slice = slice_loss(hidden, own_target) + z
    top = lse_of_slice.detach().clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    total = _Sum.apply((lse_of_slice - top).exp(), group)
    target_logit = _Sum.apply(torch.where(mine, z, 0), group)
    target_logit = torch.where((targets >= 0) & (targets < sizes.sum()), target_logit, torch.nan)
    lse = torch.where(corrupted, top + total.log(), 0)
    return torch.where(corrupted, total.log() + (top - target_logit), 0), lse


class _Sum(torch.autograd.Function):
    """Over the processes. What follows is the same in each, so each one's gradient is the upstream one."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumGradients(torch.autograd.Function):
    """The same values; each process uses them for its own words, so their gradient is the sum over the processes."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
