"""One denoising step of a masked diffusion model: choose a token for each masked position, score it, commit the surest.

For each masked position, with logits z over V words:
    p = softmax(filter(z / temperature)), token = argmax p, or a sample of p
    confidence = p[token] | top-1 minus top-2 of p | sum p log p | a uniform number
and in each row b the k[b] masked positions of the highest confidence are committed.

A sample takes one uniform number u per position, drawn outside: the token is the first whose cumulative probability, in
the order of token ids, passes u. So every backend gives the same tokens, and a row does not depend on its batch.
B rows, L positions, M masked positions, V words, D hidden size.
"""

import importlib
import os
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels import triton_support
from dllm_kernels.dispatch import Backend, choose
from dllm_kernels.operators import define_operator
from dllm_kernels.topk_unmask import allowed as allowed_words
from dllm_kernels.topk_unmask import cpu, cuda, reference, vocabulary_parallel
from dllm_kernels.topk_unmask import random as random_numbers
from dllm_kernels.topk_unmask.allowed import pack as pack_allowed
from dllm_kernels.topk_unmask.selection import commit

__all__ = [
    "Scores", "Unmasked", "linear_token_scores", "linear_topk_unmask", "pack_allowed", "philox_uniform", "token_scores",
    "topk_unmask",
]


def _triton_kernels():
    """The module, which imports Triton, so not before it is needed."""
    return importlib.import_module("dllm_kernels.topk_unmask.triton_kernels")


def _on_triton(function: str) -> Backend:
    return Backend("triton", lambda *arguments: getattr(_triton_kernels(), function)(*arguments),
                   triton_support.missing, triton_support.refuses)


# Triton before CUDA C++ until a GPU has shown which is faster.
LOGITS_BACKENDS = (Backend("cpu", cpu.score_rows, cpu.missing, cpu.refuses), _on_triton("score_rows"),
                   Backend("cuda", cuda.score_rows, cuda.missing, cuda.refuses),
                   Backend("reference", reference.score_rows))
LINEAR_BACKENDS = (Backend("cpu", cpu.linear_score_rows, cpu.missing, cpu.refuses), _on_triton("linear_score_rows"),
                   Backend("reference", reference.linear_score_rows))
BACKENDS = {"topk_unmask": LOGITS_BACKENDS, "linear_topk_unmask": LINEAR_BACKENDS, "token_scores": LOGITS_BACKENDS,
            "linear_token_scores": LINEAR_BACKENDS}

CONFIDENCES = ("prob", "margin", "entropy", "random")


class Unmasked(NamedTuple):
    tokens: Tensor  # [B, L] int64, the committed positions filled
    confidence: Tensor  # [B, L] fp32, -inf where not masked
    committed: Tensor  # [B, L] bool


class Scores(NamedTuple):
    token: Tensor  # [M] int64
    confidence: Tensor  # [M] fp32


