"""DiffusionGemma's statistics and soft embedding on a CPU, at its vocabulary: `cpu` against carefully written PyTorch.

The baseline stores the logits, as Transformers does; in bf16 it multiplies in bf16, where the weights' dtype says so.
"""

import pytest
import torch

from benchmarks.inputs import make_head
from dllm_kernels import linear_denoiser_statistics

V, D, SOFTCAP, TEMPERATURE = 262_144, 256, 30.0, 0.6


def make_case(rows, dtype, soft):
    return *make_head(rows, D, V, getattr(torch, dtype)), torch.rand(rows, 2, dtype=torch.float64), soft


def ours(hidden, weight, uniform, soft):
    return linear_denoiser_statistics(hidden, weight, None, temperature=TEMPERATURE, softcap=SOFTCAP,
                                      generator=uniform, soft=soft, backend="cpu")


def eager(hidden, weight, uniform, soft):
    z = (hidden @ weight.T).float().div_(SOFTCAP).tanh_().mul_(SOFTCAP / TEMPERATURE)
    argmax = z.argmax(-1)
    log_p = z.log_softmax(-1)
    del z
    p = log_p.exp()
    entropy = -log_p.mul_(p).sum(-1)
    del log_p
    return p.multinomial(1), argmax, entropy, p.to(weight.dtype) @ weight if soft else None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft", [False, True], ids=["statistics", "soft"])
@pytest.mark.parametrize("rows", [16, 64])
def bench_denoiser_statistics(paired, rows, soft, dtype):
    case = make_case(rows, dtype, soft)
    paired(ours=lambda: ours(*case), baseline=lambda: eager(*case), rows=rows, hidden=D, at_least=None)
