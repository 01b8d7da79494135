"""Attention against a float64 definition written out position by position, and with the dense mask at more sizes."""

import importlib
import sys
import types
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dllm_kernels import (
    bidirectional_attention,
    bidirectional_attention_varlen,
    block_diffusion_attention,
    masked_attention,
)
from dllm_kernels.attention import (
    BACKENDS,
    BLOCK_DIFFUSION_BACKENDS,
    CUDNN,
    DENSE_BACKENDS,
    FLASH,
    VARLEN_BACKENDS,
    Mask,
    choices,
    flash,
    reference,
    sdpa,
)
from dllm_kernels.dispatch import runnable

ON_CPU = torch.zeros(1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
dense_backends = pytest.mark.parametrize("backend", runnable(DENSE_BACKENDS, ON_CPU))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1, 1, 8), (2, 7, 7, 4, 2, 16), (3, 5, 13, 6, 1, 24), (1, 33, 65, 4, 4, 40)]  # B, Lq, Lk, Hq, Hkv, E


def make(B, Lq, Lk, Hq, Hkv, E, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, L, H, E, generator=g).to(dtype) for L, H in ((Lq, Hq), (Lk, Hkv), (Lk, Hkv)))


def exact(q, k, v, sees):
    """float64, one query at a time; sees(b, i) -> bool [Lk]."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            allowed = sees(b, i)
            for h in range(q.shape[2]):
                g = h * k.shape[2] // q.shape[2]
                if allowed.any():
                    weights = (k[b, allowed, g] @ q[b, i, h] * q.shape[-1] ** -0.5).softmax(0)
                    out[b, i, h] = weights @ v[b, allowed, g]
    return out


def assert_as_exact_as_eager(ours, truth, eager):
    assert (ours.double() - truth).abs().max() <= 2 * (eager.double() - truth).abs().max() + 1e-6


def eager(q, k, v, mask):
    """As `reference.attend`, but in the inputs' dtype."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is None:
        return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
    mask = mask.unsqueeze(1)
    scores = scores.masked_fill(~mask, -torch.inf).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1).masked_fill(~mask, 0.0), v)


