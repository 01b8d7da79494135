"""Attention in both directions: dense, padded, packed and block-causal.

out[i] = sum over the keys j that query i may see of softmax_j(scale * q[i] . k[j]) v[j]

B batch, L positions, T packed positions, Hq query and Hkv key heads (grouped-query: Hq a multiple of Hkv), E head size.
Every function takes bf16, fp16 and fp32, any strides, and sums in fp32. There is no dropout.

Gradients of "triton" are the same bits in every run: nothing is added atomically. Those of the other backends are under
``torch.use_deterministic_algorithms(True)``: there PyTorch leaves cuDNN out, and its Flash and flash_attn add up in a
fixed order. Which backend is tried first is in choices.py.
"""

import functools
import importlib

import torch
from torch import Tensor

from dllm_kernels import triton_support
from dllm_kernels.attention import cuda, flash, reference, sdpa
from dllm_kernels.attention.choices import preferred
from dllm_kernels.dispatch import Backend, choose
from dllm_kernels.operators import define_operator

__all__ = ["bidirectional_attention", "bidirectional_attention_varlen", "block_diffusion_attention"]


def _on_triton(function: str) -> Backend:
    """A function of triton_kernels.py, which imports Triton, so not before it is called."""

    def kernels():
        return importlib.import_module("dllm_kernels.attention.triton_kernels")

    return Backend("triton", lambda *arguments: getattr(kernels(), function)(*arguments), triton_support.missing,
                   lambda tensor: kernels().refuses(tensor))


DENSE_BACKENDS = (Backend("sdpa", sdpa.bidirectional_attention), _on_triton("bidirectional_attention"),
                  Backend("cuda", cuda.bidirectional_attention, cuda.missing, cuda.refuses),
                  Backend("reference", reference.bidirectional_attention))
VARLEN_BACKENDS = (Backend("torch_varlen", flash.varlen_by_torch, flash.missing_in_torch, flash.refuses),
                   Backend("sdpa", sdpa.bidirectional_attention_varlen), _on_triton("bidirectional_attention_varlen"),
                   Backend("flash_attn", flash.varlen_by_flash_attn, flash.missing, flash.refuses),
                   Backend("reference", reference.bidirectional_attention_varlen))
BLOCK_DIFFUSION_BACKENDS = (Backend("sdpa", sdpa.block_diffusion_attention), _on_triton("block_diffusion_attention"),
                            Backend("reference", reference.block_diffusion_attention))
FLASH = ("torch_varlen", "flash_attn")
BACKENDS = {"bidirectional_attention": DENSE_BACKENDS, "bidirectional_attention_varlen": VARLEN_BACKENDS,
            "block_diffusion_attention": BLOCK_DIFFUSION_BACKENDS}


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None,
                            block_length: int | None = None, cache_rows: Tensor | None = None,
                            scale: float | None = None, backend: str | None = None) -> Tensor:
    """Every query attends to every key, or to those that `key_mask` and `block_length` leave.

    Drop-in for ``F.scaled_dot_product_attention`` in the layout [B, L, H, E], with grouped-query heads.

    Args:
        q: [B, Lq, Hq, E]. k, v: [B, Lk, Hkv, E]. Lq and Lk are free: a few queries against cached keys is decoding.
        key_mask: [B, Lk] bool, True = may be attended; a query that no key is left for gives zeros, and zero gradients.
        block_length: query i sees key j iff j // block_length <= i // block_length (block diffusion at inference,
            arXiv:2503.09573); 1 is causal. When Lq < Lk the queries are the last Lq positions.
        cache_rows: [B] int64, the row of k and v that each row of q reads; None: its own. k and v may then have any
            number of rows: those of a cache, which "triton" and "cuda" read where they are, the others copy. A cache is
            one tensor, of which k[:, :length] is a view; there are no pages. Values are checked on the CPU only.
        scale: of the scores; None takes E ** -0.5.
        backend: "sdpa", "triton", "cuda" (few queries, no gradients) or "reference"; None takes the first of choices.py
            that can run.
    Returns: [B, Lq, Hq, E] in q's dtype.
    Raises: ValueError if shapes, dtypes or devices disagree, or if `backend` cannot run here; the message says why.
    """
    q, k, v = _cast_under_autocast(q, k, v)
    _check("bidirectional_attention", q, k, v, 4, block_length, cached=cache_rows is not None)
    if key_mask is not None:
        _check_tensor("bidirectional_attention", "key_mask [B, Lk]", key_mask, (len(q), k.shape[1]), torch.bool, q)
    if cache_rows is not None:
        _check_tensor("bidirectional_attention", "cache_rows [B]", cache_rows, (len(q),), torch.int64, q)
        _check_cache_rows(cache_rows, len(k))
    if block_length is not None and q.shape[1] > k.shape[1]:
        raise ValueError(f"bidirectional_attention: with block_length the queries are the last of the keys, but there "
                         f"are {q.shape[1]} queries and {k.shape[1]} keys; give the keys of the queries too")
    run = _dense if torch.compiler.is_compiling() else _run_dense
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(q, k, v, key_mask, block_length, cache_rows, scale, backend)


