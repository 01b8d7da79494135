"""Token and confidence of rows of logits in plain PyTorch, by sorting: the definition, and the oracle of the others."""

import torch
from torch import Tensor


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


def score_rows(logits: Tensor, uniform: Tensor | None, confidence: str, temperature: float, top_k: int | None,
               top_p: float | None, raw: bool) -> tuple[Tensor, Tensor]:
    """Token int64 [M] and confidence fp32 [M] of logits [M, V]; see `dllm_kernels.token_scores`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    filtered = filter_logits(logits / temperature if temperature > 0 else logits, top_k, top_p)
    probabilities = filtered.softmax(-1)
    if temperature > 0:
        cumulative = probabilities.double().cumsum(-1)
        tokens = (cumulative <= uniform[:, :1] * cumulative[:, -1:]).sum(-1).clamp(max=logits.shape[1] - 1)
    else:
        tokens = filtered.argmax(-1)
    if confidence == "random":
        return tokens, uniform[:, 1].float()
    if raw:
        probabilities = logits.softmax(-1)
    if confidence == "prob":
        score = probabilities.gather(1, tokens.unsqueeze(1)).squeeze(1)
    elif confidence == "margin":
        best = probabilities.topk(min(2, logits.shape[1])).values
        score = best[:, 0] - best[:, 1] if logits.shape[1] > 1 else best[:, 0]
    else:
        score = torch.xlogy(probabilities, probabilities).sum(-1)
    return tokens, score.float()


def linear_score_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, uniform: Tensor | None,
                      *settings) -> tuple[Tensor, Tensor]:
    """`score_rows` of the logits hidden [M, D] @ weight.T + bias in fp32, some rows at a time."""
    size = max(1, (256 << 20) // (4 * max(len(weight), 1)))
    tokens, scores = [hidden.new_empty(0, dtype=torch.int64)], [hidden.new_empty(0, dtype=torch.float32)]
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = torch.nn.functional.linear(hidden[part].to(dtype), weight, bias)
            token, score = score_rows(logits, None if uniform is None else uniform[part], *settings)
            tokens.append(token)
            scores.append(score)
    return torch.cat(tokens), torch.cat(scores)
