"""The loss from hidden states and the head in three products, which PyTorch multiplies (cuBLAS on a GPU).

The corrupted rows are gathered, as many at a time as the workspace has room for. For each such chunk
    z = x @ weight.T,    g = d loss / d z in its place,    grad_hidden = g @ weight,    grad_weight += g.T @ x,
where one pass over the rows of z, the backend's, finds nll and turns z into g. So the gradients come with the loss, and
the backward multiplies them by the upstream gradient. A loss per position has an upstream gradient per position, which
the forward does not know: there z is computed again in the backward, which makes four products.

z and g are in the dtype of the inputs, as they are where a model stores its logits; sums, nll and grad_weight are in
fp32. The gradients are stored in units of the largest scale, so that g stays in fp16's range whatever the weights.

The number of corrupted rows is needed on the host. On a GPU it is there only if the caller gives it; else all N rows
count as a chunk's, those that are corrupted first, and products of groups of rows, whose sizes stay on the GPU, leave
out the rest (`grouped_mm`, bf16 from Hopper on; elsewhere the rest is multiplied, as zeros). No host waits.
N positions, of which C are in a chunk, V words, D hidden size.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import ALIGNED, WORKSPACE_BYTES, empty_logits, rows_of_chunk
from .rows import (
    Form,
    Kept,
    Linear,
    Passes,
    Scale,
    Scored,
    scale_of,
    sums_dtype,
    with_rows_contiguous,
)


class Chunk(NamedTuple):
    """Some rows of logits, for a row pass."""

    rows: Tensor  # [C] int64, their positions
    logits: Tensor  # [C, V], rows contiguous
    targets: Tensor  # [C] int64
    live: Tensor | None  # int64 scalar on the device: rows from there on count as not corrupted; None: none do
    clear: bool  # whether the gradient of the rows that are not live is to be written, with zeros

    def clear_rest(self, found: Tensor, wanted: bool) -> None:
        """Zero what was `found` [C] of the rows that are not live and, if it is to be written, their gradient."""
        if self.live is None:
            return
        rest = torch.arange(len(found), device=found.device) >= self.live
        found.masked_fill_(rest, 0)
        if wanted and self.clear:
            self.logits.masked_fill_(rest.unsqueeze(1), 0)


# (Chunk, Scale [C], softcap, wanted) -> nll [C], 0 where not live; where wanted, the logits become the gradient.
RowPass = Callable[[Chunk, Scale, float | None, bool], Tensor]


class Gradients(NamedTuple):
    """Sums over the rows, in units of `unit`; empty where not wanted."""

    unit: Tensor  # scalar
    hidden: Tensor  # [N, D] in its dtype
    weight: Tensor  # [V, D] fp32
    bias: Tensor  # [V] fp32


def three_products(row_pass: RowPass, *, widen: bool = False) -> Passes:
    """The passes of a backend that has a row pass. widen: multiply in fp32, whatever the dtype."""
    return Passes(partial(_forward, row_pass, widen), partial(_backward, row_pass, widen), _shapes)


def _forward(row_pass: RowPass, widen: bool, inputs: Linear, scored: Scored, form: Form, wanted) -> tuple[Tensor, Kept]:
    wanted = _in_forward(form, wanted)
    scale = scale_of(scored, form.reduction, sums_dtype(inputs))
    return _run(row_pass, widen, inputs, scored, scale, form, wanted)


def _backward(row_pass: RowPass, widen: bool, grad: Tensor, kept: Kept, inputs: Linear, scored: Scored, form: Form,
              wanted) -> tuple[Tensor | None, ...]:
    found = Gradients(*kept)
    if form.reduction == "none":
        scale = scale_of(scored, form.reduction, grad.dtype).times(torch.where(scored.corrupted, grad, 0))
        _, found = _run(row_pass, widen, inputs, scored, scale, form, wanted)
        grad = torch.ones_like(found.unit)
    factor = found.unit * grad
    return tuple(torch.mul(x, factor, out=torch.empty_like(x, dtype=tensor.dtype)) if want else None
                 for x, tensor, want in zip(found[1:], inputs, wanted, strict=True))


def _shapes(inputs: Linear, scored: Scored, form: Form, wanted):
    dtype = sums_dtype(inputs)
    kinds = inputs.hidden.dtype, dtype, dtype
    return ((), dtype), *((x.shape if want else (0,), kind) for x, kind, want in zip(
        inputs, kinds, _in_forward(form, wanted), strict=True))


def _in_forward(form: Form, wanted) -> tuple[bool, ...]:
    return tuple(form.reduction != "none" and want for want in wanted)


@torch.no_grad()
def _run(row_pass: RowPass, widen: bool, inputs: Linear, scored: Scored, scale: Scale, form: Form,
         wanted) -> tuple[Tensor, Gradients]:
    """nll [N], and the gradients of sum(scale nll)."""
    hidden, weight, bias = operands(inputs, sums_dtype(inputs) if widen else None)
    unit = sum(x.abs() for x in scale if x is not None).amax() if len(hidden) else scale.plain.sum()
    unit = unit.clamp(min=torch.finfo(unit.dtype).tiny).log2().ceil().exp2()  # a power of two rounds nothing
    scale = scale.times(1 / unit)
    nll = torch.zeros_like(scale.plain)
    grad_hidden, grad_weight, grad_bias = _zeros(inputs, scale, wanted)
    empty = True
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, live in _chunks(hidden, len(weight), scored, form.workspace_bytes):
            x, grouped = hidden[rows], live is not None and bias is None and _groups(hidden, weight)
            if live is not None:
                beyond = (torch.arange(len(rows), device=x.device) >= live).unsqueeze(1)
                x = x.masked_fill(beyond, 0)
            z = logits_of(x, weight, bias, live if grouped else None)
            chunk = Chunk(rows, z, scored.targets[rows], live, clear=not grouped)
            nll[rows] = row_pass(chunk, Scale(*(None if s is None else s[rows] for s in scale)), form.softcap,
                                 any(wanted))
            if wanted[0]:
                product = _multiply(z, weight, live if grouped else None)
                grad_hidden[rows] = (product if not grouped else product.masked_fill(beyond, 0)).to(grad_hidden.dtype)
            if wanted[1]:
                _add_product(grad_weight, z, x, live if grouped else None, empty)
            if wanted[2]:
                grad_bias += z.sum(0, dtype=grad_bias.dtype)
            empty = False
            del z, chunk
    if wanted[1] and empty:
        grad_weight.zero_()
    if scored.count is not None and not hidden.is_cpu:  # a wrong count has left rows out, or scored others
        nll = torch.where(scored.corrupted.sum() == scored.count, nll, torch.nan)
    return nll, Gradients(unit, grad_hidden, grad_weight, grad_bias)


def operands(inputs: Linear, dtype: torch.dtype | None) -> Linear:
    """hidden, weight and bias in one dtype, the wider of the two of hidden and weight."""
    dtype = dtype or torch.promote_types(inputs.hidden.dtype, inputs.weight.dtype)
    hidden, weight = (with_rows_contiguous(x.to(dtype)) for x in inputs[:2])
    return Linear(hidden, weight, None if inputs.bias is None else inputs.bias.to(dtype))


def _zeros(inputs: Linear, scale: Scale, wanted) -> list[Tensor]:
    """What the gradients are summed in; that of weight is written by the first chunk."""
    like, dtypes = scale.plain, (inputs.hidden.dtype, scale.plain.dtype, scale.plain.dtype)
    made = []
    for x, make, dtype, want in zip(inputs, (like.new_zeros, like.new_empty, like.new_zeros), dtypes, wanted,
                                    strict=True):
        made.append(make(x.shape, dtype=dtype) if want else like.new_empty(0, dtype=dtype))
    return made


def _chunks(hidden: Tensor, words: int, scored: Scored, workspace_bytes: int | None
            ) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Positions of a chunk, and how many of them are corrupted where the host does not know that it is all."""
    rows, live = _corrupted_first(scored)
    room = workspace_bytes or WORKSPACE_BYTES.get(hidden.device.type, WORKSPACE_BYTES["cuda"])
    size = rows_of_chunk(len(rows), words * hidden.element_size(), room)
    for start in range(0, len(rows), size):
        yield rows[start:start + size], None if live is None else live - start


