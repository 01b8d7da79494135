"""The CUDA C++ backend (csrc/cuda/masked_cross_entropy.cu), without a host synchronisation.

A target out of range makes the loss NaN.
"""

import torch
from torch import Tensor

from .. import native_extension
from .products import Chunk
from .rows import Form, Scale, Scales, Scored, with_rows_contiguous


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


def row_pass(chunk: Chunk, scale: Scale, softcap: float | None, wanted: bool) -> Tensor:
    """See `products.RowPass`."""
    nll = torch.empty_like(scale.plain)
    native_extension.operators().cross_entropy_rows_cuda(
        chunk.logits, chunk.targets, *scale, chunk.live, softcap or 0.0, wanted, chunk.clear, nll)
    return nll
