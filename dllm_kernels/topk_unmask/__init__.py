"""One denoising step of a masked diffusion model: choose a token for each masked position, score it, commit the surest.

For each masked position, with logits z over V words:
    p = softmax(filter(z / temperature)), token = argmax p, or a sample of p
    confidence = p[token] | top-1 minus top-2 of p | sum p log p | a uniform number
and in each row b the k[b] masked positions of the highest confidence are committed.

A sample takes one uniform number u per position, drawn outside the backends: the token is the first whose cumulative
probability, in the order of token ids, passes u. Thus every backend gives the same tokens, and a row does not depend on
its batch. B rows, L positions, M masked positions, V words, D hidden size.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native_extension, triton_support
from ..custom_op import define_operator
from ..dispatch import Backend, choose, takes
from . import allowed as allowed_words
from . import cpu, cuda, products, reference, vocabulary_parallel
from . import random as random_numbers
from .allowed import pack as pack_allowed
from .reference import filter_logits
from .selection import commit
from .settings import CONFIDENCES, Rows, Sampling, Selection

__all__ = ["Scores", "Unmasked", "filter_logits", "linear_token_scores", "linear_topk_unmask", "pack_allowed",
           "philox_uniform", "token_scores", "topk_unmask"]


_on_triton = triton_support.on_triton("topk_unmask", "score_rows")


def _backends(on_cpu: Callable, on_cuda: Callable, on_triton: Callable, by_definition: Callable) -> tuple[Backend, ...]:
    # CUDA C++ before Triton by the count of instructions (benchmarks/predict.py): 9 to 10 a word against 20 at T = 0.
    return (Backend("cpu", on_cpu, native_extension.why_missing, takes("cpu")),
            Backend("cuda", on_cuda, cuda.missing, cuda.refuses),
            Backend("triton", on_triton, triton_support.missing, triton_support.refuses),
            Backend("reference", by_definition))


LOGITS_BACKENDS = _backends(cpu.score_rows, cuda.score_rows, _on_triton, reference.score_rows)
LINEAR_BACKENDS = _backends(cpu.linear_score_rows, partial(products.linear_score_rows, cuda.score_rows),
                            partial(products.linear_score_rows, _on_triton), reference.linear_score_rows)
BACKENDS = {"topk_unmask": LOGITS_BACKENDS, "linear_topk_unmask": LINEAR_BACKENDS, "token_scores": LOGITS_BACKENDS,
            "linear_token_scores": LINEAR_BACKENDS}


class Inputs(NamedTuple):
    """Logits [..., V] or, with a head, hidden states [..., D]."""

    values: Tensor
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]


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
        selection_temperature: 0 commits the highest confidences; else noise is added, see `selection.commit`.
        threshold: commit also every position whose confidence is at least this.
        confidence_of: the tempered and "filtered" distribution (Dream, Open-dLLM), or the "raw" one (LLaDA).
        allowed: the words that may be chosen, all others have no probability: bool [V] for every position, or
            [B, L, V], or [M, V] for the masked ones in row-major order; or the same as bits, int32 [..., ceil(V / 32)],
            bit v % 32 of number v // 32 for word v.
        generator: a torch.Generator (None: the global one; torch.compile takes no other), or the uniforms themselves,
            float64 [B, L, 2] in (0, 1), as `philox_uniform` gives them.
        backend: a name of the backends, None takes the first that can run.
    Returns: `Unmasked`. Ties between positions go to the lowest. Where the logits have a NaN or +inf, or no word is
        left (all -inf, or none allowed), the confidence is NaN and the position is never committed. With DLLM_DEBUG=1
        in the environment that is an error; by default nothing looks, because that would stall a GPU.
    Raises: ValueError if shapes or settings cannot work, or `backend` cannot run here; the message says why.
    """
    op = "topk_unmask"
    _check_tokens(op, tokens, mask_token_id, logits.shape[-1])
    if logits.ndim not in (2, 3) or (logits.ndim == 3 and logits.shape[:2] != tokens.shape):
        raise ValueError(f"{op} takes logits [B, L, V] or [M, V] and tokens [B, L], not {list(logits.shape)} and "
                         f"{list(tokens.shape)}")
    sampling = _check_sampling(op, confidence, temperature, top_k, top_p, confidence_of)
    selection = _check_selection(op, tokens, k, selection_temperature, threshold)
    rows = Rows(None, _uniforms(op, generator, tokens, sampling, selection),
                _allowed_bits(op, allowed, tokens, logits.shape[-1]))
    run = _unmask_operator if torch.compiler.is_compiling() else _unmask
    return Unmasked(*run(Inputs(logits), tokens, mask_token_id, rows, sampling, selection, None, backend))


