"""Rows of tokens: documents are cut into chunks, and chunks share rows.

Nothing is dropped: a document is cut into consecutive chunks of max_seq_len. A full chunk is a row; the shorter last
chunks share rows. A chunk never sees another one. The order of the rows is a function of the seed, so a run resumes
from the number of its step alone, on any number of processes.

A conversation that ends with an answer goes on with a tail of end-of-text tokens, which are learnt as the answer is,
because a model is asked for answers on canvases that are longer than they are (LLaDA, arXiv:2502.09992, pads a batch to
one length). The length of a tail is drawn anew whenever the row is read: it takes a random part, short ones more often,
of what the row has left. Packing leaves about as much in each row as its tails need.

A pair of texts before and after an edit is cut between two columns, and every chunk begins with the pair's first
column, the anchor, so that there is a token after which to insert.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.data.tokens import Tokens, ranges
from dllm.errors import UserError


class Packed(NamedTuple):
    """Some rows, one after the other. T tokens, or columns of pairs, in S chunks."""

    tokens: Tensor  # [T] int64; of pairs, after the edit, BLANK where it deletes
    cu_seqlens: Tensor  # [S + 1] int32: where the chunks begin, and T
    max_seqlen: int  # tokens of the longest chunk
    row: Tensor  # [T] int64: index among the rows that were asked for
    column: Tensor  # [T] int64: position within that row
    trainable: Tensor | None = None  # [T] bool: tokens to learn (answers of a conversation, columns to edit); None: all
    before: Tensor | None = None  # [T] int64, of pairs: before the edit, BLANK where it inserts


class RowSource(Protocol):
    """An endless sequence of rows, the same for every process that reads it."""

    def read(self, places: range) -> Packed:
        """The rows at consecutive places, counted over the whole run; later calls ask for later places."""

    def state(self) -> dict:
        """Plain values from which `restore` continues at a place without reading everything before it again."""

    def restore(self, states: list[dict]) -> None:
        """Continue from the states of all processes of a run, however many they were; from the start without any."""


class PackedDataset:
    """Tokenised documents, cut and packed into rows of at most max_seq_len tokens. Chunks with nothing to learn go."""

    def __init__(self, sequences: Sequence[Tensor], max_seq_len: int, seed: int = 0):
        """sequences: per document its tokens [n] (any integer type; kept as int32)."""
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        tokens = torch.cat([sequence.to(torch.int32) for sequence in sequences])
        self._pack(Tokens(tokens, lengths), torch.arange(len(lengths)), max_seq_len, seed)

    @classmethod
    def of(cls, tokens: Tokens, documents: Tensor, max_seq_len: int, seed: int = 0, tails: bool = True,
           alone: bool = False) -> "PackedDataset":
        """The dataset of some documents, [D'] int64 indices; their tokens are not copied.

        tails: append end-of-text tokens to conversations.
        alone: each chunk is a row by itself, without a tail.
        """
        self = cls.__new__(cls)
        self._pack(tokens, documents, max_seq_len, seed, tails and not alone, alone)
        return self

    def _pack(self, tokens: Tokens, documents: Tensor, max_seq_len: int, seed: int, tails: bool = True,
              alone: bool = False) -> None:
        self.tokens, self._trainable, self._before = tokens.tokens, tokens.trainable, tokens.before
        self.max_seq_len = max_seq_len
        self.seed = seed
        lengths = tokens.lengths[documents]
        repeated = int(tokens.before is not None)  # columns at the beginning of a document that all its chunks have
        new = max_seq_len - repeated
        pieces = (lengths - repeated + new - 1) // new
        document = torch.repeat_interleave(torch.arange(len(lengths)), pieces)
        index = torch.arange(len(document)) - (pieces.cumsum(0) - pieces)[document]  # of a chunk within its document
        first = (tokens.lengths.cumsum(0) - tokens.lengths)[documents][document]
        start = first + index * new  # for a repeated column the one before the new ones; `gather` puts it right
        length = torch.minimum(lengths[document] - index * new, torch.tensor(max_seq_len))
        grows = torch.zeros_like(length, dtype=torch.bool)
        if tokens.trainable is not None:
            so_far = F.pad(tokens.trainable.cumsum(0), (1, 0))
            learnt = so_far[start + length] > so_far[start + repeated]
            if tails:
                grows = (index == pieces[document] - 1) & tokens.trainable[start + length - 1]
            first, start, length, grows = first[learnt], start[learnt], length[learnt], grows[learnt]
        reserved = draw_lengths(max_seq_len - length, torch.rand(len(length), generator=seeded(seed, "tails"))) * grows
        rows = [[i] for i in range(len(length))] if alone else pack((length + reserved).tolist(), max_seq_len)
        order = torch.tensor([chunk for row in rows for chunk in row], dtype=torch.int64)
        self._first, self._start, self._length, self._grows = (x[order] for x in (first, start, length, grows))
        self._offset = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)  # index of the first chunk of each row
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._offset) - 1

    @property
    def num_tokens(self) -> int:
        return int(self._length.sum())

    def state(self) -> dict:
        return {}

    def restore(self, states: list[dict]) -> None:
        """There is no state besides the place."""

    def read(self, places: range) -> Packed:
        """Rows of the endless sequence of shuffled epochs."""
        places = torch.arange(places.start, places.stop)
        epochs = range(int(places[0]) // len(self), int(places[-1]) // len(self) + 1)
        mine = [(places // len(self) == epoch).nonzero().squeeze(1) for epoch in epochs]
        parts = [self.gather(self._shuffled(epoch)[places[where] % len(self)], epoch)
                 for epoch, where in zip(epochs, mine, strict=True)]
        return parts[0] if len(parts) == 1 else merge(parts, mine)

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffle(len(self), self.seed, epoch)
        return self._order

    def gather(self, rows: Tensor, epoch: int = 0) -> Packed:
        """The tokens of the rows [R], with the tails of that epoch."""
        counts = self._offset[rows + 1] - self._offset[rows]
        chunk = ranges(self._offset[rows], counts)
        own = self._length[chunk]
        lengths = own + self._draw_tails(rows, epoch)
        # A tail repeats the last token of its chunk, end-of-text, and its mark.
        index = ranges(self._start[chunk], lengths)
        index = index.minimum(torch.repeat_interleave(self._start[chunk] + own - 1, lengths))
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        if self._before is not None:
            index[cu_seqlens[:-1]] = self._first[chunk]
        row_of_chunk = torch.repeat_interleave(torch.arange(len(rows)), counts)
        row = torch.repeat_interleave(row_of_chunk, lengths)
        tokens_in_row = row.bincount(minlength=len(rows))
        column = ranges(torch.zeros_like(rows), tokens_in_row)
        return Packed(self.tokens[index].long(), cu_seqlens.int(), int(lengths.max()), row, column,
                      None if self._trainable is None else self._trainable[index],
                      None if self._before is None else self._before[index].long())

    def _draw_tails(self, rows: Tensor, epoch: int) -> Tensor:
        """Tokens [C] to append to each chunk of the rows: in a random order, each takes of what its row has left."""
        tails = []
        for row in rows.tolist():
            first, last = int(self._offset[row]), int(self._offset[row + 1])
            mine = torch.zeros(last - first, dtype=torch.int64)
            if self._grows[first:last].any():
                generator = seeded(self.seed, "tail", epoch, row)
                left = self.max_seq_len - self._length[first:last].sum()
                for chunk in torch.randperm(last - first, generator=generator).tolist():
                    if self._grows[first + chunk]:
                        mine[chunk] = draw_lengths(left, torch.rand((), generator=generator))
                        left = left - mine[chunk]
            tails.append(mine)
        return torch.cat(tails)


class MixedDataset:
    """Sources that take turns, so that each gives its share of the rows.

    In every 10,000 rows each source has exactly its share of the places, shuffled anew; the rows of a source keep their
    order.
    """

    CYCLE = 10_000  # rows

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float], seed: int = 0):
        """weights: the sources' shares, of any sum.

        Raises: UserError if one would have no row in a cycle.
        """
        self.sources = list(sources)
        self.seed = seed
        bounds = (torch.tensor([0.0, *weights], dtype=torch.float64).cumsum(0) / sum(weights) * self.CYCLE).round()
        self._quota = bounds.diff().long()
        if not self._quota.all():
            raise UserError(f"a source of weight {min(weights):g} among {sum(weights):g} would give less than one row "
                            f"in {self.CYCLE:,}; raise its weight in data.train_path, or leave it out")

    def read(self, places: range) -> Packed:
        asked = torch.arange(places.start, places.stop)
        parts, rows = [], []
        chosen, numbers = self._assign(asked)
        for index, source in enumerate(self.sources):
            mine = (chosen == index).nonzero().squeeze(1)
            if len(mine):  # its numbers are consecutive, because places are
                parts.append(source.read(range(int(numbers[mine[0]]), int(numbers[mine[-1]]) + 1)))
                rows.append(mine)
        return merge(parts, rows)

    def _assign(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """(source, number of the row among the source's own), each [P], of places [P]."""
        chosen, numbers = torch.empty_like(places), torch.empty_like(places)
        for cycle in (places // self.CYCLE).unique().tolist():
            order = torch.repeat_interleave(torch.arange(len(self._quota)), self._quota)
            order = order[shuffle(self.CYCLE, self.seed, cycle)]
            number = F.one_hot(order).cumsum(0)[torch.arange(self.CYCLE), order] - 1
            inside = places // self.CYCLE == cycle
            at = places[inside] % self.CYCLE
            chosen[inside] = order[at]
            numbers[inside] = number[at] + cycle * self._quota[order[at]]
        return chosen, numbers

    def state(self) -> dict:
        return {"sources": [source.state() for source in self.sources]}

    def restore(self, states: list[dict]) -> None:
        for index, source in enumerate(self.sources):
            source.restore([state["sources"][index] for state in states])


def merge(parts: Sequence[Packed], rows: Sequence[Tensor]) -> Packed:
    """The rows of all parts in one order. rows: for each part the places [R] of its rows; together 0, 1, ..."""
    placed = [where[part.row] for part, where in zip(parts, rows, strict=True)]
    row = torch.cat(placed)
    order = row.argsort(stable=True)
    row_of_chunk = torch.cat([where[part.cu_seqlens[:-1].long()] for part, where in zip(parts, placed, strict=True)])
    lengths = torch.cat([part.cu_seqlens.diff() for part in parts])[row_of_chunk.argsort(stable=True)]
    rest = {name: torch.cat([getattr(part, name) for part in parts])[order]
            for name in ("tokens", "column", "trainable", "before") if getattr(parts[0], name) is not None}
    return Packed(cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(), max_seqlen=max(part.max_seqlen for part in parts),
                  row=row[order], **rest)


def draw_lengths(at_most: Tensor, uniform: Tensor) -> Tensor:
    """Lengths 0 to at_most, int64, each about half as likely as one half as long; uniform in [0, 1)."""
    return ((at_most + 1).double() ** uniform.double()).long() - 1


def mix(*parts: object) -> int:
    """A number below 2**56 that depends on every part."""
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def shuffle(count: int, *seeds: object) -> Tensor:
    """A permutation [count] that depends on the seeds alone."""
    return torch.randperm(count, generator=seeded(*seeds))


def seeded(*seeds: object) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*seeds))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices grouped so that the lengths in a group sum to at most `capacity`: best fit, longest first."""
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # space left -> rows with it
    spaces: list[int] = []  # its keys, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, lengths[index])
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[place]
        rows[row].append(index)
        if space := space - lengths[index]:
            if space not in open_rows:
                open_rows[space] = []
                insort(spaces, space)
            open_rows[space].append(row)
    return rows
