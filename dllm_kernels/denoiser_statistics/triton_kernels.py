"""The statistics and the soft embedding in slabs of words, without host synchronisation.

For each slab of SLAB words PyTorch multiplies (cuBLAS) the fp32 logits of all rows, and a Triton kernel, one program a
row, caps and tempers them and adds to the row's running numbers, relative to the largest logit so far, top:
    s = sum exp(z - top),  t = sum exp(z - top) (z - top),  and the sum of each tile of WORDS words
For the soft embedding it leaves exp(z - top) in the dtype of the weight and the factor by which a raised top scales
what came before; PyTorch multiplies the former by the slab and adds in fp32. A last kernel, one program a row, finds
the tile in which the cumulative probability passes u, and multiplies that tile's words again.
M rows, V words, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunks import WORKSPACE_BYTES, rows_of_chunk
from .settings import Inputs, Results

# Not measured on a GPU.
WORDS, TILES = 128, 64  # words of a tile, tiles of a slab
SLAB = {"num_warps": 16}
CHOOSE = {"INNER": 64, "num_warps": 8}


@triton.jit
def _finite(top):
    return tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN


@triton.jit
def _tempered(z, is_word, temperature, softcap):
    """The capped logit by the temperature, -inf past the last word. libdevice's tanh is not in the interpreter."""
    x = z
    if softcap is not None:
        e = tl.exp(-2.0 * tl.abs(z) / softcap)
        capped = softcap * (1.0 - e) / (1.0 + e)
        x = tl.where(z < 0, -capped, capped)
    return tl.where(is_word, tl.div_rn(x, temperature), -float("inf"))


