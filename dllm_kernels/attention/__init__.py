"""Attention in both directions: dense, padded, packed and block-causal.

out[i] = sum over the keys j that query i may see of softmax_j(scale * q[i] . k[j]) v[j]

B batch, L positions, T packed positions, Hq query and Hkv key heads (grouped-query: Hq a multiple of Hkv), E head size.
Every function takes bf16, fp16 and fp32, any strides, and sums in fp32. There is no dropout.

Gradients of "triton" are the same bits in every run, because nothing is added atomically. Those of the other backends
are so under ``torch.use_deterministic_algorithms(True)``, where PyTorch avoids cuDNN, and its Flash and flash_attn sum
in a fixed order. choices.py has the order in which backends are tried.
"""

import functools

import torch
from torch import Tensor

from .. import triton_support
from ..custom_op import Differentiable
from ..dispatch import Backend, choose
from . import cuda, flash, reference, sdpa
from .choices import preferred
from .reference import Mask

__all__ = ["bidirectional_attention", "bidirectional_attention_varlen", "block_diffusion_attention", "masked_attention"]


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    return triton_support.kernels("attention").forward(q, k, v, mask, scale)


def _refused_by_triton(q: Tensor) -> str | None:
    if q.ndim >= 3 and (q.shape[-1] % 8 or not 32 <= q.shape[-1] <= 256):
        return f"takes head sizes that are multiples of 8 from 32 to 256, not {q.shape[-1]}"
    return triton_support.refuses(q)


SDPA, REFERENCE = Backend("sdpa", sdpa.masked_attention), Backend("reference", reference.masked_attention)
TRITON = Backend("triton", Differentiable("attention in Triton", _triton_forward,
                                          triton_support.on_triton("attention", "backward"), 3,
                                          'use backend="reference"'), triton_support.missing, _refused_by_triton)
CUDA = Backend("cuda", cuda.masked_attention, cuda.missing, cuda.refuses)
FLASH = (Backend("torch_varlen", flash.varlen_by_torch, flash.missing_in_torch, flash.refuses),
         Backend("flash_attn", flash.varlen_by_flash_attn, flash.missing, flash.refuses))
CUDNN = Backend("cudnn", flash.varlen_by_cudnn, flash.missing_cudnn, flash.refuses_cudnn)
DENSE_BACKENDS = (SDPA, TRITON, CUDA, REFERENCE)
VARLEN_BACKENDS = (FLASH[0], SDPA, TRITON, FLASH[1], REFERENCE, CUDNN)  # cudnn by name alone, until it is measured
BLOCK_DIFFUSION_BACKENDS = (SDPA, TRITON, REFERENCE)
BACKENDS = {"bidirectional_attention": DENSE_BACKENDS, "bidirectional_attention_varlen": VARLEN_BACKENDS,
            "block_diffusion_attention": BLOCK_DIFFUSION_BACKENDS}


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None,
                            block_length: int | None = None, cache_rows: Tensor | None = None,
                            scale: float | None = None, backend: str | None = None) -> Tensor:
    """Attention of every query to every key, or to the keys that `key_mask` and `block_length` leave.

    Drop-in for ``F.scaled_dot_product_attention`` in the layout [B, L, H, E], with grouped-query heads.

    Args:
        q: [B, Lq, Hq, E]. k, v: [B, Lk, Hkv, E]. Lq and Lk are free: a few queries against cached keys is decoding.
        key_mask: [B, Lk] bool, True = may be attended; a query without a key gives zeros, and zero gradients.
        block_length: query i sees key j iff j // block_length <= i // block_length (block diffusion at inference,
            arXiv:2503.09573); 1 is causal. When Lq < Lk the queries are the last Lq positions.
        cache_rows: [B] int64, the row of k and v that each row of q reads; None: its own. k and v may then have any
            number of rows, such as those of a cache, which "triton" and "cuda" read in place and the others copy. A
            cache is one tensor, of which k[:, :length] is a view; there are no pages. Values are checked on a CPU.
        scale: of the scores; None takes E ** -0.5.
        backend: "sdpa", "triton", "cuda" (few queries, no gradients) or "reference"; None takes the first of choices.py
            that can run.
    Returns: [B, Lq, Hq, E] in q's dtype.
    Raises: ValueError if shapes, dtypes or devices disagree, or if `backend` cannot run here; the message says why.
    """
    mask = Mask("dense", block_length, key_mask, cache_rows)
    return _attend("bidirectional_attention", q, k, v, mask, scale, backend)


