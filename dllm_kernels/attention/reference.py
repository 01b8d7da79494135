"""Attention in plain PyTorch: the definition of the masks, and the oracle of the other backends."""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the keys that `mask` [B or 1, Lq, Lk] allows; zeros where it allows none.

    q [B, Lq, Hq, E], k and v [B, Lk, Hkv, E]; computed in fp32, or fp64 for fp64 inputs; the result in q's dtype.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    k, v = (x.to(compute).repeat_interleave(group, dim=2) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bqhe,bkhe->bhqk", q.to(compute), k) * scale
        if mask is not None:
            mask = mask.unsqueeze(1)
            scores = scores.masked_fill(~mask, -torch.inf).masked_fill(~mask.any(-1, keepdim=True), 0.0)
        weights = scores.softmax(-1)
        if mask is not None:
            weights = weights.masked_fill(~mask, 0.0)
        return torch.einsum("bhqk,bkhe->bqhe", weights, v).to(q.dtype)


def dense_mask(q: Tensor, k: Tensor, key_mask: Tensor | None, block_length: int | None) -> Tensor | None:
    """[B or 1, Lq, Lk] of `bidirectional_attention`; None where every query sees every key."""
    mask = None if key_mask is None else key_mask.unsqueeze(1).expand(-1, q.shape[1], -1)
    if block_length is None:
        return mask
    key_block = torch.arange(k.shape[1], device=q.device) // block_length
    query_block = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device) // block_length
    causal = (key_block <= query_block.unsqueeze(1)).unsqueeze(0)
    return causal if mask is None else mask & causal


def documents(cu_seqlens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each of `count` packed positions, its document and its place in it, both int64."""
    places = torch.arange(count, device=cu_seqlens.device)
    ends = cu_seqlens[1:].long()
    document = torch.searchsorted(ends, places, right=True)
    starts = torch.cat((cu_seqlens.long(), cu_seqlens.new_tensor([count], dtype=torch.int64)))
    return document, places - starts[document]


def varlen_mask(cu_seqlens: Tensor, count: int, block_length: int | None) -> Tensor:
    """[1, T, T] of `bidirectional_attention_varlen`."""
    document, place = documents(cu_seqlens, count)
    mask = document.unsqueeze(1) == document
    if block_length is not None:
        mask = mask & (place // block_length <= place.unsqueeze(1) // block_length)
    return mask.unsqueeze(0)


def block_diffusion_mask(batch: int, length: int, block_length: int, cu_seqlens: Tensor | None, device) -> Tensor:
    """[B or 1, 2L, 2L] of `block_diffusion_attention`."""
    if cu_seqlens is None:
        place = torch.arange(length, device=device).view(1, -1)
        document = torch.zeros_like(place)
    else:
        document, place = (x.view(batch, length) for x in documents(cu_seqlens, batch * length))
    block = place // block_length
    same_document = document.unsqueeze(2) == document.unsqueeze(1)
    query, key = block.unsqueeze(2), block.unsqueeze(1)
    noisy_to_noisy, noisy_to_clean, clean_to_clean = query == key, key < query, key <= query
    noisy = torch.cat((noisy_to_noisy & same_document, noisy_to_clean & same_document), 2)
    clean = torch.cat((torch.zeros_like(same_document), clean_to_clean & same_document), 2)
    return torch.cat((noisy, clean), 1)


def bidirectional_attention(q, k, v, key_mask, block_length, scale, cache_rows=None):
    if cache_rows is not None:
        k, v = k[cache_rows], v[cache_rows]
    return attend(q, k, v, dense_mask(q, k, key_mask, block_length), scale)


def bidirectional_attention_varlen(q, k, v, cu_seqlens, max_seqlen, block_length, scale):
    mask = varlen_mask(cu_seqlens, len(q), block_length)
    return attend(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), mask, scale).squeeze(0)


def block_diffusion_attention(q, k, v, block_length, cu_seqlens, scale):
    mask = block_diffusion_mask(len(q), q.shape[1] // 2, block_length, cu_seqlens, q.device)
    return attend(q, k, v, mask, scale)
