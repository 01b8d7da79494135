"""The C++ backend on the CPU (csrc/cpu/masked_cross_entropy.cpp). Of hidden states the logits are never stored: the
backward computes them again, which at the processor's full width is faster than keeping them in memory.
"""

import math

import torch
from torch import Tensor

from dllm_kernels import library
from dllm_kernels.masked_cross_entropy.reference import refuse_second_derivative
from dllm_kernels.masked_cross_entropy.rows import (
    FromLogits,
    Passes,
    probability_scale,
    row_loss,
    row_scale,
    with_rows_contiguous,
)

ROWS_AT_ONCE = 4096  # in the backward: each thread sums the gradients of so many hidden states for itself


def missing() -> str | None:
    return library.why_missing()


def refuses(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return "needs a CPU tensor"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {tensor.dtype}"
    return None


def masked_cross_entropy(logits: Tensor, targets: Tensor, corrupted: Tensor, weights: Tensor | None, reduction: str,
                         softcap: float | None, z_loss: float) -> Tensor:
    """As `reference.masked_cross_entropy`."""
    return FromLogits.apply(logits, targets, corrupted, weights, reduction, softcap, z_loss,
                            Passes(_statistics, _gradients))


def linear_masked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, corrupted: Tensor, bias: Tensor | None,
                                weights: Tensor | None, reduction: str, softcap: float | None, z_loss: float,
                                skip_below: float, workspace_bytes: int | None) -> Tensor:
    """As `reference.linear_masked_cross_entropy`, with fp32 products whatever the dtype and without a workspace.

    What `skip_below` skips are tiles of 128 words and 16 rows.
    """
    return _LinearMaskedCrossEntropy.apply(hidden, weight, bias, targets, corrupted, weights, reduction, softcap or 0.0,
                                           z_loss, skip_below)


def _statistics(logits, targets, corrupted, softcap):
    rows, target, found = _plan(corrupted, targets)
    library.operators().cross_entropy_statistics_cpu(logits, rows, target, softcap or 0.0, *found)
    of_other_rows = (0.0, 1.0, 0.0)
    return tuple(torch.full((len(logits),), other).index_copy_(0, rows, x)
                 for other, x in zip(of_other_rows, found, strict=True))


def _gradients(logits, targets, corrupted, softcap, *scales):
    rows, target, _ = _plan(corrupted, targets)
    out = torch.zeros(logits.shape, dtype=logits.dtype)
    library.operators().cross_entropy_gradients_cpu(logits, rows, target, softcap or 0.0,
                                                    *(scale[rows] for scale in scales), out)
    return out


class _LinearMaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, corrupted, weights, reduction, softcap, z_loss, skip_below):
        rows, target, statistics = _plan(corrupted, targets)
        library.operators().linear_cross_entropy_statistics_cpu(
            hidden[rows].float(), with_rows_contiguous(weight), _fp32(bias), target, softcap, *statistics)
        top, total, target_logit = statistics
        scale = row_scale(corrupted[rows], None if weights is None else weights[rows],
                          corrupted.sum() if reduction == "mean" else None)
        loss = row_loss(top, total, target_logit, scale, z_loss)
        ctx.save_for_backward(hidden, weight, bias, rows, target, scale, top, total)
        ctx.reduction, ctx.softcap, ctx.z_loss, ctx.skip_below = reduction, softcap, z_loss, skip_below
        return torch.zeros(len(corrupted)).index_copy_(0, rows, loss) if reduction == "none" else loss.sum()

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        hidden, weight, bias, rows, target, scale, top, total = ctx.saved_tensors
        scale = scale * (grad[rows] if ctx.reduction == "none" else grad)
        of_rows = [top, probability_scale(scale, top, total, ctx.z_loss), scale]
        limit = top + total.log() + math.log(ctx.skip_below) if ctx.skip_below else None
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        several = len(rows) > ROWS_AT_ONCE
        grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype) if wants_hidden else None
        grad_weight = (torch.zeros if several or not len(rows) else torch.empty)(weight.shape) if wants_weight else None
        grad_bias = torch.zeros(len(weight)) if wants_bias else None
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            x = hidden[rows[part]].float()
            grad_x = torch.empty_like(x) if wants_hidden else None
            library.operators().linear_cross_entropy_gradients_cpu(
                x, with_rows_contiguous(weight), _fp32(bias), target[part], ctx.softcap,
                *(each[part] for each in of_rows), None if limit is None else limit[part], grad_x, grad_weight,
                grad_bias, several)
            if wants_hidden:
                grad_hidden.index_copy_(0, rows[part], grad_x.to(hidden.dtype))
        if wants_weight:
            grad_weight = grad_weight.to(weight.dtype)
        if wants_bias:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None, None


def _plan(corrupted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The corrupted rows [M], their targets, and room for top, total and target_logit of each."""
    rows = corrupted.nonzero().squeeze(1)
    return rows, targets[rows], tuple(torch.empty(len(rows)) for _ in range(3))


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
