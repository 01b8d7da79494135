"""Masked cross-entropy in plain PyTorch: the corrupted rows gathered, then worked off in chunks of bounded size.

For a corrupted row n with target y, where z is the logits or softcap * tanh(logits / softcap):
    loss = lse(z) - z[y] + z_loss lse(z)^2,    d loss / d z[v] = softmax(z)[v] (1 + 2 z_loss lse(z)) - [v = y]
Everything is in fp32 (fp64 for fp64 inputs). Where the upstream gradient is one number (reduction sum or mean), the
gradients are computed with the loss, in three matrix products, and scaled in the backward; per-position upstream
gradients need the logits once more, a fourth product.
"""

import torch
from torch import Tensor

WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of logits held at once, unless the caller says


def masked_cross_entropy(logits: Tensor, targets: Tensor, corrupted: Tensor, weights: Tensor | None, reduction: str,
                         softcap: float | None, z_loss: float) -> Tensor:
    """[N, V] logits, flat targets, corrupted and weights [N]; [N] fp32 or a scalar."""
    return _MaskedCrossEntropy.apply(logits, targets, corrupted, weights, reduction, (softcap, z_loss))


def linear_masked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, corrupted: Tensor, bias: Tensor | None,
                                weights: Tensor | None, reduction: str, softcap: float | None, z_loss: float,
                                skip_below: float = 0.0, workspace_bytes: int | None = None) -> Tensor:
    """[N, D] hidden, [V, D] weight, [V] bias, flat targets, corrupted and weights [N]; [N] fp32 or a scalar.

    It skips nothing, whatever `skip_below` allows.
    """
    now = reduction != "none" and torch.is_grad_enabled()  # inside an autograd.Function it is always off
    return _LinearMaskedCrossEntropy.apply(hidden, weight, bias, targets, corrupted, weights, reduction,
                                           (softcap, z_loss), workspace_bytes, now)


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, corrupted, weights, reduction, form):
        rows, scale, compute = _plan(logits, corrupted, weights, reduction)
        loss = torch.empty(len(rows), dtype=compute, device=logits.device)
        for chunk in _chunks(rows, logits.shape[1]):
            loss[chunk] = _to_gradient(logits[rows[chunk]].to(compute), targets[rows[chunk]], scale[chunk], *form)
        ctx.save_for_backward(logits, targets, rows, scale)
        ctx.reduction, ctx.form = reduction, form
        return _reduce(loss, scale, rows, len(logits), reduction)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        logits, targets, rows, scale = ctx.saved_tensors
        scale = scale * (grad[rows] if ctx.reduction == "none" else grad)
        out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        for chunk in _chunks(rows, logits.shape[1]):
            z = logits[rows[chunk]].to(scale.dtype)
            _to_gradient(z, targets[rows[chunk]], scale[chunk], *ctx.form)
            out[rows[chunk]] = z.to(out.dtype)
        return out, None, None, None, None, None


