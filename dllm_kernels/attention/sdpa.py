"""Attention by torch.nn.functional.scaled_dot_product_attention, which picks Flash, cuDNN or its CPU kernel."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .reference import Mask, dense_mask

TILE = 128


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `reference.attend`. A query without a key sees all keys, and its result and gradient are dropped.

    On a CPU fp16 is widened to fp32: PyTorch's fp16 is 1.5 times as slow forward, 7 times with the backward.
    """
    if q.dtype == torch.float16 and q.device.type == "cpu":
        return attend(q.float(), k.float(), v.float(), mask, scale).to(q.dtype)
    empty = None
    if mask is not None:
        empty = ~mask.any(-1)  # [B or 1, Lq]
        mask = (mask | empty.unsqueeze(-1)).unsqueeze(1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # cuDNN's backward gives NaN for some masked inputs on H100 and H200 (pytorch issue 196678).
    safe = mask is not None and q.device.type == "cuda"
    if safe:  # the remaining kernel takes no grouped heads; the one after it would store all scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if safe else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    out = out.transpose(1, 2)
    return out if empty is None else out.masked_fill(empty[:, :, None, None], 0.0)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """As `reference.masked_attention`."""
    if mask.kind == "block_diffusion":
        return block_diffusion(q, k, v, mask.block_length, mask.cu_seqlens, scale, mask.causal)
    if mask.kind == "packed":
        alone = Mask("dense", mask.block_length)
        return _by_length(lambda *heads: masked_attention(*heads, alone, scale), mask.cu_seqlens, q, k, v)
    key_mask, block_length = mask.key_mask, mask.block_length
    if mask.cache_rows is not None:
        k, v = k[mask.cache_rows], v[mask.cache_rows]
    if key_mask is not None and key_mask.device.type == "cpu" and bool(key_mask.all()):
        key_mask = None  # without a mask SDPA is faster; a GPU would stall for the answer
    if block_length is not None and key_mask is None:
        return block_causal(q, k, v, block_length, scale)
    return attend(q, k, v, dense_mask(q, k, key_mask, block_length), scale)


def block_causal(q, k, v, block_length, scale):
    """Attention of some queries at a time to the keys up to their last block."""
    before = k.shape[1] - q.shape[1]
    tile = _whole_blocks(block_length)
    outputs = []
    k, v = (_for_many_slices(x) for x in (k, v))
    for end in range((before // tile + 1) * tile, k.shape[1] + tile, tile):
        first, last = max(end - tile, before), min(end, k.shape[1])
        queries, keys, values = q[:, first - before:last - before], k[:, :last].to(q.dtype), v[:, :last].to(q.dtype)
        outputs.append(attend(queries, keys, values, dense_mask(queries, keys, None, block_length), scale))
    return torch.cat(outputs, 1) if outputs else torch.empty_like(q)


def block_diffusion(q, k, v, block_length, cu_seqlens, scale, causal):
    """Attention of some noisy queries and their clean copies at a time, to the clean keys up to them and noisy ones."""
    if cu_seqlens is not None:
        B, length = len(q), q.shape[1] // 2
        copies = [copy for x in (q, k, v) for copy in x.view(B, 2, length, *x.shape[2:]).transpose(0, 1).flatten(1, 2)]

        def attend_document(*copies):
            joined = [torch.cat(copies[i:i + 2], 1) for i in (0, 2, 4)]
            return torch.stack(block_diffusion(*joined, block_length, None, scale, causal).chunk(2, 1), 2)

        out = _by_length(attend_document, cu_seqlens, *copies)  # [B * L, 2, Hq, E]
        return out.view(B, length, 2, *q.shape[2:]).transpose(1, 2).reshape(q.shape)
    k, v = (_for_many_slices(x) for x in (k, v))
    (noisy_q, clean_q), (noisy_k, clean_k), (noisy_v, clean_v) = (x.chunk(2, 1) for x in (q, k, v))
    noisy, clean = [], []
    tile = _whole_blocks(block_length)
    for first in range(0, noisy_q.shape[1], tile):
        own, seen = slice(first, first + tile), slice(0, first + tile)
        queries = torch.cat((noisy_q[:, own], clean_q[:, own]), 1)
        keys, values = (torch.cat((c[:, seen], n[:, own]), 1).to(q.dtype)
                        for c, n in ((clean_k, noisy_k), (clean_v, noisy_v)))
        place = torch.arange(keys.shape[1] - queries.shape[1] // 2, device=q.device)
        block = place // block_length
        query = block[own].unsqueeze(1)
        clean_to_clean = place <= place[own].unsqueeze(1) if causal else block <= query
        same = (query == block[own]) & clean_to_clean[:, own]
        noisy_sees = torch.cat((block < query, same), 1)
        clean_sees = torch.cat((clean_to_clean, torch.zeros_like(same)), 1)
        out = attend(queries, keys, values, torch.cat((noisy_sees, clean_sees)).unsqueeze(0), scale)
        for outputs, part in zip((noisy, clean), out.chunk(2, 1), strict=True):
            outputs.append(part)
    return torch.cat(noisy + clean, 1) if noisy else torch.empty_like(q)


def _for_many_slices(x: Tensor) -> Tensor:
    """x, in fp32 where it gets a gradient: those of its slices are then summed in fp32 and rounded once."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.requires_grad and torch.is_grad_enabled() else x


def _whole_blocks(block_length: int) -> int:
    """Queries at a time: few enough to skip most of the keys that they do not see, enough to fill a product."""
    return max(TILE // block_length, 1) * block_length


def _by_length(attend_documents, cu_seqlens: Tensor, *packed: Tensor) -> Tensor:
    """`attend_documents` of packed [T, ...] tensors, once per length for its documents [documents, length, ...]."""
    ends = cu_seqlens.cpu().long()
    starts, lengths = ends[:-1], ends.diff()
    distinct = lengths.unique().tolist()
    if len(distinct) == 1:
        return attend_documents(*(x.unflatten(0, (len(lengths), distinct[0])) for x in packed)).flatten(0, 1)
    distinct = [length for length in distinct if length]
    places = [(starts[lengths == length].unsqueeze(1) + torch.arange(length, device="cpu")).flatten()
              for length in distinct]
    order, counts = torch.cat(places), [len(place) for place in places]
    there = order.to(cu_seqlens.device)
    outputs = [attend_documents(*(x.unflatten(0, (-1, length)) for x in documents)).flatten(0, 1)
               for length, *documents in zip(distinct, *(x[there].split(counts) for x in packed), strict=True)]
    return torch.cat(outputs)[order.argsort().to(cu_seqlens.device)]
