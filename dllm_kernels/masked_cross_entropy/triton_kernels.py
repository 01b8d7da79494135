"""Masked cross-entropy in Triton, without host synchronisation.

With z = logits, or hidden @ weight.T + bias, after the soft cap, and y the target of a corrupted row:
    loss = log(total) + top - z[y],    top = max(z), total = sum(exp(z - top))
    d loss / d z[v] = exp(z[v] - top) / total - [v = y]
N positions, V words, D hidden size. top and total come from an online softmax (arXiv:1805.02867).

The number of corrupted rows stays on the GPU: `rows` holds their positions first, `count` their number, every grid is
that of N rows, and programs past `count` return at once. cuBLAS would need the sizes on the host, or compute all N
rows; half a batch is typically not corrupted, which by estimate costs more than its faster products win back. Hence all
four products (z; in the backward z again, grad_hidden, grad_weight) are kernels of this file.

The forward stores three numbers per row and share of the vocabulary. The backward stores the gradient g of z, in the
inputs' dtype, for as many rows as the workspace holds, and multiplies it from both sides. Computing z within each of
the two products would need no workspace, but a fifth product, and in grad_hidden one per tile of D. Nothing is added
atomically: the same inputs give the same bits. A target out of range reads nothing and makes the loss NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_kernels import tuned
from dllm_kernels.masked_cross_entropy.rows import Form, Linear, Scales, Scored, with_rows_contiguous
from dllm_kernels.triton_head import logits_of_tile, tile_and_split

WORKSPACE_BYTES = 1 << 30  # by default: for gradients of the logits held at once, in the backward
GROUP = 16  # row tiles that share words in the cache
SPLITS, PROGRAMS = 32, 512  # shares of the vocabulary: this many, or more for few rows, up to this many programs

# By bytes per element. Not measured on a GPU: tiles that spill no registers on sm_80, sm_90 and sm_100 (128 x 256 would
# re-read less, but most of the kernels then spill). The tiles in which "gradient" writes g are whole multiples of those
# in which "grad_hidden" and "grad_weight" read it. grad_weight loads the rows' positions first: half its stages.
TILES = {
    2: {"statistics": {"ROWS": 128, "WORDS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3},
        "gradient": {"ROWS": 128, "WORDS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3},
        "grad_hidden": {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3},
        "grad_weight": {"WORDS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 5}},
    4: {"statistics": {"ROWS": 64, "WORDS": 64, "INNER": 32, "num_warps": 8, "num_stages": 3},
        "gradient": {"ROWS": 64, "WORDS": 64, "INNER": 32, "num_warps": 8, "num_stages": 3},
        "grad_hidden": {"ROWS": 64, "COLUMNS": 64, "INNER": 32, "num_warps": 4, "num_stages": 3},
        "grad_weight": {"WORDS": 64, "COLUMNS": 64, "INNER": 32, "num_warps": 8, "num_stages": 5}},
}
TILES = tuned.apply("masked_cross_entropy", TILES)
GRAD_BIAS = {"ROWS": 32, "WORDS": 64, "num_warps": 4}  # divides the tiles of "gradient" too
ROW = {"WORDS": 4096, "num_warps": 8}  # of the kernels that read logits


@triton.jit
def _soft_cap(z, cap):
    """cap * tanh(z / cap); libdevice's tanh is not in the interpreter."""
    t = tl.exp(-2.0 * tl.abs(z) / cap)
    bounded = cap * (1.0 - t) / (1.0 + t)
    return tl.where(z < 0, -bounded, bounded)


