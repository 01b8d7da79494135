"""Head and loss on a GPU, forward and backward, at the vocabulary of Qwen2.5 and the hidden sizes of its 0.5B and 7B.

bf16, half corrupted, weights 1/t. Baselines: the products alone, and other implementations of the loss where installed.
"""

import importlib.util
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks.device import DEVICE, measure, on_device, peak_memory, pick, without_waiting
from benchmarks.inputs import make_head
from dllm_kernels import linear_masked_cross_entropy

V = pick(151_936, 1_000)
SHAPES = {"0.5B": pick((65_536, 896), (64, 32)), "7B": pick((32_768, 3_584), (32, 64))}  # positions, hidden size
pytestmark = on_device


def make_case(N: int, D: int, words: int = V, device: str = DEVICE):
    hidden, weight = (x.requires_grad_() for x in make_head(N, D, words, torch.bfloat16, device))
    g = torch.Generator(device).manual_seed(1)
    corrupted = torch.rand(N, generator=g, device=device) < 0.5
    targets = torch.randint(words, (N,), generator=g, device=device)
    return hidden, weight, targets, corrupted, 1 / (0.1 + torch.rand(N, generator=g, device=device))


def ours(hidden, weight, targets, corrupted, weights, count=None):
    return linear_masked_cross_entropy(hidden, weight, targets, corrupted, weights=weights, count=count)


def counted(case):
    """Ours for a caller that knows how many positions are corrupted, as the trainer does."""
    return partial(ours, count=int(case[3].sum()))


def compile_on_corrupted(hidden, weight, targets, corrupted, weights):
    rows = corrupted.nonzero().squeeze(1)
    losses = _compiled(hidden[rows], weight, targets[rows])
    return (losses * weights[rows]).mean()


@torch.compile(dynamic=False)
def _compiled(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def liger_on_all(hidden, weight, targets, corrupted, weights):
    """Its users' call: all positions have one weight, because it takes none per position."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets.masked_fill(~corrupted, -100))


def liger_on_corrupted(hidden, weight, targets, corrupted, weights):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden[corrupted], targets[corrupted])


def cce_on_corrupted(hidden, weight, targets, corrupted, weights):
    """cut-cross-entropy in its exact form."""
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(hidden[corrupted], weight, targets[corrupted], reduction="none", impl="cce_exact")
    return (losses * weights[corrupted]).mean()


def pytorch_on_corrupted(hidden, weight, targets, corrupted, weights):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4096)
    losses = F.linear_cross_entropy(hidden[corrupted], weight, targets[corrupted], reduction="none", options=options)
    return (losses * weights[corrupted]).mean()


def train(function, case) -> None:
    torch.autograd.grad(function(*case), case[:2])


def multiply(case) -> None:
    """The library's three products of the corrupted rows, in chunks whose logits take 2 GiB."""
    hidden, weight, _, corrupted, _ = case
    rows, chunk = int(corrupted.sum()), max(1, 2**30 // len(weight))
    logits = torch.empty(chunk, len(weight), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, rows, chunk):
        x = hidden.detach()[start:min(start + chunk, rows)]
        z = torch.mm(x, weight.detach().T, out=logits[:len(x)])
        torch.mm(z, weight.detach())
        torch.mm(z.T, x)


def extra_memory_mib(function, case) -> float:
    """Peak memory of a training step besides its inputs and the two gradients."""
    return (peak_memory(lambda: train(function, case)) - sum(x.nbytes for x in case[:2])) / 2**20


BASELINES = {  # function, the package it needs, the promised ratio by shape
    "liger_on_all": (liger_on_all, "liger_kernel", {"0.5B": 4.0, "7B": 2.2}),
    "liger_on_corrupted": (liger_on_corrupted, "liger_kernel", {"0.5B": 1.2, "7B": 1.2}),
    "cce_on_corrupted": (cce_on_corrupted, "cut_cross_entropy", {"0.5B": 1.2, "7B": 1.2}),
    "compile_on_corrupted": (compile_on_corrupted, "triton", {"0.5B": 1.15, "7B": 1.15}),
    "pytorch_on_corrupted": (pytorch_on_corrupted, None, {"0.5B": 1.0, "7B": 1.0}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("baseline", BASELINES)
def bench_against(paired, baseline, shape):
    function, package, promised = BASELINES[baseline]
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "liger_kernel" and DEVICE == "cpu":
        pytest.skip("Liger-Kernel needs a GPU")
    if function is pytorch_on_corrupted and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    case = make_case(*SHAPES[shape])
    mine = counted(case)
    memory = {name: round(extra_memory_mib(f, case)) for name, f in (("ours", mine), ("baseline", function))}
    measure(paired, lambda: train(mine, case), lambda: train(function, case), promised[shape], rounds=10,
            extra_memory_mib=memory["ours"], baseline_extra_memory_mib=memory["baseline"])


@pytest.mark.parametrize("known", [True, False], ids=["counted", "not counted"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_against_the_products_alone(paired, shape, known):
    """Promised: within 1.25 times their time, 1.45 where the number of rows stays on the GPU."""
    case = make_case(*SHAPES[shape])
    mine = counted(case) if known else ours
    memory = extra_memory_mib(mine, case)
    measure(paired, lambda: train(mine, case), lambda: multiply(case), 1 / (1.25 if known else 1.45), rounds=10,
            extra_memory_mib=round(memory), must_multiply_flop=3 * 2 * int(case[3].sum()) * case[0].shape[1] * V)


def bench_host_synchronisations(paired):
    """None: PyTorch raises at the first one."""
    case = make_case(*pick((4096, 896), (32, 16)))
    train(ours, case)
    without_waiting(lambda: train(ours, case))
    measure(paired, lambda: train(ours, case), lambda: train(ours, case), control="ours against ours: 1 up to noise")
