"""The Triton kernels of masked cross-entropy against float64, on a GPU or in Triton's interpreter.

Without a GPU the first test runs this file again in a process of its own (conftest.py).
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from dllm_kernels import (
    chunks,
    linear_masked_cross_entropy,
    linear_masked_kl_divergence,
    masked_cross_entropy,
    triton_support,
)
from dllm_kernels.masked_cross_entropy import LINEAR_BACKENDS, LOGITS_BACKENDS, products
from dllm_kernels.masked_cross_entropy.rows import Form, Linear, Scored
from tests.kernels.triton_cases import DEVICE, DTYPES, INTERPRETED, with_dtypes

pytest.importorskip("triton")
from dllm_kernels.masked_cross_entropy import triton_kernels  # noqa: E402

SHAPES = [(1, 3, 2), (7, 5, 41), (33, 16, 1001), (70, 48, 300)]  # N, D, V
REDUCTIONS, FORM = ["mean", "sum", "none"], Form("mean", None)

reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.mark.slow
def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.fixture
def many_blocks(monkeypatch):
    """Blocks and a workspace so small that every loop has several passes."""
    monkeypatch.setattr(triton_kernels, "ROW", {"WORDS": 128, "num_warps": 4})
    monkeypatch.setattr(triton_kernels, "CHUNK", dict.fromkeys((2, 4), {"WORDS": 128, "num_warps": 4}))
    monkeypatch.setattr(chunks, "ROWS", 8)
    monkeypatch.setattr(products, "WORKSPACE_BYTES", dict.fromkeys(("cpu", "cuda"), 1 << 13))


@pytest.fixture(params=["counted", "on the device"])
def where_the_count_is(request, monkeypatch):
    """Whether the host knows how many are corrupted; on a CPU it always does."""
    if request.param == "counted":
        return
    monkeypatch.setattr(products, "_corrupted_first", lambda scored: (
        scored.corrupted.byte().argsort(descending=True, stable=True), scored.corrupted.sum()))


def make(N, D, V, dtype=torch.float32, share=0.5):
    g = torch.Generator().manual_seed(N)
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(DEVICE, dtype) for shape in ((N, D), (V, D), (V,)))
    targets, corrupted = torch.randint(V, (N,), generator=g), torch.rand(N, generator=g) < share
    return hidden, weight, bias, targets.to(DEVICE), corrupted.to(DEVICE), (torch.rand(N, generator=g) * 9).to(DEVICE)


def linear_loss(hidden, weight, targets, corrupted, bias, weights, reduction, backend="triton", **settings):
    return linear_masked_cross_entropy(hidden, weight, targets, corrupted, bias=bias, weights=weights,
                                       reduction=reduction, backend=backend, **settings)


def loss_of_logits(logits, targets, corrupted, weights, reduction, backend="triton", **settings):
    return masked_cross_entropy(logits, targets, corrupted, weights=weights, reduction=reduction, backend=backend,
                                **settings)


def gradients(function, tensors, dtype):
    """The loss and the gradients for the tensors in this dtype, with an upstream gradient for each position."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    loss = function(*leaves)
    upstream = torch.linspace(-1, 1.5, loss.numel(), device=DEVICE) if loss.ndim else torch.tensor(0.7, device=DEVICE)
    loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_exact_as_eager(ours, eager, truth):
    """Of 16 bits, a unit in the last place more: a gradient is rounded with the loss, and by the upstream gradient."""
    dtype = ours[-1].dtype
    rounding = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, mine, theirs, true in zip(("loss", "hidden", "weight", "bias"), ours, eager, truth, strict=False):
        bound = 2 * (theirs.double() - true).abs().max() + rounding * true.abs().max() + 1e-9
        assert (mine.double() - true).abs().max() <= bound, name