@triton.jit
def _row_statistics_kernel(tops, totals, target_logits, logits, targets, corrupted, logits_stride, softcap, V,
                           WORDS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)  # n * logits_stride passes 2**31
    if tl.load(corrupted + n) == 0:
        return
    target = tl.load(targets + n)
    top, total, target_logit = -3e38, 0.0, 0.0  # finite: a block of -inf would give nan
    for start in range(0, V, WORDS):
        v = start + tl.arange(0, WORDS)
        z = tl.load(logits + n * logits_stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
        if softcap is not None:
            z = _soft_cap(z, softcap)
        target_logit += tl.sum(tl.where((v == target) & (v < V), z, 0.0), 0)
        z = tl.where(v < V, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    tl.store(tops + n, top)
    tl.store(totals + n, total)
    # No logit was picked for a target out of range, and the loss must show it.
    tl.store(target_logits + n, tl.where((target >= 0) & (target < V), target_logit, float("nan")))


@triton.jit
def _row_gradient_kernel(grad_logits, logits, targets, corrupted, tops, probability_scale, target_scale, logits_stride,
                         softcap, V, WORDS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    readable = tl.where(tl.load(corrupted + n) != 0, V, 0)  # words of this row
    target, top = tl.load(targets + n), tl.load(tops + n)
    p_scale, t_scale = tl.load(probability_scale + n), tl.load(target_scale + n)
    for start in range(0, V, WORDS):
        v = start + tl.arange(0, WORDS)
        z = tl.load(logits + n * logits_stride + v, mask=v < readable, other=0.0).to(tl.float32)
        g = _gradient(z, v == target, top, p_scale, t_scale, softcap)
        tl.store(grad_logits + n * V + v, tl.where(v < readable, g, 0.0).to(grad_logits.dtype.element_ty), mask=v < V)


@triton.jit
def _gradient(z, is_target, top, probability_scale, target_scale, softcap):
    """The gradient with respect to logits z, before the soft cap."""
    capped = z
    if softcap is not None:
        capped = _soft_cap(z, softcap)
    g = tl.exp(capped - top) * probability_scale - tl.where(is_target, target_scale, 0.0)
    if softcap is not None:
        g *= 1.0 - (capped / softcap) * (capped / softcap)
    return g


@triton.jit
def _statistics_kernel(tops, totals, target_logits, hidden, weight, bias, targets, rows, count, hidden_stride,
                       weight_stride, softcap, N, V, D, group, splits, span, ROWS: tl.constexpr, WORDS: tl.constexpr,
                       INNER: tl.constexpr):
    """Write tops, totals and target_logits [splits, N] of `span` words each, at the positions in `rows`."""
    tile, split = tile_and_split(group, splits)
    live = tl.load(count).to(tl.int32)
    if tile * ROWS >= live:
        return
    i = tile * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + tl.minimum(i, live - 1))
    x = hidden + row * hidden_stride
    target = tl.load(targets + row)
    top = tl.full((ROWS,), -3e38, tl.float32)  # finite: a tile of -inf would give nan
    total = tl.zeros((ROWS,), tl.float32)
    target_logit = tl.zeros((ROWS,), tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, V), WORDS):
        v = start + tl.arange(0, WORDS)
        z = logits_of_tile(x, weight, bias, start, weight_stride, V, D, WORDS, INNER)
        if softcap is not None:
            z = _soft_cap(z, softcap)
        is_word = v[None, :] < V
        target_logit += tl.sum(tl.where((v[None, :] == target[:, None]) & is_word, z, 0.0), 1)
        z = tl.where(is_word, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), 1)
        top = new_top
    at = split.to(tl.int64) * N + row
    tl.store(tops + at, top, mask=i < live)
    tl.store(totals + at, total, mask=i < live)
    tl.store(target_logits + at, target_logit, mask=i < live)


@triton.jit
def _gradient_kernel(g, hidden, weight, bias, targets, rows, count, tops, probability_scale, target_scale,
                     hidden_stride, weight_stride, softcap, start, row_tiles, width, V, D, ROWS: tl.constexpr,
                     WORDS: tl.constexpr, INNER: tl.constexpr):
    """Write g [rows from `start`, width] for the live rows and, with zeros, for the rest of their tiles."""
    program = tl.program_id(0)
    tile, words = program % row_tiles, program // row_tiles  # a chunk's rows stay in the cache, the words pass by once
    live = tl.load(count).to(tl.int32) - start
    if tile * ROWS >= live:
        return
    i = tile * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + start + tl.minimum(i, live - 1))
    v = words * WORDS + tl.arange(0, WORDS)
    z = logits_of_tile(hidden + row * hidden_stride, weight, bias, words * WORDS, weight_stride, V, D, WORDS, INNER)
    target, top = tl.load(targets + row), tl.load(tops + row)
    p_scale, t_scale = tl.load(probability_scale + row), tl.load(target_scale + row)
    out = _gradient(z, v[None, :] == target[:, None], top[:, None], p_scale[:, None], t_scale[:, None], softcap)
    out = tl.where((i < live)[:, None] & (v[None, :] < V), out, 0.0)
    tl.store(g + i.to(tl.int64)[:, None] * width + v[None, :], out.to(g.dtype.element_ty))


