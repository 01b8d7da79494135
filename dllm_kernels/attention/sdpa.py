"""Attention by torch.nn.functional.scaled_dot_product_attention, which picks Flash, cuDNN or its CPU kernel."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dllm_kernels.attention.reference import block_diffusion_mask, dense_mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `reference.attend`. A row that may see no key is given all, and its result dropped, gradient included."""
    empty = None
    if mask is not None:
        empty = ~mask.any(-1)  # [B or 1, Lq]
        mask = (mask | empty.unsqueeze(-1)).unsqueeze(1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # cuDNN's backward gives NaN for some masked inputs on H100 and H200 (pytorch issue 196678).
    safe = mask is not None and q.device.type == "cuda"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if safe else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    out = out.transpose(1, 2)
    return out if empty is None else out.masked_fill(empty[:, :, None, None], 0.0)


def bidirectional_attention(q, k, v, key_mask, block_length, scale):
    if key_mask is not None and key_mask.device.type == "cpu" and bool(key_mask.all()):
        key_mask = None  # without a mask, SDPA is faster; on a GPU, asking would stall it
    return attend(q, k, v, dense_mask(q, k, key_mask, block_length), scale)


def bidirectional_attention_varlen(q, k, v, cu_seqlens, max_seqlen, block_length, scale):
    """Documents of one length are one batch."""
    lengths = cu_seqlens.diff().tolist()
    if len(set(lengths)) == 1:
        heads = [x.view(len(lengths), lengths[0], *x.shape[1:]) for x in (q, k, v)]
        return bidirectional_attention(*heads, None, block_length, scale).reshape(q.shape)
    by_length: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        by_length.setdefault(length, []).append(document)
    starts, outputs, places = cu_seqlens.long(), [], []
    for length, members in by_length.items():
        place = (starts[members].unsqueeze(1) + torch.arange(length, device=q.device)).flatten()
        heads = [x[place].view(len(members), length, *x.shape[1:]) for x in (q, k, v)]
        outputs.append(bidirectional_attention(*heads, None, block_length, scale).reshape(len(place), *q.shape[1:]))
        places.append(place)
    return torch.cat(outputs)[torch.cat(places).argsort()]


def block_diffusion_attention(q, k, v, block_length, cu_seqlens, scale):
    mask = block_diffusion_mask(len(q), q.shape[1] // 2, block_length, cu_seqlens, q.device)
    return attend(q, k, v, mask, scale)
