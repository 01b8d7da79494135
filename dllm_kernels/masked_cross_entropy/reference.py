"""Masked cross-entropy in plain PyTorch: of logits in two passes over the corrupted rows, of hidden states in three
products, whatever the dtype in fp32 (fp64 for fp64 inputs).

For a corrupted row with target y, where z is the logits or softcap * tanh(logits / softcap):
    loss = logsumexp(z) - z[y],    d loss / d z[v] = softmax(z)[v] - [v = y]
"""

import torch
from torch import Tensor

from ..chunks import WORKSPACE_BYTES
from .products import Chunk
from .rows import Form, Scale, Scales, Scored, sums_dtype


def statistics(logits: Tensor, scored: Scored, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """top, total and target_logit [N], for `rows.two_passes`."""
    top, target_logit = (torch.zeros(len(logits), dtype=sums_dtype(logits), device=logits.device) for _ in range(2))
    total = torch.ones_like(top)
    for rows in _parts(logits, scored):
        z = _capped(logits[rows].to(top.dtype), form.softcap)
        top[rows], total[rows], target_logit[rows] = _statistics(z, scored.targets[rows])
    return top, total, target_logit


def gradients(logits: Tensor, scored: Scored, form: Form, scales: Scales, wanted) -> tuple[Tensor]:
    found = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for rows in _parts(logits, scored):
        z = _capped(logits[rows].to(scales.top.dtype), form.softcap)
        slope = _slope(z, form.softcap)
        z.sub_(scales.top[rows].unsqueeze(1)).exp_()
        _to_gradient(z, scored.targets[rows], scales.probability[rows], scales.target[rows], slope)
        found[rows] = z.to(logits.dtype)
    return found,


def row_pass(chunk: Chunk, scale: Scale, softcap: float | None, wanted: bool) -> Tensor:
    """See `products.RowPass`."""
    nll = torch.empty_like(scale.plain)
    for part in _cached(chunk.logits):
        z, targets = _capped(chunk.logits[part], softcap), chunk.targets[part]
        slope = _slope(z, softcap) if wanted else None
        top, total, target_logit = _statistics(z, targets)
        nll[part] = total.log() + (top - target_logit)
        if wanted:
            factor = Scale(*(None if s is None else s[part] for s in scale)).at(nll[part])
            _to_gradient(z, targets, factor / total, factor, slope)
    chunk.clear_rest(nll, wanted)
    return nll


def _statistics(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits z [C, V], which become exp(z - top). On a GPU a target out of range gives NaN."""
    inside = (targets >= 0) & (targets < z.shape[1])
    target_logit = z.gather(1, torch.where(inside, targets, 0).unsqueeze(1)).squeeze(1)
    top = z.amax(1)
    total = z.sub_(top.unsqueeze(1)).exp_().sum(1)
    return top, total, torch.where(inside, target_logit, torch.nan)


def _to_gradient(z: Tensor, targets: Tensor, probability: Tensor, target: Tensor, slope: Tensor | None) -> None:
    """Overwrite z [C, V], exp(logits - top), with the gradient of the loss."""
    z.mul_(probability.unsqueeze(1))
    z.scatter_add_(1, targets.clamp(0, z.shape[1] - 1).unsqueeze(1), -target.unsqueeze(1))
    if slope is not None:
        z.mul_(slope)


def _capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _slope(z: Tensor, softcap: float | None) -> Tensor | None:
    return None if softcap is None else 1 - (z / softcap) ** 2


def _parts(logits: Tensor, scored: Scored) -> list[Tensor]:
    """The corrupted rows, as many at a time as the workspace has room for."""
    rows = scored.corrupted.nonzero().squeeze(1)
    room = WORKSPACE_BYTES.get(logits.device.type, WORKSPACE_BYTES["cuda"])
    size = max(1, min(room, 1 << 20 if logits.is_cpu else room) // (4 * max(logits.shape[1], 1)))
    return list(rows.split(size)) if len(rows) else []


def _cached(z: Tensor) -> list[slice]:
    """A few rows at a time on a CPU, so that they stay in the cache from pass to pass."""
    rows = max(1, (1 << 20) // (z.element_size() * max(z.shape[1], 1))) if z.is_cpu else max(len(z), 1)
    return [slice(start, start + rows) for start in range(0, len(z), rows)]
