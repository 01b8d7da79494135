"""The CUDA C++ backend (csrc/cuda/score_rows.cuh): from logits three launches a step, and no host synchronisation.

A row is read once; filters read it up to 19 times (bf16 11, fp16 13), as in Triton; a sample reads 2 KB of it again.
"""

import torch
from torch import Tensor

from .. import native_extension
from ..dispatch import takes
from .settings import CONFIDENCES, Rows, Sampling, Selection

MOST_WORDS = 1 << 20  # kMostWords


def missing() -> str | None:
    return native_extension.why_missing_on_cuda("score_rows_cuda")


def refuses(logits: Tensor) -> str | None:
    if reason := takes("cuda")(logits):
        return reason
    return f"takes at most {MOST_WORDS} words, not {logits.shape[-1]}" if logits.shape[-1] > MOST_WORDS else None


def score_rows(logits: Tensor, rows: Rows, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Token int64 [n] and confidence fp32 [n]; missing rows as in `triton_kernels.score_rows`."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    n = len(logits) if rows.index is None else len(rows.index)
    token, score = logits.new_empty(n, dtype=torch.int64), logits.new_empty(n, dtype=torch.float32)
    settings, rows = sampling.effective(logits.shape[1], rows.allowed is not None), rows.readable()
    native_extension.operators().score_rows_cuda(
        logits, rows.index, rows.uniform, rows.allowed, token, score, CONFIDENCES.index(sampling.confidence),
        settings.temperature or 0.0, settings.filtered, settings.top_k, settings.top_p, settings.raw)
    return token, score


def find_rows(tokens: Tensor, mask_token_id: int, packed: bool) -> tuple[Tensor, Tensor]:
    """As `triton_kernels.find_rows`, in one launch."""
    tokens = tokens.contiguous()
    masked = torch.empty_like(tokens, dtype=torch.bool)
    rows = tokens.new_empty(tokens.numel())
    native_extension.operators().find_rows_cuda(tokens, mask_token_id, packed, masked, rows)
    return masked, rows


def commit(tokens: Tensor, masked: Tensor, token: Tensor, confidence: Tensor, selection: Selection,
           uniform: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `selection.commit`, in one launch: a position's rank is the count of positions ahead of it."""
    tokens, masked, token, confidence, k = (x.contiguous() for x in (tokens, masked, token, confidence, selection.k))
    filled, committed = torch.empty_like(tokens), torch.empty_like(masked)
    drawn = uniform.contiguous() if selection.selection_temperature > 0 else None
    native_extension.operators().commit_cuda(
        tokens, masked, token, confidence, k, drawn, selection.selection_temperature, selection.threshold, filled,
        committed)
    return filled, confidence, committed
