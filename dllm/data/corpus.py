"""Read `data.*`, then tokenise and pack; two steps, because a new tokenizer trains on the texts."""

import hashlib
import json
import math
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dllm.config.schema import DataGroup
from dllm.data.conversations import set_chat_template
from dllm.data.finding import Shard, find_shards
from dllm.data.packing import MixedDataset, PackedDataset, RowSource, mix
from dllm.data.sources import Document, Reader
from dllm.data.splitting import choose_held_out, is_held_out, place_document
from dllm.data.streaming import StreamedRows
from dllm.data.tokens import Tokens, encode_documents, join, load_or_encode, select
from dllm.errors import UserError

# Characters of a stream:
_HELD_OUT = 2**20  # held out to measure on
_READ_FOR_HELD_OUT = 2**26  # read at most to find these
_FOR_TOKENIZER = 10**8  # read to train a new tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    rows: RowSource
    rows_per_epoch: int | None  # None: a stream, whose end is unknown
    documents: int | None  # to train on
    tokens: int | None  # to train on; of pairs, columns
    held_out: PackedDataset | None  # documents to validate on
    held_out_documents: int
    held_out_bytes: int  # UTF-8 bytes of the held-out texts (of pairs, those after), or contents of held-out messages
    fingerprint: str  # changes with the documents; for a stream, with the names and sizes of its files
    pairs: bool = False

    def describe(self) -> str:
        """One line for a person."""
        documents, tokens = ("pairs", "columns") if self.pairs else ("documents", "tokens")
        held_out = f"{self.held_out_documents:,} {documents} held out"
        if self.rows_per_epoch is None:
            return f"a stream of {documents}; {held_out}"
        return f"{self.documents:,} {documents}, {self.tokens:,} {tokens} in {self.rows_per_epoch:,} rows; {held_out}"


