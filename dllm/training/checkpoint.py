"""Checkpoints that are whole or absent, whatever happens while they are written.

global_step_N/hf_ckpt/          model (fp32, the master weights) and tokenizer, for Transformers and DiffusionLM
global_step_N/state/            weights and optimizers, as PyTorch's distributed checkpoints (saver.py)
global_step_N/trainer_state.pt  step, elapsed time, configuration, place in the data
global_step_N/manifest.json     size and SHA-256 of every other file; what does not match is damaged

A checkpoint is written in a hidden sibling folder, synchronised to the disk and renamed into place. It holds no state
of a random generator: what a step draws is a function of the seed and the step's number.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dllm.errors import Failure, UserError

_STEP = "global_step_"


class Checkpoint(NamedTuple):
    folder: Path
    state: dict[str, Any]

    @property
    def hf_folder(self) -> Path:
        return self.folder / "hf_ckpt"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content, or leave it as it was. Creates the folder.

    Raises: Failure if the disk is full or the folder cannot be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _cannot_write(path, error) from error


def write_json(path: Path, record: dict) -> None:
    """`write_atomically` of a record, as indented JSON; text may hold halves of surrogate pairs."""
    write_atomically(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))


def begin(checkpoints: Path, step: int) -> Path:
    """A new folder to write the checkpoint of a step into; what saves that were killed left is removed.

    Raises: Failure if it cannot be made.
    """
    temporary = _hidden(checkpoints, step)
    with explain(temporary):
        for leftover in checkpoints.glob(f".{_STEP}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        (temporary / "hf_ckpt").mkdir(parents=True)
    return temporary


def seal(checkpoints: Path, step: int, keep_last: int | None = None) -> Path:
    """Make what was written into the folder of `begin` the checkpoint of the step; one of that name is replaced.

    Args:
        keep_last: checkpoints to keep, this one included; older ones are deleted afterwards. None keeps all.
    Raises: Failure if the disk is full or the folder cannot be written; every earlier checkpoint is then as it was.
    """
    temporary, folder, replaced = _hidden(checkpoints, step), checkpoints / f"{_STEP}{step}", None
    with explain(temporary):
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
                    for path in files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (*files, temporary / "manifest.json"):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for written in {path.parent for path in files} | {temporary}:
            _sync_folder(written)
        if folder.exists():
            replaced = checkpoints / f".{folder.name}.old"
            os.replace(folder, replaced)
        os.replace(temporary, folder)
        _sync_folder(checkpoints)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    for old in list_checkpoints(checkpoints)[keep_last:] if keep_last else []:
        shutil.rmtree(old, ignore_errors=True)
    return folder


@contextmanager
def explain(temporary: Path) -> Iterator[Path]:
    """Raises: Failure in the place of what goes wrong while writing into the folder of `begin`, which is removed."""
    try:
        yield temporary
    except Exception as error:  # a full disk is an OSError, a RuntimeError over one (torch), any (tokenizers)
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(final_name(temporary), error) from error


def final_name(temporary: Path) -> Path:
    """What the folder of `begin` is called once it is whole."""
    return temporary.parent / temporary.name.removeprefix(".").removesuffix(".tmp")


def _hidden(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".{_STEP}{step}.tmp"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The folders global_step_N, the newest first."""
    found = [path for path in checkpoints.glob(f"{_STEP}*") if path.name.removeprefix(_STEP).isdigit()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix(_STEP)))


def load_latest(checkpoints: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None if there is no checkpoint. A line on stderr names each damaged one passed over.

    Raises: UserError if there are checkpoints and all are damaged.
    """
    damaged = []
    for folder in list_checkpoints(checkpoints):
        problem = find_damage(folder)
        if problem is None:
            for path, reason in damaged:
                print(f"checkpoint {path} is damaged ({reason}); continuing from {folder.name}", file=sys.stderr)
            return read_checkpoint(folder)
        damaged.append((folder, problem))
    if damaged:
        raise UserError(f"every checkpoint in {checkpoints} is damaged ({damaged[0][0].name}: {damaged[0][1]}); remove "
                        "that folder to start anew, or set another train.output_dir")
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Of a folder without damage."""
    return Checkpoint(folder, torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if every file is as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            path = folder / name
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, not {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: Exception) -> Failure:
    if isinstance(error, Failure):
        return error
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    reason = getattr(cause, "strerror", None) or (str(cause) or type(cause).__name__).splitlines()[0]
    return Failure(f"cannot write {path}: {reason}; free space or choose another folder (what was there is unchanged)")
