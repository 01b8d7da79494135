"""Counter-based uniforms: Philox-4x32-10 (Salmon et al., SC 2011) in plain PyTorch.

A number depends on its counter alone, so a position draws the same in any batch and on any backend. A denoising step
needs two numbers per position, so they are drawn outside the kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[int | Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words: ten rounds on four 32-bit words, each an int64 tensor below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 products wrap around; their 64 bits are still those of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _LOW) ^ c1 ^ k0, product1 & _LOW
        c2, c3 = ((product0 >> 32) & _LOW) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _LOW, (k1 + _KEY_INCREMENTS[1]) & _LOW
    return c0, c1, c2, c3


def philox_uniform(seed: int | Tensor, sequence: Tensor, step: int | Tensor, position: Tensor) -> Tensor:
    """See `dllm_kernels.philox_uniform`."""
    sequence, position = torch.broadcast_tensors(sequence, position)
    step_word = torch.full_like(position, step) if isinstance(step, int) else step.expand_as(position)
    words = philox((position, step_word, sequence, torch.zeros_like(position)), (seed & _LOW, (seed >> 32) & _LOW))
    pairs = torch.stack((words[0] << 20 | words[1] >> 12, words[2] << 20 | words[3] >> 12), dim=-1)
    return (pairs.double() + 0.5) * 2.0**-52  # exact: 53 bits and the half would round the largest to 1
