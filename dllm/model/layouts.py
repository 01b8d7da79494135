"""Layouts: how the tokens [B, L] of a forward pass lie, how they are numbered, and which keys a query sees.

`Transformer.hidden_states` takes one; ragged.py adds `Ragged`, a batch of several calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from dllm.model.cache import KeyValueCache
from dllm.model.ulysses import heads_to_positions, positions_to_heads
from dllm_kernels import (
    bidirectional_attention,
    bidirectional_attention_varlen,
    block_diffusion_attention,
    masked_attention,
)


def toward_mask(x: Tensor, certainty: Tensor, mask: Tensor) -> Tensor:
    """Embeddings x [B, L, D] drawn to that of the mask token [D] by what their tokens lack in certainty c [B, L]:
    c x + (1 - c) mask, stretched to the length c |x| + (1 - c) |mask| (DMax, arXiv:2604.08302)."""
    c, token, mask = certainty.unsqueeze(-1), x.float(), mask.float()
    mixed = c * token + (1 - c) * mask
    length = c * token.norm(dim=-1, keepdim=True) + (1 - c) * mask.norm()
    return torch.where(c < 1, mixed * (length / (mixed.norm(dim=-1, keepdim=True) + 1e-6)), token).to(x.dtype)


class Layout:
    """Base of all layouts: frozen dataclasses with `attend(q, k, v, layer)`, from q [B, Q, H, E] of the wanted and
    k, v [B, L, Hkv, E] of all positions that are computed to [B, Q, H, E]."""

    __slots__ = ()
    key_mask: Tensor | None = None
    queries: Tensor | None = None  # [B, Q] int64: the only positions whose hidden states are wanted
    certainty: Tensor | None = None  # [B, L] fp32, how sure the tokens are (see `toward_mask`); None: given
    start = 0
    uneven = False  # whether the queries do not all see the same keys; then the last layer computes every position

    @property
    def inner(self) -> Self:
        """The layout of all layers but the last, which compute every position."""
        return self if self.queries is None else replace(self, queries=None)

    def wanted(self, x: Tensor) -> Tensor:
        """x [B, L, ...] at the queries, [B, Q, ...]; all of it without queries."""
        if self.queries is None:
            return x
        return x.take_along_dim(self.queries.view(*self.queries.shape, *[1] * (x.ndim - 2)), dim=1)

    def tokens(self, input_ids: Tensor) -> Tensor:
        """The tokens to embed."""
        return input_ids

    def number(self, input_ids: Tensor) -> Tensor:
        """Positions of the tokens in their documents, int64; padding takes none."""
        end = self.start + input_ids.shape[1]
        if self.key_mask is None:
            return torch.arange(self.start, end, device=input_ids.device).expand(input_ids.shape)
        return (self.key_mask.long().cumsum(1) - 1).clamp_(min=0)[:, self.start:end]

    def length(self, input_ids: Tensor) -> int:
        """Positions of the longest document."""
        return self.start + input_ids.shape[1]

    def result(self, x: Tensor, shifted: bool) -> Tensor:
        """The hidden states to return, from those of the last layer; shifted: see `ModelConfig.shift_logits`."""
        return x


@dataclass(frozen=True, slots=True)
class Padded(Layout):
    """Rows padded on either side or not at all; padding is never attended, so a row gives what it gives alone."""

    key_mask: Tensor | None = None  # [B, L] bool, True where there is a token; None: everywhere
    block_length: int | None = None  # of block-causal attention (see `bidirectional_attention`); 1 is causal
    queries: Tensor | None = None  # with block_length, positions of the last block

    @property
    def uneven(self) -> bool:
        return self.block_length == 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        blocks = self.block_length if self.queries is None else None  # the last block sees every position
        return bidirectional_attention(q, k, v, key_mask=self.key_mask, block_length=blocks)


@dataclass(frozen=True, slots=True)
class Cached(Layout):
    """The n positions from `start` on, beside those whose keys and values the cache keeps; theirs are kept too."""

    cache: KeyValueCache
    start: int = 0
    rows: Tensor | None = None  # [B] int64: which rows of the cache these are; None: all
    key_mask: Tensor | None = None  # [B, seen] bool: of all positions that these may see
    queries: Tensor | None = None  # places among the n; in a growing cache, of the last block, unless `several`
    several: bool = False  # the queries are of several blocks
    certainty: Tensor | None = None  # [B, n] fp32
    context: int = 0  # so many of the n are finished, and see nothing after themselves; see `causal_context`

    @property
    def uneven(self) -> bool:
        return self.several or self.cache.block_length == 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = self.cache.put(layer, k, v, self.start, self.rows)
        if self.context and self.queries is None:
            return self._attend_after_context(q, k, v)
        blocks = self.cache.block_length if self.queries is None else None
        return bidirectional_attention(q, k, v, key_mask=self.key_mask, block_length=blocks, cache_rows=self.rows)

    def _attend_after_context(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = self.start + self.context
        mask = None if self.key_mask is None else self.key_mask[:, :seen].contiguous()
        context = bidirectional_attention(q[:, :self.context], k[:, :seen], v[:, :seen], key_mask=mask, block_length=1,
                                          cache_rows=self.rows)
        if self.context == q.shape[1]:
            return context
        blocks = bidirectional_attention(q[:, self.context:], k, v, key_mask=self.key_mask,
                                         block_length=self.cache.block_length, cache_rows=self.rows)
        return torch.cat((context, blocks), 1)


@dataclass(frozen=True, slots=True)
class Branches(Cached):
    """Texts that go on in several ways at once (tree attention): each row's own positions, after its part of a cache.

    The first `kept` of the n are one text, and their keys and values are kept; those of the others, the branches, are
    not. PyTorch's attention with a mask.
    """

    places: Tensor = None  # [B, n] int64, the positions in their row
    kept: int = 0
    mask: Tensor = None  # [B, n, seen + n - kept] bool: which of the cache and of the branches each sees

    def number(self, input_ids: Tensor) -> Tensor:
        return self.places

    def length(self, input_ids: Tensor) -> int:
        return self.cache.content.shape[3]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        rows, mask = self.rows.unsqueeze(1), self.wanted(self.mask)
        both = []
        for cached, new in zip(self.cache.content[layer], (k, v), strict=True):
            cached[rows, self.places[:, :self.kept]] = new[:, :self.kept]
            seen = cached[self.rows, :mask.shape[-1] - new.shape[1] + self.kept]
            both.append(torch.cat((seen, new[:, self.kept:]), 1))
        return masked_attention(q, *both, mask)


@dataclass(frozen=True, slots=True)
class Packed(Layout):
    """Documents one after the other in the B * L flattened positions; no attention across them."""

    cu_seqlens: Tensor  # [S + 1] int32, the ends of the documents, beginning with 0
    max_seqlen: int  # tokens of the longest document; to read it from cu_seqlens would stall a GPU
    block_length: int | None = None  # as in `Padded`
    group: dist.ProcessGroup | None = None  # processes that share the positions (ulysses.py), an equal part each

    def number(self, input_ids: Tensor) -> Tensor:
        first = 0 if self.group is None else dist.get_rank(self.group) * input_ids.numel()
        places = torch.arange(first, first + input_ids.numel(), device=input_ids.device)
        document = torch.searchsorted(self.cu_seqlens[1:].long(), places, right=True)
        return (places - self.cu_seqlens.long()[document]).view(input_ids.shape)

    def length(self, input_ids: Tensor) -> int:
        return self.max_seqlen

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if self.group is not None:
            q, k, v = (positions_to_heads(x, self.group) for x in (q, k, v))
        out = bidirectional_attention_varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), self.cu_seqlens,
                                             self.max_seqlen, block_length=self.block_length).view(q.shape)
        return out if self.group is None else heads_to_positions(out, self.group)


@dataclass(frozen=True, slots=True)
class TwoCopies(Layout):
    """A noisy text, and beside it the clean one, for training by block diffusion (`block_diffusion_attention`).

    The hidden states are the noisy copy's. With shifted logits, what is said about the first token of a block is that
    of the clean position before it, as in sampling.
    """

    clean_ids: Tensor  # [B, L] int64
    block_length: int
    copy: Padded | Packed = Padded()  # how one copy lies; no padding
    causal_blocks: bool = False  # see `ModelConfig`
    causal_context: bool = False

    def tokens(self, input_ids: Tensor) -> Tensor:
        return torch.cat((input_ids, self.clean_ids), 1)

    def number(self, input_ids: Tensor) -> Tensor:
        return self.copy.number(input_ids).repeat(1, 2)

    def length(self, input_ids: Tensor) -> int:
        return self.copy.length(input_ids)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        ends = self.copy.cu_seqlens if isinstance(self.copy, Packed) else None
        out = block_diffusion_attention(q, k, v, self.block_length, cu_seqlens=ends, causal=self.causal_blocks)
        if not self.causal_context or self.causal_blocks:
            return out
        clean = replace(self.copy, block_length=1).attend(*(x.chunk(2, 1)[1] for x in (q, k, v)), layer)
        return torch.cat((out.chunk(2, 1)[0], clean), 1)

    def result(self, x: Tensor, shifted: bool) -> Tensor:
        noisy, clean = x.chunk(2, dim=1)
        if not shifted:
            return noisy
        before_a_block = (self.copy.number(self.clean_ids) + 1) % self.block_length == 0
        return torch.where(before_a_block.unsqueeze(-1), clean, noisy)


@dataclass(frozen=True, slots=True)
class Visible(Layout):
    """Documents as in `Packed`, each with a mask that says which keys its queries see.

    PyTorch's attention with a mask: it has no fast kernel, and the masks take n * n bytes for a document of n tokens.
    """

    masks: Sequence[Tensor]  # [n, n] bool for each document of n tokens

    def number(self, input_ids: Tensor) -> Tensor:
        return torch.cat([torch.arange(len(mask), device=mask.device) for mask in self.masks]).view(input_ids.shape)

    def length(self, input_ids: Tensor) -> int:
        return max(map(len, self.masks))

    @torch.compiler.disable  # it would be compiled again for every list of lengths
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        documents = (x.flatten(0, 1).unsqueeze(0).split([len(mask) for mask in self.masks], dim=1) for x in (q, k, v))
        out = [masked_attention(*parts, mask.unsqueeze(0)) for *parts, mask in zip(*documents, self.masks, strict=True)]
        return torch.cat(out, dim=1).view(q.shape)