class _Source:
    """The paths that share a weight. Unless streamed, they are read once, to hash, count and divide the documents."""

    def __init__(self, paths: Sequence[str] | None, weight: float, group: DataGroup):
        self.paths, self.weight = paths, weight
        self.share = group.validation_share
        self.streamed = group.datasets_type == "iterable"
        self.reader = Reader(group.key_list, group.data_type)
        self.shards: list[Shard] = find_shards(paths, self.streamed, self.reader.skipped)
        if self.streamed:
            names = [f"{shard.name} {shard.size}" for shard in self.shards]
            self.fingerprint = hashlib.blake2b("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()
            return
        places, sizes, content = array("Q"), array("q"), hashlib.blake2b(digest_size=20)
        for document in self.read():
            encoded = document.content
            content.update(b"%d %d " % (len(encoded), document.kind) + encoded)
            places.append(place_document(document.source))
            sizes.append(len(document.text.encode()))
        self.reader.finish(paths, bool(places))
        self.content = content.hexdigest()
        self.held_out = torch.tensor(choose_held_out(places, self.share))
        self.bytes = torch.tensor(sizes)
        self.fingerprint = hashlib.blake2b(content.digest() + places.tobytes()).hexdigest()

    def read(self) -> Iterator[Document]:
        return (document for shard in self.shards for _, document in self.reader.read(shard))

    def read_training(self) -> Iterator[Document]:
        if self.streamed:
            return (document for document in self.read() if not is_held_out(document.source, self.share))
        held_out = self.held_out.tolist()
        return (document for document, out in zip(self.read(), held_out, strict=True) if not out)

    def find_held_out(self) -> list[Document]:
        """The first held-out documents of a stream."""
        found, held_out, read = [], 0, 0
        for document in self.read() if self.share else ():
            read += document.characters
            if is_held_out(document.source, self.share):
                found.append(document)
                held_out += document.characters
            if held_out >= _HELD_OUT or read >= _READ_FOR_HELD_OUT:
                break
        return found


class Corpus:
    """The documents that data.train_path names, before they are tokenised."""

    def __init__(self, group: DataGroup):
        self.group = group
        self.sources = [_Source(paths, weight, group) for paths, weight in group.sources]

    def texts(self) -> Iterator[str]:
        """The training texts, of pairs both; from each source of a stream, its first 100 million characters."""
        for source in self.sources:
            characters = 0
            for document in source.read_training():
                if document.before is not None:
                    yield document.before
                yield document.text
                characters += document.characters
                if source.streamed and characters >= _FOR_TOKENIZER:
                    break

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts, of pairs those after the edit. A stream has no such number."""
        return sum(int(source.bytes.sum()) for source in self.sources)

    @property
    def fingerprint(self) -> str:
        parts = [(source.fingerprint, source.weight) for source in self.sources]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def read_corpus(group: DataGroup) -> Corpus:
    """Find the files and, unless they are streamed, read them once. A line on stderr names those that are skipped.

    Raises: UserError if a path does not exist, a table lacks the columns, or a source has no text at all.
    """
    return Corpus(group)


def choose_lanes(rows_per_step: int) -> int:
    """A number of lanes from 8, to mix several files, to 64, to hold few blocks; each slot of a step has its own."""
    if rows_per_step <= 64:
        return rows_per_step * math.ceil(8 / rows_per_step)
    return max(lanes for lanes in range(1, 65) if rows_per_step % lanes == 0)


def open_training_data(corpus: Corpus, tokenizer, seed: int, rows_per_step: int = 1, *, anchor: int | None = None,
                       alone: bool = False) -> TrainingData:
    """Tokenise the corpus, or read the tokens from the cache, and cut them into rows.

    Several processes may call it at once; the first to finish fills the cache. Conversations give the tokenizer the
    chat template that data.chat_template names.

    Args:
        rows_per_step: over all processes. A stream has lanes for them, so that a process reads only what it needs.
        anchor: of pairs, the token before both texts (`anchor_token_id`).
        alone: each chunk is a row by itself, without a tail.
    Raises: UserError if there is nothing to train on, or the chat template cannot be used.
    """
    group = corpus.group
    if group.data_type == "conversation":
        set_chat_template(tokenizer, group.chat_template)
    rows: list[RowSource] = []
    held_out: list[Tokens] = []
    documents = held_out_bytes = 0
    for index, source in enumerate(corpus.sources):
        source_seed = seed if len(corpus.sources) == 1 else mix(seed, index)
        if source.streamed:
            rows.append(StreamedRows(source.shards, source.reader, tokenizer, validation_share=group.validation_share,
                                     max_seq_len=group.max_seq_len, seed=source_seed, workers=group.num_workers,
                                     lanes=choose_lanes(rows_per_step), anchor=anchor, alone=alone))
            found = source.find_held_out()
            held_out.append(encode_documents(tokenizer, found, group.num_workers, anchor=anchor))
            sizes = torch.tensor([len(document.text.encode()) for document in found], dtype=torch.int64)
        else:
            tokens = load_or_encode(tokenizer, source.content, source.read(), group.num_workers, anchor=anchor)
            if dropped := int((tokens.lengths == 0).sum()):
                print(f"dropped {dropped:,} conversations that have no answer to learn", file=sys.stderr)
            training = (~source.held_out).nonzero().squeeze(1)
            rows.append(PackedDataset.of(tokens, training, group.max_seq_len, source_seed, alone=alone))
            if not len(rows[-1]):
                what = "words in its pairs" if group.data_type == "edits" else "answers of an assistant"
                raise UserError(f"{', '.join(source.paths or ())} has no {what} to learn; give others, or another "
                                "data.data_type")
            documents += int((tokens.lengths[training] > 0).sum())
            held_out.append(select(tokens, source.held_out.nonzero().squeeze(1)))
            sizes = source.bytes[source.held_out]
        held_out_bytes += int(sizes[held_out[-1].lengths > 0].sum())
    streamed = group.datasets_type == "iterable"
    together = join(held_out)
    validation = PackedDataset.of(together, torch.arange(len(together.lengths)), group.max_seq_len, seed, tails=False,
                                  alone=alone)
    return TrainingData(
        rows=rows[0] if len(rows) == 1 else MixedDataset(rows, [source.weight for source in corpus.sources], seed),
        rows_per_epoch=None if streamed else sum(map(len, rows)), documents=None if streamed else documents,
        tokens=None if streamed else sum(part.num_tokens for part in rows),
        held_out=validation if len(validation) else None, held_out_documents=int((together.lengths > 0).sum()),
        held_out_bytes=held_out_bytes, fingerprint=corpus.fingerprint, pairs=group.data_type == "edits")
