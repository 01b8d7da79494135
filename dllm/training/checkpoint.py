"""Checkpoints that are whole or absent, whatever happens while they are written.

global_step_N/hf_ckpt/          model (fp32, the master weights) and tokenizer, for Transformers and DiffusionLM
global_step_N/state/            weights and optimizers, as PyTorch's distributed checkpoints
global_step_N/trainer_state.pt  step, elapsed time, configuration, place in the data
global_step_N/manifest.json     size and SHA-256 of every other file; a file that does not match is damaged

A checkpoint is written in a hidden sibling folder, synchronised to the disk and renamed into place. Every process
writes its part of the state, and any number of processes can read it again. The main process adds the Hugging Face
folder, and only its memory gathers sharded weights for it. A checkpoint holds no state of a random generator, because
the draws of a step are a function of the seed and the number of the step.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dllm.config.schema import TrainGroup
from dllm.errors import Failure, UserError
from dllm.files import cannot_write, digest_files, find_reason, sync_folder
from dllm.model.transformer import Transformer
from dllm.training.distributed import World
from dllm.training.lora import merge

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process alone, as intended

_STEP = "global_step_"


class Checkpoint(NamedTuple):
    folder: Path
    state: dict[str, Any]

    @property
    def hf_folder(self) -> Path:
        return self.folder / "hf_ckpt"


class Saver:
    """Writes the checkpoints of a run, one at a time; `checkpoint` is the folder of the newest whole one."""

    def __init__(self, checkpoints: Path, settings: TrainGroup, world: World):
        self.checkpoints, self.settings, self.world = checkpoints, settings, world
        self.checkpoint: Path | None = None
        # Own process group, so that background saves never interleave with training collectives.
        self._group = None
        if settings.save_async and world.size > 1:
            self._group = dist.new_group(backend="gloo")
        self._executor = ThreadPoolExecutor(1, "saver")
        self._pending: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        self._executor.shutdown(wait=True)

    def save(self, step: int, model: Transformer, tokenizer, optimizers: list[Optimizer], state: dict[str, Any],
             last: bool) -> None:
        """Write global_step_<step>, all processes together; with save_async, while training goes on.

        Args:
            state: tensors, numbers, strings, and containers of them, for `Checkpoint.state`.
            last: the last checkpoint of the run is written in the foreground, with weights for other programs.
        Raises: Failure if this or the one before could not be written; what was there is then unchanged.
        """
        self.wait()
        world, background = self.world, self.settings.save_async and not last
        folder = world.from_main(lambda: begin(self.checkpoints, step))
        weights, parts = get_state_dict(model, optimizers)
        parts = {"model": weights, "optimizers": parts}
        exported = {}
        if last or self.settings.save_hf_weights:
            exported = gather_weights(model, world, copy=background)

        def complete() -> Path:
            with explain(folder):
                model.save_pretrained(folder / "hf_ckpt", exported)  # without weights, the configuration alone
                tokenizer.save_pretrained(folder / "hf_ckpt")
                torch.save(state, folder / "trainer_state.pt")
            return seal(self.checkpoints, step, self.settings.keep_last)

        if background:
            with explain_parts(folder):
                started = dcp.async_save(parts, checkpoint_id=folder / "state", process_group=self._group)

            def finish() -> Path | None:
                with explain_parts(folder):
                    started.result()
                return complete() if world.main else None

            self._pending = self._executor.submit(finish)
        else:
            with explain_parts(folder):
                dcp.save(parts, checkpoint_id=folder / "state", no_dist=world.size == 1)
            self.checkpoint = world.from_main(complete)

    def wait(self) -> Path | None:
        """Wait until the save in progress is whole. Returns the folder of the newest checkpoint."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if not self.world.main:
                pending.result()
            self.checkpoint = self.world.from_main(pending.result)
        return self.checkpoint


def load_state(folder: Path, model: Transformer, optimizers: list[Optimizer], world: World) -> None:
    """Load the weights and the state of the optimizers; every process reads its part."""
    weights, parts = get_state_dict(model, optimizers)
    state = {"model": weights, "optimizers": parts}
    with explain_parts(folder, "read"):
        dcp.load(state, checkpoint_id=folder / "state", no_dist=world.size == 1)
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"])


def gather_weights(model: Transformer, world: World, copy: bool) -> dict[str, Tensor]:
    """All weights by name, without adapters, in the main process; none in the others.

    copy: copy unsharded weights too, so that training can continue meanwhile.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        weights = model.state_dict() if world.main else {}
        if copy:
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
    return merge(weights, model)


@contextmanager
def explain_parts(folder: Path, verb: str = "write") -> Iterator[None]:
    """Turn the errors of a distributed checkpoint, a dictionary of processes, into one line."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if verb == "write":
            shutil.rmtree(folder, ignore_errors=True)
        raise Failure(f"cannot {verb} {final_name(folder)} (process {rank}): {find_reason(cause)}; free space or "
                      "choose another folder (what was there is unchanged)") from error


def begin(checkpoints: Path, step: int) -> Path:
    """A new folder to write the checkpoint of a step into. Leftovers of killed saves are removed.

    Raises: Failure if it cannot be made.
    """
    temporary = _hidden(checkpoints, step)
    with explain(temporary):
        for leftover in checkpoints.glob(f".{_STEP}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        (temporary / "hf_ckpt").mkdir(parents=True)
    return temporary


def seal(checkpoints: Path, step: int, keep_last: int | None = None) -> Path:
    """Rename the folder of `begin` to the checkpoint of the step, replacing an older one of that name.

    Args:
        keep_last: number of checkpoints to keep, with this one; older ones are deleted afterwards. None keeps all.
    Raises: Failure if the disk is full or the folder cannot be written; every earlier checkpoint is then as it was.
    """
    temporary, folder, replaced = _hidden(checkpoints, step), checkpoints / f"{_STEP}{step}", None
    with explain(temporary):
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {path.relative_to(temporary).as_posix():
                    {"bytes": path.stat().st_size, "sha256": digest_files([path])} for path in files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (*files, temporary / "manifest.json"):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for written in {path.parent for path in files} | {temporary}:
            sync_folder(written)
        if folder.exists():
            replaced = checkpoints / f".{folder.name}.old"
            os.replace(folder, replaced)
        os.replace(temporary, folder)
        sync_folder(checkpoints)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    for old in list_checkpoints(checkpoints)[keep_last:] if keep_last else []:
        shutil.rmtree(old, ignore_errors=True)
    return folder


@contextmanager
def explain(temporary: Path) -> Iterator[Path]:
    """Raises: Failure for any error while the folder of `begin` is written; the folder is then removed."""
    try:
        yield temporary
    except Exception as error:  # a full disk is an OSError, a RuntimeError over one (torch), any (tokenizers)
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(final_name(temporary), error) from error


def final_name(temporary: Path) -> Path:
    """The name of the folder of `begin` once it is whole."""
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
    return Checkpoint(folder, torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True))


def find_damage(folder: Path) -> str | None:
    """The first fault of a checkpoint; None if every file is as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            path = folder / name
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, not {expected['bytes']}"
            if digest_files([path]) != expected["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None
