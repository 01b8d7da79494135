"""The number by which a row of a batch draws its random numbers: of its content, and of how many equal rows precede it.

A row's text therefore does not depend on the other rows, and equal rows draw different texts.
"""

import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def contents_of(canvas: Tensor, mask: Tensor | None) -> list[bytes]:
    """The tokens of each row of [B, L], without padding."""
    canvas = canvas.cpu()
    mask = torch.ones_like(canvas, dtype=torch.bool) if mask is None else mask.cpu()
    return [row[real].numpy().tobytes() for row, real in zip(canvas, mask, strict=True)]


def name_rows(contents: Sequence[bytes], numbers: Tensor) -> Tensor:
    """[B] int64 below 2**32: by what rows of these contents, with these numbers [B] among equal ones, draw."""
    return (torch.tensor([zlib.crc32(content) for content in contents], device="cpu") + numbers) % 2**32


def number_equal(contents: Sequence[bytes]) -> Tensor:
    """[B] int64: how many rows before each have the same content."""
    seen: Counter[bytes] = Counter()
    numbers = []
    for content in contents:
        numbers.append(seen[content])
        seen[content] += 1
    return torch.tensor(numbers, dtype=torch.long, device="cpu")


def draw_seed() -> int:
    """A seed from torch's global generator; torch.manual_seed makes it repeatable."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))
