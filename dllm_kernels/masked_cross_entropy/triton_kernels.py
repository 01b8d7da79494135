"""Masked cross-entropy in Triton: passes over rows of logits, without host synchronisation.

With z = logits after the soft cap, and y the target of a corrupted row:
    nll = log(total) + top - z[y],    top = max(z), total = sum(exp(z - top))
    d nll / d z[v] = exp(z[v] - top) / total - [v = y]
V words. top and total come from an online softmax (arXiv:1805.02867). A target out of range makes the loss NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .products import Chunk
from .rows import Form, Scale, Scales, Scored, with_rows_contiguous

ROW = {"WORDS": 4096, "num_warps": 8}  # of the kernels that read logits once
# Of the kernel that reads them twice, by bytes per number: a program on each multiprocessor, so that the rows at work
# stay in the cache.
CHUNK = {2: {"WORDS": 16384, "num_warps": 32}, 4: {"WORDS": 8192, "num_warps": 32}}

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
def _chunk_kernel(nlls, logits, targets, row_scale, probability_scale, live, logits_stride, softcap, C, V,
                  WORDS: tl.constexpr, GRADIENT: tl.constexpr, CLEAR: tl.constexpr):
    """nll of each row [C], 0 from row `live` on; with GRADIENT the gradient of the loss in the place of the logits,
    and with CLEAR zeros in the place of the rows that are not live."""
    count = C
    if live is not None:
        count = tl.minimum(tl.load(live), C).to(tl.int32)
    for row in range(tl.program_id(0), C, tl.num_programs(0)):
        n = tl.cast(row, tl.int64)
        if row < count:
            nll, top, total = _row_statistics(logits + n * logits_stride, tl.load(targets + n), softcap, V, WORDS)
            tl.store(nlls + n, nll)
            if GRADIENT:
                t_scale = tl.load(row_scale + n)
                if probability_scale is not None:
                    t_scale += tl.load(probability_scale + n) * tl.exp(-nll)
                _overwrite(logits + n * logits_stride, tl.load(targets + n), top, t_scale / total, t_scale, softcap, V,
                           WORDS)
        else:
            tl.store(nlls + n, 0.0)
            if CLEAR:
                for start in range(0, V, WORDS):
                    v = start + tl.arange(0, WORDS)
                    tl.store(logits + n * logits_stride + v, tl.zeros((WORDS,), logits.dtype.element_ty), mask=v < V)


@triton.jit
def _row_statistics(row, target, softcap, V, WORDS: tl.constexpr):
    """nll, top and total of a row; nll is NaN for a target out of range."""
    top, total = -3e38, 0.0  # finite: a block of -inf would give nan
    for start in range(0, V, WORDS):
        v = start + tl.arange(0, WORDS)
        z = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        if softcap is not None:
            z = tl.where(v < V, _soft_cap(z, softcap), -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    inside = (target >= 0) & (target < V)
    target_logit = tl.load(row + tl.where(inside, target, 0)).to(tl.float32)
    if softcap is not None:
        target_logit = _soft_cap(target_logit, softcap)
    return tl.where(inside, tl.log(total) + (top - target_logit), float("nan")), top, total


@triton.jit
def _overwrite(row, target, top, p_scale, t_scale, softcap, V, WORDS: tl.constexpr):
    tl.debug_barrier()  # every thread has read the target's logit
    for start in range(0, V, WORDS):
        v = start + tl.arange(0, WORDS)
        z = tl.load(row + v, mask=v < V, other=0.0).to(tl.float32)
        g = _gradient(z, v == target, top, p_scale, t_scale, softcap)
        tl.store(row + v, g.to(row.dtype.element_ty), mask=v < V)


@triton.jit
def _kl_kernel(divergences, logits, teacher, row_scale, live, logits_stride, teacher_stride, temperature, C, V,
               WORDS: tl.constexpr, GRADIENT: tl.constexpr, CLEAR: tl.constexpr):
    """As `_chunk_kernel`, of the divergence of the logits from the teacher's."""
    count = C
    if live is not None:
        count = tl.minimum(tl.load(live), C).to(tl.int32)
    for row in range(tl.program_id(0), C, tl.num_programs(0)):
        n = tl.cast(row, tl.int64)
        ours, theirs = logits + n * logits_stride, teacher + n * teacher_stride
        if row < count:
            q_top, q_total, p_top, p_total, apart = -3e38, 0.0, -3e38, 0.0, 0.0
            for start in range(0, V, WORDS):
                v = start + tl.arange(0, WORDS)
                z = tl.load(ours + v, mask=v < V, other=-float("inf")).to(tl.float32) / temperature
                t = tl.load(theirs + v, mask=v < V, other=-float("inf")).to(tl.float32) / temperature
                new_q, new_p = tl.maximum(q_top, tl.max(z, 0)), tl.maximum(p_top, tl.max(t, 0))
                q_total = q_total * tl.exp(q_top - new_q) + tl.sum(tl.exp(z - new_q), 0)
                p, shrink = tl.exp(t - new_p), tl.exp(p_top - new_p)
                p_total = p_total * shrink + tl.sum(p, 0)
                apart = apart * shrink + tl.sum(tl.where(p > 0, p * (t - z), 0.0), 0)
                q_top, p_top = new_q, new_p
            tl.store(divergences + n, apart / p_total - (tl.log(p_total) + p_top) + (tl.log(q_total) + q_top))
            if GRADIENT:
                factor = tl.load(row_scale + n) / temperature
                tl.debug_barrier()
                for start in range(0, V, WORDS):
                    v = start + tl.arange(0, WORDS)
                    z = tl.load(ours + v, mask=v < V, other=0.0).to(tl.float32) / temperature
                    t = tl.load(theirs + v, mask=v < V, other=0.0).to(tl.float32) / temperature
                    g = factor * (tl.exp(z - q_top) / q_total - tl.exp(t - p_top) / p_total)
                    tl.store(ours + v, g.to(logits.dtype.element_ty), mask=v < V)
        else:
            tl.store(divergences + n, 0.0)
            if CLEAR:
                for start in range(0, V, WORDS):
                    v = start + tl.arange(0, WORDS)
                    tl.store(ours + v, tl.zeros((WORDS,), logits.dtype.element_ty), mask=v < V)


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


