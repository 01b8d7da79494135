"""A pytest plugin, `-p tests.stand_in_gpu`: a GPU whose memory is the CPU's, to see what crosses between the two.

A tensor that says it is on "cuda" holds one of the CPU. As on a GPU, an operation on tensors of both raises, and what
makes the host wait warns or raises where `torch.cuda.set_sync_debug_mode` asks for it. Triton interprets. There are no
streams, no graphs and no libraries of a GPU, and nothing is fast.
"""

import ctypes
import os
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported; nobody else is to see it
import triton.language  # noqa: E402

triton.knobs.runtime.interpret = True
del os.environ["TRITON_INTERPRET"]

import torch  # noqa: E402
import torch.distributed.checkpoint.filesystem as checkpoint_files  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import (  # noqa: E402
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from dllm.model import liger  # noqa: E402
from tests import interpreter  # noqa: E402
from tests.compiled import shared_library  # noqa: E402

COPIES = ("aten::_to_copy", "aten::copy_")
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
         "aten::repeat_interleave", "aten::equal", "aten::is_nonzero")  # whose results the host needs
MATH_ATTENTION = 0  # of SDPBackend
PROPERTIES = SimpleNamespace(name="stand-in for an H200", total_memory=2**37, major=9, minor=0,
                             multi_processor_count=132)

sync_mode = "default"


class OnGpu(Tensor):
    """Says it is on cuda:0; `value` is on the CPU."""

    @staticmethod
    def __new__(cls, value: Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, strides=value.stride(), dtype=value.dtype,
                                                   storage_offset=value.storage_offset(), device="cuda:0")

    def __init__(self, value: Tensor):
        self.value = value

    def __repr__(self, **_) -> str:
        return f"OnGpu({self.value!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sees the operations on no tensor of a GPU too: those that make one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def to_cpu(x):
    if isinstance(x, OnGpu):
        return x.value
    return torch.device("cpu") if isinstance(x, torch.device) else x


def compute(function, args, kwargs):
    name, device = function._schema.name, kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGpu)]
    on_gpu = bool(ours) if device is None else torch.device(device).type == "cuda"
    if name == "aten::is_pinned":
        return False
    if name == "aten::_fused_sdp_choice":
        return MATH_ATTENTION
    if name in COPIES:
        on_gpu = isinstance(args[0], OnGpu) if name == "aten::copy_" else on_gpu
        if ours and not on_gpu or on_gpu and not all(isinstance(x, OnGpu) for x in tensors):
            asynchronous = on_gpu and (kwargs.get("non_blocking") or args[2:3] == (True,))
            if not asynchronous:
                wait(name)
    elif ours:
        strangers = [x for x in tensors if not isinstance(x, OnGpu) and x.ndim > 0]
        if strangers:
            raise RuntimeError(f"{name} of tensors on cuda got one of {list(strangers[0].shape)} on the CPU")
        by_mask = name.startswith(("aten::index", "aten::_index_put")) and isinstance(args[1], (list, tuple)) and any(
            x is not None and x.dtype == torch.bool for x in args[1])
        if name in WAITS or by_mask:
            wait(name)
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    result = function(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
    if not on_gpu:
        return result
    result = tree_map(lambda x: OnGpu(x) if isinstance(x, Tensor) else x, result)
    if not ours or name == "aten::_to_copy":
        return result
    return return_and_correct_aliasing(function, args, kwargs, result)


def wait(name: str) -> None:
    if sync_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {name}")
    if sync_mode == "warn":
        warnings.warn(f"called a synchronizing CUDA operation: {name}", stacklevel=2)


def set_sync_debug_mode(mode: str) -> None:
    global sync_mode
    sync_mode = mode


def load_device() -> None:
    home = Path(torch.__file__).parent
    library = shared_library(Path(__file__).with_suffix(".cpp"), f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10",
                             "-ltorch_cpu", compiler=tuple(os.environ.get("CXX", "g++").split()),
                             depends=(torch.__version__,))
    ctypes.CDLL(str(library))


def pytest_configure() -> None:
    """Until the process ends."""
    load_device()
    interpreter.pytest_configure()
    torch.__future__.set_swap_module_params_on_conversion(True)
    for name, value in {
            "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
            "current_device": lambda: 0, "set_device": lambda device: None, "empty_cache": lambda: None,
            "synchronize": lambda *device: None, "device_of": lambda tensor: nullcontext(),
            "get_device_name": lambda *device: PROPERTIES.name, "get_device_capability": lambda *device: (9, 0),
            "get_device_properties": lambda *device: PROPERTIES, "is_bf16_supported": lambda *including: True,
            "max_memory_allocated": lambda *device: 0, "memory_allocated": lambda *device: 0,
            "reset_peak_memory_stats": lambda *device: None, "set_sync_debug_mode": set_sync_debug_mode}.items():
        setattr(torch.cuda, name, value)
    liger.missing = lambda: "the interpreter is wrong on bf16"
    replace_what_no_mode_sees()
    checkpoint_files._OverlappingCpuLoader = lambda resolve, **_: checkpoint_files._SerialCpuLoader(resolve)
    run_interpreted, run_thread = triton.runtime.interpreter.GridExecutor.__call__, threading.Thread.run

    def launch(self, *args, **kwargs):
        with _disable_current_modes():
            return run_interpreted(self, *tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))

    def run(self):
        with Mode():  # each thread has its own
            run_thread(self)

    triton.runtime.interpreter.GridExecutor.__call__, threading.Thread.run = launch, run
    Mode().__enter__()


def replace_what_no_mode_sees() -> None:
    """Functions that make tensors of a GPU from Python's numbers, or read them, below the operations."""
    make, tolist, getitem = torch.tensor, Tensor.tolist, Tensor.__getitem__

    def tensor(data, *, dtype=None, device=None, **others):
        made = make(data, dtype=dtype, device="cpu", **others)
        return made.to(torch.empty(0).device if device is None else device)

    def new_tensor(self, data, dtype=None):
        return tensor(data, dtype=dtype or self.dtype, device=self.device)

    def as_indices(x: Tensor, index):
        if isinstance(index, tuple):
            return tuple(as_indices(x, part) for part in index)
        return tensor(index, device=x.device) if isinstance(index, list) else index

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    torch.tensor, torch.Generator, Tensor.new_tensor = tensor, Generator, new_tensor
    Tensor.tolist = lambda self: tolist(self.cpu())
    Tensor.__getitem__ = lambda self, index: getitem(self, as_indices(self, index))
    Tensor.pin_memory = lambda self: self
