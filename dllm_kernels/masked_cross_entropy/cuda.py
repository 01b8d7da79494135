"""The CUDA C++ backend from logits (csrc/cuda/masked_cross_entropy.cu), without a host synchronisation."""

import torch
from torch import Tensor

from dllm_kernels import library
from dllm_kernels.masked_cross_entropy.rows import FromLogits, Passes


def missing() -> str | None:
    return library.why_missing_on_cuda("cross_entropy_statistics_cuda")


def refuses(tensor: Tensor) -> str | None:
    if not tensor.is_cuda:
        return "needs a CUDA tensor"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {tensor.dtype}"
    return None


def masked_cross_entropy(logits: Tensor, targets: Tensor, corrupted: Tensor, weights: Tensor | None, reduction: str,
                         softcap: float | None, z_loss: float) -> Tensor:
    """As `reference.masked_cross_entropy`; a target out of range makes the loss NaN."""
    return FromLogits.apply(logits, targets, corrupted, weights, reduction, softcap, z_loss,
                            Passes(_statistics, _gradients))


def _statistics(logits, targets, corrupted, softcap):
    statistics = tuple(torch.empty(len(logits), device=logits.device) for _ in range(3))
    library.operators().cross_entropy_statistics_cuda(logits, targets, corrupted, softcap or 0.0, *statistics)
    return statistics


def _gradients(logits, targets, corrupted, softcap, *scales):
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    library.operators().cross_entropy_gradients_cuda(logits, targets, corrupted, softcap or 0.0, *scales, out)
    return out
