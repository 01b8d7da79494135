"""Runs in a folder: a manifest of the settings, samples appended batch by batch, and the check that a run may continue.

    manifest.json      hashes of weights, tokenizer and data, settings, versions
    part-<rank>.jsonl  the samples that each process has written so far
"""

import hashlib
import json
import os
import platform
import time
from pathlib import Path

import torch

import dllm
from dllm.errors import UserError
from dllm.files import digest_files
from dllm.model.transformer import Transformer

RUN_FILES = ("manifest.json", "samples.jsonl", "results.json")

# Fields of the manifest that must be equal for a run to continue.
_FIXED = ("task", "preset", "model", "weights", "tokenizer", "data", "generation", "samples", "length", "stops",
          "batch_size", "tasks", "dtype")


def identify_model(model: Transformer, tokenizer, source: Path | None) -> dict:
    """The fields of a manifest about model, machine, versions and time. source: the folder of the model."""
    import transformers

    weight = next(model.parameters())
    return {
        "model": model.config.family, "source": None if source is None else Path(source).name,
        "weights": None if source is None else digest_files(sorted(Path(source).glob("*.safetensors"))),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "dtype": str(weight.dtype),
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else "cpu",
        "machine": platform.platform(),
        "versions": {"dllm": dllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def check_continues(folder: Path, manifest: dict) -> None:
    """Refuse a folder whose manifest has other settings.

    Raises: UserError naming the first field that differs.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return
    try:
        recorded = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no manifest ({error}); take the folder away, or name another") from None
    ours = json.loads(json.dumps(manifest))
    for name in _FIXED:
        was, now = recorded.get(name), ours[name]
        if name == "data":  # equal data may be in another place
            was, now = ({"sha256": data["sha256"]} if isinstance(data, dict) and "sha256" in data else data
                        for data in (was, now))
        if was != now:
            key = ""
            if isinstance(was, dict) and isinstance(now, dict):
                key = next(key for key in {**was, **now} if was.get(key) != now.get(key))
                was, now, key = was.get(key), now.get(key), f"{key} "
            raise UserError(f"{folder} has a run with another {name} ({key}{json.dumps(was)[:100]}, now "
                            f"{json.dumps(now)[:100]}); name another folder, or give the same settings to continue it")


def key_of(row: dict) -> tuple[str, int]:
    return row["task_id"], row["sample"]


def read_parts(folder: Path) -> list[dict]:
    """The samples that all processes have written, without a line that a kill cut off.

    Raises: UserError if a line is no sample.
    """
    rows = {}
    for path in sorted(folder.glob("part-*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                rows[key_of(row)] = row
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}: line {number} is no sample of this run ({type(error).__name__}); delete the "
                                "line, and it is generated again") from None
    return list(rows.values())


def count_samples(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("part-*.jsonl"))


def append_samples(path: Path, rows: list[dict]) -> None:
    """Append lines to a file, overwriting a line that a kill cut off, and wait until they are on the disk."""
    with open(path, "ab") as file:
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(to_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def wait_for_all(folder: Path, wanted: set, patience: float = 24 * 3600.0) -> None:
    """Wait until the samples of every process are in the folder, which all of them share.

    Raises: UserError after `patience` seconds.
    """
    start = time.monotonic()
    while not wanted <= set(map(key_of, read_parts(folder))):
        if time.monotonic() - start > patience:
            raise UserError(f"{folder} still lacks samples after {patience:g} s; start the same command again")
        time.sleep(1.0)


def to_lines(rows: list[dict]) -> bytes:
    return b"".join((json.dumps(row) + "\n").encode() for row in rows)
