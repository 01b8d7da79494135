"""The CUDA C++ kernels of attention against float64: on a GPU and, instruction by instruction, on a CPU (simt.h).

On the CPU the same source runs, with functions that do what PTX's manual says in place of the instructions: this proves
indices, masks, fragments and the waiting for copies, not what nvcc makes of them, nor speed.
"""

import ctypes
import importlib

import pytest
import torch
from torch import Tensor

from dllm_kernels import bidirectional_attention
from dllm_kernels.attention import BACKENDS, DENSE_BACKENDS, Mask, cuda, reference

attention = importlib.import_module("dllm_kernels.attention")
ON_GPU = cuda.missing() is None
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=f"cannot run here: {cuda.missing()}")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def emulated(emulator_library):
    """The kernels, compiled for the CPU."""
    library = emulator_library("decode_attention_on_cpu.cpp")
    function = ctypes.CDLL(str(library)).decode_attention
    function.restype = ctypes.c_int64

    def attend(q, k, v, key_mask=None, block_length=None, scale=None, cache_rows=None, slots=1):
        """Returns the result and into how many splits the keys went."""
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        strides = torch.tensor([x.stride(d) for x in (q, k, v) for d in range(3)])
        sizes = torch.tensor([len(q), q.shape[1], k.shape[1], k.shape[2], q.shape[2] // k.shape[2], q.shape[3],
                              min(block_length or 0, k.shape[1]), slots])
        conflicts = ctypes.c_int64()
        pointers = [None if x is None else ctypes.c_void_p(x.data_ptr())
                    for x in (q, k, v, key_mask, cache_rows, out, strides, sizes)]
        scale = ctypes.c_double(q.shape[3] ** -0.5 if scale is None else scale)
        splits = function(int(q.dtype == torch.bfloat16), *pointers, scale, ctypes.byref(conflicts))
        assert splits > 0 and conflicts.value == 0
        return out, splits

    return attend


def on_gpu(q, k, v, key_mask=None, block_length=None, scale=None, cache_rows=None, slots=None):
    tensors = [None if x is None else x.cuda() for x in (q, k, v, key_mask, cache_rows)]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    mask = Mask("dense", block_length, tensors[3], tensors[4])
    return cuda.masked_attention(*tensors[:3], mask, scale).cpu(), None


@pytest.fixture(params=[
    pytest.param("emulated", marks=pytest.mark.slow),
    pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
def attend(request):
    return request.getfixturevalue("emulated") if request.param == "emulated" else on_gpu


def make(B, Lq, Lk, Hq, Hkv, E, dtype=torch.bfloat16, rows=None):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, L, H, E, generator=g).to(dtype)
            for n, L, H in ((B, Lq, Hq), (rows or B, Lk, Hkv), (rows or B, Lk, Hkv))]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As `reference.attend`, but in the inputs' dtype."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * scale
    if mask is not None:
        mask = mask.unsqueeze(1)
        scores = scores.masked_fill(~mask, -torch.inf).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    weights = scores.softmax(-1)
    return torch.einsum("bhqk,bkhe->bqhe", weights if mask is None else weights.masked_fill(~mask, 0.0), v)


def check(attend, q, k, v, key_mask=None, block_length=None, cache_rows=None, scale=None, **others):
    """Error at most twice eager's."""
    ours, splits = attend(q, k, v, key_mask, block_length, scale, cache_rows, **others)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if cache_rows is not None:
        k, v = k[cache_rows], v[cache_rows]
    if key_mask is not None:  # what is masked may be NaN, which the definition does not allow
        k, v = (x.masked_fill(~key_mask[:, :, None, None], 0.0) for x in (k, v))
    mask = reference.dense_mask(q, k, key_mask, block_length)
    truth = reference.attend(q.double(), k.double(), v.double(), mask, scale)
    theirs = eager(q, k, v, mask, scale)
    assert (ours.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + 2e-6
    return ours, splits


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 32), (2, 9, 63, 4, 2, 40), (1, 32, 130, 7, 1, 64),
                                   (1, 5, 65, 6, 2, 72), (1, 10, 129, 7, 1, 128), (1, 3, 70, 2, 2, 200),
                                   (1, 17, 33, 4, 1, 256)])
def test_every_query_sees_every_key(shape, dtype, attend):
    check(attend, *make(*shape, dtype))


@pytest.mark.parametrize("slots", [1, 4, 100])
@pytest.mark.parametrize("block_length", [1, 8, 32, (1 << 31) - 1])
def test_blocks_see_themselves_and_those_before(block_length, slots, attend):
    check(attend, *make(1, 33, 200, 3, 1, 32), block_length=block_length, slots=slots)


@pytest.mark.parametrize("slots, expected", [(1, 1), (4, 2), (12, 5), (1000, 5)])
def test_keys_split_among_blocks(slots, expected, attend):
    _, splits = check(attend, *make(2, 3, 300, 4, 1, 64), slots=slots)
    assert splits in (expected, None)


@pytest.mark.parametrize("slots", [1, 100])
@pytest.mark.parametrize("block_length", [None, 16])
def test_masked_keys_may_be_nan_and_rows_without_keys_give_zeros(block_length, slots, attend):
    q, k, v = make(5, 6, 150, 4, 2, 32)
    key_mask = torch.zeros(5, 150, dtype=torch.bool)
    key_mask[0] = torch.rand(150, generator=torch.Generator().manual_seed(0)) < 0.5  # holes; row 1 has no key
    key_mask[2, :70] = True
    key_mask[3, 140:] = True  # so the first queries of a block-causal row see none
    key_mask[4] = True
    for x in (k, v):
        x[~key_mask] = torch.nan
    ours, _ = check(attend, q, k, v, key_mask, block_length, slots=slots)
    assert (ours[1] == 0).all() and ours.isfinite().all()


