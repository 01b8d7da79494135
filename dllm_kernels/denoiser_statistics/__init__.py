"""What DiffusionGemma's sampler needs of the head at each position of a canvas, without stored logits.

For each of M positions with hidden state h, over the words v of a head `weight` [V, D]:
    z[v] = softcap * tanh(h . weight[v] / softcap) / temperature,    p = softmax(z)
`linear_denoiser_statistics`: a sample of p, argmax z, the entropy of p, logsumexp z.
`soft_embedding`: sum over v of p[v] weight[v], the expected embedding where the head is tied (self-conditioning). The
statistics give it too (`soft=True`), in two products with the head where two calls take three.

The sample takes one uniform number u per position, drawn outside the backends: the token is the first whose cumulative
probability, in the order of token ids, passes u. Thus every backend gives the same tokens, and a row does not depend on
its batch. M positions, V words, D hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native_extension, triton_support
from ..custom_op import define_operator
from ..dispatch import Backend, choose, takes
from . import cpu, reference
from .settings import Inputs

__all__ = ["DenoiserStatistics", "linear_denoiser_statistics", "soft_embedding"]



def _backends(on_cpu: Callable, on_triton: Callable, by_definition: Callable) -> tuple[Backend, ...]:
    return (Backend("cpu", on_cpu, native_extension.why_missing, takes("cpu")),
            Backend("triton", on_triton, triton_support.missing, triton_support.refuses),
            Backend("reference", by_definition))


_on_triton = partial(triton_support.on_triton, "denoiser_statistics")
STATISTICS_BACKENDS = _backends(cpu.statistics, _on_triton("statistics"), reference.statistics)
SOFT_BACKENDS = _backends(cpu.soft_embedding, _on_triton("soft_embedding"), reference.soft_embedding)
BACKENDS = {"linear_denoiser_statistics": STATISTICS_BACKENDS, "soft_embedding": SOFT_BACKENDS}


class DenoiserStatistics(NamedTuple):
    token: Tensor  # [M] int64, a sample of p
    argmax: Tensor  # [M] int64
    entropy: Tensor  # [M] fp32, nats
    log_normaliser: Tensor  # [M] fp32, logsumexp z
    soft: Tensor | None = None  # [M, D], `soft_embedding` if it is asked for


def linear_denoiser_statistics(hidden: Tensor, weight: Tensor, positions: Tensor | None, *,
                               temperature: float | Tensor = 1.0, softcap: float | None = None,
                               generator: torch.Generator | Tensor | None = None, soft: bool = False,
                               backend: str | None = None) -> DenoiserStatistics:
    """Sampled token, likeliest token, entropy and log-normaliser of softmax(z) at some positions; [M, V] never exists.

    z = hidden @ weight.T, capped to softcap * tanh(z / softcap), divided by the temperature, in fp32. There is no
    derivative.

    Args:
        hidden: [..., D], at least two dimensions, bf16, fp16 or fp32. weight: [V, D].
        positions: [M] int64, places in the flattened leading shape of `hidden`; None: all, in order.
        temperature: above 0; or a tensor [M], for rows at different denoising steps.
        softcap: above 0; None: no cap.
        generator: a torch.Generator (None: the global one; torch.compile takes no other), or the uniforms themselves,
            float64 [M, 2], of which [m, 0] picks the token, as `philox_uniform` gives them.
        soft: give `soft_embedding` too.
        backend: a name of the backends, None takes the first that can run.
    Returns: `DenoiserStatistics`. Equal logits: argmax is the lowest id. Where z has a NaN or +inf, or is all -inf,
        entropy, log_normaliser and soft are NaN, and the tokens are any of the vocabulary.
    Raises: ValueError if shapes or settings cannot work, or `backend` cannot run here; the message says why.
    """
    op = "linear_denoiser_statistics"
    inputs = _inputs(op, hidden, weight, positions, temperature, softcap)
    uniform = _uniforms(op, generator, inputs.hidden)
    run = _statistics_operator if torch.compiler.is_compiling() else _statistics
    *statistics, embedding = run(inputs, uniform, soft, backend)
    return DenoiserStatistics(*statistics, embedding if soft else None)


def soft_embedding(hidden: Tensor, weight: Tensor, positions: Tensor | None, log_normaliser: Tensor, *,
                   temperature: float | Tensor = 1.0, softcap: float | None = None,
                   backend: str | None = None) -> Tensor:
    """softmax(z) @ weight [M, D] in the dtype of `weight`, summed in fp32, given logsumexp z.

    Args:
        log_normaliser: [M] fp32, of `linear_denoiser_statistics` with the same hidden states and settings.
        The others and the errors: as `linear_denoiser_statistics`.
    Returns: NaN in rows whose log_normaliser is NaN.
    """
    op = "soft_embedding"
    inputs = _inputs(op, hidden, weight, positions, temperature, softcap)
    if log_normaliser.shape != inputs.temperature.shape or log_normaliser.dtype != torch.float32:
        raise ValueError(f"{op} takes log_normaliser {list(inputs.temperature.shape)} float32, not "
                         f"{list(log_normaliser.shape)} {log_normaliser.dtype}")
    run = _soft_operator if torch.compiler.is_compiling() else _soft
    return run(inputs, log_normaliser, backend)


def _inputs(op: str, hidden: Tensor, weight: Tensor, positions: Tensor | None, temperature: float | Tensor,
            softcap: float | None) -> Inputs:
    if hidden.ndim < 2 or weight.ndim != 2 or weight.shape[0] == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op} takes hidden [..., D] and weight [V, D], not {list(hidden.shape)} and "
                         f"{list(weight.shape)}")
    if softcap is not None and not 0 < softcap < torch.inf:
        raise ValueError(f"{op}: softcap must be above 0 and finite, or None for no cap, not {softcap}")
    if positions is not None and (positions.ndim != 1 or positions.dtype != torch.int64):
        raise ValueError(f"{op} takes positions [M] int64, or None for all, not {list(positions.shape)} "
                         f"{positions.dtype}")
    hidden = hidden.flatten(0, -2) if positions is None else hidden.flatten(0, -2)[positions]
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < torch.inf:
            raise ValueError(f"{op}: temperature must be above 0 and finite, not {temperature}")
        each = torch.full((len(hidden),), temperature, dtype=torch.float32, device=hidden.device)
        return Inputs(hidden.detach(), weight.detach(), each, softcap)
    if temperature.shape != hidden.shape[:1] or not temperature.is_floating_point():
        raise ValueError(f"{op} takes temperature [{len(hidden)}] of floats, or one number, not "
                         f"{list(temperature.shape)} {temperature.dtype}")
    # The check would stall a GPU; there a temperature that is not above 0 gives NaN or nonsense in its row.
    if temperature.is_cpu and not torch.compiler.is_compiling() and not (temperature > 0).all():
        raise ValueError(f"{op}: temperatures must be above 0, not {temperature.min().item()}")
    return Inputs(hidden.detach(), weight.detach(), temperature.detach().to(hidden.device, torch.float32), softcap)


def _uniforms(op: str, generator: torch.Generator | Tensor | None, hidden: Tensor) -> Tensor:
    """[M] float64 in [0, 1)."""
    if not isinstance(generator, Tensor):
        return torch.rand(len(hidden), dtype=torch.float64, device=hidden.device, generator=generator)
    if generator.shape != (len(hidden), 2) or generator.dtype != torch.float64:
        raise ValueError(f"{op} takes uniforms {[len(hidden), 2]} float64, not {list(generator.shape)} "
                         f"{generator.dtype}")
    return generator[:, 0]


def _statistics(inputs: Inputs, uniform: Tensor, soft: bool,
                backend: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = choose("linear_denoiser_statistics", STATISTICS_BACKENDS, backend, _logits(inputs)).run
    with torch.no_grad(), torch.autocast(uniform.device.type, enabled=False):
        return tuple(run(inputs, uniform, soft))


def _soft(inputs: Inputs, log_normaliser: Tensor, backend: str | None) -> Tensor:
    run = choose("soft_embedding", SOFT_BACKENDS, backend, _logits(inputs)).run
    with torch.no_grad(), torch.autocast(log_normaliser.device.type, enabled=False):
        return run(inputs, log_normaliser)


def _logits(inputs: Inputs) -> Tensor:
    """None of the logits, in the dtype of their product: what backends accept or refuse."""
    dtype = torch.promote_types(inputs.hidden.dtype, inputs.weight.dtype)
    return inputs.hidden.new_empty(0, len(inputs.weight), dtype=dtype)


def _fake_statistics(inputs, uniform, soft, *rest):
    dtypes = torch.int64, torch.int64, torch.float32, torch.float32
    return *(uniform.new_empty(len(uniform), dtype=dtype) for dtype in dtypes), _empty_soft(inputs, soft)


def _fake_soft(inputs, *rest):
    return _empty_soft(inputs)


def _empty_soft(inputs, wanted=True):
    return inputs.weight.new_empty(inputs.hidden.shape if wanted else (0,))


_statistics_operator = define_operator("linear_denoiser_statistics", _statistics, _fake_statistics)
_soft_operator = define_operator("soft_embedding", _soft, _fake_soft)
