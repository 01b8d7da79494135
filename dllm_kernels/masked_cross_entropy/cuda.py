"""The CUDA C++ backend from logits (csrc/cuda/masked_cross_entropy.cu), without a host synchronisation."""

import torch
from torch import Tensor

from dllm_kernels import library
from dllm_kernels.masked_cross_entropy.reference import refuse_second_derivative


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    if reason := library.why_missing():
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key("dllm_kernels_native::cross_entropy_statistics_cuda", "CUDA"):
        return "the extension was built without nvcc; install the CUDA toolkit, then this package again"
    return None


def refuses(tensor: Tensor) -> str | None:
    if not tensor.is_cuda:
        return "needs a CUDA tensor"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {tensor.dtype}"
    return None


def masked_cross_entropy(logits: Tensor, targets: Tensor, corrupted: Tensor, weights: Tensor | None, reduction: str,
                         softcap: float | None, z_loss: float) -> Tensor:
    """As `reference.masked_cross_entropy`; a target out of range makes the loss NaN."""
    return _MaskedCrossEntropy.apply(logits, targets, corrupted, weights, reduction, softcap or 0.0, z_loss)


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, corrupted, weights, reduction, softcap, z_loss):
        top, total, target_logit = (torch.empty(len(logits), device=logits.device) for _ in range(3))
        targets, corrupted = targets.contiguous(), corrupted.contiguous()
        library.operators().cross_entropy_statistics_cuda(_rows_contiguous(logits), targets, corrupted, softcap, top,
                                                          total, target_logit)
        scale = corrupted.float() if weights is None else torch.where(corrupted, weights.float(), 0.0)
        if reduction == "mean":
            scale = scale / corrupted.sum().clamp(min=1)
        loss, probability_scale = total.log() + (top - target_logit), scale / total
        if z_loss:
            lse = top + total.log()
            loss, probability_scale = loss + z_loss * lse**2, probability_scale * (1 + 2 * z_loss * lse)
        ctx.save_for_backward(logits, targets, corrupted, top, probability_scale, scale)
        ctx.softcap = softcap
        return loss * scale if reduction == "none" else (loss * scale).sum()

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        logits, targets, corrupted, top, *scales = ctx.saved_tensors
        upstream = torch.where(corrupted, grad, 0.0)
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        library.operators().cross_entropy_gradients_cuda(_rows_contiguous(logits), targets, corrupted, ctx.softcap, top,
                                                         *(scale * upstream for scale in scales), out)
        return out, None, None, None, None, None, None


def _rows_contiguous(logits: Tensor) -> Tensor:
    # Not contiguous(), which leaves a single column its stride.
    return logits if logits.stride(1) == 1 else logits.clone(memory_format=torch.contiguous_format)
