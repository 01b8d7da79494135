"""The CUDA C++ backend from logits (csrc/cuda/masked_cross_entropy.cu), without a host synchronisation.

A target out of range makes the loss NaN.
"""

import torch
from torch import Tensor

from dllm_kernels import native_extension
from dllm_kernels.masked_cross_entropy.rows import Form, Scales, Scored, with_rows_contiguous


def missing() -> str | None:
    return native_extension.why_missing_on_cuda("cross_entropy_statistics_cuda")


def statistics(logits: Tensor, scored: Scored, form: Form) -> list[Tensor]:
    found = [torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(3)]
    native_extension.operators().cross_entropy_statistics_cuda(
        with_rows_contiguous(logits), scored.targets, scored.corrupted, form.softcap or 0.0, *found)
    return found


def gradients(logits: Tensor, scored: Scored, form: Form, scales: Scales, wanted) -> tuple[Tensor]:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    native_extension.operators().cross_entropy_gradients_cuda(
        with_rows_contiguous(logits), scored.targets, scored.corrupted, form.softcap or 0.0, *scales, out)
    return out,
