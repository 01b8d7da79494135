"""The C++ backend on the CPU (csrc/cpu/masked_cross_entropy.cpp), with fp32 products whatever the dtype.

From hidden states the logits are never stored, so there is no workspace: the backward computes them again, which at the
processor's full width is faster than keeping them in memory.
"""

import torch
from torch import Tensor

from .. import native_extension
from .rows import Form, Linear, Scales, Scored, with_rows_contiguous

ROWS_AT_ONCE = 4096  # in the backward, because each thread holds gradients of all of them


def statistics(logits: Tensor, scored: Scored, form: Form) -> tuple[Tensor, ...]:
    rows, found = _corrupted(scored), _statistics(scored)
    native_extension.operators().cross_entropy_statistics_cpu(
        with_rows_contiguous(logits), rows, scored.targets, form.softcap or 0.0, *found)
    return found


def gradients(logits: Tensor, scored: Scored, form: Form, scales: Scales, wanted) -> tuple[Tensor]:
    rows = _corrupted(scored)
    out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    native_extension.operators().cross_entropy_gradients_cpu(
        with_rows_contiguous(logits), rows, scored.targets, form.softcap or 0.0, *scales, out)
    return out,


def linear_statistics(inputs: Linear, scored: Scored, form: Form) -> tuple[Tensor, ...]:
    rows, found = _corrupted(scored), _statistics(scored)
    native_extension.operators().linear_cross_entropy_statistics_cpu(
        inputs.hidden[rows].float(), *_head(inputs), rows, scored.targets, form.softcap or 0.0, *found)
    return found


def linear_gradients(inputs: Linear, scored: Scored, form: Form, scales: Scales, wanted) -> tuple[Tensor | None, ...]:
    rows = _corrupted(scored)
    hidden, weight, bias = inputs
    several = len(rows) > ROWS_AT_ONCE
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
    grad_weight = (torch.zeros if several or not len(rows) else torch.empty)(
        weight.shape, dtype=torch.float32, device="cpu") if wanted[1] else None
    grad_bias = torch.zeros(len(weight), dtype=torch.float32, device="cpu") if wanted[2] else None
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        x = hidden[rows[part]].float()
        grad_x = torch.empty_like(x) if wanted[0] else None
        native_extension.operators().linear_cross_entropy_gradients_cpu(
            x, *_head(inputs), rows[part], scored.targets, form.softcap or 0.0, *scales, grad_x, grad_weight,
            grad_bias, several)
        if grad_x is not None:
            grad_hidden.index_copy_(0, rows[part], grad_x.to(hidden.dtype))
    return (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype))


def _corrupted(scored: Scored) -> Tensor:
    """The corrupted rows [M]."""
    return scored.corrupted.nonzero().squeeze(1)


def _statistics(scored: Scored) -> tuple[Tensor, Tensor, Tensor]:
    """top, total and target_logit [N] of positions without words; the kernels write those of the corrupted rows."""
    return tuple(torch.full((len(scored.corrupted),), elsewhere, dtype=torch.float32, device="cpu")
                 for elsewhere in (0.0, 1.0, 0.0))


def _head(inputs: Linear) -> tuple[Tensor, Tensor | None]:
    return with_rows_contiguous(inputs.weight), None if inputs.bias is None else inputs.bias.float().contiguous()
