"""The choice of a backend: the first of an operation's table that can run here on these inputs, or the one named."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Backend(NamedTuple):
    """One way to compute an operation."""

    name: str
    run: Any  # a function, or functions: what the operation's reference has in this place
    missing: Callable[[], str | None] = lambda: None  # why it cannot run on this machine; None: it can
    refuses: Callable[[Tensor], str | None] = lambda tensor: None  # why it cannot run on such a tensor; None: it can


def takes(device: str, dtypes: Sequence[torch.dtype] = tuple(DTYPES)) -> Callable[[Tensor], str | None]:
    """The `refuses` of a backend for tensors on one type of device, "cpu" or "cuda", and of some dtypes."""
    *names, last = (DTYPES[dtype] for dtype in dtypes)

    def refuses(tensor: Tensor) -> str | None:
        if not getattr(tensor, f"is_{device}"):
            return f"needs a {device.upper()} tensor"
        if tensor.dtype not in dtypes:
            return f"takes {', '.join(names)} and {last}, not {tensor.dtype}"
        return None

    return refuses


def choose(op: str, backends: Sequence[Backend], name: str | None, tensor: Tensor) -> Backend:
    """The backend called `name`, or the first that can run on `tensor`.

    Raises: ValueError if there is no such backend or it cannot run; the message gives the reason for each.
    """
    for backend in backends:
        if name in (None, backend.name) and backend.missing() is None and backend.refuses(tensor) is None:
            return backend
    reasons = "; ".join(f"{b.name}: {b.missing() or b.refuses(tensor) or 'ok'}" for b in backends)
    if name is not None and name not in [backend.name for backend in backends]:
        raise ValueError(f"{op}: there is no backend {name!r} ({reasons})")
    wanted = "no backend" if name is None else f"backend {name!r}"
    raise ValueError(f"{op}: {wanted} cannot run on {tensor.device.type} {tensor.dtype} ({reasons})")


def runnable(backends: Sequence[Backend], tensor: Tensor) -> list[str]:
    """The names of the backends that can run on such a tensor on this machine."""
    return [backend.name for backend in backends if backend.missing() is None and backend.refuses(tensor) is None]
