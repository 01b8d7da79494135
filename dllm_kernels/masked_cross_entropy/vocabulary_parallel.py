"""The loss where each process of a group holds a slice of the words (vocabulary parallelism, arXiv:1909.08053).

Every process takes the cross-entropy over its own words, with a target of its own, by any backend. That gives the
normaliser of its slice, lse_r = nll + z[target]; logsumexp of lse_r over the processes is the whole one, so a few
numbers per position cross between them. Autograd then gives the gradients: a slice's words take theirs from lse_r, the
hidden states the sum over the processes.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .rows import Linear, Scored


def count_words(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The number of words of each process, int64, the same in all."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
    sizes[dist.get_rank(group)] = len(weight)
    dist.all_reduce(sizes, group=group)
    return sizes


def combine(slice_nll: Callable[[Linear, Scored], Tensor], inputs: Linear, scored: Scored, softcap: float | None,
            sizes: Tensor, group: dist.ProcessGroup) -> Tensor:
    """nll [N] over the words of all processes, the same in each, 0 where not corrupted.

    Args:
        slice_nll: gives the nll [N] over this slice's words of targets in it, 0 where not corrupted.
        inputs: hidden [N, D] is the same in every process, and each gets its whole gradient; weight and bias are this
            process's words, in the order of ranks.
        scored: targets in [0, sum of sizes); out of it, nll is NaN.
        sizes: from `count_words`.
    """
    hidden, weight, bias = inputs
    targets, corrupted = scored[:2]
    hidden = _SumGradients.apply(hidden, group)
    place = targets - sizes[:dist.get_rank(group)].sum()
    mine = corrupted & (place >= 0) & (place < len(weight))
    own_target = torch.where(mine, place, 0)
    # Positions that are not corrupted may hold anything, even NaN, so they must not be multiplied.
    rows = torch.where(corrupted.unsqueeze(1), hidden, 0).to(torch.promote_types(hidden.dtype, torch.float32))
    z = (rows * weight[own_target]).sum(1)
    if bias is not None:
        z = z + bias[own_target]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse_of_slice = slice_nll(Linear(hidden, weight, bias), scored._replace(targets=own_target)) + z
    top = lse_of_slice.detach().clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    total = _Sum.apply((lse_of_slice - top).exp(), group)
    target_logit = _Sum.apply(torch.where(mine, z, 0), group)
    target_logit = torch.where((targets >= 0) & (targets < sizes.sum()), target_logit, torch.nan)
    return torch.where(corrupted, total.log() + (top - target_logit), 0)


class _Sum(torch.autograd.Function):
    """Sum over the processes. All continue alike, so each process's gradient is the upstream one."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumGradients(torch.autograd.Function):
    """Identity whose gradient is the sum over the processes, because each uses the values for its own words."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
