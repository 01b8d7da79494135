"""Batch several calls of the model into one ragged row; attention runs per group of rows of similar length.

Everything but attention works on single positions, so there the calls are one row of all their tokens, without padding.
For attention rows of similar length are padded to one length again; those with a cache or blocks stay with their call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm.model.layouts import Cached, Layout, Padded

_SHORT = 64  # tokens; to attend to so few takes less time than to begin another group


class Call(NamedTuple):
    """Arguments of `Transformer.hidden_states`."""

    input_ids: Tensor
    layout: Padded | Cached  # with queries
    predicted: Tensor | None = None


class Places(NamedTuple):
    """R rows of unequal length, in one long row."""

    index: Tensor  # [R, L] int64: in the long row; where a row is shorter, of any token
    kept: Tensor | None = None  # [n] int64: which of the R * L are there; None: all

    def put(self, onto: Tensor, values: Tensor) -> None:
        """values [R, L, ...], in their places of `onto` [N, ...]"""
        index, values = self.index.flatten(), values.flatten(0, 1)
        if self.kept is not None:
            index, values = index[self.kept], values[self.kept]
        onto[index] = values


class Group(NamedTuple):
    """Rows whose attention is computed together."""

    positions: Places
    queries: Places  # those wanted of the last layer, in a long row of their own
    layout: Padded | Cached


class Row(NamedTuple):
    positions: range  # in the long row
    queries: range  # in the long row of queries


@dataclass(frozen=True, slots=True)
class Ragged(Layout):
    """Several calls as one: `batch.split(model.hidden_states(batch.row, batch))` gives what each gives alone."""

    calls: Sequence[Call]
    groups: Sequence[Group]
    row: Tensor  # [1, N] int64, the tokens of all calls
    position_ids: Tensor  # [1, N] int64
    queries: Tensor | None  # [1, M] int64, places among the N: all that a call asks for, one call after the other
    certainty: Tensor | None = None  # [1, N] fp32, where a call has one
    predicted: Tensor | None = None  # [1, N, D], see `Transformer.hidden_states`; every call has them, or none

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Self:
        tokens, position_ids, queries, certainty, predicted, groups, rows = [], [], [], [], [], [], []
        first = first_query = 0
        for ids, layout, before in calls:
            stays = isinstance(layout, Cached) or layout.block_length is not None
            there, lengths = slice(None), [ids.shape[1]] * len(ids)
            index = torch.arange(first, first + ids.numel(), device=ids.device).view_as(ids)
            if not stays and layout.key_mask is not None:
                there, lengths = layout.key_mask.flatten().nonzero().squeeze(1), layout.key_mask.sum(1).tolist()
                index = first + (layout.key_mask.flatten().cumsum(0) - 1).clamp(min=0).view_as(ids)
            tokens.append(ids.flatten()[there])
            sure = torch.ones(ids.shape, device=ids.device) if layout.certainty is None else layout.certainty
            certainty.append(sure.flatten()[there])
            position_ids.append(layout.number(ids).flatten()[there])
            queries.append(index.gather(1, layout.queries).flatten())
            if before is not None:
                predicted.append(before.flatten(0, 1)[there])
            own, asked = [], layout.queries.shape[1]
            for length in lengths:
                own.append(Row(range(first, first + length), range(first_query, first_query + asked)))
                first, first_query = first + length, first_query + asked
            if stays:
                groups.append(_group(own, ids.device, layout))
            else:
                rows += own
        groups += [_group(some, tokens[0].device) for some in _of_similar_length(rows)]
        if all(call.layout.certainty is None for call in calls):
            certainty = []
        return cls(calls, groups, *(torch.cat(parts).unsqueeze(0) if parts else None
                                    for parts in (tokens, position_ids, queries, certainty, predicted)))

    @property
    def uneven(self) -> bool:
        return any(call.layout.uneven for call in self.calls)

    def number(self, input_ids: Tensor) -> Tensor:
        return self.position_ids

    def length(self, input_ids: Tensor) -> int:
        return max(call.layout.length(call.input_ids) for call in self.calls)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        out, last = torch.empty_like(q), self.queries is not None
        for positions, queries, layout in self.groups:
            asked, layout = (queries, layout) if last else (positions, layout.inner)
            asked.put(out[0], layout.attend(q[0, asked.index], k[0, positions.index], v[0, positions.index], layer))
        return out

    def split(self, hidden: Tensor) -> list[Tensor]:
        """Hidden states [1, M, D] -> [B, Q, D] of each call."""
        shapes = [call.layout.queries.shape for call in self.calls]
        parts = hidden[0].split([shape.numel() for shape in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _of_similar_length(rows: list[Row]) -> list[list[Row]]:
    """Such that padding at most doubles a row, or fills it up to `_SHORT`."""
    found: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.positions), reverse=True):
        if found and len(found[-1][0].positions) <= max(2 * len(row.positions), _SHORT):
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _group(rows: list[Row], device: torch.device, layout: Padded | Cached | None = None) -> Group:
    positions, mask = _pad([row.positions for row in rows], device)
    return Group(positions, _pad([row.queries for row in rows], device)[0], layout or Padded(mask))


def _pad(rows: list[range], device: torch.device) -> tuple[Places, Tensor | None]:
    """Rows [R] of places; and which of [R, L] are there, None if all are. On the CPU, so that no GPU is waited for."""
    index = pad_sequence([torch.arange(row.start, row.stop) for row in rows], batch_first=True, padding_value=-1)
    there = index >= 0
    if bool(there.all()):
        return Places(index.to(device)), None
    return Places(index.clamp(min=0).to(device), there.flatten().nonzero().squeeze(1).to(device)), there.to(device)
