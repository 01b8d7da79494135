"""Attention on a GPU, bf16, heads of Qwen2.5-0.5B and 7B, against PyTorch's kernels, and flash_attn where installed.

Dense and block diffusion: 8 rows of 4,096 positions; packed: as many positions in documents; decoding: 32
queries against 2,048 cached keys in 32 rows, replayed from a CUDA graph, so that launching does not count.
"""

import functools
import importlib.util
import inspect
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.device import DEVICE, captured, measure, mixed_ends, on_device, pick, skip_where_missing
from dllm_kernels import bidirectional_attention, bidirectional_attention_varlen, block_diffusion_attention
from dllm_kernels.attention import DENSE_BACKENDS, VARLEN_BACKENDS

SHAPES = pick({"0.5B": (14, 2, 64), "7B": (28, 4, 128)}, {"0.5B": (4, 2, 16), "7B": (4, 2, 32)})  # Hq, Hkv, E
B, L, DOCUMENT, BLOCK = pick((8, 4096, 512, 32), (2, 64, 16, 8))
CACHED = pick((32, 32, 2048), (4, 8, 64))  # rows, queries, keys
ROTATED = pick(3, 1)  # sets of cached keys, one after the other: one alone would stay in a GPU's L2 cache
LIBRARIES = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
pytestmark = on_device
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_direction = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])


def make_heads(*lengths: int, heads: tuple[int, int, int], dtype=torch.bfloat16, device: str = DEVICE):
    """q of the first length, k and v of the last, after the dimensions between: make_heads(Lq, B, Lk, heads=...)."""
    g = torch.Generator(device).manual_seed(0)
    Hq, Hkv, E = heads
    sizes = ((lengths[0], Hq), (lengths[-1], Hkv), (lengths[-1], Hkv))
    return [torch.randn(*lengths[1:-1], length, H, E, generator=g, device=device).to(dtype).requires_grad_()
            for length, H in sizes]


def document_ends(T: int, length: int, device: str = DEVICE):
    return torch.arange(0, T + 1, length, device=device, dtype=torch.int32)


def sdpa(q, k, v, library: SDPBackend | None = None):
    """Its users' layout, [B, H, L, E], is a view of ours; None lets PyTorch choose."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if library is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with sdpa_kernel(library):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def why_not(library: SDPBackend, heads) -> str | None:
    """Why this part of PyTorch's attention cannot run on such heads, None if it can."""
    try:
        sdpa(*heads, library)
    except RuntimeError as error:
        return f"PyTorch's {library.name} does not take this: {str(error).splitlines()[0]}"
    return None


def torch_varlen(q, k, v, cu_seqlens, longest: int):
    """`for_torch_varlen` repeats the heads before the measurement if this torch takes no grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **grouped)


def for_torch_varlen(q, k, v):
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return [q, k, v]
    group = q.shape[1] // k.shape[1]
    return [q, *(x.detach().repeat_interleave(group, 1).requires_grad_() for x in (k, v))]


def flash_attn_varlen(q, k, v, cu_seqlens, longest: int):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def block_diffusion_of(length: int, block_length: int):
    """FlexAttention's form of the mask of `block_diffusion_attention`."""

    def sees(batch, head, i, j):
        query, key = i % length // block_length, j % length // block_length
        noisy_query, noisy_key = i < length, j < length
        return torch.where(noisy_query, torch.where(noisy_key, query == key, key < query), ~noisy_key & (key <= query))

    return sees


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)


def flex(q, k, v, mask, attend=flex_attention):
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True)


def flex_mask(sees, length: int, device: str = DEVICE, create=create_block_mask):
    return create(sees, None, None, 2 * length, 2 * length, device=device)


def call(attend, heads, backward: bool):
    """One step as a function without arguments."""
    if backward:
        return lambda: torch.autograd.grad(out := attend(*heads), heads, out.detach())
    return lambda: attend(*(x.detach() for x in heads))


@each_direction
@each_shape
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("backend", [None, "triton"], ids=["auto", "triton"])
def bench_dense(paired, backend, library, shape, backward):
    """Promised: the automatic choice at 0.98 of the best library, Triton at 0.7 of cuDNN forward."""
    heads = make_heads(L, B, L, heads=SHAPES[shape])
    if reason := why_not(LIBRARIES[library], heads):
        pytest.skip(reason)
    skip_where_missing(DENSE_BACKENDS, backend, heads[0])
    ours = call(functools.partial(bidirectional_attention, backend=backend), heads, backward)
    triton_promise = 0.7 if library == "cudnn" and not backward else None
    Hq, _, E = SHAPES[shape]
    flop = 4 * B * L * L * Hq * E * (3.5 if backward else 1)
    measure(paired, ours, call(functools.partial(sdpa, library=LIBRARIES[library]), heads, backward),
            0.98 if backend is None else triton_promise, must_multiply_flop=flop)


