"""What data.train_path names, read record by record: local files, and datasets of the Hugging Face hub.

A file or record that cannot be read is skipped, counted and named on stderr.
"""

import csv
import io
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from dllm.errors import Failure, UserError

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}
_COMPRESSED = {".gz", ".bz2", ".zst", ".lz4"}
_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%-]+))?")
_PROMPTS, _ANSWERS = ("prompt", "question"), ("response", "completion", "answer")
Row = tuple[int, Callable[[], Any]]  # number within the shard, from 1 (0: all of it), and what decodes the record


@dataclass(frozen=True, slots=True)
class Document:
    text: str  # of a conversation, the contents of its messages
    source: str  # a name that stays the same wherever the corpus lies: the path below its folder, and the record
    messages: str | None = None  # a conversation, as JSON: a list of objects with role and content

    @property
    def content(self) -> bytes:
        """All that decides its tokens."""
        return (self.messages or self.text).encode()


class BadRecord(Exception):
    """A file or record that holds no text; it is skipped and counted."""


class Shard(NamedTuple):
    """A file, or a file of the hub's."""

    name: str  # below its folder
    path: Path | None
    table: Any = None  # a dataset of the library `datasets`, if there is no path

    @property
    def size(self) -> int:
        """Bytes; of the hub's, 0."""
        return 0 if self.path is None else self.path.stat().st_size


class Skipped:
    """What could not be read, each named once."""

    def __init__(self):
        self.names: dict[str, None] = {}
        self._told = 0

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, reason: str) -> None:
        self.names[f"{name} ({reason})"] = None

    def tell(self) -> None:
        """One line on stderr about what was skipped since the last one."""
        new = list(self.names)[self._told:]
        self._told = len(self.names)
        if new:
            more = f" and {len(new) - 3} more" if len(new) > 3 else ""
            print(f"skipped {len(new)} that could not be read as text: {', '.join(new[:3])}{more}", file=sys.stderr)


def read_documents(paths: Sequence[str | Path] | None = None,
                   text_keys: str | Sequence[str] = "text") -> list[Document]:
    """Every non-empty text under the paths, in a fixed order.

    A folder is read with its subfolders (hidden ones apart). .jsonl, .csv, .parquet and .arrow files, and .json files
    of records, hold one document per record, in the first present column of `text_keys`; every other file is a
    document. All but .parquet and .arrow may be compressed, with .gz, .bz2, .zst or .lz4 after their names. Files that
    are no UTF-8 text, tables without the columns, and records that cannot be read, are skipped; one line on stderr
    counts and names them.

    Args:
        paths: folders, files and datasets of the hub (`find_shards`); None is the standard library of the running
            Python, without its tests.
    Raises: UserError if a path does not exist, or there is no text at all.
    """
    reader = Reader([text_keys] if isinstance(text_keys, str) else list(text_keys))
    documents = [document for shard in find_shards(paths) for _, document in reader.read(shard)]
    reader.finish(paths, bool(documents))
    return documents


def find_shards(paths: Sequence[str | Path] | None, stream: bool = False) -> list[Shard]:
    """The files under each path, sorted by name within it.

    Args:
        paths: a folder, a file, or where there is no such path a dataset of the hub as owner/name, owner/name:config,
            owner/name@split (default: train) or all of it; None is the standard library.
        stream: read the hub's files while they are downloaded, one shard each, instead of downloading them first.
    Raises: UserError if there is no such path or dataset.
    """
    if paths is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
        names = [name for name in names if not (_TEST_FOLDERS | _NOT_SOURCE) & set(name.split("/")[:-1])]
        if not names:
            raise UserError(f"this Python's standard library is not in files below {root}; name a folder of text")
        return [Shard(name, root / name) for name in names]
    shards = []
    for path in map(Path, paths):
        hub = None if path.exists() else _HUB.fullmatch(str(path))
        if hub:
            shards += _open_hub(str(path), hub["name"], hub["config"], hub["split"] or "train", stream)
        elif not path.exists():
            raise UserError(f"{path} does not exist; give a folder or file of text that does")
        elif path.is_file():
            shards.append(Shard(path.name, path))
        else:
            names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
            shards += [Shard(name, path / name) for name in names
                       if not any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))]
    return shards


