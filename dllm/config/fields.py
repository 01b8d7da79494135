"""Settings as data: each field of a settings dataclass says its meaning and its range once, as `setting(...)`.

Checks, command-line flags, conversion of text, and the tables of docs/ derive from that: `python -m dllm.config.fields
docs/*.md` writes the tables between their markers again. Nothing here imports torch.
"""

import argparse
import operator
import os
import re
import sys
import types
import typing
from dataclasses import MISSING, field, fields
from functools import cache
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dllm.errors import UserError

_COMPARE = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_MANY = {int: "whole numbers", float: "numbers"}


def setting(default: Any, meaning: str, *, at_least: float | None = None, above: float | None = None,
            at_most: float | None = None, below: float | None = None, none: str | None = None,
            per_request: bool = False) -> Any:
    """A field with a meaning and a range. Its type is int, float, bool, str, a `Literal` of choices, or
    tuple[int | float, ...] of any length; each may be `| None`.

    Args:
        default: MISSING for a field that must be given.
        meaning: one line, with the unit.
        none: what None stands for.
        per_request: whether each request to a server may choose it.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return field(default=default, metadata={"meaning": meaning, "none": none, "per_request": per_request, "bounds": {
        name: bound for name, bound in bounds.items() if bound is not None}})


class Setting(NamedTuple):
    """A field as its users see it."""

    name: str
    kind: type  # int, float, bool or str, of each item if `many`
    many: bool
    optional: bool  # may be None
    choices: tuple[str, ...]  # () for any value of the kind
    default: Any
    meaning: str
    none: str | None
    bounds: dict[str, float]
    per_request: bool

    @property
    def wanted(self) -> str:
        """The values it takes, in words."""
        if self.choices:
            return ("none or " if self.optional else "") + "one of " + ", ".join(self.choices)
        return ("numbers " if self.many else "") + _in_words(self.bounds)

    def holds(self, value: Any) -> bool:
        """Whether a value of the right kind is in the range."""
        if value is None:
            return self.optional
        if self.many:
            return len(value) > 0 and all(self._replace(many=False).holds(item) for item in value)
        if self.choices:
            return value in self.choices
        return all(_COMPARE[name](value, bound) for name, bound in self.bounds.items())


def _in_words(bounds: dict[str, float]) -> str:
    return " and ".join(f"{name} {bound:g}" for name, bound in bounds.items())


@cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The fields declared by `setting`, by name and in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: _read(f, hints[f.name]) for f in fields(cls) if "meaning" in f.metadata}


def _read(declared, hint: Any) -> Setting:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union \
        else (hint,)
    kind = next(part for part in parts if part is not type(None))
    many = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if many else kind
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    return Setting(declared.name, str if choices else kind, many, type(None) in parts, choices, declared.default,
                   **declared.metadata)


def require(name: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise UserError(f"{name} must be {wanted}, not {_show(value)}")


def _show(value: object) -> str:
    """A value in words, however long it is; Python refuses to write numbers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() >= 64:
        return "one beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check(given: Any, prefix: str = "") -> None:
    """Refuse a settings object with a value of the wrong kind or out of range.

    Raises: UserError naming the field, with `prefix` before it, and what it takes.
    """
    for name, its in settings_of(type(given)).items():
        value = getattr(given, name)
        check_kind(prefix + name, value, its)
        require(prefix + name, value, its.holds(value), its.wanted)


def expand_home(given: Any, *names: str) -> None:
    """Write out a ~ that begins the value of one of these fields of a frozen settings object."""
    for name in names:
        value = getattr(given, name)
        if isinstance(value, str) and value.startswith("~"):
            object.__setattr__(given, name, os.path.expanduser(value))


def check_kind(name: str, value: Any, its: Setting) -> None:
    """Raises: UserError if a value is not of the kind of the field."""
    if its.many and not (value is None and its.optional):
        fits = isinstance(value, list | tuple) and all(_is(item, its) for item in value)
        require(name, value, fits, _MANY[its.kind])
    else:
        require(name, value, _is(value, its), _KINDS[its.kind])


