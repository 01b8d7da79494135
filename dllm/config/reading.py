"""Reading a run's configuration: a YAML file and dotted flags, with Open-dLLM's keys.

Keys of Open-dLLM that have no counterpart here (open_dllm.yaml) are accepted where they ask for nothing that would
change the result here, with one line that says so, and refused by name otherwise.
"""

import functools
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dllm.config.fields import convert, parse, settings_of
from dllm.config.schema import GROUPS, Config
from dllm.errors import UserError, did_you_mean
from dllm.files import decode_text

_MASKING = "train.enable_masking"  # Open-dLLM's name for: masked diffusion with the planner's term, or next tokens


@functools.cache
def read_foreign_keys() -> dict[str, dict]:
    return yaml.safe_load(resources.files("dllm.config").joinpath("open_dllm.yaml").read_text(encoding="utf-8"))


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (None: the defaults) and apply flags like `--train.lr=1e-3`, which win.

    Raises: UserError if the file cannot be read, a key is unknown (the nearest valid one is named) or not supported, or
        a value is of the wrong kind or out of range.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    ignored: dict[str, None] = {}
    for key, value in [*_read_yaml(path), *_read_flags(overrides)]:
        group, name = key.split(".", 1)
        if key == _MASKING:
            masking = convert(key, value, settings_of(GROUPS["train"])["path_term"])
            if not masking or values[group].get("objective", "ar") == "ar":
                values[group] |= {"objective": "mdm" if masking else "ar", "path_term": masking}
        elif key in read_foreign_keys():
            foreign = read_foreign_keys()[key]
            if "accepted" not in foreign:
                ignored[f"{key} ({foreign['advice']})"] = None
            elif parse(value) not in foreign["accepted"]:
                raise UserError(f"{key} {parse(value)!r} of Open-dLLM is not supported here: {foreign['advice']}")
        else:
            values[group][name] = convert(key, value, settings_of(GROUPS[group])[name])
    if "output_dir" not in values["train"]:
        raise UserError("train.output_dir is missing: the folder for checkpoints and metrics, as in "
                        "--train.output_dir=runs/first")
    if ignored:
        print(f"note: {path or 'the flags'}: without effect here: {'; '.join(ignored)}", file=sys.stderr)
    return Config(**{name: group(**values[name]) for name, group in GROUPS.items()})


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own rule would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} is given twice; keep one",
                                                    node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: str | Path | None) -> list[tuple[str, Any]]:
    if path is None:
        return []
    try:
        content = yaml.load(decode_text(Path(path).expanduser().read_bytes()), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the configuration {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    pairs = []
    for group, keys in (content or {}).items() if isinstance(content or {}, dict) else [(content, None)]:
        if group not in GROUPS:
            raise UserError(f"{path}: {group!r} is not a group; the groups are {', '.join(GROUPS)}"
                            + did_you_mean(str(group), GROUPS))
        if not isinstance(keys or {}, dict):
            raise UserError(f"{path}: group {group} holds {keys!r}; write one 'key: value' per line below it")
        pairs += [(_known(f"{group}.{name}"), value) for name, value in (keys or {}).items()]
    return pairs


def _read_flags(flags: Sequence[str]) -> list[tuple[str, str]]:
    """Both `--group.key=value` and `--group.key value`."""
    pairs, rest = [], list(flags)
    while rest:
        flag = rest.pop(0)
        key, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or "." not in key:
            raise UserError(f"flags look like --train.lr=1e-3, not {flag!r}")
        _known(key)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"the flag {flag} needs a value: {flag}=...")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def _known(key: str) -> str:
    valid = [f"{group}.{name}" for group, cls in GROUPS.items() for name in settings_of(cls)] + [_MASKING]
    if key in valid or key in read_foreign_keys():
        return key
    name = key.partition(".")[2]
    elsewhere = [other for other in valid if other.split(".")[1] == name]
    hint = f"; did you mean {elsewhere[0]}?" if elsewhere else did_you_mean(key, valid)
    raise UserError(f"there is no configuration key {key}{hint or f'; the groups are {chr(44).join(GROUPS)}'}")
