"""Token and confidence of rows of logits in plain PyTorch, by sorting: the definition, and the backends' oracle."""

from collections.abc import Callable

import torch
from torch import Tensor

from .allowed import unpack
from .settings import Rows, Sampling

_CHUNK_BYTES = 256 << 20  # of logits at once


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits [M, V], divided by the temperature, with -inf where top-p, then top-k, drop a token; None drops none.

    top_p drops a token if those before it, in falling order of probability and the lowest id first among equals, have
    more than top_p together. top_k drops the tokens below the k-th largest; its equals stay.
    """
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.double().softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0.0
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if top_k is not None and 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return logits


def score_rows(logits: Tensor, rows: Rows, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Token int64 [n] and confidence fp32 [n] of rows of logits [R, V]; see `dllm_kernels.token_scores`."""
    logits = logits if rows.index is None else logits[rows.index]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tempered = logits / sampling.temperature if sampling.temperature > 0 else logits
    if rows.allowed is not None:
        tempered = tempered.masked_fill(~unpack(rows.allowed, logits.shape[1]), -torch.inf)
    filtered = filter_logits(tempered, sampling.top_k, sampling.top_p)
    probabilities = filtered.softmax(-1)
    possible = probabilities.sum(-1) > 0  # not NaN
    if sampling.temperature > 0:
        cumulative = probabilities.double().cumsum(-1)
        tokens = (cumulative <= rows.uniform[:, :1] * cumulative[:, -1:]).sum(-1).clamp(max=logits.shape[1] - 1)
    else:
        tokens = filtered.argmax(-1)
    if sampling.confidence == "random":
        score = rows.uniform[:, 1]
    else:
        score = _confidence(logits.softmax(-1) if sampling.raw else probabilities, tokens, sampling.confidence)
    return tokens, torch.where(possible, score, torch.nan).float()


def _confidence(probabilities, tokens, confidence):
    if confidence == "prob":
        return probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1)
    if confidence == "margin":
        best = probabilities.topk(min(2, probabilities.shape[1])).values
        return best[:, 0] - best[:, 1] if probabilities.shape[1] > 1 else best[:, 0]
    return torch.xlogy(probabilities, probabilities).sum(-1)


def linear_score_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows,
                      sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`score_rows` of the logits hidden [R, D] @ weight.T + bias in fp32."""
    return in_chunks(lambda logits, some: score_rows(logits, some, sampling), hidden, weight, bias, rows, len(weight))


def in_chunks(score: Callable[[Tensor, Rows], tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor,
              bias: Tensor | None, rows: Rows, words: int) -> tuple[Tensor, Tensor]:
    """`score` of the rows' logits, computed in chunks that would take 256 MiB with this many words."""
    size = max(1, _CHUNK_BYTES // (4 * max(words, 1)))
    hidden, rows = hidden if rows.index is None else hidden[rows.index], rows._replace(index=None)
    found = [(hidden.new_empty(0, dtype=torch.int64), hidden.new_empty(0, dtype=torch.float32))]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, len(hidden), size):
            some = slice(start, start + size)
            found.append(score(torch.nn.functional.linear(hidden[some].to(dtype), weight, bias), rows.part(some)))
    tokens, scores = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(scores)
