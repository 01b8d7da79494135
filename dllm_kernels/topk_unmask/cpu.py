"""The C++ backend on the CPU: one pass over each row, in parallel (csrc/cpu/topk_unmask.cpp).

From hidden states the logits live in the cache, a block of words at a time; with top-k or top-p, which need a row
several times, those of some rows are stored.
"""

import torch
from torch import Tensor

from dllm_kernels import library

_CONFIDENCES = ("prob", "margin", "entropy", "random")
_WORKSPACE_BYTES = 64 << 20  # of logits stored for the filters
_MAX_ROWS = 128  # in one product, so that the hidden rows stay in the cache


def missing() -> str | None:
    return library.why_missing()


def refuses(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return "needs a CPU tensor"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {tensor.dtype}"
    return None


def score_rows(logits: Tensor, rows: Tensor | None, uniform: Tensor | None, allowed: Tensor | None, confidence: str,
               temperature: float, top_k: int | None, top_p: float | None, raw: bool) -> tuple[Tensor, Tensor]:
    """As `reference.score_rows`."""
    rows = None if rows is None else rows.contiguous()
    token, score = _outputs(logits if rows is None else rows)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    _score_into(logits, rows, uniform, allowed, token, score, confidence, temperature, top_k, top_p, raw)
    return token, score


def linear_score_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, uniform: Tensor | None,
                      allowed: Tensor | None, confidence: str, temperature: float, top_k: int | None,
                      top_p: float | None, raw: bool) -> tuple[Tensor, Tensor]:
    """As `reference.linear_score_rows`, with fp32 products whatever the dtype."""
    hidden = (hidden if rows is None else hidden[rows]).float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    token, score = _outputs(hidden)
    words = len(weight)
    if (top_p is None or top_p == 1) and (top_k is None or top_k >= words):
        library.operators().linear_score_rows_cpu(
            hidden, weight, bias, _contiguous(uniform), _bits(allowed), token, score, _CONFIDENCES.index(confidence),
            temperature, raw)
        return token, score
    some = min(_MAX_ROWS, max(8, _WORKSPACE_BYTES // (4 * words)))
    buffer = torch.empty(min(some, len(hidden)), words)
    for start in range(0, len(hidden), some):
        part = slice(start, start + some)
        logits = buffer[: len(hidden[part])]
        library.operators().linear_rows_cpu(hidden[part], weight, bias, logits)
        drawn, bits = (None if x is None else x[part] for x in (uniform, allowed))
        _score_into(logits, None, drawn, bits, token[part], score[part], confidence, temperature, top_k, top_p, raw)
    return token, score


def _outputs(rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows), dtype=torch.float32)


def _score_into(logits, rows, uniform, allowed, token, score, confidence, temperature, top_k, top_p, raw):
    library.operators().score_rows_cpu(
        logits, rows, _contiguous(uniform), _bits(allowed), token, score, _CONFIDENCES.index(confidence), temperature,
        top_k or 0, 1.0 if top_p is None else top_p, raw)


def _contiguous(uniform: Tensor | None) -> Tensor | None:
    return None if uniform is None else uniform.contiguous()


def _bits(allowed: Tensor | None) -> Tensor | None:
    return allowed if allowed is None or allowed.stride(1) == 1 else allowed.contiguous()
