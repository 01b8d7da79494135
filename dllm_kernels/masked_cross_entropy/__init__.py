"""Cross-entropy of the corrupted positions of a masked-diffusion batch, from logits or straight from hidden states.

nll[n] = logsumexp(z[n]) - z[n, targets[n]], in nats, where corrupted[n]; z = logits, or hidden @ weight.T + bias.
loss = weights * nll per position ("none"), its sum ("sum"), or that sum divided by the number corrupted ("mean").
softcap c puts c * tanh(z / c) in the place of z (Gemma 2, arXiv:2408.00118); z_loss adds z_loss * logsumexp(z)^2 to nll
(ST-MoE, arXiv:2202.08906).

N positions (batch and length flattened), V words, D hidden size. Half of a batch is typically not corrupted: those rows
are never read, and with `linear_masked_cross_entropy` the [N, V] logits never exist.
"""

import importlib

import torch
from torch import Tensor

from dllm_kernels import triton_support
from dllm_kernels.dispatch import Backend, choose
from dllm_kernels.masked_cross_entropy import cpu, cuda, reference
from dllm_kernels.operators import define_operator

__all__ = ["linear_masked_cross_entropy", "masked_cross_entropy"]


def _on_triton(function: str) -> Backend:
    """A function of triton_kernels.py, which imports Triton, so not before it is called."""

    def run(*arguments):
        kernels = importlib.import_module("dllm_kernels.masked_cross_entropy.triton_kernels")
        return getattr(kernels, function)(*arguments)

    return Backend("triton", run, triton_support.missing, triton_support.refuses)


LOGITS_BACKENDS = (Backend("cpu", cpu.masked_cross_entropy, cpu.missing, cpu.refuses),
                   _on_triton("masked_cross_entropy"),
                   Backend("cuda", cuda.masked_cross_entropy, cuda.missing, cuda.refuses),
                   Backend("reference", reference.masked_cross_entropy))
LINEAR_BACKENDS = (Backend("cpu", cpu.linear_masked_cross_entropy, cpu.missing, cpu.refuses),
                   _on_triton("linear_masked_cross_entropy"),
                   Backend("reference", reference.linear_masked_cross_entropy))
BACKENDS = {"masked_cross_entropy": LOGITS_BACKENDS, "linear_masked_cross_entropy": LINEAR_BACKENDS}

_REDUCTIONS = ("mean", "sum", "none")