def _corrupted_first(scored: Scored) -> tuple[Tensor, Tensor | None]:
    """The corrupted positions; where their number is not known on the host, all positions, and it."""
    if scored.corrupted.is_cpu:
        return scored.corrupted.nonzero().squeeze(1), None
    order = scored.corrupted.byte().argsort(descending=True, stable=True)
    return (order, scored.corrupted.sum()) if scored.count is None else (order[:scored.count], None)


def _groups(hidden: Tensor, weight: Tensor) -> bool:
    """Whether products can leave out rows whose number is on the GPU."""
    return (hasattr(F, "grouped_mm") and hidden.is_cuda and hidden.dtype == torch.bfloat16
            and not any(size * hidden.element_size() % ALIGNED for size in (*weight.shape, weight.stride(0)))
            and torch.cuda.get_device_capability(hidden.device) >= (9, 0))


def _ends(live: Tensor, rows: int) -> Tensor:
    return live.clamp(0, rows).int().unsqueeze(0)


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor | None) -> Tensor:
    """x @ weight.T + bias [C, V]; of the first `live` rows if it is given, the others being arbitrary."""
    if live is not None:
        return F.grouped_mm(x, weight.T.unsqueeze(0), offs=_ends(live, len(x)))
    z = empty_logits(x, len(x), len(weight), x.dtype)
    return torch.mm(x, weight.T, out=z) if bias is None else torch.addmm(bias, x, weight.T, out=z)


def _multiply(g: Tensor, weight: Tensor, live: Tensor | None) -> Tensor:
    if live is None:
        return torch.mm(g, weight)
    return F.grouped_mm(g, weight.unsqueeze(0), offs=_ends(live, len(g)))


def _add_product(total: Tensor, g: Tensor, x: Tensor, live: Tensor | None, first: bool) -> None:
    """total += g.T @ x in fp32; the first time in its place."""
    if live is not None:
        product = F.grouped_mm(g.T, x, offs=_ends(live, len(x)))[0].masked_fill_(live <= 0, 0)  # in bf16
        total.copy_(product) if first else total.add_(product)
    elif g.is_cuda and g.dtype != total.dtype:
        torch.addmm(total, g.T, x, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:  # of 16 bits on a CPU: the interpreter's
        torch.addmm(total, g.T.to(total.dtype), x.to(total.dtype), beta=0 if first else 1, out=total)
