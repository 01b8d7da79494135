"""The C++ backend on the CPU: one pass over the words for all rows, in parallel (csrc/cpu/denoiser_statistics.cpp)."""

import torch
from torch import Tensor

from .. import native_extension
from .settings import Inputs, Results


def statistics(inputs: Inputs, uniform: Tensor, soft: bool) -> Results:
    """As `reference.statistics`, with fp32 products whatever the dtype."""
    hidden, weight = inputs.hidden.float().contiguous(), inputs.weight
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    token, argmax = (torch.empty(len(hidden), dtype=torch.int64) for _ in range(2))
    entropy, log_normaliser = (torch.empty(len(hidden), dtype=torch.float32) for _ in range(2))
    found = torch.empty_like(hidden) if soft else None
    native_extension.operators().denoiser_statistics_cpu(
        hidden, weight, inputs.temperature.contiguous(), uniform.contiguous(), inputs.softcap or 0.0, token, argmax,
        entropy, log_normaliser, found)
    return Results(token, argmax, entropy, log_normaliser,
                   hidden.new_empty(0, dtype=weight.dtype) if found is None else found.to(weight.dtype))


def soft_embedding(inputs: Inputs, log_normaliser: Tensor) -> Tensor:
    """As `reference.soft_embedding`. The pass sums exp(z) itself, so it does not need the log-normaliser."""
    return statistics(inputs, torch.zeros_like(log_normaliser, dtype=torch.float64), soft=True).soft
