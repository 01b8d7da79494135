"""The records of a file: tables by their suffix, every other file one text; plain or compressed.

Text is UTF-8, or what a byte order mark says. Suffixes may be in capitals.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dllm.errors import first_line
from dllm.files import decode_text, find_encoding

_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
_ARROW = {".parquet": "Parquet", ".arrow": "Arrow"}
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_BLANK = re.compile(r"\s*")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_POINTER = b"version https://git-lfs.github.com/spec/"  # in place of a file that Git LFS has not fetched
TABLES = (*_ARROW, *_JSON_LINES, ".csv", ".tsv")
Row = tuple[int, Callable[[], Any]]  # (number within the file from 1, or 0 for the whole file; decoder of the record)
Choose = Callable[[Iterable[str]], list[str]]  # from the columns that there are, those to read; BadRecord for none


class BadRecord(Exception):
    """A file or record that holds no text; it is skipped and counted."""


def suffix_of(name: str) -> str:
    """The suffix in small letters, without that of a compression or a shard: .jsonl of A.JSONL.GZ and
    a.jsonl-00000-of-00002."""
    path = Path(_SHARD.sub("", name.lower()))
    return path.with_suffix("").suffix if path.suffix in _CODECS else path.suffix


def find_rows(path: Path, choose: Choose) -> Iterator[Row]:
    """The records of a table, or the whole file as one. Records of Arrow and Parquet files have only chosen columns.

    Raises: BadRecord or OSError if the file cannot be read on.
    """
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise BadRecord("a pointer to it alone; fetch it with git lfs pull")
    suffix, packed = suffix_of(path.name), path.suffix.lower() in _CODECS
    if suffix in _ARROW and not packed:
        return _find_arrow_rows(path, choose)
    if suffix in _JSON_LINES:
        return _find_json_lines(path)
    if suffix in (".csv", ".tsv"):
        return _find_csv_rows(path, "," if suffix == ".csv" else "\t")
    return _find_json_rows(path, choose) if suffix == ".json" else iter([(0, partial(_read_text, path))])


def prune_nulls(value: Any) -> Any:
    """Without the null fields that a table gives to every nested record that lacks them; a null `content` stays."""
    if isinstance(value, list):
        return [prune_nulls(part) for part in value]
    if isinstance(value, dict):
        return {key: prune_nulls(part) for key, part in value.items() if part is not None or key == "content"}
    return value


class _XzFile(io.RawIOBase):
    """An .xz file, which pyarrow lacks. Its damage is an OSError, as that of the other codecs."""

    def __init__(self, path: Path):
        import lzma

        self.file, self.damage = lzma.open(path), (lzma.LZMAError, EOFError)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            return self.file.readinto(buffer)
        except self.damage as error:
            raise OSError(first_line(error)) from error

    def close(self) -> None:
        self.file.close()
        super().close()


def _open(path: Path) -> io.BufferedReader:
    codec = _CODECS.get(path.suffix.lower())
    if codec is None:
        return open(path, "rb")
    if codec == "xz":
        return io.BufferedReader(_XzFile(path))
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=codec))


def _open_text(path: Path, newline: str) -> io.TextIOWrapper:
    """Bytes that are not UTF-8 become halves of surrogate pairs, so that only their records are refused."""
    file = _open(path)
    encoding = find_encoding(file.peek(4))
    return io.TextIOWrapper(file, encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict", newline)


def _read_text(path: Path) -> str:
    with _open(path) as file:
        content = file.read()
    try:
        text = decode_text(content)
    except UnicodeDecodeError as error:
        raise _not_text(error, content) from None
    if "\0" in text:  # an archive, for example
        raise BadRecord("not text: it holds NUL")
    return text


def _not_text(error: UnicodeDecodeError, content: bytes = b"\0") -> BadRecord:
    """Eight-bit encodings have no mark, so nothing tells which one it is, and a guess would train on other letters."""
    eight_bits = error.encoding == "utf-8" and all(byte >= 32 or byte in b"\t\n\r\f" for byte in content)
    return BadRecord("not UTF-8, perhaps latin-1" if eight_bits else "not UTF-8")


def _find_json_lines(path: Path) -> Iterator[Row]:
    try:
        with _open_text(path, "\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, partial(_parse_json, line)
    except UnicodeDecodeError as error:
        raise _not_text(error) from None


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecord("not JSON") from None


def _find_json_rows(path: Path, choose: Choose) -> Iterator[Row]:
    """The records of a list of objects, or of several objects, or one with the columns; other files are texts.

    Raises: BadRecord if records with the columns are found below a key.
    """
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        first = text.lstrip().partition("\n")[0]
        if first.startswith("{") and first.rstrip().endswith("}"):
            return _find_json_lines(path)
        value = _read_values(text)
    if isinstance(value, list) and any(isinstance(record, dict) for record in value):
        return ((number, partial(lambda record: record, record)) for number, record in enumerate(value, start=1))
    if isinstance(value, dict):
        if _has_columns(value, choose):
            return iter([(1, lambda: value)])
        if below := [key for key, part in value.items() if isinstance(part, list) and any(
                isinstance(record, dict) and _has_columns(record, choose) for record in part)]:
            raise BadRecord(f"its records are below the key {below[0]!r}; save them as a list, or one a line")
    return iter([(0, lambda: text)])


def _read_values(text: str) -> list | None:
    """The values of a text that is nothing but JSON values, one after the other, as jq writes them."""
    values, place = [], _BLANK.match(text).end()
    try:
        while place < len(text):
            value, end = json.JSONDecoder().raw_decode(text, place)
            values.append(value)
            place = _BLANK.match(text, end).end()
    except (ValueError, RecursionError):
        return None
    return values


def _has_columns(record: dict, choose: Choose) -> bool:
    try:
        return bool(choose(record))
    except BadRecord:
        return False


def _find_csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default limit is 128 KiB, less than a long document
    try:
        with _open_text(path, "") as file:
            for number, record in enumerate(csv.DictReader(file, delimiter=delimiter), start=1):
                yield number, partial(_check_fields, record)
    except UnicodeDecodeError as error:
        raise _not_text(error) from None
    except csv.Error as error:
        raise BadRecord(f"not CSV: {error}") from None


def _check_fields(record: dict) -> dict:
    if None in record:
        raise BadRecord("more fields than the header")
    return {name: value for name, value in record.items() if value is not None}  # a short line lacks columns


def _find_arrow_rows(path: Path, choose: Choose) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    kind = _ARROW[suffix_of(path.name)]
    try:
        if kind == "Parquet":
            file = pyarrow.parquet.ParquetFile(path, memory_map=True)
            columns = choose(file.schema_arrow.names)
            batches = file.iter_batches(1024, columns=columns)
        else:
            with pyarrow.memory_map(str(path)) as mapped:
                start = mapped.read(6)
            opened = pyarrow.memory_map(str(path))
            file = (pyarrow.ipc.open_file if start == b"ARROW1" else pyarrow.ipc.open_stream)(opened)
            columns = choose(file.schema.names)
            batches = (file.get_batch(i) for i in range(file.num_record_batches)) if start == b"ARROW1" else file
        number = 0
        for batch in batches:
            for i in range(batch.num_rows):
                number += 1
                yield number, lambda batch=batch, i=i: {name: prune_nulls(batch[name][i].as_py()) for name in columns}
    except pyarrow.ArrowException as error:
        raise BadRecord(f"not {kind}: {first_line(error)[:60]}") from None