@each_direction
@each_shape
@pytest.mark.parametrize("backend", [None, "triton", "cudnn"], ids=["auto", "triton", "cudnn"])
@pytest.mark.parametrize("baseline", ["torch_varlen", "flash_attn"])
@pytest.mark.parametrize("longest", [DOCUMENT, 2 * DOCUMENT], ids=["equal", "mixed"])
def bench_packed_documents(paired, longest, baseline, backend, shape, backward):
    """Documents of 512, or of 1 to 1,024. Promised over PyTorch's varlen_attn: 1.25 forward, 1.05 with the backward."""
    heads = make_heads(B * L, B * L, heads=SHAPES[shape])
    cu_seqlens = document_ends(B * L, DOCUMENT) if longest == DOCUMENT else mixed_ends(B * L, longest)
    skip_where_missing(VARLEN_BACKENDS, backend, heads[0] if backward else heads[0].detach())
    if DEVICE == "cpu":
        pytest.skip(f"{baseline} needs a GPU")
    if baseline == "torch_varlen":
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            pytest.skip("this torch has no torch.nn.attention.varlen")
        theirs, function = for_torch_varlen(*heads), torch_varlen
        promise = None if backend == "cudnn" else 1.05 if backward else 1.25
    else:
        if importlib.util.find_spec("flash_attn") is None:
            pytest.skip("flash_attn is not installed")
        theirs, function, promise = heads, flash_attn_varlen, None
    attend = functools.partial(bidirectional_attention_varlen, cu_seqlens=cu_seqlens, max_seqlen=longest,
                               backend=backend)
    measure(paired, call(attend, heads, backward),
            call(functools.partial(function, cu_seqlens=cu_seqlens, longest=longest), theirs, backward), promise)


@each_direction
@each_shape
@pytest.mark.parametrize("rebuilt", [True, False], ids=["mask_per_batch", "mask_made_before"])
@pytest.mark.parametrize("backend", [None, "triton"], ids=["auto", "triton"])
def bench_block_diffusion(paired, backend, rebuilt, shape, backward):
    """Training mask, blocks of 32, 2 x 4,096 positions in a row.

    Promised over compiled FlexAttention: 1.5 where its mask is built per batch, 1.15 where it is not.
    """
    heads, sees = make_heads(2 * L, B, 2 * L, heads=SHAPES[shape]), block_diffusion_of(L, BLOCK)
    skip_where_missing(DENSE_BACKENDS, backend, heads[0])
    if backward and DEVICE == "cpu":
        pytest.skip("FlexAttention has no backward on a CPU")
    made = flex_mask(sees, L)

    def baseline(q, k, v):
        mask = flex_mask(sees, L, create=compiled(create_block_mask)) if rebuilt else made
        return flex(q, k, v, mask, compiled(flex_attention))

    attend = functools.partial(block_diffusion_attention, block_length=BLOCK, backend=backend)
    measure(paired, call(attend, heads, backward), call(baseline, heads, backward), 1.5 if rebuilt else 1.15)


@each_shape
@pytest.mark.parametrize("library", ["chosen_by_torch", *LIBRARIES])
@pytest.mark.parametrize("backend", [None, "triton", "cuda"], ids=["auto", "triton", "cuda"])
def bench_decoding(paired, backend, library, shape):
    """32 queries against 2,048 cached keys of 32 rows. Promised: twice as fast as PyTorch's with enable_gqa."""
    rows, queries, keys = CACHED
    several = [[x.detach() for x in make_heads(queries, rows, keys, heads=SHAPES[shape])] for _ in range(ROTATED)]
    heads = several[0]
    chosen = LIBRARIES.get(library)
    if chosen is not None and (reason := why_not(chosen, heads)):
        pytest.skip(reason)
    skip_where_missing(DENSE_BACKENDS, backend, heads[0])
    measure(paired, captured(*(functools.partial(bidirectional_attention, *x, backend=backend) for x in several)),
            captured(*(functools.partial(sdpa, *x, chosen) for x in several)), 2 if backend is None else None,
            must_read_bytes=sum(x.nbytes for heads in several for x in heads))


@each_shape
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def bench_rows_of_a_cache(paired, backend, shape):
    """Half of the rows, read in place, against PyTorch's attention on a copy of them."""
    rows, queries, keys = CACHED
    several = [[x.detach() for x in make_heads(queries, rows, keys, heads=SHAPES[shape])] for _ in range(ROTATED)]
    taken = torch.arange(0, rows, 2, device=several[0][0].device)
    several = [(q[:len(taken)], k, v) for q, k, v in several]
    skip_where_missing(DENSE_BACKENDS, backend, several[0][0])

    def attend(q, k, v):
        return bidirectional_attention(q, k, v, cache_rows=taken, backend=backend)

    def attend_to_copies(q, k, v):
        return sdpa(q, k[taken], v[taken])

    measure(paired, *(captured(*(functools.partial(call, *heads) for heads in several))
                      for call in (attend, attend_to_copies)), 2)


@each_shape
@pytest.mark.parametrize("backend", [None, "triton", "cuda"], ids=["auto", "triton", "cuda"])
def bench_new_length(paired, backend, shape):
    """A new length of keys takes at most twice as long as one seen before."""
    skip_where_missing(DENSE_BACKENDS, backend, make_heads(BLOCK, 1, BLOCK, heads=SHAPES[shape])[0].detach())
    step = new_length(SHAPES[shape], backend, *pick((1024, 4096), (32, 512)))
    measure(paired, lambda: step(True), lambda: step(False), 0.5)


def new_length(heads, backend, first: int = 1024, longest: int = 4096, rows: int = 4, queries: int = 32,
               dtype=torch.bfloat16, device: str = DEVICE):
    """A function that attends to `first` cached keys or, if its argument is true, to a number that is new to it."""
    q, k, v = (x.detach() for x in make_heads(queries, rows, longest, heads=heads, dtype=dtype, device=device))
    lengths = count(first + 1, 7)

    def step(new: bool):
        length = next(lengths) if new else first
        return bidirectional_attention(q, k[:, :length], v[:, :length], backend=backend)

    step(False)
    return step