def linear_topk_unmask(hidden: Tensor, weight: Tensor, tokens: Tensor, mask_token_id: int, k: Tensor | int, *,
                       bias: Tensor | None = None, confidence: str = "prob", temperature: float = 0.0,
                       top_k: int | None = None, top_p: float | None = None, selection_temperature: float = 0.0,
                       threshold: float | None = None, confidence_of: str = "filtered",
                       allowed: Tensor | None = None, generator: torch.Generator | Tensor | None = None,
                       count: int | None = None, group=None, backend: str | None = None) -> Unmasked:
    """`topk_unmask` of the logits hidden @ weight.T + bias, multiplied at the masked positions alone, never all stored.

    Args:
        hidden: [B, L, D], read only where masked. weight: [V, D]. bias: [V].
        count: how many positions are masked, if it is known: on a GPU, where counting would stall the host, cuBLAS then
            multiplies them if they are many. A wrong one raises on a CPU; on a GPU it may make every confidence NaN.
        group: a process group of torch.distributed each of whose processes holds a slice of the words, in the order of
            ranks: `weight` and `bias` are this process's; all else, and the result, is the same in every process. Runs
            on "reference".
        The others, the result and the errors: as `topk_unmask`.
    """
    op = "linear_topk_unmask"
    _check_head(op, hidden, weight, bias)
    _check_tokens(op, tokens, mask_token_id, weight.shape[0] if group is None else None)
    if hidden.shape[:-1] != tokens.shape:
        raise ValueError(f"{op} takes hidden [B, L, D] and tokens [B, L], not {list(hidden.shape)} and "
                         f"{list(tokens.shape)}")
    if count is not None and tokens.is_cpu and not torch.compiler.is_compiling() and (
            count != (masked := int((tokens == mask_token_id).sum()))):
        raise ValueError(f"{op}: count is the number of masked positions, {masked}, not {count}")
    sampling = _check_sampling(op, confidence, temperature, top_k, top_p, confidence_of)
    selection = _check_selection(op, tokens, k, selection_temperature, threshold)
    rows = Rows(None, _uniforms(op, generator, tokens, sampling, selection),
                _allowed_bits(op, allowed, tokens, weight.shape[0] if group is None else None))
    run = _unmask_operator if torch.compiler.is_compiling() else _unmask
    run = run if group is None else partial(_unmask, group=group)
    return Unmasked(*run(Inputs(hidden, weight, bias), tokens, mask_token_id, rows, sampling, selection, count,
                         backend))