def bidirectional_attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
                                   block_length: int | None = None, scale: float | None = None,
                                   backend: str | None = None) -> Tensor:
    """Attention within each packed document, none across. Drop-in for flash_attn_varlen_func with causal=False.

    Args:
        q: [T, Hq, E]. k, v: [T, Hkv, E].
        cu_seqlens: [S + 1] int32, from 0 to T: document s holds the positions cu_seqlens[s] to cu_seqlens[s + 1].
        max_seqlen: positions of the longest document.
        block_length, scale: as `bidirectional_attention`; blocks are counted within each document.
        backend: "torch_varlen" (PyTorch's FlashAttention), "flash_attn" (if installed) or "cudnn" (without gradients,
            not measured, never chosen by itself), all on a GPU, for block_length None or 1; "sdpa", "triton" or
            "reference"; None as there.
    Returns: [T, Hq, E] in q's dtype.
    Raises: ValueError as `bidirectional_attention`. The values of cu_seqlens are checked on a CPU; a GPU would wait.
    """
    mask = Mask("packed", block_length, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    return _attend("bidirectional_attention_varlen", q, k, v, mask, scale, backend)


def block_diffusion_attention(q: Tensor, k: Tensor, v: Tensor, block_length: int, *, cu_seqlens: Tensor | None = None,
                              causal: bool = False, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Attention of block-diffusion training (BD3-LM, arXiv:2503.09573): a noisy copy of the text, then a clean one.

    A noisy block sees itself and the clean blocks before it; a clean block sees the clean blocks up to itself.

    Args:
        q: [B, 2L, Hq, E]. k, v: [B, 2L, Hkv, E]: L noisy positions, then the same L clean ones.
        block_length: positions of a block; the last block may be shorter.
        cu_seqlens: [S + 1] int32, from 0 to B * L: documents packed in the rows (of one copy), each within its row; no
            attention across documents, blocks are counted within each. None: each row is one document.
        causal: of its own block, too, a position sees only itself and what is before it, in both copies.
        scale, backend: as `bidirectional_attention`.
    Returns: [B, 2L, Hq, E] in q's dtype.
    Raises: ValueError as `bidirectional_attention`.
    """
    mask = Mask("block_diffusion", block_length, cu_seqlens=cu_seqlens, causal=causal)
    return _attend("block_diffusion_attention", q, k, v, mask, scale, backend)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of each query to keys of its own: PyTorch's, for masks of no form that would let a kernel skip work.

    Args:
        q: [B, Lq, Hq, E]. k, v: [B, Lk, Hkv, E].
        visible: [B, Lq, Lk] or [1, Lq, Lk] bool; a query without a key gives zeros, and zero gradients.
        scale: as `bidirectional_attention`.
    Returns: [B, Lq, Hq, E] in q's dtype.
    Raises: ValueError if shapes, dtypes or devices disagree.
    """
    op, (q, k, v) = "masked_attention", _autocast(q, k, v)
    _check(op, q, k, v, Mask("dense"))
    if visible.dtype != torch.bool or visible.ndim != 3 or len(visible) not in (1, len(q)) or (
            visible.shape[1:] != (q.shape[1], k.shape[1])):
        raise ValueError(f"{op} takes visible {[len(q), q.shape[1], k.shape[1]]} bool, or one for all rows, not "
                         f"{list(visible.shape)} {visible.dtype}")
    return sdpa.attend(q, k, v, visible, q.shape[-1] ** -0.5 if scale is None else scale)


def _attend(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None, backend: str | None) -> Tensor:
    q, k, v = _autocast(q, k, v)
    _check(op, q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    train = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if train and mask.cache_rows is not None:
        k, v, mask = k[mask.cache_rows], v[mask.cache_rows], mask._replace(cache_rows=None)
    if not torch.compiler.is_compiling():
        return _choose(op, q, k, mask, backend, train).run(q, k, v, mask, scale)
    if mask.kind == "packed" and len(q) > 0:
        chosen = _flash_chosen(q.device, q.dtype, q.shape[-1], mask.block_length, backend, train)
        if chosen is not None:
            return FLASH[chosen].run(q, k, v, mask, scale)
    return _OPERATORS[op](q, k, v, mask, scale, backend, train)


def _autocast(*heads: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as PyTorch's own attention would take them under autocast."""
    kind = heads[0].device.type
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in heads) if torch.is_autocast_enabled(kind) else heads


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    ndim = 3 if mask.kind == "packed" else 4
    if not (q.ndim == k.ndim == v.ndim == ndim and k.shape == v.shape and q.shape[-1] == k.shape[-1]
            and (ndim == 3 or mask.cache_rows is not None or len(q) == len(k))
            and k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0):
        layout = "[B, Lq, Hq, E], k and v [B, Lk, Hkv, E]" if ndim == 4 else "[T, Hq, E], k and v [T, Hkv, E]"
        raise ValueError(f"{op} takes q {layout}, Hq a multiple of Hkv, not {[list(x.shape) for x in (q, k, v)]}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"{op}: q, k and v must share dtype and device, not "
                         f"{[f'{x.dtype} on {x.device}' for x in (q, k, v)]}")
    if mask.block_length is not None and mask.block_length < 1:
        raise ValueError(f"{op}: block_length must be at least 1, not {mask.block_length}")
    queries, keys = q.shape[-3], k.shape[-3]
    if mask.kind == "packed" and queries != keys:
        raise ValueError(f"{op} takes q and k of the same documents, but q has {queries} positions and k {keys}")
    if mask.kind == "block_diffusion" and (queries % 2 or queries != keys):
        raise ValueError(f"{op} takes 2L queries and 2L keys, the noisy copy then the clean one, not {queries} and "
                         f"{keys}")
    if mask.kind == "dense" and mask.block_length is not None and queries > keys:
        raise ValueError(f"{op}: with block_length the queries are the last of the keys, but there are {queries} "
                         f"queries and {keys} keys; give the keys of the queries too")
    if mask.key_mask is not None or mask.cache_rows is not None or mask.cu_seqlens is not None:
        _check_mask(op, q, k, mask)


def _check_mask(op: str, q: Tensor, k: Tensor, mask: Mask) -> None:
    """Check shapes, dtypes and devices of the mask's tensors; on a CPU their values, which would stall a GPU."""
    for name, tensor, shape, dtype in (("key_mask [B, Lk]", mask.key_mask, (len(q), k.shape[1]), torch.bool),
                                       ("cache_rows [B]", mask.cache_rows, (len(q),), torch.int64)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise ValueError(f"{op} takes {name} = {list(shape)} {dtype}, not {list(tensor.shape)} {tensor.dtype}")
    rows, ends = mask.cache_rows, mask.cu_seqlens
    if ends is not None and (ends.ndim != 1 or ends.dtype != torch.int32 or len(ends) < 2):
        raise ValueError(f"{op} takes cu_seqlens [S + 1] int32, beginning with 0, not {list(ends.shape)} {ends.dtype}")
    for name, tensor in (("key_mask [B, Lk]", mask.key_mask), ("cache_rows [B]", rows), ("cu_seqlens", ends)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{op} takes {name} on the device of q, {q.device}, not on {tensor.device}; move it there")
    if torch.compiler.is_compiling() or not q.is_cpu:
        return
    if rows is not None and ((rows < 0) | (rows >= len(k))).any():
        raise ValueError(f"{op} takes cache_rows from 0 to {len(k) - 1}, the rows of k and v, not {rows.tolist()}")
    positions = len(q) if mask.kind == "packed" else len(q) * q.shape[1] // 2
    if ends is not None and (ends[0] != 0 or ends[-1] != positions or (ends.diff() < 0).any()):
        raise ValueError(f"{op} takes cu_seqlens that rise from 0 to the {positions} packed positions, not "
                         f"{ends.tolist()}")


@functools.cache
def _in_order(op: str, kind: str, device: torch.device, blocks: bool = False) -> tuple[Backend, ...]:
    """The backends of an operation, in the order of choices.py."""
    backends = BACKENDS[op]
    if blocks:
        backends = (b._replace(refuses=flash.refuses_blocks) if b in (*FLASH, CUDNN) else b for b in backends)
    return tuple(sorted(backends, key=preferred(kind, device)))


def _choose(op: str, q: Tensor, k: Tensor, mask: Mask, name: str | None, train: bool) -> Backend:
    few = mask.kind == "dense" and q.shape[1] <= cuda.QUERIES and q.shape[1] < k.shape[1]
    backends = _in_order(op, "decoding" if few else mask.kind, q.device,
                         mask.kind == "packed" and mask.block_length not in (None, 1))
    if q.requires_grad != train:  # a backend without a backward sees q alone
        q = q.detach().requires_grad_(train)
    return choose(op, backends, name, q)


@torch.compiler.assume_constant_result
def _flash_chosen(device: torch.device, dtype: torch.dtype, head_size: int, block_length: int | None,
                  backend: str | None, train: bool) -> int | None:
    """The place in FLASH of the backend that packed documents take, None if it is another.

    torch.compile traces these two as they are: they are operators already, and torch.func cannot differentiate them.
    """
    q = torch.empty(1, 1, head_size, dtype=dtype, device=device)
    try:
        chosen = _choose("bidirectional_attention_varlen", q, q, Mask("packed", block_length), backend, train)
    except ValueError:  # the operator gives the reasons
        return None
    return next((place for place, flash in enumerate(FLASH) if flash.name == chosen.name), None)


def _define(op: str):
    """The operator for torch.compile. Triton's backward uses its forward's results; the others compute them again."""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, backend: str | None,
                train: bool) -> tuple[Tensor, Tensor]:
        run = _choose(op, q, k, mask, backend, train).run
        if isinstance(run, Differentiable):
            return run.forward(q, k, v, mask, scale)
        return run(q, k, v, mask, scale).contiguous(), torch.zeros(_lse_shape(q), dtype=torch.float32, device=q.device)

    def backward(grad, outputs, wanted, q, k, v, mask, scale, backend, train):
        run = _choose(op, q, k, mask, backend, train).run
        if isinstance(run, Differentiable):
            return run.backward(grad, outputs, wanted, q, k, v, mask, scale)
        gradients = torch.func.vjp(lambda *heads: run(*heads, mask, scale), q, k, v)[1](grad)
        return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]

    def fake(q, k, v, mask, scale, backend, train):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        return out, q.new_empty(_lse_shape(q), dtype=torch.float32)

    return Differentiable(op, forward, backward, 3, "").register(op, fake)


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (1 if q.ndim == 3 else q.shape[0], q.shape[-2], q.shape[-3])


_OPERATORS = {op: _define(op) for op in BACKENDS}
