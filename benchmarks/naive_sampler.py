"""Baselines of bench_sampler.py: denoising as Open-dLLM, LLaDA and Fast-dLLM do it, written from their behaviour.

Every step of Open-dLLM runs the model on the whole canvas, multiplies the head at every position, shifts a copy of the
logits, filters by sorting the vocabulary, and takes the softmax of all rows in fp32. A step that commits nothing runs
too. Random numbers come from torch's global generator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.model.cache import KeyValueCache
from dllm.model.layouts import Cached


def filter_and_score(logits: Tensor, temperature: float, top_p: float | None, top_k: int | None, confidence: str):
    """Token and confidence of each row of logits [M, V] by sorting and a full softmax."""
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        cumulative = ordered.softmax(-1).cumsum(-1)
        drop = cumulative > top_p
        drop = torch.cat((torch.zeros_like(drop[:, :1]), drop[:, :-1]), 1)
        drop = torch.zeros_like(drop).scatter(1, order, drop)
        logits = logits.masked_fill(drop, torch.finfo(logits.dtype).min)
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = logits.masked_fill(logits < kth, torch.finfo(logits.dtype).min)
    probabilities = logits.float().softmax(-1)
    if temperature > 0:
        tokens = torch.distributions.Categorical(probs=probabilities).sample()
        chosen = probabilities.gather(1, tokens[:, None]).squeeze(1)
    else:
        chosen, tokens = probabilities.max(-1)
    if confidence == "margin":
        ordered = probabilities.sort(descending=True)[0]
        chosen = ordered[:, 0] - ordered[:, 1]
    elif confidence == "entropy":
        chosen = (probabilities * probabilities.clamp(min=1e-10).log()).sum(-1)
    return tokens, chosen


@torch.no_grad()
def naive_denoise(model, canvas: Tensor, *, steps: int, alg: str = "entropy", temperature: float = 0.0,
                  top_p: float | None = None, top_k: int | None = None, eps: float = 1e-3) -> tuple[Tensor, int]:
    """Fill the canvas [B, L]; returns the tokens and the number of forward passes."""
    mask_token_id, x = model.mask_token_id, canvas.clone()
    fixed = x != mask_token_id
    times = torch.linspace(1, eps, steps + 1)
    for i in range(steps):
        masked = x == mask_token_id
        if not masked.any():
            return x, i
        logits = model(x).logits
        logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
        if alg == "p2":
            tokens, scores = filter_and_score(logits.flatten(0, 1), temperature, top_p, top_k, "prob")
            tokens, scores = tokens.view_as(x), scores.view(x.shape).masked_fill(fixed, torch.inf)
            count = ((~fixed).sum(1).float() * (1 - (i + 1) / steps)).floor().long()
            order = scores.argsort(dim=1, stable=True)
            remask = torch.zeros_like(masked).scatter(1, order, torch.arange(x.shape[1]) < count[:, None])
            x = torch.where(masked & ~remask, tokens, x).masked_fill(remask, mask_token_id)
            continue
        confidence = {"entropy": "entropy", "maskgit_plus": "prob", "topk_margin": "margin"}[alg]
        tokens, scores = filter_and_score(logits[masked], temperature, top_p, top_k, confidence)
        for row in range(len(x)):
            places = masked[row].nonzero().squeeze(1)
            n = len(places)
            k = n if i == steps - 1 else int(torch.tensor(float(n)) * (1 - times[i + 1] / times[i]))
            first = int(masked[:row].sum())
            if k:
                best = scores[first:first + n].topk(k).indices
                x[row, places[best]] = tokens[first:first + n][best]
    return x, steps


@torch.no_grad()
def naive_llada(model, canvas: Tensor, *, steps: int, block_length: int) -> tuple[Tensor, int]:
    """LLaDA's generate at temperature 0: argmax and softmax of all positions in every step.

    Returns: the tokens and the number of forward passes.
    """
    x = canvas.clone()
    first = int((x[0] == model.mask_token_id).nonzero()[0])
    blocks = (x.shape[1] - first) // block_length
    for block in range(blocks):
        end = first + (block + 1) * block_length
        per_step = int((x[0, :end] == model.mask_token_id).sum()) // (steps // blocks)
        for _ in range(steps // blocks):
            masked = x == model.mask_token_id
            logits = model(x).logits
            tokens = logits.argmax(-1)
            scores = logits.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            scores[:, end:] = -torch.inf
            scores = scores.masked_fill(~masked, -torch.inf)
            for row in range(len(x)):
                best = scores[row].topk(per_step).indices
                x[row, best] = tokens[row, best]
    return x, steps


@torch.no_grad()
def naive_fast_dllm(model, canvas: Tensor, *, block_length: int, threshold: float, dual: bool) -> tuple[Tensor, int]:
    """Fast-dLLM's generate for LLaDA, one sequence at temperature 0 with its prefix or dual cache.

    As in the original, every position of the input gets logits and a softmax in float64. The cache keeps rotated keys;
    the original rotates all of them in every step. Returns: the tokens and the number of forward passes.
    """
    x, forwards = canvas.clone(), 0
    cache = KeyValueCache(model.config, *x.shape, like=model.head_weight)
    first = int((x[0] == model.mask_token_id).nonzero()[0])
    for start in range(first, x.shape[1], block_length):
        end = start + block_length
        for index in range(block_length + 1):
            window = slice(0, x.shape[1]) if index == 0 else slice(start, end if dual else x.shape[1])
            hidden = model.hidden_states(x[:, window], Cached(cache, window.start))
            logits = F.linear(hidden, model.head_weight)
            forwards += 1
            tokens = logits.argmax(-1)
            scores = logits.double().softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            masked = x[:, window] == model.mask_token_id
            masked[:, end - window.start:] = False
            scores = scores.masked_fill(~masked, -torch.inf)
            ordered, order = scores[0].sort(descending=True)
            sure = ordered >= threshold
            sure[0] = bool(masked.any())
            x[0, window.start + order[sure]] = tokens[0, order[sure]]
            if index and not (x[:, start:end] == model.mask_token_id).any():
                break
    return x, forwards
