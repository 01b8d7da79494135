"""Selection of the masked positions of each row that a denoising step commits, given their confidences."""

import torch
from torch import Tensor

from .settings import Selection


def commit(tokens: Tensor, masked: Tensor, token: Tensor, confidence: Tensor, selection: Selection,
           uniform: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `Unmasked`: each row commits its k[b] best masked positions, and all that reach the threshold.

    The score is the confidence, or confidence / temperature + Gumbel noise, which samples k positions without
    replacement in proportion to exp(confidence / temperature). Among equals the lowest position wins; NaN never does.

    Args:
        tokens, masked, token, confidence: [B, L]; `token` is the candidate of each masked position; the confidence is
            -inf where not masked.
        uniform: [B, L, 2], needed if selection_temperature is above 0.
    """
    score = confidence
    if selection.selection_temperature > 0:
        score = confidence.double() / selection.selection_temperature - (-uniform[..., 1].log()).log()
    possible = masked & ~confidence.isnan()
    score = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~possible, -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    committed = rank < selection.k.unsqueeze(1)
    if selection.threshold is not None:
        committed = committed | (confidence >= selection.threshold)
    committed = committed & possible
    return torch.where(committed, token, tokens), confidence, committed