def topk_unmask(logits: Tensor, tokens: Tensor, mask_token_id: int, k: Tensor | int, *, confidence: str = "prob",
                temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
                selection_temperature: float = 0.0, threshold: float | None = None, confidence_of: str = "filtered",
                allowed: Tensor | None = None, generator: torch.Generator | Tensor | None = None,
                backend: str | None = None) -> Unmasked:
    """Fill the k[b] masked positions of each row that the logits are surest of.

    Args:
        logits: [B, L, V], or [M, V] holding only the masked rows in row-major order; bf16, fp16 or fp32, summed in
            fp32.
        tokens: [B, L] int64; a position is masked where it equals `mask_token_id`.
        k: [B] int64 or an int: positions to commit per row; 0, or more than are masked, is allowed.
        confidence: "prob" (of the chosen token), "margin" (top-1 minus top-2), "entropy" (sum p log p, so larger is
            surer), or "random".
        temperature: 0 takes the most likely token, the lowest id among equals; else logits / temperature are sampled.
        top_k, top_p: filters of the tempered distribution, top-p first (as Dream and Open-dLLM).
        selection_temperature: 0 commits the highest confidences; else noise is added, see `selection.select`.
        threshold: commit every position whose confidence is at least this too.
        confidence_of: the tempered and "filtered" distribution (Dream, Open-dLLM), or the untouched, "raw" (LLaDA).
        allowed: the words that may be chosen, all others having no probability: bool [V] for every position, or
            [B, L, V], or [M, V] for the masked ones in row-major order; or the same as bits, int32 [..., ceil(V / 32)],
            bit v % 32 of number v // 32 for word v.
        generator: a torch.Generator (None: the global one; torch.compile takes no other), or the uniforms themselves,
            float64 [B, L, 2] in (0, 1), as `philox_uniform` gives them.
        backend: a name of the backends, None takes the first that can run.
    Returns: `Unmasked`. Ties between positions go to the lowest. Where the logits have a NaN or +inf, or no word is
        left (all -inf, or none allowed), the confidence is NaN and the position is never committed. With DLLM_DEBUG=1
        in the environment that is an error; otherwise nobody looks, because to ask would stall a GPU.
    Raises: ValueError if shapes or settings cannot work, or `backend` cannot run here; the message says why.
    """
    op = "topk_unmask"
    _check_step(op, tokens, mask_token_id, k, logits.shape[-1])
    if logits.ndim not in (2, 3) or (logits.ndim == 3 and logits.shape[:2] != tokens.shape):
        raise ValueError(
            f"{op} takes logits [B, L, V] or [M, V] and tokens [B, L], not "
            f"{list(logits.shape)} and {list(tokens.shape)}"
        )
    settings = _check_settings(op, confidence, temperature, top_k, top_p, confidence_of, selection_temperature)
    uniform = _uniforms(op, generator, tokens.shape, tokens.device, confidence, temperature, selection_temperature)
    bits = _allowed_bits(op, allowed, tokens.shape, logits.shape[-1])
    run = _unmask_operator if torch.compiler.is_compiling() else _unmask
    return Unmasked(*run(logits, None, None, tokens, mask_token_id, _as_tensor(k, tokens), uniform, bits, *settings,
                         selection_temperature, threshold, backend))


def linear_topk_unmask(hidden: Tensor, weight: Tensor, tokens: Tensor, mask_token_id: int, k: Tensor | int, *,
                       bias: Tensor | None = None, confidence: str = "prob", temperature: float = 0.0,
                       top_k: int | None = None, top_p: float | None = None, selection_temperature: float = 0.0,
                       threshold: float | None = None, confidence_of: str = "filtered",
                       allowed: Tensor | None = None, generator: torch.Generator | Tensor | None = None,
                       group=None, backend: str | None = None) -> Unmasked:
    """`topk_unmask` of the logits hidden @ weight.T + bias, multiplied at the masked positions alone, never all stored.

    Args:
        hidden: [B, L, D], read only where masked. weight: [V, D]. bias: [V].
        group: a process group of torch.distributed each of whose processes holds a slice of the words: `weight` and
            `bias` are those of this one, and follow those of the process before it; all else, and the result, is the
            same in all. Runs on `reference`.
        The others, the result and the errors: as `topk_unmask`.
    """
    op = "linear_topk_unmask"
    _check_head(op, hidden, weight, bias)
    _check_step(op, tokens, mask_token_id, k, weight.shape[0] if group is None else None)
    if hidden.shape[:-1] != tokens.shape:
        raise ValueError(
            f"{op} takes hidden [B, L, D] and tokens [B, L], not {list(hidden.shape)} and {list(tokens.shape)}"
        )
    settings = _check_settings(op, confidence, temperature, top_k, top_p, confidence_of, selection_temperature)
    uniform = _uniforms(op, generator, tokens.shape, tokens.device, confidence, temperature, selection_temperature)
    bits = _allowed_bits(op, allowed, tokens.shape, weight.shape[0] if group is None else None)
    arguments = (hidden, weight, bias, tokens, mask_token_id, _as_tensor(k, tokens), uniform, bits, *settings,
                 selection_temperature, threshold, backend)
    if group is not None:
        return Unmasked(*_unmask(*arguments, group))
    return Unmasked(*(_unmask_operator if torch.compiler.is_compiling() else _unmask)(*arguments))


