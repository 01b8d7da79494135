"""Packed documents by FlashAttention: PyTorch's, flash_attn (Dao-AILab/flash-attention) if installed, and cuDNN's.

None waits for the GPU to learn the lengths of the documents. The first two have a backward. That of cuDNN takes the
head size for the longest document, and writes out of bounds (pytorch pull request 186142, of June 2026).
"""

import importlib.util
import inspect

import torch
from torch import Tensor

from ..dispatch import takes
from .reference import Mask

CUDNN_ARGUMENTS = ["query", "key", "value", "attn_bias", "cum_seq_q", "cum_seq_k", "max_q", "max_k",
                   "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask", "scale"]


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
    if reason := takes("cuda", (torch.float16, torch.bfloat16))(q):
        return reason
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"takes head sizes that are multiples of 8 up to 256, not {q.shape[-1]}"
    return None if len(q) else "takes at least one position"


def missing_cudnn() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    names = [argument.name for argument in torch.ops.aten._cudnn_attention_forward.default._schema.arguments]
    if not torch.backends.cudnn.is_available() or names[:len(CUDNN_ARGUMENTS)] != CUDNN_ARGUMENTS:
        return "needs a torch with cuDNN, whose _cudnn_attention_forward is that of torch 2.11 to 2.13"
    return None


def refuses_cudnn(q: Tensor) -> str | None:
    if reason := refuses(q):
        return reason
    if torch.cuda.get_device_capability(q.device) < (9, 0):
        return "needs a GPU of compute capability 9.0 or newer"
    if q.shape[-1] > 128:
        return f"takes head sizes up to 128, not {q.shape[-1]}"
    return "has no gradients: call it under torch.no_grad()" if q.requires_grad else None


def refuses_blocks(q: Tensor) -> str:
    return "has no block_length but 1"


def varlen_by_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """As `varlen_by_torch`, without gradients."""
    # What does not begin at a multiple of 16 bytes gives wrong results (pytorch pull request 194818).
    q, k, v = (x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
               for x in (q, k, v))
    ends, longest = mask.cu_seqlens, mask.max_seqlen
    given = q, k, v, None, ends, ends, longest, longest, False, 0.0, mask.block_length == 1, False, scale
    return torch.ops.aten._cudnn_attention_forward(**dict(zip(CUDNN_ARGUMENTS, given, strict=True)))[0]


@torch.compiler.assume_constant_result
def _torch_groups_heads() -> bool:
    """Whether `varlen_attn` takes grouped heads; torch 2.11's does not."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """As `reference.masked_attention`, for packed documents and a block_length of None or 1, which is causal."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {}
    if q.shape[1] != k.shape[1]:
        if _torch_groups_heads():
            grouped = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return varlen_attn(q, k, v, mask.cu_seqlens, mask.cu_seqlens, mask.max_seqlen, mask.max_seqlen, scale=scale,
                       window_size=(-1, 0) if mask.block_length == 1 else (-1, -1), **grouped)


def varlen_by_flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """As `varlen_by_torch`."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, mask.cu_seqlens, mask.cu_seqlens, mask.max_seqlen, mask.max_seqlen, softmax_scale=scale,
        causal=mask.block_length == 1, deterministic=torch.are_deterministic_algorithms_enabled())
