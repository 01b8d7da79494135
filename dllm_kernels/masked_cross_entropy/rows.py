"""The arithmetic of a row that the backends share, and the loss from logits as a function of autograd.

With top = max(z), total = sum(exp(z - top)) and target_logit = z[y] of each row, everything else is a few numbers per
row; a backend gives the two passes over the logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels.masked_cross_entropy.reference import refuse_second_derivative


class Passes(NamedTuple):
    """The passes over logits [N, V] whose last stride is 1; targets [N] int64, corrupted [N] bool, softcap or None."""

    statistics: Callable  # (logits, targets, corrupted, softcap) -> top, total, target_logit; 0, 1, 0 if not corrupted
    gradients: Callable  # (logits, targets, corrupted, softcap, top, probability_scale, target_scale) -> [N, V]


class FromLogits(torch.autograd.Function):
    """`reference.masked_cross_entropy`, by the `Passes` of a backend, without a host synchronisation of its own."""

    @staticmethod
    def forward(ctx, logits, targets, corrupted, weights, reduction, softcap, z_loss, passes):
        targets, corrupted = targets.contiguous(), corrupted.contiguous()
        scale = row_scale(corrupted, weights, corrupted.sum() if reduction == "mean" else None)
        top, total, target_logit = passes.statistics(with_rows_contiguous(logits), targets, corrupted, softcap)
        ctx.save_for_backward(logits, targets, corrupted, scale, top, total)
        ctx.softcap, ctx.z_loss, ctx.passes = softcap, z_loss, passes
        loss = row_loss(top, total, target_logit, scale, z_loss)
        return loss if reduction == "none" else loss.sum()

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        logits, targets, corrupted, scale, top, total = ctx.saved_tensors
        scale = torch.where(corrupted, scale * grad, 0.0)
        gradient = ctx.passes.gradients(with_rows_contiguous(logits), targets, corrupted, ctx.softcap, top,
                                        probability_scale(scale, top, total, ctx.z_loss), scale)
        return gradient, None, None, None, None, None, None, None


def row_scale(live: Tensor, weights: Tensor | None, count: Tensor | None) -> Tensor:
    """What the loss of each row is multiplied by, fp32, 0 where not live: its weight, over `count` for a mean."""
    scale = live.float() if weights is None else torch.where(live, weights.float(), 0.0)
    return scale if count is None else scale / count.clamp(min=1)


def row_loss(top: Tensor, total: Tensor, target_logit: Tensor, scale: Tensor, z_loss: float) -> Tensor:
    loss = total.log() + (top - target_logit)
    return scale * (loss + z_loss * (top + total.log())**2 if z_loss else loss)


def probability_scale(scale: Tensor, top: Tensor, total: Tensor, z_loss: float) -> Tensor:
    """What exp(z - top) of each row is multiplied by in the gradient, where that of -[v = y] is `scale`."""
    return scale * (1 + 2 * z_loss * (top + total.log())) / total if z_loss else scale / total


def with_rows_contiguous(matrix: Tensor) -> Tensor:
    # Not contiguous(), which leaves a single column its stride.
    return matrix if matrix.stride(1) == 1 else matrix.clone(memory_format=torch.contiguous_format)
