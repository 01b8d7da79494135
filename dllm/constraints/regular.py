"""Regular expressions as automata over the bytes of UTF-8.

The meaning is that of Python's `re.fullmatch`: its own parser reads the expression, and its own classes say which
characters they hold; \\p{...} adds the general categories of Unicode. Anchors hold at the ends of the text alone, so ^
and $ never mean a line. Every state of an automaton leads to some matching text.
"""

import functools
import re
import unicodedata
import warnings
from array import array
from collections.abc import Callable
from re import _parser as sre  # the parse tree has no public name
from typing import NamedTuple

import numpy as np

from dllm.errors import UserError, first_line

MAX_STATES = 30_000  # of an automaton, and steps of an expression with its repetitions written out
CODE_POINTS = 0x110000
PRIVATE = 0x10F800  # the first of the characters that stand for classes
SURROGATES = (0xD800, 0xDFFF)  # no text has them

SCHEMA = 1 << 30  # beside re's flags: classes hold what both Python and ECMA-262, the syntax of JSON schemas, say

Ranges = tuple[tuple[int, int], ...]  # code points, from the first to the last of each range, ascending
Node = tuple  # ("set", ranges), ("cat" or "alt", nodes), ("repeat", node, least, most or None), ("begin",), ("end",)
Pause = Callable[[], None]  # called between short pieces of long work; may raise, to end it


class Automaton(NamedTuple):
    """States 0 (the start) to N - 1, and N, from which nothing matches."""

    table: np.ndarray  # [N + 1, C] int16: the state after a byte of each class
    class_of: np.ndarray  # [256] int64: the class of each byte
    accepting: np.ndarray  # [N + 1] bool


