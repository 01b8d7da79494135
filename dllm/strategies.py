"""Decoding strategies: what one denoising step commits. Pure functions of the canvas and a scorer.

A strategy gets a `Step` and a `Scorer` and returns an `Update`. It asks the scorer only about the positions it needs;
a strategy that never asks costs no forward pass, which is how steps that commit nothing are free.
Symbols: B rows, L positions, step i of n, time running from 1 to eps, t before the step and s after it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """The canvas as a denoising step finds it."""

    index: int  # i, from 0 in each block
    total: int  # n, of this block
    eps: float  # the time after the last step, in (0, 1)
    tokens: Tensor  # [B, L] int64
    masked: Tensor  # [B, L] bool: still to be committed, in the block being denoised
    editable: Tensor  # [B, L] bool: of that block, masked when denoising began
    mask_token_id: int
    uniform: Tensor | None  # [B, L, 2] float64 in (0, 1); None where nothing is random

    @property
    def last(self) -> bool:
        return self.index == self.total - 1

    def share(self) -> Tensor:
        """1 - s/t, fp32 scalar: the share of the masked positions that this step should commit."""
        times = torch.linspace(1.0, self.eps, self.total + 1)
        return 1 - times[self.index + 1] / times[self.index]


class Update(NamedTuple):
    tokens: Tensor  # [B, L] after the step
    confidence: Tensor | None  # [B, L] fp32, -inf where not scored; None if nothing was


class Scorer(Protocol):
    """The model, asked about some positions of the current canvas; each call is one forward pass."""

    def unmask(self, k: Tensor, confidence: str, *, raw: bool = False, threshold: float | None = None) -> Update:
        """Commit the k[b] most confident masked positions of each row, and all whose confidence reaches the threshold.

        raw: the confidence is of the distribution before temperature and filters.
        """

    def score(self, positions: Tensor, *, raw: bool = False) -> Update:
        """Choose and score a token where `positions` [B, L] is True; elsewhere the update's tokens are -1."""


Strategy = Callable[[Step, Scorer], Update]


def commit_most_confident(step: Step, scorer: Scorer, *, confidence: str) -> Update:
    """Commit trunc(masked * (1 - s/t)) positions per row, all at the last step (MaskGIT, arXiv:2202.04200; Dream).

    The product is in fp32, as in the original: exact arithmetic would commit one more now and then.
    """
    masked = step.masked.sum(1)
    k = masked if step.last else (masked.float() * step.share().to(masked.device)).long()
    if not k.any():
        return Update(step.tokens, None)
    return scorer.unmask(k, confidence)


def commit_evenly(step: Step, scorer: Scorer, *, confidence: str) -> Update:
    """Commit as many positions in each step, one more in the first ones where that does not come out (LLaDA,
    arXiv:2502.09992, which calls it remasking). The confidence is that of the distribution before temperature."""
    count = step.editable.sum(1)
    k = torch.where(step.masked.any(1), count // step.total + (step.index < count % step.total), 0)
    if not k.any():
        return Update(step.tokens, None)
    return scorer.unmask(k, confidence, raw=True)


def commit_evenly_or_above(step: Step, scorer: Scorer, *, block_length: int, threshold: float) -> Update:
    """Commit as many of a block's positions in each step, and more if they are so sure (LLaDA2; SDAR's
    low_confidence_dynamic, arXiv:2510.06303). A block that begins within the prompt is so done in fewer steps."""
    k = block_length // step.total + (step.index < block_length % step.total)
    return scorer.unmask(torch.where(step.masked.any(1), k, 0), "prob", threshold=threshold)


def commit_above(step: Step, scorer: Scorer, *, confidence: str, raw: bool, threshold: float) -> Update:
    """Commit every position whose confidence reaches the threshold, and at least the surest (Fast-dLLM,
    arXiv:2505.22618)."""
    return scorer.unmask(step.masked.any(1).long(), confidence, raw=raw, threshold=threshold)


def commit_by_factor(step: Step, scorer: Scorer, *, raw: bool, factor: float) -> Update:
    """Commit the n surest, the largest n with (n + 1) (1 - confidence of the n-th) <= factor, at least one (Fast-dLLM):
    the more are committed together, the surer the least sure of them must be."""
    scored = scorer.score(step.masked, raw=raw)
    order = scored.confidence.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
    n = torch.arange(1, order.shape[1] + 1, device=order.device)
    sure = scored.confidence.gather(1, order) >= 1 - factor / (n + 1)
    sure[:, 0] = True
    chosen = torch.zeros_like(step.masked).scatter(1, order, sure) & step.masked
    return Update(torch.where(chosen, scored.tokens, step.tokens), scored.confidence)


def commit_at_random(step: Step, scorer: Scorer) -> Update:
    """Commit each masked position with probability 1 - s/t, whatever its confidence (MDLM, arXiv:2406.07524)."""
    chosen = step.masked
    if not step.last:
        chosen = chosen & (step.uniform[..., 1] < step.share().to(chosen.device))
    if not chosen.any():
        return Update(step.tokens, None)
    scored = scorer.score(chosen)
    return Update(torch.where(chosen, scored.tokens, step.tokens), scored.confidence)


def plan_and_remask(step: Step, scorer: Scorer) -> Update:
    """P2 (arXiv:2502.03540): score every editable position anew, mask the floor(editable * (1 - (i+1)/n)) least sure.

    A position that stays revealed keeps its token; its confidence is that of the token it would get now.
    """
    rows = step.masked.any(1, keepdim=True)
    scored = scorer.score(step.editable & rows)
    remasked_count = (step.editable.sum(1).float() * (1 - (step.index + 1) / step.total)).floor()
    surest = torch.where(step.editable & scored.confidence.isfinite(), scored.confidence, torch.inf)
    rank = surest.argsort(dim=1, stable=True).argsort(dim=1)
    remask = (rank < remasked_count.unsqueeze(1)) & step.editable & rows
    tokens = torch.where(step.masked, scored.tokens, step.tokens)
    return Update(torch.where(remask, step.mask_token_id, tokens), scored.confidence)


STRATEGIES: Mapping[str, Strategy] = {
    "origin": commit_at_random,
    "maskgit_plus": partial(commit_most_confident, confidence="prob"),
    "entropy": partial(commit_most_confident, confidence="entropy"),
    "topk_margin": partial(commit_most_confident, confidence="margin"),
    "p2": plan_and_remask,
}
# LLaDA's, by the names of its `remasking`
REMASKINGS: Mapping[str, Strategy] = {
    "low_confidence": partial(commit_evenly, confidence="prob"),
    "random": partial(commit_evenly, confidence="random"),
    "low_confidence_dynamic": commit_evenly_or_above,
}
# What a strategy ranks positions by, where a threshold can replace its count.
CONFIDENCES = {"maskgit_plus": "prob", "entropy": "entropy", "topk_margin": "margin", "low_confidence": "prob"}


def choose_strategy(alg: str, remasking: str | None, threshold: float | None, factor: float | None,
                    block_length: int) -> Strategy:
    """The strategy of a generation config."""
    name = remasking or alg
    if remasking == "low_confidence_dynamic":
        return partial(commit_evenly_or_above, block_length=block_length, threshold=threshold)
    if threshold is not None:
        return partial(commit_above, confidence=CONFIDENCES[name], raw=remasking is not None, threshold=threshold)
    if factor is not None:
        return partial(commit_by_factor, raw=remasking is not None, factor=factor)
    return REMASKINGS[remasking] if remasking else STRATEGIES[alg]
