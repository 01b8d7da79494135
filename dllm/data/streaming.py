"""Rows packed on the fly, from a corpus that is never in memory as a whole.

Each of a fixed number of lanes reads its own share of the corpus without end, with the files in a new order every
epoch; the row at place p is the next one of lane p % lanes. A lane reads a block of about a mebibyte of text, cuts and
packs it as `PackedDataset` does, and gives its rows in a shuffled order. So a row is a function of corpus, seed and
place, whichever process computes it. The state of a lane is five numbers, from which any number of processes continues.
"""

from collections.abc import Iterator, Sequence

import torch

from dllm.data.finding import Shard
from dllm.data.packing import Packed, PackedDataset, merge, mix, shuffle
from dllm.data.sources import Document, Reader
from dllm.data.splitting import is_held_out
from dllm.data.tokens import encode_documents
from dllm.errors import UserError

_BLOCK = 2**20  # characters
_START = [0, 0, 0, 0, 0]  # the first state of a lane


class StreamedRows:
    """An endless stream of rows. Places are read in increasing order; a lane also computes the rows it skips."""

    def __init__(self, shards: Sequence[Shard], reader: Reader, tokenizer, *, max_seq_len: int, seed: int = 0,
                 validation_share: float = 0.0, workers: int = 1, lanes: int = 8, anchor: int | None = None,
                 alone: bool = False):
        """validation_share: the share of documents left out. lanes: best some for each row of a step. anchor: as in
        `encode_documents`. alone: as in `PackedDataset.of`."""
        def pack(documents: Sequence[Document], *seeds: object) -> PackedDataset:
            in_python = reader.conversations or reader.pairs or not tokenizer.is_fast
            tokens = encode_documents(tokenizer, documents, 1 if in_python else workers, anchor=anchor)
            reader.skipped.tell()
            return PackedDataset.of(tokens, torch.arange(len(documents)), max_seq_len, mix(seed, *seeds), alone=alone)

        self._lanes = [_Lane(lane, lanes, shards, reader, pack, validation_share, seed) for lane in range(lanes)]

    def read(self, places: range) -> Packed:
        """Raises: UserError if the corpus has nothing to learn."""
        rows = [self._lanes[place % len(self._lanes)].read(place // len(self._lanes)) for place in places]
        return merge(rows, torch.arange(len(rows)).split(1))

    def state(self) -> dict:
        return {"lanes": [lane.state() for lane in self._lanes]}

    def restore(self, states: list[dict]) -> None:
        for index, lane in enumerate(self._lanes):
            lane.restore(max((state["lanes"][index] for state in states), default=_START))  # the latest


class _Lane:
    """Reads every `of`-th record of each shard, or every `of`-th of many shards, or all records if they are few."""

    def __init__(self, lane: int, of: int, shards: Sequence[Shard], reader: Reader, pack, validation_share: float,
                 seed: int):
        self.lane, self.of = lane, of
        self.shards, self.reader, self.pack = shards, reader, pack
        self.validation_share, self.seed = validation_share, seed
        self.restore(_START)

    def state(self) -> list[int]:
        """[rows before the block, whether it reads all records, epoch, shard and record where the block begins]"""
        return [self.rows_before, int(self.reads_all), *self.start]

    def restore(self, state: Sequence[int]) -> None:
        self.rows_before, self.reads_all, self.start = state[0], bool(state[1]), tuple(state[2:])
        self.next, self.block, self.walk = self.start, None, None

    def read(self, number: int) -> Packed:
        """The lane's row of that number."""
        while self.block is None or number >= self.rows_before + len(self.block):
            if self.block is not None:
                self.rows_before += len(self.block)
                self.start = self.next
            self.block = self._load()
            if self.rows_before + len(self.block) == 0 and self.next[0] > 0:  # an epoch without a row
                if self.reads_all:
                    raise UserError(self.reader.missing or "the documents in data.train_path have nothing to train on; "
                                    "give others, or lower data.validation_share")
                self.restore([0, 1, 0, 0, 0])
        if number < self.rows_before:
            raise ValueError(f"row {number} of lane {self.lane} is before row {self.rows_before}; read places in order")
        return self.block.read(range(number - self.rows_before, number - self.rows_before + 1))

    def _load(self) -> PackedDataset:
        """The block that begins at `start`. A block ends where an epoch does."""
        if self.walk is None:
            self.walk = self._walk(*self.start)
        documents, characters = [], 0
        while characters < _BLOCK:
            document, self.next = next(self.walk)
            if document is None:
                break
            documents.append(document)
            characters += document.characters
        return self.pack(documents, self.lane, *self.start)

    def _walk(self, epoch: int, index: int, record: int) -> Iterator[tuple[Document | None, tuple[int, int, int]]]:
        """The documents from a position on, without end, each with the position after it; None ends an epoch."""
        mine, of = range(len(self.shards)), self.of
        if self.reads_all:
            of = 1
        elif len(self.shards) >= 8 * self.of:  # a lane then reads no records of the others
            mine, of = mine[self.lane::self.of], 1
        while True:
            order = shuffle(len(mine), self.seed, self.lane, epoch).tolist()
            for position in range(index, len(mine)):
                shard = mine[order[position]]
                share = (self.lane - shard) % of  # spreads single documents too, which all have number 0
                for number, document in self.reader.read(self.shards[shard], record, share, of):
                    if not is_held_out(document.source, self.validation_share):
                        yield document, (epoch, position, number + 1)
                record = 0
            epoch, index = epoch + 1, 0
            yield None, (epoch, 0, 0)