def bidirectional_attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
                                   block_length: int | None = None, scale: float | None = None,
                                   backend: str | None = None) -> Tensor:
    """Packed documents: attention within each, none across. Drop-in for flash_attn_varlen_func with causal=False.

    Args:
        q: [T, Hq, E]. k, v: [T, Hkv, E].
        cu_seqlens: [S + 1] int32, from 0 to T: document s holds the positions cu_seqlens[s] to cu_seqlens[s + 1].
        max_seqlen: positions of the longest document.
        block_length, scale: as `bidirectional_attention`; blocks are counted within each document.
        backend: "torch_varlen" (PyTorch's FlashAttention) and "flash_attn" (where installed), both on a GPU, for
            block_length None or 1; "sdpa", "triton" or "reference"; else as there.
    Returns: [T, Hq, E] in q's dtype.
    Raises: ValueError as `bidirectional_attention`. The values of cu_seqlens are checked on the CPU only: on a GPU that
        would be to wait.
    """
    q, k, v = _cast_under_autocast(q, k, v)
    _check("bidirectional_attention_varlen", q, k, v, 3, block_length)
    _check_cu_seqlens("bidirectional_attention_varlen", cu_seqlens, len(q), q)
    if len(q) != len(k):
        raise ValueError(f"bidirectional_attention_varlen takes q and k of the same documents, but q has {len(q)} "
                         f"positions and k {len(k)}")
    run = _varlen if torch.compiler.is_compiling() else _run_varlen
    return run(q, k, v, cu_seqlens, max_seqlen, block_length, q.shape[-1] ** -0.5 if scale is None else scale, backend)


