"""Few queries against many cached keys in CUDA C++ (csrc/cuda/decode_attention.cuh), forward only.

It uses the tensor cores through mma.sync, so it needs sm_80 or newer; blocks share the keys if there are few rows.
"""

import torch
from torch import Tensor

from .. import native_extension
from ..dispatch import takes
from .reference import Mask

QUERIES = 64  # at most; a kernel for long inputs is better at more


def missing() -> str | None:
    return native_extension.why_missing_on_cuda("decode_attention_cuda")


def refuses(q: Tensor) -> str | None:
    """Why it cannot run on such queries, None if it can."""
    if reason := takes("cuda", (torch.float16, torch.bfloat16))(q):
        return reason
    if torch.cuda.get_device_capability(q.device)[0] < 8:
        return "needs a GPU of compute capability 8.0 or newer"
    if q.shape[-1] % 8 or not 32 <= q.shape[-1] <= 256:
        return f"takes head sizes that are multiples of 8 from 32 to 256, not {q.shape[-1]}"
    if q.shape[1] > QUERIES:
        return f"takes at most {QUERIES} queries, not {q.shape[1]}"
    if q.requires_grad:
        return "has no backward; call it under torch.no_grad()"
    return None


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """As `reference.masked_attention`, for dense masks."""
    q, k, v = (_aligned(x) for x in (q, k, v))
    key_mask, cache_rows = (None if x is None else x.contiguous() for x in (mask.key_mask, mask.cache_rows))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    blocks = 0 if mask.block_length is None else min(mask.block_length, max(k.shape[1], 1))
    native_extension.operators().decode_attention_cuda(q, k, v, key_mask, cache_rows, blocks, scale, out)
    return out


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy, in which every head of every position is contiguous and starts at a multiple of 16 bytes."""
    plain = x.stride(3) == 1 and all(x.stride(d) % 8 == 0 or x.shape[d] == 1 for d in range(3))
    return x if plain and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
