"""Inputs as trained models have them: logits with a standard deviation of 3.

Trained models' logits have one of 2 to 4. Hidden states and a head both drawn from N(0, 1) give sqrt(D), 16 at D=256:
then most softmax gradients are denormal numbers, which no trained model has, and which Intel's cores compute a hundred
times slower.
"""

import torch

LOGITS_STD = 3.0


def make_logits(rows: int, V: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Logits [rows, V]."""
    g = torch.Generator(device).manual_seed(0)
    return (LOGITS_STD * torch.randn(rows, V, generator=g, device=device)).to(dtype)


def make_head(rows: int, D: int, V: int, dtype: torch.dtype = torch.float32,
              device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [rows, D], of unit variance as a final norm leaves them, and a head's weight [V, D]."""
    g = torch.Generator(device).manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g, device=device) for shape in ((rows, D), (V, D)))
    return hidden.to(dtype), (weight * (LOGITS_STD / D**0.5)).to(dtype)


@torch.no_grad()
def scale_logits(model, std: float = LOGITS_STD) -> None:
    """Scale the head of a model with random weights, so that its logits have this standard deviation."""
    weight = model.head_weight
    weight.mul_(std / weight.shape[1]**0.5 / weight.float().std())
