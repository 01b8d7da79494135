"""The loss and its backward from a few numbers per row, which the backends share.

With top = max(z), total = sum(exp(z - top)) and target_logit = z[y] of each corrupted row,
    loss = scale (log(total) + top - target_logit),    d loss / d z[v] = scale (exp(z[v] - top) / total - [v = y]),
where scale is the row's weight, over the number corrupted for a mean. A backend gives two passes over the logits.
N positions, V words, D hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Linear(NamedTuple):
    """Hidden states and the head: the logits are hidden @ weight.T + bias."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class Scored(NamedTuple):
    """The positions to score."""

    targets: Tensor  # [N] int64, read where corrupted
    corrupted: Tensor  # [N] bool
    weights: Tensor | None  # [N]


class Form(NamedTuple):
    """Settings of the loss."""

    reduction: str  # "mean", "sum" or "none"
    softcap: float | None
    workspace_bytes: int | None = None


class Scales(NamedTuple):
    """Numbers [N] that give d loss / d z[v] = exp(z[v] - top) probability - [v = y] target, z after the soft cap."""

    top: Tensor
    probability: Tensor
    target: Tensor


class Passes(NamedTuple):
    """A backend's passes over logits [N, V], or over a `Linear`."""

    statistics: Callable  # (inputs, Scored, Form) -> top, total, target_logit [N], finite throughout
    gradients: Callable  # (inputs, Scored, Form, Scales, wanted) -> a gradient of each input, None where not wanted


def forward(passes: Passes, inputs: Tensor | Linear, scored: Scored, form: Form) -> tuple[Tensor, ...]:
    """The loss, [N] with reduction "none", and the `Scales` of an upstream gradient of 1."""
    top, total, target_logit = passes.statistics(inputs, scored, form)
    scale = scales_of(scored, form.reduction, top.dtype)
    return reduce(total.log() + (top - target_logit), scale, form.reduction), top, scale / total, scale


def backward(passes: Passes, grad: Tensor, scales: Scales, wanted, inputs: Tensor | Linear, scored: Scored,
             form: Form) -> tuple[Tensor | None, ...]:
    grad = torch.where(scored.corrupted, grad, 0)
    scales = Scales(scales.top, scales.probability * grad, scales.target * grad)
    return passes.gradients(inputs, scored, form, scales, wanted)


def reduce(nll: Tensor, scale: Tensor, reduction: str) -> Tensor:
    loss = scale * nll
    return loss if reduction == "none" else loss.sum()


def scales_of(scored: Scored, reduction: str, dtype: torch.dtype) -> Tensor:
    """The factor of each nll [N]: 0 where not corrupted, else the weight, for a mean over the number corrupted."""
    scale = scored.corrupted.to(dtype)
    if scored.weights is not None:
        scale = torch.where(scored.corrupted, scored.weights.to(dtype), 0)
    return scale / scored.corrupted.sum().clamp(min=1) if reduction == "mean" else scale


def with_rows_contiguous(matrix: Tensor) -> Tensor:
    # Not contiguous(), which leaves a single column its stride.
    return matrix if matrix.stride(1) == 1 else matrix.clone(memory_format=torch.contiguous_format)
