"""The C++ backend on the CPU (csrc/cpu/masked_cross_entropy.cpp). Of hidden states the logits are never stored: the
backward computes them again, which at the processor's full width is faster than keeping them in memory.
"""

import torch
from torch import Tensor

from dllm_kernels import library
from dllm_kernels.masked_cross_entropy.reference import refuse_second_derivative

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
    return _MaskedCrossEntropy.apply(logits, targets, corrupted, weights, reduction, softcap or 0.0, z_loss)


def linear_masked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, corrupted: Tensor, bias: Tensor | None,
                                weights: Tensor | None, reduction: str, softcap: float | None,
                                z_loss: float) -> Tensor:
    """As `reference.linear_masked_cross_entropy`, with fp32 products whatever the dtype."""
    return _LinearMaskedCrossEntropy.apply(hidden, weight, bias, targets, corrupted, weights, reduction, softcap or 0.0,
                                           z_loss)


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, corrupted, weights, reduction, softcap, z_loss):
        rows, target, statistics = _plan(corrupted, targets)
        library.operators().cross_entropy_statistics_cpu(_rows_contiguous(logits), rows, target, softcap, *statistics)
        loss, *scales = _score(*statistics, rows, weights, reduction, z_loss)
        ctx.save_for_backward(logits, rows, target, *scales)
        ctx.reduction, ctx.softcap = reduction, softcap
        return _reduce(loss, rows, len(corrupted), reduction)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        logits, rows, target, top, *scales = ctx.saved_tensors
        upstream = grad[rows] if ctx.reduction == "none" else grad
        out = torch.zeros(logits.shape, dtype=logits.dtype)
        library.operators().cross_entropy_gradients_cpu(_rows_contiguous(logits), rows, target, ctx.softcap, top,
                                                        *(scale * upstream for scale in scales), out)
        return out, None, None, None, None, None, None


class _LinearMaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, corrupted, weights, reduction, softcap, z_loss):
        rows, target, statistics = _plan(corrupted, targets)
        library.operators().linear_cross_entropy_statistics_cpu(
            hidden[rows].float(), _rows_contiguous(weight), _fp32(bias), target, softcap, *statistics)
        loss, *scales = _score(*statistics, rows, weights, reduction, z_loss)
        ctx.save_for_backward(hidden, weight, bias, rows, target, *scales)
        ctx.reduction, ctx.softcap = reduction, softcap
        return _reduce(loss, rows, len(corrupted), reduction)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        hidden, weight, bias, rows, target, top, *scales = ctx.saved_tensors
        upstream = grad[rows] if ctx.reduction == "none" else grad
        scales = [scale * upstream for scale in scales]
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
                x, _rows_contiguous(weight), _fp32(bias), target[part], ctx.softcap, top[part],
                *(scale[part] for scale in scales), grad_x, grad_weight, grad_bias, several)
            if wants_hidden:
                grad_hidden.index_copy_(0, rows[part], grad_x.to(hidden.dtype))
        if wants_weight:
            grad_weight = grad_weight.to(weight.dtype)
        if wants_bias:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _plan(corrupted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The corrupted rows [M], their targets, and room for top, total and target_logit of each."""
    rows = corrupted.nonzero().squeeze(1)
    return rows, targets[rows], tuple(torch.empty(len(rows)) for _ in range(3))


def _score(top: Tensor, total: Tensor, target_logit: Tensor, rows: Tensor, weights: Tensor | None, reduction: str,
           z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: the loss, top, and the factors of exp(z - top) and of the target in the gradient."""
    scale = torch.ones(len(rows)) if weights is None else weights[rows].float()
    if reduction == "mean":
        scale = scale / max(len(rows), 1)
    loss, probability_scale = total.log() + (top - target_logit), scale / total
    if z_loss:
        lse = top + total.log()
        loss, probability_scale = loss + z_loss * lse**2, probability_scale * (1 + 2 * z_loss * lse)
    return loss * scale, top, probability_scale, scale


def _reduce(loss: Tensor, rows: Tensor, count: int, reduction: str) -> Tensor:
    return torch.zeros(count).index_copy_(0, rows, loss) if reduction == "none" else loss.sum()


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
