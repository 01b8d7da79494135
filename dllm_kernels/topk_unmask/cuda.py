"""The CUDA C++ backend from logits (csrc/cuda/score_rows.cuh): three launches a step, and no host synchronisation.

A row is read once; with filters up to 19 times (bf16 11, fp16 13), as in Triton; a sample reads 2 KB of it again.
"""

import torch
from torch import Tensor

from dllm_kernels import library
from dllm_kernels.topk_unmask.settings import effective

_CONFIDENCES = ("prob", "margin", "entropy", "random")
MOST_WORDS = 1 << 20  # kMostWords


def missing() -> str | None:
    return library.why_missing_on_cuda("score_rows_cuda")


def refuses(logits: Tensor) -> str | None:
    if not logits.is_cuda:
        return "needs a CUDA tensor"
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {logits.dtype}"
    if logits.shape[-1] > MOST_WORDS:
        return f"takes at most {MOST_WORDS} words, not {logits.shape[-1]}"
    return None


def score_rows(logits: Tensor, rows: Tensor | None, uniform: Tensor | None, allowed: Tensor | None, confidence: str,
               temperature: float, top_k: int | None, top_p: float | None, raw: bool) -> tuple[Tensor, Tensor]:
    """Token int64 [n] and confidence fp32 [n]; arguments and missing rows as in `triton_kernels.score_rows`."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    n = len(logits) if rows is None else len(rows)
    token, score = logits.new_empty(n, dtype=torch.int64), logits.new_empty(n, dtype=torch.float32)
    settings = effective(logits.shape[1], allowed is not None, confidence, temperature, top_k, top_p, raw)
    rows, uniform = (None if x is None else x.contiguous() for x in (rows, uniform))
    if allowed is not None and allowed.stride(-1) != 1:
        allowed = allowed.contiguous()
    library.operators().score_rows_cuda(
        logits, rows, uniform, allowed, token, score, _CONFIDENCES.index(confidence), settings.temperature or 0.0,
        settings.filtered, settings.top_k, settings.top_p, settings.raw)
    return token, score


def find_rows(tokens: Tensor, mask_token_id: int, packed: bool) -> tuple[Tensor, Tensor]:
    """As `triton_kernels.find_rows`, in one launch."""
    tokens = tokens.contiguous()
    masked = torch.empty_like(tokens, dtype=torch.bool)
    rows = tokens.new_empty(tokens.numel())
    library.operators().find_rows_cuda(tokens, mask_token_id, packed, masked, rows)
    return masked, rows


def commit(tokens: Tensor, masked: Tensor, token: Tensor, confidence: Tensor, k: Tensor, selection_temperature: float,
           threshold: float | None, uniform: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `selection.commit`, in one launch: a position's rank is the number of positions ahead of it, counted."""
    tokens, masked, token, confidence, k = (x.contiguous() for x in (tokens, masked, token, confidence, k))
    filled, committed = torch.empty_like(tokens), torch.empty_like(masked)
    drawn = uniform.contiguous() if selection_temperature > 0 else None
    library.operators().commit_cuda(tokens, masked, token, confidence, k, drawn, selection_temperature, threshold,
                                    filled, committed)
    return filled, confidence, committed
