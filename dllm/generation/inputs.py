"""Prompts as callers have them: tensors, lists, arrays or what a tokenizer returns, checked and made [B, P]."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dllm.errors import UserError, first_line
from dllm.model.transformer import Transformer


def read_prompts(model: Transformer, inputs: Any, attention_mask: Any = None, *,
                 name: str = "inputs") -> tuple[Tensor, Tensor | None]:
    """Token ids [B, P] int64 and their mask [B, P] bool (None: no padding), on the model's device.

    Args:
        inputs: ids [B, P] or [P] of any whole type, as a tensor, an array or lists; or a tokenizer's output, whose own
            attention_mask counts where none is given.
        attention_mask: of the same shape, one where there is a token and zero where there is padding.
    Raises: UserError in one sentence, for anything else; for ids outside the vocabulary, unless they are padding.
    """
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise UserError(f"{name} must have input_ids, not only {', '.join(map(str, inputs))}")
        if attention_mask is None:
            attention_mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
    ids = to_tensor(name, inputs)
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole and ids.numel():
        raise UserError(f"{name} must be token ids, whole numbers, not {ids.dtype}; give what the tokenizer gives as "
                        "input_ids")
    if ids.ndim not in (1, 2) or not len(ids) and ids.ndim == 2:
        raise UserError(f"{name} must be token ids [B, P] or [P], not {list(ids.shape)}")
    mask = None if attention_mask is None else read_mask(attention_mask, ids, name).to(model.device)
    ids = (ids.unsqueeze(0) if ids.ndim == 1 else ids).to(model.device, torch.long)
    words = model.config.vocab_size
    outside = (ids < 0) | (ids >= words)
    if mask is not None:
        mask = mask.reshape(ids.shape)
        ids, outside = ids.clamp(0, words - 1).where(outside & ~mask, ids), outside & mask
    if outside.any():
        raise UserError(f"{name} have the id {int(ids[outside][0])}, outside the model's vocabulary of {words}; use "
                        "the model's own tokenizer")
    return ids, mask


def read_mask(mask: Any, ids: Tensor, ids_name: str, name: str = "attention_mask",
              ones: str = "where there is a token and zero where there is padding") -> Tensor:
    """bool, of the shape of ids; the batch of one row may be left out of either."""
    mask = to_tensor(name, mask, "ones and zeros")
    if [1] * (2 - mask.ndim) + list(mask.shape) != [1] * (2 - ids.ndim) + list(ids.shape):
        raise UserError(f"{name} has the shape {list(mask.shape)}, {ids_name} {list(ids.shape)}; they must be the same")
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError(f"{name} must be one {ones}, and nothing else")
    return mask.bool().reshape(ids.shape)


def to_tensor(name: str, values: Any, wanted: str = "token ids") -> Tensor:
    if isinstance(values, Tensor):
        return values
    if values is None or isinstance(values, str | bytes) or isinstance(values, list | tuple) and any(
            isinstance(item, str | bytes) for item in values):
        raise UserError(f"{name} must be {wanted}, not {'missing' if values is None else 'text'}; give what the "
                        "tokenizer makes of the text")
    if hasattr(values, "tolist"):  # an array: torch takes no reversed, read-only, big-endian or object ones
        values = values.tolist()
    if isinstance(values, list | tuple):
        values = [item.tolist() if hasattr(item, "tolist") else item for item in values]
        lengths = sorted({len(row) for row in values if isinstance(row, list | tuple)})
        if len(lengths) > 1:
            raise UserError(f"{name} have rows of {lengths[0]} to {lengths[-1]} ids; pad them to one length, and give "
                            "the attention_mask")
    try:
        return torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{name} must be {wanted} [B, P] or [P], not this {type(values).__name__} "
                        f"({first_line(error)})") from None
