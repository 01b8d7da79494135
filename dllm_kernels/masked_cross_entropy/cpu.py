"""The C++ backend on the CPU (csrc/cpu/masked_cross_entropy.cpp). The logits are never stored: the backward computes
them again, which at the processor's full width is faster than keeping them in memory.
"""

import torch
from torch import Tensor

from dllm_kernels import library
from dllm_kernels.masked_cross_entropy.reference import refuse_second_derivative

ROWS_AT_ONCE = 4096  # in the backward: each thread sums the gradients of so many rows for itself


def missing() -> str | None:
    return library.why_missing()


def refuses(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return "needs a CPU tensor"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {tensor.dtype}"
    return None


def linear_masked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, corrupted: Tensor, bias: Tensor | None,
                                weights: Tensor | None, reduction: str, softcap: float | None,
                                z_loss: float) -> Tensor:
    """As `reference.linear_masked_cross_entropy`, with fp32 products whatever the dtype."""
    return _LinearMaskedCrossEntropy.apply(hidden, weight, bias, targets, corrupted, weights, reduction, softcap or 0.0,
                                           z_loss)


class _LinearMaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, corrupted, weights, reduction, softcap, z_loss):
        rows = corrupted.nonzero().squeeze(1)
        x, target = hidden[rows].float(), targets[rows]
        top, total, target_logit = (torch.empty(len(rows)) for _ in range(3))
        library.operators().linear_cross_entropy_statistics_cpu(
            x, _readable(weight), _fp32(bias), target, softcap, top, total, target_logit)
        scale = torch.ones(len(rows)) if weights is None else weights[rows].float()
        if reduction == "mean":
            scale /= max(len(rows), 1)
        loss, probability_scale = total.log() + (top - target_logit), scale / total
        if z_loss:
            lse = top + total.log()
            loss, probability_scale = loss + z_loss * lse**2, probability_scale * (1 + 2 * z_loss * lse)
        loss = loss * scale
        ctx.save_for_backward(hidden, weight, bias, rows, target, top, probability_scale, scale)
        ctx.reduction, ctx.softcap = reduction, softcap
        if reduction == "none":
            return torch.zeros(len(hidden)).index_copy_(0, rows, loss)
        return loss.sum()

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        hidden, weight, bias, rows, target, top, probability_scale, target_scale = ctx.saved_tensors
        upstream = grad[rows] if ctx.reduction == "none" else grad
        probability_scale, target_scale = probability_scale * upstream, target_scale * upstream
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        head, fp32_bias = _readable(weight), _fp32(bias)
        grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype) if wants_hidden else None
        several = len(rows) > ROWS_AT_ONCE
        grad_weight = (torch.zeros if several or not len(rows) else torch.empty)(weight.shape) if wants_weight else None
        grad_bias = torch.zeros(len(weight)) if wants_bias else None
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            x = hidden[rows[part]].float()
            grad_x = torch.empty_like(x) if wants_hidden else None
            library.operators().linear_cross_entropy_gradients_cpu(
                x, head, fp32_bias, target[part], ctx.softcap, top[part], probability_scale[part], target_scale[part],
                grad_x, grad_weight, grad_bias, several)
            if wants_hidden:
                grad_hidden.index_copy_(0, rows[part], grad_x.to(hidden.dtype))
        if wants_weight:
            grad_weight = grad_weight.to(weight.dtype)
        if wants_bias:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _readable(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