def check_linear(shape, dtype, share, reduction, softcap=None):
    *tensors, targets, corrupted, weights = make(*shape, dtype, share)

    def eager(hidden, weight, bias):
        z = F.linear(hidden, weight, bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        loss = torch.where(corrupted, F.cross_entropy(z, targets, reduction="none") * weights.to(z.dtype), 0.0)
        count = max(int(corrupted.sum()), 1) if reduction == "mean" else 1
        return loss if reduction == "none" else loss.sum() / count

    def triton(hidden, weight, bias):
        return linear_loss(hidden, weight, targets, corrupted, bias, weights, reduction, softcap=softcap)

    ours = gradients(triton, tensors, dtype)
    assert ours[0].dtype == torch.float32 and [x.dtype for x in ours[1:]] == [dtype] * 3
    assert_as_exact_as_eager(ours, gradients(eager, tensors, dtype), gradients(eager, tensors, torch.double))
    assert (ours[1][~corrupted] == 0).all() and (reduction != "none" or (ours[0][~corrupted] == 0).all())


@reductions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, share", [*((shape, 0.5) for shape in SHAPES), (SHAPES[0], 1.0), (SHAPES[2], 1.0),
                                          (SHAPES[1], 0.0)])
def test_loss_and_gradients_are_as_exact_as_eager(shape, dtype, share, reduction):
    check_linear(shape, dtype, share, reduction)


@with_dtypes("shape, share, reduction, softcap", [
    (*at, *settings) for at, settings in product(
        [((33, 16, 133), 1.0), ((50, 24, 101), 0.5), ((70, 40, 150), 0.02)],
        [("mean", None), ("sum", 5.0), ("none", 5.0)])], DTYPES)
def test_with_many_blocks_and_chunks(shape, share, dtype, softcap, reduction, many_blocks, where_the_count_is):
    check_linear(shape, dtype, share, reduction, softcap)


@with_dtypes("shape, reduction, softcap", product([(7, 5, 41), (17, 16, 301)], REDUCTIONS, [None, 5.0]), DTYPES)
def test_from_logits(shape, dtype, softcap, reduction, many_blocks):
    hidden, weight, bias, targets, corrupted, weights = make(*shape, dtype)
    logits = F.linear(hidden, weight, bias)

    def run(backend):
        return lambda z: loss_of_logits(z, targets, corrupted, weights, reduction, backend, softcap=softcap)

    ours, truth = gradients(run("triton"), [logits], dtype), gradients(run("reference"), [logits], torch.double)
    rounding = torch.finfo(dtype).eps
    assert (ours[0] - truth[0]).abs().max() <= 1e-5 * truth[0].abs().max()
    assert (ours[1] - truth[1]).abs().max() <= max(rounding, 1e-6) * truth[1].abs().max()
    assert (ours[1][~corrupted] == 0).all()
    strided = torch.stack([logits, logits], 2)[..., 0]
    assert torch.equal(gradients(run("triton"), [strided], dtype)[1], ours[1])


@reductions
def test_rows_that_are_not_corrupted_are_never_read(reduction, many_blocks):
    hidden, weight, bias, targets, corrupted, weights = make(33, 16, 101)
    poison = ~corrupted
    poisoned = (hidden.masked_fill(poison[:, None], torch.nan), weight, targets.masked_fill(poison, -100), corrupted,
                bias, weights.masked_fill(poison, torch.nan), reduction)
    outcomes = []
    for x, w, y, c, b, factors, _ in ((hidden, weight, targets, corrupted, bias, weights, reduction), poisoned):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, w, b)]
        loss = linear_loss(*leaves[:2], y, c, leaves[2], factors, reduction)
        upstream = torch.where(c, 1.0, torch.nan) if reduction == "none" and y is not targets else torch.ones_like(loss)
        logits = F.linear(x, w).requires_grad_()
        from_logits = loss_of_logits(logits, y, c, factors, reduction)
        outcomes.append([loss, *torch.autograd.grad(loss, leaves, upstream), from_logits,
                         *torch.autograd.grad(from_logits, logits, upstream)])
    assert all(torch.equal(clean, poisoned) for clean, poisoned in zip(*outcomes, strict=True))


