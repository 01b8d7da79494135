"""The forward process of masked diffusion: each document draws a time, and each of its tokens is masked by chance.

Symbols: time t in (0, 1); alpha(t), the share of tokens kept, falls from 1 to 0. The likelihood bound weighs the
negative log-likelihood of a masked token by -alpha'(t) / (1 - alpha(t)) (MD4, arXiv:2406.04329), 1/t for the linear
schedule.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

T_MIN = 1 / 500  # drawn times are clamped to [T_MIN, 1 - T_MIN]: it bounds the weights


class Schedule(NamedTuple):
    alpha: Callable[[Tensor], Tensor]  # share of tokens kept at time t
    weight: Callable[[Tensor], Tensor]  # -alpha'(t) / (1 - alpha(t))
    when: Callable[[Tensor], Tensor]  # the time at which a share is kept, the inverse of alpha


def _kept_as_power(n: int) -> Schedule:
    """alpha(t) = (1 - t)**n: discrete flow matching keeps the share kappa = (1 - t)**n (arXiv:2407.15595 square,
    2506.09018 cube)."""
    return Schedule(lambda t: (1 - t)**n, lambda t: n * (1 - t)**(n - 1) / -torch.expm1(n * torch.log1p(-t)),
                    lambda kept: 1 - kept**(1 / n))


SCHEDULES: Mapping[str, Schedule] = {
    "linear": Schedule(lambda t: 1 - t, lambda t: 1 / t, lambda kept: 1 - kept),
    "cosine": Schedule(lambda t: 1 - torch.cos(math.pi / 2 * (1 - t)),
                       lambda t: math.pi / 2 * torch.tan(math.pi / 2 * (1 - t)),
                       lambda kept: 1 - 2 / math.pi * torch.acos(1 - kept)),
    "polynomial": Schedule(lambda t: 1 - t**2, lambda t: 2 / t, lambda kept: (1 - kept).sqrt()),
    "square": _kept_as_power(2),
    "cube": _kept_as_power(3),
}


class Corruption(NamedTuple):
    """T packed tokens. Every value per token is that of its document."""

    noisy: Tensor  # [T] int64: the tokens, masked where corrupted
    corrupted: Tensor  # [T] bool
    t: Tensor  # [T] fp32, the time
    ratio: Tensor  # [T] fp32: 1 - alpha(t), the chance of being masked; equal to t when the schedule is linear
    weight: Tensor  # [T] fp32: -alpha'(t) / (1 - alpha(t))


def corrupt(tokens: Tensor, cu_seqlens: Tensor, mask_token_id: int, *, schedule: str = "linear",
            generator: torch.Generator | None = None, times: Tensor | None = None, uniform: Tensor | None = None,
            maskable: Tensor | None = None, at_least_one_of: Tensor | None = None) -> Corruption:
    """Mask each token independently with probability 1 - alpha(t), t one time per document.

    Args:
        tokens: [T] int64, documents one after the other.
        cu_seqlens: [S + 1] integers, where the documents begin, and T.
        schedule: a key of `SCHEDULES`.
        generator: where times and uniforms are drawn, in Open-dLLM's order: for each document rand(1), then rand(n).
        times: [S] in (0, 1), instead of drawing them.
        uniform: [T] in [0, 1), instead of drawing it; a token is masked where it is below the chance.
        maskable: [T] bool; tokens elsewhere are never masked (a prompt, say).
        at_least_one_of: [T] bool; a document none of whose tokens here was masked gets one masked, that of the least
            uniform. Such a corruption is no longer the one that the bound is about.
    """
    lengths = cu_seqlens.diff().long()
    if times is None or uniform is None:
        drawn = [(torch.rand(1, generator=generator), torch.rand(n, generator=generator)) for n in lengths.tolist()]
        times = torch.cat([t for t, _ in drawn]).clamp(T_MIN, 1 - T_MIN) if times is None else times
        uniform = torch.cat([u for _, u in drawn]) if uniform is None else uniform
    t = times.float()
    per_document = torch.stack((t, 1 - SCHEDULES[schedule].alpha(t), SCHEDULES[schedule].weight(t)))
    if schedule == "linear":
        per_document[1] = t  # 1 - (1 - t) would round
    t, ratio, weight = torch.repeat_interleave(per_document, lengths, dim=1).to(tokens.device)
    corrupted = uniform.to(tokens.device) < ratio
    if maskable is not None:
        corrupted = corrupted & maskable
    if at_least_one_of is not None:
        allowed = at_least_one_of if maskable is None else at_least_one_of & maskable
        document = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths.to(tokens.device))
        missing = ~torch.zeros(len(lengths), dtype=torch.bool, device=tokens.device).index_fill(
            0, document[corrupted & allowed], True)
        open_places = (allowed & missing[document]).nonzero().squeeze(1)
        ascending = open_places[uniform.to(tokens.device)[open_places].argsort(stable=True)]
        by_document = ascending[document[ascending].argsort(stable=True)]
        first = torch.ones_like(by_document, dtype=torch.bool)
        first[1:] = document[by_document].diff() != 0
        corrupted = corrupted.index_fill(0, by_document[first], True)
    return Corruption(tokens.masked_fill(corrupted, mask_token_id), corrupted, t, ratio, weight)