@triton.jit(do_not_specialize=["tiles", "slabs"])
def _slab_kernel(tops, argmax, s, t, factors, tile_sums, slab_tops, p, z, temperatures, softcap, start, V, tiles, slabs,
                 z_stride, WORDS: tl.constexpr, TILES: tl.constexpr):
    """Add the words from `start` on to tops, argmax, s and t [M]; write tile_sums [M, tiles], slab_tops [M, slabs]."""
    m = tl.program_id(0).to(tl.int64)  # m * z_stride passes 2**31
    tile = tl.arange(0, TILES)
    place = tile[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    v = start + place
    x = tl.load(z + m * z_stride + place, mask=v < V, other=0.0)
    x = _tempered(x, v < V, tl.load(temperatures + m), softcap)
    before, best = tl.load(tops + m), tl.max(tl.max(x, 1), 0)
    if best > before:
        lowest = tl.min(tl.min(tl.where(x == best, v, V), 1), 0)
        tl.store(argmax + m, lowest.to(tl.int64))
    top = tl.maximum(before, best)
    d = x - _finite(top)
    e = tl.exp(d)
    each = tl.sum(e, 1)
    at = start // WORDS + tile
    tl.store(tile_sums + m * tiles + at, each, mask=at < tiles)
    tl.store(slab_tops + m * slabs + start // (WORDS * TILES), top)
    shift = (before - _finite(top)).to(tl.float64)
    factor = tl.exp(shift)
    old_s, old_t = tl.load(s + m), tl.load(t + m)
    more_t = tl.sum(tl.sum(tl.where(e > 0, e * d, 0.0), 1), 0).to(tl.float64)
    tl.store(t + m, more_t + tl.where(factor > 0, factor * (old_t + shift * old_s), 0.0))
    tl.store(s + m, tl.sum(each, 0).to(tl.float64) + factor * old_s)
    tl.store(tops + m, top)
    if p is not None:
        tl.store(factors + m, factor.to(tl.float32))
        tl.store(p + m * z_stride + place, e.to(p.dtype.element_ty), mask=v < V)


@triton.jit(do_not_specialize=["tiles", "slabs"])
def _choose_kernel(tokens, entropy, log_normaliser, tops, s, t, tile_sums, slab_tops, hidden, weight, temperatures,
                   uniform, softcap, hidden_stride, weight_stride, V, D, tiles, slabs, WORDS: tl.constexpr,
                   TILES: tl.constexpr, BLOCKS: tl.constexpr, INNER: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    top = tl.load(tops + m)
    sums = tl.load(tile_sums + m * tiles + b, mask=b < tiles, other=0.0).to(tl.float64)
    tops_then = tl.load(slab_tops + m * slabs + b // TILES, mask=b < tiles, other=-float("inf"))
    mass = tl.where(sums == 0, 0.0, sums * tl.exp((tops_then - _finite(top)).to(tl.float64)))
    ends = tl.cumsum(mass, 0)
    passed = tl.load(uniform + m) * tl.sum(mass, 0)
    # Sums of floats may differ in the last bit: if none passes, the last word that has a probability is taken.
    tile = tl.minimum(tl.sum(((ends <= passed) & (b < tiles)).to(tl.int32), 0), tl.max(tl.where(mass > 0, b, 0), 0))
    before = tl.sum(tl.where(b == tile, ends - mass, 0.0), 0)
    v = tile * WORDS + tl.arange(0, WORDS)
    weight += tl.minimum(v, V - 1).to(tl.int64)[:, None] * weight_stride
    z = tl.zeros((WORDS,), tl.float32)
    for start in range(0, D, INNER):
        d = start + tl.arange(0, INNER)
        w = tl.load(weight + d[None, :], mask=d[None, :] < D, other=0.0).to(tl.float32)
        h = tl.load(hidden + m * hidden_stride + d, mask=d < D, other=0.0).to(tl.float32)
        z += tl.sum(w * h[None, :], 1)
    x = _tempered(z, v < V, tl.load(temperatures + m), softcap)
    # This product sums in another order: a logit may now be a little above the largest.
    e = tl.exp(tl.minimum(x - _finite(top), 0.0)).to(tl.float64)
    word = tl.sum((before + tl.cumsum(e, 0) <= passed).to(tl.int32), 0)
    word = tl.minimum(word, tl.max(tl.where(e > 0, tl.arange(0, WORDS), 0), 0))
    tl.store(tokens + m, tl.minimum(tile * WORDS + word, V - 1).to(tl.int64))
    total = tl.load(s + m)
    possible = total > 0  # not NaN
    log_total = tl.log(total)
    tl.store(entropy + m, tl.where(possible, log_total - tl.load(t + m) / total, float("nan")).to(tl.float32))
    tl.store(log_normaliser + m, tl.where(possible, top + log_total, float("nan")).to(tl.float32))


def statistics(inputs: Inputs, uniform: Tensor, soft: bool) -> Results:
    """As `reference.statistics`; the products are of the wider of the two dtypes, summed in fp32."""
    dtype = torch.promote_types(inputs.hidden.dtype, inputs.weight.dtype)
    hidden, weight = (x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in inputs[:2])
    size = rows_of_chunk(len(hidden), 6 * WORDS * TILES, WORKSPACE_BYTES["cuda"])
    found = []
    for start in range(0, max(len(hidden), 1), size):
        rows = slice(start, start + size)
        part = Inputs(hidden[rows], weight, inputs.temperature[rows].contiguous(), inputs.softcap)
        found.append(_statistics(part, uniform[rows].contiguous(), soft))
    *numbers, embedding = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    return Results(*numbers, embedding.to(inputs.weight.dtype))


def soft_embedding(inputs: Inputs, log_normaliser: Tensor) -> Tensor:
    """As `reference.soft_embedding`. The pass sums exp(z) itself, so it does not need the log-normaliser."""
    return statistics(inputs, torch.zeros_like(log_normaliser, dtype=torch.float64), soft=True).soft


def _statistics(inputs: Inputs, uniform: Tensor, soft: bool) -> Results:
    hidden, weight, temperature, softcap = inputs
    (M, D), V, slab = hidden.shape, len(weight), WORDS * TILES
    tiles, slabs = -(-V // WORDS), -(-V // slab)
    top, factor, entropy, log_normaliser = (hidden.new_full((M,), -torch.inf, dtype=torch.float32) for _ in range(4))
    token, argmax = (hidden.new_zeros(M, dtype=torch.int64) for _ in range(2))
    s, t = (hidden.new_zeros(M, dtype=torch.float64) for _ in range(2))
    tile_sums, slab_tops = (hidden.new_empty(M, n, dtype=torch.float32) for n in (tiles, slabs))
    z = hidden.new_empty(M, slab, dtype=torch.float32)
    p = weight.new_empty(M, slab) if soft else None
    total = hidden.new_zeros(M, D, dtype=torch.float32) if soft else None
    for start in range(0, V if M else 0, slab):
        words = weight[start:start + slab]
        _multiply(hidden, words.T, z[:, :len(words)])
        _slab_kernel[(M,)](top, argmax, s, t, factor, tile_sums, slab_tops, p, z, temperature, softcap, start, V, tiles,
                           slabs, slab, WORDS=WORDS, TILES=TILES, **SLAB)
        if soft:
            total.mul_(factor.unsqueeze(1))
            _multiply(p[:, :len(words)], words, total, add=True)
    if M:
        _choose_kernel[(M,)](token, entropy, log_normaliser, top, s, t, tile_sums, slab_tops, hidden, weight,
                             temperature, uniform, softcap, hidden.stride(0), weight.stride(0), V, D, tiles, slabs,
                             WORDS=WORDS, TILES=TILES, BLOCKS=triton.next_power_of_2(tiles), **CHOOSE)
    embedding = (total / s.float().unsqueeze(1)).to(weight.dtype) if soft else weight.new_empty(0)
    return Results(token, argmax, entropy, log_normaliser, embedding)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = (add ? out : 0) + a @ b in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=int(add), out=out)
    else:  # of 16 bits on a CPU: the interpreter's
        torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)