def token_scores(logits: Tensor, *, confidence: str = "prob", temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, confidence_of: str = "filtered", allowed: Tensor | None = None,
                 generator: torch.Generator | Tensor | None = None, backend: str | None = None) -> Scores:
    """Choose and score a token for every row of logits [M, V], for strategies that select in their own way.

    Args: as `topk_unmask`; a tensor given as `generator` is [M, 2], one given as `allowed` [V] or [M, V].
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"token_scores takes logits [M, V], V at least 1, not {list(logits.shape)}; flatten B and L "
                         "first")
    op, each = "token_scores", logits[:, 0]
    sampling = _check_sampling(op, confidence, temperature, top_k, top_p, confidence_of)
    rows = Rows(None, _uniforms(op, generator, each, sampling), _allowed_bits(op, allowed, each, logits.shape[1]))
    run = _scores_operator if torch.compiler.is_compiling() else _scores
    return Scores(*run(Inputs(logits), rows, sampling, backend))


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
    sampling = _check_sampling(op, confidence, temperature, top_k, top_p, confidence_of)
    rows = Rows(positions, _uniforms(op, generator, positions, sampling),
                _allowed_bits(op, allowed, positions, weight.shape[0] if group is None else None))
    run = _scores_operator if torch.compiler.is_compiling() else _scores
    run = run if group is None else partial(_scores, group=group)
    return Scores(*run(Inputs(hidden, weight, bias), rows, sampling, backend))


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
        return triton_support.kernels("topk_unmask").philox_uniform(seed, sequence, step, position)
    return random_numbers.philox_uniform(seed, sequence, step, position)


def _check_tokens(op: str, tokens: Tensor, mask_token_id: int, words: int | None) -> None:
    if mask_token_id < 0 or (words is not None and mask_token_id >= words):
        raise ValueError(f"{op}: mask_token_id {mask_token_id} is outside the vocabulary of {words}")
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"{op} takes tokens [B, L] int64, not {list(tokens.shape)} {tokens.dtype}")


def _check_selection(op: str, tokens: Tensor, k: Tensor | int, temperature: float,
                     threshold: float | None) -> Selection:
    if not 0 <= temperature < torch.inf:
        raise ValueError(f"{op}: selection_temperature must be 0 or more and finite, not {temperature}")
    if not isinstance(k, Tensor):
        if k < 0:
            raise ValueError(f"{op}: k must be 0 or more, not {k}")
        k = torch.full(tokens.shape[:1], k, dtype=torch.int64, device=tokens.device)
        return Selection(k, temperature, threshold)
    if k.shape != tokens.shape[:1] or k.dtype != torch.int64:
        raise ValueError(f"{op} takes k [B] int64 = [{tokens.shape[0]}] or an int, not {list(k.shape)} {k.dtype}")
    # The check would stall a GPU; a negative number commits nothing there.
    if k.is_cpu and not torch.compiler.is_compiling() and (k < 0).any():
        raise ValueError(f"{op}: k must be 0 or more, not {k.tolist()}")
    return Selection(k.to(tokens.device), temperature, threshold)


def _check_head(op, hidden, weight, bias):
    if (hidden.ndim < 2 or weight.ndim != 2 or weight.shape[0] == 0 or hidden.shape[-1] != weight.shape[1]
            or (bias is not None and bias.shape != weight.shape[:1])):
        got = [list(x.shape) for x in (hidden, weight, bias) if x is not None]
        raise ValueError(f"{op} takes hidden [..., D], weight [V, D] and bias [V], not {got}")


def _check_sampling(op: str, confidence: str, temperature: float, top_k: int | None, top_p: float | None,
                    confidence_of: str) -> Sampling:
    if confidence not in CONFIDENCES:
        raise ValueError(f"{op}: confidence must be one of {', '.join(CONFIDENCES)}, not {confidence!r}")
    if confidence_of not in ("filtered", "raw"):
        raise ValueError(f"{op}: confidence_of must be 'filtered' or 'raw', not {confidence_of!r}")
    if not 0 <= temperature < torch.inf:
        raise ValueError(f"{op}: temperature must be 0 or more and finite, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k must be at least 1, or None for no limit, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], not {top_p}")
    return Sampling(confidence, float(temperature), top_k, top_p, confidence_of == "raw")


def _uniforms(op: str, generator: torch.Generator | Tensor | None, each: Tensor, sampling: Sampling,
              selection: Selection | None = None) -> Tensor | None:
    """The uniforms [..., 2] of `each` [...], or None where nothing is random."""
    shape = (*each.shape, 2)
    if isinstance(generator, Tensor):
        if generator.shape != shape or generator.dtype != torch.float64:
            got = f"{list(generator.shape)} {generator.dtype}"
            raise ValueError(f"{op} takes uniforms {list(shape)} float64, not {got}")
        return generator
    noisy = selection is not None and selection.selection_temperature > 0
    if sampling.temperature > 0 or noisy or sampling.confidence == "random":
        # Gumbel noise would be infinite at 0 and, after rounding, at 1.
        uniform = torch.rand(shape, dtype=torch.float64, device=each.device, generator=generator)
        return uniform.clamp_(2.0**-54, 1 - 2.0**-53)
    return None


def _allowed_bits(op: str, allowed: Tensor | None, each: Tensor, words: int | None) -> Tensor | None:
    """`allowed` as int32 bits, [W], [M, W] or [..., W], for `each` [...]. `words` None: a group holds the others."""
    if allowed is None:
        return None
    if words is None:
        words = allowed.shape[-1] * (32 if allowed.dtype == torch.int32 else 1)
    width, lead = allowed_words.width(words), each.shape
    last = {torch.bool: words, torch.int32: width}.get(allowed.dtype)
    if allowed.ndim == 0 or allowed.shape[-1] != last or (allowed.ndim > 2 and allowed.shape[:-1] != lead):
        raise ValueError(f"{op} takes allowed [{words}], [M, {words}] or {[*lead, words]} bool, or their bits "
                         f"[..., {width}] int32, not {list(allowed.shape)} {allowed.dtype}")
    if len(lead) == 1 and allowed.ndim == 2 and len(allowed) != lead[0]:
        raise ValueError(f"{op} takes one row of allowed words per position: {len(allowed)} rows, {lead[0]} positions")
    return allowed_words.pack(allowed) if allowed.dtype == torch.bool else allowed


def _unmask(inputs: Inputs, tokens: Tensor, mask_token_id: int, rows: Rows, sampling: Sampling, selection: Selection,
            count: int | None, backend: str | None, group=None) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `Unmasked`. `rows` has the uniforms of all positions, and bits as `_allowed_bits` returns them."""
    table = LOGITS_BACKENDS if inputs.weight is None else LINEAR_BACKENDS
    if group is None and (name := choose("topk_unmask", table, backend, _logits(inputs)).name) in ("triton", "cuda"):
        return _unmask_without_waiting(inputs, tokens, mask_token_id, rows, sampling, selection, count, name)
    masked = tokens == mask_token_id
    positions = masked.flatten().nonzero().squeeze(1)
    bits = rows.allowed
    for name, given in (("logits", inputs.values), ("allowed words", bits)):
        if given is not None and given.ndim == 2 and len(given) != len(positions):
            raise ValueError(f"topk_unmask takes one row of {name} per masked position: {len(given)} rows, "
                             f"{len(positions)} masked")
    if bits is not None and bits.ndim != 2:
        bits = bits.expand(len(positions), -1) if bits.ndim == 1 else bits.flatten(0, 1)[positions]
    masked_rows = Rows(positions if inputs.values.ndim == 3 else None,
                       None if rows.uniform is None else rows.uniform[masked], bits)
    token, score = _score(inputs, masked_rows, sampling, backend, group)
    tokens_of = torch.zeros_like(tokens).masked_scatter(masked, token)
    scores = torch.full_like(tokens, -torch.inf, dtype=torch.float32).masked_scatter(masked, score)
    return commit(tokens, masked, tokens_of, scores, selection, rows.uniform)


