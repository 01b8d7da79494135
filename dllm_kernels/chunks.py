"""Rows of logits stored a chunk at a time: how many there are in one, and the memory for them."""

import torch
from torch import Tensor

WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 896 << 20}  # by default, for the logits of a chunk
ROWS = 128  # a chunk has a multiple of as many, where the workspace has room for them
ALIGNED = 16  # bytes: rows of the logits begin at multiples, for wide reads and the products


def rows_of_chunk(rows: int, bytes_of_row: int, room: int) -> int:
    """How many rows of logits a chunk has, so that `rows` make chunks of equal size."""
    fitting = max(1, room // max(bytes_of_row, 1))
    if fitting < ROWS:
        return fitting
    chunks = max(-(-rows // (fitting - fitting % ROWS)), 1)
    return max(-(-rows // (chunks * ROWS)), 1) * ROWS


def slices_of_rows(rows: int, words: int, device: torch.device) -> list[slice]:
    """Slices of so many rows whose fp32 logits fit the workspace of the device; of no rows an empty one."""
    size = rows_of_chunk(rows, 4 * words, WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"]))
    return [slice(start, start + size) for start in range(0, max(rows, 1), size)]


def empty_logits(like: Tensor, rows: int, words: int, dtype: torch.dtype) -> Tensor:
    """[rows, words] on the device of `like`."""
    per_row = ALIGNED // dtype.itemsize
    return like.new_empty(rows, -(-words // per_row) * per_row, dtype=dtype)[:, :words]
