"""Attention on a CPU against scaled_dot_product_attention with a mask tensor that was made beforehand.

Heads of Qwen2.5-0.5B: 14 query heads, 2 key heads of 64.
"""

import pytest
import torch
import torch.nn.functional as F

from dllm_kernels import bidirectional_attention, bidirectional_attention_varlen, block_diffusion_attention
from dllm_kernels.attention import reference


def make_heads(*shape):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, heads, 64, generator=g, requires_grad=True) for heads in (14, 2, 2)]


def sdpa(q, k, v, mask=None):
    """The mask is [1, 1, L, L], which its flash kernel takes; [1, L, L] would be 2.7 times as slow."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def with_gradients(attend, heads):
    return lambda: torch.autograd.grad(attend().sum(), heads)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("lengths", ["equal", "mixed"])
def bench_packed_documents(paired, lengths, backward):
    """16 documents in 2,048 positions."""
    T = 2048
    sizes = torch.full((16,), 128) if lengths == "equal" else torch.arange(16) * 8 + 68
    cu_seqlens = F.pad(sizes.cumsum(0), (1, 0)).int()
    assert cu_seqlens[-1] == T
    heads = make_heads(T)
    mask = reference.varlen_mask(cu_seqlens, T, None).unsqueeze(1)
    ours = lambda: bidirectional_attention_varlen(*heads, cu_seqlens, int(sizes.max()))  # noqa: E731
    baseline = lambda: sdpa(*(x.unsqueeze(0) for x in heads), mask)  # noqa: E731
    if backward:
        ours, baseline = with_gradients(ours, heads), with_gradients(baseline, heads)
    paired(ours=ours, baseline=baseline, at_least=4)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def bench_block_diffusion(paired, backward):
    """Training mask of 1,024 positions (2,048 with the noisy copy), blocks of 32."""
    heads = make_heads(1, 2048)
    mask = reference.block_diffusion_mask(1, 1024, 32, None, "cpu").unsqueeze(1)
    ours = lambda: block_diffusion_attention(*heads, 32)  # noqa: E731
    baseline = lambda: sdpa(*heads, mask)  # noqa: E731
    if backward:
        ours, baseline = with_gradients(ours, heads), with_gradients(baseline, heads)
    paired(ours=ours, baseline=baseline, at_least=1.8)


@pytest.mark.parametrize("queries", [1024, 32])
def bench_dense(paired, queries):
    """32 queries are those of one block against cached keys."""
    heads = make_heads(1, 1024)
    heads[0] = heads[0][:, :queries]
    paired(ours=lambda: bidirectional_attention(*heads), baseline=lambda: sdpa(*heads), at_least=0.95)
