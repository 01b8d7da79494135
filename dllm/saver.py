"""The state of a run over all its processes, written and read with PyTorch's distributed checkpoints.

Every process writes its part of the weights and of the optimizers' state, and any number of processes can read it
again. The main process adds a Hugging Face folder, for which sharded weights are gathered in its memory alone.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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

from dllm.checkpoint import begin, explain, final_name, seal
from dllm.config import TrainGroup
from dllm.distributed import World
from dllm.errors import Failure
from dllm.lora import merge
from dllm.model import DiffusionLM

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process alone: as intended


class Saver:
    """Writes the checkpoints of a run, one at a time; `checkpoint` is the folder of the newest whole one."""

    def __init__(self, checkpoints: Path, settings: TrainGroup, world: World):
        self.checkpoints, self.settings, self.world = checkpoints, settings, world
        self.checkpoint: Path | None = None
        self._group = None  # of its own, lest a background save meets the trainer's messages
        if settings.save_async and world.size > 1:
            self._group = dist.new_group(backend="gloo")
        self._executor = ThreadPoolExecutor(1, "saver")
        self._pending: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        self._executor.shutdown(wait=True)

    def save(self, step: int, model: DiffusionLM, tokenizer, optimizers: list[Optimizer], state: dict[str, Any],
             last: bool) -> None:
        """Write global_step_<step>, all processes together; with save_async, while training goes on.

        Args:
            state: tensors, numbers, strings, and containers of them, for `Checkpoint.state`.
            last: of the run: written at once, and with weights for others.
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
                write_model(model, tokenizer, exported, folder / "hf_ckpt")
                torch.save(state, folder / "trainer_state.pt")
            return seal(self.checkpoints, step, self.settings.keep_last)

        if background:
            started: list[Future] = []
            _explained(folder, lambda: started.append(
                dcp.async_save(parts, checkpoint_id=folder / "state", process_group=self._group)))

            def finish() -> Path | None:
                _explained(folder, started[0].result)
                return complete() if world.main else None

            self._pending = self._executor.submit(finish)
        else:
            _explained(folder, lambda: dcp.save(parts, checkpoint_id=folder / "state", no_dist=world.size == 1))
            self.checkpoint = world.from_main(complete)

    def wait(self) -> Path | None:
        """Until what is being written is whole; the folder of the newest checkpoint."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if not self.world.main:
                pending.result()
            self.checkpoint = self.world.from_main(pending.result)
        return self.checkpoint


def load_state(folder: Path, model: DiffusionLM, optimizers: list[Optimizer], world: World) -> None:
    """Put the weights and the optimizers' state of a checkpoint in their places, in every process its part."""
    weights, parts = get_state_dict(model, optimizers)
    state = {"model": weights, "optimizers": parts}
    _explained(folder, lambda: dcp.load(state, checkpoint_id=folder / "state", no_dist=world.size == 1), "read")
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"])


def gather_weights(model: DiffusionLM, world: World, copy: bool) -> dict[str, Tensor]:
    """All weights by name, without adapters, in the main process; none in the others.

    copy: of weights that are not sharded too, so that training may go on.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        weights = model.state_dict() if world.main else {}
        if copy:
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
    return merge(weights, model)


def write_model(model: DiffusionLM, tokenizer, weights: dict[str, Tensor], folder: Path) -> None:
    """The folder that others load; if there are no weights, what this project needs to build the model."""
    model.save_pretrained(folder, weights)
    tokenizer.save_pretrained(folder)


def _explained(folder: Path, act: Callable[[], Any], verb: str = "write") -> None:
    """Of a distributed checkpoint's errors, which are a dictionary by process, one line."""
    try:
        act()
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = getattr(cause, "strerror", None) or (str(cause).splitlines() or [repr(cause)])[0]
        raise Failure(f"cannot {verb} {final_name(folder)} (process {rank}): {reason}; free space or choose another "
                      "folder (what was there is unchanged)") from error
