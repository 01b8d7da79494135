"""The training objectives, all of them weighted sums of the negative log-likelihood of single tokens.

l[i] = -log p(token i | what is visible), over the scored positions i; N positions scored, M that could have been.

mdm   sum l / N                                     every masked token alike (Open-dLLM)
path  sum (1 + stopgrad(exp(-l)) / r) l / N         mdm + Open-dLLM's planner term (P2); r, the chance of being masked
elbo  sum w l / M, w = -alpha'(t) / (1 - alpha(t))  the bound on the likelihood; w = 1/t when linear
                                                    (MD4 arXiv:2406.04329, MDLM 2406.07524, LLaDA 2502.09992)
block_diffusion   as elbo, each block with a time of its own, given the clean blocks before it (BD3-LM 2503.09573)
expansion  sum (1 - t) l / (N' + S')                gaps whose length is to be found out (gaps.py): a document's delete
                                                    tokens weigh as one; N' other tokens, S' documents with any
                                                    (DreamOn 2602.01326)
cart  sum w l / M, w = sum over the visible j of    masked tokens near visible ones count for more, p = 0.3
      p (1 - p)^(|i - j| - 1) / 2                   (Dream 2508.15487)
ar    sum l / N                                     next token, nothing masked, causal attention
canvas                                              see canvases.py

With right shift (models that come from autoregressive ones) the logits at position i - 1 are about token i, so the
first token of a document is never scored. Sums and N (or M) are apart, so that several micro-batches make one mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm.diffusion.corruption import Corruption
from dllm_kernels import linear_masked_cross_entropy

BOUNDS = ("elbo", "block_diffusion")  # objectives that bound the negative log-likelihood
CART_SHARE = 0.3  # p above
CART_REACH = 64  # tokens: beyond, the terms are below 1e-10


class Targets(NamedTuple):
    """What the hidden state at each of T positions is scored on."""

    tokens: Tensor  # [T] int64
    scored: Tensor  # [T] bool
    weights: Tensor | None  # [T] fp32; None: all 1
    path_weights: Tensor | None  # [T] fp32: 1 / r, if there is a path term
    normaliser: Tensor  # int64 scalar: N or M above; divide the sum over all micro-batches of a step by their total
    ratio: Tensor | None = None  # [T] fp32: r, if the losses are wanted by it too
    count: int | None = None  # how many are scored, if that is known without asking a GPU


class LossSums(NamedTuple):
    loss: Tensor  # fp32 scalar, with gradients: divide by the total of the normalisers
    nll: Tensor  # fp32 scalar, no gradient: sum of l, unweighted, over the scored positions
    alignment: Tensor  # fp32 scalar, with gradients, of `sum_alignment`: divide by the total of N; 0 without a teacher
    by_ratio: Tensor | None = None  # [2, 4] fp32, no gradient: sums of l, and their numbers, by the quarter r is in
    encoder: Tensor | None = None  # fp32 scalar, with gradients, of "canvas": divide by the total of `encoded`


def choose_targets(tokens: Tensor, cu_seqlens: Tensor, corruption: Corruption | None, *, objective: str,
                   path_term: bool = False, shift: bool, trainable: Tensor | None = None,
                   by_ratio: bool = False, delete_token_id: int | None = None) -> Targets:
    """Say what each position is scored on.

    Args:
        tokens: [T] int64, the clean tokens of packed documents.
        cu_seqlens: [S + 1] integers, where the documents begin, and T.
        corruption: of these tokens; None for "ar".
        objective: one of the table above ("ar" is always shifted); path is mdm with `path_term`.
        shift: whether the logits at a position are about the next token.
        trainable: [T] bool; tokens elsewhere are never scored (a prompt, say), though they may be masked.
        by_ratio: whether the losses are wanted by the chance of being masked too.
        delete_token_id: for "expansion".
    """
    possible = torch.ones_like(tokens, dtype=torch.bool) if trainable is None else trainable.clone()
    if shift or objective == "ar":
        possible[cu_seqlens[:-1].long()] = False
    scored = possible if corruption is None else possible & corruption.corrupted
    normaliser = (possible if objective in (*BOUNDS, "cart") else scored).sum()
    weights = corruption.weight if objective in BOUNDS else None
    if objective == "cart":
        weights = weigh_by_context(corruption.corrupted, cu_seqlens)
    if objective == "expansion":
        document = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff().long())
        deleted = scored & (tokens == delete_token_id)
        count = torch.bincount(document[deleted], minlength=len(cu_seqlens) - 1)
        weights = (1 - corruption.t) / torch.where(deleted, count[document], 1)
        normaliser = normaliser - deleted.sum() + (count > 0).sum()
    path_weights = 1 / corruption.ratio if path_term else None
    ratio = corruption.ratio if by_ratio else None
    if shift or objective == "ar":  # what wraps around is a first token, which is not scored
        tokens, scored = tokens.roll(-1), scored.roll(-1)
        weights, path_weights, ratio = (None if w is None else w.roll(-1) for w in (weights, path_weights, ratio))
    count = int(scored.sum()) if scored.is_cpu else None
    return Targets(tokens, scored, weights, path_weights, normaliser, ratio, count)


def weigh_by_context(corrupted: Tensor, cu_seqlens: Tensor, p: float = CART_SHARE) -> Tensor:
    """[T] fp32: sum over the visible tokens j of the document of p (1 - p)^(|i - j| - 1) / 2, at the masked tokens i.

    Dream's context-adaptive noise rescheduling; 0 at the tokens that are visible themselves.
    """
    lengths = cu_seqlens.diff().long()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    visible = (~corrupted).float()
    weights = torch.zeros_like(visible)
    for distance in range(1, min(CART_REACH, int(lengths.max()) - 1) + 1):
        share = (document[distance:] == document[:-distance]) * (p / 2 * (1 - p) ** (distance - 1))
        weights[distance:] += share * visible[:-distance]
        weights[:-distance] += share * visible[distance:]
    return weights * corrupted


def sum_losses(hidden: Tensor, head_weight: Tensor, targets: Targets, *, bias: Tensor | None = None,
               softcap: float | None = None, backend: str | None = None) -> LossSums:
    """The weighted sum of the losses of one micro-batch.

    Args:
        hidden: [..., D] hidden states after the final norm, T of them.
        head_weight: [V, D].
        targets: of these T positions.
        bias, softcap, backend: as of `dllm_kernels.linear_masked_cross_entropy`.
    """
    total, each = linear_masked_cross_entropy(
        hidden.flatten(0, -2), head_weight, targets.tokens, targets.scored, bias=bias, softcap=softcap,
        weights=targets.weights, probability_weights=targets.path_weights, count=targets.count, reduction="sum",
        return_nll=True, backend=backend)
    return LossSums(total, each.sum(), torch.zeros((), device=hidden.device), sum_by_ratio(each, targets))


def sum_by_ratio(each: Tensor, targets: Targets) -> Tensor | None:
    if targets.ratio is None:
        return None
    quarter = (targets.ratio * 4).long().clamp(0, 3)
    sums = torch.stack((each, targets.scored.to(each.dtype)))
    return torch.zeros(2, 4, device=each.device).index_add_(1, quarter, sums)


def sum_alignment(student: Sequence[Tensor], teacher: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Sum over `rows` of 1 - the mean over the levels of cos(student, teacher): Open-dLLM's representation alignment.

    Args:
        student, teacher: hidden states [..., D] of T positions, the levels of `DiffusionLM.hidden_states`.
        rows: [N] int64, which of the T positions.
    Returns: fp32 scalar.
    """
    distances = [1 - F.cosine_similarity(ours.flatten(0, -2)[rows].float(), theirs.flatten(0, -2)[rows].float(), dim=-1)
                 for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(distances).mean(0).sum()