def masked_cross_entropy(logits: Tensor, targets: Tensor, corrupted: Tensor, *, weights: Tensor | None = None,
                         reduction: str = "mean", softcap: float | None = None, z_loss: float = 0.0,
                         backend: str | None = None) -> Tensor:
    """Negative log-likelihood, in nats, of the tokens that a masked-diffusion batch corrupted, from its logits.

    Drop-in for ``F.cross_entropy(logits, targets, reduction="none") * corrupted``, without the rows it zeroes.

    Args:
        logits: [..., V], bf16, fp16 or fp32; summed in fp32 whatever the dtype.
        targets: [...] int64 in [0, V), the clean tokens; read only where corrupted. The range is checked on a CPU. On
            a GPU that would stall it: there a target out of range reads nothing, and makes its loss NaN.
        corrupted: [...] bool, the positions to score.
        weights: [...] fp32, a factor per position (1/t, document weights); gets no gradient.
        reduction: "none" gives weights * nll, [...] fp32, exactly 0 where not corrupted; "sum" its sum; "mean" that sum
            divided by the number corrupted (0 if none is).
        softcap: bounds the logits smoothly; None does not.
        z_loss: factor of the penalty on the normaliser.
        backend: a name of the backends, None takes the first that can run.
    Raises: ValueError if shapes, dtypes or devices disagree, a target is out of range, or `backend` cannot run here;
        the message says why.
    """
    _check("masked_cross_entropy", "logits [..., V]", logits, targets, corrupted, weights, reduction, softcap)
    run = _logits_operator if torch.compiler.is_compiling() else _run_logits
    loss = run(logits.flatten(0, -2), targets.flatten(), corrupted.flatten(), _flat(weights), reduction, softcap,
               z_loss, backend)
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_masked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, corrupted: Tensor, *,
                                bias: Tensor | None = None, weights: Tensor | None = None, reduction: str = "mean",
                                softcap: float | None = None, z_loss: float = 0.0, skip_below: float = 0.0,
                                workspace_bytes: int | None = None, group=None, backend: str | None = None) -> Tensor:
    """`masked_cross_entropy` of the logits hidden @ weight.T + bias, which are never stored.

    Exact for any upstream gradient, per position too. A weight or hidden that needs no gradient costs no product.

    With skip_below = e (as the gradient filter of Cut Your Losses, arXiv:2411.09009, whose e is 2^-12 for bf16), the
    backward leaves out tiles of rows and words in which every softmax probability is below e and no row has its target.
    The loss does not change. The gradient g[n] of a left out logit is given as 0 where it is below e * s[n], s[n] the
    row's upstream gradient times its weight (over the number corrupted, for a mean; times |1 + 2 z_loss lse|). So the
    errors are below
        e * s[n] * sum over v of |weight[v, d]|    in the gradient of hidden[n, d],
        e * sum over n of s[n] * |hidden[n, d]|    in that of weight[v, d], and    e * sum over n of s[n]    in bias[v].
    What is left out are probabilities, all of one sign, so it adds up: rare words are no longer made rarer where they
    are unlikely already. It pays where all words of a tile are unlikely, as when the vocabulary is sorted by frequency.

    Args:
        hidden: [..., D], bf16, fp16 or fp32: the last hidden states. Only corrupted rows are read or multiplied.
        weight: [V, D], the head. Its gradient is summed in fp32.
        bias: [V].
        targets, corrupted, weights, reduction, softcap, z_loss, backend: as `masked_cross_entropy`.
        skip_below: a probability, 0 skips nothing. What is skipped depends on the backend's tiles: 16 rows by 128 words
            ("cpu"), 128 by 128 ("triton", 64 by 64 in fp32), none ("reference").
        workspace_bytes: at most so much memory for what the backend stores of logits or their gradients, though always
            for a tile of rows ("triton", 128) or a row ("reference"); "cpu" stores none. None: 1 GiB, 64 MiB on a CPU.
        group: a process group of torch.distributed each of whose processes holds some of the words, in the order of
            ranks: weight and bias are then this process's, targets count through all of them, and the rest is the same
            in every process, as is the loss. skip_below then judges by the probabilities among this process's words,
            which are larger, and skips less. Not under torch.compile(fullgraph=True).
    Raises: ValueError as `masked_cross_entropy`.
    """
    op = "linear_masked_cross_entropy"
    _check(op, "hidden [..., D]", hidden, targets, corrupted, weights, reduction, softcap, weight, bias)
    if not 0 <= skip_below < 1:
        raise ValueError(f"{op}: skip_below is a probability in [0, 1), not {skip_below}; 0 skips nothing")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"{op}: workspace_bytes must be above 0, or None for the default, not {workspace_bytes}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        got = [list(x.shape) for x in (hidden, weight, bias) if x is not None]
        raise ValueError(f"{op} takes hidden [..., D], weight [V, D] and bias [V], not {got}")
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"{op} takes a plain weight, not a DTensor; inside a module that FSDP wraps it is one, "
                         "elsewhere take weight.full_tensor(), or weight.to_local() and group=")
    if group is not None:
        return _run_parallel(hidden, weight, targets, corrupted, bias, weights, reduction, softcap, z_loss, skip_below,
                             workspace_bytes, group, backend)
    run = _linear_operator if torch.compiler.is_compiling() else _run_linear
    loss = run(hidden.flatten(0, -2), weight, targets.flatten(), corrupted.flatten(), bias, _flat(weights), reduction,
               softcap, z_loss, skip_below, workspace_bytes, backend)
    return loss.view(targets.shape) if reduction == "none" else loss


