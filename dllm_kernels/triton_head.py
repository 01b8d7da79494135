"""The head in Triton: logits of a tile of words and some rows of hidden states, for the kernels that reduce them."""

import triton
import triton.language as tl


@triton.jit
def tile_and_split(group, splits):
    """This program's tile of rows, and its share of the words.

    Programs that run at the same time share `group` tiles of rows and few words, so that both stay in the cache.
    """
    program = tl.program_id(0)
    return program // (group * splits) * group + program % group, program % (group * splits) // group


@triton.jit
def logits_of_tile(hidden, weight, bias, first, weight_stride, V, D, WORDS: tl.constexpr, INNER: tl.constexpr):
    """[rows, WORDS] fp32 logits of the words from `first`, for rows at pointers hidden [rows]; arbitrary beyond V."""
    weight += tl.cast(first, tl.int64) * weight_stride  # in 64 bits once: offsets within a tile fit 32
    v = tl.minimum(tl.arange(0, WORDS), V - 1 - first)
    z = tl.zeros((hidden.shape[0], WORDS), tl.float32)
    for start in range(0, D, INNER):
        d = start + tl.arange(0, INNER)
        a = tl.load(hidden[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)
        b = tl.load(weight + (v[None, :] * weight_stride + d[:, None]), mask=d[:, None] < D, other=0.0)
        z = tl.dot(a, b, z, input_precision="ieee")
    if bias is not None:
        z += tl.load(bias + first + v).to(tl.float32)[None, :]
    return z
