"""DiffusionGemma's statistics and soft embedding on a CPU, at its vocabulary: `cpu` against carefully written PyTorch.

The baseline stores the logits. In bf16 it multiplies them in bf16, and widens the weights for the product with the
probabilities, because PyTorch's bf16 product of that shape is slower than both by far.
"""

import pytest
import torch

from benchmarks.inputs import make_head
from benchmarks.memory import peak_memory_mib
from dllm_kernels import linear_denoiser_statistics, soft_embedding

V, D, ROWS, SOFTCAP, TEMPERATURE = 262_144, 256, 32, 30.0, 0.6
AT_LEAST = {False: 4, True: 2.5}  # with the soft embedding or without


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
    return p.multinomial(1), argmax, entropy, (p @ weight.float()).to(weight.dtype) if soft else None


def agree(ours, eager) -> None:
    assert (ours.entropy - eager[2]).abs().max() < 0.2  # in bf16 the baseline rounds its logits
    assert ours.soft is None or (ours.soft - eager[3]).abs().max() < 0.05


def memory_mib(**case) -> dict[str, int]:
    """Peak memory besides the inputs."""
    found = {name: peak_memory_mib("bench_denoiser_statistics", name, **case) for name in ("ours", "eager")}
    return {"extra_memory_mib": round(found["ours"]), "eager_extra_memory_mib": round(found["eager"])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft", [False, True], ids=["statistics", "soft"])
def bench_denoiser_statistics(paired, soft, dtype):
    case, rows = make_case(ROWS, dtype, soft), ROWS
    extra = memory_mib(rows=rows, dtype=dtype, soft=soft) if soft and dtype == "float32" else {}
    paired(ours=lambda: ours(*case), baseline=lambda: eager(*case), check=agree, rows=rows, hidden=D,
           at_least=AT_LEAST[soft], **extra)


def bench_one_pass_for_both(paired):
    """The soft embedding with the statistics, against a call of its own, which multiplies the logits once more."""
    hidden, weight, uniform, _ = make_case(ROWS, "float32", True)
    settings = {"temperature": TEMPERATURE, "softcap": SOFTCAP, "backend": "cpu"}

    def in_two_calls():
        found = linear_denoiser_statistics(hidden, weight, None, generator=uniform, **settings)
        return soft_embedding(hidden, weight, None, found.log_normaliser, **settings)

    paired(ours=lambda: ours(hidden, weight, uniform, True), baseline=in_two_calls, rows=ROWS, hidden=D, at_least=1.15)
