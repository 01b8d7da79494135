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

# Names of Transformers' TrainingArguments and of training scripts, for the hint beside an unknown key.
_FOREIGN_NAMES = {
    "learning_rate": "train.lr", "per_device_train_batch_size": "train.micro_batch_size", "batch_size":
    "train.micro_batch_size", "gradient_accumulation_steps": "train.global_batch_size", "epochs":
    "train.num_train_epochs", "warmup_ratio": "train.lr_warmup_ratio", "warmup_steps": "train.lr_warmup_ratio",
    "lr_scheduler_type": "train.lr_decay_style", "bf16": "train.precision", "fp16": "train.precision",
    "gradient_checkpointing": "train.enable_gradient_checkpointing", "logging_steps": "train.log_steps",
    "save_total_limit": "train.keep_last", "eval_steps": "train.eval_every", "report_to": "train.use_wandb",
    "resume_from_checkpoint": "train.auto_resume", "model_name_or_path": "model.model_path",
    "dataset_name": "data.train_path", "max_length": "data.max_seq_len", "max_seq_length": "data.max_seq_len"}

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
            raise UserError(f"flags look like --train.lr=1e-3, not {flag!r}{_hint(key)}")
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
    hint = _hint(key) or did_you_mean(key, valid) or f"; the groups are {','.join(GROUPS)}"
    raise UserError(f"there is no configuration key {key}{hint}")


def _hint(key: str) -> str:
    """The end of a message that names the key of the same meaning in its group; empty where there is none."""
    name = key.rpartition(".")[2]
    same = [f"{group}.{name}" for group, cls in GROUPS.items() if name in settings_of(cls)]
    meant = same[0] if same else _FOREIGN_NAMES.get(name)
    return f"; did you mean {meant}?" if meant else ""
