"""Constrained decoding: texts that match a regular expression or a JSON schema, or are made of some tokens alone.

Positions are committed in any order, so what a position may take depends on both its sides. The expression is an
automaton over tokens (regular.py, spelling.py); a forward sweep over the positions to fill says in which states the
automaton can be before each, a backward sweep from which states it can still accept, and a token is allowed that leads
from one of the first to one of the second. Every committed token is so part of some matching text. Tokens committed in
the same step were allowed each for itself: taken from the surest on, one that leaves no matching text with those before
it is not committed.
"""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Protocol

import torch
from torch import Tensor

from dllm.constraints.matching import Matcher
from dllm.constraints.regular import Pause, compile_automaton, parse, shorten
from dllm.constraints.schemas import schema_pattern, schema_text
from dllm.constraints.spelling import Spelling, functions_of, token_bytes
from dllm.errors import UserError
from dllm_kernels import pack_allowed

__all__ = ["AllowedTokens", "Constraint", "Regex", "json_schema", "token_bytes"]


class Constraint(Protocol):
    """What the positions to fill may take."""

    vocab_size: int  # of the model
    final: bool  # whether tokens fit only together, so that a step may commit fewer than were chosen

    def fits(self, length: int) -> bool:
        """Whether so many positions can be filled."""

    def check(self, length: int) -> None:
        """Raises: UserError if so many positions cannot be filled, with the number that can."""

    def allowed(self, tokens: Tensor, editable: Tensor, mask_token_id: int, wanted: Tensor | None = None) -> Tensor:
        """int32 bits [B, L, ceil(V / 32)] (see `dllm_kernels.pack_allowed`) of what the positions `wanted` [B, L] of
        those of `editable` [B, L] may take, given what the other positions of the canvas tokens [B, L] hold; elsewhere
        anything. Without `wanted`: the masked ones."""

    def keep(self, before: Tensor, after: Tensor, confidence: Tensor | None, editable: Tensor,
             mask_token_id: int) -> Tensor:
        """The canvas [B, L] after a step, without what cannot be committed together; at least the surest of a row."""


class AllowedTokens:
    """Only these tokens are committed."""

    final = False

    def __init__(self, token_ids: Iterable[int], vocab_size: int):
        self.vocab_size = vocab_size
        try:
            ids = [index(token) for token in token_ids]
        except TypeError:  # no whole numbers, or not several
            ids = []
        if not ids or min(ids) < 0 or max(ids) >= vocab_size:
            raise UserError(f"the allowed tokens must be one or more numbers in [0, {vocab_size}), not "
                            f"{shorten(str(ids or token_ids))}")
        words = torch.zeros(vocab_size, dtype=torch.bool)
        words[ids] = True
        self.bits = pack_allowed(words)

    def fits(self, length: int) -> bool:
        return True

    def check(self, length: int) -> None:
        pass

    def allowed(self, tokens: Tensor, editable: Tensor, mask_token_id: int, wanted: Tensor | None = None) -> Tensor:
        return self.bits.to(tokens.device).expand(*tokens.shape, -1)

    def keep(self, before: Tensor, after: Tensor, confidence: Tensor | None, editable: Tensor,
             mask_token_id: int) -> Tensor:
        return after