@triton.jit
def _grad_hidden_kernel(grad_hidden, g, weight, rows, count, unit, weight_stride, start, row_tiles, width, V, D,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """grad_hidden[rows from `start`] = unit * g @ weight."""
    program = tl.program_id(0)
    tile, columns = program % row_tiles, program // row_tiles
    live = tl.load(count).to(tl.int32) - start
    if tile * ROWS >= live:
        return
    i = tile * ROWS + tl.arange(0, ROWS)
    d = columns * COLUMNS + tl.arange(0, COLUMNS)
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    v = tl.arange(0, INNER)
    g += i.to(tl.int64)[:, None] * width + v[None, :]
    for first in range(0, V, INNER):
        a = tl.load(g + first)
        b = tl.load(weight + tl.cast(first, tl.int64) * weight_stride + (v[:, None] * weight_stride + d[None, :]),
                    mask=(v[:, None] < V - first) & (d[None, :] < D), other=0.0)
        out = tl.dot(a, b, out, input_precision="ieee")
    row = tl.load(rows + start + tl.minimum(i, live - 1))
    tl.store(grad_hidden + row[:, None] * D + d[None, :], (out * tl.load(unit)).to(grad_hidden.dtype.element_ty),
             mask=(i[:, None] < live) & (d[None, :] < D))


@triton.jit
def _grad_weight_kernel(grad_weight, g, hidden, rows, count, hidden_stride, start, size, column_tiles, width, V, D,
                        WORDS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """grad_weight += g.T @ hidden[rows from `start`], of at most `size` rows."""
    program = tl.program_id(0)
    words, columns = program // column_tiles, program % column_tiles
    live = tl.minimum(tl.load(count).to(tl.int32) - start, size)
    if live <= 0:
        return
    v = words * WORDS + tl.arange(0, WORDS)
    d = columns * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, INNER)
    at = grad_weight + v.to(tl.int64)[:, None] * D + d[None, :]
    mask = (v[:, None] < V) & (d[None, :] < D)
    out = tl.load(at, mask=mask, other=0.0)
    for first in range(0, live, INNER):
        row = tl.load(rows + start + tl.minimum(first + i, live - 1))  # past live g is zero
        a = tl.load(g + tl.cast(first, tl.int64) * width + (i[None, :] * width + v[:, None]))
        b = tl.load(hidden + row[:, None] * hidden_stride + d[None, :], mask=d[None, :] < D, other=0.0)
        out = tl.dot(a, b, out, input_precision="ieee")
    tl.store(at, out, mask=mask)


@triton.jit
def _grad_bias_kernel(grad_bias, g, count, start, size, width, V, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """grad_bias += the sum over the rows of g."""
    v = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    live = tl.minimum(tl.load(count).to(tl.int32) - start, size)
    if live <= 0:
        return
    out = tl.load(grad_bias + v, mask=v < V, other=0.0)
    for first in range(0, live, ROWS):
        i = first + tl.arange(0, ROWS)
        out += tl.sum(tl.load(g + i.to(tl.int64)[:, None] * width + v[None, :]).to(tl.float32), 0)
    tl.store(grad_bias + v, out, mask=v < V)


def statistics(logits: Tensor, scored: Scored, form: Form) -> tuple[Tensor, ...]:
    N, V = logits.shape
    logits, found = with_rows_contiguous(logits), _statistics_of(N, logits)
    if N:
        with torch.cuda.device_of(logits):
            _row_statistics_kernel[(N,)](*found, logits, _narrow(scored.targets, V), scored.corrupted, logits.stride(0),
                                         _float(form.softcap), V, **ROW)
    return found


def gradients(logits: Tensor, scored: Scored, form: Form, scales: Scales, wanted) -> tuple[Tensor]:
    N, V = logits.shape
    logits, out = with_rows_contiguous(logits), torch.empty_like(logits, memory_format=torch.contiguous_format)
    if N:
        with torch.cuda.device_of(logits):
            _row_gradient_kernel[(N,)](out, logits, _narrow(scored.targets, V), scored.corrupted, *scales,
                                       logits.stride(0), _float(form.softcap), V, **ROW)
    return out,


def linear_statistics(inputs: Linear, scored: Scored, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and weight of different dtypes are multiplied in the wider."""
    hidden, weight, tiles = _operands(inputs)
    (N, D), V, tiles = hidden.shape, len(weight), tiles["statistics"]
    rows, count = _corrupted_first(scored)
    targets = _narrow(scored.targets, V)
    row_tiles, word_tiles = -(-N // tiles["ROWS"]), -(-V // tiles["WORDS"])
    splits = min(word_tiles, max(SPLITS, PROGRAMS // max(row_tiles, 1)))
    span = -(-word_tiles // splits) * tiles["WORDS"]
    splits = -(-V // span)
    tops, totals, target_logits = _statistics_of((splits, N), hidden)
    if N:
        group = min(GROUP, row_tiles)
        with torch.cuda.device_of(hidden):
            _statistics_kernel[(-(-row_tiles // group) * group * splits,)](
                tops, totals, target_logits, hidden, weight, inputs.bias, targets, rows, count, hidden.stride(0),
                weight.stride(0), _float(form.softcap), N, V, D, group, splits, span, **tiles)
    top = tops.amax(0)
    in_range = (targets >= 0) & (targets < V)
    target_logit = torch.where(in_range | ~scored.corrupted, target_logits.sum(0), torch.nan)
    return top, (totals * (tops - top).exp()).sum(0), target_logit


def linear_gradients(inputs: Linear, scored: Scored, form: Form, scales: Scales, wanted) -> tuple[Tensor | None, ...]:
    hidden, weight, tiles = _operands(inputs)
    (N, D), V = hidden.shape, len(weight)
    rows, count = _corrupted_first(scored)
    grad_hidden, grad_weight, grad_bias = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) if want else None
        for x, dtype, want in zip(inputs, (inputs.hidden.dtype, torch.float32, torch.float32), wanted, strict=True))
    if N and any(wanted):
        # In units of the largest scale g is within fp16's range whatever the upstream gradient.
        unit = scales.target.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        targets, scaled = _narrow(scored.targets, V), (scales.probability / unit, scales.target / unit)
        outer = tiles["gradient"]
        word_tiles = -(-V // outer["WORDS"])
        width = word_tiles * outer["WORDS"]
        fitting = (form.workspace_bytes or WORKSPACE_BYTES) // (width * hidden.element_size() * outer["ROWS"])
        row_tiles = min(-(-N // outer["ROWS"]), max(1, fitting))
        size = row_tiles * outer["ROWS"]
        g = torch.empty(size, width, dtype=hidden.dtype, device=hidden.device)
        with torch.cuda.device_of(hidden):
            for start in range(0, N, size):
                _gradient_kernel[(row_tiles * word_tiles,)](
                    g, hidden, weight, inputs.bias, targets, rows, count, scales.top, *scaled, hidden.stride(0),
                    weight.stride(0), _float(form.softcap), start, row_tiles, width, V, D, **outer)
                if wanted[0]:
                    inner = tiles["grad_hidden"]
                    tall, wide = size // inner["ROWS"], -(-D // inner["COLUMNS"])
                    _grad_hidden_kernel[(tall * wide,)](
                        grad_hidden, g, weight, rows, count, unit, weight.stride(0), start, tall, width, V, D, **inner)
                if wanted[1]:
                    inner = tiles["grad_weight"]
                    tall, wide = width // inner["WORDS"], -(-D // inner["COLUMNS"])
                    _grad_weight_kernel[(tall * wide,)](
                        grad_weight, g, hidden, rows, count, hidden.stride(0), start, size, wide, width, V, D, **inner)
                if wanted[2]:
                    _grad_bias_kernel[(width // GRAD_BIAS["WORDS"],)](
                        grad_bias, g, count, start, size, width, V, **GRAD_BIAS)
        grad_weight, grad_bias = (None if x is None else x.mul_(unit) for x in (grad_weight, grad_bias))
    return (grad_hidden, None if grad_weight is None else grad_weight.to(inputs.weight.dtype),
            None if grad_bias is None else grad_bias.to(inputs.bias.dtype))


def _float(softcap: float | None) -> float | None:
    return None if softcap is None else float(softcap)  # an int would be another kernel, and 1 a third


def _narrow(targets: Tensor, V: int) -> Tensor:
    """The targets in 32 bits; those out of range stay out of range."""
    return targets.clamp(-1, V).int()


def _statistics_of(shape, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """top, total and target logit of rows without words; kernels overwrite those of the corrupted rows."""
    top, target_logit = (torch.zeros(shape, dtype=torch.float32, device=like.device) for _ in range(2))
    return top, torch.ones_like(top), target_logit


def _corrupted_first(scored: Scored) -> tuple[Tensor, Tensor]:
    """The positions [N], the corrupted ones first, and their number."""
    return scored.corrupted.byte().argsort(descending=True, stable=True), scored.corrupted.sum()


def _operands(inputs: Linear) -> tuple[Tensor, Tensor, dict]:
    dtype = torch.promote_types(inputs.hidden.dtype, inputs.weight.dtype)
    return *(with_rows_contiguous(x.to(dtype)) for x in inputs[:2]), TILES[dtype.itemsize]
