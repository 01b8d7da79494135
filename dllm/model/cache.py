"""Keys and values that are not computed again in every denoising step.

In a block-causal model finished blocks never see later ones, so their keys and values stay what they are: that cache
changes no token. In a model that attends in both directions everywhere, those outside the block being denoised change a
little with every commit; taking them as they were when the block began is Fast-dLLM's approximation (arXiv:2505.22618).
"""

import torch
from torch import Tensor

from dllm.families import ModelConfig


class KeyValueCache:
    """Of each layer the keys (rotated) and values of B rows and `capacity` positions.

    grows: the positions from `start` on are new, and see none after them. Otherwise they are put in the place of those
    that were there, and see all.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor, *, grows: bool):
        shape = (config.num_hidden_layers, 2, rows, capacity, config.num_key_value_heads, config.head_dim)
        self.content = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.grows = grows
        self.start = 0  # where the positions computed now belong
        self.rows: Tensor | None = None  # [R] int64: the rows that are computed now; None: all

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v [R, n, Hkv, E] of the n positions from `start` on.

        Returns: views of the keys and values [B, seen, Hkv, E] that these may see, of all rows: attention takes `rows`.
        """
        keys, values = self.content[layer]
        end = self.start + k.shape[1]
        rows = slice(None) if self.rows is None else self.rows
        keys[rows, self.start:end], values[rows, self.start:end] = k, v
        seen = end if self.grows else keys.shape[1]
        return keys[:, :seen], values[:, :seen]
