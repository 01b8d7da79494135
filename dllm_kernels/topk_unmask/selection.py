"""Which masked positions of each row a denoising step commits, given their confidences. A few thousand numbers."""

import torch
from torch import Tensor


def select(confidence: Tensor, masked: Tensor, k: Tensor, selection_temperature: float, threshold: float | None,
           uniform: Tensor | None) -> Tensor:
    """committed [B, L] bool: the k[b] best masked positions of each row, and all that reach the threshold.

    The score is the confidence, or confidence / selection_temperature + Gumbel noise, which samples k positions without
    replacement in proportion to exp(confidence / selection_temperature). Among equals the lowest position; NaN is last.
    """
    score = confidence
    if selection_temperature > 0:
        score = confidence.double() / selection_temperature - (-uniform[..., 1].log()).log()
    finite = torch.finfo(score.dtype)
    score = torch.where(score.isnan(), -torch.inf, score).clamp(min=finite.min).masked_fill(~masked, -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    committed = rank < k.unsqueeze(1)
    if threshold is not None:
        committed = committed | (confidence >= threshold)
    return committed & masked
