"""Kullback-Leibler divergence of a student's words from a teacher's at the corrupted positions, for distillation.

With z = hidden @ weight.T + bias of the student and t = teacher_hidden @ teacher_weight.T + teacher_bias, both divided
by the temperature, p = softmax(t) and q = softmax(z), per corrupted position
    kl = sum over v of p[v] (log p[v] - log q[v]),    d kl / d z[v] = q[v] - p[v]
in nats. Only some rows of either's logits are stored at a time. Four products: the three of `products`, and the
teacher's.
N positions, V words, D and E hidden sizes of student and teacher.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import triton_support
from ..chunks import WORKSPACE_BYTES
from ..custom_op import Differentiable
from ..dispatch import Backend, choose
from .products import Chunk, logits_of, operands, three_products
from .rows import Form, Linear, Passes, Scale, Scored, scale_of, sums_dtype

OP = "linear_masked_kl_divergence"


class Teacher(NamedTuple):
    """As `Linear`, without gradients."""

    teacher_hidden: Tensor  # [N, E]
    teacher_weight: Tensor  # [V, E]
    teacher_bias: Tensor | None  # [V]


class Row(NamedTuple):
    """How a backend works on a chunk."""

    run: Callable  # (Chunk, teacher's logits [C, V], Scale, temperature, wanted) -> kl [C], as `products.RowPass`
    widen: bool = False


def row_pass(chunk: Chunk, teacher: Tensor, scale: Scale, temperature: float, wanted: bool) -> Tensor:
    """The reference's, which also overwrites the teacher's logits."""
    log_q, log_p = (x.div_(temperature).log_softmax(1) for x in (chunk.logits, teacher))
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0).sum(1)  # not 0 * infinity
    if wanted:
        torch.mul(log_q.exp() - p, (scale.plain / temperature).unsqueeze(1), out=chunk.logits)
    chunk.clear_rest(kl, wanted)
    return kl


BACKENDS = {OP: (
    Backend("triton", Row(triton_support.on_triton("masked_cross_entropy", "kl_row_pass")), triton_support.missing,
            triton_support.refuses),
    Backend("reference", Row(row_pass, widen=True)))}


def linear_masked_kl_divergence(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
                                corrupted: Tensor, *, bias: Tensor | None = None, teacher_bias: Tensor | None = None,
                                weights: Tensor | None = None, temperature: float = 1.0, count: int | None = None,
                                reduction: str = "mean", workspace_bytes: int | None = None,
                                backend: str | None = None) -> Tensor:
    """KL(teacher || student), in nats, of the words at the corrupted positions, from hidden states.

    Args:
        hidden: [..., D], weight: [V, D], bias: [V]: the student's, which get gradients.
        teacher_hidden: [..., E], teacher_weight: [V, E], teacher_bias: [V]: the teacher's, which get none.
        corrupted: [...] bool, the positions to compare; only these are read or multiplied.
        weights: [...] fp32, a factor per position; gets no gradient.
        temperature: divides both logits. Gradients shrink with its square, which a caller may multiply by.
        count, reduction: as `linear_masked_cross_entropy`, and so is what costs a product.
        workspace_bytes: the most memory for logits of both, of one row at least.
        backend: "triton" or "reference"; None takes the first that can run.
    Returns: [...] fp32 with reduction "none", else a scalar.
    Raises: ValueError if shapes, dtypes or devices disagree, or `backend` cannot run here; the message says why.
    """
    teacher = Teacher(teacher_hidden, teacher_weight, teacher_bias)
    _check(Linear(hidden, weight, bias), teacher, corrupted, weights, temperature, reduction, count)
    shape = corrupted.shape
    flat, factors = corrupted.flatten(), None if weights is None else weights.detach().flatten().contiguous()
    scored = Scored(torch.zeros_like(flat, dtype=torch.int64), flat, factors, None, count)
    student = Linear(hidden.flatten(0, -2), weight, bias)
    teacher = Teacher(*(None if x is None else x.detach() for x in (teacher_hidden.flatten(0, -2), *teacher[1:])))
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student]
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"{OP}: workspace_bytes must be above 0, or None for the default, not {workspace_bytes}")
    room = workspace_bytes or WORKSPACE_BYTES.get(hidden.device.type, WORKSPACE_BYTES["cuda"])
    form = Form(reduction, None, max(room // 2, 1))
    run = _operator if torch.compiler.is_compiling() else _eager
    loss = run(student, teacher, scored, form, float(temperature), needed, backend)
    return loss.view(shape) if reduction == "none" else loss


def _check(student: Linear, teacher: Teacher, corrupted: Tensor, weights: Tensor | None, temperature: float,
           reduction: str, count: int | None) -> None:
    for hidden, weight, bias in (student, teacher):
        if hidden.ndim < 2 or hidden.shape[:-1] != corrupted.shape or weight.ndim != 2 or (
                weight.shape != (len(student.weight), hidden.shape[-1])) or (
                bias is not None and bias.shape != weight.shape[:1]):
            got = [list(x.shape) for x in (*student, *teacher, corrupted) if x is not None]
            raise ValueError(f"{OP} takes hidden [..., D], weight [V, D] and bias [V] of both models, with the same "
                             f"positions and words, and corrupted [...], not {got}")
    if corrupted.dtype != torch.bool or (weights is not None and weights.shape != corrupted.shape):
        raise ValueError(f"{OP} takes bool corrupted and weights of its shape {list(corrupted.shape)}, not "
                         f"{corrupted.dtype} and {None if weights is None else list(weights.shape)}")
    tensors = [x for x in (*student, *teacher, corrupted, weights) if x is not None]
    if kinds := {str(x.dtype) for x in (*student, *teacher) if x is not None and not x.is_floating_point()}:
        raise ValueError(f"{OP} takes floating hidden states, weights and biases, not {', '.join(sorted(kinds))}")
    if len(devices := {str(x.device) for x in tensors}) > 1:
        raise ValueError(f"{OP}: inputs are on {', '.join(sorted(devices))}; move them to one device")
    if not temperature > 0:
        raise ValueError(f"{OP}: temperature must be above 0, not {temperature}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{OP}: reduction must be one of mean, sum, none, not {reduction!r}")
    if count is not None and corrupted.is_cpu and count != corrupted.sum():
        raise ValueError(f"{OP}: count is the number of corrupted positions, {int(corrupted.sum())}, not {count}")


def _passes(inputs: Linear, teacher: Teacher, temperature: float, backend: str | None) -> Passes:
    """The three products of the student, whose pass over a chunk's rows multiplies the teacher's."""
    run, widen = choose(OP, BACKENDS[OP], backend, inputs.hidden).run
    theirs = operands(Linear(*teacher), sums_dtype(inputs) if widen else None)

    def of_chunk(chunk: Chunk, scale: Scale, _: None, wanted: bool) -> Tensor:
        x = theirs.hidden[chunk.rows]
        if chunk.live is not None:
            x = x.masked_fill((torch.arange(len(x), device=x.device) >= chunk.live).unsqueeze(1), 0)
        return run(chunk, logits_of(x, theirs.weight, theirs.bias, None), scale, temperature, wanted)

    return three_products(of_chunk, widen=widen)


def _run_forward(inputs: Linear, teacher: Teacher, scored: Scored, form: Form, temperature: float,
                 needed: Sequence[bool], backend: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kl, kept = _passes(inputs, teacher, temperature, backend).forward(inputs, scored, form, needed)
    loss = scale_of(scored, form.reduction, kl.dtype).plain * kl
    return loss if form.reduction == "none" else loss.sum(), *kept


def _run_backward(grad, outputs, wanted, inputs, teacher, scored, form, temperature, _, backend):
    return _passes(inputs, teacher, temperature, backend).backward(grad, outputs[1:], inputs, scored, form, wanted)


def _fake(inputs, teacher, scored, form, temperature, needed, backend):
    passes = three_products(lambda *_: None)
    kl = torch.empty_like(scored.targets, dtype=sums_dtype(inputs))
    kept = (kl.new_empty(shape, dtype=dtype) for shape, dtype in passes.shapes(inputs, scored, form, needed))
    return kl if form.reduction == "none" else kl.new_empty(()), *kept


_eager = Differentiable("the masked Kullback-Leibler divergence", _run_forward, _run_backward, 3,
                        "use torch.nn.functional.kl_div on the corrupted rows")
_operator = _eager.register(OP, _fake)
