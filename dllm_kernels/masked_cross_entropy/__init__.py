"""Cross-entropy of the corrupted positions of a masked-diffusion batch, from logits or straight from hidden states.

nll[n] = logsumexp(z[n]) - z[n, targets[n]], in nats, where corrupted[n]; z = logits, or hidden @ weight.T + bias.
loss = weights * nll per position ("none"), its sum ("sum"), or that sum divided by the number corrupted ("mean").
softcap c puts c * tanh(z / c) in the place of z (Gemma 2, arXiv:2408.00118).

N positions (batch and length flattened), V words, D hidden size. Half of a batch is typically not corrupted: those rows
are never read, and with `linear_masked_cross_entropy` the [N, V] logits never exist.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import native_extension, triton_support
from ..custom_op import Differentiable
from ..dispatch import Backend, choose, takes
from . import cpu, cuda, reference
from .products import three_products
from .rows import Form, Linear, Passes, Scored, scale_of, sums_dtype, two_passes

__all__ = ["linear_masked_cross_entropy", "masked_cross_entropy"]


_ON_CPU = {"missing": native_extension.why_missing, "refuses": takes("cpu")}
_ON_CUDA = {"missing": cuda.missing, "refuses": takes("cuda")}
_ON_TRITON = {"missing": triton_support.missing, "refuses": triton_support.refuses}


def _triton(function: str):
    return triton_support.on_triton("masked_cross_entropy", function)


LOGITS_BACKENDS = (
    Backend("cpu", two_passes(cpu.statistics, cpu.gradients), **_ON_CPU),
    Backend("cuda", two_passes(cuda.statistics, cuda.gradients), **_ON_CUDA),
    Backend("triton", two_passes(_triton("statistics"), _triton("gradients")), **_ON_TRITON),
    Backend("reference", two_passes(reference.statistics, reference.gradients)))
LINEAR_BACKENDS = (
    Backend("cpu", two_passes(cpu.linear_statistics, cpu.linear_gradients), **_ON_CPU),
    Backend("cuda", three_products(cuda.row_pass), **_ON_CUDA),
    Backend("triton", three_products(_triton("row_pass")), **_ON_TRITON),
    Backend("reference", three_products(reference.row_pass, widen=True)))
BACKENDS = {"masked_cross_entropy": LOGITS_BACKENDS, "linear_masked_cross_entropy": LINEAR_BACKENDS}

_REDUCTIONS = ("mean", "sum", "none")


def masked_cross_entropy(logits: Tensor, targets: Tensor, corrupted: Tensor, *, weights: Tensor | None = None,
                         probability_weights: Tensor | None = None, reduction: str = "mean",
                         softcap: float | None = None, return_nll: bool = False, backend: str | None = None
                         ) -> Tensor | tuple[Tensor, Tensor]:
    """Negative log-likelihood, in nats, of the tokens that a masked-diffusion batch corrupted, from its logits.

    Drop-in for ``F.cross_entropy(logits, targets, reduction="none") * corrupted``, without the rows it zeroes.

    Args:
        logits: [..., V], bf16, fp16 or fp32; summed in fp32 whatever the dtype.
        targets: [...] int64 in [0, V), the clean tokens; read only where corrupted. The range is checked on a CPU. On
            a GPU the check would stall it: there a target out of range reads nothing, and makes its loss NaN.
        corrupted: [...] bool, the positions to score.
        weights: [...] fp32, a factor per position (1/t, document weights); gets no gradient.
        probability_weights: [...] fp32: adds probability_weights * exp(-nll) to the factor, a constant to the gradient
            (with 1/r the planner term of path learning).
        reduction: "none" gives weights * nll, [...] fp32, exactly 0 where not corrupted; "sum" its sum; "mean" that sum
            divided by the number corrupted (0 if none is).
        softcap: bounds the logits smoothly; None does not.
        return_nll: also give the unweighted nll, [...] fp32 without gradient, 0 where not corrupted.
        backend: a name of the backends, None takes the first that can run.
    Raises: ValueError if shapes, dtypes or devices disagree, a target is out of range, or `backend` cannot run here;
        the message says why.
    """
    op, scored = "masked_cross_entropy", Scored(targets, corrupted, weights, probability_weights)
    form = Form(reduction, softcap)
    _check(op, "logits [..., V]", logits, scored, form)
    found = _run(_logits, _logits_operator, logits.flatten(0, -2), _flat(scored), form, backend)
    return _shaped(found, form, targets, return_nll)


def linear_masked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, corrupted: Tensor, *,
                                bias: Tensor | None = None, weights: Tensor | None = None,
                                probability_weights: Tensor | None = None, count: int | None = None,
                                reduction: str = "mean", softcap: float | None = None,
                                workspace_bytes: int | None = None, return_nll: bool = False, group=None,
                                backend: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """`masked_cross_entropy` of the logits hidden @ weight.T + bias, of which only some rows are stored at a time.

    Exact for any upstream gradient, per position too. A weight or hidden that needs no gradient costs no product.
    Except on "cpu" the gradients come with the loss, in three products with the head; "none", whose upstream gradients
    only the backward knows, takes a fourth. So call it under torch.no_grad() where no gradient is wanted.

    Args:
        hidden: [..., D], bf16, fp16 or fp32: the last hidden states. Only corrupted rows are read or multiplied.
        weight: [V, D], the head. Its gradient is summed in fp32.
        bias: [V].
        targets, corrupted, weights, probability_weights, reduction, softcap, return_nll, backend: as
            `masked_cross_entropy`.
        count: how many positions are corrupted, if it is known. On a GPU, where counting would stall the host, it
            spares copies and products of the others. A wrong one raises on a CPU, and makes the loss NaN on a GPU.
        workspace_bytes: the most memory for logits, of one row at least; "cpu" stores none. None: 896 MiB, 64 MiB on a
            CPU. The logits are in the inputs' dtype, in fp32 on "reference".
        group: a process group of torch.distributed each of whose processes holds some of the words, in the order of
            ranks: weight and bias are then this process's, targets count through all of them, and the rest is the same
            in every process, as is the loss. Not under torch.compile(fullgraph=True).
    Raises: ValueError as `masked_cross_entropy`.
    """
    op, inputs = "linear_masked_cross_entropy", Linear(hidden, weight, bias)
    scored = Scored(targets, corrupted, weights, probability_weights, count)
    form = Form(reduction, softcap, workspace_bytes)
    _check(op, "hidden [..., D]", hidden, scored, form, weight, bias)
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"{op}: workspace_bytes must be above 0, or None for the default, not {workspace_bytes}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        got = [list(x.shape) for x in inputs if x is not None]
        raise ValueError(f"{op} takes hidden [..., D], weight [V, D] and bias [V], not {got}")
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"{op} takes a plain weight, not a DTensor; inside a module that FSDP wraps it is one, "
                         "elsewhere take weight.full_tensor(), or weight.to_local() and group=")
    inputs, scored = inputs._replace(hidden=hidden.flatten(0, -2)), _flat(scored)
    if group is not None:
        found = _run_parallel(inputs, scored, form, group, backend)
    else:
        found = _run(_linear, _linear_operator, inputs, scored, form, backend)
    return _shaped(found, form, targets, return_nll)


def _check(op: str, name: str, inputs: Tensor, scored: Scored, form: Form, *head: Tensor | None) -> None:
    targets, corrupted, *weights, count = scored
    tensors = [inputs, *(x for x in (targets, corrupted, *weights) if x is not None)]
    if inputs.ndim < 2 or any(x.shape != inputs.shape[:-1] for x in tensors[1:]):
        got = [list(x.shape) for x in tensors]
        raise ValueError(f"{op} takes {name}, targets [...], corrupted [...] and weights [...], not {got}")
    if targets.dtype != torch.int64 or corrupted.dtype != torch.bool or not inputs.is_floating_point():
        raise ValueError(f"{op} takes floating {name}, int64 targets and bool corrupted, not {inputs.dtype}, "
                         f"{targets.dtype} and {corrupted.dtype}")
    if form.reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(_REDUCTIONS)}, not {form.reduction!r}")
    if form.softcap is not None and not form.softcap > 0:
        raise ValueError(f"{op}: softcap must be above 0, or None for none, not {form.softcap}")
    for x in head:
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{op} takes a floating weight and bias, not {x.dtype}")
    devices = {str(x.device) for x in (*tensors, *head) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: inputs are on {', '.join(sorted(devices))}; move them to one device")
    if count is not None and corrupted.is_cpu and count != corrupted.sum():
        raise ValueError(f"{op}: count is the number of corrupted positions, {int(corrupted.sum())}, not {count}")


def _check_targets(op: str, scored: Scored, words: int) -> None:
    targets, corrupted = scored[:2]
    if not targets.is_cpu or not corrupted.any():
        return
    low, high = (int(bound) for bound in targets[corrupted].aminmax())
    if low < 0 or high >= words:
        raise ValueError(f"{op}: targets of corrupted positions must be in [0, {words}), not {low} to {high}; is the "
                         "vocabulary that of the tokenizer?")


def _flat(scored: Scored) -> Scored:
    *tensors, count = scored
    targets, corrupted, *weights = (None if x is None else x.flatten().contiguous() for x in tensors)
    return Scored(targets, corrupted, *(None if x is None else x.detach() for x in weights), count)


def _shaped(found: tuple[Tensor, Tensor], form: Form, targets: Tensor, return_nll: bool):
    loss, nll = found
    loss = loss.view(targets.shape) if form.reduction == "none" else loss
    return (loss, nll.detach().view(targets.shape)) if return_nll else loss


def _run(eager: Callable, operator: Callable, inputs: Tensor | Linear, scored: Scored, form: Form,
         backend: str | None) -> tuple[Tensor, Tensor]:
    """The loss, and nll [N]."""
    tensors = inputs if isinstance(inputs, Linear) else (inputs,)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    return (operator if torch.compiler.is_compiling() else eager)(inputs, scored, form, wanted, backend)


def _run_parallel(inputs: Linear, scored: Scored, form: Form, group, backend: str | None) -> tuple[Tensor, Tensor]:
    from .vocabulary_parallel import combine, count_words

    sizes = count_words(inputs.weight, group)
    if scored.targets.is_cpu:
        _check_targets("linear_masked_cross_entropy", scored, int(sizes.sum()))

    def slice_nll(inputs, scored):
        scored = scored._replace(weights=None, probability_weights=None)
        return _run(_linear, _linear_operator, inputs, scored, form._replace(reduction="none"), backend)[0]

    nll = combine(slice_nll, inputs, scored, form.softcap, sizes, group)
    return _reduce(nll, scored, form), nll


def _reduce(nll: Tensor, scored: Scored, form: Form) -> Tensor:
    loss = scale_of(scored, form.reduction, nll.dtype).at(nll.detach()) * nll
    return loss if form.reduction == "none" else loss.sum()


def _define(op: str, kind: type, inputs_with_gradients: int) -> tuple[Callable, Callable]:
    """The operation with inputs of this type, for eager calls and under torch.compile."""

    def passes_for(inputs: kind, backend: str | None) -> Passes:
        return choose(op, BACKENDS[op], backend, inputs.hidden if kind is Linear else inputs).run

    def run_forward(inputs: kind, scored: Scored, form: Form, needed: Sequence[bool], backend: str | None
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        passes = passes_for(inputs, backend)
        _check_targets(op, scored, len(inputs.weight) if kind is Linear else inputs.shape[1])
        nll, kept = passes.forward(inputs, scored, form, needed)
        return _reduce(nll, scored, form), nll, *kept

    def run_backward(grad, outputs, wanted, inputs, scored, form, _, backend):
        return passes_for(inputs, backend).backward(grad, outputs[2:], inputs, scored, form, wanted)

    def fake(inputs, scored, form, wanted, backend):
        nll = torch.empty_like(scored.targets, dtype=sums_dtype(inputs))
        loss = torch.empty_like(nll) if form.reduction == "none" else nll.new_empty(())
        shapes = passes_for(inputs, backend).shapes(inputs, scored, form, wanted)
        return loss, nll, *(nll.new_empty(shape, dtype=dtype) for shape, dtype in shapes)

    function = Differentiable("masked cross-entropy", run_forward, run_backward, inputs_with_gradients,
                              "use torch.nn.functional.cross_entropy on the corrupted rows", results=2)
    return function, function.register(op, fake)


_logits, _logits_operator = _define("masked_cross_entropy", Tensor, 1)
_linear, _linear_operator = _define("linear_masked_cross_entropy", Linear, 3)