def row_pass(chunk: Chunk, scale: Scale, softcap: float | None, wanted: bool) -> Tensor:
    """See `products.RowPass`."""
    z = chunk.logits
    nll = torch.empty_like(scale.plain)
    with torch.cuda.device_of(z):
        _chunk_kernel[(min(len(z), _multiprocessors(z)),)](
            nll, z, _narrow(chunk.targets, z.shape[1]), *scale, chunk.live, z.stride(0), _float(softcap), *z.shape,
            GRADIENT=wanted, CLEAR=wanted and chunk.clear, **CHUNK[z.element_size()])
    return nll


def kl_row_pass(chunk: Chunk, teacher: Tensor, scale: Scale, temperature: float, wanted: bool) -> Tensor:
    """See `kl_divergence.Row`."""
    z = chunk.logits
    found = torch.empty_like(scale.plain)
    with torch.cuda.device_of(z):
        _kl_kernel[(min(len(z), _multiprocessors(z)),)](
            found, z, teacher, scale.plain, chunk.live, z.stride(0), teacher.stride(0), temperature, *z.shape,
            GRADIENT=wanted, CLEAR=wanted and chunk.clear, **CHUNK[z.element_size()])
    return found


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 2


def _float(softcap: float | None) -> float | None:
    return None if softcap is None else float(softcap)  # an int would be another kernel, and 1 a third


def _narrow(targets: Tensor, V: int) -> Tensor:
    """The targets in 32 bits; those out of range stay out of range."""
    return targets.clamp(-1, V).int()


def _statistics_of(shape, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """top, total and target logit of rows without words; kernels overwrite those of the corrupted rows."""
    top, target_logit = (torch.zeros(shape, dtype=torch.float32, device=like.device) for _ in range(2))
    return top, torch.ones_like(top), target_logit
