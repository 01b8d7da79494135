"""Masked cross-entropy in Triton: for GPUs, without ever waiting for one.

With z = logits, or hidden @ weight.T + bias, after the soft cap, and y the target of a corrupted row:
    loss = log(total) + top - z[y] + z_loss lse^2,    top = max(z), total = sum(exp(z - top)), lse = top + log(total)
    d loss / d z[v] = exp(z[v] - top) (1 + 2 z_loss lse) / total - [v = y]
N positions, V words, D hidden size. top and total come from an online softmax (arXiv:1805.02867).

How many rows are corrupted stays on the GPU: `rows` holds their positions first, `count` how many they are, every
grid is that of N rows, and programs past `count` return at once. cuBLAS would need the sizes on the host, or compute
all N rows; half a batch is typically not corrupted, which by estimate costs more than its faster products win back.
Hence all four products (z; in the backward z again, grad_hidden, grad_weight) are kernels of this file.

The forward stores three numbers per row and share of the vocabulary. The backward stores the gradient g of z, in the
inputs' dtype, for as many rows as the workspace holds, then multiplies it from both sides: computing z within each of
the two products would need no workspace but a fifth product, and in grad_hidden one per tile of D. Nothing is added
atomically: the same inputs give the same bits. With skip_below, "gradient" says of each of its tiles whether it wrote
g, and the products run over the lists of those it did: a branch in their loops would end the pipelining of their loads.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dllm_kernels import tuned
from dllm_kernels.masked_cross_entropy.reference import refuse_second_derivative
from dllm_kernels.masked_cross_entropy.rows import (
    FromLogits,
    Passes,
    probability_scale,
    row_loss,
    row_scale,
    with_rows_contiguous,
)
from dllm_kernels.triton_head import logits_of_tile

WORKSPACE_BYTES = 1 << 30  # unless the caller says: of gradients of the logits held at once, in the backward
GROUP = 16  # row tiles that share words in the cache
SPLITS, PROGRAMS = 32, 512  # shares of the vocabulary: so many, or more for few rows, until there are so many programs

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
# With skip_below: the list of tiles is one more load to wait for; in fp32, INNER 32 spills on sm_80.
LISTED = {2: {"grad_hidden": {"num_stages": 5}, "grad_weight": {}},
          4: {"grad_hidden": {"num_stages": 5}, "grad_weight": {"INNER": 16}}}
GRAD_BIAS = {"ROWS": 32, "WORDS": 64, "num_warps": 4}  # divides the tiles of "gradient" too
ROW = {"WORDS": 4096, "num_warps": 8}  # of the kernels that read logits


def masked_cross_entropy(logits: Tensor, targets: Tensor, corrupted: Tensor, weights: Tensor | None, reduction: str,
                         softcap: float | None = None, z_loss: float = 0.0) -> Tensor:
    """As `reference.masked_cross_entropy`; a target out of range makes the loss NaN."""
    return FromLogits.apply(logits, targets, corrupted, weights, reduction, _float(softcap), z_loss,
                            Passes(_row_statistics, _row_gradients))


def linear_masked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, corrupted: Tensor, bias: Tensor | None,
                                weights: Tensor | None, reduction: str, softcap: float | None = None,
                                z_loss: float = 0.0, skip_below: float = 0.0,
                                workspace_bytes: int | None = None) -> Tensor:
    """As `reference.linear_masked_cross_entropy`; hidden and weight of different dtypes are multiplied in the wider.

    A target out of range makes the loss NaN. What `skip_below` skips are the tiles of "gradient" in TILES.
    """
    return _LinearMaskedCrossEntropy.apply(hidden, weight, bias, targets, corrupted, weights, reduction,
                                           _float(softcap), z_loss, skip_below, workspace_bytes)


def _float(softcap):  # an int would be another kernel, and 1 a third
    return None if softcap is None else float(softcap)


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
    # Out of range, no logit has been picked, and the loss is to show it.
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
    """Write tops, totals and target_logits [splits, N] of `span` words each, in the order of `rows`."""
    # Programs at work at one time share `group` row tiles and few words, so that both are found in the cache.
    program = tl.program_id(0)
    tile = program // (group * splits) * group + program % group
    split = program % (group * splits) // group
    live = tl.load(count).to(tl.int32)
    if tile * ROWS >= live:
        return
    i = tile * ROWS + tl.arange(0, ROWS)
    x = hidden + tl.load(rows + tl.minimum(i, live - 1)) * hidden_stride
    target = tl.load(targets + i, mask=i < live, other=-1)
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
    at = split.to(tl.int64) * N + i
    tl.store(tops + at, top, mask=i < live)
    tl.store(totals + at, total, mask=i < live)
    tl.store(target_logits + at, target_logit, mask=i < live)


@triton.jit
def _gradient_kernel(g, written, hidden, weight, bias, targets, rows, count, tops, limits, probability_scale,
                     target_scale, hidden_stride, weight_stride, softcap, start, row_tiles, width, V, D,
                     ROWS: tl.constexpr, WORDS: tl.constexpr, INNER: tl.constexpr):
    """Write g [rows from `start`, width] for the live rows and, with zeros, for the rest of their tiles.

    Given limits, write a tile only if a logit in it reaches its row's limit or is that of a target, and then set
    written [word tiles, row_tiles].
    """
    program = tl.program_id(0)
    tile, words = program % row_tiles, program // row_tiles  # a chunk's rows stay in the cache, the words pass by once
    live = tl.load(count).to(tl.int32) - start
    if tile * ROWS >= live:
        return
    i = tile * ROWS + tl.arange(0, ROWS)
    is_live = i < live
    x = hidden + tl.load(rows + start + tl.minimum(i, live - 1)) * hidden_stride
    v = words * WORDS + tl.arange(0, WORDS)
    z = logits_of_tile(x, weight, bias, words * WORDS, weight_stride, V, D, WORDS, INNER)
    target = tl.load(targets + start + i, mask=is_live, other=-1)
    if limits is not None:
        limit = tl.load(limits + start + i, mask=is_live, other=float("inf"))
        capped = z
        if softcap is not None:
            capped = _soft_cap(z, softcap)
        # Not >=: a NaN is to be seen too.
        needed = (((capped < limit[:, None]) == 0) & is_live[:, None]) | (v[None, :] == target[:, None])
        # Of all at once: in two steps Triton 3.6 fails for Blackwell.
        needed = tl.max((needed & (v[None, :] < V)).to(tl.int32))
        if needed == 0:
            return
        tl.store(written + words * row_tiles + tile, 1)
    top = tl.load(tops + start + i, mask=is_live, other=0.0)
    p_scale = tl.load(probability_scale + start + i, mask=is_live, other=0.0)
    t_scale = tl.load(target_scale + start + i, mask=is_live, other=0.0)
    out = _gradient(z, v[None, :] == target[:, None], top[:, None], p_scale[:, None], t_scale[:, None], softcap)
    out = tl.where(is_live[:, None] & (v[None, :] < V), out, 0.0)
    tl.store(g + i.to(tl.int64)[:, None] * width + v[None, :], out.to(g.dtype.element_ty))


@triton.jit
def _grad_hidden_kernel(grad_hidden, g, weight, rows, count, unit, tiles, tile_counts, weight_stride, start, row_tiles,
                        width, V, D, TILE_ROWS: tl.constexpr, TILE_WORDS: tl.constexpr, ROWS: tl.constexpr,
                        COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """grad_hidden[rows from `start`] = unit * g @ weight, over the words of the first tile_counts[tile of rows] of
    tiles [tiles of rows, tiles of words], or all words."""
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
    end = V
    if tiles is not None:
        tile_row = tile * ROWS // TILE_ROWS
        end = tl.load(tile_counts + tile_row) * TILE_WORDS
        tiles += tile_row * (width // TILE_WORDS)
    for at in range(0, end, INNER):
        first = at
        if tiles is not None:
            first = tl.multiple_of(tl.load(tiles + at // TILE_WORDS) * TILE_WORDS + at % TILE_WORDS, INNER)
        a = tl.load(g + first)
        b = tl.load(weight + tl.cast(first, tl.int64) * weight_stride + (v[:, None] * weight_stride + d[None, :]),
                    mask=(v[:, None] < V - first) & (d[None, :] < D), other=0.0)
        out = tl.dot(a, b, out, input_precision="ieee")
    row = tl.load(rows + start + tl.minimum(i, live - 1))
    tl.store(grad_hidden + row[:, None] * D + d[None, :], (out * tl.load(unit)).to(grad_hidden.dtype.element_ty),
             mask=(i[:, None] < live) & (d[None, :] < D))


@triton.jit
def _grad_weight_kernel(grad_weight, g, hidden, rows, count, tiles, tile_counts, hidden_stride, start, size,
                        column_tiles, width, V, D, TILE_ROWS: tl.constexpr, TILE_WORDS: tl.constexpr,
                        WORDS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """grad_weight += g.T @ hidden[rows from `start`], of at most `size` rows: those in the first
    tile_counts[tile of words] of tiles [tiles of words, tiles of rows], or all that are live."""
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
    end = live
    if tiles is not None:
        tile_row = words * WORDS // TILE_WORDS
        end = tl.load(tile_counts + tile_row) * TILE_ROWS
        tiles += tile_row * (size // TILE_ROWS)
    for place in range(0, end, INNER):
        first = place
        if tiles is not None:
            first = tl.multiple_of(tl.load(tiles + place // TILE_ROWS) * TILE_ROWS + place % TILE_ROWS, INNER)
        row = tl.load(rows + start + tl.minimum(first + i, live - 1))  # past live g is zero
        a = tl.load(g + tl.cast(first, tl.int64) * width + (i[None, :] * width + v[:, None]))
        b = tl.load(hidden + row[:, None] * hidden_stride + d[None, :], mask=d[None, :] < D, other=0.0)
        out = tl.dot(a, b, out, input_precision="ieee")
    tl.store(at, out, mask=mask)


@triton.jit
def _grad_bias_kernel(grad_bias, g, count, written, start, size, width, V, TILE_ROWS: tl.constexpr,
                      TILE_WORDS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """grad_bias += the sum over the rows of g, of the tiles that are written."""
    v = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    live = tl.minimum(tl.load(count).to(tl.int32) - start, size)
    if live <= 0:
        return
    out = tl.load(grad_bias + v, mask=v < V, other=0.0)
    for first in range(0, live, ROWS):
        i = first + tl.arange(0, ROWS)
        is_written = 1
        if written is not None:
            column = tl.program_id(0) * WORDS // TILE_WORDS
            is_written = tl.load(written + column * (size // TILE_ROWS) + first // TILE_ROWS)
        if is_written != 0:
            out += tl.sum(tl.load(g + i.to(tl.int64)[:, None] * width + v[None, :]).to(tl.float32), 0)
    tl.store(grad_bias + v, out, mask=v < V)


def _row_statistics(logits, targets, corrupted, softcap):
    N, V = logits.shape
    statistics = _statistics_of(N, logits)
    if N:
        with torch.cuda.device_of(logits):
            _row_statistics_kernel[(N,)](*statistics, logits, _narrow(targets, V), corrupted, logits.stride(0), softcap,
                                         V, **ROW)
    return statistics


def _row_gradients(logits, targets, corrupted, softcap, *scales):
    N, V = logits.shape
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if N:
        with torch.cuda.device_of(logits):
            _row_gradient_kernel[(N,)](out, logits, _narrow(targets, V), corrupted, *scales, logits.stride(0), softcap,
                                       V, **ROW)
    return out


class _LinearMaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, corrupted, weights, reduction, softcap, z_loss, skip_below,
                workspace_bytes):
        N, V = len(hidden), len(weight)
        count = corrupted.sum()
        rows = corrupted.byte().argsort(descending=True, stable=True)
        live = torch.arange(N, device=rows.device) < count
        targets = _narrow(targets[rows], V)
        scale = row_scale(live, None if weights is None else weights[rows], count if reduction == "mean" else None)
        tops, totals, target_logits = _statistics(hidden, weight, bias, targets, rows, count, softcap)
        top = tops.amax(0)
        total = (totals * (tops - top).exp()).sum(0)
        # Out of range, no logit has been picked, and the loss is to show it.
        target_logit = torch.where(live & ((targets < 0) | (targets >= V)), torch.nan, target_logits.sum(0))
        ctx.save_for_backward(hidden, weight, bias, targets, rows, count, live, scale, top, total)
        ctx.scattered = reduction == "none"
        ctx.settings = softcap, z_loss, skip_below, workspace_bytes
        loss = row_loss(top, total, target_logit, scale, z_loss)
        return torch.zeros_like(loss).scatter_(0, rows, loss) if ctx.scattered else loss.sum()

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        hidden, weight, bias, targets, rows, count, live, scale, top, total = ctx.saved_tensors
        softcap, z_loss, skip_below, workspace_bytes = ctx.settings
        scale = torch.where(live, scale * (grad[rows] if ctx.scattered else grad), 0.0)
        limit = top + total.log() + math.log(skip_below) if skip_below else None
        gradients = _gradients(hidden, weight, bias, targets, rows, count, top, limit,
                               probability_scale(scale, top, total, z_loss), scale, softcap,
                               WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
                               ctx.needs_input_grad[:3])
        return *gradients, *(None,) * 8


def _narrow(targets: Tensor, V: int) -> Tensor:
    """The targets in 32 bits; those out of range stay so."""
    return targets.clamp(-1, V).int()


def _statistics_of(shape, like):
    """top, total and target logit of a row without words; kernels fill in those of the corrupted rows."""
    top, target_logit = (torch.zeros(shape, dtype=torch.float32, device=like.device) for _ in range(2))
    return top, torch.ones_like(top), target_logit


def _operands(hidden, weight):
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return with_rows_contiguous(hidden.to(dtype)), with_rows_contiguous(weight.to(dtype)), TILES[dtype.itemsize]


def _statistics(hidden, weight, bias, targets, rows, count, softcap):
    """top, total and target logit [splits, N] of each row and share of the vocabulary, in the order of `rows`."""
    (N, D), V = hidden.shape, len(weight)
    x, w, tiles = _operands(hidden, weight)
    tiles = tiles["statistics"]
    row_tiles, word_tiles = -(-N // tiles["ROWS"]), -(-V // tiles["WORDS"])
    splits = min(word_tiles, max(SPLITS, PROGRAMS // max(row_tiles, 1)))
    span = -(-word_tiles // splits) * tiles["WORDS"]
    splits = -(-V // span)
    statistics = _statistics_of((splits, N), hidden)
    if N:
        group = min(GROUP, row_tiles)
        with torch.cuda.device_of(x):
            _statistics_kernel[(-(-row_tiles // group) * group * splits,)](
                *statistics, x, w, bias, targets, rows, count, x.stride(0), w.stride(0), softcap, N, V, D, group,
                splits, span, **tiles)
    return statistics


def _gradients(hidden, weight, bias, targets, rows, count, top, limit, probability_scale, target_scale, softcap,
               workspace_bytes, wanted):
    """The gradients for hidden, weight and bias, where wanted."""
    (N, D), V = hidden.shape, len(weight)
    x, w, tiles = _operands(hidden, weight)
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
    grad_weight = torch.zeros(V, D, dtype=torch.float32, device=x.device) if wanted[1] else None
    grad_bias = torch.zeros(V, dtype=torch.float32, device=x.device) if wanted[2] else None
    if N and any(wanted):
        # In units of the largest scale g is within fp16's range whatever the upstream gradient.
        unit = target_scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        scales = probability_scale / unit, target_scale / unit
        outer = tiles["gradient"]
        if limit is not None:
            tiles = {name: tiles[name] | changes for name, changes in LISTED[x.element_size()].items()}
        word_tiles = -(-V // outer["WORDS"])
        width = word_tiles * outer["WORDS"]
        fitting = max(1, workspace_bytes // (width * x.element_size() * outer["ROWS"]))
        row_tiles = min(-(-N // outer["ROWS"]), fitting)
        size = row_tiles * outer["ROWS"]
        g = torch.empty(size, width, dtype=x.dtype, device=x.device)
        strides, tile = (x.stride(0), w.stride(0)), {"TILE_ROWS": outer["ROWS"], "TILE_WORDS": outer["WORDS"]}
        with torch.cuda.device_of(x):
            for start in range(0, N, size):
                written = None
                if limit is not None:
                    written = torch.zeros(word_tiles, row_tiles, dtype=torch.int8, device=x.device)
                _gradient_kernel[(row_tiles * word_tiles,)](
                    g, written, x, w, bias, targets, rows, count, top, limit, *scales, *strides, softcap, start,
                    row_tiles, width, V, D, **outer)
                if wanted[0]:
                    inner = tiles["grad_hidden"]
                    tall, wide = size // inner["ROWS"], -(-D // inner["COLUMNS"])
                    _grad_hidden_kernel[(tall * wide,)](
                        grad_hidden, g, w, rows, count, unit, *_list_written(written, 0), strides[1], start, tall,
                        width, V, D, **tile, **inner)
                if wanted[1]:
                    inner = tiles["grad_weight"]
                    tall, wide = width // inner["WORDS"], -(-D // inner["COLUMNS"])
                    _grad_weight_kernel[(tall * wide,)](
                        grad_weight, g, x, rows, count, *_list_written(written, 1), strides[0], start, size, wide,
                        width, V, D, **tile, **inner)
                if wanted[2]:
                    _grad_bias_kernel[(width // GRAD_BIAS["WORDS"],)](
                        grad_bias, g, count, written, start, size, width, V, **tile, **GRAD_BIAS)
        grad_weight, grad_bias = (None if x is None else x.mul_(unit) for x in (grad_weight, grad_bias))
    return (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype))


def _list_written(written, dimension):
    """Of each row or column of `written`, the places of the tiles that are, first, and how many they are."""
    if written is None:
        return None, None
    places = written.T if dimension == 0 else written
    return (places.argsort(dim=1, descending=True, stable=True).int().contiguous(),
            places.sum(1, dtype=torch.int32))
