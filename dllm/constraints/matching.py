"""An automaton over tokens, and what a row of committed and open positions can still become.

Sets of states are the bits of whole numbers. What one position does to a set is remembered, because most positions
between two committed tokens are in the same case, in this step and the next.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dllm.constraints.regular import Automaton, Pause
from dllm.constraints.spelling import Functions
from dllm.errors import UserError
from dllm_kernels import pack_allowed

MAX_EDGES = 1 << 21
MEMORY = 1 << 24  # bytes at most that are remembered of sets, and of allowed tokens
Slots = Sequence[int | None]  # a row's positions to fill: committed tokens, None where one is open


class Matcher:
    """See `dllm.constraints.Regex`.

    Args:
        silent: [V] bool, tokens that spell nothing; behind a text they are taken for its end.
        ends: those of them that may end a text.
        mask_token_id: a token that no position takes.
    Raises: UserError if the tokens can spell no matching text.
    """

    def __init__(self, automaton: Automaton, functions: Functions, silent: np.ndarray, ends: Sequence[int],
                 mask_token_id: int | None, pause: Pause):
        self.pause, self.silent = pause, silent.copy()
        self.silent[list(ends)] = True
        self.kind = functions.kind.copy()  # [V]; tokens of kind 0 fit nowhere
        self.kind[[*ends, *([] if mask_token_id is None else [mask_token_id])]] = 0
        self.words = -(-len(self.kind) // 32)
        self._find_edges(automaton, functions, len(ends) > 0)
        self.kind[list(ends)] = self.end_kind
        self.steps: tuple[dict, dict] = {}, {}  # forward and backward: (set, kind) to set
        self.bits_of_sets: dict[tuple[int, int], Tensor] = {}
        self.bits_of_kinds: dict[bytes, Tensor] = {}

    def _find_edges(self, automaton: Automaton, functions: Functions, ends: bool) -> None:
        """The edges of the automaton over tokens that lie between its start and the end of a text, by their kinds."""
        dead = len(automaton.accepting) - 1
        used = np.bincount(self.kind, minlength=len(functions.table)) > 0
        used[0] = False
        parts, edges = [np.zeros((3, 0), dtype=np.int64)], 0
        for number in np.flatnonzero(used).tolist():
            self.pause()
            source = np.flatnonzero(functions.table[number] != dead)
            parts.append(np.stack((np.full(len(source), number), source, functions.table[number][source])))
            edges += len(source)
            if edges > MAX_EDGES:
                raise UserError("the tokens do too many different things to it; write a smaller one")
        kind, source, target = np.concatenate(parts, axis=1)
        pairs = np.unique(source * (dead + 1) + target)
        pairs = np.stack((pairs // (dead + 1), pairs % (dead + 1)))
        alive = self._reachable(pairs, np.zeros(1, dtype=np.int64), dead + 1)
        alive &= self._reachable(pairs[::-1], np.flatnonzero(automaton.accepting), dead + 1)
        if not alive[0]:
            raise UserError("the tokens can spell no text that matches it")
        # The states that are left, in their order, and one behind the end of a text.
        new = alive.cumsum() - 1
        self.states = int(alive.sum()) + 1
        accepting = new[np.flatnonzero(automaton.accepting & alive)]
        between = alive[source] & alive[target]
        self.end_kind, behind = len(functions.table), self.states - 1
        closing = np.append(accepting, behind) if ends else accepting[:0]
        self.edge_kind = np.concatenate((kind[between], np.full(len(closing), self.end_kind)))
        self.source = np.concatenate((new[source[between]], closing))
        self.target = np.concatenate((new[target[between]], np.full(len(closing), behind)))
        order = np.argsort(self.edge_kind, kind="stable")
        self.edge_kind, self.source, self.target = (x[order] for x in (self.edge_kind, self.source, self.target))
        self.first = np.searchsorted(self.edge_kind, np.arange(self.end_kind + 2))
        self.start = 1
        self.accepting = _as_bits(np.append(accepting, behind), self.states)
        self.leads = self._neighbours(self.source, self.target), self._neighbours(self.target, self.source)

    def _neighbours(self, source: np.ndarray, target: np.ndarray) -> list[int]:
        """Of each state the set of those that some token leads to."""
        pairs = np.unique(source * self.states + target)
        cuts = np.searchsorted(pairs, np.arange(self.states + 1) * self.states)
        found = []
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            self.pause()
            found.append(_as_bits(pairs[start:end] % self.states, self.states))
        return found

    def _reachable(self, pairs: np.ndarray, starts: np.ndarray, states: int) -> np.ndarray:
        """[states] bool: those that the edges [2, E] lead to from `starts`, which are among them."""
        order = np.argsort(pairs[0], kind="stable")
        targets, cuts = pairs[1][order], np.searchsorted(pairs[0][order], np.arange(states + 1))
        seen = np.zeros(states, dtype=bool)
        seen[starts] = True
        todo = starts.tolist()
        while todo:
            self.pause()
            state = todo.pop()
            reached = targets[cuts[state]:cuts[state + 1]]
            new = reached[~seen[reached]]
            seen[new] = True
            todo += new.tolist()
        return seen

    def fits(self, length: int) -> bool:
        return self._matches([None] * length)

    def shortest(self) -> int:
        """The number of tokens of the shortest text that matches."""
        states, length = self.start, 0
        while not states & self.accepting:
            states, length = self._step(0, states, None), length + 1
        return length

    def allowed(self, slots: Slots, asked: Sequence[int]) -> Tensor | None:
        """int32 [len(asked), ceil(V / 32)], the bits of the tokens that may stand at the slots `asked`, given the
        others; None if the slots match in no way."""
        before, after = [self.start], [self.accepting]
        for token in slots:
            before.append(self._step(0, before[-1], token))
        if not before[-1] & self.accepting:
            return None
        for token in reversed(slots[1:]):
            after.append(self._step(1, after[-1], token))
        after.reverse()
        return torch.stack([self._bits(before[place], after[place]) for place in asked])

    def keep(self, old: Slots, new: Slots, order: Sequence[int]) -> Slots:
        """`new`, or as much of it as still matches: what it opens, and what it sets in this order."""
        if self._matches(new):
            return new
        kept = [None if changed is None else token for token, changed in zip(old, new, strict=True)]
        for place in order:
            self.pause()
            given, kept[place] = kept[place], new[place]
            if not self._matches(kept):
                kept[place] = given
        return kept

    def _matches(self, slots: Slots) -> bool:
        states = self.start
        for token in slots:
            states = self._step(0, states, token)
        return bool(states & self.accepting)

    def _step(self, backward: int, states: int, token: int | None) -> int:
        """The states that a token, or any, leads to from a set of states; backward: those it leads from."""
        kind = -1 if token is None else -2 if self.silent[token] else int(self.kind[token])
        known = self.steps[backward]
        if (states, kind) not in known:
            self.pause()
            if len(known) * (self.states // 4 + 200) > MEMORY:
                known.clear()
            known[states, kind] = self._compute(backward, states, kind)
        return known[states, kind]

    def _compute(self, backward: int, states: int, kind: int) -> int:
        if kind == -1:
            following, leads = 0, self.leads[backward]
            for state in _members(states, self.states):
                following |= leads[state]
            return following
        if kind == -2:
            closing, behind = self.accepting, 1 << self.states - 1
            return (closing if states & behind else 0) if backward else (behind if states & closing else 0)
        edges = slice(self.first[kind], self.first[kind + 1])
        source, target = self.source[edges], self.target[edges]
        if backward:
            source, target = target, source
        return _as_bits(target[_as_mask(states, self.states)[source]], self.states)

    def _bits(self, before: int, after: int) -> Tensor:
        """The bits of the tokens that lead from one set of states to the other."""
        if (before, after) not in self.bits_of_sets:
            self.pause()
            edges = _as_mask(before, self.states)[self.source] & _as_mask(after, self.states)[self.target]
            fits = np.zeros(self.end_kind + 1, dtype=bool)
            fits[self.edge_kind[edges]] = True
            if len(self.bits_of_sets) * (self.states // 4 + 200) + len(self.bits_of_kinds) * self.words * 4 > MEMORY:
                self.bits_of_sets.clear()
                self.bits_of_kinds.clear()
            if fits.tobytes() not in self.bits_of_kinds:
                self.bits_of_kinds[fits.tobytes()] = pack_allowed(torch.from_numpy(fits[self.kind]))
            self.bits_of_sets[before, after] = self.bits_of_kinds[fits.tobytes()]
        return self.bits_of_sets[before, after]


def _as_bits(states: np.ndarray, count: int) -> int:
    members = np.zeros(count, dtype=bool)
    members[states] = True
    return int.from_bytes(np.packbits(members, bitorder="little").tobytes(), "little")


def _as_mask(states: int, count: int) -> np.ndarray:
    """The inverse of `_as_bits`, [count] bool."""
    packed = np.frombuffer(states.to_bytes(-(-count // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=count, bitorder="little").view(bool)


def _members(states: int, count: int) -> list[int]:
    return np.flatnonzero(_as_mask(states, count)).tolist()