def token_scores(logits: Tensor, *, confidence: str = "prob", temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, confidence_of: str = "filtered", allowed: Tensor | None = None,
                 generator: torch.Generator | Tensor | None = None, backend: str | None = None) -> Scores:
    """Choose and score a token for every row of logits [M, V], for strategies that select in their own way.

    Args: as `topk_unmask`; a tensor given as `generator` is [M, 2], one given as `allowed` [V] or [M, V].
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"token_scores takes logits [M, V], V at least 1, not {list(logits.shape)}; flatten B and L first"
        )
    settings = _check_settings("token_scores", confidence, temperature, top_k, top_p, confidence_of)
    uniform = _uniforms("token_scores", generator, logits.shape[:1], logits.device, confidence, temperature)
    bits = _allowed_bits("token_scores", allowed, logits.shape[:1], logits.shape[1])
    run = _scores_operator if torch.compiler.is_compiling() else _scores
    return Scores(*run(logits, None, None, None, uniform, bits, *settings, backend))


def linear_token_scores(hidden: Tensor, weight: Tensor, positions: Tensor, *, bias: Tensor | None = None,
                        confidence: str = "prob", temperature: float = 0.0, top_k: int | None = None,
                        top_p: float | None = None, confidence_of: str = "filtered", allowed: Tensor | None = None,
                        generator: torch.Generator | Tensor | None = None, group=None,
                        backend: str | None = None) -> Scores:
    """`token_scores` of the logits hidden @ weight.T + bias at some positions, which are never all stored.

    Args:
        hidden: [B, L, D], or any leading shape. weight: [V, D]. bias: [V].
        positions: [M] int64, places in the flattened leading shape.
        group: as `linear_topk_unmask`. The others: as `token_scores`.
    """
    op = "linear_token_scores"
    _check_head(op, hidden, weight, bias)
    if positions.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(f"{op} takes positions [M] int64, not {list(positions.shape)} {positions.dtype}")
    settings = _check_settings(op, confidence, temperature, top_k, top_p, confidence_of)
    uniform = _uniforms(op, generator, positions.shape, positions.device, confidence, temperature)
    bits = _allowed_bits(op, allowed, positions.shape, weight.shape[0] if group is None else None)
    arguments = hidden, weight, bias, positions, uniform, bits, *settings, backend
    if group is not None:
        return Scores(*_scores(*arguments, group))
    return Scores(*(_scores_operator if torch.compiler.is_compiling() else _scores)(*arguments))


def philox_uniform(seed: int | Tensor, sequence: Tensor, step: int | Tensor, position: Tensor) -> Tensor:
    """Two uniforms in (0, 1) for each position of each sequence at a denoising step, the same on every device.

    Args:
        seed: any integer; its low 64 bits are the key. Or an int64 tensor that broadcasts with the others.
        sequence, position: int64 tensors below 2**32 that broadcast together, to [B, L] say.
        step: below 2**32; or an int64 tensor of one element, which a CUDA graph can read.
    Returns: float64 [B, L, 2], odd multiples of 2**-53. [..., 0] picks the token, [..., 1] is for selection.
    """
    one = isinstance(seed, int)
    if one and position.is_cuda and triton_support.missing() is None and not torch.compiler.is_compiling():
        return _triton_kernels().philox_uniform(seed, sequence, step, position)
    return random_numbers.philox_uniform(seed, sequence, step, position)


def _check_step(op, tokens, mask_token_id, k, words):
    if mask_token_id < 0 or (words is not None and mask_token_id >= words):
        raise ValueError(f"{op}: mask_token_id {mask_token_id} is outside the vocabulary of {words}")
    if not isinstance(k, Tensor) and k < 0:
        raise ValueError(f"{op}: k must be 0 or more, not {k}")
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"{op} takes tokens [B, L] int64, not {list(tokens.shape)} {tokens.dtype}")
    if isinstance(k, Tensor):
        if k.shape != tokens.shape[:1] or k.dtype != torch.int64:
            raise ValueError(f"{op} takes k [B] int64 = [{tokens.shape[0]}] or an int, not {list(k.shape)} {k.dtype}")
        # On a GPU to look would be to wait; a negative number commits nothing there.
        if k.device.type == "cpu" and not torch.compiler.is_compiling() and (k < 0).any():
            raise ValueError(f"{op}: k must be 0 or more, not {k.tolist()}")


def _check_head(op, hidden, weight, bias):
    if (hidden.ndim < 2 or weight.ndim != 2 or weight.shape[0] == 0 or hidden.shape[-1] != weight.shape[1]
            or (bias is not None and bias.shape != weight.shape[:1])):
        got = [list(x.shape) for x in (hidden, weight, bias) if x is not None]
        raise ValueError(f"{op} takes hidden [..., D], weight [V, D] and bias [V], not {got}")


def _check_settings(op, confidence, temperature, top_k, top_p, confidence_of, selection_temperature=0.0):
    if confidence not in CONFIDENCES:
        raise ValueError(f"{op}: confidence must be one of {', '.join(CONFIDENCES)}, not {confidence!r}")
    if confidence_of not in ("filtered", "raw"):
        raise ValueError(f"{op}: confidence_of must be 'filtered' or 'raw', not {confidence_of!r}")
    if not (0 <= temperature < torch.inf and 0 <= selection_temperature < torch.inf):
        raise ValueError(
            f"{op}: temperatures must be 0 or more and finite, not {temperature} and {selection_temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k must be at least 1, or None for no limit, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], not {top_p}")
    return confidence, float(temperature), top_k, top_p, confidence_of == "raw"


def _uniforms(op, generator, shape, device, confidence, temperature, selection_temperature=0.0):
    """The uniforms [*shape, 2], or None where nothing is random."""
    if isinstance(generator, Tensor):
        if generator.shape != (*shape, 2) or generator.dtype != torch.float64:
            raise ValueError(
                f"{op} takes uniforms {[*shape, 2]} float64, not {list(generator.shape)} {generator.dtype}"
            )
        return generator
    if temperature > 0 or selection_temperature > 0 or confidence == "random":
        # 0 and, after rounding, 1 would be infinite Gumbel noise
        uniform = torch.rand((*shape, 2), dtype=torch.float64, device=device, generator=generator)
        return uniform.clamp_(2.0**-54, 1 - 2.0**-53)
    return None


def _allowed_bits(op, allowed, lead, words):
    """`allowed` as int32 bits, [W], [M, W] or [*lead, W], or None. `words` None: how many is not known here."""
    if allowed is None:
        return None
    if words is None:
        words = allowed.shape[-1] * (32 if allowed.dtype == torch.int32 else 1)
    last = {torch.bool: words, torch.int32: allowed_words.width(words)}.get(allowed.dtype)
    if allowed.ndim == 0 or allowed.shape[-1] != last or (allowed.ndim > 2 and allowed.shape[:-1] != lead):
        raise ValueError(
            f"{op} takes allowed [{words}], [M, {words}] or {[*lead, words]} bool, or their bits "
            f"[..., {allowed_words.width(words)}] int32, not {list(allowed.shape)} {allowed.dtype}"
        )
    if len(lead) == 1 and allowed.ndim == 2 and len(allowed) != lead[0]:
        raise ValueError(f"{op} takes one row of allowed words per position: {len(allowed)} rows, {lead[0]} positions")
    return allowed_words.pack(allowed) if allowed.dtype == torch.bool else allowed


def _as_tensor(k, tokens):
    if isinstance(k, Tensor):
        return k.to(tokens.device)
    return torch.full(tokens.shape[:1], k, dtype=torch.int64, device=tokens.device)


def _unmask(inputs, weight, bias, tokens, mask_token_id, k, uniform, bits, confidence, temperature, top_k, top_p, raw,
            selection_temperature, threshold, backend, group=None):
    table = LOGITS_BACKENDS if weight is None else LINEAR_BACKENDS
    if group is None and (name := choose("topk_unmask", table, backend, inputs).name) in ("triton", "cuda"):
        return _unmask_without_waiting(inputs, weight, bias, tokens, mask_token_id, k, uniform, bits, confidence,
                                       temperature, top_k, top_p, raw, selection_temperature, threshold, name)
    masked = tokens == mask_token_id
    positions = masked.flatten().nonzero().squeeze(1)
    rows = positions if inputs.ndim == 3 else None
    for name, given in (("logits", inputs), ("allowed words", bits)):
        if given is not None and given.ndim == 2 and len(given) != len(positions):
            raise ValueError(f"topk_unmask takes one row of {name} per masked position: {len(given)} rows, "
                             f"{len(positions)} masked")
    if bits is not None and bits.ndim != 2:
        bits = bits.expand(len(positions), -1) if bits.ndim == 1 else bits.flatten(0, 1)[positions]
    token, score = _score(inputs, weight, bias, rows, None if uniform is None else uniform[masked], bits, confidence,
                          temperature, top_k, top_p, raw, backend=backend, group=group)
    tokens_of = torch.zeros_like(tokens).masked_scatter(masked, token)
    scores = torch.full_like(tokens, -torch.inf, dtype=torch.float32).masked_scatter(masked, score)
    return commit(tokens, masked, tokens_of, scores, k, selection_temperature, threshold, uniform)


def _unmask_without_waiting(inputs, weight, bias, tokens, mask_token_id, k, uniform, bits, confidence, temperature,
                            top_k, top_p, raw, selection_temperature, threshold, backend):
    """The same where only the GPU knows how many positions are masked: a place for each position, and nothing is read
    where it is not masked. A row of [M, V] that is missing gives the confidence NaN."""
    kernels = cuda if backend == "cuda" else _triton_kernels()
    masked, rows = kernels.find_rows(tokens, mask_token_id, inputs.ndim == 2)
    if bits is not None:
        if bits.ndim == 2:
            place = rows if inputs.ndim == 2 else kernels.find_rows(tokens, mask_token_id, True)[1]
            bits = bits[place.clamp(0, len(bits) - 1)]
        else:
            bits = bits.expand(len(rows), -1) if bits.ndim == 1 else bits.flatten(0, 1)
    token, score = _score(inputs, weight, bias, rows, None if uniform is None else uniform.flatten(0, 1), bits,
                          confidence, temperature, top_k, top_p, raw, backend=backend, group=None)
    return kernels.commit(tokens, masked, token.view_as(tokens), score.view_as(tokens), k, selection_temperature,
                          threshold, uniform)


def _scores(inputs, weight, bias, positions, uniform, bits, confidence, temperature, top_k, top_p, raw, backend,
            group=None):
    if bits is not None and bits.ndim == 1:
        bits = bits.expand(len(inputs if positions is None else positions), -1)
    return _score(inputs, weight, bias, positions, uniform, bits, confidence, temperature, top_k, top_p, raw,
                  backend=backend, group=group)


def _score(inputs, weight, bias, rows, uniform, bits, *settings, backend, group):
    """Token and confidence of the given rows of the inputs (None: of all), flattened to two dimensions."""
    op, table = ("token_scores", LOGITS_BACKENDS) if weight is None else ("linear_token_scores", LINEAR_BACKENDS)
    head = () if weight is None else (weight.detach(), None if bias is None else bias.detach())
    if group is None:
        run = choose(op, table, backend, inputs).run
    elif backend in (None, "reference"):
        run = partial(vocabulary_parallel.linear_score_rows, group=group)
    else:
        raise ValueError(f"{op}: over a group only the backend 'reference' runs, not {backend!r}")
    with torch.no_grad():
        token, score = run(inputs.detach().flatten(0, -2), *head, rows, uniform, bits, *settings)
    if os.environ.get("DLLM_DEBUG", "0") not in ("", "0") and (bad := score.isnan().nonzero()).numel():
        raise ValueError(f"{op}: {len(bad)} of {len(score)} rows, the first of them {int(bad[0])}, have a NaN or an "
                         "infinity among their logits, or no word left to choose (DLLM_DEBUG=1 looks for them)")
    return token, score


def _fake_unmask(inputs, weight, bias, tokens, *rest):
    return tuple(torch.empty_like(tokens, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.bool))


def _fake_scores(inputs, weight, bias, positions, *rest):
    count = (inputs if positions is None else positions).shape[0]
    return inputs.new_empty(count, dtype=torch.int64), inputs.new_empty(count, dtype=torch.float32)


_SETTINGS = "Tensor? uniform, Tensor? allowed, str confidence, float temperature, int? top_k, float? top_p, bool raw"
_unmask_operator = define_operator(
    "topk_unmask", "Tensor inputs, Tensor? weight, Tensor? bias, Tensor tokens, int mask_token_id, Tensor k, "
    f"{_SETTINGS}, float selection_temperature, float? threshold, str? backend", _unmask, _fake_unmask,
    returns="(Tensor, Tensor, Tensor)")
_scores_operator = define_operator(
    "token_scores", f"Tensor inputs, Tensor? weight, Tensor? bias, Tensor? positions, {_SETTINGS}, str? backend",
    _scores, _fake_scores, returns="(Tensor, Tensor)")
