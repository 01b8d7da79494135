"""The rotary embedding (arXiv:2104.09864), in the half-rotation layout, and its scalings, as in Transformers."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.model.families import ModelConfig
from dllm.model.rope_settings import QUERY_SCALING


class Turn(NamedTuple):
    """What is done to queries and keys at their positions."""

    cos: Tensor  # [B, L, 1, rotary_dim]
    sin: Tensor
    query_scale: Tensor | None  # [B, L, 1, 1], times the queries; None: 1


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first numbers of each head of x [B, L, H, E], as many as cos and sin [B, L, 1, rotary_dim] have."""
    turned, kept = x.tensor_split([cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


class Rotary:
    """The tables that `rotate` takes."""

    def __init__(self, config: ModelConfig):
        periods = config.rope_theta ** (torch.arange(0, config.rotary_dim, 2, device="cpu").float() / config.rotary_dim)
        self.frequencies = 1.0 / periods  # angle per position of each pair
        self.length = 1.0  # of a turned head, times what it was
        self.scaling = config.rope_scaling or {}
        kind = self.scaling.get("rope_type")
        if kind == "linear":
            self.frequencies /= self.scaling["factor"]
        elif kind == "llama3":
            self.frequencies *= llama3_factors(self.frequencies, self.scaling)
        elif kind == "yarn":
            self.frequencies = yarn_frequencies(periods, config.rope_theta, self.scaling)
            self.length = yarn_length(self.scaling)

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> Turn:
        """The tables for positions [B, L], computed in fp32."""
        self.frequencies = self.frequencies.to(position_ids.device)
        angles = position_ids.float().unsqueeze(-1) * self.frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        scale = None
        if (beta := self.scaling.get(QUERY_SCALING)) is not None:  # Llama 4: longer texts get sharper attention
            times = torch.floor(position_ids.float() / self.scaling["original_max_position_embeddings"])
            scale = (1 + beta * torch.log1p(times))[..., None, None].to(dtype)
        return Turn((angles.cos() * self.length).to(dtype), (angles.sin() * self.length).to(dtype), scale)


def llama3_factors(frequencies: Tensor, scaling: Mapping) -> Tensor:
    """As in Llama 3: wavelengths above the first bound are stretched, those below the second kept."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    blend = blend.clamp(0, 1)
    return blend + (1 - blend) / scaling["factor"]


def yarn_frequencies(periods: Tensor, theta: float, scaling: Mapping) -> Tensor:
    """YaRN (arXiv:2309.00071): pairs that turn beta_fast times or more over the original positions are kept, those that
    turn beta_slow times or less are stretched, and between the two the share grows with the pair's number."""
    size = 2 * len(periods)

    def pair_of(turns: float) -> float:
        times = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return size * math.log(times) / (2 * math.log(theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    pairs = torch.arange(len(periods), device="cpu").float()
    kept = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
    return 1.0 / (scaling["factor"] * periods) * (1 - kept) + 1.0 / periods * kept


def yarn_length(scaling: Mapping) -> float:
    """YaRN's sharpening of attention, which turned queries and keys share."""
    def sharpening(scale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * scale * math.log(scaling["factor"]) + 1.0

    if (given := scaling.get("attention_factor")) is not None:
        return given
    scale, all_scale = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return sharpening(scale) / sharpening(all_scale) if scale and all_scale else sharpening(1)
