"""Which masked positions of each row a denoising step commits, given their confidences. A few thousand numbers."""

import torch
from torch import Tensor


def commit(tokens: Tensor, masked: Tensor, token: Tensor, confidence: Tensor, k: Tensor, selection_temperature: float,
           threshold: float | None, uniform: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `Unmasked`: each row's k[b] best masked positions committed, and all that reach the threshold.

    The score is the confidence, or confidence / selection_temperature + Gumbel noise, which samples k positions without
    replacement in proportion to exp(confidence / selection_temperature). Among equals the lowest position; NaN never.

    Args:
        tokens, masked, token, confidence: [B, L]; `token` is what each masked position would get, and the confidence
            elsewhere -inf.
        k: [B]. uniform: [B, L, 2], needed where selection_temperature > 0.
    """
    score = confidence
    if selection_temperature > 0:
        score = confidence.double() / selection_temperature - (-uniform[..., 1].log()).log()
    possible = masked & ~confidence.isnan()
    score = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~possible, -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    committed = rank < k.unsqueeze(1)
    if threshold is not None:
        committed = committed | (confidence >= threshold)
    committed = committed & possible
    return torch.where(committed, token, tokens), confidence, committed
