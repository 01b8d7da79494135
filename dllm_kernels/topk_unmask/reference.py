"""Token and confidence of rows of logits in plain PyTorch, by sorting: the definition, and the oracle of the others."""

import torch
from torch import Tensor

from dllm_kernels.topk_unmask.allowed import unpack


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """[M, V] with -inf where top-p, then top-k, drop a token.

    top_p: tokens in falling order of probability, the lowest id first among equals; one is dropped if those before it
    already have more than top_p together. top_k: those below the k-th largest are dropped; its equals stay.
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


def score_rows(logits: Tensor, rows: Tensor | None, uniform: Tensor | None, allowed: Tensor | None, confidence: str,
               temperature: float, top_k: int | None, top_p: float | None, raw: bool) -> tuple[Tensor, Tensor]:
    """Token int64 [M] and confidence fp32 [M]; see `dllm_kernels.token_scores`.

    Args:
        logits: [R, V]. rows: [M] int64, those of the logits that are scored; None: all.
        uniform: [M, 2]. allowed: [M, ceil(V / 32)] int32 bits, see `allowed.py`.
    """
    logits = logits if rows is None else logits[rows]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tempered = logits / temperature if temperature > 0 else logits
    if allowed is not None:
        tempered = tempered.masked_fill(~unpack(allowed, logits.shape[1]), -torch.inf)
    filtered = filter_logits(tempered, top_k, top_p)
    probabilities = filtered.softmax(-1)
    possible = probabilities.sum(-1) > 0  # not NaN
    if temperature > 0:
        cumulative = probabilities.double().cumsum(-1)
        tokens = (cumulative <= uniform[:, :1] * cumulative[:, -1:]).sum(-1).clamp(max=logits.shape[1] - 1)
    else:
        tokens = filtered.argmax(-1)
    if confidence == "random":
        score = uniform[:, 1]
    else:
        score = _confidence(logits.softmax(-1) if raw else probabilities, tokens, confidence)
    return tokens, torch.where(possible, score, torch.nan).float()


def _confidence(probabilities, tokens, confidence):
    if confidence == "prob":
        return probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1)
    if confidence == "margin":
        best = probabilities.topk(min(2, probabilities.shape[1])).values
        return best[:, 0] - best[:, 1] if probabilities.shape[1] > 1 else best[:, 0]
    return torch.xlogy(probabilities, probabilities).sum(-1)


def linear_score_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, uniform: Tensor | None,
                      allowed: Tensor | None, *settings) -> tuple[Tensor, Tensor]:
    """`score_rows` of the logits hidden [R, D] @ weight.T + bias in fp32, some rows at a time."""
    hidden = hidden if rows is None else hidden[rows]
    size = max(1, (256 << 20) // (4 * max(len(weight), 1)))
    tokens, scores = [hidden.new_empty(0, dtype=torch.int64)], [hidden.new_empty(0, dtype=torch.float32)]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = torch.nn.functional.linear(hidden[part].to(dtype), weight, bias)
            drawn, bits = (None if x is None else x[part] for x in (uniform, allowed))
            token, score = score_rows(logits, None, drawn, bits, *settings)
            tokens.append(token)
            scores.append(score)
    return torch.cat(tokens), torch.cat(scores)
