"""The C++ backend on the CPU: one pass over each row, in parallel over rows (csrc/cpu/topk_unmask.cpp, linear.cpp)."""

import torch
from torch import Tensor

from dllm_kernels import library

_CONFIDENCES = ("prob", "margin", "entropy", "random")
_WORKSPACE_BYTES = 64 << 20  # of logits between the product with the head and the pass over them
_MAX_ROWS = 128  # in one product, so that the hidden rows stay in the cache


def missing() -> str | None:
    return library.why_missing()


def refuses(tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return "needs a CPU tensor"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, not {tensor.dtype}"
    return None


def score_rows(logits: Tensor, uniform: Tensor | None, confidence: str, temperature: float, top_k: int | None,
               top_p: float | None, raw: bool) -> tuple[Tensor, Tensor]:
    """As `reference.score_rows`."""
    tokens = torch.empty(len(logits), dtype=torch.int64)
    scores = torch.empty(len(logits), dtype=torch.float32)
    _score_into(logits, uniform, tokens, scores, confidence, temperature, top_k, top_p, raw)
    return tokens, scores


def linear_score_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, uniform: Tensor | None,
                      *settings) -> tuple[Tensor, Tensor]:
    """As `reference.linear_score_rows`, with fp32 products whatever the dtype."""
    tokens = torch.empty(len(hidden), dtype=torch.int64)
    scores = torch.empty(len(hidden), dtype=torch.float32)
    hidden, bias = hidden.float().contiguous(), None if bias is None else bias.float().contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows = min(_MAX_ROWS, max(8, _WORKSPACE_BYTES // (4 * max(len(weight), 1))))
    buffer = torch.empty(min(rows, len(hidden)), len(weight))
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = buffer[: len(hidden[part])]
        library.operators().linear_rows_cpu(hidden[part], weight, bias, logits)
        _score_into(logits, None if uniform is None else uniform[part], tokens[part], scores[part], *settings)
    return tokens, scores


def _score_into(logits, uniform, tokens, scores, confidence, temperature, top_k, top_p, raw):
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    uniform = None if uniform is None else uniform.contiguous()
    top_p = 1.0 if top_p is None else top_p
    library.operators().score_rows_cpu(logits, uniform, tokens, scores, _CONFIDENCES.index(confidence), temperature,
                                       top_k or 0, top_p, raw)