def _unmask_without_waiting(inputs: Inputs, tokens: Tensor, mask_token_id: int, rows: Rows, sampling: Sampling,
                            selection: Selection, count: int | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """As `_unmask`, on a GPU, which alone knows which positions are masked.

    Every position has a place, and nothing is read where it is not masked. A row that [M, V] lacks gives NaN.
    """
    kernels = cuda if backend == "cuda" else triton_support.kernels("topk_unmask")
    masked, index = kernels.find_rows(tokens, mask_token_id, inputs.values.ndim == 2)
    bits = rows.allowed
    if bits is not None:
        if bits.ndim == 2:
            place = index if inputs.values.ndim == 2 else kernels.find_rows(tokens, mask_token_id, True)[1]
            bits = bits[place.clamp(0, len(bits) - 1)]
        else:
            bits = bits.expand(len(index), -1) if bits.ndim == 1 else bits.flatten(0, 1)
    all_rows = Rows(index, None if rows.uniform is None else rows.uniform.flatten(0, 1), bits, sparse=True)
    if count is not None and count > products.FEW:
        token, score = _score_counted(inputs, all_rows, sampling, count, backend)
    else:
        token, score = _score(inputs, all_rows, sampling, backend)
    return kernels.commit(tokens, masked, token.view_as(tokens), score.view_as(tokens), selection, rows.uniform)


def _score_counted(inputs: Inputs, rows: Rows, sampling: Sampling, count: int, backend: str) -> tuple[Tensor, Tensor]:
    """As `_score`, of the `count` rows that are asked for, gathered. If there are more or fewer, theirs are NaN."""
    asked = rows.index >= 0
    places = asked.byte().argsort(descending=True, stable=True)[:count]
    uniform, bits = rows.uniform, rows.allowed
    if bits is not None:
        bits = bits[places] if bits.stride(0) else bits[:count]
    gathered = Rows(rows.index[places], None if uniform is None else uniform[places], bits)
    token, score = _score(inputs, gathered, sampling, backend)
    tokens = torch.zeros_like(rows.index).index_copy_(0, places, token)
    scores = torch.full_like(rows.index, -torch.inf, dtype=torch.float32).index_copy_(0, places, score)
    return tokens, scores.masked_fill_(asked & (asked.sum() != count), torch.nan)


def _logits(inputs: Inputs) -> Tensor:
    """What backends accept or refuse: the logits or, of hidden states, none of them."""
    return inputs.values if inputs.weight is None else inputs.values.new_empty(0, len(inputs.weight))


def _scores(inputs: Inputs, rows: Rows, sampling: Sampling, backend: str | None, group=None) -> tuple[Tensor, Tensor]:
    if rows.allowed is not None and rows.allowed.ndim == 1:
        count = len(inputs.values if rows.index is None else rows.index)
        rows = rows._replace(allowed=rows.allowed.expand(count, -1))
    return _score(inputs, rows, sampling, backend, group)


def _score(inputs: Inputs, rows: Rows, sampling: Sampling, backend: str | None, group=None) -> tuple[Tensor, Tensor]:
    """Token and confidence of rows of the inputs, flattened to two dimensions."""
    values, *head = (None if x is None else x.detach() for x in inputs)
    linear = inputs.weight is not None
    op, table = ("linear_token_scores", LINEAR_BACKENDS) if linear else ("token_scores", LOGITS_BACKENDS)
    if group is None:
        run = choose(op, table, backend, _logits(inputs)).run
    elif backend in (None, "reference"):
        run = partial(vocabulary_parallel.linear_score_rows, group=group)
    else:
        raise ValueError(f"{op}: over a group only the backend 'reference' runs, not {backend!r}")
    with torch.no_grad():
        token, score = run(values.flatten(0, -2), *(head if linear else ()), rows, sampling)
    if os.environ.get("DLLM_DEBUG", "0") not in ("", "0") and (bad := score.isnan().nonzero()).numel():
        raise ValueError(f"{op}: {len(bad)} of {len(score)} rows, the first of them {int(bad[0])}, have a NaN or an "
                         "infinity among their logits, or no word left to choose (DLLM_DEBUG=1 looks for them)")
    return token, score


def _fake_unmask(inputs, tokens, *rest):
    return tuple(torch.empty_like(tokens, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.bool))


def _fake_scores(inputs, rows, *rest):
    count = (inputs.values if rows.index is None else rows.index).shape[0]
    return tuple(inputs.values.new_empty(count, dtype=dtype) for dtype in (torch.int64, torch.float32))


_unmask_operator = define_operator("topk_unmask", _unmask, _fake_unmask)
_scores_operator = define_operator("token_scores", _scores, _fake_scores)