class Regex:
    """The positions to fill of a row, in their order, match a regular expression, end-of-text tokens after it apart.

    The syntax and meaning are those of Python's `re.fullmatch` (regular.py), without look-around, \\b and references.

    Args:
        tokenizer: a fast one of Transformers', byte-level or with byte fallback.
        vocab_size: of the model.
        ends: tokens that may end a text; by default the tokenizer's.
        pause: called between pieces of long work, here and later; it may raise. With it, the automaton is built at the
            first use.
        schema: what the expression was made of, for messages.
    Raises: UserError if the expression is wrong, needs too large an automaton, or cannot be spelt with the tokens.
    """

    final = True

    def __init__(self, pattern: str, tokenizer, vocab_size: int, *, ends: Sequence[int] = (),
                 pause: Pause | None = None, schema: str | None = None):
        self.tree, self.pattern, self.vocab_size = parse(pattern), pattern, vocab_size
        self.kind, self.shown = "regular expression", shorten(pattern)
        if schema is not None:
            self.kind, self.shown = "JSON schema", shorten(schema)
        own = tokenizer.eos_token_id
        self.ends = sorted({end for end in (*ends, own) if end is not None and end < vocab_size})
        self.spelling = Spelling.of(tokenizer, vocab_size)
        self.pause = pause or (lambda: None)
        self.matcher: Matcher | None = None
        self.mask_token_id: int | None = None  # that the matcher knows
        self.building = False
        if pause is None:
            self._ready()

    def fits(self, length: int) -> bool:
        return self._ready().fits(length)

    def check(self, length: int) -> None:
        if self.fits(length):
            return
        shortest, after = self._ready().shortest(), ", end-of-text tokens after it included" if self.ends else ""
        raise UserError(f"no text of {length} tokens matches the constraint {self.shown}{after}; "
                        + (f"the length does not suffice, at least {shortest} tokens are needed" if shortest > length
                           else "no token ends a text before that; change the number of tokens"))

    def allowed(self, tokens: Tensor, editable: Tensor, mask_token_id: int, wanted: Tensor | None = None) -> Tensor:
        matcher = self._ready(mask_token_id)
        wanted = editable & (tokens == mask_token_id if wanted is None else wanted)
        device, (tokens, editable, wanted) = tokens.device, (x.cpu() for x in (tokens, editable, wanted))
        bits = torch.full((*tokens.shape, matcher.words), -1, dtype=torch.int32)
        for row in wanted.any(1).nonzero().flatten().tolist():
            self.pause()
            places = editable[row].nonzero().flatten()
            asked = wanted[row, places].nonzero().flatten().tolist()
            ids = tokens[row, places].tolist()
            found = matcher.allowed([None if token == mask_token_id else token for token in ids], asked)
            if found is None:
                raise UserError(f"the tokens committed so far are part of no text of {len(ids)} tokens that matches "
                                f"the constraint {self.shown}")
            bits[row, places[asked]] = found
        return bits.to(device)

    def keep(self, before: Tensor, after: Tensor, confidence: Tensor | None, editable: Tensor,
             mask_token_id: int) -> Tensor:
        if after is before or confidence is None:  # nothing is committed
            return after
        device, canvas = after.device, (before, after, confidence, editable)
        before, after, confidence, editable = (x.cpu() for x in canvas)
        kept, changed = after.clone(), editable & (before != after) & (after != mask_token_id)
        for row in (changed.sum(1) > 1).nonzero().flatten().tolist():
            places = editable[row].nonzero().flatten()
            old, new = ([None if token == mask_token_id else token for token in tokens[row, places].tolist()]
                        for tokens in (before, after))
            fresh = changed[row, places].nonzero().flatten()
            surest = fresh[confidence[row, places][fresh].argsort(descending=True, stable=True)].tolist()
            surest.sort(key=lambda place: old[place] is not None)  # commits before edits, so that every step fills
            ids = self._ready(mask_token_id).keep(old, new, surest)
            kept[row, places] = torch.tensor([mask_token_id if token is None else token for token in ids])
        return kept.to(device)

    def _ready(self, mask_token_id: int | None = None) -> Matcher:
        """The matcher, which never fills a position with the mask token. Built once, though several may wait for it."""
        while self.building:
            self.pause()
        spells = mask_token_id is not None and self.spelling.node[mask_token_id] >= 0
        if self.matcher is None or spells and mask_token_id != self.mask_token_id:
            self.building = True
            try:
                automaton = compile_automaton(self.tree, self.pause)
                functions = functions_of(automaton, self.spelling, self.pause)
                self.mask_token_id = mask_token_id
                self.matcher = Matcher(automaton, functions, self.spelling.node < 0, self.ends, mask_token_id,
                                       self.pause)
            except UserError as error:
                raise UserError(f"the {self.kind} {self.shown} cannot be used: {error}") from None
            finally:
                self.building = False
        return self.matcher


def json_schema(schema: dict | str, tokenizer, vocab_size: int, *, ends: Sequence[int] = (),
                pause: Pause | None = None) -> Regex:
    """The positions to fill are JSON that a schema accepts (schemas.py), with a space at most between two parts.

    Args: see `Regex`.
    Raises: UserError as `Regex`, or if the schema is no JSON or asks for what is not supported, by name.
    """
    text = schema_text(schema)
    return Regex(schema_pattern(text), tokenizer, vocab_size, ends=ends, pause=pause, schema=text)
