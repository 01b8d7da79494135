"""Where Triton's kernels can run: on a CUDA GPU, or in Triton's interpreter, which the tests use."""

import os

import torch
from torch import Tensor


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
    if interpreted():
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float16):
            return "under TRITON_INTERPRET=1 takes fp32 and fp16 on the CPU (the interpreter is wrong on bf16)"
        return None
    if not tensor.is_cuda:
        return "needs a CUDA tensor"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {tensor.dtype}"
    return None
