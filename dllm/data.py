"""Text to packed rows of tokens: read documents, hold some out, tokenise, cut, pack, shuffle.

Nothing is dropped: each document becomes tokens + end-of-text, cut into consecutive chunks of max_seq_len. A full chunk
is a row; the shorter last chunks share rows. A chunk never sees another one. The order of the rows in an epoch is a
function of the seed, so a run resumes from the number of its step alone.
"""

import hashlib
import json
import sys
import sysconfig
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dllm.errors import UserError

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    source: str  # a name that stays the same wherever the corpus lies: the path below its folder, and the record


class BadFile(Exception):
    """A file or record that holds no text; it is skipped and counted."""


def read_documents(paths: Sequence[str | Path] | None = None,
                   text_keys: str | Sequence[str] = "text") -> list[Document]:
    """Every non-empty text under the paths, in a fixed order.

    A folder is read with its subfolders (hidden ones apart). .jsonl and .parquet files hold one document per record, in
    the first present column of `text_keys`; every other file is a document. Files that are no UTF-8 text, and records
    that cannot be read, are skipped; one line on stderr counts and names them.

    Args:
        paths: folders and files; None is the standard library of the running Python, without its tests.
    Raises: UserError if a path does not exist, a table lacks the columns, or there is no text at all.
    """
    keys = [text_keys] if isinstance(text_keys, str) else list(text_keys)
    documents: list[Document] = []
    skipped: list[str] = []
    for path, name in list_files(paths):
        try:
            documents += [document for document in _read_file(path, name, keys, skipped) if document.text]
        except BadFile as error:
            skipped.append(f"{name} ({error})")
        except OSError as error:
            skipped.append(f"{name} ({error.strerror or error})")
    where = "the standard library" if paths is None else ", ".join(map(str, paths))
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        print(f"skipped {len(skipped)} that could not be read as text: {', '.join(skipped[:3])}{more}", file=sys.stderr)
    if not documents:
        raise UserError(f"no text in {where} ({len(skipped)} skipped); give a folder of text files, or .jsonl or "
                        ".parquet files")
    return documents


def list_files(paths: Sequence[str | Path] | None) -> Iterator[tuple[Path, str]]:
    """(file, name below its folder), sorted by name within each path."""
    if paths is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
        names = [name for name in names if not (_TEST_FOLDERS | _NOT_SOURCE) & set(name.split("/")[:-1])]
        if not names:
            raise UserError(f"this Python's standard library is not in files below {root}; name a folder of text")
        yield from ((root / name, name) for name in names)
        return
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist; give a folder or file of text that does")
        if path.is_file():
            yield path, path.name
            continue
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        yield from ((path / name, name) for name in names
                    if not any(part.startswith(".") or part == "__pycache__" for part in name.split("/")))


def _read_file(path: Path, name: str, keys: list[str], skipped: list[str]) -> list[Document]:
    if path.suffix == ".parquet":
        return _read_parquet(path, name, keys)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise BadFile("not UTF-8") from None
    if path.suffix != ".jsonl":
        return [Document(text, name)]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            skipped.append(f"{name} line {number} (not JSON)")
            continue
        column = _find_column(record if isinstance(record, dict) else {}, keys, f"{path} line {number}")
        if isinstance(record[column], str):
            documents.append(Document(record[column], f"{name}:{number}"))
        else:
            skipped.append(f"{name} line {number} ({column} is not text)")
    return documents


