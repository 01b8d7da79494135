"""Keys and values of finished blocks: what a block-causal model need not compute again.

Finished blocks never see later ones, so their keys and values stay what they are: unlike the caches of models that
attend in both directions everywhere, this one changes no token.
"""

import torch
from torch import Tensor

from dllm.families import ModelConfig


class BlockCache:
    """Of each layer the keys (rotated) and values of the first `length` positions of B rows."""

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor):
        shape = (config.num_hidden_layers, 2, rows, capacity, config.num_key_value_heads, config.head_dim)
        self.content = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0  # set by the caller once blocks are finished; what lies behind is overwritten
        self.rows: Tensor | None = None  # [R] int64: the rows that are computed now; None: all

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values [R, length + n, Hkv, E] with those of n new positions, k and v [R, n, Hkv, E], behind.

        The new ones are kept if they are of all rows.
        """
        end = self.length + k.shape[1]
        keys, values = self.content[layer]
        if self.rows is not None:
            return torch.cat((keys[self.rows, :self.length], k), 1), torch.cat((values[self.rows, :self.length], v), 1)
        keys[:, self.length:end], values[:, self.length:end] = k, v
        return keys[:, :end], values[:, :end]