def _is(value: Any, its: Setting) -> bool:
    if value is None:
        return its.optional
    if its.kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and -2**63 <= value < 2**63
    if its.kind is float:
        huge = isinstance(value, Integral) and abs(value) >= 2**1023  # which no float holds
        return isinstance(value, Real) and not isinstance(value, bool) and not huge
    return isinstance(value, its.kind)


def convert(name: str, value: Any, its: Setting) -> Any:
    """A value from YAML, a flag or a request's text, as the kind of the field.

    Raises: UserError if it cannot be that.
    """
    parsed = parse(value)
    if its.optional and parsed in (None, "", "none"):
        return None
    if its.many:
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        return tuple(convert(name, item, its._replace(many=False)) for item in items)
    if its.kind is str and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    if its.kind is str and not isinstance(value, dict | list) and value is not None:
        return str(value)
    if its.kind is bool and isinstance(parsed, bool):
        return parsed
    if its.kind in (int, float) and not isinstance(parsed, bool):
        number = _as_number(parsed)  # YAML reads 1e-3 as text
        if number is not None and its.kind is float:
            return number
        if number is not None and number.is_integer():
            return parsed if isinstance(parsed, int) else int(number)
    raise UserError(f"{name} must be {_KINDS[its.kind]}, not {_show(value)}")


def parse(value: Any) -> Any:
    """A flag's text as YAML reads it; values from a file are read already."""
    if not isinstance(value, str):
        return value
    import yaml  # a tenth of a second, which --help does not need

    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # the second: a number of thousands of digits
        return value


def _as_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number != number else number


def add_fields(parser: argparse.ArgumentParser, cls: type, *, leave_out: tuple[str, ...] = (),
               defaults: dict[str, str] | None = None) -> None:
    """A flag for each setting of a dataclass. What is not given is not in the parsed arguments (see `given`).

    Args:
        defaults: name -> the default that help states, where it is not the field's own.
    """
    for name, its in settings_of(cls).items():
        if name in leave_out:
            continue
        flag, default = "--" + name.replace("_", "-"), (defaults or {}).get(name) or show_default(its)
        text = f"{describe(its)}; default: {default}".replace("%", "%%")
        if its.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=_reader(flag, its), default=argparse.SUPPRESS, help=text,
                                choices=its.choices or None, metavar="NAME" if its.kind is str else
                                "N" if its.kind is int else "X")


def _reader(flag: str, its: Setting):
    def read(text: str) -> Any:
        try:
            return convert(flag, text, its)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{flag} ")) from None

    return read


def given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The settings of a dataclass that flags have given."""
    return {name: getattr(arguments, name) for name in settings_of(cls) if hasattr(arguments, name)}


def describe(its: Setting) -> str:
    """The meaning, and the choices if there are any."""
    return its.meaning + (f" ({', '.join(its.choices)})" if its.choices else "")


def show_default(its: Setting) -> str:
    if its.default is MISSING:
        return "required"
    if its.default is None:
        return its.none or "none"
    if its.many:
        return ",".join(map(str, its.default))
    return f"{its.default:g}" if its.kind is float else str(its.default).lower() if its.kind is bool else \
        str(its.default)


def table(cls: type) -> str:
    """The settings of a dataclass as a Markdown table."""
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for its in settings_of(cls).values():
        values = ", ".join(f"`{choice}`" for choice in its.choices) or (_MANY if its.many else _KINDS)[its.kind]
        if its.bounds:
            values += ", " + _in_words(its.bounds)
        meaning = its.meaning.replace("|", "\\|")
        rows.append(f"| `{its.name}` | {show_default(its)} | {values} | {meaning} |")
    return "\n".join(rows)


_MARKED = re.compile(r"(<!-- settings: (?P<where>[\w.]+)\.(?P<name>\w+) -->\n).*?(<!-- end of settings -->)", re.S)


def fill_tables(text: str) -> str:
    """A page with its tables of settings written again."""
    def fill(match: re.Match) -> str:
        return match[1] + table(getattr(import_module(match["where"]), match["name"])) + "\n" + match[4]

    return _MARKED.sub(fill, text)


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(fill_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
