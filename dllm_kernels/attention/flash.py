"""Packed documents by FlashAttention: the one in PyTorch, and flash_attn (Dao-AILab/flash-attention) where installed.

Both have a backward, and neither waits for the GPU to learn how long the documents are.
"""

import importlib.util
import inspect

import torch
from torch import Tensor


def missing_in_torch() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    if not torch.backends.cuda.is_flash_attention_available():
        return "needs a torch that was built with FlashAttention"
    return None


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "needs flash_attn: pip install flash-attn"
    return None


def refuses(q: Tensor) -> str | None:
    """Why neither can run on such queries, None if they can."""
    if not q.is_cuda:
        return "needs a CUDA tensor"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"takes head sizes that are multiples of 8 up to 256, not {q.shape[-1]}"
    return None if len(q) else "takes at least one position"


def refuses_blocks(q: Tensor) -> str:
    return "has no block_length but 1"


def varlen_by_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, block_length: int | None,
                    scale: float) -> Tensor:
    """As `reference.bidirectional_attention_varlen`, of block_length None or 1, which is causal."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:  # torch 2.11
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale,
                       window_size=(-1, 0) if block_length == 1 else (-1, -1), **grouped)


def varlen_by_flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                         block_length: int | None, scale: float) -> Tensor:
    """As `reference.bidirectional_attention_varlen`, of block_length None or 1, which is causal."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale,
                                  causal=block_length == 1, deterministic=torch.are_deterministic_algorithms_enabled())
