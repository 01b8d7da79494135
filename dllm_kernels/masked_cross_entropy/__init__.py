"""Cross-entropy of the corrupted positions of a masked-diffusion batch, from logits or straight from hidden states.

nll[n] = logsumexp(z[n]) - z[n, targets[n]], in nats, where corrupted[n]; z = logits, or hidden @ weight.T + bias.
loss = weights * nll per position ("none"), its sum ("sum"), or that sum divided by the number corrupted ("mean").
softcap c puts c * tanh(z / c) in the place of z (Gemma 2, arXiv:2408.00118).

N positions (batch and length flattened), V words, D hidden size. Half of a batch is typically not corrupted: those rows
are never read, and with `linear_masked_cross_entropy` the [N, V] logits never exist.
"""

import torch
from torch import Tensor

from dllm_kernels import native_extension, triton_support
from dllm_kernels.custom_op import Differentiable
from dllm_kernels.dispatch import Backend, choose, takes
from dllm_kernels.masked_cross_entropy import cpu, cuda, reference, rows
from dllm_kernels.masked_cross_entropy.rows import Form, Linear, Passes, Scales, Scored

__all__ = ["linear_masked_cross_entropy", "masked_cross_entropy"]


def _on_triton(*passes: str) -> Backend:
    functions = (triton_support.on_triton("masked_cross_entropy", name) for name in passes)
    return Backend("triton", Passes(*functions), triton_support.missing, triton_support.refuses)


REFERENCE = Backend("reference", Passes(reference.statistics, reference.gradients))
LOGITS_BACKENDS = (
    Backend("cpu", Passes(cpu.statistics, cpu.gradients), native_extension.why_missing, takes("cpu")),
    _on_triton("statistics", "gradients"),
    Backend("cuda", Passes(cuda.statistics, cuda.gradients), cuda.missing, takes("cuda")),
    REFERENCE)
LINEAR_BACKENDS = (
    Backend("cpu", Passes(cpu.linear_statistics, cpu.linear_gradients), native_extension.why_missing, takes("cpu")),
    _on_triton("linear_statistics", "linear_gradients"),
    REFERENCE)
BACKENDS = {"masked_cross_entropy": LOGITS_BACKENDS, "linear_masked_cross_entropy": LINEAR_BACKENDS}

_REDUCTIONS = ("mean", "sum", "none")


def masked_cross_entropy(logits: Tensor, targets: Tensor, corrupted: Tensor, *, weights: Tensor | None = None,
                         reduction: str = "mean", softcap: float | None = None, backend: str | None = None) -> Tensor:
    """Negative log-likelihood, in nats, of the tokens that a masked-diffusion batch corrupted, from its logits.

    Drop-in for ``F.cross_entropy(logits, targets, reduction="none") * corrupted``, without the rows it zeroes.

    Args:
        logits: [..., V], bf16, fp16 or fp32; summed in fp32 whatever the dtype.
        targets: [...] int64 in [0, V), the clean tokens; read only where corrupted. The range is checked on a CPU. On
            a GPU the check would stall it: there a target out of range reads nothing, and makes its loss NaN.
        corrupted: [...] bool, the positions to score.
        weights: [...] fp32, a factor per position (1/t, document weights); gets no gradient.
        reduction: "none" gives weights * nll, [...] fp32, exactly 0 where not corrupted; "sum" its sum; "mean" that sum
            divided by the number corrupted (0 if none is).
        softcap: bounds the logits smoothly; None does not.
        backend: a name of the backends, None takes the first that can run.
    Raises: ValueError if shapes, dtypes or devices disagree, a target is out of range, or `backend` cannot run here;
        the message says why.
    """
    op, scored, form = "masked_cross_entropy", Scored(targets, corrupted, weights), Form(reduction, softcap)
    _check(op, "logits [..., V]", logits, scored, form)
    run = _logits_operator if torch.compiler.is_compiling() else _logits
    loss = run(logits.flatten(0, -2), _flat(scored), form, backend)
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_masked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, corrupted: Tensor, *,
                                bias: Tensor | None = None, weights: Tensor | None = None, reduction: str = "mean",
                                softcap: float | None = None, workspace_bytes: int | None = None, group=None,
                                backend: str | None = None) -> Tensor:
    """`masked_cross_entropy` of the logits hidden @ weight.T + bias, which are never stored.

    Exact for any upstream gradient, per position too. A weight or hidden that needs no gradient costs no product.

    Args:
        hidden: [..., D], bf16, fp16 or fp32: the last hidden states. Only corrupted rows are read or multiplied.
        weight: [V, D], the head. Its gradient is summed in fp32.
        bias: [V].
        targets, corrupted, weights, reduction, softcap, backend: as `masked_cross_entropy`.
        workspace_bytes: the most memory that the backend takes for logits or their gradients, though always enough for
            a tile of rows ("triton", 128) or a row ("reference"); "cpu" stores none. None: 1 GiB, 64 MiB on a CPU.
        group: a process group of torch.distributed each of whose processes holds some of the words, in the order of
            ranks: weight and bias are then this process's, targets count through all of them, and the rest is the same
            in every process, as is the loss. Not under torch.compile(fullgraph=True).
    Raises: ValueError as `masked_cross_entropy`.
    """
    op, inputs = "linear_masked_cross_entropy", Linear(hidden, weight, bias)
    scored, form = Scored(targets, corrupted, weights), Form(reduction, softcap, workspace_bytes)
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
        loss = _run_parallel(inputs, scored, form, group, backend)
    else:
        run = _linear_operator if torch.compiler.is_compiling() else _linear
        loss = run(inputs, scored, form, backend)
    return loss.view(targets.shape) if reduction == "none" else loss


