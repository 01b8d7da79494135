"""The exchange between a program and its judge, and the rules of the judge. Standard library only.

The process of the judge has the tests and no line of the program; the process of the program has the program and no
test. They exchange plain data: None, bool, int, float, complex, str, bytes, and lists, tuples, sets and dicts of these,
as JSON. An instance of a subclass arrives as its plain value, an iterator as its items, and anything else as an
`Opaque`, which equals nothing. So an object that claims to equal everything does not, and nothing that the program
sends is ever code.

A limit counts the CPU time of the program's process, so that a verdict does not depend on the load of the machine. The
wall clock ends only processes that wait or sleep, after `BACKSTOP` times the limit.
"""

import builtins
import itertools
import json
import math
import os
import select
import struct
import time
from collections.abc import Callable, Iterator

BACKSTOP = 6  # wall-clock seconds for each CPU second of a limit
_FLAT = {int, float, str, bool, type(None)}  # JSON has these
_LETTERS = {"l": list, "t": tuple, "s": set, "f": frozenset}
_MOST = 1 << 20  # items taken from an iterator
_LARGE = 1 << 25  # bytes of an encoded value that crosses whole
_CHUNK = 1 << 14  # items encoded at a time


class Opaque:
    """Something that is not plain data. Equal only to itself."""

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<an object of type {self.kind}>"


class Ended(Exception):
    """The program's process ended, or broke the rules of the exchange."""

    verdict = "crash"


class TooLong(Exception):
    """The program did not answer in time."""

    verdict = "timeout"


class CannotJudge(Exception):
    """The tests pass something that is not plain data, so that no judge outside the program's process can run them."""

    verdict = "cannot judge"


def encode_value(value) -> bytes:
    """The value as JSON; beyond `_LARGE` bytes only the hash of that, which is equal for equal values."""
    try:
        try:
            return _join(_pieces(value, _FLAT))
        except ValueError:  # an int of more digits than Python converts: all ints in hexadecimal
            return _join(_pieces(value, _FLAT - {int}))
    except RecursionError:
        return json.dumps(["o", type(value).__name__]).encode()


def _join(pieces: Iterator[str]) -> bytes:
    kept, size, digest = [], 0, None
    for piece in pieces:
        piece = piece.encode()
        size += len(piece)
        kept.append(piece)
        if size > _LARGE:
            if digest is None:
                import hashlib  # here, because it makes the forks of the template slower

                digest = hashlib.sha256()
            digest.update(b"".join(kept))
            kept.clear()
    if digest is None:
        return b"".join(kept)
    return json.dumps(["h", [size, digest.hexdigest()]]).encode()


def _pieces(value, flat: set[type]) -> Iterator[str]:
    """JSON in parts, so that memory never holds a long list twice."""
    if not isinstance(value, (list, tuple)) or len(value) <= _CHUNK:
        yield json.dumps(_plain(value, flat))
        return
    yield '["l", [' if isinstance(value, list) else '["t", ['
    for start in range(0, len(value), _CHUNK):
        yield (", " if start else "") + json.dumps([_plain(item, flat) for item in value[start:start + _CHUNK]])[1:-1]
    yield "]]"


def _plain(value, flat: set[type]):
    """`value` as JSON can hold it: containers as [letter, items], in capitals if all items are of types in `flat`."""
    kind = type(value)
    if kind in flat:
        return value
    for base, letter in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f")):
        if isinstance(value, base):
            items = list(base.__iter__(value))
            if set(map(type, items)) <= flat:
                return [letter.upper(), items]
            return [letter, [_plain(item, flat) for item in items]]
    if isinstance(value, dict):
        return ["d", [[_plain(key, flat), _plain(item, flat)] for key, item in dict.items(value)]]
    if isinstance(value, int):
        return int.__int__(value) if int in flat else ["n", int.__format__(value, "x")]
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "a", bytes(value).hex()]
    if kind is range:
        return ["r", [value.start, value.stop, value.step]]
    if hasattr(kind, "__next__"):
        return ["i", _plain(list(itertools.islice(value, _MOST)), flat)]
    if kind.__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return _plain(value.item(), flat)
    return ["o", str(kind.__name__)]