@pytest.mark.parametrize("slots", [1, 9])
@pytest.mark.parametrize("E", [64, 128, 256])
def test_masks_blocks_and_splits_of_larger_heads(E, slots, attend):
    q, k, v = make(1, 64, 190, 4, 2, E)
    key_mask = torch.rand(1, 190, generator=torch.Generator().manual_seed(1)) < 0.9
    key_mask[:, 64:128] = True  # tiles without a hole
    check(attend, q, k, v, key_mask, 40, slots=slots)


def test_rows_of_a_cache_are_read_where_they_are(attend):
    """Some rows of a larger cache, in any order and twice, of which a part of the positions is filled."""
    q, k, v = make(4, 5, 100, 4, 2, 64, rows=6)
    k[:, 80:], v[:, 80:] = torch.nan, torch.nan
    cache_rows = torch.tensor([5, 0, 3, 0])
    k[1], v[1] = torch.nan, torch.nan
    key_mask = torch.ones(4, 80, dtype=torch.bool)
    key_mask[1, 7:] = False
    for slots in (1, 50):
        check(attend, q, k[:, :80], v[:, :80], None, 32, cache_rows, slots=slots)
        check(attend, q, k[:, :80], v[:, :80], key_mask, None, cache_rows, slots=slots)


def test_heads_may_lie_in_any_order_of_strides(attend):
    q, k, v = make(2, 5, 70, 4, 2, 64)
    plain, _ = attend(q, k, v)
    k_view, v_view = torch.cat((k, v), 2).split(2, 2)
    assert not k_view.is_contiguous()
    ours, _ = attend(q.transpose(1, 2).contiguous().transpose(1, 2), k_view, v_view)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_huge_scores(scale, dtype, attend):
    q, k, v = make(1, 9, 100, 2, 1, 32, dtype)
    ours, _ = attend(q, k, v, None, None, scale)
    truth = reference.attend(*(x.double() for x in (q, k, v)), None, scale)
    assert ours.isfinite().all() and (ours.double() - truth).abs().max() < 2e-2


def test_no_keys_give_zeros(attend):
    ours, _ = attend(*make(2, 5, 0, 2, 1, 32), slots=10)
    assert ours.shape == (2, 5, 2, 32) and not ours.any()


def test_a_nan_shows_where_it_is_seen(attend):
    q, k, v = make(2, 3, 70, 2, 1, 32)
    v[1, 69, 0, 0] = torch.nan
    ours, _ = attend(q, k, v)
    assert ours[0].isfinite().all() and ours[1, :, :, 0].isnan().all()


class SaysGpu(torch.Tensor):
    is_cuda = property(lambda self: True)


@pytest.mark.parametrize("change, capability, reason", [
    (lambda q: q.float(), 8, "takes fp16 and bf16, not torch.float32"),
    (lambda q: q, 7, "needs a GPU of compute capability 8.0 or newer"),
    (lambda q: q[..., :24], 8, "takes head sizes that are multiples of 8 from 32 to 256, not 24"),
    (lambda q: q.repeat(1, 65, 1, 1), 8, "takes at most 64 queries, not 65"),
    (lambda q: q.requires_grad_(), 8, "has no backward; call it under torch.no_grad()"),
    (lambda q: q, 8, None)])
def test_it_says_what_it_cannot_run_on(change, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    q = torch.zeros(1, 1, 2, 32, dtype=torch.bfloat16)
    assert cuda.refuses(change(q).as_subclass(SaysGpu)) == reason
    assert cuda.refuses(q) == "needs a CUDA tensor"


def test_a_gradient_of_the_keys_alone_counts(monkeypatch):
    asked = []
    noting = DENSE_BACKENDS[0]._replace(refuses=lambda q: asked.append(q) or "only takes notes")
    monkeypatch.setitem(BACKENDS, "bidirectional_attention", (noting, DENSE_BACKENDS[-1]))
    attention._in_order.cache_clear()
    q, k, v = make(1, 3, 9, 2, 1, 32)
    bidirectional_attention(q, k, v)
    bidirectional_attention(q, k.requires_grad_(), v)
    with torch.no_grad():
        bidirectional_attention(q, k, v)
    monkeypatch.undo()
    attention._in_order.cache_clear()
    assert [x.requires_grad for x in asked] == [False, True, False] and not q.requires_grad


@pytest.mark.skipif(not ON_GPU, reason=f"cannot run here: {cuda.missing()}")
def test_the_host_never_waits_and_a_cuda_graph_follows_its_inputs():
    q, k, v = (x.cuda() for x in make(4, 32, 300, 14, 2, 64, rows=6))
    rows, key_mask = torch.tensor([5, 0, 3, 1]).cuda(), torch.ones(4, 300, dtype=torch.bool, device="cuda")

    def run():
        return cuda.masked_attention(q, k, v, Mask("dense", 32, key_mask, rows), 0.125)

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert run().data_ptr()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(run(), first)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    rows.copy_(torch.tensor([2, 2, 4, 0]))
    key_mask[1, 100:] = False
    q.mul_(0.5)
    graph.replay()
    assert torch.equal(captured, run()) and not torch.equal(captured, first)


@pytest.mark.skipif(not ON_GPU, reason=f"cannot run here: {cuda.missing()}")
@pytest.mark.parametrize("shape", [(0, 5, 7, 2, 1, 32), (2, 0, 7, 2, 1, 32)])
def test_no_queries(shape):
    q, k, v = (x.cuda() for x in make(*shape))
    out = cuda.masked_attention(q, k, v, Mask("dense"), 1.0)
    assert out.shape == q.shape