def parse(pattern: str, flags: int = 0) -> Node:
    """The syntax tree of an expression.

    flags: 0 or SCHEMA.
    Raises: UserError if it is wrong, or has what no automaton can hold.
    """
    if not isinstance(pattern, str):
        raise UserError(f"a regular expression is text, not {type(pattern).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            plain, named = _name_classes(pattern)
            tree = sre.parse(plain)
        return _node(tree, tree.state.flags | flags, named)
    except UserError as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    except (re.error, OverflowError, Warning) as error:
        reason = first_line(error)
    raise UserError(f"the regular expression {shorten(pattern)} cannot be used: {reason}")


def shorten(pattern: str) -> str:
    """As error messages show it."""
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")


def _name_classes(pattern: str) -> tuple[str, dict[int, Ranges]]:
    r"""The pattern with a private character instead of each \p{...} and \P{...}, and what these stand for."""
    named: dict[int, Ranges] = {}

    def name(escape: re.Match) -> str:
        if escape[1] is None:
            return escape[0]
        found = _unicode_category(escape[2] or escape[3])
        named[PRIVATE + len(named)] = found if escape[1] == "p" else complement(found)
        return chr(PRIVATE + len(named) - 1)

    return re.sub(r"(?s)\\(?:([pP])(?:\{(\w+)\}|(\w))|.)", name, pattern), named


@functools.cache
def _unicode_category(name: str) -> Ranges:
    """The characters of a general category, such as Lu, or of all those that begin with a letter, such as L."""
    found = union((code, code) for code in range(CODE_POINTS) if unicodedata.category(chr(code)).startswith(name))
    if not found or len(name) > 2:
        raise UserError(rf"\p takes a general category of Unicode, such as L, Lu or Nd, not {name!r}")
    return found


def _node(tree, flags: int, named: dict[int, Ranges]) -> Node:
    return "cat", tuple(_item(op, value, flags, named) for op, value in tree)


def _item(op, value, flags: int, named: dict[int, Ranges]) -> Node:
    if op in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
        return "set", _members(op, value, flags, named)
    if op is sre.BRANCH:
        return "alt", tuple(_node(tree, flags, named) for tree in value[1])
    if op is sre.SUBPATTERN:
        _, added, removed, tree = value
        return _node(tree, (flags | added) & ~removed, named)
    if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, most, tree = value
        return "repeat", _node(tree, flags, named), least, None if most is sre.MAXREPEAT else most
    if op is sre.AT and value in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
        return ("begin",)
    if op is sre.AT and value in (sre.AT_END, sre.AT_END_STRING):
        return ("end",)
    names = {sre.AT: r"\b and \B", sre.ASSERT: "look-around", sre.ASSERT_NOT: "look-around",
             sre.GROUPREF: "references to groups", sre.GROUPREF_EXISTS: "references to groups"}
    raise UserError(f"{names.get(op, 'possessive repetitions and atomic groups')} cannot be held; write it without")


def _members(op, value, flags: int, named: dict[int, Ranges]) -> Ranges:
    """The characters of a literal or class."""
    if op is sre.ANY:
        line_ends = ((10, 10), (13, 13), (0x2028, 0x2029)) if flags & SCHEMA else ((10, 10),)
        return EVERYTHING if flags & re.DOTALL else complement(line_ends)
    if op in (sre.LITERAL, sre.NOT_LITERAL):
        op, value = sre.IN, [*([(sre.NEGATE, None)] if op is sre.NOT_LITERAL else []), (sre.LITERAL, value)]
    negated, parts = value[0][0] is sre.NEGATE, []
    for kind, part in value[negated:]:
        simple = kind is not sre.CATEGORY and not flags & re.IGNORECASE
        low, high = part if kind is sre.RANGE else (part, part)
        if kind is sre.LITERAL and part in named:
            parts += named[part]
        elif kind is sre.CATEGORY and flags & SCHEMA:
            ours, theirs = (_category(CATEGORIES[part], reading) for reading in (0, re.ASCII))
            both = union((*complement(ours), *complement(theirs)))
            parts += union((*ours, *theirs)) if negated else complement(both)
        else:
            parts += [(low, high)] if simple else _search(kind, part, flags & (re.IGNORECASE | re.ASCII))
    found = union(parts)
    return complement(found) if negated else found


CATEGORIES = {sre.CATEGORY_DIGIT: r"\d", sre.CATEGORY_NOT_DIGIT: r"\D", sre.CATEGORY_SPACE: r"\s",
              sre.CATEGORY_NOT_SPACE: r"\S", sre.CATEGORY_WORD: r"\w", sre.CATEGORY_NOT_WORD: r"\W"}


def _search(kind, part, flags: int) -> Ranges:
    """The characters that `re` itself finds, so that cases and categories are its own."""
    if kind is sre.CATEGORY:
        return _category(CATEGORIES[part], flags & re.ASCII)
    low, high = part if kind is sre.RANGE else (part, part)
    wanted = rf"[\U{low:08x}-\U{high:08x}]"
    return ((low, high), *((ord(found), ord(found)) for found in re.findall(wanted, _cased_characters(), flags)))


@functools.cache
def _category(wanted: str, flags: int) -> Ranges:
    everything = "".join(map(chr, range(CODE_POINTS)))
    return tuple((found.start(), found.end() - 1) for found in re.finditer(f"{wanted}+", everything, flags))


@functools.cache
def _cased_characters() -> str:
    return "".join(c for c in map(chr, range(CODE_POINTS)) if not c.lower() == c.upper() == c)


def union(parts) -> Ranges:
    merged: list[list[int]] = []
    for low, high in sorted(parts):
        if merged and low <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    return tuple((low, high) for low, high in merged)


def complement(ranges: Ranges) -> Ranges:
    edges = [0, *(edge for low, high in ranges for edge in (low, high + 1)), CODE_POINTS]
    return tuple((low, high - 1) for low, high in zip(edges[::2], edges[1::2], strict=True) if low < high)


EVERYTHING = ((0, CODE_POINTS - 1),)


class _Steps:
    """The tree as a nondeterministic automaton, built from its end.

    A part followed by the same state is built once, so that repetitions of a part share what comes after it.
    """

    def __init__(self, tree: Node, pause: Pause):
        self.pause = pause
        self.sets: dict[Ranges, int] = {}
        self.takes: list[tuple[int, int] | None] = []  # of a state: the set of characters it takes, and where it leads
        self.free: list[list[int]] = []  # of a state: where it leads without one
        self.begins: set[int] = set()  # states that only the beginning of a text passes
        self.ends: set[int] = set()  # only its end
        self.known: dict[tuple[int, int], int] = {}
        self.numbers: dict[Node, int] = {}
        self.nodes: list[Node] = []
        self.accept = self._state()
        self.start = self._build(self._number(tree), self.accept)

    def _number(self, node: Node) -> int:
        """Equal trees have one number, which is cheap to compare."""
        if node[0] in ("cat", "alt"):
            node = node[0], tuple(self._number(part) for part in node[1])
        elif node[0] == "repeat":
            node = "repeat", self._number(node[1]), *node[2:]
        if node not in self.numbers:
            self.numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return self.numbers[node]

    def _state(self, *free: int, takes: tuple[int, int] | None = None) -> int:
        if len(self.free) >= MAX_STATES:
            raise UserError(f"it needs an automaton of more than {MAX_STATES} states; write a smaller one")
        if len(self.free) % 256 == 0:
            self.pause()
        self.takes.append(takes)
        self.free.append(list(free))
        return len(self.free) - 1

    def _build(self, number: int, after: int) -> int:
        """The state from which a part leads to the state `after`."""
        if (number, after) not in self.known:
            self.known[number, after] = self._build_new(self.nodes[number], after)
        return self.known[number, after]

    def _build_new(self, node: Node, after: int) -> int:
        kind = node[0]
        if kind == "set":
            return self._state(takes=(self.sets.setdefault(node[1], len(self.sets)), after))
        if kind == "cat":
            for part in reversed(node[1]):
                after = self._build(part, after)
            return after
        if kind == "alt":
            return self._state(*(self._build(part, after) for part in node[1]))
        if kind == "repeat":
            _, part, least, most = node
            if most is None:
                loop = self._state(after)
                self.free[loop].append(self._build(part, loop))
                most, end = least, loop
            else:
                end = after
            for _ in range(most - least):
                end = self._state(after, self._build(part, end))
            for _ in range(least):
                end = self._build(part, end)
            return end
        state = self._state(after)
        (self.begins if kind == "begin" else self.ends).add(state)
        return state

    def reach(self, state: int, *, begin: bool = False, end: bool = False) -> frozenset[int]:
        """The states that count among those that a state leads to without a character: those that take one, the end."""
        seen, todo, found = {state}, [state], set()
        while todo:
            here = todo.pop()
            if self.takes[here] is not None or here == self.accept or here in self.ends:
                found.add(here)
            if (here in self.begins and not begin) or (here in self.ends and not end):
                continue
            new = [there for there in self.free[here] if there not in seen]
            seen.update(new)
            todo += new
        return frozenset(found)


def compile_automaton(tree: Node, pause: Pause = lambda: None) -> Automaton:
    """Raises: UserError if the automaton is too large, or no text matches."""
    try:
        steps = _Steps(tree, pause)
    except RecursionError:
        raise UserError("it is nested too deeply") from None
    class_at, classes_of = _divide(list(steps.sets))
    rows, accepting = _determine(steps, classes_of, int(class_at.max()) + 1, pause)
    rows, accepting = _prune(rows, accepting)
    table, accepting = _spell(rows, accepting, class_at, pause)
    columns, class_of = _distinct(table.T.astype(np.int16))
    return Automaton(np.ascontiguousarray(columns.T), class_of, accepting)


def _divide(sets: list[Ranges]) -> tuple[np.ndarray, list[list[int]]]:
    """Divide the characters into classes that no set tells apart.

    Returns: the class of each code point [CODE_POINTS], 0 for those that no text has; and the classes of each set.
    """
    edges = sorted({0, SURROGATES[0], SURROGATES[1] + 1, CODE_POINTS,
                    *(edge for ranges in sets for low, high in ranges for edge in (low, high + 1))})
    edges = np.array(edges)
    inside = np.zeros((len(edges) - 1, len(sets) + 1), dtype=bool)
    for number, ranges in enumerate(sets):
        lows, highs = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
        inside[:, number] = np.searchsorted(lows, edges[:-1], "right") > np.searchsorted(highs, edges[:-1], "left")
    surrogates = (edges[:-1] >= SURROGATES[0]) & (edges[:-1] <= SURROGATES[1])
    inside[surrogates] = False
    inside[:, -1] = ~surrogates
    kinds, kind_of = np.unique(np.packbits(inside, axis=1), axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)  # the first kind, all False, is that of the surrogates
    members = np.unpackbits(kinds, axis=1)[:, :len(sets)]
    return np.repeat(kind_of, np.diff(edges)), [np.flatnonzero(column).tolist() for column in members.T]


def _determine(steps: _Steps, classes_of: list[list[int]], classes: int, pause: Pause) -> tuple[np.ndarray, np.ndarray]:
    """The deterministic automaton over classes of characters: [N, classes], -1 where nothing matches; accepting [N]."""
    reach = functools.cache(steps.reach)
    # At the end of a text, states that wait for the end lead on.
    final = functools.cache(lambda state: steps.accept in steps.reach(state, end=True))
    start = _pack(steps.reach(steps.start, begin=True))
    numbers, todo, rows = {start: 0}, [start], []  # in bytes, which Python's garbage collector does not look at
    while len(rows) < len(todo):
        pause()
        by_set: dict[int, set[int]] = {}
        for state in _unpack(todo[len(rows)]):
            if steps.takes[state] is not None:
                takes, after = steps.takes[state]
                by_set.setdefault(takes, set()).update(reach(after))
        by_class: dict[int, set[int]] = {}
        for number, states in by_set.items():
            for kind in classes_of[number]:
                by_class[kind] = by_class[kind] | states if kind in by_class else states
        row = [-1] * classes
        for kind, states in by_class.items():
            packed = _pack(states)
            if packed not in numbers:
                numbers[packed] = len(todo)
                todo.append(packed)
                _check_size(len(todo))
            row[kind] = numbers[packed]
        rows.append(_pack(row))
    table = np.frombuffer(b"".join(rows), dtype=np.int32).reshape(len(rows), classes)
    return table.astype(np.int64), np.array([any(map(final, _unpack(states))) for states in todo])


def _pack(numbers) -> bytes:
    """Numbers in their order, a set's ascending, so that equal ones have equal bytes."""
    numbers = sorted(numbers) if isinstance(numbers, (set, frozenset)) else numbers
    return array("i", numbers).tobytes()


def _unpack(packed: bytes) -> array:
    return array("i", packed)


def _check_size(states: int) -> None:
    if states >= MAX_STATES:
        raise UserError(f"it needs an automaton of more than {MAX_STATES} states; write a smaller one")


def _prune(rows: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out the states from which nothing matches."""
    before: list[list[int]] = [[] for _ in rows]
    for state, row in enumerate(rows):
        for after in np.unique(row[row >= 0]).tolist():
            before[after].append(state)
    alive, todo = accepting.copy(), np.flatnonzero(accepting).tolist()
    while todo:
        for state in before[todo.pop()]:
            if not alive[state]:
                alive[state] = True
                todo.append(state)
    if not alive[0]:
        raise UserError("no text matches it")
    renumber = np.append(np.where(alive, alive.cumsum() - 1, -1), -1)
    return renumber[rows[alive]], accepting[alive]


def _spell(rows: np.ndarray, accepting: np.ndarray, class_at: np.ndarray,
           pause: Pause) -> tuple[np.ndarray, np.ndarray]:
    """Spell characters as the bytes of UTF-8: tables [N + 1, 256] and [N + 1] of the automaton over bytes."""
    # Kinds of 64 characters that share all bytes but the last, of 64 such kinds, and so on; -1 where there are none.
    blocks, block_at = _distinct(class_at.reshape(-1, 64))
    none = np.full(1024, -1)
    pages, page_at = _distinct(np.concatenate((none[:32], block_at[32:])).reshape(-1, 64))
    books, book_at = _distinct(np.concatenate((none[:16], page_at[16:], none[:48])).reshape(-1, 64))
    table: list[np.ndarray] = [none] * len(rows)
    known: dict[bytes, int] = {none[:64].tobytes(): -1}

    def states_for(kinds: np.ndarray, after: np.ndarray) -> np.ndarray:
        """A state for each kind [n, 64], given those after each of its members; -1 for none, and appended."""
        numbers = []
        for row in np.append(after, -1)[kinds]:
            key = row.tobytes()
            if key not in known:
                known[key] = len(table)
                table.append(np.concatenate((none[:128], row, none[:64])))
                _check_size(len(table))
            numbers.append(known[key])
        return np.array(numbers)

    for state, row in enumerate(rows):
        pause()
        after_block = states_for(blocks, row)
        after_page = states_for(pages, after_block)
        after_book = states_for(books, after_page)
        table[state] = np.concatenate((row[class_at[:128]], none[:66], after_block[block_at[2:32]],
                                       after_page[page_at[:16]], after_book[book_at], none[:11]))
    whole = np.stack([*table, none[:256]])
    whole[whole < 0] = len(whole) - 1
    return whole, np.concatenate((accepting, np.zeros(len(whole) - len(accepting), dtype=bool)))


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, and which of them each row is."""
    numbers: dict[bytes, int] = {}
    which = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in np.ascontiguousarray(rows)])
    return np.stack([np.frombuffer(row, rows.dtype) for row in numbers]), which