def decode_value(text: bytes):
    """The value, of exactly the plain types. Raises: Ended if the text is not an encoded value."""
    try:
        return _build(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Ended(f"not an encoded value: {type(error).__name__}") from None


def _build(coded):
    if type(coded) is not list:
        if type(coded) in _FLAT:
            return coded
        raise ValueError(type(coded))
    letter, items = coded
    if letter in "LTSF":
        return items if letter == "L" else _LETTERS[letter.lower()](items)
    if letter in _LETTERS:
        return _LETTERS[letter](map(_build, items))
    if letter == "n":
        return int(items, 16)
    if letter == "d":
        return {_build(key): _build(item) for key, item in items}
    if letter == "c":
        return complex(*items)
    if letter in "ab":
        return (bytes if letter == "b" else bytearray).fromhex(items)
    if letter == "r":
        return range(*items)
    if letter == "i":
        return iter(_build(items))
    if letter == "o":
        return Opaque(str(items))
    if letter == "h":
        return Opaque("too large to send")
    raise ValueError(letter)


# The exchange: each message is its length in 8 bytes, and JSON


def send(link: int, message: bytes) -> None:
    rest = memoryview(struct.pack("<Q", len(message)) + message)
    while rest:
        rest = rest[os.write(link, rest):]


def receive(link: int, most: int = 1 << 32, wait: Callable[[], None] = lambda: None) -> bytes:
    """One message. Raises: Ended at the end of the link or for a longer message than `most`.

    wait: called before each read; returns when there is something to read, or raises.
    """
    def exactly(size: int) -> bytes:
        parts = []
        while size:
            wait()
            try:
                part = os.read(link, min(size, 1 << 20))
            except ConnectionResetError:
                part = b""
            if not part:
                raise Ended("the program ended before it answered")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    size, = struct.unpack("<Q", exactly(8))
    if size > most:
        raise Ended(f"an answer of {size} bytes, where at most {most} can be right")
    return exactly(size)


def serve(job: dict, link: int) -> None:
    """In the program's process: run it, then answer calls of its functions until the link is closed."""
    namespace = {}
    try:
        exec(job["program"], namespace)
        answer = b"ready"
    except BaseException as error:
        answer = _failure(error)
    send(link, answer)
    while True:
        try:
            name, arguments, keywords = decode_value(receive(link))
        except Ended:
            return
        try:
            answer = b"=" + encode_value(namespace[name](*arguments, **keywords))
        except BaseException as error:
            answer = _failure(error)
        send(link, answer)


def _failure(error: BaseException) -> bytes:
    text = error.args[0] if len(error.args) == 1 and type(error.args[0]) is str else ""
    return b"!" + json.dumps([type(error).__name__, text[:300]]).encode()


class Clock:
    """CPU seconds of the program's process, which the template reports that started it (isolation.py)."""

    def __init__(self, link: int):
        self.link, self.value, self.asked = link, 0.0, -math.inf

    def now(self) -> float:
        """Raises: Ended when the process has ended."""
        try:
            os.write(self.link, b"?")
            answer = os.read(self.link, 8)
        except OSError:
            answer = b""
        if not answer:
            raise Ended("the program ended before it answered")
        self.value, = struct.unpack("<d", answer)
        self.asked = time.monotonic()
        return self.value

    def recent(self, age: float) -> float:
        """A value at most `age` seconds old, because asking costs as much as a short call."""
        return self.value if time.monotonic() - self.asked <= age else self.now()


class Program:
    """The judge's end of the link to the program's process. Limits are CPU seconds of that process."""

    def __init__(self, link: int, clock: int):
        self.link, self.clock = link, Clock(clock)

    def start(self, seconds: float | None = None) -> None:
        """Wait until the program has run. Raises what it raised."""
        self._checked(receive(self.link, 1 << 16, self._limit(seconds)))

    def ask(self, request: bytes, most: int = 1 << 26, seconds: float | None = None) -> bytes:
        """The encoded result of a call, of at most `most` bytes. Raises what the call raised, Ended, TooLong."""
        wait = self._limit(seconds)
        send(self.link, request)
        return self._checked(receive(self.link, most, wait))

    def _limit(self, seconds: float | None) -> Callable[[], None]:
        """A wait for the link that raises TooLong after `seconds` of CPU time, or at the backstop."""
        if seconds is None:
            return lambda: None
        used, start = self.clock.recent(seconds / 50), time.monotonic()

        def wait() -> None:
            left = start + seconds - time.monotonic()  # before that, the limit cannot be reached
            while not select.select([self.link], [], [], max(0.0, left))[0]:
                left = used + seconds - self.clock.now()
                if left <= 0:
                    raise TooLong(f"no answer in {seconds:g} s of CPU time")
                backstop = start + BACKSTOP * seconds - time.monotonic()
                if backstop <= 0:
                    raise TooLong(f"no answer in {BACKSTOP * seconds:g} s of wall-clock time")
                left = min(left, backstop)

        return wait

    def _checked(self, answer: bytes) -> bytes:
        if answer[:1] == b"!":
            kind, text = json.loads(answer[1:])
            found = getattr(builtins, kind, None) if isinstance(kind, str) else None
            known = isinstance(found, type) and issubclass(found, Exception)
            raise (found if known else RuntimeError)(text if known else f"{kind}: {text}")
        return answer[1:]


def _has_opaque(coded) -> bool:
    return type(coded) is list and (coded[0] == "o" or coded[0] in "ltsf" and any(map(_has_opaque, coded[1]))
                                    or coded[0] == "d" and any(map(_has_opaque, itertools.chain(*coded[1]))))


def judge(job: dict, link: int, clock: int, table: int | None = None) -> None:
    """In the judge's process: raise unless the program does what the task asks."""
    program = Program(link, clock)
    program.start()
    if table is None:
        run_tests(program, job)
    else:
        check_outputs(program, job, table)


def run_tests(program: Program, job: dict) -> None:
    """Run the tests of the task among its own solution, with proxies of the program's functions `names`."""
    def proxy(name: str):
        def call(*arguments, **keywords):
            request = encode_value((name, arguments, keywords))
            if _has_opaque(json.loads(request)):
                raise CannotJudge(f"{name} is called with more than plain data")
            return decode_value(program.ask(request))
        return call

    namespace = {}
    exec(job["solution"], namespace)
    namespace |= {name: proxy(name) for name in job["names"]}
    exec(job["tests"], namespace)


# EvalPlus' rules: call by call, against the outputs of the task's own solution


def write_table(rows: list[tuple[bytes, bytes, float]], dataset: str, entry_point: str, atol: float) -> bytes:
    """The table for `check_outputs`. rows: (call, output of the task's own solution, CPU seconds that it may take).

    A tolerance of 0 becomes 1e-6 from the first expected float on.
    """
    parts = []
    for request, expected, seconds in rows:
        wanted = decode_value(expected)
        if dataset == "mbpp" and entry_point in _NOT_NONE:
            wanted = wanted is not None
            expected = encode_value(wanted)
        if atol == 0 and _floats(wanted):
            atol = 1e-6
        parts += [struct.pack("<QQdd", len(request), len(expected), seconds, atol), request, expected]
    return b"".join(parts)


def check_outputs(program: Program, job: dict, table: int) -> None:
    """Raises AssertionError at the first call whose output is not right."""
    offset, number, size = 0, 0, os.fstat(table).st_size
    while offset < size:
        request_size, expected_size, seconds, atol = struct.unpack("<QQdd", os.pread(table, 32, offset))
        request = os.pread(table, request_size, offset + 32)
        expected = os.pread(table, expected_size, offset + 32 + request_size)
        offset += 32 + request_size + expected_size
        number += 1
        answer = program.ask(request, 4 * expected_size + (1 << 20), seconds)
        if answer == expected and b"NaN" not in answer:  # NaN equals nothing
            continue
        arguments = decode_value(request)[1]
        if not agree(job["dataset"], job["entry_point"], arguments, decode_value(answer), decode_value(expected), atol):
            raise AssertionError(f"call {number} gives a wrong output")


_SET_EQUAL = {"similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
              "intersection_array", "find_dissimilar", "Diff"}
_NOT_NONE = {"check_str", "text_match_three", "text_starta_endb"}


def agree(dataset: str, entry_point: str, arguments: list, output, wanted, atol: float) -> bool:
    """Whether an output is right by the rules of EvalPlus."""
    if (dataset, entry_point) == ("humaneval", "find_zero"):  # HumanEval/32: any root will do
        return abs(sum(c * math.pow(output, i) for i, c in enumerate(arguments[0]))) <= atol
    right = output == wanted
    if dataset == "mbpp":
        right = agree_mbpp(entry_point, arguments, output, wanted, right, atol)
    if right or atol == 0:
        return right
    return (type(output) is type(wanted) and (not isinstance(wanted, (list, tuple)) or len(output) == len(wanted))
            and _close(output, wanted, atol))


def agree_mbpp(entry_point: str, arguments: list, output, wanted, right: bool, atol: float) -> bool:
    """The tasks with more than one right answer."""
    if entry_point == "are_equivalent":  # Mbpp/164: the definition is open
        return True
    if entry_point == "sum_div":  # Mbpp/295: 0 for a number without proper divisors
        return right or output == 0
    if entry_point == "surface_Area":  # Mbpp/581: the height may be that of the pyramid, not of its side
        base, height = arguments
        return right or abs(output - round(base**2 + 2 * base * math.sqrt((base / 2) ** 2 + height**2))) <= atol
    if entry_point == "digit_distance_nums":  # Mbpp/558: digit by digit, not the digits of the difference
        first, second = map(str, arguments)
        width = max(len(first), len(second))
        pairs = zip(first.zfill(width), second.zfill(width), strict=True)
        return right or output == sum(abs(int(a) - int(b)) for a, b in pairs)
    if entry_point in _SET_EQUAL:
        return set(output) == set(wanted)
    if entry_point in _NOT_NONE:
        return output == wanted if isinstance(output, bool) else wanted == (output is not None)
    return right


def _floats(value) -> bool:
    return isinstance(value, float) or (isinstance(value, (list, tuple)) and bool(value)
                                        and all(isinstance(item, float) for item in value))


def _close(output, wanted, atol: float) -> bool:
    """numpy.allclose(output, wanted, rtol=1e-7, atol=atol) of numbers and of nested lists of one shape."""
    if isinstance(wanted, (list, tuple)):
        return (isinstance(output, (list, tuple)) and len(output) == len(wanted)
                and all(map(_close, output, wanted, itertools.repeat(atol))))
    if not all(isinstance(value, (int, float, complex)) for value in (output, wanted)):
        return False
    return output == wanted or (not math.isinf(abs(wanted)) and abs(output - wanted) <= atol + 1e-7 * abs(wanted))
