"""Several processes, one for each device, as torchrun starts them; they share a model and its gradients.

Every process computes its slots of a step's rows. Gradients are averaged over all processes by PyTorch's own engine,
`DistributedDataParallel` (each process has the whole model) or `fully_shard` (FSDP2: each has a part of every layer).
With Ulysses (ulysses.py) groups of processes share the positions of their rows.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dllm.config.schema import TrainGroup
from dllm.errors import Failure, UserError, first_line

T = TypeVar("T")
TIMEOUT = timedelta(minutes=45)  # a collective may wait for the main process to evaluate


@dataclass(frozen=True, slots=True)
class World:
    """This process among the others. `sequence_size` processes with consecutive ranks share their rows."""

    rank: int
    size: int
    device: torch.device
    sequence_size: int = 1
    sequence_group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """True in the process that writes files and prints."""
        return self.rank == 0

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_size

    def slots(self, of: int) -> range:
        """This process's share of the rows 0 .. of - 1 of a step."""
        groups, group = self.size // self.sequence_size, self.rank // self.sequence_size
        return range(of * group // groups, of * (group + 1) // groups)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, compute: Callable[[], T]) -> T:
        """Compute in the main process, and return its result in all. Its UserError or Failure is raised in all."""
        if self.size == 1:
            return compute()
        outcome: list = [None, None]
        if self.main:
            try:
                outcome[0] = compute()
            except (UserError, Failure) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(settings: TrainGroup) -> Iterator[World]:
    """This process's world, as torchrun describes it, or a process alone. The end of the context leaves it.

    Raises: UserError if the settings do not fit the number of processes or devices; Failure if the others cannot be
        reached.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = choose_device(settings)
    sequence = settings.ulysses_parallel_size
    if size % sequence:
        raise UserError(f"train.ulysses_parallel_size {sequence} must divide the number of processes, {size}")
    groups = size // sequence
    if settings.rows_per_step % (groups * settings.micro_batch_size):
        raise UserError(f"train.global_batch_size {settings.rows_per_step} must be a multiple of "
                        f"train.micro_batch_size {settings.micro_batch_size} times {groups}, the number of processes" +
                        (f" over ulysses_parallel_size {sequence}" if sequence > 1 else ""))
    if size == 1:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT,
                                device_id=device if device.type == "cuda" else None)
    except (RuntimeError, ValueError) as error:  # the address is in use, or does not answer
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        advice = "give torchrun another --master-port, or check --master-addr"
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # pytorch/pytorch#135712
            advice = ("restarted processes can find the addresses of those before: start torchrun with "
                      "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
        raise Failure(f"process {rank} of {size} on {socket.gethostname()} cannot meet the others at {where}: "
                      f"{first_line(error)}; {advice}") from error
    group = None
    if sequence > 1:
        group, _ = dist.new_subgroups(sequence)
    yield World(rank, size, device, sequence, group)
    dist.barrier()  # without it a process may end while another still reads from it, and abort
    dist.destroy_process_group()


def choose_device(settings: TrainGroup) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but this torch sees no GPU; set it to auto or cpu, or install a CUDA "
                        "build of torch")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    if on_gpu and local > torch.cuda.device_count():
        raise UserError(f"{local} processes on a machine with {torch.cuda.device_count()} GPUs; lower "
                        "--nproc-per-node, or set train.device=cpu")
    return torch.device("cuda" if on_gpu else "cpu")


def read_constants(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that no state dict holds, such as the angles of a rotary embedding of Transformers."""
    kept = module.state_dict().keys()
    return {name: buffer.cpu() for name, buffer in module.named_buffers() if name not in kept}


class Shared(nn.Module):
    """A module whose gradients are averaged over the processes after `backward` of a step's last micro-batch.

    Outside the main process the parameters may be on the meta device: they take the values of the main process. With
    fsdp2 they become DTensors, sharded over all processes, in place.
    """

    def __init__(self, module: nn.Module, layers: nn.ModuleList, settings: TrainGroup, world: World):
        super().__init__()
        self.bf16 = settings.precision == "bf16"
        self.device_type = world.device.type
        self.sharded = world.size > 1 and settings.data_parallel_mode == "fsdp2"
        if self.sharded:
            dtype = torch.bfloat16 if self.bf16 else None
            # The inputs of modules are not cast, because the weights of losses are fp32.
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
            whole = module.state_dict() if world.main else {}
            constants = world.from_main(lambda: read_constants(module))
            module.to("meta")
            for layer in layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=settings.enable_full_shard)
            fully_shard(module, mesh=mesh, mp_policy=policy)
            module.to_empty(device=world.device)
            set_model_state_dict(module, whole, options=StateDictOptions(full_state_dict=True,
                                                                         broadcast_from_rank0=True))
            for name, constant in constants.items():
                module.get_buffer(name).copy_(constant)
        elif world.size > 1:
            if not world.main:
                module.to_empty(device=world.device)  # the main process's weights are sent to all
            module = DistributedDataParallel(module.to(world.device), gradient_as_bucket_view=True)
        else:
            module.to(world.device)
        self.module = module

    def forward(self, *arguments):
        # fsdp2 casts the parameters themselves
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16 and not self.sharded):
            return self.module(*arguments)

    def synchronising(self, last: bool) -> AbstractContextManager:
        """The context of a micro-batch's forward and backward: only the last one of a step communicates gradients."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
        elif isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()
