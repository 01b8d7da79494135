"""Softmax of widely spread logits: most probabilities are denormal, and the CPU kernels treat them as zero."""

import time

import pytest
import torch
import torch.nn.functional as F

from dllm_kernels import linear_masked_cross_entropy, linear_token_scores, masked_cross_entropy, token_scores
from dllm_kernels.dispatch import runnable
from dllm_kernels.masked_cross_entropy import LINEAR_BACKENDS

pytestmark = pytest.mark.skipif("cpu" not in runnable(LINEAR_BACKENDS, torch.zeros(1)), reason="no compiled extension")
N, D, V = 64, 64, 20_000
SMALLEST_NORMAL = 2.0**-126  # of fp32, and of bf16


def make(std: float, dtype: torch.dtype = torch.float32):
    """Hidden states [N, D] and a head [V, D] whose logits have this standard deviation, targets, all corrupted."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) * std / D**0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (N,), generator=g), torch.ones(N, dtype=torch.bool)


def from_logits(hidden, weight, targets, corrupted):
    return masked_cross_entropy(F.linear(hidden, weight), targets, corrupted, backend="cpu")


def from_hidden_states(hidden, weight, targets, corrupted):
    return linear_masked_cross_entropy(hidden, weight, targets, corrupted, backend="cpu")


def eager(hidden, weight, targets, corrupted):
    return F.cross_entropy(F.linear(hidden, weight), targets)


def train(loss, leaves, *labels) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    value = loss(*leaves, *labels)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def count_denormals(x: torch.Tensor) -> int:
    x = x.double().abs()
    return int(((x > 0) & (x < SMALLEST_NORMAL)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [from_logits, from_hidden_states])
def test_loss_and_gradients_are_as_exact_as_eager(loss, dtype):
    hidden, weight, *labels = make(16, dtype)
    truth = train(eager, [hidden.double(), weight.double()], *labels)
    assert count_denormals(F.linear(hidden.double(), weight.double()).softmax(1) / N) > N * V / 10
    for ours, theirs, true in zip(train(loss, [hidden, weight], *labels), train(eager, [hidden, weight], *labels),
                                  truth, strict=True):
        bound = 2 * (theirs.double() - true).abs().max() + 2e-6 * true.abs().max()
        assert (ours.double() - true).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, 1e-12])
def test_no_gradient_is_denormal(upstream, dtype):
    hidden, weight, *labels = make(16, dtype)
    logits = F.linear(hidden, weight).requires_grad_()
    masked_cross_entropy(logits, *labels, backend="cpu").backward(torch.tensor(upstream))
    _, *gradients = train(lambda *x: upstream * from_hidden_states(*x), [hidden, weight], *labels)
    assert [count_denormals(gradient) for gradient in (logits.grad, *gradients)] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_the_gradient_are_not_denormal(dtype):
    """PyTorch multiplies them by weights, and sums products that may all be small."""
    hidden, weight, *labels = make(16, dtype)
    logits = F.linear(hidden, weight).requires_grad_()
    masked_cross_entropy(logits, *labels, backend="cpu").backward()
    assert logits.grad[logits.grad != 0].abs().min().double() * 1e-4 >= SMALLEST_NORMAL


@pytest.mark.alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [from_logits, from_hidden_states])
def test_spread_logits_take_no_longer(loss, dtype):
    """A core for which denormals are slow took ten times as long."""
    narrow, wide = make(3, dtype), make(16, dtype)
    seconds = {3: [], 16: []}
    for _ in range(8):
        for std, (hidden, weight, *labels) in ((3, narrow), (16, wide)):
            start = time.perf_counter()
            train(loss, [hidden, weight], *labels)
            seconds[std].append(time.perf_counter() - start)
    assert min(seconds[16]) < 2 * min(seconds[3])


def denormals_survive() -> bool:
    """Whether this thread and PyTorch's others keep denormal numbers: 1e-39 of a large tensor, halved."""
    return bool((torch.full((1 << 20,), 1e-39) * 0.5 > 0).all())


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def flushing(request):
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    yield request.param
    torch.set_flush_denormal(False)


def test_the_callers_floating_point_state_is_unchanged(flushing):
    before = denormals_survive()
    hidden, weight, *labels = make(16)
    for loss in (from_logits, from_hidden_states):
        train(loss, [hidden, weight], *labels)
    token_scores(F.linear(hidden, weight), backend="cpu")
    linear_token_scores(hidden.unsqueeze(0), weight, torch.arange(N), backend="cpu")
    assert denormals_survive() == before and (before or flushing)


def test_small_halves_are_not_flushed():
    """Halves below 2**-14 have an fp32 value that is normal."""
    hidden, weight = torch.tensor([[1.0, -1.0]]).half(), torch.tensor([[2.0**-24, 0], [2.0**-15, 0], [0, 3e-5]]).half()
    logits = F.linear(hidden.float(), weight.float())
    token, confidence = linear_token_scores(hidden.unsqueeze(0), weight, torch.tensor([0]), backend="cpu")
    assert token.item() == 1 and confidence.item() == pytest.approx(logits.softmax(1).max().item())
    token, confidence = token_scores(logits.half(), backend="cpu")
    assert token.item() == 1 and confidence.item() == pytest.approx(logits.softmax(1).max().item())