def _read_parquet(path: Path, name: str, keys: list[str]) -> list[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        column = _find_column(file.schema_arrow.names, keys, str(path))
        texts = file.read([column])[column].to_pylist()
    except pyarrow.ArrowException as error:
        raise BadFile(f"not Parquet: {str(error).splitlines()[0][:60]}") from None
    return [Document(text, f"{name}:{number}") for number, text in enumerate(texts, start=1) if isinstance(text, str)]


def _find_column(present: Iterable[str], keys: list[str], where: str) -> str:
    present = list(present)
    for key in keys:
        if key in present:
            return key
    raise UserError(f"{where} has no column {' or '.join(map(repr, keys))}; it has {', '.join(present) or 'none'}; "
                    "name one of them in data.text_keys (--text-keys)")


def split_documents(documents: Sequence[Document], validation_share: float) -> tuple[list[Document], list[Document]]:
    """(training, held out). A document's side depends on its source alone, so it stays when others come or go.

    Of two documents or more at least one is on either side, unless validation_share is 0.
    """
    def place(document: Document) -> int:
        name = document.source.encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")

    if validation_share == 0 or len(documents) < 2:
        return list(documents), []
    places = [place(document) for document in documents]
    held_out = [p < validation_share * 2**64 for p in places]
    if not any(held_out):
        held_out[places.index(min(places))] = True
    if all(held_out):
        held_out[places.index(max(places))] = False
    return ([document for document, out in zip(documents, held_out, strict=True) if not out],
            [document for document, out in zip(documents, held_out, strict=True) if out])


def tokenize(tokenizer, documents: Sequence[Document]) -> list[Tensor]:
    """Per document its tokens and the end-of-text token, int32; no beginning-of-text token."""
    sequences = []
    for start in range(0, len(documents), 256):
        texts = [document.text for document in documents[start:start + 256]]
        if tokenizer.is_fast:  # a third faster than calling the tokenizer, which makes more than the ids
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
            encoded = [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        sequences += [torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.int32) for ids in encoded]
    return sequences


class Packed(NamedTuple):
    """Some rows, one after the other. T tokens in S chunks."""

    tokens: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S + 1] int32: where the chunks begin, and T
    max_seqlen: int  # tokens of the longest chunk
    row: Tensor  # [T] int64: which of the rows asked for
    column: Tensor  # [T] int64: position within that row
    trainable: Tensor | None = None  # [T] bool: tokens to learn to write (of a conversation, the answers); None: all


class RowSource(Protocol):
    """An endless sequence of rows, the same for every process that reads it."""

    def read(self, places: range) -> Packed:
        """The rows at consecutive places, counted over the whole run."""


class PackedDataset:
    """Tokenised documents, cut and packed into rows of at most max_seq_len tokens."""

    def __init__(self, sequences: Sequence[Tensor], max_seq_len: int, seed: int = 0):
        """sequences: per document its tokens [n] (any integer type; kept as int32)."""
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        self.tokens = torch.cat([sequence.to(torch.int32) for sequence in sequences])
        self.max_seq_len = max_seq_len
        self.seed = seed
        pieces = (lengths + max_seq_len - 1) // max_seq_len
        document = torch.repeat_interleave(torch.arange(len(lengths)), pieces)
        index = torch.arange(len(document)) - (pieces.cumsum(0) - pieces)[document]  # of the chunk within its document
        start = (lengths.cumsum(0) - lengths)[document] + index * max_seq_len
        length = torch.minimum(lengths[document] - index * max_seq_len, torch.tensor(max_seq_len))
        rows = pack(length.tolist(), max_seq_len)
        order = torch.tensor([chunk for row in rows for chunk in row], dtype=torch.int64)
        self._start, self._length = start[order], length[order]
        self._offset = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)  # of each row's first chunk
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Rows."""
        return len(self._offset) - 1

    def read(self, places: range) -> Packed:
        """Of the endless sequence of shuffled epochs."""
        places = torch.arange(places.start, places.stop)
        epochs = range(int(places[0]) // len(self), int(places[-1]) // len(self) + 1)
        return self.gather(torch.cat([self._shuffled(epoch)[places[places // len(self) == epoch] % len(self)]
                                      for epoch in epochs]))

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            seed = int.from_bytes(hashlib.blake2b(f"{self.seed} {epoch}".encode(), digest_size=7).digest(), "big")
            self._epoch, self._order = epoch, torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._order

    def gather(self, rows: Tensor) -> Packed:
        """The tokens of the rows [R]."""
        counts = self._offset[rows + 1] - self._offset[rows]
        chunk = _ranges(self._offset[rows], counts)
        lengths = self._length[chunk]
        index = _ranges(self._start[chunk], lengths)
        row_of_chunk = torch.repeat_interleave(torch.arange(len(rows)), counts)
        row = torch.repeat_interleave(row_of_chunk, lengths)
        tokens_in_row = row.bincount(minlength=len(rows))
        column = _ranges(torch.zeros_like(rows), tokens_in_row)
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
        return Packed(self.tokens[index].long(), cu_seqlens, int(lengths.max()), row, column)


def _ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """starts[0], starts[0] + 1, ... counts[0] of them, then those of starts[1], ..."""
    before = counts.cumsum(0) - counts
    return torch.repeat_interleave(starts - before, counts) + torch.arange(int(counts.sum()))


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
