"""The C++ backend on the CPU: one pass over each row, in parallel (csrc/cpu/topk_unmask.cpp).

From hidden states the logits stay in the cache, a block of words at a time; top-k and top-p read a row several times,
so the logits of some rows are then stored.
"""

import torch
from torch import Tensor

from .. import native_extension
from .settings import CONFIDENCES, Rows, Sampling

_WORKSPACE_BYTES = 64 << 20  # of logits, for the filters
_MAX_ROWS = 128  # of one product, so that the hidden rows stay in the cache


def score_rows(logits: Tensor, rows: Rows, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """As `reference.score_rows`."""
    token, score = _outputs(logits if rows.index is None else rows.index)
    _score_into(logits if logits.stride(-1) == 1 else logits.contiguous(), rows.readable(), sampling, token, score)
    return token, score


def linear_score_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows,
                      sampling: Sampling) -> tuple[Tensor, Tensor]:
    """As `reference.linear_score_rows`, with fp32 products whatever the dtype."""
    hidden = (hidden if rows.index is None else hidden[rows.index]).float().contiguous()
    rows = rows._replace(index=None).readable()
    bias = None if bias is None else bias.float().contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    token, score = _outputs(hidden)
    words = len(weight)
    if not sampling.has_filters(words):
        native_extension.operators().linear_score_rows_cpu(
            hidden, weight, bias, rows.uniform, rows.allowed, token, score, CONFIDENCES.index(sampling.confidence),
            sampling.temperature, sampling.raw)
        return token, score
    size = min(_MAX_ROWS, max(8, _WORKSPACE_BYTES // (4 * words)))
    buffer = torch.empty(min(size, len(hidden)), words, dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), size):
        some = slice(start, start + size)
        logits = buffer[:len(hidden[some])]
        native_extension.operators().linear_rows_cpu(hidden[some], weight, bias, logits)
        _score_into(logits, rows.part(some), sampling, token[some], score[some])
    return token, score


def _outputs(rows: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(len(rows), dtype=dtype, device=rows.device) for dtype in (torch.int64, torch.float32))


def _score_into(logits: Tensor, rows: Rows, sampling: Sampling, token: Tensor, score: Tensor) -> None:
    native_extension.operators().score_rows_cpu(
        logits, rows.index, rows.uniform, rows.allowed, token, score, CONFIDENCES.index(sampling.confidence),
        sampling.temperature, sampling.top_k or 0, 1.0 if sampling.top_p is None else sampling.top_p, sampling.raw)
