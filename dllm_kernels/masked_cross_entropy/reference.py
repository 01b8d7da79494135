"""Masked cross-entropy in plain PyTorch: the corrupted rows gathered, their logits computed in chunks of bounded size.

For a corrupted row with target y, where z is the logits or softcap * tanh(logits / softcap):
    loss = logsumexp(z) - z[y],    d loss / d z[v] = softmax(z)[v] - [v = y]
Everything is in fp32 (fp64 for fp64 inputs). The backward computes the logits once more, a fourth matrix product.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dllm_kernels.masked_cross_entropy.rows import Form, Linear, Scales, Scored

WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # by default: for logits held at once


def statistics(inputs: Tensor | Linear, scored: Scored, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """top, total and target_logit [N], for a `rows.Passes`."""
    top, target_logit = (torch.zeros(len(scored.targets), dtype=_dtype(inputs), device=scored.targets.device)
                         for _ in range(2))
    total = torch.ones_like(top)
    for rows, logits in _logits(_widened(inputs), scored, form):
        for part in _parts(logits):
            z, here = _capped(logits[part], form.softcap), rows[part]
            top[here] = highest = z.amax(1)
            target_logit[here] = z.gather(1, scored.targets[here].unsqueeze(1)).squeeze(1)
            total[here] = z.sub_(highest.unsqueeze(1)).exp_().sum(1)
    return top, total, target_logit


def gradients(inputs: Tensor | Linear, scored: Scored, form: Form, scales: Scales,
              wanted) -> tuple[Tensor | None, ...]:
    """The gradients of the logits, or of hidden, weight and bias where wanted, for a `rows.Passes`."""
    tensors = inputs if isinstance(inputs, Linear) else (inputs,)
    # Rows of the first are written once; the others are sums over the rows.
    dtypes = (tensors[0].dtype, scales.top.dtype, scales.top.dtype)
    found = [torch.zeros(x.shape, dtype=dtype, device=x.device) if want else None
             for x, dtype, want in zip(tensors, dtypes, wanted, strict=False)]
    inputs = _widened(inputs)
    for rows, z in _logits(inputs, scored, form):
        for part in _parts(z):
            _to_gradient(z[part], scored.targets[rows[part]], form.softcap, *(scale[rows[part]] for scale in scales))
        if isinstance(inputs, Linear):
            _add_products(found, z, inputs, rows)
        else:
            found[0][rows] = z.to(tensors[0].dtype)
    return tuple(None if x is None else x.to(tensor.dtype) for x, tensor in zip(found, tensors, strict=True))


def _dtype(inputs: Tensor | Linear) -> torch.dtype:
    return torch.promote_types((inputs if isinstance(inputs, Tensor) else inputs.hidden).dtype, torch.float32)


def _widened(inputs: Tensor | Linear) -> Tensor | Linear:
    """The inputs, with the head in the dtype of the sums."""
    if isinstance(inputs, Tensor):
        return inputs
    hidden, *head = inputs
    return Linear(hidden, *(None if x is None else x.to(_dtype(inputs)) for x in head))


def _logits(inputs: Tensor | Linear, scored: Scored, form: Form) -> Iterator[tuple[Tensor, Tensor]]:
    """The corrupted rows, some at a time, and their logits, which the caller may overwrite."""
    dtype, corrupted = _dtype(inputs), scored.corrupted.nonzero().squeeze(1)
    words = inputs.shape[1] if isinstance(inputs, Tensor) else len(inputs.weight)
    workspace = form.workspace_bytes or WORKSPACE_BYTES.get(corrupted.device.type, 1 << 30)
    size = max(1, min(workspace // (4 * max(words, 1)), len(corrupted)))
    if isinstance(inputs, Tensor):
        yield from ((rows, inputs[rows].to(dtype)) for rows in corrupted.split(size))
        return
    hidden, weight, bias = inputs
    buffer = torch.empty(size, words, dtype=dtype, device=weight.device)
    for rows in corrupted.split(size):
        x, z = hidden[rows].to(dtype), buffer[:len(rows)]
        with torch.autocast(z.device.type, enabled=False):
            torch.mm(x, weight.T, out=z) if bias is None else torch.addmm(bias, x, weight.T, out=z)
        yield rows, z


def _parts(z: Tensor) -> list[slice]:
    """A few rows at a time on a CPU, so that they stay in the cache from pass to pass."""
    rows = max(1, (1 << 20) // (z.element_size() * max(z.shape[1], 1))) if z.is_cpu else max(len(z), 1)
    return [slice(start, start + rows) for start in range(0, len(z), rows)]


def _capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _to_gradient(z: Tensor, targets: Tensor, softcap: float | None, top: Tensor, probability: Tensor,
                 target: Tensor) -> None:
    """Overwrite logits z [C, V] with the gradient of the loss."""
    z = _capped(z, softcap)
    slope = None if softcap is None else 1 - (z / softcap)**2
    z.sub_(top.unsqueeze(1)).exp_().mul_(probability.unsqueeze(1))
    z.scatter_add_(1, targets.unsqueeze(1), -target.unsqueeze(1))
    if slope is not None:
        z.mul_(slope)


def _add_products(found: list[Tensor | None], z: Tensor, inputs: Linear, rows: Tensor) -> None:
    """Add the products of z [C, V], the gradient of some rows' logits, to those of hidden, weight and bias."""
    hidden, weight, bias = found
    with torch.autocast(z.device.type, enabled=False):
        if hidden is not None:
            hidden[rows] = torch.mm(z, inputs.weight).to(hidden.dtype)
        if weight is not None:
            weight.addmm_(z.T, inputs.hidden[rows].to(z.dtype))
        if bias is not None:
            bias += z.sum(0)
