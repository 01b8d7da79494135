"""Devices and dtypes as users name them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dllm.errors import UserError

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def find_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name ("bfloat16", "torch.bfloat16"), None for "auto"; None stands for float32."""
    if dtype is None:
        return torch.float32
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in DTYPES:
        raise UserError(f"dtype must be auto, float32, bfloat16, float16 or float64, not {dtype!r}")
    return DTYPES.get(name)


def own_dtype(raw: Mapping, state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that a config.json names, else that of the first weights, as Transformers' "auto"."""
    named = raw.get("dtype") or raw.get("torch_dtype")
    if named is not None and (dtype := find_dtype(named)) is not None:
        return dtype
    return next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)


def find_device(device: str | int | torch.device) -> torch.device:
    """A device by its name, number or itself; "auto" is the GPU if there is one.

    Raises: UserError if there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        seen = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
        raise UserError(f"device is {found}, but this torch sees {seen}; choose another, or install a CUDA build of "
                        "torch")
    return found
