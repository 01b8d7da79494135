"""RMSNorm, rotary embedding and SwiGLU's product by Liger-Kernel's Triton kernels (arXiv:2410.10989).

Their sums are in fp32 and they round where PyTorch's layers do. The package is imported for the first tensor.
"""

import importlib.metadata
import os
from functools import cache
from typing import get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dllm.config.fields import require
from dllm.config.names import LayersBackend
from dllm.errors import UserError

OLDEST = "0.8.5"  # the first with both partial rotary embeddings and 64-bit addresses
_DTYPES = torch.float32, torch.float16, torch.bfloat16
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def missing() -> str | None:
    """Why Liger-Kernel cannot be taken here, None if it can."""
    from packaging.version import Version

    try:
        found = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is not None and Version(found) >= Version(OLDEST):
        return None
    return f"needs liger-kernel {OLDEST} or newer, not {found or 'installed'}: pip install 'dllm[liger]'"


def check_backend(name: str) -> None:
    """Refuse a `layers_backend` that there is not, or that is not installed.

    Raises: UserError
    """
    names = get_args(LayersBackend)
    require("layers_backend", name, name in names, f"one of {', '.join(names)}")
    if name == "liger" and (reason := missing()):
        raise UserError(f"layers_backend is liger, which {reason}; or set it to torch")


class LigerLayer(nn.Module):
    """A layer that Liger-Kernel can compute in the place of PyTorch."""

    layers_backend = "auto"  # see `Transformer.layers_backend`

    def by_liger(self, x: Tensor) -> bool:
        """Whether to take Liger for x. What torch.compile compiles it fuses itself, so there auto is PyTorch.

        Raises: UserError if layers_backend is "liger" and x is on a CPU or of another dtype.
        """
        if self.layers_backend == "auto":
            return x.is_cuda and not torch.compiler.is_compiling() and x.dtype in _DTYPES and missing() is None
        if self.layers_backend == "liger" and not (x.dtype in _DTYPES and (x.is_cuda or _INTERPRETED)):
            raise UserError("layers_backend is liger, which takes fp32, fp16 and bf16 on CUDA, not "
                            f"{str(x.dtype).removeprefix('torch.')} on {x.device.type}; set it to torch or auto")
        return self.layers_backend == "liger"


@torch.compiler.disable
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    with torch.cuda.device_of(x):
        # "gemma" rounds once, after the weight, as PyTorch does. Not in place: the gradient may be the caller's.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)


@torch.compiler.disable
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotary.rotate` of q [B, L, H, E] and k [B, L, Hkv, E], in their memory; so are the gradients.

    Nothing else may read q and k, or the gradients that attention gives.
    """
    from liger_kernel.ops.rope import LigerRopeFunction

    with torch.cuda.device_of(q):
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos.squeeze(2), sin.squeeze(2))
    return q.transpose(1, 2), k.transpose(1, 2)


@torch.compiler.disable
def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, whose gradients take the memory of gate and up; nothing else may read them."""
    with torch.cuda.device_of(gate):
        return _SiluTimes.apply(gate, up)


class _SiluTimes(torch.autograd.Function):
    """Liger's own would give wrong gradients, and not say so, when the same graph is backpropagated twice."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import swiglu_forward

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.swiglu import swiglu_backward

        gate, up = (x.detach() for x in ctx.saved_tensors)
        gradients = swiglu_backward(gate, up, gradient.contiguous())
        torch.autograd.graph.increment_version((gate, up))  # PyTorch refuses to read them again
        return gradients
