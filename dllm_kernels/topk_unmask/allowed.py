"""The words that a position may take (constrained decoding, banned words) as bits: bit v % 32 of number v // 32.

The grammar libraries (XGrammar, llguidance) use this layout; it takes a thirty-second of the logits' memory.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor


def width(words: int) -> int:
    """The int32 numbers that hold a bit for each word."""
    return (words + 31) // 32


def pack(allowed: Tensor) -> Tensor:
    """allowed [..., V] bool as bits, [..., ceil(V / 32)] int32."""
    words = allowed.shape[-1]
    if sys.byteorder != "little":
        raise RuntimeError("packing a bool mask needs a little-endian machine; give `allowed` as int32 bits")
    padded = F.pad(allowed, (0, width(words) * 32 - words)).contiguous()
    # Eight bools are an int64; the product moves the lowest bit of byte i to bit 56 + i.
    octets = (padded.view(torch.int64) * 0x0102040810204080) >> 56
    return octets.to(torch.uint8).view(torch.int32)


def unpack(bits: Tensor, words: int) -> Tensor:
    """[..., V] bool of [..., ceil(V / 32)] int32."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits.unsqueeze(-1) >> shifts & 1).flatten(-2)[..., :words].bool()