def every_mask(L):
    """Name, operation of (q, k, v, backend), B, Lq, Lk, dense mask."""
    few = max(L // 2, 1)
    padding = torch.arange(L) < torch.tensor([[L], [L // 3]])
    ends = torch.tensor([0, L // 3, L // 3, L // 3 + (L > 1), L], dtype=torch.int32)  # of 0, 1 and more positions
    for Lq, key_mask, n in product((L, few), (None, padding), (None, 5)):
        def dense(q, k, v, backend, key_mask=key_mask, n=n):
            return bidirectional_attention(q, k, v, key_mask=key_mask, block_length=n, backend=backend)

        shape = torch.empty(2, Lq, 0), torch.empty(2, L, 0)
        yield f"dense {Lq} {key_mask is not None} {n}", dense, 2, Lq, L, reference.dense_mask(*shape, key_mask, n)
    for n in (None, 5):
        def packed(q, k, v, backend, n=n):
            return bidirectional_attention_varlen(q[0], k[0], v[0], ends, L, block_length=n, backend=backend)[None]

        yield f"packed {n}", packed, 1, L, L, reference.varlen_mask(ends, L, n)
    for cu_seqlens, causal in ((None, False), (ends, False), (ends, True)):
        def diffuse(q, k, v, backend, cu_seqlens=cu_seqlens, causal=causal):
            return block_diffusion_attention(q, k, v, 5, cu_seqlens=cu_seqlens, causal=causal, backend=backend)

        mask = reference.block_diffusion_mask(1, L, 5, cu_seqlens, "cpu", causal)
        yield f"diffusion {cu_seqlens is not None} {causal}", diffuse, 1, 2 * L, 2 * L, mask


def outcome(function, tensors, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves)
    upstream = torch.linspace(-1, 1.5, out.numel()).view_as(out).to(tensors[0].dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.fixture
def one_thread():
    """On a busy machine small products wait for the slowest thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("L, E, dtype", [
    *((L, E, DTYPES[(i + j) % 3]) for i, L in enumerate((1, 7, 63, 65, 129)) for j, E in enumerate((32, 72, 256))),
    *((400, 64, dtype) for dtype in (torch.float32, torch.bfloat16))],  # eager fp16 takes seconds
    ids=str)
def test_every_mask_dtype_head_size_and_odd_length_forward_and_backward(L, E, dtype, one_thread):
    """Error at most twice eager's; gradients in bf16, which PyTorch's kernel rounds more often, three times."""
    for name, op, B, Lq, Lk, mask in every_mask(L):
        tensors = make(B, Lq, Lk, 2, 1, E, dtype)
        ours = outcome(lambda *x, op=op: op(*x, None), tensors)
        truth = outcome(lambda *x, mask=mask: reference.attend(*x, mask, E ** -0.5), tensors, torch.double)
        theirs = outcome(lambda *x, mask=mask: eager(*x, mask), tensors)
        for which, mine, its, true in zip(("out", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
            times = 3 if dtype == torch.bfloat16 and which != "out" else 2
            limit = times * (its.double() - true).abs().max() + 4e-6
            assert (mine.double() - true).abs().max() <= limit, (name, which)


@dense_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_query_sees_every_key(shape, dtype, backend):
    q, k, v = make(*shape, dtype)
    truth = exact(q, k, v, lambda b, i: torch.ones(shape[2], dtype=torch.bool))
    group = shape[3] // shape[4]
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k.repeat_interleave(group, 2)) * shape[-1] ** -0.5
    eager = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v.repeat_interleave(group, 2))
    ours = bidirectional_attention(q, k, v, backend=backend)
    assert ours.dtype == dtype and ours.shape == q.shape
    assert_as_exact_as_eager(ours, truth, eager)


@dense_backends
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_keys_are_never_seen_and_a_row_without_keys_gives_zeros(shape, backend):
    q, k, v = (x.requires_grad_() for x in make(*shape))
    key_mask = torch.rand(shape[0], shape[2], generator=torch.Generator().manual_seed(1)) < 0.6
    key_mask[-1] = False
    ours = bidirectional_attention(q, k, v, key_mask=key_mask, backend=backend)
    assert (ours - exact(q, k, v, lambda b, i: key_mask[b])).abs().max() < 1e-5
    assert (ours[-1] == 0).all()
    gradients = torch.autograd.grad(ours.sum(), (q, k, v))
    assert all(gradient.isfinite().all() and (gradient[-1] == 0).all() for gradient in gradients)
    poisoned = [torch.where(key_mask[:, :, None, None], x, torch.full_like(x, 3e4)) for x in (k, v)]
    assert torch.equal(bidirectional_attention(q, *poisoned, key_mask=key_mask, backend=backend), ours)


@dense_backends
def test_a_mask_that_allows_all_changes_nothing(backend):
    q, k, v = make(2, 5, 9, 4, 2, 16)
    plain = bidirectional_attention(q, k, v, backend=backend)
    masked = bidirectional_attention(q, k, v, key_mask=torch.ones(2, 9, dtype=torch.bool), backend=backend)
    assert (masked - plain).abs().max() < 1e-6


@dense_backends
@pytest.mark.parametrize("block_length", [1, 4, 100])
@pytest.mark.parametrize("Lq", [11, 3])
def test_blocks_see_themselves_and_those_before(Lq, block_length, backend):
    q, k, v = make(2, Lq, 11, 2, 1, 16)
    key_mask = torch.ones(2, 11, dtype=torch.bool)
    key_mask[1, :5] = False
    block = torch.arange(11) // block_length
    truth = exact(q, k, v, lambda b, i: key_mask[b] & (block <= block[i + 11 - Lq]))
    ours = bidirectional_attention(q, k, v, key_mask=key_mask, block_length=block_length, backend=backend)
    assert (ours - truth).abs().max() < 1e-5


@dense_backends
def test_rows_of_a_cache_as_if_they_were_taken_out(backend):
    """Any rows, in any order, twice too; of a part of the positions; a row that is not asked for may be NaN."""
    q, k, v = make(4, 3, 11, 4, 2, 16)
    k, v = (torch.cat((x, x + 1))[:5] for x in (k, v))
    k[1], v[1] = torch.nan, torch.nan
    key_mask = torch.ones(4, 9, dtype=torch.bool)
    key_mask[2, 4:] = False
    rows = torch.tensor([4, 0, 3, 0])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for mask, block_length in ((None, None), (key_mask, None), (None, 4), (key_mask, 4)):
        def run(keys, values, mask=mask, block_length=block_length, **rows):
            return bidirectional_attention(q, keys, values, key_mask=mask, block_length=block_length, backend=backend,
                                           **rows)

        ours, apart = run(k[:, :9], v[:, :9], cache_rows=rows), run(k[rows, :9], v[rows, :9])
        assert (ours - apart).abs().max() < 1e-6
        gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (ours, apart)]
        for mine, its in zip(*gradients, strict=True):
            assert (mine - its).abs().max() < 1e-5
        with torch.no_grad():
            assert (run(k[:, :9], v[:, :9], cache_rows=rows) - apart).abs().max() < 1e-6


@pytest.mark.parametrize("backend", runnable(VARLEN_BACKENDS, ON_CPU))
@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 1, 7, 3, 1], [12], [5, 0, 7]])
@pytest.mark.parametrize("block_length", [None, 1, 2])
def test_packed_documents_are_as_if_alone(lengths, block_length, backend):
    q, k, v = (x[0].requires_grad_() for x in make(1, sum(lengths), sum(lengths), 4, 2, 16))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    ours = bidirectional_attention_varlen(q, k, v, cu_seqlens, max(lengths), block_length=block_length, backend=backend)
    alone = torch.cat([
        bidirectional_attention(*(x[None, a:b] for x in (q, k, v)), block_length=block_length, backend="reference")[0]
        for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True) if b > a])
    assert (ours - alone).abs().max() < 1e-5
    seed = torch.randn_like(ours)
    gradients = [torch.autograd.grad(out, (q, k, v), seed) for out in (ours, alone)]
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine - theirs).abs().max() < 1e-5


def block_diffusion_sees(L, n, document, causal=False):
    """BD3-LM, as written in the paper: one row per query of [noisy; clean]. Causal: nothing after the query's place."""
    def sees(b, i):
        place, allowed = i % L, torch.zeros(2 * L, dtype=torch.bool)
        start = min(j for j in range(L) if document[b][j] == document[b][place])
        for j in range(L):
            if document[b][j] != document[b][place] or causal and j > place:
                continue
            mine, its = (place - start) // n, (j - start) // n
            allowed[j] = i < L and its == mine
            allowed[L + j] = its < mine if i < L else its <= mine
        return allowed
    return sees


@pytest.mark.parametrize("backend", runnable(BLOCK_DIFFUSION_BACKENDS, ON_CPU))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_length", [1, 3, 4, 20])
def test_block_diffusion_mask(block_length, causal, backend):
    q, k, v = make(2, 18, 18, 4, 2, 16)
    truth = exact(q, k, v, block_diffusion_sees(9, block_length, [[0] * 9] * 2, causal))
    ours = block_diffusion_attention(q, k, v, block_length, causal=causal, backend=backend)
    assert (ours - truth).abs().max() < 1e-5
    cu_seqlens = torch.tensor([0, 4, 9, 16, 18], dtype=torch.int32)
    truth = exact(q, k, v, block_diffusion_sees(9, block_length, [[0] * 4 + [1] * 5, [2] * 7 + [3] * 2], causal))
    ours = block_diffusion_attention(q, k, v, block_length, cu_seqlens=cu_seqlens, causal=causal, backend=backend)
    assert (ours - truth).abs().max() < 1e-5


@pytest.mark.parametrize("length, block_length, tile", [(21, 1, 4), (24, 4, 8), (30, 4, 6), (9, 20, 4), (1, 1, 4),
                                                        (300, 32, None)])
def test_tiles_of_queries_give_what_the_whole_mask_gives(length, block_length, tile, monkeypatch):
    if tile:
        monkeypatch.setattr(sdpa, "TILE", tile)
    half = (length + 1) // 2
    cu_seqlens = torch.tensor([0, half, length, length, length + half, 2 * length], dtype=torch.int32)

    def run(backend):
        q, k, v = (x.requires_grad_() for x in make(2, 2 * length, 2 * length, 4, 2, 16))
        outputs = [block_diffusion_attention(q, k, v, block_length, backend=backend),
                   block_diffusion_attention(q, k, v, block_length, cu_seqlens=cu_seqlens, backend=backend),
                   bidirectional_attention(q, k, v, block_length=block_length, backend=backend),
                   bidirectional_attention(q[:, -half:], k, v, block_length=block_length, backend=backend)]
        upstream = [torch.linspace(-1, 1, out.numel()).view_as(out) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, (q, k, v), upstream)]

    for ours, truth in zip(run("sdpa"), run("reference"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", runnable(BLOCK_DIFFUSION_BACKENDS, ON_CPU))
@pytest.mark.parametrize("length, block_length", [(8, 4), (12, 4), (16, 16), (10, 4), (6, 1)])
def test_block_diffusion_equals_the_mask_of_bd3lms(length, block_length, backend, shared):
    masks = np.load(shared / "golden/families/functions/bd3lm_masks.npz")
    mask = torch.from_numpy(masks[f"train_n{length}_b{block_length}"])
    q, k, v = make(1, 2 * length, 2 * length, 2, 1, 16)
    truth = exact(q, k, v, lambda b, i: mask[i])
    assert (block_diffusion_attention(q, k, v, block_length, backend=backend) - truth).abs().max() < 1e-5


@pytest.mark.parametrize("backend", runnable(BLOCK_DIFFUSION_BACKENDS, ON_CPU))
def test_uninitialised_memory_is_never_read(backend):
    q, k, v = make(2, 6, 6, 4, 2, 16)
    key_mask = torch.tensor([[True, True, False, True, True, True], [False] * 6])
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)

    def all_three():
        return (bidirectional_attention(q, k, v, key_mask=key_mask, backend=backend),
                bidirectional_attention_varlen(q[0], k[0], v[0], cu_seqlens, 4, backend=backend),
                block_diffusion_attention(q, k, v, 2, backend=backend))

    plain = all_three()
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        assert all(torch.equal(mine, its) for mine, its in zip(all_three(), plain, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@dense_backends
def test_gradients_in_double(backend):
    q, k, v = (x.requires_grad_() for x in make(2, 3, 5, 2, 1, 8, torch.float64))
    key_mask = torch.tensor([[True, False, True, True, True], [False] * 5])
    assert torch.autograd.gradcheck(
        lambda *x: bidirectional_attention(*x, key_mask=key_mask, block_length=2, backend=backend), (q, k, v),
        fast_mode=True)


@dense_backends
def test_any_strides_and_empty_inputs(backend):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(2, 5, 7, 4, 2, 16))
    plain = bidirectional_attention(*(x.contiguous() for x in (q, k, v)), backend=backend)
    assert (bidirectional_attention(q, k, v, backend=backend) - plain).abs().max() < 1e-6
    assert bidirectional_attention(*make(0, 5, 7, 4, 2, 16), backend=backend).shape == (0, 5, 4, 16)
    assert bidirectional_attention(*make(2, 0, 7, 4, 2, 16), backend=backend).shape == (2, 0, 4, 16)


@dense_backends
def test_huge_scores_do_not_overflow(backend):
    q, k, v = make(1, 4, 6, 2, 2, 16)
    assert bidirectional_attention(q * 1e4, k * 1e4, v, backend=backend).isfinite().all()


@pytest.mark.slow
def test_compiles_whole_and_passes_opcheck():
    q, k, v = (x.requires_grad_() for x in make(2, 5, 5, 4, 2, 16))
    key_mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    scale = 16 ** -0.5
    ops = torch.ops.dllm_kernels
    rest = scale, None, True
    packed = [x[0].detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.bidirectional_attention.default, (q, k, v, *Mask("dense", 2, key_mask), *rest))
    torch.library.opcheck(ops.bidirectional_attention.default,
                          (*(x.detach() for x in (q, k, v)), *Mask("dense", None, None, torch.tensor([1, 1])), scale,
                           None, False))
    torch.library.opcheck(ops.bidirectional_attention_varlen.default,
                          (*packed, *Mask("packed", cu_seqlens=cu_seqlens, max_seqlen=3), *rest))
    torch.library.opcheck(ops.block_diffusion_attention.default,
                          (*(x[:, :4] for x in (q, k, v)), *Mask("block_diffusion", 2, causal=True), *rest))

    def both(q, k, v):
        return (bidirectional_attention(q, k, v, key_mask=key_mask)
                + bidirectional_attention_varlen(q[0], k[0], v[0], cu_seqlens, 3).unsqueeze(0))

    eager, compiled = both(q, k, v), torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v)
    assert (compiled - eager).abs().max() < 1e-6
    gradients = [torch.autograd.grad(out.sum(), (q, k, v)) for out in (compiled, eager)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_autocast_brings_mixed_dtypes_to_its_own_and_compiles():
    q, k, v = (x.detach() for x in make(2, 6, 6, 4, 2, 16))
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)

    def all_three(q, k, v):
        return (bidirectional_attention(q, k, v), block_diffusion_attention(q, k, v, 2),
                bidirectional_attention_varlen(q[0], k[0], v[0], cu_seqlens, 4))

    expected = all_three(q.bfloat16(), k.bfloat16(), v.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):  # as after an fp32 rotary embedding: q and k fp32, v bf16
        got = all_three(q, k, v.bfloat16())
        compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")(q, k, v.bfloat16())
    for wanted, ours, ours_compiled in zip(expected, got, compiled, strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, wanted) and torch.equal(ours_compiled, wanted)


def test_choices_name_backends_and_are_followed(monkeypatch):
    kinds = {"dense": "bidirectional_attention", "decoding": "bidirectional_attention",
             "packed": "bidirectional_attention_varlen", "block_diffusion": "block_diffusion_attention"}
    assert {*choices.CHOICES} >= {*product(("cpu", "cuda"), kinds)}
    for (machine, kind), choice in choices.CHOICES.items():
        assert {*choice.order} <= {backend.name for backend in BACKENDS[kinds[kind]]}, (machine, kind)
    taken = []
    attention = importlib.import_module("dllm_kernels.attention")
    noting = [b._replace(run=lambda *x, b=b: taken.append(b.name) or b.run(*x)) for b in DENSE_BACKENDS]
    monkeypatch.setitem(attention.BACKENDS, "bidirectional_attention", noting)
    for order in (("reference",), ("sdpa",)):
        monkeypatch.setitem(choices.CHOICES, ("cpu", "decoding"), choices.Choice(order, "a test"))
        attention._in_order.cache_clear()
        bidirectional_attention(*make(1, 3, 9, 2, 1, 8))
    bidirectional_attention(*make(1, 9, 9, 2, 1, 8))  # as many queries as keys: "dense"
    monkeypatch.undo()
    attention._in_order.cache_clear()
    assert taken == ["reference", "sdpa", "sdpa"]


def test_flash_attn_gets_packed_documents_as_it_names_them(monkeypatch):
    """It is not installed here: a function in its place computes the same."""
    seen = {}

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale,
                               causal, deterministic):
        seen.update(longest=(max_seqlen_q, max_seqlen_k), deterministic=deterministic)
        assert cu_seqlens_q is cu_seqlens_k
        return reference.masked_attention(q, k, v, Mask("packed", 1 if causal else None, cu_seqlens=cu_seqlens_q),
                                          softmax_scale)

    stand_in = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    q, k, v = (x[0] for x in make(1, 9, 9, 4, 2, 16))
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    for block_length in (None, 1):
        arguments = Mask("packed", block_length, cu_seqlens=ends, max_seqlen=5), 0.3
        ours = flash.varlen_by_flash_attn(q, k, v, *arguments)
        assert torch.equal(ours, reference.masked_attention(q, k, v, *arguments))
    assert seen == {"longest": (5, 5), "deterministic": False}
    torch.use_deterministic_algorithms(True)
    try:
        flash.varlen_by_flash_attn(q, k, v, Mask("packed", cu_seqlens=ends, max_seqlen=5), 0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen["deterministic"]


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "heads_repeated"])
def test_torch_varlen_gets_packed_documents_as_it_names_them(monkeypatch, grouped):
    """It needs a GPU: a function in its place computes the same. That of torch 2.11 has no enable_gqa."""
    def compute(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa):
        assert cu_seq_q is cu_seq_k and (max_q, max_k) == (5, 5)
        assert all(x.stride(-1) == 1 for x in (q, k, v)) and enable_gqa == (q.shape[1] != k.shape[1])
        mask = Mask("packed", {(-1, -1): None, (-1, 0): 1}[window_size], cu_seqlens=cu_seq_q)
        return reference.masked_attention(q, k, v, mask, scale)

    def newer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa)

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, False)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", newer if grouped else older)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    for heads in (2, 4):
        q, k, v = (x[0].mT.contiguous().mT.requires_grad_() for x in make(1, 9, 9, 4, heads, 16))
        for block_length in (None, 1):
            mask = Mask("packed", block_length, cu_seqlens=ends, max_seqlen=5)
            outputs = [attend(q, k, v, mask, 0.3) for attend in (flash.varlen_by_torch, reference.masked_attention)]
            gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outputs]
            for ours, theirs in (outputs, *zip(*gradients, strict=True)):
                torch.testing.assert_close(ours, theirs)


def test_cudnn_gets_packed_documents_as_the_operator_names_them(monkeypatch):
    """It needs a GPU: a function in the operator's place, with the operator's own parameters, computes the same."""
    schema = torch.ops.aten._cudnn_attention_forward.default._schema
    assert [x.name for x in schema.arguments[:13]] == flash.CUDNN_ARGUMENTS and schema.returns[0].name == "output"
    assert all(x.has_default_value() for x in schema.arguments[13:])
    seen = []

    def operator(query, key, value, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, compute_log_sumexp, dropout_p=0.0,
                 is_causal=False, return_debug_mask=False, *, scale=None):
        assert cum_seq_q is cum_seq_k and attn_bias is None and dropout_p == 0 and not compute_log_sumexp
        assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (query, key, value))
        seen.append((max_q, max_k, is_causal))
        mask = Mask("packed", 1 if is_causal else None, cu_seqlens=cum_seq_q)
        return reference.masked_attention(query, key, value, mask, scale), *[None] * 8

    monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_forward", operator)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k, v = (x[0] for x in make(1, 9, 9, 4, 2, 16))
    shifted = torch.cat((torch.zeros(1), q.flatten()))[1:].view_as(q)  # contiguous, 4 bytes past a multiple of 16
    for queries in (q, q.mT.contiguous().mT, shifted):
        for block_length in (None, 1):
            arguments = Mask("packed", block_length, cu_seqlens=ends, max_seqlen=5), 0.3
            ours = flash.varlen_by_cudnn(queries, k, v, *arguments)
            assert torch.equal(ours, reference.masked_attention(q, k, v, *arguments))
    assert seen == [(5, 5, False), (5, 5, True)] * 3


def test_cudnn_runs_by_name_alone_and_without_gradients(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert all("cudnn" not in choice.order for choice in choices.CHOICES.values())
    q = torch.zeros(9, 4, 64, dtype=torch.bfloat16).as_subclass(SaysCuda)
    assert flash.refuses_cudnn(q) is None
    assert flash.refuses_cudnn(q.clone().requires_grad_()) == "has no gradients: call it under torch.no_grad()"
    assert flash.refuses_cudnn(torch.cat((q, q, q), 2)) == "takes head sizes up to 128, not 192"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert flash.refuses_cudnn(q) == "needs a GPU of compute capability 9.0 or newer"


class SaysCuda(torch.Tensor):
    is_cuda = property(lambda self: True)


@pytest.mark.parametrize("backend", ["torch_varlen", "flash_attn", "cudnn"])
@pytest.mark.parametrize("block_length", [None, 4])
def test_flash_attention_says_why_it_cannot_run(block_length, backend):
    q, k, v = (x[0] for x in make(1, 9, 9, 4, 2, 16))
    with pytest.raises(ValueError) as error:
        bidirectional_attention_varlen(q, k, v, torch.tensor([0, 9]).int(), 9, block_length=block_length,
                                       backend=backend)
    assert f"{backend}: needs " in str(error.value)
    assert flash.refuses(q) == "needs a CUDA tensor" and flash.refuses_blocks(q) == "has no block_length but 1"


@needs_gpu
@pytest.mark.parametrize("backend", [b.name for b in VARLEN_BACKENDS])
@pytest.mark.parametrize("block_length", [None, 1, 3])
def test_packed_documents_on_a_gpu(block_length, backend):
    """As exact as eager, with grouped heads, documents of many lengths (none, too), and heads that are not adjacent."""
    q, k, v = (x[0].to("cuda", torch.bfloat16).transpose(0, 1).contiguous().transpose(0, 1)
               for x in make(1, 300, 300, 4, 2, 64))
    ends = torch.tensor([0, 1, 1, 64, 193, 300], dtype=torch.int32, device="cuda")
    backends = [b for b in VARLEN_BACKENDS if block_length != 3 or b not in (*FLASH, CUDNN)]
    if backend not in runnable(backends, q):
        pytest.skip(f"{backend} cannot run here")

    def outcome(attend, dtype):
        leaves = [x.to(dtype).requires_grad_(backend != "cudnn") for x in (q, k, v)]
        out = attend(*leaves)
        if backend == "cudnn":
            return [out]
        return [out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
                                          .bfloat16().to(dtype))]

    mask = reference.varlen_mask(ends, 300, block_length)
    ours = outcome(lambda *x: bidirectional_attention_varlen(*x, ends, 129, block_length=block_length,
                                                             backend=backend), torch.bfloat16)
    truth, theirs = (outcome(lambda *x: eager(*(y[None] for y in x), mask)[0], dtype)
                     for dtype in (torch.double, torch.bfloat16))
    for mine, true, its in zip(ours, truth, theirs, strict=True):
        assert_as_exact_as_eager(mine, true, its)


class SaysGpu(torch.Tensor):
    device = property(lambda self: torch.device("cuda"))


def test_cudnn_never_gets_a_mask(monkeypatch):
    """Its backward gives NaN for some masks on H100 and H200 (pytorch issue 196678).

    Of the others only the memory-efficient kernel takes masks, and no grouped heads.
    """
    calls = []

    def watched(q, k, v, attn_mask=None, enable_gqa=False, **others):
        calls.append((attn_mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        assert attn_mask is None or (q.shape[1] == k.shape[1] == v.shape[1] and not enable_gqa)
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q, k, v = (x.as_subclass(SaysGpu) for x in make(2, 9, 9, 4, 2, 16))
    for mask in (None, torch.ones(2, 9, 9, dtype=torch.bool)):
        sdpa.attend(q, k, v, mask, 1.0)
    assert calls == [(False, True), (True, False)]  # without a mask it may be the fastest
    sources = [path.read_text() for path in Path(sdpa.__file__).parents[2].glob("dllm*/**/*.py")]
    called = sum(source.count("F.scaled_dot_product_attention(") for source in sources)
    assert called == 1  # the one in `attend`


@pytest.mark.parametrize("rows", [1, 2])
def test_a_mask_of_any_form(rows):
    q, k, v = (x.double().requires_grad_() for x in make(2, 7, 11, 6, 2, 24))
    visible = torch.rand(rows, 7, 11) < 0.4
    visible[:, 3] = False  # a query without a key
    out = masked_attention(q, k, v, visible, scale=0.3)
    keys, values = (x.repeat_interleave(3, 2) for x in (k, v))
    scores = torch.einsum("bqhe,bkhe->bqhk", q, keys) * 0.3
    weights = scores.masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = torch.einsum("bqhk,bkhe->bqhe", weights, values)
    torch.testing.assert_close(out, expected)
    assert (out[:, 3] == 0).all()
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    assert all(gradient.isfinite().all() for gradient in ours) and (ours[0][:, 3] == 0).all()


@pytest.mark.parametrize("visible", [torch.ones(2, 7, 11), torch.ones(3, 7, 11).bool(), torch.ones(7, 11).bool()])
def test_a_mask_of_another_shape_is_refused(visible):
    with pytest.raises(ValueError, match=r"masked_attention takes visible \[2, 7, 11\] bool, or one for all rows"):
        masked_attention(*make(2, 7, 11, 6, 2, 24), visible)


@needs_gpu
@pytest.mark.parametrize("backend", [b.name for b in DENSE_BACKENDS])
def test_gradients_stay_finite_where_cudnn_gave_nan(backend):
    """pytorch issue 196678: L % 128 == 64, a mask, and rows whose log-sum-exp is under -88.7."""
    q, k, v = (x.to("cuda", torch.bfloat16) for x in make(2, 704, 704, 14, 2, 64))
    q, k = q.abs() * 8, -k.abs() * 8
    key_mask = torch.arange(704, device="cuda") < torch.tensor([[704], [600]], device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if backend not in runnable(DENSE_BACKENDS, q):
        pytest.skip(f"{backend} does not take this")
    out = bidirectional_attention(*leaves, key_mask=key_mask, backend=backend)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.float().square().sum(), leaves)))


def test_deterministic_algorithms_give_the_same_bits_again():
    """On a GPU PyTorch leaves cuDNN out then, and its Flash adds up in a fixed order."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tensors = [x.to(device, dtype) for x in make(2, 130, 130, 4, 2, 64)]
    key_mask = torch.arange(130, device=device) < torch.tensor([[130], [70]], device=device)
    ends = torch.tensor([0, 60, 60, 130, 200, 260], dtype=torch.int32, device=device)

    def gradients():
        leaves = [x.detach().requires_grad_() for x in tensors]
        outputs = (bidirectional_attention(*leaves), bidirectional_attention(*leaves, key_mask=key_mask),
                   bidirectional_attention(*leaves, block_length=32), block_diffusion_attention(*leaves, 32),
                   bidirectional_attention_varlen(*(x.flatten(0, 1) for x in leaves), ends, 70))
        return torch.autograd.grad([x.float().square().sum() for x in outputs], leaves)

    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [gradients() for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for again in others for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("change, message", [
    (lambda q, k, v: bidirectional_attention(q[0], k, v),
     "takes q [B, Lq, Hq, E], k and v [B, Lk, Hkv, E], Hq a multiple of Hkv"),
    (lambda q, k, v: bidirectional_attention(q[:, :, :3], k, v),
     "Hq a multiple of Hkv, not [[2, 5, 3, 16], [2, 5, 2, 16]"),
    (lambda q, k, v: bidirectional_attention(q.half(), k, v),
     "q, k and v must share dtype and device, not ['torch.float16"),
    (lambda q, k, v: bidirectional_attention(q, k, v, key_mask=torch.ones(2, 4)),
     "key_mask [B, Lk] = [2, 5] torch.bool, not [2, 4] torch.float32"),
    (lambda q, k, v: bidirectional_attention(q, k[:1], v[:1]), "not [[2, 5, 4, 16], [1, 5, 2, 16]"),
    (lambda q, k, v: bidirectional_attention(q, k, v, cache_rows=torch.tensor([0, 1, 1])),
     "takes cache_rows [B] = [2] torch.int64, not [3] torch.int64"),
    (lambda q, k, v: bidirectional_attention(q, k, v, cache_rows=torch.tensor([0, 2])),
     "takes cache_rows from 0 to 1, the rows of k and v, not [0, 2]"),
    (lambda q, k, v: bidirectional_attention(q, k.to("meta"), v),
     "must share dtype and device, not ['torch.float32 on cpu', 'torch.float32 on meta'"),
    (lambda q, k, v: bidirectional_attention(q, k, v, key_mask=torch.ones(2, 5, dtype=torch.bool, device="meta")),
     "takes key_mask [B, Lk] on the device of q, cpu, not on meta; move it there"),
    (lambda q, k, v: bidirectional_attention_varlen(q[0], k[0], v[0], torch.tensor([0, 5]).int().to("meta"), 5),
     "takes cu_seqlens on the device of q, cpu, not on meta"),
    (lambda q, k, v: bidirectional_attention(q, k, v, block_length=0), "block_length must be at least 1, not 0"),
    (lambda q, k, v: bidirectional_attention(q, k[:, :3], v[:, :3], block_length=2), "5 queries and 3 keys"),
    (lambda q, k, v: bidirectional_attention(q, k, v, backend="cuda9"), "there is no backend 'cuda9'"),
    (lambda q, k, v: bidirectional_attention_varlen(q[0], k[0], v[0], torch.tensor([0, 5]), 5),
     "cu_seqlens [S + 1] int32"),
    *((lambda q, k, v, values=values: bidirectional_attention_varlen(
        q[0], k[0], v[0], torch.tensor(values).int(), 5), f"rise from 0 to the 5 packed positions, not {values}")
      for values in ([1, 5], [0, 4], [0, 3, 2, 5])),
    (lambda q, k, v: block_diffusion_attention(q[:, :4], k[:, :4], v[:, :4], 2, cu_seqlens=torch.tensor([0, 5]).int()),
     "rise from 0 to the 4 packed positions, not [0, 5]"),
    (lambda q, k, v: block_diffusion_attention(q, k, v, 2), "takes 2L queries and 2L keys"),
])
def test_errors_say_what_was_wanted_and_what_came(change, message):
    with pytest.raises(ValueError) as error:
        change(*make(2, 5, 5, 4, 2, 16))
    assert message in str(error.value)
