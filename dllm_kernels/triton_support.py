"""Availability of Triton's kernels: on a CUDA GPU, or in Triton's interpreter, which the tests use."""

import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import takes


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Why they cannot run on this machine, None if they can."""
    if not interpreted() and not torch.cuda.is_available():
        return "needs a GPU, or TRITON_INTERPRET=1"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "needs Triton: pip install triton"
    return None


def refuses(tensor: Tensor) -> str | None:
    """Why they cannot run on such a tensor, None if they can."""
    if not interpreted():
        return takes("cuda")(tensor)
    if tensor.is_cpu and tensor.dtype in (torch.float32, torch.float16):
        return None
    return "under TRITON_INTERPRET=1 takes fp32 and fp16 on the CPU (the interpreter is wrong on bf16)"


def kernels(operation: str):
    """The module of an operation's kernels. It imports Triton, so it is loaded only when they run."""
    return importlib.import_module(f".{operation}.triton_kernels", __package__)


def on_triton(operation: str, function: str) -> Callable:
    """A function of that module, which is loaded at the first call."""
    return lambda *arguments: getattr(kernels(operation), function)(*arguments)
