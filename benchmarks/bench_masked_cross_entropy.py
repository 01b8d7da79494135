"""Head and loss, forward and backward, on a CPU, at the vocabulary of Qwen2.5, against eager F.linear and
F.cross_entropy over all positions (training code that ignores the positions without a label), the same over the
corrupted positions, and PyTorch's own chunked linear_cross_entropy over them (torch 2.13).
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import peak_memory_mib
from dllm_kernels import linear_masked_cross_entropy

N, D, V = 1024, 256, 151_936


def make_case(share: float = 0.5, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in ((N, D), (V, D)))
    return hidden, weight, torch.randint(V, (N,), generator=g), torch.rand(N, generator=g) < share


def eager(hidden, weight, targets, corrupted):
    return F.cross_entropy(F.linear(hidden, weight), targets.masked_fill(~corrupted, -100))


def eager_of_corrupted(hidden, weight, targets, corrupted):
    return F.cross_entropy(F.linear(hidden[corrupted], weight), targets[corrupted])


def pytorch_of_corrupted(hidden, weight, targets, corrupted):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)  # its own choice is far slower
    return F.linear_cross_entropy(hidden[corrupted], weight, targets[corrupted], options=options)


def train(function, case) -> list[torch.Tensor]:
    loss = function(*case)
    return [loss.detach(), *torch.autograd.grad(loss, case[:2])]


def train_ours(*case):
    train(linear_masked_cross_entropy, case)


def train_eager(*case):
    train(eager, case)


@pytest.mark.parametrize("baseline, share, threads, at_least", [
    (eager, 0.15, 1, 5.0), (eager, 0.5, 1, 3.0), (eager, 0.5, 2, 3.0), (eager_of_corrupted, 0.5, 1, 1.4),
    (eager_of_corrupted, 0.5, 2, 1.4), (pytorch_of_corrupted, 0.5, 1, 1.0)])
def bench_linear_masked_cross_entropy(paired, baseline, share, threads, at_least):
    if baseline is pytorch_of_corrupted and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    if threads > torch.get_num_threads():
        pytest.skip(f"there are not {threads} threads")
    case = make_case(share)
    for ours, theirs in zip(train(linear_masked_cross_entropy, case), train(baseline, case), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    rows = int(case[-1].sum())
    paired(ours=lambda: train(linear_masked_cross_entropy, case), baseline=lambda: train(baseline, case), rounds=3,
           at_least=at_least, threads=threads, must_multiply_flop=3 * 2 * rows * D * V, baseline_name=baseline.__name__)


def bench_in_bf16(paired):
    """Ours has fp32 products; eager PyTorch rounds every logit to bf16, where the CPU multiplies bf16 at once.

    Memory is measured here, in fp32, besides the gradients, which both return.
    """
    gradients = 4 * (N * D + V * D) / 2**20
    ours, theirs = (peak_memory_mib("bench_masked_cross_entropy", f"train_{name}") - gradients
                    for name in ("ours", "eager"))
    assert ours <= theirs / 20, f"{ours:.0f} MiB besides the gradients, eager {theirs:.0f}"
    case = make_case(dtype=torch.bfloat16)
    paired(ours=lambda: train_ours(*case), baseline=lambda: train_eager(*case), rounds=2,
           fp32_extra_memory_mib=round(ours), fp32_eager_extra_memory_mib=round(theirs))
