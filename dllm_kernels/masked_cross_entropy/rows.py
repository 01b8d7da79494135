"""What the backends of the loss have in common: its inputs, its scales, and what they keep for the backward.

With top = max(z), total = sum(exp(z - top)) and target_logit = z[y] of each corrupted row,
    loss = scale nll,    nll = log(total) + top - target_logit,
    d loss / d z[v] = scale (exp(z[v] - top) / total - [v = y]),
where scale is the row's weight, over the number corrupted for a mean.
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
    probability_weights: Tensor | None = None  # [N]
    count: int | None = None  # how many are corrupted, where the caller knows


class Form(NamedTuple):
    """Settings of the loss."""

    reduction: str  # "mean", "sum" or "none"
    softcap: float | None
    workspace_bytes: int | None = None


class Scale(NamedTuple):
    """The factor of each nll: plain + of_probability exp(-nll), of which no gradient is taken."""

    plain: Tensor  # [N], 0 where not corrupted
    of_probability: Tensor | None  # [N], 0 where not corrupted

    def at(self, nll: Tensor) -> Tensor:
        return self.plain if self.of_probability is None else self.plain + self.of_probability * (-nll).exp()

    def times(self, factor: Tensor) -> "Scale":
        return Scale(*(None if x is None else x * factor for x in self))


class Scales(NamedTuple):
    """Numbers [N] that give d loss / d z[v] = exp(z[v] - top) probability - [v = y] target, z after the soft cap."""

    top: Tensor
    probability: Tensor
    target: Tensor


Kept = tuple[Tensor, Tensor, Tensor, Tensor]  # what a forward hands to its backward; empty tensors fill the rest


class Passes(NamedTuple):
    """How a backend computes the loss of logits [N, V], or of a `Linear`."""

    forward: Callable  # (inputs, Scored, Form, wanted) -> nll [N], 0 where not corrupted, and what is `Kept`
    backward: Callable  # (grad, Kept, inputs, Scored, Form, wanted) -> a gradient of each input, None where not wanted
    shapes: Callable  # (inputs, Scored, Form, wanted) -> (shape, dtype) of what is kept


def two_passes(statistics: Callable, gradients: Callable) -> Passes:
    """Passes of a backend that reads the logits once in the forward and once more in the backward.

    Args:
        statistics: (inputs, Scored, Form) -> top, total, target_logit [N], finite throughout.
        gradients: (inputs, Scored, Form, Scales, wanted) -> a gradient of each input, None where not wanted.
    """
    def forward(inputs: Tensor | Linear, scored: Scored, form: Form, wanted) -> tuple[Tensor, Kept]:
        top, total, target_logit = statistics(inputs, scored, form)
        nll = total.log() + (top - target_logit)
        scale = scale_of(scored, form.reduction, nll.dtype).at(nll)
        return nll, (top, scale / total, scale, top.new_empty(0))

    def backward(grad: Tensor, kept: Kept, inputs: Tensor | Linear, scored: Scored, form: Form,
                 wanted) -> tuple[Tensor | None, ...]:
        top, probability, target, _ = kept
        grad = torch.where(scored.corrupted, grad, 0)
        return gradients(inputs, scored, form, Scales(top, probability * grad, target * grad), wanted)

    def shapes(inputs: Tensor | Linear, scored: Scored, form: Form, wanted):
        return *[(scored.targets.shape, sums_dtype(inputs))] * 3, ((0,), sums_dtype(inputs))

    return Passes(forward, backward, shapes)


def sums_dtype(inputs: Tensor | Linear) -> torch.dtype:
    return torch.promote_types((inputs if isinstance(inputs, Tensor) else inputs.hidden).dtype, torch.float32)


def scale_of(scored: Scored, reduction: str, dtype: torch.dtype) -> Scale:
    """0 where not corrupted, else the weight, for a mean over the number corrupted."""
    corrupted = scored.corrupted
    plain = corrupted.to(dtype) if scored.weights is None else torch.where(corrupted, scored.weights.to(dtype), 0)
    of_probability = scored.probability_weights
    if of_probability is not None:
        of_probability = torch.where(corrupted, of_probability.to(dtype), 0)
    count = corrupted.sum().clamp(min=1) if reduction == "mean" else 1
    return Scale(plain / count, None if of_probability is None else of_probability / count)


def with_rows_contiguous(matrix: Tensor) -> Tensor:
    # Not contiguous(), which leaves a single column its stride.
    return matrix if matrix.stride(1) == 1 else matrix.clone(memory_format=torch.contiguous_format)