def _check(op, name, inputs, targets, corrupted, weights, reduction, softcap, *head):
    shapes = [inputs.shape[:-1], targets.shape, corrupted.shape, *([] if weights is None else [weights.shape])]
    if inputs.ndim < 2 or any(shape != shapes[0] for shape in shapes):
        got = [list(x.shape) for x in (inputs, targets, corrupted, weights) if x is not None]
        raise ValueError(f"{op} takes {name}, targets [...], corrupted [...] and weights [...], not {got}")
    if targets.dtype != torch.int64 or corrupted.dtype != torch.bool or not inputs.is_floating_point():
        raise ValueError(f"{op} takes floating {name}, int64 targets and bool corrupted, not {inputs.dtype}, "
                         f"{targets.dtype} and {corrupted.dtype}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(_REDUCTIONS)}, not {reduction!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be above 0, or None for none, not {softcap}")
    for x in head:
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{op} takes a floating weight and bias, not {x.dtype}")
    devices = {str(x.device) for x in (inputs, targets, corrupted, weights, *head) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: inputs are on {', '.join(sorted(devices))}; move them to one device")


def _check_targets(op, targets, corrupted, words):
    if targets.device.type != "cpu" or not corrupted.any():
        return
    low, high = (int(bound) for bound in targets[corrupted].aminmax())
    if low < 0 or high >= words:
        raise ValueError(f"{op}: targets of corrupted positions must be in [0, {words}), not {low} to {high}; is the "
                         "vocabulary that of the tokenizer?")


def _flat(weights):
    return None if weights is None else weights.detach().flatten()


def _run_logits(logits, targets, corrupted, weights, reduction, softcap, z_loss, backend):
    chosen = choose("masked_cross_entropy", LOGITS_BACKENDS, backend, logits)
    _check_targets("masked_cross_entropy", targets, corrupted, logits.shape[1])
    return chosen.run(logits, targets, corrupted, weights, reduction, softcap, z_loss)


def _run_linear(hidden, weight, targets, corrupted, bias, weights, reduction, softcap, z_loss, skip_below,
                workspace_bytes, backend):
    chosen = choose("linear_masked_cross_entropy", LINEAR_BACKENDS, backend, hidden)
    _check_targets("linear_masked_cross_entropy", targets, corrupted, len(weight))
    return chosen.run(hidden, weight, targets, corrupted, bias, weights, reduction, softcap, z_loss, skip_below,
                      workspace_bytes)


def _run_parallel(hidden, weight, targets, corrupted, bias, weights, reduction, softcap, z_loss, skip_below,
                  workspace_bytes, group, backend):
    from dllm_kernels.masked_cross_entropy.vocabulary_parallel import combine, count_words

    shape, N = targets.shape, targets.numel()
    targets, corrupted, sizes = targets.flatten(), corrupted.flatten(), count_words(weight, group)
    if targets.device.type == "cpu":
        _check_targets("linear_masked_cross_entropy", targets, corrupted, int(sizes.sum()))

    def slice_loss(hidden, own_targets):
        return _run_linear(hidden, weight, own_targets, corrupted, bias, None, "none", softcap, 0.0, skip_below,
                           workspace_bytes, backend)

    nll, lse = combine(slice_loss, hidden.flatten(0, -2), weight, targets, corrupted, bias, softcap, sizes, group)
    loss = nll + z_loss * lse**2
    if weights is not None:
        loss = torch.where(corrupted, loss * _flat(weights), 0)
    if reduction == "none":
        return loss.view(shape)
    return loss.sum() if reduction == "sum" or N == 0 else loss.sum() / corrupted.sum().clamp(min=1)


def _fake_logits(logits, targets, corrupted, weights, reduction, *_):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(targets.shape if reduction == "none" else (), dtype=dtype)


def _fake_linear(hidden, weight, targets, corrupted, bias, weights, reduction, *_):
    return _fake_logits(hidden, targets, corrupted, weights, reduction)


_logits_operator = define_operator(
    "masked_cross_entropy",
    "Tensor logits, Tensor targets, Tensor corrupted, Tensor? weights, str reduction, float? softcap, float z_loss, "
    "str? backend",
    _run_logits, _fake_logits, differentiable=(0,))
_linear_operator = define_operator(
    "linear_masked_cross_entropy",
    "Tensor hidden, Tensor weight, Tensor targets, Tensor corrupted, Tensor? bias, Tensor? weights, str reduction, "
    "float? softcap, float z_loss, float skip_below, int? workspace_bytes, str? backend",
    _run_linear, _fake_linear, differentiable=(0, 1, 4))
