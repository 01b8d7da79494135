"""Head and loss, forward and backward, on a CPU, at the vocabulary of Qwen2.5: ours against eager F.linear and
F.cross_entropy over all positions, which is what training code does that ignores the positions without a label.
"""

import pytest
import torch
import torch.nn.functional as F

from dllm_kernels import linear_masked_cross_entropy

N, D, V = 1024, 256, 151_936


def make_case(share: float):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((N, D), (V, D)))
    return hidden, weight, torch.randint(V, (N,), generator=g), torch.rand(N, generator=g) < share


def eager(hidden, weight, targets, corrupted):
    return F.cross_entropy(F.linear(hidden, weight), targets.masked_fill(~corrupted, -100))


def eager_of_corrupted(hidden, weight, targets, corrupted):
    return F.cross_entropy(F.linear(hidden[corrupted], weight), targets[corrupted])


def train(function, case) -> list[torch.Tensor]:
    loss = function(*case)
    return [loss.detach(), *torch.autograd.grad(loss, case[:2])]


@pytest.mark.parametrize("baseline, share, at_least", [
    (eager, 0.15, 5.0), (eager, 0.5, 1.7), (eager_of_corrupted, 0.5, None)])
def bench_linear_masked_cross_entropy(paired, baseline, share, at_least):
    case = make_case(share)
    for ours, theirs in zip(train(linear_masked_cross_entropy, case), train(baseline, case), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    rows = int(case[-1].sum())
    paired(ours=lambda: train(linear_masked_cross_entropy, case), baseline=lambda: train(baseline, case), rounds=3,
           at_least=at_least, must_multiply_flop=3 * 2 * rows * D * V, baseline_name=baseline.__name__)
