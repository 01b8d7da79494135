"""The rotary embedding (arXiv:2104.09864), in the half-rotation layout."""

import math

import torch
from torch import Tensor

from dllm.model.families import ModelConfig


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first numbers of each head of x [B, L, H, E], as many as cos and sin [B, L, 1, rotary_dim] have."""
    turned, kept = x.tensor_split([cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


class Rotary:
    """The tables that `rotate` takes."""

    def __init__(self, config: ModelConfig):
        exponents = torch.arange(0, config.rotary_dim, 2, device="cpu").float() / config.rotary_dim
        self.frequencies = 1.0 / config.rope_theta**exponents  # angle per position of each pair
        scaling = config.rope_scaling
        if scaling is not None and scaling["rope_type"] == "linear":
            self.frequencies /= scaling["factor"]
        elif scaling is not None:
            # As in Llama 3: wavelengths above the first bound are stretched, those below the second kept.
            wavelengths = 2 * math.pi / self.frequencies
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            blend = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
            blend = blend.clamp(0, 1)
            self.frequencies *= blend + (1 - blend) / scaling["factor"]

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, L, 1, rotary_dim] of positions [B, L], computed in fp32."""
        self.frequencies = self.frequencies.to(position_ids.device)
        angles = position_ids.float().unsqueeze(-1) * self.frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        return angles.cos().to(dtype), angles.sin().to(dtype)
