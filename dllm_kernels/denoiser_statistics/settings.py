"""Inputs and results of the denoiser's statistics, as the layers pass them on."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    temperature: Tensor  # [M] fp32
    softcap: float | None


class Results(NamedTuple):
    token: Tensor  # [M] int64
    argmax: Tensor  # [M] int64
    entropy: Tensor  # [M] fp32
    log_normaliser: Tensor  # [M] fp32
    soft: Tensor  # [M, D] in the dtype of the weight, [0] if it is not asked for