def _check(op: str, name: str, inputs: Tensor, scored: Scored, form: Form, *head: Tensor | None) -> None:
    shapes = [inputs.shape[:-1], *(x.shape for x in scored if x is not None)]
    if inputs.ndim < 2 or any(shape != shapes[0] for shape in shapes):
        got = [list(x.shape) for x in (inputs, *scored) if x is not None]
        raise ValueError(f"{op} takes {name}, targets [...], corrupted [...] and weights [...], not {got}")
    targets, corrupted, _ = scored
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
    devices = {str(x.device) for x in (inputs, *scored, *head) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: inputs are on {', '.join(sorted(devices))}; move them to one device")


def _check_targets(op: str, scored: Scored, words: int) -> None:
    targets, corrupted, _ = scored
    if not targets.is_cpu or not corrupted.any():
        return
    low, high = (int(bound) for bound in targets[corrupted].aminmax())
    if low < 0 or high >= words:
        raise ValueError(f"{op}: targets of corrupted positions must be in [0, {words}), not {low} to {high}; is the "
                         "vocabulary that of the tokenizer?")


def _flat(scored: Scored) -> Scored:
    targets, corrupted, weights = (None if x is None else x.flatten().contiguous() for x in scored)
    return Scored(targets, corrupted, None if weights is None else weights.detach())


def _run_parallel(inputs: Linear, scored: Scored, form: Form, group, backend: str | None) -> Tensor:
    from dllm_kernels.masked_cross_entropy.vocabulary_parallel import combine, count_words

    sizes = count_words(inputs.weight, group)
    if scored.targets.is_cpu:
        _check_targets("linear_masked_cross_entropy", scored, int(sizes.sum()))

    def slice_nll(inputs, scored):
        return _linear(inputs, scored._replace(weights=None), form._replace(reduction="none"), backend)

    nll = combine(slice_nll, inputs, scored, form.softcap, sizes, group)
    return rows.reduce(nll, rows.scales_of(scored, form.reduction, nll.dtype), form.reduction)


def _define(op: str, kind: type, inputs_with_gradients: int) -> tuple[Differentiable, Differentiable]:
    """The operation with inputs of this type, for eager calls and under torch.compile."""

    def run_forward(inputs: kind, scored: Scored, form: Form, backend: str | None
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensor, words = (inputs.hidden, len(inputs.weight)) if kind is Linear else (inputs, inputs.shape[1])
        passes = choose(op, BACKENDS[op], backend, tensor).run
        _check_targets(op, scored, words)
        return rows.forward(passes, inputs, scored, form)

    def run_backward(grad, outputs, wanted, inputs, scored, form, backend):
        passes = choose(op, BACKENDS[op], backend, inputs.hidden if kind is Linear else inputs).run
        return rows.backward(passes, grad, Scales(*outputs[1:]), wanted, inputs, scored, form)

    def fake(inputs, scored, form, backend):
        dtype = torch.promote_types((inputs.hidden if kind is Linear else inputs).dtype, torch.float32)
        loss, *scales = (torch.empty_like(scored.targets, dtype=dtype) for _ in range(4))
        return loss if form.reduction == "none" else loss.new_empty(()), *scales

    function = Differentiable("masked cross-entropy", run_forward, run_backward, inputs_with_gradients,
                              "use torch.nn.functional.cross_entropy on the corrupted rows")
    return function, function.register(op, fake)


_logits, _logits_operator = _define("masked_cross_entropy", Tensor, 1)
_linear, _linear_operator = _define("linear_masked_cross_entropy", Linear, 3)
