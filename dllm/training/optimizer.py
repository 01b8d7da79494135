"""Optimizers and the learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dllm.config.schema import TrainGroup

# Coefficients (a, b, c) of x -> a x + b x^3 + c x^5, which drives singular values towards 1 (Keller Jordan 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Muon), for weight matrices between layers.

    The update of an [m, n] matrix is scaled by 0.2 sqrt(max(m, n)), which gives it the root mean square of a typical
    AdamW update (arXiv:2502.16982), so that the same learning rate serves both. Unlike `torch.optim.Muon` it
    orthogonalises all matrices of one shape at once, and in fp32 on a CPU, where bf16 products are slower.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                gradients = [parameter.grad for parameter in parameters]
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                momenta = [self.state[parameter]["momentum"] for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
                updates = orthogonalize(torch.stack([whole(matrix) for matrix in ahead])).to(parameters[0].dtype)
                updates = [sharded_like(update, p) for update, p in zip(updates.unbind(), parameters, strict=True)]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(parameters, updates, alpha=-scale)


def whole(matrix: Tensor) -> Tensor:
    """The matrix, gathered in every process if it is sharded."""
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def sharded_like(matrix: Tensor, parameter: Tensor) -> Tensor:
    """A matrix that every process has whole, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return matrix
    return distribute_tensor(matrix, parameter.device_mesh, parameter.placements, src_data_rank=None)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most max_norm, 0 for any. Returns the norm before."""
    return whole(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))


def orthogonalize(matrices: Tensor) -> Tensor:
    """For each of [K, m, n] matrices, nearly U V^T of its singular value decomposition (Newton-Schulz iteration)."""
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # the largest singular value is then at most 1
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def group_parameters(model: nn.Module, config: TrainGroup) -> tuple[list, list, list]:
    """(matrices for Muon, matrices for AdamW, which decay, vectors for AdamW, which do not)."""
    hidden, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = ".layers." in name and parameter.ndim == 2
        kind = hidden if inside and config.optimizer == "muon" else matrices if parameter.ndim >= 2 else vectors
        kind.append(parameter)
    return hidden, matrices, vectors


def count_states(model: nn.Module, config: TrainGroup) -> int:
    """Numbers that the optimizers keep: one per element for Muon, two for AdamW."""
    hidden, matrices, vectors = (sum(parameter.numel() for parameter in kind)
                                 for kind in group_parameters(model, config))
    return hidden + 2 * (matrices + vectors)


def build_optimizers(model: nn.Module, config: TrainGroup) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside the layers and AdamW for the rest. Only matrices decay."""
    hidden, matrices, vectors = group_parameters(model, config)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, lr=config.muon_lr or config.lr, weight_decay=config.weight_decay))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], config: TrainGroup, place: float, total: int) -> float:
    """Set the learning rates at step `place` of `total`. Returns that of AdamW."""
    rate = learning_rate(place, total, config)
    for optimizer in optimizers:
        muon = isinstance(optimizer, Muon) and config.muon_lr is not None
        for group in optimizer.param_groups:
            group["lr"] = rate * config.muon_lr / config.lr if muon else rate
    return rate


def learning_rate(place: float, total: int, config: TrainGroup) -> float:
    """The learning rate at step `place` (from 0; fractions when the clock decides) of `total`, as in Open-dLLM.

    Linear from lr_start to lr over the warm-up; then constant, or linear to 1e-7 at the last step, or cosine to lr_min
    at lr_decay_ratio of the steps.
    """
    warmup = int(total * config.lr_warmup_ratio)
    if place < warmup:
        return config.lr_start + (config.lr - config.lr_start) * place / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if config.lr_decay_style == "linear":
        return max(config.lr * (total - place) / max(total - warmup, 1), 1e-7)
    end = int(total * config.lr_decay_ratio)
    if place >= end:
        return config.lr_min
    fall = 0.5 * (1 + math.cos(math.pi * (place - warmup) / max(end - warmup, 1)))
    return config.lr_min + (config.lr - config.lr_min) * fall
