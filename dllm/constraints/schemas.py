"""JSON schemas as regular expressions.

The texts are some of those that the schema accepts: the keys of an object are the declared ones, in their order. A
keyword that would be ignored is refused by name, because a text that breaks it would not be what was asked for.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from dllm.constraints.regular import SCHEMA, Node, complement, parse, union
from dllm.errors import UserError, first_line

DEPTH = 3  # of objects and arrays within each other, where the schema does not say what they hold
MAX_PATTERN = 300_000  # characters
NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id",
         "$anchor", "$comment", "$defs", "definitions", "discriminator"}  # they say nothing about what is accepted
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
LARGEST_INTEGER = 10**15 - 1  # where the schema gives no bound: a double holds it exactly
LARGEST = 10**9 - 1  # of bounded numbers: a double has more digits than they and six decimals
KEYWORDS = {"object": {"properties", "required", "additionalProperties"},
            "array": {"items", "prefixItems", "minItems", "maxItems"},
            "string": {"minLength", "maxLength", "pattern", "format"},
            "integer": BOUNDS, "number": BOUNDS, "boolean": set(), "null": set()}
BLANK = "[ ]?"
# Characters that stand in a JSON string as they are, and the escapes of some others.
PLAIN = complement(union([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x9F)]))
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
CHARACTER = r'(?:[^"\\\x00-\x1f\x7f-\x9f]|\\["\\/bfnrt])'
INTEGER = r"-?(?:0|[1-9][0-9]{0,14})"
NUMBER = r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,2})?"
DATE = (r"[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
        r"|02-(?:0[1-9]|1[0-9]|2[0-8]))")
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
NOTHING = r"[^\x00-\U0010ffff]"  # matches no text
BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {"date": DATE, "time": TIME, "date-time": f"{DATE}T{TIME}",
           "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
           "ipv4": rf"{BYTE}(?:\.{BYTE}){{3}}",
           "email": r"[a-z0-9]+(?:[._-][a-z0-9]+)*@[a-z0-9]+(?:-[a-z0-9]+)*(?:\.[a-z]{2,8})+"}


def schema_pattern(schema: dict | str) -> str:
    """The regular expression, in Python's syntax, of JSON that a schema accepts.

    Raises: UserError if the schema is no JSON, contradicts itself, or has a keyword that cannot be held.
    """
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        return _Reader(schema).value(schema)
    except ValueError as error:  # a UserError, or what json cannot read
        reason = first_line(error)
    except RecursionError:
        reason = "it is nested too deeply"
    raise UserError(f"the JSON schema cannot be used: {reason}")


def schema_text(schema: Any) -> str:
    """A schema as JSON, which is given as such or as what json.loads made of it."""
    try:
        return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError("the JSON schema cannot be used: it must be JSON, or a dict of it "
                        f"({first_line(error)})") from None


class _Reader:
    def __init__(self, root: Any):
        self.root = root
        self.within: list[str] = []  # the references being followed

    def value(self, schema: Any, depth: int = DEPTH) -> str:
        pattern = self._value(schema, depth)
        if len(pattern) > MAX_PATTERN:  # references can double it at each level
            raise UserError(f"its regular expression has more than {MAX_PATTERN} characters; write a smaller one")
        return pattern

    def _value(self, schema: Any, depth: int) -> str:
        if schema is True or schema == {}:
            return anything(depth)
        if not isinstance(schema, dict):
            raise UserError(f"a schema is an object or true, not {_short(schema)}")
        said = {name: value for name, value in schema.items() if name not in NOTES and not name.startswith("x-")}
        if not said:
            return anything(depth)
        for name, read in (("$ref", self._reference), ("allOf", self._all), ("anyOf", self._any), ("oneOf", self._one)):
            if name in said:
                _refuse_beside(name, said, {name})
                return read(said[name], depth)
        if "enum" in said or "const" in said:
            return self._values(said)
        return self._typed(said, depth)

    def _reference(self, name: Any, depth: int) -> str:
        target = self._find(name)
        if name in self.within:
            raise UserError(f"$ref {name!r} leads back to itself, which no regular expression can hold; write out as "
                            "many levels as are needed")
        self.within.append(name)
        pattern = self.value(target, depth)
        self.within.pop()
        return pattern

    def _find(self, name: Any) -> Any:
        if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
            raise UserError(f"$ref must begin with '#/', a place in the same schema, not {_short(name)}")
        target = self.root
        for part in name.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, dict) and part in target:
                target = target[part]
            else:
                raise UserError(f"$ref {name!r} names nothing in the schema")
        return target

    def _resolve(self, schema: Any) -> Any:
        """What a chain of references leads to."""
        for _ in range(32):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._find(schema["$ref"])
        return schema

    def _all(self, schemas: Any, depth: int) -> str:
        if not isinstance(schemas, list) or len(schemas) != 1:
            raise UserError("allOf is supported with one schema alone; merge its schemas")
        return self.value(schemas[0], depth)

    def _any(self, schemas: Any, depth: int) -> str:
        if not isinstance(schemas, list) or not schemas:
            raise UserError("anyOf and oneOf take a list of schemas")
        return either(self.value(schema, depth) for schema in schemas)

    def _one(self, schemas: Any, depth: int) -> str:
        pattern = self._any(schemas, depth)
        resolved = [self._resolve(schema) for schema in schemas]
        for number, one in enumerate(resolved):
            if not all(_exclude(one, other, self._resolve) for other in resolved[:number]):
                raise UserError("oneOf needs schemas that exclude each other, by type or by the const of a required "
                                "property; write anyOf")
        return pattern

    def _values(self, said: dict) -> str:
        _refuse_beside("enum" if "enum" in said else "const", said, {"enum", "const", "type"})
        values = said.get("enum", [said.get("const")])
        if not isinstance(values, list):
            raise UserError("enum takes a list of values")
        if "const" in said:
            values = [value for value in values if _same(value, said["const"])]
        types = _types(said) if "type" in said else None
        values = [value for value in values if types is None or any(_is(value, kind) for kind in types)]
        if not values:
            raise UserError("no value of enum or const has the type of the schema")
        return either(re.escape(json.dumps(value, ensure_ascii=False, allow_nan=False)) for value in values)

    def _typed(self, said: dict, depth: int) -> str:
        types = _types(said)
        known = {"type"}.union(*(KEYWORDS[kind] for kind in types))
        for name in said:
            if name not in known:
                raise UserError(f"the keyword {name!r} is not supported for type {' or '.join(types)}; leave it out")
        read = {"object": self._object, "array": self._array, "string": _string, "integer": _integer, "number": _number}
        plain = {"boolean": "(?:true|false)", "null": "null"}
        return either(read[kind](said, depth) if kind in read else plain[kind] for kind in types)

    def _object(self, said: dict, depth: int) -> str:
        properties, required = said.get("properties", {}), said.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list) or not all(
                isinstance(name, str) for name in required):
            raise UserError("properties takes an object, and required a list of names")
        more = said.get("additionalProperties", True)
        if not properties and not required:
            if more is False:
                return r"\{[ ]?\}"
            item = f'"{CHARACTER}*"{BLANK}:{BLANK}{self._below(more, depth)}'
            return rf"\{{{BLANK}(?:{item}(?:{BLANK},{BLANK}{item})*{BLANK})?\}}"
        for name in required:
            if name not in properties and more is False:
                raise UserError(f"the required property {name!r} is none of the properties")
        named = {**properties, **{name: more for name in required if name not in properties}}
        items = [(f"{_text(name)}{BLANK}:{BLANK}{self._below(schema, depth)}", name in required)
                 for name, schema in named.items() if schema is not False or name in required]
        return rf"\{{{BLANK}{_sequence(items)}{BLANK}\}}"

    def _array(self, said: dict, depth: int) -> str:
        first, rest = said.get("prefixItems", []), said.get("items", True)
        least, most = _bounds(said, "minItems", "maxItems")
        if not isinstance(first, list):
            raise UserError("prefixItems takes a list of schemas")
        if rest is False:
            most = len(first) if most is None else min(most, len(first))
        if most is not None and least > most:
            raise UserError(f"an array cannot have at least {least} and at most {most} items")
        first = [(self._below(schema, depth), place < least) for place, schema in enumerate(first[:most])]
        items = self._tail(first, place=0)
        if most is None or most > len(first):
            item = self._below(rest, depth)
            low, high = max(least - len(first), 0), "" if most is None else most - len(first)
            if not first:
                again = f"{{{max(low - 1, 0)},{'' if most is None else most - 1}}}"
                whole = f"{item}(?:{BLANK},{BLANK}{item}){again}"
                items = whole if low else f"(?:{whole})?"
            else:
                items = self._tail(first, place=0, after=f"(?:{BLANK},{BLANK}{item}){{{low},{high}}}")
        return rf"\[{BLANK}{items}{BLANK}\]"

    def _tail(self, items: list[tuple[str, bool]], place: int, after: str = "") -> str:
        """Items that end early only where the rest may be missing."""
        if place == len(items):
            return after
        item, needed = items[place]
        whole = (f"{BLANK},{BLANK}" if place else "") + item + self._tail(items, place + 1, after)
        return whole if needed else f"(?:{whole})?"

    def _below(self, schema: Any, depth: int) -> str:
        """What an object or array holds."""
        if (schema is True or schema == {}) and depth <= 0:
            return anything(0)
        return self.value(schema, depth - 1)


def anything(depth: int) -> str:
    """Any JSON value, with objects and arrays of so many levels."""
    plain = f'"{CHARACTER}*"|{NUMBER}|true|false|null'
    if depth <= 0:
        return f"(?:{plain})"
    item = anything(depth - 1)
    member = f'"{CHARACTER}*"{BLANK}:{BLANK}{item}'
    return (rf"(?:{plain}|\{{{BLANK}(?:{member}(?:{BLANK},{BLANK}{member})*{BLANK})?\}}"
            rf"|\[{BLANK}(?:{item}(?:{BLANK},{BLANK}{item})*{BLANK})?\])")


def either(patterns: Iterable[str]) -> str:
    patterns = list(dict.fromkeys(patterns))
    return patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"


def _sequence(items: list[tuple[str, bool]]) -> str:
    """Items in their order with commas between those that are there; each needed or not."""
    comma = f"{BLANK},{BLANK}"
    anchor = next((place for place, (_, needed) in enumerate(items) if needed), None)
    if anchor is not None:
        return "".join((item if place == anchor else f"{comma}{item}" if needed else f"(?:{comma}{item})?")
                       if place >= anchor else f"(?:{item}{comma})?" for place, (item, needed) in enumerate(items))
    last = ("".join(f"(?:{before}{comma})?" for before, _ in items[:place]) + item
            for place, (item, _) in enumerate(items))
    return f"(?:{'|'.join(last)})?"


def _string(said: dict, depth: int) -> str:
    least, most = _bounds(said, "minLength", "maxLength")
    if "pattern" in said or "format" in said:
        name = "pattern" if "pattern" in said else "format"
        _refuse_beside(name, said, {"type", name, *KEYWORDS["object"], *KEYWORDS["array"], *BOUNDS})
        if name == "pattern":
            if not isinstance(said[name], str):
                raise UserError("pattern takes a regular expression")
            return f'"{_quoted(parse(said[name], SCHEMA), first=True, last=True)}"'
        if said[name] not in FORMATS:
            raise UserError(f"the format {_short(said[name])} is not supported; there are {', '.join(FORMATS)}")
        return f'"{FORMATS[said[name]]}"'
    return f'"{CHARACTER}{{{least},{"" if most is None else most}}}"'


def _quoted(node: Node, first: bool, last: bool) -> str:
    """A pattern of texts as a pattern of these texts in JSON, which match as a whole.

    first, last: whether nothing of the text comes before or after the node; else its anchors never hold.
    """
    kind, value = node[0], node[1] if len(node) > 1 else None
    if kind == "cat":
        inner = [place for place, part in enumerate(value) if part[0] not in ("begin", "end")]
        low, high = (inner[0], inner[-1]) if inner else (len(value), -1)
        return "".join(_quoted(part, first and place <= low, last and place >= high)
                       for place, part in enumerate(value))
    if kind == "alt":
        return f"(?:{'|'.join(_quoted(part, first, last) for part in value)})"
    if kind == "repeat":
        once = node[3] == 1
        return f"(?:{_quoted(value, first and once, last and once)}){{{node[2]},{'' if node[3] is None else node[3]}}}"
    if kind != "set":
        return "" if (first if kind == "begin" else last) else NOTHING
    outside = complement(value)
    plain = complement(union([*outside, *complement(PLAIN)]))
    forms = ["[" + "".join(rf"\U{low:08x}-\U{high:08x}" for low, high in plain) + "]"] if plain else []
    forms += [re.escape(f"\\{escape}") for character, escape in ESCAPES.items() if character != "/"
              and any(low <= ord(character) <= high for low, high in value)]
    return either(forms) if forms else NOTHING


def _integer(said: dict, depth: int) -> str:
    low, low_open, high, high_open = _range(said, LARGEST_INTEGER)
    if not said.keys() & BOUNDS:
        return INTEGER
    low, high = low + low_open, high - high_open
    if low > high:
        raise UserError(f"no whole number is at least {low} and at most {high}; one side without a bound ends at "
                        f"{LARGEST_INTEGER}")
    parts = [f"-(?:{_between(max(-high, 1), -low)})"] if low < 0 else []
    return either([*parts, *([_between(max(low, 0), high)] if high >= 0 else [])])


def _number(said: dict, depth: int) -> str:
    low, low_open, high, high_open = _range(said, LARGEST)
    if not said.keys() & BOUNDS:
        return NUMBER
    if low < -LARGEST:  # smaller and larger ones are not written
        low, low_open = -LARGEST, False
    if high > LARGEST:
        high, high_open = LARGEST, False
    if low > high or (low == high and (low_open or high_open)):
        raise UserError(f"no number from {-LARGEST} to {LARGEST}, which can be written, is within its bounds")
    negative = _decimals(max(-high, 0), high_open and high <= 0, -low, low_open) if low < 0 else []
    positive = _decimals(max(low, 0), low_open and low >= 0, high, high_open) if high >= 0 else []
    return either([*(f"-{form}" for form in negative), *positive])


def _decimals(low: int, low_open: bool, high: int, high_open: bool) -> list[str]:
    """Decimal numbers between two whole ones, from 0 on; an open end is not among them."""
    zeros, digits, some = r"(?:\.0{1,6})?", r"(?:\.[0-9]{1,6})?", r"\.[0-9]{0,5}[1-9]"
    if low == high:
        return [] if low_open or high_open else [f"{low}{zeros}"]
    forms = [f"{low}{some if low_open else digits}"]
    forms += [f"{_between(low + 1, high - 1)}{digits}"] if low + 1 < high else []
    return forms if high_open else [*forms, f"{high}{zeros}"]


def _range(said: dict, largest: int) -> tuple[int, bool, int, bool]:
    """The least and the largest number, each with whether it is itself left out.

    largest: of numbers without a bound, by their size.
    """
    for name in BOUNDS & said.keys():
        if isinstance(said[name], bool) or not isinstance(said[name], (int, float)) or said[name] % 1:
            raise UserError(f"{name} takes a whole number here, not {_short(said[name])}")
    low = max([(int(said[name]), name == "exclusiveMinimum") for name in ("minimum", "exclusiveMinimum")
               if name in said], default=(-largest, False))
    high = min([(int(said[name]), name == "maximum") for name in ("maximum", "exclusiveMaximum")
                if name in said], default=(largest, True))
    return *low, high[0], not high[1]


def _between(low: int, high: int) -> str:
    """The numbers from low >= 0 to high, in decimal digits."""
    forms = []
    while low <= high:
        # The largest run of numbers that share all digits but the last n, from `low` on.
        n = 0
        while low % 10**(n + 1) == 0 and low > 0 and low + 10**(n + 1) - 1 <= high:
            n += 1
        step = 10**n
        times = min(9 - low // step % 10, (high + 1 - low) // step - 1)
        digit, before = low // step % 10, str(low // step)[:-1]
        forms.append(f"{before}[{digit}-{digit + times}]" + (f"[0-9]{{{n}}}" if n else ""))
        low += (times + 1) * step
    return either(forms)


def _bounds(said: dict, least: str, most: str) -> tuple[int, int | None]:
    low, high = said.get(least, 0), said.get(most)
    for name, bound in ((least, low), (most, high)):
        if name in said and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
            raise UserError(f"{name} takes a whole number from 0 on, not {_short(bound)}")
    if high is not None and low > high:
        raise UserError(f"{least} {low} is more than {most} {high}")
    return low, high


def _types(said: dict) -> list[str]:
    """The types that a schema names, or that its keywords are about."""
    if "type" not in said:
        found = [kind for kind, keywords in KEYWORDS.items() if keywords & said.keys()]
        if not found:
            raise UserError(f"the keyword {next(iter(said))!r} is not supported; leave it out")
        return found[:1]
    types = said["type"] if isinstance(said["type"], list) else [said["type"]]
    for kind in types:
        if not isinstance(kind, str) or kind not in KEYWORDS:
            raise UserError(f"type is one of {', '.join(KEYWORDS)}, not {_short(kind)}")
    if not types:
        raise UserError("type names no type")
    return types


def _refuse_beside(name: str, said: dict, allowed: set[str]) -> None:
    for other in said:
        if other not in allowed:
            raise UserError(f"the keyword {other!r} beside {name} is not supported; leave one out")


def _exclude(one: Any, other: Any, resolve: Callable[[Any], Any]) -> bool:
    """Whether no value fits both schemas, as far as is seen from their types and constants."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    values, others = _constants(one), _constants(other)
    if values is not None and others is not None:
        return not any(_same(a, b) for a in values for b in others)
    if "type" in one and "type" in other:
        types, others = ({"number" if kind == "integer" else kind for kind in _types(s)} for s in (one, other))
        if not types & others:
            return True
    shared = {*one.get("required", ())} & {*other.get("required", ())}
    return any(_exclude(resolve(one["properties"][name]), resolve(other["properties"][name]), resolve)
               for name in shared if name in one.get("properties", {}) and name in other.get("properties", {}))


def _constants(schema: dict) -> list | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON, in which true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _is(value: Any, kind: str) -> bool:
    kinds = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int, "boolean": bool}
    if kind == "null":
        return value is None
    return isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _text(name: str) -> str:
    return re.escape(json.dumps(name, ensure_ascii=False))


def _short(value: Any) -> str:
    return repr(value)[:60]
