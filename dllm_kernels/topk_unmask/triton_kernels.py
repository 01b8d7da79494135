"""Unmasking in Triton, without host synchronisation.

A row of logits is read once, in blocks, and each block leaves a handful of numbers: its largest logit, the lowest word
that has it, the sum of exp(x - largest), and the runner-up or the sum of (x - largest) exp(x - largest). A second
kernel, one program per row, combines them in float64. To sample, it finds the block in which the cumulative probability
passes u, and reads that block again. A denoising step takes four launches: `find_rows`, two for scores, and `commit`.

    setting                              reads of a row                     launches of `score_rows`
    temperature 0                        1                                  2
    temperature > 0                      1 + one block                      2
    top_k or top_p                       up to 19 (bf16 11, fp16 13)        4
        + temperature > 0                one block more

Both filters keep the words above a cut: for top-p, the smallest value whose larger words weigh at most top_p; for
top-k, the smallest value that has fewer than top_k larger words. The search for the cut halves the range of an ordered
integer key twice per read, so nothing is sorted. At temperature 0 with a raw or random confidence a filter changes
nothing, and is left out.

The linear form multiplies tiles of words by rows, weight @ hidden.T, so that few rows need little padding: tensor cores
take 64 words at a time, but as few as 16 rows. A tile leaves the same numbers as a block of logits, from registers. To
sample or to filter it stores its logits too, in fp32, so that no row of the head is read again. The number of rows
stays on the GPU: programs without a row return at once. n rows to score, R rows of inputs, V words, D hidden size.
"""

import struct
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuned
from ..chunks import empty_logits
from .settings import Rows, Sampling, Selection, places

