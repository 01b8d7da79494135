"""Attention in Triton for every mask, forward and backward: FlashAttention-2 (arXiv:2307.08691) without a mask tensor.

With c = scale * log2(e), over the keys j that query i sees:
    p[i, j] = exp2(c q[i] . k[j] - lse[i]),    out[i] = sum_j p[i, j] v[j],    lse[i] = log2(sum_j exp2(c q[i] . k[j]))
    delta[i] = dout[i] . out[i],    ds[i, j] = p[i, j] (dout[i] . v[j] - delta[i])
    dq[i] = scale sum_j ds[i, j] k[j],    dk[j] = scale sum_i ds[i, j] q[i],    dv[j] = sum_i p[i, j] dout[i]
B batch, L positions, T packed positions, Hq query and Hkv key heads, E head size, n block length.

A query at place p of a document of `keys` positions sees one range of keys, and a noisy one a second range:
    MASK "all": [0, keys)    "blocks": [0, (p // n + 1) n)
    MASK "diffusion": clean p sees clean [0, (p // n + 1) n); noisy p sees clean [0, p // n n) and its noisy block.
    MASK "causal": the same up to p alone, clean [0, p] or noisy [p // n n, p].
Arithmetic gives the tiles of keys that a tile of queries sees, and those that need no test; other tiles are never
visited. A key mask is scanned for its first and last key: where it has no holes, only tiles at the ends are tested.
One program sums dk and dv over the queries and the heads of a group, another sums dq. Nothing is added atomically:
the same inputs give the same bits. lse is +inf where a query sees no key, so its p are zeros.

Packed documents are located on the device. Document s takes the tiles from cu_seqlens[s] // SIZE + s on, which is
enough for any start and length; of T // SIZE + S + 1 tiles, the unused ones return at once. No kernel is specialised
on a length, and strides are in units of 8 elements, so loads are wide for every length without a compilation for each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuned
from .reference import Mask

FEW = 128  # up to this many queries, the heads of a group share a tile, and programs share the keys
PROGRAMS = 264  # at most: two for each multiprocessor of an H200. Not measured on a GPU.


def _tiles_of(*tiles: tuple[int, int, int, int]) -> dict[str, dict[str, int]]:
    names = "forward", "few", "query_gradient", "key_gradient"
    return {name: dict(zip(("ROWS", "COLUMNS", "num_warps", "num_stages"), tile, strict=True))
            for name, tile in zip(names, tiles, strict=True)}


# By bytes per number and head size. Not measured on a GPU: tiles that spill no registers and fit the shared memory of
# sm_80, sm_90 and sm_100. wgmma gives each group of four warps 64 rows of its own (COLUMNS in "key_gradient"): heads of
# 256 leave no registers for that, so two groups compute the same, or mma runs instead. "few" is for up to FEW queries.
TILES = {
    (2, 32): _tiles_of((128, 128, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3), (64, 128, 8, 2)),
    (2, 64): _tiles_of((128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3), (32, 128, 8, 2)),
    (2, 128): _tiles_of((128, 64, 8, 3), (128, 32, 8, 3), (128, 64, 8, 2), (16, 128, 8, 2)),
    (2, 256): _tiles_of((64, 32, 8, 3), (64, 16, 8, 3), (64, 32, 8, 3), (32, 32, 8, 2)),
    (4, 32): _tiles_of((32, 32, 4, 2), (16, 32, 4, 2), (64, 32, 4, 2), (16, 32, 4, 2)),
    (4, 64): _tiles_of((32, 32, 8, 2), (32, 16, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    (4, 128): _tiles_of((16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
    (4, 256): _tiles_of((16, 32, 8, 2), (16, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 1)),
}
# sm_80, which stands for all before sm_90, keeps both operands of a product in registers, so others would spill; "few"
# still spills 8 to 24 bytes there with some masks. On sm_90 heads of 64 leave room for three programs on a
# multiprocessor, and one waits while the others multiply. In "key_gradient" of heads of 128, 32 queries at a time would
# spill 8 to 72 bytes, and 64 up to 360.
BY_ARCHITECTURE = {
    "sm_80": {(2, 128): _tiles_of((128, 32, 8, 3), (64, 16, 4, 4), (64, 32, 4, 3), (32, 32, 4, 2)),
              (4, 128): _tiles_of((16, 16, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
              (4, 256): _tiles_of((16, 32, 8, 2), (16, 16, 8, 1), (32, 16, 8, 2), (16, 16, 8, 1))},
    "sm_90": {(2, 64): _tiles_of((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (32, 128, 8, 2))},
}
TILES = tuned.apply("attention", TILES)
BY_ARCHITECTURE |= {here: tuned.apply("attention", BY_ARCHITECTURE[here])
                    for here in {tuned.architecture()} & {*BY_ARCHITECTURE}}
COMBINE = {"ROWS": 8, "num_warps": 4}


@triton.jit
def _locate(slot, cu_seqlens, documents, T, L, SIZE: tl.constexpr):
    """For tile `slot`: row of the batch, start of the document in it, its length, and the tile's first place in it.

    Positions beyond the last of `documents`, up to `T`, form one more document.
    """
    if cu_seqlens is None:
        tiles = tl.cdiv(L, SIZE)
        batch, start, length, tile = slot // tiles, slot * 0, L, slot % tiles
    else:
        low, high = slot * 0, slot * 0 + documents
        while low < high:
            middle = (low + high + 1) // 2
            begun = tl.load(cu_seqlens + middle) // SIZE + middle <= slot
            low, high = tl.where(begun, middle, low), tl.where(begun, high, middle - 1)
        begin = tl.load(cu_seqlens + low)
        end = tl.load(cu_seqlens + low + 1, mask=low < documents, other=T)
        batch, start, length, tile = begin // L, begin % L, end - begin, slot - begin // SIZE - low
    return batch, start, length, tile * SIZE


@triton.jit
def _key_range(key_mask, keys, WIDTH: tl.constexpr):
    """The first allowed key, one past the last, and whether all between them are allowed; (keys, 0, _) if none is."""
    low, high, allowed = keys, keys * 0, keys * 0
    for start in range(0, keys, WIDTH):
        c = start + tl.arange(0, WIDTH)
        bit = tl.load(key_mask + c, mask=c < keys, other=0) != 0
        low = tl.minimum(low, tl.min(tl.where(bit, c, keys), 0))
        high = tl.maximum(high, tl.max(tl.where(bit, c + 1, 0), 0))
        allowed += tl.sum(bit.to(tl.int32), 0)
    return low, high, allowed == high - low


@triton.jit
def _seen(p, n, keys, copy, MASK: tl.constexpr):
    """One past the last key that place p sees; in block diffusion, of the clean copy."""
    if MASK == "all":
        end = p * 0 + keys
    elif MASK == "blocks":
        end = tl.minimum((p // n + 1) * n, keys)
    elif MASK == "causal":
        end = tl.minimum(tl.where(copy == 0, p // n * n, p + 1), keys)
    else:
        end = tl.minimum((p // n + copy) * n, keys)
    return end


@triton.jit
def _tiles_seen(p_first, p_last, low, high, whole, n, keys, copy, MASK: tl.constexpr, COLUMNS: tl.constexpr):
    """Places p_first to p_last see this many tiles of keys from `low`, and all see this many of them whole.

    Then the first key of the noisy blocks that they see, the tiles in these, and those that all see whole.
    """
    tiles = tl.cdiv(tl.maximum(tl.minimum(_seen(p_last, n, keys, copy, MASK), high) - low, 0), COLUMNS)
    full = tl.maximum(tl.minimum(_seen(p_first, n, keys, copy, MASK), high) - low, 0) // COLUMNS
    full = tl.where(whole, full, 0)
    own, own_tiles, own_full = full * 0, full * 0, full * 0
    if MASK == "diffusion" or MASK == "causal":
        own = p_first // n * n
        if MASK == "causal":
            own_end, sure_end = p_last + 1, p_first + 1
        else:
            own_end = tl.minimum((p_last // n + 1) * n, keys)
            sure_end = own_end
        own_tiles = tl.where(copy == 0, tl.cdiv(own_end - own, COLUMNS), 0)
        own_full = tl.where((copy == 0) & (p_first // n == p_last // n), (sure_end - own) // COLUMNS, 0)
    return tiles, full, own, own_tiles, own_full


@triton.jit
def _load(pointers, inside, e, E: tl.constexpr, TEST: tl.constexpr):
    """[rows, padded head size]: zeros beyond E and, with TEST, where a row is not `inside`."""
    if TEST:
        mask = inside[:, None]
        if E < e.shape[0]:
            mask = mask & (e[None, :] < E)
        x = tl.load(pointers, mask=mask, other=0.0)
    elif E < e.shape[0]:
        x = tl.load(pointers, mask=e[None, :] < E, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _keys_and_visible(t, first, tiles, own, p, seen, k, v, key_mask, k_row, v_row, n, keys, L, E: tl.constexpr,
                      EP: tl.constexpr, COLUMNS: tl.constexpr, MASK: tl.constexpr, TEST: tl.constexpr):
    """Keys and values [COLUMNS, EP] of tile t and, meaningful with TEST, the visible ones [rows, COLUMNS].

    Tiles count from key `first`; after `tiles` of them, from key `own` of the noisy copy.
    """
    at = first + t * COLUMNS
    row = at
    if MASK == "diffusion" or MASK == "causal":
        noisy = t >= tiles
        at = tl.where(noisy, own + (t - tiles) * COLUMNS, at)
        row = tl.where(noisy, at, at + L)
    i, e = tl.arange(0, COLUMNS), tl.arange(0, EP)
    c = at + i
    inside = c < keys
    visible = inside[None, :]
    if TEST:
        if key_mask is not None:
            inside = tl.load(key_mask + c, mask=inside, other=0) != 0
        if MASK == "diffusion" or MASK == "causal":
            block = p // n * n
            if MASK == "causal":
                own_end = p + 1
            else:
                own_end = block + n
            low, high = tl.where(noisy, block, 0), tl.where(noisy, tl.minimum(own_end, keys), seen)
            visible = (c[None, :] >= low[:, None]) & (c[None, :] < high[:, None])
        else:
            visible = (c[None, :] < seen[:, None]) & inside[None, :]
    k_tile = _load(k + tl.cast(row, tl.int64) * k_row * 8 + (i[:, None] * (k_row * 8) + e[None, :]), inside, e, E, TEST)
    v_tile = _load(v + tl.cast(row, tl.int64) * v_row * 8 + (i[:, None] * (v_row * 8) + e[None, :]), inside, e, E, TEST)
    return k_tile, v_tile, visible


@triton.jit
def _forward_tiles(acc, top, total, q, count, first, tiles, own, p, seen, k, v, key_mask, k_row, v_row, n, keys, L,
                   scale, E: tl.constexpr, EP: tl.constexpr, COLUMNS: tl.constexpr, MASK: tl.constexpr,
                   TEST: tl.constexpr):
    for t in range(0, count):
        k_tile, v_tile, visible = _keys_and_visible(t, first, tiles, own, p, seen, k, v, key_mask, k_row, v_row, n,
                                                    keys, L, E, EP, COLUMNS, MASK, TEST)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if TEST:
            s = tl.where(visible, s * scale, -float("inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            s = tl.exp2(s - new_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            s = tl.exp2(s * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(s, 1)
        acc = tl.dot(s.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


# Arguments that differ from call to call. A `scale` of 1 would otherwise compile another kernel.
VARYING = ["scale", "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head", "n",
           "documents", "T", "Lq", "Lk", "heads", "splits"]


@triton.jit(do_not_specialize=VARYING)
def _forward_kernel(out, lse, cache_rows, query, key, value, key_mask, cu_seqlens, scale, q_batch, q_row, q_head,
                    k_batch, k_row, k_head, v_batch, v_row, v_head, n, documents, T, Lq, Lk, heads, MASK: tl.constexpr,
                    GROUP: tl.constexpr, PACKED: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
    """Write out [splits, B, positions, Hq, E] and lse [splits, B, Hq, positions].

    Row b of the batch reads the keys and values of row cache_rows[b], or of row b if that is None. Rows of a tile are
    positions of one head or, PACKED, the GROUP heads of one position and then of the next.
    """
    COPIES: tl.constexpr = 2 if MASK == "diffusion" or MASK == "causal" else 1
    SHARED: tl.constexpr = GROUP if PACKED else 1  # heads in a tile
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles of a document first: they may see most keys
    head, slot = program % (heads // SHARED), program // (heads // SHARED)
    copy, slot = slot % COPIES, slot // COPIES
    batch, start, length, first = _locate(slot, cu_seqlens, documents, T, Lq * SHARED, ROWS)
    if first >= length:
        return
    keys = Lk
    if cu_seqlens is not None:
        keys = length
    batch, before = batch.to(tl.int64), keys - length // SHARED
    r, e = first + tl.arange(0, ROWS), tl.arange(0, EP)
    inside = r < length
    p = before + r // SHARED
    i, h = r // SHARED - first // SHARED, r % SHARED  # positions and heads within the tile fit 32 bits
    low, high, whole = keys * 0, keys, keys >= 0
    if key_mask is not None:
        key_mask += batch * Lk
        low, high, whole = _key_range(key_mask, keys, 1024)
    tiles, full, own, own_tiles, own_full = _tiles_seen(
        before + first // SHARED, before + (tl.minimum(first + ROWS, length) - 1) // SHARED, low, high, whole, n, keys,
        copy, MASK, COLUMNS)
    share = tl.cdiv(tiles, tl.num_programs(1))  # this program's tiles of keys
    begin = tl.minimum(tl.program_id(1) * share, tiles)
    end = tl.minimum(begin + share, tiles)
    tested = tl.minimum(tl.maximum(full, begin), end)

    position, row_head = (start + first // SHARED + copy * Lq).to(tl.int64), (head * SHARED).to(tl.int64)
    q = query + batch * q_batch * 8 + position * q_row * 8 + row_head * q_head * 8
    q_tile = _load(q + ((i * q_row + h * q_head) * 8)[:, None] + e[None, :], inside, e, E, True)
    kv_head = row_head // GROUP
    cached = batch
    if cache_rows is not None:
        cached = tl.load(cache_rows + batch)
    k = key + cached * k_batch * 8 + start.to(tl.int64) * k_row * 8 + kv_head * k_head * 8
    v = value + cached * v_batch * 8 + start.to(tl.int64) * v_row * 8 + kv_head * v_head * 8
    seen = _seen(p, n, keys, copy, MASK)
    acc = tl.zeros((ROWS, EP), tl.float32)
    top = tl.full((ROWS,), -3e38, tl.float32)  # finite: a tile that a row does not see would give nan
    total = tl.zeros((ROWS,), tl.float32)
    c = scale * 1.4426950408889634
    acc, top, total = _forward_tiles(
        acc, top, total, q_tile, tested - begin + own_full, low + begin * COLUMNS, tested - begin, own, p, seen, k, v,
        key_mask, k_row, v_row, n, keys, Lk, c, E, EP, COLUMNS, MASK, False)
    acc, top, total = _forward_tiles(
        acc, top, total, q_tile, end - tested + own_tiles - own_full, low + tested * COLUMNS, end - tested,
        own + own_full * COLUMNS, p, seen, k, v, key_mask, k_row, v_row, n, keys, Lk, c, E, EP, COLUMNS, MASK, True)

    batch += tl.program_id(1).to(tl.int64) * (T // Lq)  # among the parts
    empty = total == 0
    acc /= tl.where(empty, 1.0, total)[:, None]
    out += ((batch * COPIES * Lq + position) * heads + row_head) * E
    tl.store(out + (i * heads + h)[:, None] * E + e[None, :], acc.to(out.dtype.element_ty),
             mask=inside[:, None] & (e[None, :] < E))
    lse += (batch * heads + row_head) * COPIES * Lq + position
    tl.store(lse + h * COPIES * Lq + i, tl.where(empty, float("inf"), top + tl.log2(total)), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _combine_kernel(out, lse, parts, part_lse, splits, T, Lq, heads, E: tl.constexpr, EP: tl.constexpr,
                    ROWS: tl.constexpr):
    """out [B, Lq, Hq, E] and lse [B, Hq, Lq] of parts [splits, B, Lq, Hq, E] and part_lse [splits, B, Hq, Lq]."""
    size = tl.cast(T, tl.int64) * heads
    r, e = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, EP)
    inside = r < size
    i, head, batch = r % Lq, r // Lq % heads, r // Lq // heads
    at = ((batch * Lq + i) * heads + head)[:, None] * E + e[None, :]
    mask = inside[:, None] & (e[None, :] < E)
    acc = tl.zeros((ROWS, EP), tl.float32)
    top = tl.full((ROWS,), -3e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(0, splits):
        share = tl.cast(split, tl.int64) * size
        x = tl.load(part_lse + share + r, mask=inside, other=float("inf"))
        x = tl.where(x == float("inf"), -float("inf"), x)
        new_top = tl.maximum(top, x)
        shrink, weight = tl.exp2(top - new_top), tl.exp2(x - new_top)
        acc = acc * shrink[:, None] + weight[:, None] * tl.load(parts + share * E + at, mask=mask, other=0.0)
        total = total * shrink + weight
        top = new_top
    empty = total == 0
    acc /= tl.where(empty, 1.0, total)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + r, tl.where(empty, float("inf"), top + tl.log2(total)), mask=inside)


@triton.jit
def _query_gradient_tiles(acc, q, dout, lse, delta, count, first, tiles, own, p, seen, k, v, key_mask, k_row, v_row, n,
                          keys, L, scale, E: tl.constexpr, EP: tl.constexpr, COLUMNS: tl.constexpr,
                          MASK: tl.constexpr, TEST: tl.constexpr):
    for t in range(0, count):
        k_tile, v_tile, visible = _keys_and_visible(t, first, tiles, own, p, seen, k, v, key_mask, k_row, v_row, n,
                                                    keys, L, E, EP, COLUMNS, MASK, TEST)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        s = tl.exp2(s * scale - lse[:, None])
        if TEST:
            s = tl.where(visible, s, 0.0)
        ds = s * (tl.dot(dout, tl.trans(v_tile), input_precision="ieee") - delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=VARYING)
def _query_gradient_kernel(dq, delta, dout, out, lse, query, key, value, key_mask, cu_seqlens, scale, q_batch, q_row,
                           q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, n, documents, T, Lq, Lk, heads,
                           MASK: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
                           ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write dq [B, positions, Hq, E] and delta [B, Hq, positions]; dout and out are contiguous."""
    COPIES: tl.constexpr = 2 if MASK == "diffusion" or MASK == "causal" else 1
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head, slot = program % heads, program // heads
    copy, slot = slot % COPIES, slot // COPIES
    batch, start, length, first = _locate(slot, cu_seqlens, documents, T, Lq, ROWS)
    if first >= length:
        return
    keys = Lk
    if cu_seqlens is not None:
        keys = length
    batch, before = batch.to(tl.int64), keys - length
    i, e = tl.arange(0, ROWS), tl.arange(0, EP)
    inside = first + i < length
    p = before + first + i
    low, high, whole = keys * 0, keys, keys >= 0
    if key_mask is not None:
        key_mask += batch * Lk
        low, high, whole = _key_range(key_mask, keys, 1024)
    tiles, full, own, own_tiles, own_full = _tiles_seen(
        before + first, before + tl.minimum(first + ROWS, length) - 1, low, high, whole, n, keys, copy, MASK, COLUMNS)

    position, kv_head = (start + first + copy * Lq).to(tl.int64), (head // GROUP).to(tl.int64)
    tile = ((batch * COPIES * Lq + position) * heads + head) * E
    at, at_row = i[:, None] * (heads * E) + e[None, :], (batch * heads + head) * COPIES * Lq + position
    do = _load(dout + tile + at, inside, e, E, True)
    d = tl.sum(do.to(tl.float32) * _load(out + tile + at, inside, e, E, True).to(tl.float32), 1)
    tl.store(delta + at_row + i, d, mask=inside)
    row_lse = tl.load(lse + at_row + i, mask=inside, other=float("inf"))
    q = query + batch * q_batch * 8 + head.to(tl.int64) * q_head * 8 + position * q_row * 8
    q_tile = _load(q + (i[:, None] * (q_row * 8) + e[None, :]), inside, e, E, True)
    k = key + batch * k_batch * 8 + start.to(tl.int64) * k_row * 8 + kv_head * k_head * 8
    v = value + batch * v_batch * 8 + start.to(tl.int64) * v_row * 8 + kv_head * v_head * 8
    seen = _seen(p, n, keys, copy, MASK)
    c = scale * 1.4426950408889634
    acc = tl.zeros((ROWS, EP), tl.float32)
    acc = _query_gradient_tiles(acc, q_tile, do, row_lse, d, full + own_full, low, full, own, p, seen, k, v, key_mask,
                                k_row, v_row, n, keys, Lk, c, E, EP, COLUMNS, MASK, False)
    acc = _query_gradient_tiles(acc, q_tile, do, row_lse, d, tiles - full + own_tiles - own_full, low + full * COLUMNS,
                                tiles - full, own + own_full * COLUMNS, p, seen, k, v, key_mask, k_row, v_row, n, keys,
                                Lk, c, E, EP, COLUMNS, MASK, True)
    tl.store(dq + tile + at, (acc * scale).to(dq.dtype.element_ty), mask=inside[:, None] & (e[None, :] < E))


@triton.jit
def _key_gradient_tiles(dk, dv, k, v, since, until, count, first, tiles, other, end, copy, q, dout, lse, delta, q_row,
                        q_head, out_row, positions, n, L, scale, MASK: tl.constexpr, GROUP: tl.constexpr,
                        E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, TEST: tl.constexpr):
    """Add the contributions of `count` tiles of queries, each of GROUP heads, to dk and dv [keys, EP].

    The `tiles` from query `first` on belong to the copy of the keys, later ones, from `other` on, to the noisy copy.
    Queries from since to until, both [keys], see a key; of the noisy copy clean keys are seen from the next block on.
    """
    r, e = tl.arange(0, ROWS), tl.arange(0, EP)
    for t in range(0, count * GROUP):
        tile, g = t // GROUP, t % GROUP
        at, query_copy = first + tile * ROWS, copy
        if MASK == "diffusion" or MASK == "causal":
            query_copy = tl.where(tile < tiles, copy, 0)
            at = tl.where(tile < tiles, at, other + (tile - tiles) * ROWS)
        i = at + r
        inside = i < end
        row = tl.cast(at + query_copy * L, tl.int64)
        q_tile = _load(q + (row * q_row * 8 + g * q_head * 8) + (r[:, None] * (q_row * 8) + e[None, :]), inside, e, E,
                       True)
        do = _load(dout + (row * out_row + g * E) + (r[:, None] * out_row + e[None, :]), inside, e, E, True)
        at_row = row + tl.cast(g, tl.int64) * positions
        row_lse = tl.load(lse + at_row + r, mask=inside, other=float("inf"))
        d = tl.load(delta + at_row + r, mask=inside, other=0.0)
        p = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        p = tl.exp2(p * scale - row_lse[None, :])
        if TEST:
            visible = i[None, :] >= since[:, None]
            if MASK == "diffusion":
                place = i - tl.where(tile < tiles, 0, n)
                visible = (place[None, :] >= since[:, None]) & (place[None, :] < until[:, None])
            elif MASK == "causal":
                begin = tl.where(tile < tiles, since, since // n * n + n)
                visible = (i[None, :] >= begin[:, None]) & (i[None, :] < until[:, None])
            p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - d[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def _key_gradient_kernel(dk, dv, dout, lse, delta, query, key, value, key_mask, cu_seqlens, scale, q_batch, q_row,
                         q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, n, documents, T, Lq, Lk, heads,
                         MASK: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write dk and dv [B, positions, Hkv, E].

    Each key has its own rows in every product, so keys that are masked or beyond the end need no test until the store.
    """
    COPIES: tl.constexpr = 2 if MASK == "diffusion" or MASK == "causal" else 1
    kv_heads = heads // GROUP
    program = tl.program_id(0)  # the first tiles of a document first: most queries may see them
    head, slot = program % kv_heads, program // kv_heads
    copy, slot = slot % COPIES, slot // COPIES
    batch, start, keys, first = _locate(slot, cu_seqlens, documents, T, Lk, COLUMNS)
    if first >= keys:
        return
    queries = Lq
    if cu_seqlens is not None:
        queries = keys
    batch, before = batch.to(tl.int64), keys - queries
    c, e = first + tl.arange(0, COLUMNS), tl.arange(0, EP)
    inside = c < keys
    if key_mask is not None:
        inside = tl.load(key_mask + batch * Lk + c, mask=inside, other=0) != 0
        queries = tl.where(tl.max(inside.to(tl.int32), 0) > 0, queries, 0)

    # Queries from `begin` on may see some of these keys, and from `sure` to `end` all of them.
    begin, sure, end = queries * 0, queries * 0, queries
    other, other_tested, other_full = queries * 0, queries * 0, queries * 0
    if MASK != "all":
        last = tl.minimum(first + COLUMNS, keys) - 1
        first_block, last_block = first // n * n, last // n * n
        begin, sure = first_block, last_block
        if MASK == "causal":
            begin, sure = first, last
        if MASK == "diffusion" or MASK == "causal":
            if copy == 0:
                end = tl.minimum(last_block + n, keys)
                sure = tl.where(first_block == last_block, sure, end)
            else:
                other = tl.minimum(first_block + n, keys)
                other_tested = tl.cdiv(tl.minimum(last_block + n, keys) - other, ROWS)
                other_full = tl.cdiv(tl.maximum(keys - other - other_tested * ROWS, 0), ROWS)
        begin, sure = tl.maximum(begin - before, 0), tl.maximum(sure - before, 0)
    tested = tl.cdiv(tl.maximum(tl.minimum(sure, end) - begin, 0), ROWS)
    full = tl.cdiv(tl.maximum(end - begin - tested * ROWS, 0), ROWS)

    since = c // n * n - before
    until = tl.where(copy == 0, since + n, keys)
    if MASK == "causal":
        since = c
    j = tl.arange(0, COLUMNS)
    position, kv_head = (start + first + copy * Lk).to(tl.int64), head.to(tl.int64)
    k = key + batch * k_batch * 8 + kv_head * k_head * 8 + position * k_row * 8
    v = value + batch * v_batch * 8 + kv_head * v_head * 8 + position * v_row * 8
    k_tile = _load(k + (j[:, None] * (k_row * 8) + e[None, :]), inside, e, E, True)
    v_tile = _load(v + (j[:, None] * (v_row * 8) + e[None, :]), inside, e, E, True)
    positions, out_row = COPIES * Lq, heads * E
    q = query + batch * q_batch * 8 + start.to(tl.int64) * q_row * 8 + kv_head * GROUP * q_head * 8
    dout += (batch * positions + start) * out_row + kv_head * GROUP * E
    at_row = (batch * heads + kv_head * GROUP) * positions + start
    lse, delta = lse + at_row, delta + at_row
    scale2 = scale * 1.4426950408889634
    dk_tile = tl.zeros((COLUMNS, EP), tl.float32)
    dv_tile = tl.zeros((COLUMNS, EP), tl.float32)
    dk_tile, dv_tile = _key_gradient_tiles(
        dk_tile, dv_tile, k_tile, v_tile, since, until, tested + other_tested, begin, tested, other, end, copy, q, dout,
        lse, delta, q_row, q_head, out_row, positions, n, Lq, scale2, MASK, GROUP, E, EP, ROWS, True)
    dk_tile, dv_tile = _key_gradient_tiles(
        dk_tile, dv_tile, k_tile, v_tile, since, until, full + other_full, begin + tested * ROWS, full,
        other + other_tested * ROWS, end, copy, q, dout, lse, delta, q_row, q_head, out_row, positions, n,
        Lq, scale2, MASK, GROUP, E, EP, ROWS, False)
    at = ((batch * COPIES * Lk + position) * kv_heads + head) * E
    at += j[:, None] * (kv_heads * E) + e[None, :]
    mask = (c < keys)[:, None] & (e[None, :] < E)
    if key_mask is not None:  # read again: kept in registers through the loops, it makes them spill
        inside = tl.load(key_mask + batch * Lk + c, mask=c < keys, other=0, volatile=True) != 0
    tl.store(dk + at, tl.where(inside[:, None], dk_tile * scale, 0.0).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at, tl.where(inside[:, None], dv_tile, 0.0).to(dv.dtype.element_ty), mask=mask)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """`reference.masked_attention`, and lse [B, Hq, positions]. The rows of a cache are read where they are."""
    if mask.kind == "packed":
        out, lse = forward(*(x.unsqueeze(0) for x in (q, k, v)), mask._replace(kind="dense"), scale)
        return out.squeeze(0), lse
    B, positions, heads, E = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, heads, positions, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    arguments, table = _arguments(q, k, v, mask, scale), _tiles(q)
    Lq, Lk, shared = arguments["Lq"], arguments["Lk"], arguments["GROUP"]
    packed = mask.cu_seqlens is None and mask.kind == "dense" and Lq <= FEW
    shared = shared if packed else 1
    tiles = table["few" if packed else "forward"]
    programs = _slots(B, Lq * shared, tiles["ROWS"], mask) * (heads // shared)
    splits = max(min(PROGRAMS // programs, Lk // tiles["COLUMNS"]), 1) if packed else 1
    parts, part_lse = out, lse
    if splits > 1:
        parts, part_lse = (torch.empty(splits, *x.shape, dtype=torch.float32, device=q.device) for x in (out, lse))
    cache_rows = None if mask.cache_rows is None else mask.cache_rows.contiguous()
    with torch.cuda.device_of(q):
        _forward_kernel[(programs, splits)](parts, part_lse, cache_rows, **arguments, PACKED=packed, **tiles)
        if splits > 1:
            _combine_kernel[(-(-lse.numel() // COMBINE["ROWS"]),)](
                out, lse, parts, part_lse, splits, B * Lq, Lq, heads, E, arguments["EP"], **COMBINE)
    return out, lse


def backward(dout: Tensor, outputs, wanted, q: Tensor, k: Tensor, v: Tensor, mask: Mask,
             scale: float) -> tuple[Tensor | None, ...]:
    """dq, dk and dv, contiguous, where wanted."""
    out, lse = outputs
    if mask.kind == "packed":
        gradients = backward(dout.unsqueeze(0), (out.unsqueeze(0), lse), wanted, *(x.unsqueeze(0) for x in (q, k, v)),
                             mask._replace(kind="dense"), scale)
        return tuple(None if x is None else x.squeeze(0) for x in gradients)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    arguments, table = _arguments(q, k, v, mask, scale), _tiles(q)
    dout, delta = dout.contiguous(), torch.empty_like(lse)
    B, Lq, Lk = len(q), arguments["Lq"], arguments["Lk"]
    with torch.cuda.device_of(q):
        if dq.numel():
            tiles = table["query_gradient"]
            grid = _slots(B, Lq, tiles["ROWS"], mask) * q.shape[2]
            _query_gradient_kernel[(grid,)](dq, delta, dout, out, lse, **arguments, **tiles)
        if dk.numel() and (wanted[1] or wanted[2]):
            tiles = table["key_gradient"]
            grid = _slots(B, Lk, tiles["COLUMNS"], mask) * k.shape[2]
            _key_gradient_kernel[(grid,)](dk, dv, dout, lse, delta, **arguments, **tiles)
    if scale < 0:  # `_arguments` turned the sign of q
        dq = -dq
    return tuple(x if want else None for x, want in zip((dq, dk, dv), wanted, strict=True))


def _arguments(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> dict:
    """The arguments that the three large kernels share, by name; Lq and Lk are the positions of one copy."""
    if scale < 0:  # the kernels take the scale out of a maximum
        q, scale = -q, -scale
    q, k, v = (_readable(x) for x in (q, k, v))
    key_mask, cu_seqlens = (None if x is None else x.contiguous() for x in (mask.key_mask, mask.cu_seqlens))
    copies = 2 if mask.kind == "block_diffusion" else 1
    B, Lq, Lk, heads = len(q), q.shape[1] // copies, k.shape[1] // copies, q.shape[2]
    strides = {f"{name}_{dim}": x.stride(d) // 8 for name, x in (("q", q), ("k", k), ("v", v))
               for d, dim in enumerate(("batch", "row", "head"))}
    visible = "all" if mask.block_length is None else "blocks"
    if copies == 2:
        visible = "causal" if mask.causal else "diffusion"
    return {"query": q, "key": k, "value": v, "key_mask": key_mask, "cu_seqlens": cu_seqlens, "scale": float(scale),
            **strides, "n": min(mask.block_length or 1, max(Lk, 1)),
            "documents": 0 if cu_seqlens is None else len(cu_seqlens) - 1, "T": B * Lq, "Lq": Lq, "Lk": Lk,
            "heads": heads, "MASK": visible, "GROUP": heads // k.shape[2], "E": q.shape[3],
            "EP": triton.next_power_of_2(q.shape[3])}


def _readable(x: Tensor) -> Tensor:
    """x, or a copy, with a last stride of 1 and other strides that are multiples of 8."""
    plain = x.stride(3) == 1 and all(x.stride(d) % 8 == 0 or x.shape[d] == 1 for d in range(3))
    return x if plain else x.contiguous()


def _tiles(q: Tensor) -> dict:
    key = q.element_size(), triton.next_power_of_2(q.shape[3])
    if not q.is_cuda or torch.version.hip:
        return TILES[key]
    major, minor = torch.cuda.get_device_capability(q.device)
    return BY_ARCHITECTURE.get(f"sm_{major}{minor}" if major >= 9 else "sm_80", {}).get(key, TILES[key])


def _slots(B: int, L: int, size: int, mask: Mask) -> int:
    """The most tiles of `size` positions that B rows of L have."""
    slots = B * -(-L // size) if mask.cu_seqlens is None else B * L // size + len(mask.cu_seqlens)
    return slots * (2 if mask.kind == "block_diffusion" else 1)
