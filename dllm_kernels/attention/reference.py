"""Attention in plain PyTorch: the definition of the masks, and the oracle of the other backends."""

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """The keys that each query sees, as the public function of this kind defines them."""

    kind: str  # "dense" (bidirectional_attention), "packed" (bidirectional_attention_varlen) or "block_diffusion"
    block_length: int | None = None
    key_mask: Tensor | None = None  # [B, Lk] bool, of dense
    cache_rows: Tensor | None = None  # [B] int64, of dense
    cu_seqlens: Tensor | None = None  # [S + 1] int32
    max_seqlen: int = 0  # of packed
    causal: bool = False  # of block_diffusion


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


def visible_keys(q: Tensor, k: Tensor, mask: Mask) -> Tensor | None:
    """[B or 1, Lq, Lk] bool, the keys that each query sees; None where every query sees every key."""
    if mask.kind == "block_diffusion":
        return block_diffusion_mask(len(q), q.shape[1] // 2, mask.block_length, mask.cu_seqlens, q.device, mask.causal)
    if mask.kind == "packed":
        return varlen_mask(mask.cu_seqlens, q.shape[1], mask.block_length)
    return dense_mask(q, k, mask.key_mask, mask.block_length)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """Attention with the signature of every backend: q, k and v are [T, H, E] if packed, else [B, L, H, E]."""
    if mask.kind == "packed":
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    if mask.cache_rows is not None:
        k, v = k[mask.cache_rows], v[mask.cache_rows]
    out = attend(q, k, v, visible_keys(q, k, mask), scale)
    return out.squeeze(0) if mask.kind == "packed" else out


def dense_mask(q: Tensor, k: Tensor, key_mask: Tensor | None, block_length: int | None) -> Tensor | None:
    """`visible_keys` of `bidirectional_attention`."""
    mask = None if key_mask is None else key_mask.unsqueeze(1).expand(-1, q.shape[1], -1)
    if block_length is None:
        return mask
    key_block = torch.arange(k.shape[1], device=q.device) // block_length
    query_block = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device) // block_length
    causal = (key_block <= query_block.unsqueeze(1)).unsqueeze(0)
    return causal if mask is None else mask & causal


def documents(cu_seqlens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The document of each of `count` packed positions, and its place in it, both int64."""
    places = torch.arange(count, device=cu_seqlens.device)
    ends = cu_seqlens[1:].long()
    document = torch.searchsorted(ends, places, right=True)
    starts = torch.cat((cu_seqlens.long(), cu_seqlens.new_tensor([count], dtype=torch.int64)))
    return document, places - starts[document]


def varlen_mask(cu_seqlens: Tensor, count: int, block_length: int | None) -> Tensor:
    """[1, T, T]: `visible_keys` of `bidirectional_attention_varlen`."""
    document, place = documents(cu_seqlens, count)
    mask = document.unsqueeze(1) == document
    if block_length is not None:
        mask = mask & (place // block_length <= place.unsqueeze(1) // block_length)
    return mask.unsqueeze(0)


def block_diffusion_mask(batch: int, length: int, block_length: int, cu_seqlens: Tensor | None, device,
                         causal: bool = False) -> Tensor:
    """[B or 1, 2L, 2L]: `visible_keys` of `block_diffusion_attention`."""
    if cu_seqlens is None:
        place = torch.arange(length, device=device).view(1, -1)
        document = torch.zeros_like(place)
    else:
        document, place = (x.view(batch, length) for x in documents(cu_seqlens, batch * length))
    block = place // block_length
    same_document = document.unsqueeze(2) == document.unsqueeze(1)
    query, key = block.unsqueeze(2), block.unsqueeze(1)
    noisy_to_noisy, noisy_to_clean, clean_to_clean = query == key, key < query, key <= query
    if causal:
        clean_to_clean = place.unsqueeze(1) <= place.unsqueeze(2)
        noisy_to_noisy = noisy_to_noisy & clean_to_clean
    noisy = torch.cat((noisy_to_noisy & same_document, noisy_to_clean & same_document), 2)
    clean = torch.cat((torch.zeros_like(same_document), clean_to_clean & same_document), 2)
    return torch.cat((noisy, clean), 1)

