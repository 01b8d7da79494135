"""Packed documents by flash_attn (Dao-AILab/flash-attention), where it is installed; with its own backward."""

import importlib.util

import torch
from torch import Tensor


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "needs flash_attn: pip install flash-attn"
    return None


def refuses(q: Tensor) -> str | None:
    """Why it cannot run on such queries, None if it can."""
    if not q.is_cuda:
        return "needs a CUDA tensor"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"takes head sizes that are multiples of 8 up to 256, not {q.shape[-1]}"
    return None


def refuses_blocks(q: Tensor) -> str:
    return "has no block_length but 1"


def bidirectional_attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                                   block_length: int | None, scale: float) -> Tensor:
    """As `reference.bidirectional_attention_varlen`, of block_length None or 1, which is causal."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale,
                                  causal=block_length == 1, deterministic=torch.are_deterministic_algorithms_enabled())
