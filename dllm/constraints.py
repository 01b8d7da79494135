"""Constrained decoding: texts that match a regular expression or a JSON schema, or are made of some tokens alone.

Positions are committed in any order, so what a position may take depends on both its sides. outlines-core turns the
expression into an automaton over tokens; a forward sweep over the positions to fill says in which states the automaton
can be before each, a backward sweep from which states it can still accept, and a token is allowed that leads from one
of the first to one of the second. Every committed token is so part of some matching text. Tokens committed in the same
step were allowed each for itself: taken from the surest on, one that leaves no matching text with those before it is
not committed.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dllm.errors import UserError
from dllm_kernels import pack_allowed

STOP = "\U0010fffd"  # a private character that no text has
MASKED = -1  # no token

class Constraint(Protocol):
    """What the positions to fill may take."""

    final: bool  # whether committed tokens must stay, as later ones have been chosen to fit them

    def fits(self, length: int) -> bool:
        """Whether so many positions can be filled."""

    def allowed(self, tokens: Tensor, editable: Tensor, mask_token_id: int) -> Tensor:
        """int32 bits [B, L, ceil(V / 32)] (see `dllm_kernels.pack_allowed`) of what each position of `editable` [B, L]
        may take, given what has been committed of the canvas tokens [B, L]; elsewhere anything."""

    def keep(self, before: Tensor, after: Tensor, confidence: Tensor | None, editable: Tensor,
             mask_token_id: int) -> Tensor:
        """The canvas [B, L] after a step, without what cannot be committed together; at least the surest of a row."""


class AllowedTokens:
    """Only these tokens are committed."""

    final = False

    def __init__(self, token_ids: Sequence[int], vocab_size: int):
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise UserError(f"the allowed tokens must be one or more numbers in [0, {vocab_size}), not "
                            f"{list(token_ids)[:8]}")
        words = torch.zeros(vocab_size, dtype=torch.bool)
        words[list(token_ids)] = True
        self.bits = pack_allowed(words)

    def fits(self, length: int) -> bool:
        return True

    def allowed(self, tokens: Tensor, editable: Tensor, mask_token_id: int) -> Tensor:
        return self.bits.to(tokens.device).expand(*tokens.shape, -1)

    def keep(self, before: Tensor, after: Tensor, confidence: Tensor | None, editable: Tensor,
             mask_token_id: int) -> Tensor:
        return after


class Regex:
    """The positions to fill of a row, in their order, match a regular expression, end-of-text tokens after it apart.

    The syntax is that of Rust's regex crate, without anchors and look-around.

    Args:
        tokenizer: a fast one of Transformers', byte-level or with byte fallback.
        vocab_size: of the model.
    Raises: UserError if outlines-core is not installed, or the expression is wrong or cannot be spelt with the tokens.
    """

    final = True

    def __init__(self, pattern: str, tokenizer, vocab_size: int):
        try:
            from outlines_core import Index, Vocabulary
        except ImportError:
            raise UserError("regular expressions and JSON schemas need outlines-core: "
                            "pip install 'dllm[constrain]'") from None
        self.pattern, self.end = pattern, tokenizer.eos_token_id
        # outlines-core forgets transitions of states in which a text may end or go on (0.2.14). So every text ends with
        # a character of its own, a token beyond the vocabulary: where it may come, a text may end.
        stop, unused = vocab_size, vocab_size + 1
        spelling: dict[bytes, list[int]] = {STOP.encode(): [stop]}
        for token, text in token_bytes(tokenizer).items():
            if token < vocab_size:
                spelling.setdefault(text, []).append(token)
        try:
            self.index = Index(f"(?:{pattern}){STOP}", Vocabulary(unused, spelling))
        except ValueError as error:
            raise UserError(f"the regular expression {pattern!r} cannot be used: "
                            f"{str(error).splitlines()[0]}") from None
        ended = self.index.get_final_states()  # those after the stop, which is also what four bytes in a row spell
        transitions = {state: steps for state, steps in self.index.get_transitions().items() if state not in ended}
        self.names = list(transitions)  # of the automaton's states; ours are numbered, and sets of them are bits of int
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.start, self.after_end = 1 << self.numbers[self.index.get_initial_state()], len(self.names)
        self.accepting = 0
        groups: dict[tuple[int, int], list[int]] = {}
        for name, steps in transitions.items():
            for token, following in steps.items():
                if token == stop:
                    self.accepting |= 1 << self.numbers[name]
                elif following not in ended:
                    groups.setdefault((self.numbers[name], self.numbers[following]), []).append(token)
        if self.end is not None:
            for state in (*_members(self.accepting), self.after_end):
                groups[state, self.after_end] = [self.end]
            self.accepting |= 1 << self.after_end
        self.edges: list[list[tuple[int, int]]] = [[] for _ in range(self.after_end + 1)]  # following state, group
        for group, (state, following) in enumerate(groups):
            self.edges[state].append((following, group))
        self.reach = [sum(1 << following for following, _ in edges) for edges in self.edges]
        words = torch.zeros(vocab_size, dtype=torch.bool)
        bits = []
        for tokens in groups.values():
            words[tokens] = True
            bits.append(pack_allowed(words))
            words[tokens] = False
        self.bits = torch.stack(bits)  # [groups, ceil(V / 32)]

    def fits(self, length: int) -> bool:
        return self._can_match([MASKED] * length, MASKED)

    def allowed(self, tokens: Tensor, editable: Tensor, mask_token_id: int) -> Tensor:
        bits = torch.full((*tokens.shape, self.bits.shape[1]), -1, dtype=torch.int32)
        known: dict[tuple[int, ...], Tensor] = {}  # most positions between two committed tokens are in the same case
        for row, (ids, places) in enumerate(zip(tokens.cpu(), editable.cpu(), strict=True)):
            places = places.nonzero().flatten().tolist()
            ids = ids[places].tolist()
            before, after = self._sweep(ids, mask_token_id)
            if not before[-1] & self.accepting:
                raise UserError(f"no text of {len(ids)} tokens matches the constraint {self.pattern!r}"
                                + ("" if self.end is None else ", end-of-text tokens after it included")
                                + "; change the number of tokens")
            for i, place in enumerate(places):
                if ids[i] == mask_token_id:
                    groups = tuple(group for state in _members(before[i]) for following, group in self.edges[state]
                                   if after[i] >> following & 1)
                    if groups not in known:
                        known[groups] = functools.reduce(torch.bitwise_or, self.bits[list(groups)])
                    bits[row, place] = known[groups]
        return bits.to(tokens.device)

    def keep(self, before: Tensor, after: Tensor, confidence: Tensor | None, editable: Tensor,
             mask_token_id: int) -> Tensor:
        kept = after.clone()
        committed = editable & (before != after)
        for row in (committed.sum(1) > 1).nonzero().flatten().tolist():
            places = editable[row].nonzero().flatten().tolist()
            ids = after[row, places].tolist()
            if self._can_match(ids, mask_token_id):
                continue
            fresh = committed[row, places].nonzero().flatten()
            surest = confidence[row, places][fresh].argsort(descending=True, stable=True)
            whole, ids = ids, before[row, places].tolist()
            for i in fresh[surest].tolist():
                ids[i] = whole[i]
                if not self._can_match(ids, mask_token_id):
                    ids[i] = mask_token_id
            kept[row, places] = torch.tensor(ids, device=kept.device)
        return kept

    def _can_match(self, ids: list[int], mask_token_id: int) -> bool:
        states = self.start
        for token in ids:
            states = self._advance(states, token, mask_token_id)
        return bool(states & self.accepting)

    def _sweep(self, ids: list[int], mask_token_id: int) -> tuple[list[int], list[int]]:
        """Sets of states: before each of the n positions and after the last, those it can be in (n + 1); and after each
        position, those from which the rest can be accepted (n)."""
        before = [self.start]
        for token in ids:
            before.append(self._advance(before[-1], token, mask_token_id))
        after = [self.accepting]
        for states, token in zip(before[-2:0:-1], ids[:0:-1], strict=True):
            after.append(sum(1 << state for state in _members(states)
                             if self._advance(1 << state, token, mask_token_id) & after[-1]))
        return before, after[::-1]

    def _advance(self, states: int, token: int, mask_token_id: int) -> int:
        """The states that a token, or any (a mask), leads to from a set of states."""
        following = 0
        for state in _members(states):
            if token == mask_token_id:
                following |= self.reach[state]
            elif token == self.end:
                following |= (self.accepting >> state & 1) << self.after_end
            elif state != self.after_end:
                name = self.index.get_next_state(self.names[state], token)
                if name in self.numbers:
                    following |= 1 << self.numbers[name]
        return following


def json_schema(schema: dict | str, tokenizer, vocab_size: int) -> Regex:
    """The positions to fill are JSON that a schema accepts, as far as regular expressions can say (no recursion).

    Raises: UserError as `Regex`, or if the schema is no JSON or asks for what is not supported.
    """
    try:
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError:
        raise UserError("regular expressions and JSON schemas need outlines-core: "
                        "pip install 'dllm[constrain]'") from None
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        json.loads(text)
        pattern = build_regex_from_schema(text)
    except ValueError as error:  # JSONDecodeError is one
        raise UserError(f"the JSON schema cannot be used: {str(error).splitlines()[0]}") from None
    return Regex(pattern, tokenizer, vocab_size)


def token_bytes(tokenizer) -> dict[int, bytes]:
    """What each token of a fast tokenizer adds to the text, in UTF-8; special tokens are left out."""
    decoder = str(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    special = {*tokenizer.all_special_ids, *(number for number, token in tokenizer.added_tokens_decoder.items()
                                             if token.special)}
    texts = {number: text for text, number in tokenizer.get_vocab().items() if number not in special}
    if "ByteLevel" in decoder:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return {number: bytes(byte_of[c] for c in text) for number, text in texts.items()
                if text and all(c in byte_of for c in text)}
    return {number: bytes([int(text[3:5], 16)]) if len(text) == 6 and text.startswith("<0x") and text[-1] == ">"
            else text.replace("\u2581", " ").encode() for number, text in texts.items() if text}


def _members(states: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while states:
        lowest = states & -states
        yield lowest.bit_length() - 1
        states ^= lowest
