"""What the tokens of a vocabulary spell, and what each does to an automaton over bytes."""

import json
import re
import weakref
from typing import NamedTuple

import numpy as np

from dllm.constraints.regular import Automaton, Pause
from dllm.errors import UserError

MAX_ENTRIES = 1 << 26  # of a table of functions, 2 bytes each
CHUNK = 1 << 18  # entries that are computed between two pauses


class Spelling:
    """The beginnings of all tokens as a tree: level d holds those of d + 1 bytes, each once.

    levels: for each, of every node the number of its parent in the level before, and its last byte.
    node: [V] int64, where each token ends, numbered through the levels; -1 where a token spells nothing.
    """

    def __init__(self, texts: dict[int, bytes], vocab_size: int):
        self.node = np.full(vocab_size, -1)
        self.levels: list[tuple[np.ndarray, np.ndarray]] = []
        tokens = np.array([token for token, text in texts.items() if token < vocab_size and text], dtype=np.int64)
        lengths = np.array([len(texts[token]) for token in tokens.tolist()], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        tokens, lengths = tokens[order], lengths[order]
        joined = np.frombuffer(b"".join(texts[token] for token in tokens.tolist()), dtype=np.uint8)
        begins = lengths.cumsum() - lengths
        parent, first = np.zeros(len(tokens), dtype=np.int64), 0
        for depth in range(int(lengths.max(initial=0))):
            longer = int(np.searchsorted(-lengths, -depth))  # tokens with more bytes than depth; they come first
            keys, which = np.unique(parent[:longer] * 256 + joined[begins[:longer] + depth], return_inverse=True)
            self.levels.append((keys // 256, keys % 256))
            ended = slice(int(np.searchsorted(-lengths, -depth - 1)), longer)
            self.node[tokens[ended]] = first + which[ended]
            parent, first = which, first + len(keys)

    @classmethod
    def of(cls, tokenizer, vocab_size: int) -> "Spelling":
        """Computed once for a tokenizer, as long as its vocabulary does not change."""
        kept = _SPELLINGS.setdefault(tokenizer, {})
        key = len(tokenizer), vocab_size, tuple(tokenizer.all_special_ids)
        if key not in kept:
            kept.clear()
            kept[key] = cls(token_bytes(tokenizer), vocab_size)
        return kept[key]


_SPELLINGS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Functions(NamedTuple):
    """What tokens do to the states of an automaton. Kinds number the tokens that do the same."""

    kind: np.ndarray  # [V] int64, of each token; 0 leads nowhere
    table: np.ndarray  # [kinds, N + 1] int16: the state after a token of each kind


def functions_of(automaton: Automaton, spelling: Spelling, pause: Pause) -> Functions:
    """Raises: UserError if the table is too large."""
    states, classes = automaton.table.shape
    rows = [np.full(states, states - 1, dtype=np.int16), np.arange(states, dtype=np.int16)]
    numbers = {row.tobytes(): number for number, row in enumerate(rows)}
    whole, of_nodes = np.stack(rows), []
    above = np.ones(1, dtype=np.int64)  # the empty text changes no state
    for parents, last in spelling.levels:
        here = np.zeros(len(parents), dtype=np.int64)
        live = np.flatnonzero(above[parents])
        keys, which = np.unique(above[parents[live]] * classes + automaton.class_of[last[live]], return_inverse=True)
        found = np.zeros(len(keys), dtype=np.int64)
        per_chunk = max(CHUNK // states, 1)
        for start in range(0, len(keys), per_chunk):
            pause()
            some = keys[start:start + per_chunk]
            new = automaton.table[whole[some // classes], (some % classes)[:, None]]
            for place, row in enumerate(new, start):
                number = numbers.setdefault(row.tobytes(), len(rows))
                if number == len(rows):
                    rows.append(row)
                found[place] = number
        if len(rows) * states > MAX_ENTRIES:
            raise UserError("the tokens do too many different things to it; write a smaller one")
        whole = np.stack(rows) if len(rows) > len(whole) else whole
        here[live] = found[which]
        of_nodes.append(here)
        above = here
    of_node = np.concatenate([*of_nodes, np.zeros(1, dtype=np.int64)])  # node -1 is the last
    used, kind = np.unique(np.append(of_node[spelling.node], 0), return_inverse=True)
    return Functions(kind[:-1], whole[used])


def token_bytes(tokenizer) -> dict[int, bytes]:
    """What each token of a fast tokenizer adds to the text, in UTF-8; special tokens are left out.

    Raises: UserError if its tokens do not say what they add.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    decoder = {} if decoder is None else json.loads(decoder.__getstate__())
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    special = {*tokenizer.all_special_ids, *(number for number, token in tokenizer.added_tokens_decoder.items()
                                             if token.special)}
    texts = {number: text for text, number in tokenizer.get_vocab().items() if number not in special}
    if "ByteLevel" in kinds:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return {number: bytes(byte_of[c] for c in text) if all(c in byte_of for c in text) else text.encode()
                for number, text in texts.items() if text}
    if not kinds & {"ByteFallback", "Metaspace", "Fuse", "Replace"} or kinds & {"WordPiece", "BPEDecoder", "CTC"}:
        raise UserError("regular expressions and JSON schemas need a tokenizer that is byte-level or marks spaces with "
                        f"'\u2581', this one decodes by {', '.join(sorted(kinds)) or 'nothing'}; use AllowedTokens")
    space = " " if kinds & {"Metaspace", "Replace"} else "\u2581"
    is_byte = re.compile("<0x[0-9A-Fa-f]{2}>" if "ByteFallback" in kinds else "(?!)").fullmatch
    return {number: bytes([int(text[3:5], 16)]) if is_byte(text) else text.replace("\u2581", space).encode()
            for number, text in texts.items() if text}