def test_uninitialised_memory_is_never_read(many_blocks):
    *tensors, targets, corrupted, weights = make(50, 24, 101)

    def run(x, w, b):
        return linear_loss(x, w, targets, corrupted, b, weights, "none")

    plain = gradients(run, tensors, torch.float32)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        again = gradients(run, tensors, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_huge_and_infinite_logits():
    weight = torch.tensor([[1e4], [-1e4], [0.0], [-torch.inf]], device=DEVICE)
    hidden, targets = torch.ones(2, 1, device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    both = torch.ones(2, dtype=torch.bool, device=DEVICE)
    loss = linear_loss(hidden, weight, targets, both, None, None, "none")
    assert loss.tolist() == [0.0, 1e4]
    logits = (hidden @ weight.T).requires_grad_()
    loss = loss_of_logits(logits, targets, both, None, "none")
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1e4] and logits.grad.tolist() == [[0, 0, 0, 0], [1, 0, -1, 0]]


def test_a_target_out_of_range_reads_nothing_and_shows_in_its_own_loss():
    hidden, weight, _, _, _, _ = make(7, 5, 41)
    targets = torch.tensor([-100, 5, 41, 63, 2**40, -2**40, 10**9], device=DEVICE)
    scored = torch.arange(7, device=DEVICE) != 3
    of_hidden, of_logits = (next(b.run for b in backends if b.name == "triton")
                            for backends in (LINEAR_BACKENDS, LOGITS_BACKENDS))
    both, rest = Linear(hidden, weight, None), (Scored(targets, scored, None), FORM, [True, True, False])
    for nll, _ in (of_hidden.forward(both, *rest), of_logits.forward(F.linear(hidden, weight), *rest)):
        assert nll.isnan().tolist() == [True, False, True, False, True, True, True] and nll[3] == 0


@reductions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_from_a_teacher(temperature, dtype, reduction, many_blocks, where_the_count_is):
    *student, _, corrupted, weights = make(33, 16, 301, dtype)
    teacher = [x.roll(1, 0) for x in student]

    def run(backend):
        return lambda x, w, b: linear_masked_kl_divergence(
            x, w, *(t.to(x.dtype) for t in teacher[:2]), corrupted, bias=b, teacher_bias=teacher[2].to(x.dtype),
            weights=weights, temperature=temperature, reduction=reduction, backend=backend)

    ours, truth = gradients(run("triton"), student, dtype), gradients(run("reference"), student, torch.double)
    rounding = 2e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert all((mine - true).abs().max() <= rounding * true.abs().max() for mine, true in zip(ours, truth, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_count_on_the_device_leaves_out_the_rows_beyond(reduction, many_blocks, monkeypatch):
    """As with the count on the host, also where products are of groups of rows, whose other rows are arbitrary."""
    *tensors, targets, corrupted, weights = make(50, 24, 104)
    hidden = tensors[0].masked_fill(~corrupted[:, None], torch.nan)

    def run(x, w, b=None):
        return linear_loss(x, w, targets, corrupted, b, weights, reduction)

    expected = gradients(run, [hidden, tensors[1]], torch.float32)
    monkeypatch.setattr(products, "_corrupted_first", lambda scored: (
        scored.corrupted.byte().argsort(descending=True, stable=True), scored.corrupted.sum()))
    dense = gradients(run, [hidden, tensors[1]], torch.float32)
    monkeypatch.setattr(products, "_groups", lambda hidden, weight: True)
    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    grouped = gradients(run, [hidden, tensors[1]], torch.float32)
    for true, *others in zip(expected, dense, grouped, strict=True):
        assert all((x - true).abs().max() <= 1e-5 * true.abs().max() for x in others)


def grouped_mm(a, b, *, offs):
    """torch.nn.functional.grouped_mm of one group, which leaves NaN where it writes nothing."""
    end = int(offs)
    if b.ndim == 2:
        return (a[:, :end] @ b[:end] if end else torch.full((len(a), b.shape[1]), torch.nan)).unsqueeze(0)
    out = torch.full((len(a), b.shape[2]), torch.nan)
    out[:end] = a[:end] @ b[0]
    return out


@reductions
def test_a_gradient_scaler_lifts_fp16_gradients_before_they_are_rounded(reduction):
    hidden, weight, _, targets, corrupted, _ = make(33, 16, 1001, torch.float16)
    hidden.requires_grad_()
    weights = torch.full((33,), 1e-7, device=DEVICE)  # gradients under the smallest fp16
    loss = linear_loss(hidden, weight, targets, corrupted, None, weights, reduction)
    gradient, = torch.autograd.grad(loss.sum(), hidden, torch.tensor(65536.0, device=DEVICE))
    truth = hidden.detach().double().requires_grad_()
    linear_loss(truth, weight.double(), targets, corrupted, None, weights.double(), reduction,
                "reference").sum().backward()
    assert (gradient.double() / 65536 - truth.grad).norm() <= 0.02 * truth.grad.norm()


@reductions
def test_strides_mixed_dtypes_and_autocast(reduction, many_blocks):
    hidden, weight, bias, targets, corrupted, weights = make(12, 16, 101)

    def run(x, w, b):
        return linear_loss(x, w, targets, corrupted, b, weights, reduction)

    plain = gradients(run, (hidden, weight, bias), torch.float32)
    row_strided = torch.cat([hidden, hidden], 1)[:, :16], torch.cat([weight, weight], 1)[:, :16]
    column_strided = hidden.T.contiguous().T, weight.T.contiguous().T
    for x, w in (row_strided, column_strided):
        leaves = x.detach().requires_grad_(), w.detach().requires_grad_(), bias.detach().requires_grad_()
        assert not leaves[0].is_contiguous()
        loss = run(*leaves)
        assert torch.equal(loss, plain[0])
    half = hidden.half(), weight, bias.half()
    assert torch.equal(run(*half), run(half[0].float(), weight, half[2].float()))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(gradients(run, (hidden, weight, bias), torch.float32), plain,
                                                     strict=True))


@reductions
def test_empty_inputs_and_nothing_corrupted(reduction):
    *tensors, targets, corrupted, weights = make(7, 5, 41)
    for N in (0, 7):
        x = tensors[0][:N].detach().requires_grad_()
        w, b = (leaf.detach().requires_grad_() for leaf in tensors[1:])
        nothing = torch.zeros(N, dtype=torch.bool, device=DEVICE)
        loss = linear_loss(x, w, targets[:N], nothing, b, weights[:N], reduction)
        assert loss.shape == ((N,) if reduction == "none" else ()) and (loss == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), (x, w, b)))
        logits = F.linear(x, w).detach().requires_grad_()
        loss = loss_of_logits(logits, targets[:N], nothing, weights[:N], reduction)
        assert (loss == 0).all() and (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


@reductions
def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused(reduction):
    hidden, weight, _, targets, corrupted, _ = make(7, 5, 41)
    hidden.requires_grad_()
    loss = linear_loss(hidden, weight, targets, corrupted, None, None, reduction).sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative, which create_graph=True asks for"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_it_says_what_it_cannot_run_on():
    assert triton_support.refuses(torch.zeros(1, device=DEVICE)) is None
    assert "fp32" in triton_support.refuses(torch.zeros(1, device=DEVICE, dtype=torch.double))
    if INTERPRETED:
        assert "wrong on bf16" in triton_support.refuses(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@reductions
def test_the_host_never_waits(reduction):
    hidden, weight, bias, targets, corrupted, weights = make(300, 64, 1001)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def step():
        from_hidden = linear_loss(*leaves[:2], targets, corrupted, bias, weights, reduction)
        from_logits = loss_of_logits(hidden @ weight.T, targets, corrupted, weights, reduction)
        torch.autograd.grad((from_hidden + from_logits).sum(), leaves)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