def _open_hub(where: str, name: str, config: str | None, split: str, stream: bool) -> list[Shard]:
    from huggingface_hub import HfApi

    try:
        import datasets
    except ImportError:
        raise UserError(f"{where} is no local path, and reading it from the hub needs datasets: "
                        "pip install 'dllm[data]'") from None
    try:
        if not Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).exists():
            HfApi().dataset_info(name, timeout=10)  # fails at once where load_dataset would try again for half a minute
        table = datasets.load_dataset(name, config, split=split, streaming=stream)
    except Exception as error:  # unreachable, unknown, gated, without that split: many types, one meaning
        raise UserError(f"{where} is no local path, and cannot be read from the hub ({first_line(error)}); check the "
                        "name and the network") from error
    if not stream or table.num_shards == 1:
        return [Shard(where, None, table)]
    return [Shard(f"{where}[{i}]", None, table.shard(table.num_shards, i)) for i in range(table.num_shards)]


def write_parquet(table: Any, folder: Path) -> None:
    """Write a dataset of the library `datasets` as files of about half a gigabyte, each whole or absent.

    Raises: Failure if the disk is full or the folder cannot be written.
    """
    count = max(1, -(-(table.dataset_size or 0) // 2**29))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            path = folder / f"{index:05}-of-{count:05}.parquet"
            temporary = path.with_name(f".{path.name}.tmp")
            table.shard(count, index, contiguous=True).to_parquet(temporary)
            temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise Failure(f"cannot write {folder}: {reason}; free space or choose another folder") from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Reader:
    """Makes documents of the records of shards."""

    def __init__(self, keys: Sequence[str], conversations: bool = False):
        """keys: columns, the first present is taken; of texts, or of lists of messages (`read_messages`)."""
        self.keys = list(keys)
        self.conversations = conversations
        self.skipped = Skipped()
        self.missing: str | None = None  # of the first table without the columns, which it has instead

    def read(self, shard: Shard, start: int = 0, share: int = 0, of: int = 1) -> Iterator[tuple[int, Document]]:
        """(number, document) of the records numbered at least `start` whose number modulo `of` is `share`.

        Raises: Failure if the hub stops to answer.
        """
        number = None
        try:
            for number, decode in self._find_rows(shard):
                if number >= start and number % of == share:
                    document = self._decode(shard, number, decode)
                    if document is not None and document.text:
                        yield number, document
        except BadRecord as error:
            self.skipped.add(shard.name, str(error))
        except OSError as error:
            self.skipped.add(shard.name, error.strerror or str(error))
        else:
            if number is None:
                self.skipped.add(shard.name, "empty")

    def finish(self, paths: Sequence[str | Path] | None, found: bool) -> None:
        """Tell what was skipped. Raises: UserError if nothing was found."""
        self.skipped.tell()
        if not found and self.missing is not None:
            raise UserError(self.missing)
        if not found:
            where = "the standard library" if paths is None else ", ".join(map(str, paths))
            raise UserError(f"no text in {where} ({len(self.skipped)} skipped); give a folder of text files, or .jsonl "
                            "or .parquet files")

    def _find_rows(self, shard: Shard) -> Iterator[Row]:
        if shard.path is None:
            return self._find_hub_rows(shard)
        suffix = shard.path.suffix
        if suffix in (".parquet", ".arrow"):
            return self._find_arrow_rows(shard.path)
        if suffix in _COMPRESSED:
            suffix = shard.path.with_suffix("").suffix
        kinds = {".csv": _find_csv_rows, ".jsonl": _find_json_lines, ".json": _find_json_rows}
        if suffix in kinds:
            return self._check_columns(kinds[suffix](shard.path), shard.path)
        return iter([(0, partial(_read_text, shard.path))])

    def _check_columns(self, rows: Iterator[Row], path: Path) -> Iterator[Row]:
        """The rows, unless the first has not the columns: then none."""
        for index, (number, decode) in enumerate(rows):
            if index == 0 and number > 0:
                try:
                    record = decode()
                except BadRecord:  # named when its turn comes
                    record = None
                if isinstance(record, dict):
                    self._find_columns(record, f"{path} line {number}")
            yield number, decode

    def _find_hub_rows(self, shard: Shard) -> Iterator[Row]:
        try:
            names = shard.table.column_names or next(iter(shard.table), {})
            columns = self._find_columns(names, shard.name)
            for number, row in enumerate(shard.table.select_columns(columns), start=1):
                yield number, partial(dict, row)
        except BadRecord:
            raise
        except Exception as error:  # of the network or of the file, of many types
            raise Failure(f"cannot read on in {shard.name} ({first_line(error)}); start again to go on") from error

    def _find_arrow_rows(self, path: Path) -> Iterator[Row]:
        import pyarrow
        import pyarrow.parquet

        try:
            if path.suffix == ".parquet":
                file = pyarrow.parquet.ParquetFile(path, memory_map=True)
                columns = self._find_columns(file.schema_arrow.names, str(path))
                batches = file.iter_batches(1024, columns=columns)
            else:
                with pyarrow.memory_map(str(path)) as mapped:
                    start = mapped.read(6)
                opened = pyarrow.memory_map(str(path))
                file = (pyarrow.ipc.open_file if start == b"ARROW1" else pyarrow.ipc.open_stream)(opened)
                columns = self._find_columns(file.schema.names, str(path))
                batches = (file.get_batch(i) for i in range(file.num_record_batches)) if start == b"ARROW1" else file
            number = 0
            for batch in batches:
                for i in range(batch.num_rows):
                    number += 1
                    yield number, lambda batch=batch, i=i: {name: batch[name][i].as_py() for name in columns}
        except pyarrow.ArrowException as error:
            kind = {".parquet": "Parquet", ".arrow": "Arrow"}[path.suffix]
            raise BadRecord(f"not {kind}: {first_line(error)[:60]}") from None

    def _decode(self, shard: Shard, number: int, decode: Callable[[], Any]) -> Document | None:
        name, where = f"{shard.name}:{number}", f"{shard.path or shard.name} line {number}"
        try:
            record = decode()
            if number == 0:  # a whole file
                if self.conversations:
                    raise BadRecord("not a table of conversations")
                return Document(record, shard.name)
            columns = self._find_columns(record if isinstance(record, dict) else {}, where)
            values = [record[column] for column in columns]
            if None in values:
                return None
            if self.conversations:
                messages = read_messages(*values)
                contents = "\n".join(message["content"] for message in messages)
                return Document(_check(contents), name, json.dumps(messages))
            if not isinstance(values[0], str):
                raise BadRecord(f"{columns[0]} is not text")
            return Document(_check(values[0]), name)
        except BadRecord as error:
            self.skipped.add(shard.name if number == 0 else f"{shard.name} line {number}", str(error))
            return None

    def _find_columns(self, present: Iterable[str], where: str) -> list[str]:
        """One of the keys; of conversations else a prompt and its answer. Raises: BadRecord if there is none."""
        present = list(present)
        found = [key for key in self.keys if key in present][:1]
        if self.conversations and not found:
            pairs = [[prompt, answer] for prompt in _PROMPTS for answer in _ANSWERS if {prompt, answer} <= set(present)]
            found = next(iter(pairs), [])
        if not found:
            wanted = f"no column {' or '.join(map(repr, self.keys))}"
            self.missing = self.missing or (f"{where} has {wanted}; it has {', '.join(present) or 'none'}; name one of "
                                            "them in data.text_keys (--text-keys)")
            raise BadRecord(wanted)
        return found


def read_messages(prompt: Any, answer: Any = None) -> list[dict[str, str]]:
    """The messages of a conversation: a list of them, or a prompt and its answer, each a text or a list of messages.

    Raises: BadRecord unless every message has a role and a content that are text.
    """
    parts = [prompt] if answer is None else [
        [{"role": role, "content": value}] if isinstance(value, str) else value
        for value, role in ((prompt, "user"), (answer, "assistant"))]
    messages = [message for part in parts for message in (part if isinstance(part, list) else [part])]
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str)
               and isinstance(message.get("content"), str) for message in messages):
        raise BadRecord("not a list of messages with role and content")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("not UTF-8") from None
    return text


def _open(path: Path) -> IO[bytes]:
    if path.suffix not in _COMPRESSED:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"))


def _read_text(path: Path) -> str:
    try:
        with _open(path) as file:
            text = file.read().decode()
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8") from None
    if "\0" in text:  # of an archive, say
        raise BadRecord("not text: it holds NUL")
    return text


def _find_json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, partial(_parse_json, line)


def _parse_json(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise BadRecord("not JSON") from None


def _find_json_rows(path: Path) -> Iterator[Row]:
    """Of a list of objects, or of one object per line; any other .json file is a text."""
    text = _read_text(path)
    try:
        records = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        first = text.lstrip().partition("\n")[0]
        if first.startswith("{") and first.rstrip().endswith("}"):
            return _find_json_lines(path)
        records = None
    if isinstance(records, list) and records and all(isinstance(record, dict) for record in records):
        return ((number, partial(dict, record)) for number, record in enumerate(records, start=1))
    return iter([(0, lambda: text)])


def _find_csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 KiB that csv allows at first
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8", newline="") as file:
            for number, record in enumerate(csv.DictReader(file, restkey=""), start=1):
                yield number, partial(dict, record)
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8") from None
    except csv.Error as error:
        raise BadRecord(f"not CSV: {error}") from None