class _LinearMaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, corrupted, weights, reduction, form, workspace_bytes,
                gradients_now):
        with torch.autocast(hidden.device.type, enabled=False):
            rows, scale, compute = _plan(hidden, corrupted, weights, reduction)
            wanted = ctx.needs_input_grad[:3] if gradients_now else (False,) * 3
            loss, *gradients = _linear(hidden, weight, bias, targets, rows, scale.to(compute), form,
                                       workspace_bytes, wanted)
            if reduction == "none":
                ctx.save_for_backward(hidden, weight, bias, targets, rows, scale)
            else:
                ctx.save_for_backward(*gradients)
            ctx.reduction, ctx.form, ctx.workspace_bytes = reduction, form, workspace_bytes
            ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
            return _reduce(loss, scale, rows, len(hidden), reduction)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        if ctx.reduction == "none":
            hidden, weight, bias, targets, rows, scale = ctx.saved_tensors
            with torch.autocast(hidden.device.type, enabled=False):
                scale = scale * grad[rows]
                gradients = _linear(hidden, weight, bias, targets, rows, scale, ctx.form, ctx.workspace_bytes,
                                    ctx.needs_input_grad[:3])[1:]
        else:
            gradients = [None if saved is None else saved * grad for saved in ctx.saved_tensors]
        gradients = [None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return *gradients, None, None, None, None, None, None, None


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # in a backward, that is create_graph=True
        raise RuntimeError("masked cross-entropy has no second derivative, which create_graph=True asks for; "
                           "use torch.nn.functional.cross_entropy on the corrupted rows")


def _plan(inputs: Tensor, corrupted: Tensor, weights: Tensor | None,
          reduction: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """The corrupted rows [M], what the loss of each is multiplied by [M], and the dtype to compute in."""
    compute = torch.promote_types(inputs.dtype, torch.float32)
    rows = corrupted.nonzero().squeeze(1)
    scale = torch.ones(len(rows), dtype=compute, device=inputs.device) if weights is None else weights[rows].to(compute)
    return rows, scale / max(len(rows), 1) if reduction == "mean" else scale, compute


def _reduce(loss: Tensor, scale: Tensor, rows: Tensor, count: int, reduction: str) -> Tensor:
    if reduction == "none":
        return torch.zeros(count, dtype=loss.dtype, device=loss.device).index_copy_(0, rows, loss * scale)
    return (loss * scale).sum()


def _chunks(rows: Tensor, width: int, workspace_bytes: int | None = None) -> list[slice]:
    """The rows in slices whose logits, `width` of 4 bytes each, fit the workspace."""
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES.get(rows.device.type, 1 << 30)
    size = max(1, workspace_bytes // (4 * max(width, 1)))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, scale: Tensor, form,
            workspace_bytes: int | None, wanted):
    """loss [M] of the rows, and the gradients of sum(scale * loss) for hidden, weight and bias, where wanted."""
    compute, V = scale.dtype, len(weight)
    x, w = hidden[rows].to(compute), weight.to(compute)
    b = None if bias is None else bias.to(compute)
    loss = torch.empty(len(rows), dtype=compute, device=hidden.device)
    grad_x = torch.empty_like(x) if wanted[0] else None
    grad_w = torch.zeros_like(w) if wanted[1] else None
    grad_b = torch.zeros(V, dtype=compute, device=w.device) if wanted[2] else None
    chunks = _chunks(rows, V, workspace_bytes)
    buffer = torch.empty(min(len(rows), chunks[0].stop if chunks else 0), V, dtype=compute, device=w.device)
    for chunk in chunks:
        target = targets[rows[chunk]]
        z = buffer[:len(target)]
        torch.mm(x[chunk], w.T, out=z) if b is None else torch.addmm(b, x[chunk], w.T, out=z)
        loss[chunk] = _to_gradient(z, target, scale[chunk], *form)
        if wanted[0]:
            torch.mm(z, w, out=grad_x[chunk])
        if wanted[1]:
            grad_w.addmm_(z.T, x[chunk])
        if wanted[2]:
            grad_b += z.sum(0)
    if grad_x is not None:
        grad_x = torch.zeros_like(hidden, dtype=compute).index_copy_(0, rows, grad_x)
    inputs, gradients = (hidden, weight, bias), (grad_x, grad_w, grad_b)
    # fp16 would lose what a gradient scaler's upstream gradient is still to lift into its range.
    return loss, *(g if g is None or x.dtype == torch.float16 else g.to(x.dtype)
                  for g, x in zip(gradients, inputs, strict=True))


def _to_gradient(z: Tensor, targets: Tensor, scale: Tensor, softcap: float | None, z_loss: float) -> Tensor:
    """Turn logits z [C, V] into the gradient of scale * loss with respect to them, in place; returns loss [C].

    A few rows at a time, so that the passes over them find them in the cache.
    """
    loss = torch.empty_like(scale)
    rows = max(1, (1 << 20) // (z.element_size() * max(z.shape[1], 1))) if z.device.type == "cpu" else len(z)
    for start in range(0, len(z), max(rows, 1)):
        part = slice(start, start + rows)
        logits, target = z[part], targets[part].unsqueeze(1)
        slope = None
        if softcap is not None:
            tanh = logits.div_(softcap).tanh_()
            slope = 1 - tanh**2
            logits.mul_(softcap)
        top = logits.amax(1, keepdim=True)
        target_logit = logits.gather(1, target) - top
        total = logits.sub_(top).exp_().sum(1, keepdim=True)
        lse = top + total.log()
        loss[part] = (total.log() - target_logit + (z_loss * lse**2 if z_loss else 0)).squeeze(1)
        logits.mul_(scale[part].unsqueeze(1) * (1 + 2 * z_loss * lse if z_loss else 1) / total)
        logits.scatter_add_(1, target, -scale[part].unsqueeze(1))
        if slope is not None:
            logits.mul_(slope)
    return loss
