"""Linear maps inside the layers as int8 with one fp32 scale a row, by torchao: y = (x @ ints.T) * scale.

Embedding, head and norms stay as they are. A folder of ours holds the integers under the published name and their
scales [out, 1] under that name and `_scale`; config.json says so under quantization_config. Such a model samples,
evaluates and serves; whatever trains reads config.json by `read_config`, which refuses it.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dllm.errors import UserError

WRITTEN = {"quant_method": "dllm", "bits": 8}
_SCALE = "_scale"
_FOUR = ("bits 4 is not supported: torchao packs two weights a byte for GPUs alone, and on a CPU it keeps a byte for "
         "each and is slower; use 8")


def is_quantised(raw: Mapping) -> bool:
    """Whether a config.json is that of a folder that was quantised here."""
    return raw.get("quantization_config") == WRITTEN


def quantise(model: nn.Module, bits: int) -> None:
    """Quantise the linear maps inside the layers of a `Transformer`, in place: symmetric, one scale a row.

    Raises: UserError if bits is not 8, the model is quantised already, or has layers or heads that are not supported.
    """
    if bits != WRITTEN["bits"]:
        raise UserError(_FOUR if bits == 4 else f"bits must be 8, not {bits}")
    problem = next((what for what, found in {
        "is quantised already": model.quantised, "has layers of Transformers": model.borrowed,
        "has layers with experts": model.config.num_experts > 0, "has heads for edits": model.config.edit_heads,
    }.items() if found), None)
    if problem is not None:
        raise UserError(f"this {model.config.family} {problem}, and what can be quantised is a model of our own layers "
                        "with plain feed-forwards, in 16 or 32 bits; use this one as it is")
    _int8_tensor()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    check_dtype(model.dtype)
    model.requires_grad_(False)
    quantize_(model.layers, Int8WeightOnlyConfig(set_inductor_config=False))
    model.quantised = True


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse float16: x @ ints.T is scaled after the sum, which passes 65504."""
    if dtype == torch.float16:
        raise UserError("a quantised model is computed in float32 or bfloat16, because its sums overflow in float16; "
                        "choose another dtype")


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the state with integers in the place of torchao's tensors, their scales [out, 1] fp32 by the same names)."""
    kind = _int8_tensor()
    scales = {name: tensor.scale for name, tensor in state.items() if isinstance(tensor, kind)}
    return {name: tensor.qdata if name in scales else tensor for name, tensor in state.items()}, scales


def write_scales(scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scales by the names that they have in a folder."""
    return {name + _SCALE: scale for name, scale in scales.items()}


def take_scales(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The scales by the names of their weights, which `state` loses.

    Raises: UserError unless every matrix of integers has its scales, and these are [out, 1] fp32.
    """
    scales = {name.removesuffix(_SCALE): state.pop(name) for name in [*state] if name.endswith(".weight" + _SCALE)}
    ints = {name: tensor for name, tensor in state.items() if tensor.dtype == torch.int8}
    unfit = sorted(scales.keys() ^ ints.keys()) or [
        name for name, scale in scales.items() if scale.shape != (len(ints[name]), 1) or scale.dtype != torch.float32]
    if unfit or not scales:
        raise UserError(f"{where}: {unfit[0] if unfit else 'no weight'} has int8 values and fp32 scales that fit each "
                        "other, which config.json promises; quantise the model again")
    return scales


def join(ints: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor of torchao that computes in `dtype` with int8 [out, in] and scales [out, 1]."""
    return _int8_tensor()(ints, scale, [1, ints.shape[1]], dtype)


def _int8_tensor() -> type:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao warns of each library for another GPU than this machine's
    try:
        from torchao.quantization import Int8Tensor
    except ImportError:
        raise UserError("quantised weights need torchao 0.18 or newer: pip install 'dllm[quant]'") from None
    finally:
        logging.disable(before)
    return Int8Tensor
