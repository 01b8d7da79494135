"""Few queries against many cached keys in CUDA C++ (csrc/cuda/decode_attention.cuh), forward only.

The tensor cores by mma.sync, so from sm_80 on; the keys split among blocks where there are few rows.
"""

import torch
from torch import Tensor

from dllm_kernels import library

QUERIES = 64  # at most: of more, a kernel for long inputs makes better use


def missing() -> str | None:
    return library.why_missing_on_cuda("decode_attention_cuda")


def refuses(q: Tensor) -> str | None:
    """Why it cannot run on such queries, None if it can."""
    if not q.is_cuda:
        return "needs a CUDA tensor"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, not {q.dtype}"
    if torch.cuda.get_device_capability(q.device)[0] < 8:
        return "needs a GPU of compute capability 8.0 or newer"
    if q.shape[-1] % 8 or not 32 <= q.shape[-1] <= 256:
        return f"takes head sizes that are multiples of 8 from 32 to 256, not {q.shape[-1]}"
    if q.shape[1] > QUERIES:
        return f"takes at most {QUERIES} queries, not {q.shape[1]}"
    if q.requires_grad and torch.is_grad_enabled():
        return "has no backward; call it under torch.no_grad()"
    return None


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, block_length: int | None,
                            scale: float, cache_rows: Tensor | None = None) -> Tensor:
    """As `reference.bidirectional_attention`."""
    q, k, v = (_aligned(x) for x in (q, k, v))
    key_mask, cache_rows = (None if x is None else x.contiguous() for x in (key_mask, cache_rows))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    blocks = 0 if block_length is None else min(block_length, max(k.shape[1], 1))
    library.operators().decode_attention_cuda(q, k, v, key_mask, cache_rows, blocks, scale, out)
    return out


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it: every head of every position begins at a multiple of 16 bytes, and its numbers adjoin."""
    plain = x.stride(3) == 1 and all(x.stride(d) % 8 == 0 or x.shape[d] == 1 for d in range(3))
    return x if plain and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
