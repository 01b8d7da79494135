"""Several calls of the model as one: how their rows lie, without padding, in one long row, and come back for attention.

Everything but attention works on single positions, so there the calls are one row of all their tokens. For attention
rows of similar length are padded to one length again; those with a cache or with blocks stay with their call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.cache import KeyValueCache

_SHORT = 64  # tokens; to attend to so few takes less time than to begin another group


@dataclass(frozen=True, slots=True)
class Ragged:
    """R rows of unequal length, in one long row."""

    places: Tensor  # [R, L] int64: in the long row; where a row is shorter, of any token
    kept: Tensor | None  # [n] int64: which of the R * L are there; None: all
    kept_places: Tensor  # [n] int64: places of those

    @classmethod
    def whole(cls, places: Tensor) -> "Ragged":
        return cls(places, None, places.flatten())

    def take(self, x: Tensor) -> Tensor:
        """x [N, ...] -> [R, L, ...]"""
        return x[self.places]

    def put(self, onto: Tensor, values: Tensor) -> None:
        """values [R, L, ...], in their places of `onto` [N, ...]"""
        values = values.flatten(0, 1)
        onto[self.kept_places] = values if self.kept is None else values[self.kept]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows whose attention is computed together."""

    positions: Ragged
    queries: Ragged  # those wanted of the last layer, in a long row of their own
    key_mask: Tensor | None  # [R, L] bool
    block_length: int | None = None
    cache: KeyValueCache | None = None


class Row(NamedTuple):
    """Of a call without cache and blocks."""

    length: int
    first: int  # its first token's place in the long row
    asked: int
    first_query: int  # the first one's place in the long row of queries


@dataclass(frozen=True, slots=True)
class Arrangement:
    tokens: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64
    queries: Tensor  # [M] int64, places among the N: of each call all that it asks for, one call after the other
    groups: list[Group]


def arrange(calls: Sequence[dict]) -> Arrangement:
    """calls: arguments of `DiffusionLM.hidden_states`, each with position_ids and queries and without cu_seqlens."""
    tokens, position_ids, queries, groups = [], [], [], []
    rows: list[Row] = []
    first = first_query = 0
    for call in calls:
        ids, mask, cache = call["input_ids"], call.get("attention_mask"), call.get("cache")
        own = cache is not None or call.get("block_length") is not None
        count, asked = len(ids), call["queries"].shape[1]
        mask = None if mask is None else mask.bool()
        lengths = [ids.shape[1]] * count if own or mask is None else mask.sum(1).tolist()
        if sum(lengths) == ids.numel():
            places = first + torch.arange(ids.numel(), device=ids.device).view(ids.shape)
            tokens.append(ids.flatten())
            position_ids.append(call["position_ids"].flatten())
        else:
            places = first + (mask.flatten().cumsum(0) - 1).clamp(min=0).view(ids.shape)
            there = mask.flatten().nonzero().squeeze(1)
            tokens.append(ids.flatten()[there])
            position_ids.append(call["position_ids"].flatten()[there])
        queries.append(places.gather(1, call["queries"]).flatten())
        if own:
            of_queries = first_query + torch.arange(count * asked, device=ids.device).view(count, asked)
            groups.append(Group(Ragged.whole(places), Ragged.whole(of_queries), mask, call.get("block_length"), cache))
            first += ids.numel()
        else:
            for row, length in enumerate(lengths):
                rows.append(Row(length, first, asked, first_query + row * asked))
                first += length
        first_query += count * asked
    groups += [_group(some, tokens[0].device) for some in _of_similar_length(rows)]
    return Arrangement(torch.cat(tokens), torch.cat(position_ids), torch.cat(queries), groups)


def _of_similar_length(rows: list[Row]) -> list[list[Row]]:
    """Such that padding at most doubles a row, or fills it up to `_SHORT`."""
    found: list[list[Row]] = []
    for row in sorted(rows, reverse=True):
        if found and found[-1][0].length <= max(2 * row.length, _SHORT):
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _group(rows: list[Row], device: torch.device) -> Group:
    lengths, starts, asked, first_queries = torch.tensor(rows).unbind(1)
    positions, mask = _ragged(starts, lengths, device)
    queries, _ = _ragged(first_queries, asked, device)
    return Group(positions, queries, mask)


def _ragged(starts: Tensor, lengths: Tensor, device: torch.device) -> tuple[Ragged, Tensor | None]:
    """Rows [R] of consecutive places; and which of [R, L] are there, None if all are. Found on the CPU, where starts
    and lengths are, so that a GPU need not be waited for."""
    column = torch.arange(int(lengths.max()))
    there = column < lengths.unsqueeze(1)
    places = starts.unsqueeze(1) + torch.minimum(column, (lengths - 1).clamp(min=0).unsqueeze(1))
    if bool(there.all()):
        return Ragged.whole(places.to(device)), None
    kept = there.flatten().nonzero().squeeze(1)
    return Ragged(places.to(device), kept.to(device), places.flatten()[kept].to(device)), there.to(device)
