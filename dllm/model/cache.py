"""Keys and values that are not computed again in every denoising step.

In a block-causal model finished blocks never see later ones, so their keys and values stay what they are: that cache
changes no token. In a model that attends in both directions everywhere, those outside the block being denoised change a
little with every commit; taking them as they were when the block began is Fast-dLLM's approximation (arXiv:2505.22618).
"""

import torch
from torch import Tensor

from dllm.errors import UserError
from dllm.model.families import ModelConfig


class KeyValueCache:
    """The keys (rotated) and values of each layer, for B rows and `capacity` positions.

    block_length: of a block-causal model; whole blocks are appended, and see nothing after them. 1 with causal blocks,
        in which no token sees those after it. None: new positions replace those that were there, and see all.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor, block_length: int | None = None):
        shape = (config.num_hidden_layers, 2, rows, capacity, config.num_key_value_heads, config.head_dim)
        self.content = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.block_length = block_length

    def put(self, layer: int, k: Tensor, v: Tensor, start: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep k and v [R, n, Hkv, E] of the n positions from `start` on, in these rows [R] int64 (None: all).

        Returns: views of the keys and values [B, seen, Hkv, E] that these may see, of all rows: attention takes `rows`.
        """
        if k.shape != v.shape or k.shape[2:] != self.content.shape[4:]:
            raise UserError("a cache holds keys and values of one shape, and the layers of this model have others "
                            f"({list(k.shape[2:])} and {list(v.shape[2:])} in layer {layer}, not "
                            f"{list(self.content.shape[4:])}); leave the cache out, or take a model without blocks")
        keys, values = self.content[layer]
        end = start + k.shape[1]
        where = slice(None) if rows is None else rows
        keys[where, start:end], values[where, start:end] = k, v
        seen = keys.shape[1] if self.block_length is None else end
        return keys[:, :seen], values[:, :seen]
