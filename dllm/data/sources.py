"""Read data.train_path record by record, as documents.

A file or record that cannot be read is skipped, counted and named on stderr.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dllm.data.finding import Shard, Skipped, find_shards
from dllm.data.formats import BadRecord, Row, find_rows, prune_nulls
from dllm.errors import Failure, UserError, first_line

_PROMPTS = ("prompt", "question", "instruction")
_ANSWERS = ("response", "completion", "answer", "output")
_INPUTS = ("input", "context")  # what an instruction is about: Alpaca's and Dolly's column
_SYSTEM = ("system", "system_prompt")  # columns of the system's message
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
             "system": "system", "tool": "tool", "observation": "tool"}  # who a message is from -> role
_FOR_TEMPLATE = ("tools", "documents", "chat_template_kwargs")  # columns that a chat template takes beside messages


@dataclass(frozen=True, slots=True)
class Document:
    text: str  # for a conversation, the contents of its messages; for a pair, the text after the edit
    source: str  # path below the folder of the corpus, and record; the same wherever the corpus is
    messages: str | None = None  # a conversation, as JSON: the arguments of `apply_chat_template`
    before: str | None = None  # a pair: the text before the edit

    @property
    def content(self) -> bytes:
        """Everything that decides the tokens, but the kind; nothing if there are none."""
        if self.before is not None:
            return json.dumps([self.before, self.text]).encode() if self.before or self.text else b""
        return (self.messages or self.text).encode()

    @property
    def kind(self) -> int:
        """0 for a text, 1 for a conversation, 2 for a pair."""
        return 2 if self.before is not None else int(self.messages is not None)

    @property
    def characters(self) -> int:
        return len(self.text) + len(self.before or "")


class NoColumn(BadRecord):
    """A record without the columns."""


def read_documents(paths: Sequence[str | Path] | None = None,
                   text_keys: str | Sequence[str] = "text") -> list[Document]:
    """Every non-empty text under the paths, in a fixed order.

    A folder is read with its subfolders, except hidden ones and what is not meant for training (`find_files`). .jsonl
    (.ndjson, .jsonlines), .csv, .tsv, .parquet and .arrow files, and .json files of records, hold one document per
    record, in the first column of `text_keys` that is not null; every other file is one document. All but .parquet and
    .arrow may be compressed: .gz, .bz2, .xz, .zst or .lz4 follows their names. Text is UTF-8, or UTF-16 or UTF-32 with
    a byte order mark. What is no such text, tables without the columns, and unreadable records are skipped; a line on
    stderr names them.

    Args:
        paths: folders, files and datasets of the hub (`find_shards`); None is the standard library of the running
            Python, without its tests.
    Raises: UserError if a path does not exist, or there is no text at all.
    """
    reader = Reader([text_keys] if isinstance(text_keys, str) else list(text_keys))
    shards = find_shards(paths, skipped=reader.skipped)
    documents = [document for shard in shards for _, document in reader.read(shard)]
    reader.finish(paths, bool(documents))
    return documents


class Reader:
    """Makes documents of the records of shards."""

    def __init__(self, keys: Sequence[str], data_type: str = "plaintext"):
        """keys: columns of texts, or of lists of messages (`read_messages`), of which the first one that is not null is
        read; or the two columns of pairs."""
        self.keys = list(keys)
        self.conversations, self.pairs = data_type == "conversation", data_type == "edits"
        self.skipped = Skipped()
        self.missing: str | None = None  # says which columns the first bad table has

    def read(self, shard: Shard, start: int = 0, share: int = 0, of: int = 1) -> Iterator[tuple[int, Document]]:
        """(number, document) of the records numbered at least `start` whose number modulo `of` is `share`.

        Raises: Failure if the hub stops to answer.
        """
        number, lacking, others = None, {}, 0
        try:
            for number, decode in self._find_rows(shard):
                if number >= start and number % of == share:
                    try:
                        document = self._decode(shard, number, decode)
                    except NoColumn as error:
                        lacking[number] = str(error)
                        continue
                    others += 1
                    if document is not None and document.content:
                        yield number, document
        except BadRecord as error:
            self.skipped.add(shard.name, str(error))
        except OSError as error:
            self.skipped.add(shard.name, error.strerror or str(error))
        else:
            if number is None:
                self.skipped.add(shard.name, "empty")
        for number, reason in list(lacking.items())[:None if others else 1]:
            self.skipped.add(f"{shard.name} line {number}" if others else shard.name, reason)

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
        return find_rows(shard.path, partial(self._find_columns, where=str(shard.path)))

    def _find_hub_rows(self, shard: Shard) -> Iterator[Row]:
        try:
            names = shard.table.column_names or next(iter(shard.table), {})
            columns = self._find_columns(names, shard.name)
            for number, row in enumerate(shard.table.select_columns(columns), start=1):
                yield number, partial(prune_columns, row)
        except BadRecord:
            raise
        except Exception as error:  # network or file errors have many types
            raise Failure(f"cannot read on in {shard.name} ({first_line(error)}); start again to go on") from error

    def _decode(self, shard: Shard, number: int, decode: Callable[[], Any]) -> Document | None:
        """The document of a record; None if it is null, or bad and then counted. Raises: NoColumn."""
        try:
            record = decode()
            if number == 0:  # a whole file
                if self.conversations or self.pairs:
                    raise BadRecord(f"not a table of {'pairs' if self.pairs else 'conversations'}")
                return Document(record, shard.name)
            if not isinstance(record, dict):
                raise BadRecord("not a record with columns")
            return self._make_document(f"{shard.name}:{number}", record, f"{shard.path or shard.name} line {number}")
        except NoColumn:
            raise
        except BadRecord as error:
            self.skipped.add(shard.name if number == 0 else f"{shard.name} line {number}", str(error))
            return None

    def _make_document(self, name: str, record: dict, where: str) -> Document | None:
        present = {key: _as_text(value) for key, value in record.items() if value is not None}
        self._find_columns(present if self.pairs else record, where)
        columns = self._text_columns(present)
        if not columns:  # null, as good as empty
            return None
        values = [present[column] for column in columns]
        if self.conversations:
            if columns[0] == "instruction":
                about = [present[key] for key in _INPUTS if present.get(key)]
                values[0] = "\n".join(map(str, [values[0], *about]))
            messages = read_messages(*values)
            system = next((present[key] for key in _SYSTEM if present.get(key)), None)
            if isinstance(system, str) and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            conversation = {"messages": messages, **read_template_values(present)}
            text = "\n".join(filter(None, map(text_of, conversation["messages"])))
            return Document(_check(text), name, _check(json.dumps(conversation, ensure_ascii=False)))
        for column, value in zip(columns, values, strict=True):
            if not isinstance(value, str):
                raise BadRecord(f"{column} is not text")
        return Document(_check(values[-1]), name, before=_check(values[0]) if self.pairs else None)

    def _text_columns(self, present: Iterable[str]) -> list[str]:
        """The first key among these columns; for conversations else a prompt and its answer; for pairs both keys; else
        none."""
        if self.pairs:
            return self.keys if set(self.keys) <= set(present) else []
        found = [key for key in self.keys if key in present][:1]
        if self.conversations and not found:
            pairs = [[prompt, answer] for prompt in _PROMPTS for answer in _ANSWERS if {prompt, answer} <= set(present)]
            found = next(iter(pairs), [])
        return found

    def _find_columns(self, present: Iterable[str], where: str) -> list[str]:
        """The columns that documents are made of, the first of them a text. Raises: NoColumn if there is none."""
        present = list(present)
        if not self._text_columns(present):
            wanted, advice = f"no column {' or '.join(map(repr, self.keys))}", "name one of them in data.text_keys"
            if self.pairs:
                lacking = [repr(key) for key in self.keys if key not in present]
                wanted = f"no text in column {' and '.join(lacking)}, not even \"\""
                advice = 'write "" for an empty text, or name the columns before and after an edit in data.text_keys'
            elif not self.conversations and {"messages", "conversations"} & {*present}:
                advice = "set data.data_type=conversation"
            flag = " (--text-keys)" if advice.endswith("text_keys") else ""
            self.missing = self.missing or (f"{where} has {wanted}; it has {', '.join(present) or 'none'}; "
                                            f"{advice}{flag}")
            raise NoColumn(wanted)
        others = (*_PROMPTS, *_ANSWERS, *_INPUTS, *_SYSTEM, *_FOR_TEMPLATE) if self.conversations else ()
        return [key for key in (*self.keys, *others) if key in present]


def prune_columns(row: dict) -> dict:
    return {name: prune_nulls(value) for name, value in row.items()}


def read_messages(prompt: Any, answer: Any = None) -> list[dict[str, Any]]:
    """The messages of a conversation: a list of them, also as JSON text, or a prompt and its answer, each a text or a
    list of messages.

    A message keeps all its fields, because the chat template may use them. Its content is a text, a list of parts, or
    null beside another field with a value, such as tool_calls. ShareGPT's from and value become role and content.
    Raises: BadRecord unless there are messages, and each has a role, and a content or another field.
    """
    if answer is None and isinstance(prompt, str):
        try:
            prompt = json.loads(prompt)
        except (ValueError, RecursionError):
            raise BadRecord("not a list of messages with role and content") from None
    parts = [prompt] if answer is None else [
        [{"role": role, "content": value}] if isinstance(value, str) else value
        for value, role in ((prompt, "user"), (answer, "assistant"))]
    messages = [_with_role(message) for part in parts for message in (part if isinstance(part, list) else [part])]
    if not messages:
        raise BadRecord("no messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRecord("not a list of messages with role and content")
        content = message.get("content")
        others = [value for key, value in message.items() if key not in ("role", "content")]
        if not isinstance(content, str | list) and (content is not None or not any(others)):
            raise BadRecord("not a list of messages with role and content")
    return messages


def _with_role(message: Any) -> Any:
    if not isinstance(message, dict) or "role" in message or not isinstance(message.get("from"), str):
        return message
    role = _SHAREGPT.get(message["from"].lower())
    if role is None:
        raise BadRecord(f"a message from {message['from']!r}, none of {', '.join(_SHAREGPT)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message.get("value"), **others}


def read_template_values(record: dict) -> dict[str, Any]:
    """What a record gives to the chat template beside its messages. Raises: BadRecord if it is not JSON of the kind."""
    values = {name: record[name] for name in _FOR_TEMPLATE if name in record}
    for name, value in values.items():
        kind = dict if name == "chat_template_kwargs" else list
        try:
            values[name] = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            raise BadRecord(f"{name} is not JSON") from None
        if not isinstance(values[name], kind):
            raise BadRecord(f"{name} is not a {'dictionary' if kind is dict else 'list'}")
    return values


def text_of(message: dict) -> str:
    """The content, and its tool calls as JSON, as a measure of what there is to learn."""
    values = [message.get("content"), message.get("tool_calls")]
    return "\n".join(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                     for value in values if value)


def _as_text(value: Any) -> Any:
    """The text of a binary column, in which TensorFlow and Spark write texts."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8") from None


def _check(text: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can hold, and which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("not UTF-8") from None
    return text