def block_diffusion_attention(q: Tensor, k: Tensor, v: Tensor, block_length: int, *, cu_seqlens: Tensor | None = None,
                              scale: float | None = None, backend: str | None = None) -> Tensor:
    """The attention of block-diffusion training (BD3-LM, arXiv:2503.09573): a noisy copy of the text, then a clean one.

    A noisy block sees itself and the clean blocks before it; a clean block sees the clean blocks up to itself.

    Args:
        q: [B, 2L, Hq, E]. k, v: [B, 2L, Hkv, E]: L noisy positions, then the same L clean ones.
        block_length: positions of a block; the last block may be shorter.
        cu_seqlens: [S + 1] int32, from 0 to B * L: documents packed in the rows (of one copy), each within its row; no
            attention across documents, blocks are counted within each. None: each row is one document.
        scale, backend: as `bidirectional_attention`.
    Returns: [B, 2L, Hq, E] in q's dtype.
    Raises: ValueError as `bidirectional_attention`.
    """
    q, k, v = _cast_under_autocast(q, k, v)
    _check("block_diffusion_attention", q, k, v, 4, block_length)
    if q.shape[1] % 2 or q.shape[1] != k.shape[1]:
        raise ValueError(f"block_diffusion_attention takes 2L queries and 2L keys, the noisy copy then the clean one, "
                         f"not {q.shape[1]} and {k.shape[1]}")
    if cu_seqlens is not None:
        _check_cu_seqlens("block_diffusion_attention", cu_seqlens, len(q) * q.shape[1] // 2, q)
    run = _block_diffusion if torch.compiler.is_compiling() else _run_block_diffusion
    return run(q, k, v, block_length, cu_seqlens, q.shape[-1] ** -0.5 if scale is None else scale, backend)


def _cast_under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, all three in its dtype, as PyTorch casts those of its own attention."""
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, ndim: int, block_length: int | None, cached: bool = False) -> None:
    if not (q.ndim == k.ndim == v.ndim == ndim and k.shape == v.shape and q.shape[-1] == k.shape[-1]
            and (ndim == 3 or cached or len(q) == len(k)) and k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0):
        layout = "[B, Lq, Hq, E], k and v [B, Lk, Hkv, E]" if ndim == 4 else "[T, Hq, E], k and v [T, Hkv, E]"
        raise ValueError(f"{op} takes q {layout}, Hq a multiple of Hkv, not {[list(x.shape) for x in (q, k, v)]}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"{op}: q, k and v must share dtype and device, not "
                         f"{[f'{x.dtype} on {x.device}' for x in (q, k, v)]}")
    if block_length is not None and block_length < 1:
        raise ValueError(f"{op}: block_length must be at least 1, not {block_length}")


def _check_tensor(op: str, wanted: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, q: Tensor) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{op} takes {wanted} = {list(shape)} {dtype}, not {list(tensor.shape)} {tensor.dtype}")
    _check_device(op, wanted, tensor, q)


def _check_device(op: str, name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{op} takes {name} on the device of q, {q.device}, not on {tensor.device}; move it there")


def _check_cache_rows(cache_rows: Tensor, count: int) -> None:
    if cache_rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if ((cache_rows < 0) | (cache_rows >= count)).any():
        raise ValueError(f"bidirectional_attention takes cache_rows from 0 to {count - 1}, the rows of k and v, not "
                         f"{cache_rows.tolist()}")


def _check_cu_seqlens(op: str, cu_seqlens: Tensor, count: int, q: Tensor) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        raise ValueError(f"{op} takes cu_seqlens [S + 1] int32, beginning with 0, not {list(cu_seqlens.shape)} "
                         f"{cu_seqlens.dtype}")
    _check_device(op, "cu_seqlens", cu_seqlens, q)
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != count or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"{op} takes cu_seqlens that rise from 0 to the {count} packed positions, not "
                         f"{cu_seqlens.tolist()}")


@functools.cache
def _in_order(op: str, kind: str, device: torch.device, blocks: bool = False) -> tuple[Backend, ...]:
    """The backends of an operation, those first that choices.py prefers there."""
    backends = BACKENDS[op]
    if blocks:
        backends = (b._replace(refuses=flash.refuses_blocks) if b.name in FLASH else b for b in backends)
    return tuple(sorted(backends, key=preferred(kind, device)))


def _choose(op: str, kind: str, name: str | None, q: Tensor, k: Tensor, v: Tensor, blocks: bool = False) -> Backend:
    if not q.requires_grad and torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        q = q.detach().requires_grad_()  # a backend is asked about q alone, and some have no backward
    return choose(op, _in_order(op, kind, q.device, blocks), name, q)


def _run_dense(q, k, v, key_mask, block_length, cache_rows, scale, backend):
    kind = "decoding" if q.shape[1] <= cuda.QUERIES and q.shape[1] < k.shape[1] else "dense"
    chosen = _choose("bidirectional_attention", kind, backend, q, k, v)
    return chosen.run(q, k, v, key_mask, block_length, scale, cache_rows)


def _run_varlen(q, k, v, cu_seqlens, max_seqlen, block_length, scale, backend):
    blocks = block_length not in (None, 1)
    chosen = _choose("bidirectional_attention_varlen", "packed", backend, q, k, v, blocks)
    return chosen.run(q, k, v, cu_seqlens, max_seqlen, block_length, scale)


def _run_block_diffusion(q, k, v, block_length, cu_seqlens, scale, backend):
    chosen = _choose("block_diffusion_attention", "block_diffusion", backend, q, k, v)
    return chosen.run(q, k, v, block_length, cu_seqlens, scale)


def _fake(q, *rest):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _contiguous(run):
    return lambda *args: run(*args).contiguous()


_dense = define_operator(
    "bidirectional_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, int? block_length, Tensor? cache_rows, float scale, str? backend",
    _contiguous(_run_dense), _fake, differentiable=(0, 1, 2))
_varlen = define_operator(
    "bidirectional_attention_varlen",
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, int? block_length, float scale, str? backend",
    _contiguous(_run_varlen), _fake, differentiable=(0, 1, 2))
_block_diffusion = define_operator(
    "block_diffusion_attention",
    "Tensor q, Tensor k, Tensor v, int block_length, Tensor? cu_seqlens, float scale, str? backend",
    _contiguous(_run_block_diffusion), _fake, differentiable=(0, 1, 2))
