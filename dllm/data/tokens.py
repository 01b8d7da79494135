"""Documents to tokens, cached: a file for each corpus, tokenizer and way of reading, which later runs map to memory.

The cache is $DLLM_CACHE (default: ~/.cache/dllm). A file is written aside and renamed, so that several processes may
build the same one; a damaged file is built again.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.data.alignment import align
from dllm.data.conversations import encode_conversation
from dllm.data.sources import Document
from dllm.errors import Failure, UserError
from dllm.files import cache_folder

_VERSION = 4  # of a cache file: its format, and how documents are encoded
_BATCH = 64  # documents that a worker gets at a time
_FEW = 2048  # documents that this process encodes before another has started


class Tokens(NamedTuple):
    """Documents, one after the other. N tokens of D documents; of pairs, N columns of D pairs."""

    tokens: Tensor  # [N] int32; of pairs, after the edit, BLANK where it deletes
    lengths: Tensor  # [D] int64
    trainable: Tensor | None = None  # [N] bool: tokens to learn to write, or columns that an edit may change; None: all
    before: Tensor | None = None  # [N] int32, of pairs: before the edit, BLANK where it inserts


def select(tokens: Tokens, documents: Tensor) -> Tokens:
    """A copy of the documents [D'] (int64, their numbers)."""
    lengths = tokens.lengths[documents]
    index = ranges((tokens.lengths.cumsum(0) - tokens.lengths)[documents], lengths)
    return tokens._replace(lengths=lengths, **{
        name: values[index] for name, values in tokens._asdict().items() if name != "lengths" and values is not None})


def join(parts: Sequence[Tokens]) -> Tokens:
    there = [[values for values in column if values is not None] for column in zip(*parts, strict=True)]
    return Tokens(*(torch.cat(values) if values else None for values in there))


def ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """starts[0], starts[0] + 1, ... counts[0] of them, then those of starts[1], ..."""
    before = counts.cumsum(0) - counts
    return torch.repeat_interleave(starts - before, counts) + torch.arange(int(counts.sum()))


def tokenize(tokenizer, documents: Sequence[Document]) -> list[Tensor]:
    """Per document its tokens and the end-of-text token, int32; no beginning-of-text token, but a DiffusionGemma's.

    A special token that a text mentions is text.
    """
    encoded = encode_documents(tokenizer, documents)
    return list(encoded.tokens.split(encoded.lengths.tolist()))


def encode_documents(tokenizer, documents: Iterable[Document], workers: int = 1, *, anchor: int | None = None
                     ) -> Tokens:
    """Encode texts as `tokenize` does, conversations as `encode_conversation` does, and pairs as aligned texts.

    A conversation without a token to learn becomes no tokens at all.

    Args:
        workers: spawned processes, for conversations, pairs and a tokenizer in Python, unless there are few documents.
            Threads, for texts and a fast tokenizer, which has its own threads: two workers are up to a tenth faster
            than one, two processes would be a fifth slower and start a second later.
        anchor: the token before both texts of a pair (`anchor_token_id`).
    Raises: Failure if a process dies.
    """
    ids, lengths, trainable, before = together = array("i"), array("q"), array("b"), array("i")
    for batch in _encode_batches(tokenizer, documents, workers, anchor):
        for values, part in zip(together, batch, strict=True):
            values.extend(part)
    return Tokens(_as_tensor(ids, torch.int32), _as_tensor(lengths, torch.int64),
                  _as_tensor(trainable, torch.bool) if trainable else None,
                  _as_tensor(before, torch.int32) if before else None)


def _as_tensor(values: array, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def _encode_batches(tokenizer, documents: Iterable[Document], workers: int, anchor: int | None) -> Iterator[tuple]:
    documents = iter(documents)
    first = list(islice(documents, _FEW))
    in_python = bool(first) and (first[0].kind > 0 or not tokenizer.is_fast)
    together = chain(first, documents)
    batches = iter(lambda: list(islice(together, _BATCH)), [])
    if workers <= 1 or in_python and len(first) < _FEW:
        yield from (_encode_batch(tokenizer, batch, anchor) for batch in batches)
        return
    if in_python:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _keep, (tokenizer,))
    else:
        pool = ThreadPoolExecutor(workers)
    waiting = deque()
    try:
        with pool:
            for batch in batches:
                waiting.append(pool.submit(_encode_batch, None if in_python else tokenizer, batch, anchor))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            yield from (future.result() for future in waiting)
    except BrokenProcessPool as error:
        raise Failure("a process that tokenises has died; in a script of your own, keep what it runs below "
                      "if __name__ == '__main__', or set data.num_workers=0") from error


def _keep(tokenizer) -> None:
    """Keep the tokenizer of a worker process."""
    global _kept
    _kept = tokenizer


def _encode_batch(tokenizer, documents: Sequence[Document], anchor: int | None) -> tuple[array, array, array, array]:
    """The fields of `Tokens`, empty for None. tokenizer: None takes the one that `_keep` kept."""
    tokenizer = _kept if tokenizer is None else tokenizer
    if documents[0].kind == 2:
        return _encode_pairs(tokenizer, documents, anchor)
    if documents[0].kind == 1:
        pairs = [_encode_messages(tokenizer, document) for document in documents]
        pairs = [(ids, learnt) if any(learnt) else ([], []) for ids, learnt in pairs]
        return (array("i", chain.from_iterable(ids for ids, _ in pairs)), array("q", (len(ids) for ids, _ in pairs)),
                array("b", chain.from_iterable(learnt for _, learnt in pairs)), array("i"))
    ids, lengths, trainable, begin = array("i"), array("q"), array("b"), _beginning(tokenizer)
    for encoded in _encode_texts(tokenizer, [document.text for document in documents]):
        ids.extend((*begin, *encoded, tokenizer.eos_token_id))
        lengths.append(len(begin) + len(encoded) + 1)
        if begin:  # given, as a prompt is
            trainable.extend((False, *[True] * (len(encoded) + 1)))
    return ids, lengths, trainable, array("i")


def _beginning(tokenizer) -> list[int]:
    """The token that all texts of its model begin with (`begin_text`), if there is one."""
    begins = getattr(tokenizer, "begins_texts", False) and tokenizer.bos_token_id is not None
    return [tokenizer.bos_token_id] if begins else []


def _encode_pairs(tokenizer, documents: Sequence[Document], anchor: int) -> tuple[array, array, array, array]:
    """The fields of `Tokens`. Each text has the anchor before it and end-of-text after it, which no edit changes."""
    ids, lengths, trainable, before = array("i"), array("q"), array("b"), array("i")
    first, last = (anchor, anchor), (tokenizer.eos_token_id, tokenizer.eos_token_id)
    for texts in zip(_encode_texts(tokenizer, [document.before for document in documents]),
                     _encode_texts(tokenizer, [document.text for document in documents]), strict=True):
        columns = [first, *align(*texts), last]
        before.extend(a for a, _ in columns)
        ids.extend(b for _, b in columns)
        lengths.append(len(columns))
        trainable.extend((False, *[True] * (len(columns) - 2), False))
    return ids, lengths, trainable, before


def _encode_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text. A special token that a text mentions is text."""
    if tokenizer.is_fast:  # a third faster than calling the tokenizer, which computes more than the ids
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.encode_special_tokens = True  # as text, where a text mentions them
        return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _encode_messages(tokenizer, document: Document) -> tuple[list[int], list[bool]]:
    try:
        return encode_conversation(tokenizer, **json.loads(document.messages))
    except UserError as error:
        raise UserError(f"{document.source}: {error}") from None


def describe_rules(tokenizer) -> str:
    """Everything that decides how the tokenizer cuts a text, as JSON."""
    if not tokenizer.is_fast:
        return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: rule for name, rule in rules.items() if name not in ("truncation", "padding")})


def load_or_encode(tokenizer, digest: str, documents: Iterable[Document], workers: int, *, anchor: int | None = None
                   ) -> Tokens:
    """`encode_documents`, or the cached tokens.

    Args:
        digest: a hash of the documents' content.
        documents: read only if the cache lacks them.
    """
    decides = [_VERSION, digest, describe_rules(tokenizer), tokenizer.eos_token_id, anchor,
               tokenizer.chat_template, *_beginning(tokenizer)]
    key = hashlib.blake2b(json.dumps(decides).encode(), digest_size=20)
    path = cache_folder() / "tokens" / f"{key.hexdigest()}.safetensors"
    cached = _load(path)
    if cached is None:
        cached = encode_documents(tokenizer, documents, workers, anchor=anchor)
        _save(path, cached)
    return cached


def _load(path: Path) -> Tokens | None:
    """The tokens, mapped to memory; None if the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            if file.metadata()["checksum"] != _checksum(tensors):
                raise ValueError("its content has changed")
        return Tokens(**tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        print(f"the cached tokens {path} are damaged ({error}); they are made again", file=sys.stderr)
        return None


def _save(path: Path, tokens: Tokens) -> None:
    """Write the cache. A failure costs time, not the run, so it is only a line on stderr."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor for name, tensor in tokens._asdict().items() if tensor is not None}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        os.close(descriptor)
        save_file(tensors, temporary, {"checksum": _checksum(tensors)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        print(f"cannot keep the tokens in {path.parent} ({error}); set DLLM_CACHE to another folder", file=sys.stderr)
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.numel():
            total = zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()), total)
    return f"{total:08x}"