# Not measured on a GPU: tiles that spill no registers on sm_80, sm_90 and sm_100, but for 8 bytes on sm_100 where the
# linear form has allowed words, a bias and two distributions.
BLOCK = {"WORDS": 4096, "num_warps": 8}  # of a row of logits
CUT = {"WORDS": 2048, "num_warps": 8}
PROGRAMS, SHARE = 4096, 4  # blocks per program: up to SHARE, as long as there are PROGRAMS
# For the linear form, by bytes per element: "few" with as many ROWS as there are, 16 to MOST_FEW of them.
TILES = tuned.apply("topk_unmask", {
    2: {"few": {"WORDS": 128, "INNER": 64, "num_warps": 4, "num_stages": 3},
        "linear": {"ROWS": 128, "WORDS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3}},
    4: {"few": {"WORDS": 64, "INNER": 32, "num_warps": 4, "num_stages": 3},
        "linear": {"ROWS": 64, "WORDS": 64, "INNER": 32, "num_warps": 8, "num_stages": 3}}})
MOST_FEW = 64
CHOOSE = {"num_warps": 16}
POSITIONS = {"BLOCK": 1024, "num_warps": 4}
COMMIT = {"BLOCK": 64, "OTHERS": 64, "num_warps": 8}

# Kernels are not specialised on numbers that differ from call to call, so they are not compiled again for them.
NUMBERS = tl.constexpr(5)  # of a block: top, total, extra; top and total of the raw logits, where they differ
# bf16 and fp16 fill the upper 16 and 19 bits of an fp32.
KEY_SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _finite(top):
    return tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN


@triton.jit
def _tempered(z, v, allowed, V, temperature):
    """z / temperature, and -inf for words past the last and those not allowed."""
    x = z
    if temperature is not None:
        x = tl.div_rn(z, temperature)
    possible = v < V
    if allowed is not None:
        possible = possible & (((tl.load(allowed + v // 32, mask=possible, other=0) >> (v % 32)) & 1) != 0)
    return tl.where(possible, x, -float("inf"))


@triton.jit
def _key(z, x, SHIFT: tl.constexpr):
    """int32 in the order of x. A 16-bit z has the order of x, and fewer bits (until temperature is some 2**100)."""
    y = x if SHIFT == 0 else tl.where(x == -float("inf"), x, z)
    bits = tl.where(y == 0, 0.0, y).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _statistics(x, v, V, IDS: tl.constexpr, MEASURE: tl.constexpr):
    """top, its lowest word, total and extra of each row of x [rows, words]. A NaN or +inf makes the total NaN."""
    top = tl.max(x, 1)
    shifted = x - _finite(top)[:, None]
    e = tl.exp(shifted)
    total = tl.sum(e, 1)
    best, extra = tl.zeros_like(top).to(tl.int32), tl.zeros_like(top)
    if IDS or MEASURE == "margin":
        best = tl.min(tl.where(x == top[:, None], v, V), 1)
    if MEASURE == "margin":
        extra = tl.max(tl.where(v == best[:, None], -float("inf"), x), 1)
    if MEASURE == "entropy":
        extra = tl.sum(tl.where(e > 0, e * shifted, 0.0), 1)
    return top, best, total, extra


@triton.jit
def _store(stats, ids, at, mask, top, best, total, extra, raw_top, raw_total, IDS: tl.constexpr, MEASURE: tl.constexpr,
           RAW: tl.constexpr):
    """Write those of the NUMBERS of blocks `at` that `_choose_kernel` reads."""
    tl.store(stats + at * NUMBERS, top, mask=mask)
    tl.store(stats + at * NUMBERS + 1, total, mask=mask)
    if IDS:
        tl.store(ids + at, best, mask=mask)
    if RAW:
        tl.store(stats + at * NUMBERS + 3, raw_top, mask=mask)
        tl.store(stats + at * NUMBERS + 4, raw_total, mask=mask)
    if MEASURE == "margin" or MEASURE == "entropy":
        tl.store(stats + at * NUMBERS + 2, extra, mask=mask)


@triton.jit
def _row_of(rows, n):
    if rows is None:
        return n
    else:
        return tl.load(rows + n)


@triton.jit(do_not_specialize=["allowed_stride", "R", "splits", "share", "blocks"])
def _statistics_kernel(stats, ids, logits, rows, allowed, cuts, lasts, temperature, logits_stride, allowed_stride, R, V,
                       splits, share, blocks, IDS: tl.constexpr, MEASURE: tl.constexpr, RAW: tl.constexpr,
                       SHIFT: tl.constexpr, WORDS: tl.constexpr):
    """Write stats [n, blocks, NUMBERS] and, if IDS, ids [n, blocks]; with cuts, of the words that they keep."""
    n = (tl.program_id(0) // splits).to(tl.int64)  # n * logits_stride passes 2**31
    split = tl.program_id(0) % splits
    row = _row_of(rows, n)
    if (row < 0) | (row >= R):
        return
    logits += row * logits_stride
    if allowed is not None:
        allowed += n * allowed_stride
    for block in range(split * share, tl.minimum((split + 1) * share, blocks)):
        v = block * WORDS + tl.arange(0, WORDS)[None, :]
        z = tl.load(logits + v, mask=v < V, other=-float("inf")).to(tl.float32)
        x = _tempered(z, v, allowed, V, temperature)
        if cuts is not None:
            key, cut = _key(z, x, SHIFT), tl.load(cuts + n)
            x = tl.where((key > cut) | ((key == cut) & (v <= tl.load(lasts + n))), x, -float("inf"))
        top, best, total, extra = _statistics(x, v, V, IDS, "" if RAW else MEASURE)
        raw_top, raw_total = top, total
        if RAW:
            raw_top, _, raw_total, extra = _statistics(z, v, V, False, MEASURE)
        at = n * blocks + block + tl.arange(0, 1)
        _store(stats, ids, at, at >= 0, top, best, total, extra, raw_top, raw_total, IDS, MEASURE, RAW)


@triton.jit
def _read(stats, b, blocks, FIRST: tl.constexpr):
    """Each block's top, the row's, and each block's part of the row's sum of exp(x - top), in float64."""
    tops = tl.load(stats + b * NUMBERS + FIRST, mask=b < blocks, other=-float("inf"))
    totals = tl.load(stats + b * NUMBERS + FIRST + 1, mask=b < blocks, other=0.0)
    top = tl.max(tops, 0)
    return tops, top, totals.to(tl.float64) * tl.exp((tops - _finite(top)).to(tl.float64))


@triton.jit(do_not_specialize=["top_p_bits", "top_k", "allowed_stride", "R", "blocks"])
def _cut_kernel(cuts, lasts, stats, logits, rows, allowed, temperature, top_p_bits, top_k, logits_stride,
                allowed_stride, R, V, blocks, BLOCKS: tl.constexpr, SHIFT: tl.constexpr, WORDS: tl.constexpr):
    """Write the key below which words are dropped, and the last word with that key that is kept."""
    n = tl.program_id(0).to(tl.int64)
    row = _row_of(rows, n)
    if (row < 0) | (row >= R):
        return
    tops, top, totals = _read(stats + n * blocks * NUMBERS, tl.arange(0, BLOCKS), blocks, 0)
    total = tl.sum(totals, 0)
    low = tl.cast(-0x7F800001 >> SHIFT, tl.int64)  # the key of -inf
    if (total > 0) == 0:  # NaN too: all words are kept, so that it shows again
        tl.store(cuts + n, low.to(tl.int32))
        tl.store(lasts + n, V)
        return
    logits += row * logits_stride
    if allowed is not None:
        allowed += n * allowed_stride
    limit = tl.cast(top_p_bits, tl.int64).to(tl.float64, bitcast=True) * total
    high = tl.cast(0x7FFFFFFF >> SHIFT, tl.int64)
    above = tl.cast(0.0, tl.float64)  # mass of the words whose key is more than high
    while low < high:
        first, second, third = low + (high - low) // 4, low + (high - low) // 2, low + (high - low) * 3 // 4
        mass1, mass2, mass3 = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
        count1, count2, count3 = tl.cast(0, tl.int32), tl.cast(0, tl.int32), tl.cast(0, tl.int32)
        for start in range(0, V, WORDS):
            v = start + tl.arange(0, WORDS)
            z = tl.load(logits + v, mask=v < V, other=-float("inf")).to(tl.float32)
            x = _tempered(z, v, allowed, V, temperature)
            key, e = _key(z, x, SHIFT), tl.exp(x - top)
            mass1 += tl.sum(tl.where(key > first.to(tl.int32), e, 0.0), 0)
            mass2 += tl.sum(tl.where(key > second.to(tl.int32), e, 0.0), 0)
            mass3 += tl.sum(tl.where(key > third.to(tl.int32), e, 0.0), 0)
            count1 += tl.sum((key > first.to(tl.int32)).to(tl.int32), 0)
            count2 += tl.sum((key > second.to(tl.int32)).to(tl.int32), 0)
            count3 += tl.sum((key > third.to(tl.int32)).to(tl.int32), 0)
        fits1 = (mass1 <= limit) & (count1 < top_k)
        fits2 = (mass2 <= limit) & (count2 < top_k)
        fits3 = (mass3 <= limit) & (count3 < top_k)
        above = tl.where(fits1, mass1, tl.where(fits2, mass2, tl.where(fits3, mass3, above)))
        high = tl.where(fits1, first, tl.where(fits2, second, tl.where(fits3, third, high)))
        low = tl.where(fits1, low, tl.where(fits2, first + 1, tl.where(fits3, second + 1, third + 1)))
    cut = high.to(tl.int32)
    bits = cut << SHIFT
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) & (-1 << SHIFT)
    value = bits.to(tl.float32, bitcast=True)
    if SHIFT != 0 and temperature is not None:
        value = tl.div_rn(value, temperature)
    # Room for equals of the cut: at least their number if all fit, infinite if they have no weight.
    weight = tl.exp(value - top).to(tl.float64)
    room = tl.floor((limit - above) / tl.maximum(weight, 1e-300)) + 1
    last = tl.cast(V, tl.int32)
    if room < V:
        left = room.to(tl.int32)
        for start in range(0, V, WORDS):
            v = start + tl.arange(0, WORDS)
            z = tl.load(logits + v, mask=v < V, other=-float("inf")).to(tl.float32)
            equal = (_key(z, _tempered(z, v, allowed, V, temperature), SHIFT) == cut).to(tl.int32)
            count = tl.sum(equal, 0)
            if (left > 0) & (left <= count):
                last = tl.max(tl.where((equal != 0) & (tl.cumsum(equal, 0) == left), v, 0), 0)
            left -= count
    tl.store(cuts + n, cut)
    tl.store(lasts + n, last)


@triton.jit(do_not_specialize=["allowed_stride", "R", "blocks"])
def _choose_kernel(tokens, scores, stats, ids, logits, rows, uniform, allowed, cuts, lasts, temperature, logits_stride,
                   allowed_stride, R, V, blocks, CONFIDENCE: tl.constexpr, RAW: tl.constexpr, SHIFT: tl.constexpr,
                   BLOCKS: tl.constexpr, WORDS: tl.constexpr):
    """Choose and score the token of a row, given the statistics of its blocks. At temperature 0 it reads no logits."""
    n = tl.program_id(0).to(tl.int64)
    row = _row_of(rows, n)
    if (row < 0) | (row >= R):
        tl.store(tokens + n, 0)
        tl.store(scores + n, tl.where(row < 0, -float("inf"), float("nan")))
        return
    stats += n * blocks * NUMBERS
    b = tl.arange(0, BLOCKS)
    tops, top, shares = _read(stats, b, blocks, 0)
    total = tl.sum(shares, 0)
    if temperature is None:
        best = tl.load(ids + n * blocks + b, mask=b < blocks, other=V)
        token = tl.min(tl.where((tops == top) & (b < blocks), best, V - 1), 0)
        chosen, raw_chosen = top, top
    else:
        # Sums of floats may differ in the last bit: if none passes, the last word that has a probability is taken.
        sums = tl.cumsum(shares, 0)
        passed = tl.load(uniform + 2 * n) * total
        block = tl.minimum(tl.sum(((sums <= passed) & (b < blocks)).to(tl.int32), 0),
                           tl.max(tl.where(shares > 0, b, 0), 0))
        v = block * WORDS + tl.arange(0, WORDS)
        z = tl.load(logits + row * logits_stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
        if allowed is not None:
            allowed += n * allowed_stride
        x = _tempered(z, v, allowed, V, temperature)
        if cuts is not None:
            key, cut = _key(z, x, SHIFT), tl.load(cuts + n)
            x = tl.where((key > cut) | ((key == cut) & (v <= tl.load(lasts + n))), x, -float("inf"))
        e = tl.exp(x - _finite(top)).to(tl.float64)
        before = tl.sum(tl.where(b == block, sums - shares, 0.0), 0)
        word = tl.sum((before + tl.cumsum(e, 0) <= passed).to(tl.int32), 0)
        word = tl.minimum(word, tl.max(tl.where(e > 0, tl.arange(0, WORDS), 0), 0))
        token = tl.minimum(block * WORDS + word, V - 1)
        chosen = tl.sum(tl.where(v == token, x, 0.0), 0)
        raw_chosen = tl.sum(tl.where(v == token, z, 0.0), 0)
    tl.store(tokens + n, token.to(tl.int64))
    possible = total > 0  # not NaN
    if RAW:
        tops, top, shares = _read(stats, b, blocks, 3)
        total = tl.sum(shares, 0)
        chosen = raw_chosen
    if CONFIDENCE == "prob":
        score = tl.exp((chosen - top).to(tl.float64)) / total
    if CONFIDENCE == "margin":
        extra = tl.load(stats + b * NUMBERS + 2, mask=b < blocks, other=-float("inf"))
        best_block = tl.min(tl.where(tops == top, b, BLOCKS), 0)
        second = tl.max(tl.where(b == best_block, extra, tops), 0)
        score = (1 - tl.exp((second - top).to(tl.float64))) / total
    if CONFIDENCE == "entropy":
        extra = tl.load(stats + b * NUMBERS + 2, mask=b < blocks, other=0.0).to(tl.float64)
        shift = (tops - _finite(top)).to(tl.float64)
        terms = tl.where(shares > 0, extra * tl.exp(shift) + shares * shift, 0.0)
        score = tl.sum(terms, 0) / total - tl.log(total)
    if CONFIDENCE == "random":
        score = tl.load(uniform + 2 * n + 1)
    tl.store(scores + n, tl.where(possible, score.to(tl.float32), float("nan")))


@triton.jit(do_not_specialize=["allowed_stride", "row_tiles", "blocks"])
def _linear_kernel(stats, ids, logits, hidden, weight, bias, rows, listed, count, allowed, temperature, hidden_stride,
                   weight_stride, logits_stride, allowed_stride, V, D, row_tiles, blocks, IDS: tl.constexpr,
                   MEASURE: tl.constexpr, RAW: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
                   INNER: tl.constexpr):
    """Write stats [n, blocks, NUMBERS], ids [n, blocks] and logits [n, V] for the `count` places in `listed`."""
    # Programs that run at the same time share few blocks of words, which stay in the cache.
    tile, block = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    live = tl.load(count).to(tl.int32)
    if tile * ROWS >= live:
        return
    i = tile * ROWS + tl.arange(0, ROWS)
    n = tl.load(listed + tl.minimum(i, live - 1))
    hidden += _row_of(rows, n) * hidden_stride
    first = block * WORDS
    weight += tl.cast(first, tl.int64) * weight_stride  # in 64 bits once: offsets within a tile fit 32
    word = tl.minimum(tl.arange(0, WORDS), V - 1 - first)
    z = tl.zeros((WORDS, ROWS), tl.float32)
    for start in range(0, D, INNER):
        d = start + tl.arange(0, INNER)
        a = tl.load(weight + (word[:, None] * weight_stride + d[None, :]), mask=d[None, :] < D, other=0.0)
        b = tl.load(hidden[None, :] + d[:, None], mask=d[:, None] < D, other=0.0)
        z = tl.dot(a, b, z, input_precision="ieee")
    if bias is not None:
        z += tl.load(bias + first + word).to(tl.float32)[:, None]
    z = tl.trans(z)
    v = first + tl.arange(0, WORDS)[None, :]
    if logits is not None:
        tl.store(logits + (n[:, None] * logits_stride + v), z, mask=(i[:, None] < live) & (v < V))
    if stats is not None:
        if allowed is not None:
            allowed += (n * allowed_stride)[:, None]
        x = _tempered(z, v, allowed, V, temperature)
        top, best, total, extra = _statistics(x, v, V, IDS, "" if RAW else MEASURE)
        raw_top, raw_total = top, total
        if RAW:
            raw_top, _, raw_total, extra = _statistics(tl.where(v < V, z, -float("inf")), v, V, False, MEASURE)
        _store(stats, ids, n * blocks + block, i < live, top, best, total, extra, raw_top, raw_total, IDS, MEASURE,
               RAW)


@triton.jit(do_not_specialize=["n", "R"])
def _list_kernel(listed, count, rows, n, R, BLOCK: tl.constexpr):
    """The places in rows [n] that hold a row, in order, and their number. A program counts those before its own."""
    here, before = tl.program_id(0) * BLOCK, 0
    for start in range(0, here, 8 * BLOCK):
        i = start + tl.arange(0, 8 * BLOCK)
        row = tl.load(rows + i, mask=i < here, other=-1)
        before += tl.sum(((row >= 0) & (row < R)).to(tl.int32), 0)
    i = here + tl.arange(0, BLOCK)
    row = tl.load(rows + i, mask=i < n, other=-1)
    live = ((row >= 0) & (row < R)).to(tl.int32)
    tl.store(listed + before + tl.cumsum(live, 0) - 1, i.to(tl.int64), mask=live != 0)
    if here + BLOCK >= n:
        tl.store(count, before + tl.sum(live, 0))


@triton.jit(do_not_specialize=["mask_token_id", "n"])
def _find_rows_kernel(masked, rows, tokens, mask_token_id, n, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    here, before = tl.program_id(0) * BLOCK, 0
    if PACKED:
        for start in range(0, here, 8 * BLOCK):
            i = start + tl.arange(0, 8 * BLOCK)
            before += tl.sum(((tl.load(tokens + i, mask=i < here, other=0) == mask_token_id) & (i < here)).to(tl.int32),
                             0)
    i = here + tl.arange(0, BLOCK)
    is_mask = (tl.load(tokens + i, mask=i < n, other=0) == mask_token_id) & (i < n)
    place = i
    if PACKED:
        place = before + tl.cumsum(is_mask.to(tl.int32), 0) - 1
    tl.store(masked + i, is_mask, mask=i < n)
    tl.store(rows + i, tl.where(is_mask, place, -1).to(tl.int64), mask=i < n)


@triton.jit
def _score_of(confidence, masked, uniform, at, is_position, temperature_bits):
    """The score that ranks positions, their confidence, and whether they can be committed."""
    c = tl.load(confidence + at, mask=is_position, other=0.0)
    possible = (tl.load(masked + at, mask=is_position, other=0) != 0) & (c == c)
    score = c
    if temperature_bits is not None:
        noise = -tl.log(-tl.log(tl.load(uniform + 2 * at + 1, mask=is_position, other=0.5)))
        score = c.to(tl.float64) / tl.cast(temperature_bits, tl.int64).to(tl.float64, bitcast=True) + noise
    return score, c, possible


@triton.jit(do_not_specialize=["temperature_bits", "L"])
def _commit_kernel(filled, committed, tokens, masked, token, confidence, k, uniform, temperature_bits, threshold, L,
                   BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * L + i
    score, c, possible = _score_of(confidence, masked, uniform, at, i < L, temperature_bits)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, L, OTHERS):
        j = start + tl.arange(0, OTHERS)
        other, _, other_possible = _score_of(confidence, masked, uniform, row * L + j, j < L, temperature_bits)
        ahead = (other[None, :] > score[:, None]) | ((other[None, :] == score[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum((ahead & (other_possible & (j < L))[None, :]).to(tl.int32), 1)
    chosen = rank < tl.load(k + row)
    if threshold is not None:
        chosen = chosen | (c >= threshold)
    chosen = chosen & possible
    tl.store(committed + at, chosen, mask=i < L)
    result = tl.where(chosen, tl.load(token + at, mask=i < L, other=0), tl.load(tokens + at, mask=i < L, other=0))
    tl.store(filled + at, result, mask=i < L)


@triton.jit(do_not_specialize=["low", "high", "step", "L", "n"])
def _philox_kernel(numbers, sequence, position, step_pointer, low, high, step, sequence_stride0, sequence_stride1,
                   position_stride0, position_stride1, L, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_number = i < n
    row, column = i // L, i % L
    s = tl.load(sequence + row * sequence_stride0 + column * sequence_stride1, mask=is_number, other=0)
    p = tl.load(position + row * position_stride0 + column * position_stride1, mask=is_number, other=0)
    if step_pointer is not None:
        step = tl.load(step_pointer)
    key = tl.cast(high, tl.int32).to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    key |= tl.cast(low, tl.int32).to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = tl.zeros_like(p).to(tl.uint32)
    a, b, c, d = tl.philox(key, p.to(tl.uint32), zero + tl.cast(step, tl.uint32), s.to(tl.uint32), zero)
    first = (a.to(tl.int64) << 20) | (b >> 12).to(tl.int64)
    second = (c.to(tl.int64) << 20) | (d >> 12).to(tl.int64)
    tl.store(numbers + 2 * i, (first.to(tl.float64) + 0.5) * 2.0**-52, mask=is_number)
    tl.store(numbers + 2 * i + 1, (second.to(tl.float64) + 0.5) * 2.0**-52, mask=is_number)


def score_rows(logits: Tensor, rows: Rows, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Token int64 [n] and confidence fp32 [n], as `reference.score_rows`.

    An index of -1 reads nothing and gives the confidence -inf and the token 0; one past the last row gives NaN. The row
    stride of the bits may be 0.
    """
    logits, V = _readable(logits), logits.shape[1]
    n = len(logits) if rows.index is None else len(rows.index)
    words = BLOCK["WORDS"]
    if V <= words // 2:
        words = max(triton.next_power_of_2(V), 128)
    blocks = -(-V // words)
    share = max(1, min(SHARE, n * blocks // PROGRAMS))
    splits = -(-blocks // share)
    plan = _Plan(n, V, blocks, logits, rows, sampling)
    if n:
        chosen = {**BLOCK, "WORDS": words, "SHIFT": KEY_SHIFTS[logits.dtype]}

        def measure(cuts, lasts, confidence, raw):
            _statistics_kernel[(n * splits,)](
                plan.stats, plan.ids, logits, plan.index, plan.allowed, cuts, lasts, plan.temperature, logits.stride(0),
                plan.allowed_stride, len(logits), V, splits, share, blocks, IDS=plan.ids is not None,
                MEASURE=confidence, RAW=raw, **chosen)

        with torch.cuda.device_of(logits):
            cuts = lasts = None
            if plan.filtered:
                measure(None, None, plan.measure if plan.raw else "", plan.raw)
                cuts, lasts = (torch.empty(n, dtype=torch.int32, device=logits.device) for _ in range(2))
                _cut_kernel[(n,)](
                    cuts, lasts, plan.stats, logits, plan.index, plan.allowed, plan.temperature, _bits(plan.top_p),
                    plan.top_k, logits.stride(0), plan.allowed_stride, len(logits), V, blocks,
                    BLOCKS=triton.next_power_of_2(blocks), SHIFT=chosen["SHIFT"],
                    **{**CUT, "WORDS": min(words, CUT["WORDS"])})
                measure(cuts, lasts, "" if plan.raw else plan.measure, False)
            else:
                measure(None, None, plan.measure, plan.raw)
            plan.choose(logits, cuts, lasts, words, chosen["SHIFT"])
    return plan.tokens, plan.scores


def linear_score_rows(score_rows: Callable, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows,
                      sampling: Sampling) -> tuple[Tensor, Tensor]:
    """See `products.linear_score_rows`; rows have an index, hidden and weight one dtype and contiguous rows.

    Each weight is read once per tile of rows. Three launches (a list of the rows, statistics, choice) and, with
    filters, those of `score_rows`.
    """
    (R, D), V, n = hidden.shape, len(weight), len(rows.index)
    tiles = TILES[hidden.dtype.itemsize]["linear"]
    if n <= MOST_FEW:
        tiles = {"ROWS": max(16, triton.next_power_of_2(n)), **TILES[hidden.dtype.itemsize]["few"]}
    blocks, row_tiles = -(-V // tiles["WORDS"]), -(-n // tiles["ROWS"])
    filtered, logits, of_choice = sampling.is_filtered(V), None, rows
    if filtered or sampling.temperature > 0:
        logits = empty_logits(hidden, n, V, torch.float32)
        of_choice = rows._replace(index=places(rows.index, R))
    plan = _Plan(n, V, 0 if filtered else blocks, hidden, of_choice, sampling)
    if n:
        listed, count = _list(rows.index, R)
        with torch.cuda.device_of(hidden):
            _linear_kernel[(row_tiles * blocks,)](
                None if filtered else plan.stats, plan.ids, logits, hidden, weight, bias, rows.index, listed, count,
                plan.allowed, plan.temperature, hidden.stride(0), weight.stride(0),
                0 if logits is None else logits.stride(0), plan.allowed_stride, V, D, row_tiles, blocks,
                IDS=plan.ids is not None, MEASURE=plan.measure, RAW=plan.raw, **tiles)
            if filtered:
                return score_rows(logits, of_choice, sampling)
            plan.choose(hidden if logits is None else logits, None, None, tiles["WORDS"], 0)
    return plan.tokens, plan.scores


class _Plan:
    """The settings as kernels take them, the kernels' intermediate results, and the outputs."""

    def __init__(self, n: int, V: int, blocks: int, inputs: Tensor, rows: Rows, sampling: Sampling):
        device = inputs.device
        self.n, self.V, self.blocks, self.confidence = n, V, blocks, sampling.confidence
        self.measure, self.temperature, self.filtered, self.top_k, self.top_p, self.raw = sampling.effective(
            V, rows.allowed is not None)
        self.index, self.uniform, self.allowed, _ = rows.readable()
        self.allowed_stride = 0 if self.allowed is None else self.allowed.stride(0)
        self.stats = torch.empty(n, blocks, NUMBERS.value, dtype=torch.float32, device=device)
        self.ids = None if sampling.temperature > 0 else torch.empty(n, blocks, dtype=torch.int32, device=device)
        self.tokens, self.scores = _outputs(n, device)

    def choose(self, logits, cuts, lasts, words, shift):
        _choose_kernel[(self.n,)](
            self.tokens, self.scores, self.stats, self.ids, logits, self.index, self.uniform, self.allowed, cuts, lasts,
            self.temperature, logits.stride(0), self.allowed_stride, len(logits), self.V, self.blocks,
            CONFIDENCE=self.confidence, RAW=self.raw, SHIFT=shift, BLOCKS=triton.next_power_of_2(self.blocks),
            WORDS=words, **CHOOSE)


def _outputs(n, device):
    return torch.empty(n, dtype=torch.int64, device=device), torch.empty(n, dtype=torch.float32, device=device)


def _list(rows, R):
    listed, count = torch.empty_like(rows), torch.empty((), dtype=torch.int64, device=rows.device)
    with torch.cuda.device_of(rows):
        _list_kernel[(-(-len(rows) // POSITIONS["BLOCK"]),)](listed, count, rows, len(rows), R, **POSITIONS)
    return listed, count


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bits(number: float) -> int:
    """A float64 as an int64: Triton would pass a float as fp32."""
    return struct.unpack("q", struct.pack("d", number))[0]


def find_rows(tokens: Tensor, mask_token_id: int, packed: bool) -> tuple[Tensor, Tensor]:
    """The masked ones of tokens [B, L], bool, and the row of logits of each, [B * L] int64, -1 where not masked.

    The row is the flattened position or, packed, the number of masked positions before it. One launch.
    """
    tokens = tokens.contiguous()
    masked = torch.empty_like(tokens, dtype=torch.bool)
    rows = torch.empty(tokens.numel(), dtype=torch.int64, device=tokens.device)
    if tokens.numel():
        with torch.cuda.device_of(tokens):
            _find_rows_kernel[(-(-tokens.numel() // POSITIONS["BLOCK"]),)](
                masked, rows, tokens, mask_token_id, tokens.numel(), PACKED=packed, **POSITIONS)
    return masked, rows


def commit(tokens: Tensor, masked: Tensor, token: Tensor, confidence: Tensor, selection: Selection,
           uniform: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `selection.commit`, in one launch: a position's rank is the count of positions ahead of it."""
    tokens, masked, token, confidence, k = (x.contiguous() for x in (tokens, masked, token, confidence, selection.k))
    out, committed = torch.empty_like(tokens), torch.empty_like(masked)
    noisy = selection.selection_temperature > 0
    threshold = None if selection.threshold is None else float(selection.threshold)
    if tokens.numel():
        B, L = tokens.shape
        with torch.cuda.device_of(tokens):
            _commit_kernel[(B, -(-L // COMMIT["BLOCK"]))](
                out, committed, tokens, masked, token, confidence, k, uniform.contiguous() if noisy else None,
                _bits(selection.selection_temperature) if noisy else None, threshold, L, **COMMIT)
    return out, confidence, committed


def philox_uniform(seed: int, sequence: Tensor, step: int | Tensor, position: Tensor) -> Tensor:
    """As `random.philox_uniform`, in one launch; step may be an int64 tensor of one element too."""
    sequence, position = torch.broadcast_tensors(sequence, position)
    out = torch.empty(*position.shape, 2, dtype=torch.float64, device=position.device)
    if sequence.ndim != 2:
        sequence, position = sequence.reshape(1, -1), position.reshape(1, -1)
    if n := position.numel():
        pointer, number = (step, 0) if isinstance(step, Tensor) else (None, _signed(step))
        with torch.cuda.device_of(position):
            _philox_kernel[(-(-n // POSITIONS["BLOCK"]),)](
                out, sequence, position, pointer, _signed(seed), _signed(seed >> 32), number, *sequence.stride(),
                *position.stride(), position.shape[1], n, **POSITIONS)
    return out


def _signed(number: int) -> int:
    """The low 32 bits as an int32, so that every number has one type."""
    return (number + 2**31) % 2**32 - 2**31
