"""Which backend runs an operation: the first of its table that can run here on these inputs, or the one asked for."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Backend(NamedTuple):
    """One way to compute an operation."""

    name: str
    run: Callable  # the arguments of the operation's reference, in its order
    missing: Callable[[], str | None] = lambda: None  # why it cannot run on this machine; None: it can
    refuses: Callable[[Tensor], str | None] = lambda tensor: None  # why it cannot run on such a tensor; None: it can


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
