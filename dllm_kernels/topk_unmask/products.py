"""Token and confidence from hidden states and the head on a GPU, in one of two ways, chosen by a count.

Many rows: PyTorch multiplies a chunk of them (cuBLAS), with fp32 logits, so that near ties are not rounded to equals;
the backend's pass over rows of logits follows. Nothing of the head is read again, to sample or to filter.
Few rows, or rows of which only the GPU knows which are asked for: a Triton kernel reads the head once, multiplies the
rows asked for and reduces their logits in registers, see `triton_kernels`. (PyTorch's products of groups of rows, which
could leave the others out, round logits to 16 bits.) Without Triton all rows are multiplied.

`python -m benchmarks.predict` has the count behind FEW. No host waits.
n rows to score, R rows of inputs, V words, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import triton_support
from ..chunks import WORKSPACE_BYTES, empty_logits, rows_of_chunk
from .settings import Rows, Sampling, places

FEW = 128  # rows: of more, cuBLAS gains more than storing their logits costs


def linear_score_rows(score_rows: Callable, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows,
                      sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`score_rows`, a backend's, of the logits hidden [R, D] @ weight [V, D].T + bias [V].

    The products are of the wider of the two dtypes, summed in fp32.
    """
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    hidden, weight = (x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in (hidden, weight))
    index = torch.arange(len(hidden), device=hidden.device) if rows.index is None else rows.index.contiguous()
    rows, n, V = rows._replace(index=index), len(index), len(weight)
    score, stored = _product_then, True
    if (n <= FEW or rows.sparse) and triton_support.missing() is None:
        score = triton_support.kernels("topk_unmask").linear_score_rows
        stored = sampling.temperature > 0 or sampling.is_filtered(V)
    room = WORKSPACE_BYTES.get(hidden.device.type, WORKSPACE_BYTES["cuda"])
    size = rows_of_chunk(n, V * 4 if stored else V // 2, room)
    found = [score(score_rows, hidden, weight, bias, rows.part(slice(start, start + size)), sampling)
             for start in range(0, max(n, 1), size)]
    return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))


def _product_then(score_rows: Callable, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows,
                  sampling: Sampling) -> tuple[Tensor, Tensor]:
    logits = empty_logits(hidden, len(rows.index), len(weight), torch.float32)
    x = hidden[rows.index.clamp(0, max(len(hidden) - 1, 0))]
    with torch.autocast(hidden.device.type, enabled=False):
        if x.is_cuda and x.dtype != torch.float32:
            torch.mm(x, weight.T, out_dtype=torch.float32, out=logits)
        else:
            torch.mm(x.float(), weight.float().T, out=logits)
    if bias is not None:
        logits += bias
    return score_rows(logits, rows._replace(index=places(rows.index, len(hidden))), sampling)
