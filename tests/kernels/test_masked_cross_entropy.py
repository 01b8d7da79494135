"""Masked cross-entropy against float64, its gradients for any upstream gradient, and what it never touches."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dllm_kernels import linear_masked_cross_entropy, masked_cross_entropy, native_extension
from dllm_kernels.dispatch import runnable
from dllm_kernels.masked_cross_entropy import LINEAR_BACKENDS, LOGITS_BACKENDS, products
from dllm_kernels.masked_cross_entropy.rows import Form, Linear, Scored

ON_CPU = torch.zeros(1)
linear_backends = pytest.mark.parametrize("backend", runnable(LINEAR_BACKENDS, ON_CPU))
logits_backends = pytest.mark.parametrize("backend", runnable(LOGITS_BACKENDS, ON_CPU))
needs_cpu_backend = pytest.mark.skipif("cpu" not in runnable(LINEAR_BACKENDS, ON_CPU), reason="no compiled extension")
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 3, 2), (7, 5, 41), (33, 16, 1001), (500, 50, 260)]  # N, D, V


def make(N, D, V, dtype=torch.float32, share=0.5):
    g = torch.Generator().manual_seed(N)
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((N, D), (V, D), (V,)))
    targets, corrupted = torch.randint(V, (N,), generator=g), torch.rand(N, generator=g) < share
    return hidden, weight, bias, targets, corrupted, torch.rand(N, generator=g) * 9


def exact(logits, targets, corrupted, weights, reduction):
    nll = torch.where(corrupted, F.cross_entropy(logits, targets, reduction="none") * weights.to(logits.dtype), 0.0)
    return nll if reduction == "none" else nll.sum() / (max(int(corrupted.sum()), 1) if reduction == "mean" else 1)


@linear_backends
@reductions
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_as_exact_as_eager(shape, dtype, share, reduction, backend):
    hidden, weight, bias, targets, corrupted, weights = make(*shape, dtype, share)
    upstream = torch.linspace(0.5, 1.5, len(hidden)) if reduction == "none" else torch.tensor(0.7)

    def run(function, cast):
        leaves = [x.to(cast).requires_grad_() for x in (hidden, weight, bias)]
        loss = function(*leaves)
        loss.backward(upstream.to(loss.dtype).view_as(loss))
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    def eager(h, w, b):
        return exact(F.linear(h, w, b), targets, corrupted, weights, reduction)

    truth, peers = run(eager, torch.double), run(eager, dtype)
    ours = run(lambda h, w, b: linear_masked_cross_entropy(h, w, targets, corrupted, bias=b, weights=weights,
                                                           reduction=reduction, backend=backend), dtype)
    assert ours[0].dtype == torch.float32
    for name, mine, theirs, true in zip(("loss", "hidden", "weight", "bias"), ours, peers, truth, strict=True):
        bound = 2 * (theirs.double() - true).abs().max() + 2e-6 * true.abs().max() + 1e-9
        assert (mine.double() - true).abs().max() <= bound, name
    if reduction == "none":
        assert (ours[0][~corrupted] == 0).all()
    assert (ours[1][~corrupted] == 0).all()


@logits_backends
@reductions
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_from_logits_it_is_as_exact_as_float64(dtype, softcap, reduction, backend):
    hidden, weight, _, targets, corrupted, weights = make(33, 16, 2500, dtype)
    strided = torch.cat((F.linear(hidden, weight), torch.full((33, 7), torch.nan, dtype=dtype)), 1)
    logits = strided[:, :2500].requires_grad_()
    loss = masked_cross_entropy(logits, targets, corrupted, weights=weights, reduction=reduction, softcap=softcap,
                                backend=backend)
    truth = logits.detach().double().requires_grad_()
    z = truth if softcap is None else softcap * torch.tanh(truth / softcap)
    expected = exact(z, targets, corrupted, weights, reduction)
    upstream = torch.linspace(-1, 2, loss.numel()).view_as(loss)
    loss.backward(upstream)
    expected.backward(upstream.double())
    assert (loss - expected).abs().max() <= 1e-5 * expected.abs().max()
    step = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert (logits.grad - truth.grad).abs().max() <= step * truth.grad.abs().max() + (6e-8 if step == 5e-4 else 0)
    assert (logits.grad[~corrupted] == 0).all()


@logits_backends
def test_logits_that_are_huge_infinite_or_not_corrupted(backend):
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, -torch.inf, 1.0], [torch.nan] * 3]).requires_grad_()
    targets, corrupted = torch.tensor([2, 2, 1]), torch.tensor([True, True, False])
    loss = masked_cross_entropy(logits, targets, corrupted, reduction="none", backend=backend)
    assert torch.allclose(loss, torch.tensor([1e4, 0.3132617, 0.0]))
    loss.sum().backward()
    assert torch.allclose(logits.grad, torch.tensor([[1.0, 0, -1], [0.2689414, 0, -0.2689414], [0, 0, 0]]))


@linear_backends
def test_each_row_is_scaled_by_its_own_upstream_gradient(backend):
    """Liger-Kernel before 0.8.5 scales every row by the first row's: 0 here, as the first position is not corrupted."""
    hidden, weight, _, targets, corrupted, _ = make(9, 4, 17)
    corrupted[0], corrupted[1:] = False, True
    hidden.requires_grad_()
    upstream = torch.arange(9.0)
    loss = linear_masked_cross_entropy(hidden, weight, targets, corrupted, reduction="none", backend=backend)
    loss.backward(upstream)
    single = []
    for n in range(9):
        row = hidden.detach()[n:n + 1].requires_grad_()
        F.cross_entropy(F.linear(row, weight), targets[n:n + 1]).backward()
        single.append(row.grad * upstream[n])
    assert (hidden.grad - torch.cat(single)).abs().max() < 1e-5


@linear_backends
@reductions
def test_rows_that_are_not_corrupted_are_never_read(reduction, backend):
    hidden, weight, _, targets, corrupted, weights = make(33, 16, 1001)
    settings = {"reduction": reduction, "backend": backend}
    clean = linear_masked_cross_entropy(hidden, weight, targets, corrupted, weights=weights, **settings)
    poison = ~corrupted.unsqueeze(1)
    out = linear_masked_cross_entropy(
        hidden.masked_fill(poison, torch.nan), weight, targets.masked_fill(~corrupted, -100), corrupted,
        weights=weights.masked_fill(~corrupted, torch.nan), **settings)
    assert torch.equal(out, clean)


@linear_backends
@reductions
def test_nothing_corrupted_gives_zero_and_zero_gradients(reduction, backend):
    hidden, weight, _, targets, _, _ = make(7, 5, 41)
    hidden.requires_grad_(), weight.requires_grad_()
    nothing = torch.zeros(7, dtype=torch.bool)
    loss = linear_masked_cross_entropy(hidden, weight, targets, nothing, reduction=reduction, backend=backend)
    loss.sum().backward()
    assert (loss == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


@linear_backends
def test_huge_and_infinite_logits(backend):
    weight = torch.tensor([[1e4], [-1e4], [0.0], [-torch.inf]])
    hidden, targets = torch.tensor([[1.0], [1.0]]), torch.tensor([0, 2])
    both = torch.ones(2, dtype=torch.bool)
    loss = linear_masked_cross_entropy(hidden, weight, targets, both, reduction="none", backend=backend)
    assert loss.tolist() == [0.0, 1e4]


def products_of(function) -> float:
    """How many products of the corrupted rows with the head a call takes, counted in multiplications."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_training_step_takes_three_products_and_a_loss_per_position_four(chunk):
    """What is not corrupted takes none, nor does what is frozen, and without gradients there is one."""
    hidden, weight, _, targets, corrupted, weights = make(33, 16, 101)
    room, one = None if chunk is None else chunk * 4 * 104, 2 * int(corrupted.sum()) * weight.numel()

    def step(*wanted, reduction="mean"):
        leaves = [x.detach().requires_grad_(want) for x, want in zip((hidden, weight), wanted, strict=True)]
        loss, nll = linear_masked_cross_entropy(*leaves, targets, corrupted, weights=weights, reduction=reduction,
                                                return_nll=True, workspace_bytes=room, backend="reference")
        if any(wanted):
            loss.backward(torch.ones_like(loss))
        assert [leaf.grad is not None for leaf in leaves] == list(wanted) and not nll.requires_grad

    for wanted, count in (((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)):
        assert products_of(partial(step, *wanted)) == count * one
    assert products_of(partial(step, True, True, reduction="none")) == 4 * one
    with torch.no_grad():
        assert products_of(lambda: linear_masked_cross_entropy(hidden, weight.requires_grad_(), targets, corrupted,
                                                               backend="reference")) == one


@reductions
def test_rows_that_are_not_corrupted_count_for_nothing_where_their_number_is_on_the_device(reduction, monkeypatch):
    """As on a GPU, where they come last in a chunk: out of range, their targets would make loss and gradients NaN."""
    *tensors, targets, corrupted, weights = make(33, 16, 101)
    targets = targets.masked_fill(~corrupted, -100)

    def run():
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss, nll = linear_masked_cross_entropy(
            *leaves[:2], targets, corrupted, bias=leaves[2], weights=weights, probability_weights=weights,
            reduction=reduction, return_nll=True, workspace_bytes=4 * 104 * 8, backend="reference")
        return loss, nll, *torch.autograd.grad(loss.sum(), leaves)

    known = run()
    monkeypatch.setattr(products, "_corrupted_first", lambda scored: (
        scored.corrupted.byte().argsort(descending=True, stable=True), scored.corrupted.sum()))
    for ours, theirs in zip(run(), known, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@needs_cpu_backend
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_costs_no_product_on_the_cpu(frozen, monkeypatch):
    hidden, weight, _, targets, corrupted, _ = make(33, 16, 101)
    leaves = [hidden.requires_grad_(frozen != 0), weight.requires_grad_(frozen != 1)]
    calls, operators = [], native_extension.operators()

    class Recorder:
        linear_cross_entropy_statistics_cpu = operators.linear_cross_entropy_statistics_cpu

        @staticmethod
        def linear_cross_entropy_gradients_cpu(*arguments):
            calls.append(arguments[9:11])
            return operators.linear_cross_entropy_gradients_cpu(*arguments)

    monkeypatch.setattr(native_extension, "operators", lambda: Recorder)
    linear_masked_cross_entropy(*leaves, targets, corrupted, backend="cpu").backward()
    (gradients,) = calls
    assert gradients[frozen] is None and gradients[1 - frozen] is not None
    assert leaves[frozen].grad is None and leaves[1 - frozen].grad is not None


@needs_cpu_backend
@pytest.mark.parametrize("rows", [4096, 4097, 9000])
def test_many_rows_are_worked_off_in_parts(rows, monkeypatch):
    hidden, weight, bias, targets, _, weights = make(rows, 6, 150)
    leaves, corrupted = [x.requires_grad_() for x in (hidden, weight, bias)], torch.ones(rows, dtype=torch.bool)

    def gradients(backend):
        loss = linear_masked_cross_entropy(*leaves[:2], targets, corrupted, bias=bias, weights=weights, backend=backend)
        return torch.autograd.grad(loss, leaves)

    for ours, theirs in zip(gradients("cpu"), gradients("reference"), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@needs_cpu_backend
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_runs_of_the_same_threads_agree_to_the_bit(threads):
    hidden, weight, bias, targets, corrupted, _ = make(250, 33, 1001)
    leaves, before = [x.requires_grad_() for x in (hidden, weight, bias)], torch.get_num_threads()

    def run():
        loss = linear_masked_cross_entropy(*leaves[:2], targets, corrupted, bias=bias, backend="cpu")
        return loss, *torch.autograd.grad(loss, leaves)

    torch.set_num_threads(threads)
    try:
        first = run()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(before)


@linear_backends
@reductions
def test_soft_cap(reduction, backend):
    hidden, weight, bias, targets, corrupted, weights = make(33, 16, 300)

    def run(function, cast):
        leaves = [x.to(cast).requires_grad_() for x in (hidden, weight, bias)]
        loss = function(*leaves)
        loss.backward(torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss))
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    def eager(h, w, b):
        return exact(5.0 * torch.tanh(F.linear(h, w, b) / 5.0), targets, corrupted, weights, reduction)

    truth, peers = run(eager, torch.double), run(eager, torch.float32)
    ours = run(lambda h, w, b: linear_masked_cross_entropy(h, w, targets, corrupted, bias=b, weights=weights,
                                                           reduction=reduction, softcap=5.0, backend=backend),
               torch.float32)
    for mine, theirs, true in zip(ours, peers, truth, strict=True):
        assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max() + 2e-6 * true.abs().max()


@linear_backends
@pytest.mark.parametrize("factors", [[0.0] * 7, [0.0, 1e30, 1.0, 1e-30, 0.0, 1e30, 3.0]])
def test_weights_of_zero_and_huge_ones(factors, backend):
    hidden, weight, _, targets, _, _ = make(7, 5, 41)
    weights, every = torch.tensor(factors), torch.ones(7, dtype=torch.bool)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_masked_cross_entropy(*leaves, targets, every, weights=weights, reduction="sum", backend=backend)
    truth = [x.detach().double().requires_grad_() for x in leaves]
    expected = exact(F.linear(*truth), targets, every, weights, "sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, truth), strict=True):
        assert (ours - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("room", [1, 4 * 1004 * 5, 4 * 1004 * 200, 1 << 30])
def test_the_logits_are_never_all_stored(room, share, monkeypatch):
    """As many rows at a time as fit, one at least; multiples of 128 where those fit, in chunks of equal size."""
    hidden, weight, _, targets, corrupted, weights = make(300, 16, 1001, share=share)
    sizes, original = [], products.logits_of
    monkeypatch.setattr(products, "logits_of", lambda *a: sizes.append(a[0].shape[0]) or original(*a))
    loss = linear_masked_cross_entropy(hidden.requires_grad_(), weight, targets, corrupted, weights=weights,
                                       backend="reference", workspace_bytes=room)
    rows, fitting = int(corrupted.sum()), {1: 1, 4 * 1004 * 5: 5, 4 * 1004 * 200: 128, 1 << 30: 384}[room]
    assert sum(sizes) == rows and len(sizes) == -(-rows // fitting) and max(sizes, default=0) <= fitting
    truth = exact(F.linear(hidden, weight).double(), targets, corrupted, weights, "mean")
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)


class Allocated(TorchDispatchMode):
    """The most bytes of tensors that lived at once."""

    def __init__(self):
        super().__init__()
        self.living, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.living = {key: (there, size) for key, (there, size) in self.living.items() if not there.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.living.values()))
        return result


@pytest.mark.parametrize("count", [None, 1 << 15])
@pytest.mark.parametrize("N, D, most", [(1 << 16, 896, 1.3e9), (1 << 16, 3584, 2.7e9)])
def test_a_step_in_bf16_takes_little_memory_besides_its_gradients(N, D, most, count, monkeypatch):
    """By the shapes alone: half of 65,536 positions, 151,936 words, on what is not a CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # there is none for such tensors
    monkeypatch.setattr(products, "_add_product", lambda *_: None)  # in place
    passes = products.three_products(lambda chunk, scale, *_: torch.empty_like(scale.plain))
    with Allocated() as memory:
        hidden, weight = (torch.empty(size, D, dtype=torch.bfloat16, device="meta") for size in (N, 151_936))
        targets, corrupted, weights = (torch.empty(N, dtype=kind, device="meta")
                                       for kind in (torch.int64, torch.bool, torch.float32))
        batch = Linear(hidden, weight, None), Scored(targets, corrupted, weights, None, count), Form("mean", None)
        inputs = memory.peak
        nll, kept = passes.forward(*batch, (True, True, False))
        found = passes.backward(nll.sum(), kept, *batch, (True, True, False))
    assert memory.peak - inputs - sum(gradient.nbytes for gradient in found[:2]) < most


@pytest.mark.parametrize("operation", ["linear", "logits"])
@reductions
def test_the_probability_weighs_as_a_constant(reduction, operation):
    """weights + probability_weights * p: on every backend of either operation, with the unweighted nll beside it."""
    hidden, weight, _, targets, corrupted, weights = make(33, 16, 101)
    hidden, planner = hidden * 0.3, torch.linspace(0, 4, 33)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    each = F.cross_entropy(F.linear(*leaves), targets, reduction="none")
    expected = exact(F.linear(*leaves), targets, corrupted, weights + planner * (-each.detach()).exp(), reduction)
    upstream = torch.linspace(-1, 2, expected.numel(), dtype=torch.double).view_as(expected)
    truth = torch.autograd.grad(expected, leaves, upstream)
    poison = {"weights": weights.masked_fill(~corrupted, torch.nan),
              "probability_weights": planner.masked_fill(~corrupted, torch.nan)}
    for backend in runnable(LINEAR_BACKENDS if operation == "linear" else LOGITS_BACKENDS, ON_CPU):
        ours = [x.clone().requires_grad_() for x in (hidden, weight)]
        rest = {**poison, "reduction": reduction, "return_nll": True, "backend": backend}
        if operation == "linear":
            loss, nll = linear_masked_cross_entropy(*ours, targets, corrupted, count=int(corrupted.sum()), **rest)
        else:
            loss, nll = masked_cross_entropy(F.linear(*ours), targets, corrupted, **rest)
        assert (loss - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (nll - torch.where(corrupted, each, 0)).abs().max() <= 1e-5 * each.abs().max()
        for mine, true in zip(torch.autograd.grad(loss, ours, upstream.float()), truth, strict=True):
            assert (mine - true).abs().max() <= 1e-5 * true.abs().max()


@linear_backends
def test_backward_twice_gives_the_same(backend):
    hidden, weight, _, targets, corrupted, _ = make(33, 16, 101)
    hidden.requires_grad_()
    loss = linear_masked_cross_entropy(hidden, weight, targets, corrupted, backend=backend)
    first, = torch.autograd.grad(loss, hidden, retain_graph=True)
    first = first.clone()
    second, = torch.autograd.grad(loss, hidden, 3 * torch.ones(()))
    assert (second - 3 * first).abs().max() < 1e-6


@linear_backends
@reductions
def test_a_second_derivative_is_refused(reduction, backend):
    hidden, weight, _, targets, corrupted, _ = make(7, 5, 41)
    hidden.requires_grad_()
    loss = linear_masked_cross_entropy(hidden, weight, targets, corrupted, reduction=reduction, backend=backend).sum()
    with pytest.raises(RuntimeError, match="no second derivative, which create_graph=True asks for"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@linear_backends
@reductions
def test_a_gradient_scaler_lifts_fp16_gradients_before_they_are_rounded(reduction, backend):
    hidden, weight, _, targets, corrupted, _ = make(33, 16, 1001, torch.float16)
    hidden.requires_grad_()
    weights = torch.full((33,), 1e-7)  # gradients under the smallest fp16
    loss = linear_masked_cross_entropy(hidden, weight, targets, corrupted, weights=weights, reduction=reduction,
                                       backend=backend).sum()
    gradient, = torch.autograd.grad(loss, hidden, torch.tensor(65536.0))
    truth = hidden.detach().double().requires_grad_()
    exact(F.linear(truth, weight.double()), targets, corrupted, weights.double(), reduction).sum().backward()
    assert (gradient.double() / 65536 - truth.grad).norm() <= 0.02 * truth.grad.norm()


@linear_backends
@reductions
def test_uninitialised_memory_is_never_read_and_empty_inputs_work(reduction, backend):
    hidden, weight, bias, targets, corrupted, weights = make(33, 16, 101)
    leaves = hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()

    def run(share):
        loss = linear_masked_cross_entropy(*leaves[:2], targets, corrupted & share, bias=bias, weights=weights,
                                           reduction=reduction, backend=backend)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    for share in (True, False):
        plain = run(share)
        torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
        try:
            assert all(torch.equal(mine, its) for mine, its in zip(run(share), plain, strict=True))
        finally:
            torch.use_deterministic_algorithms(False)
    loss = linear_masked_cross_entropy(hidden[:0], weight, targets[:0], corrupted[:0], reduction=reduction,
                                       backend=backend)
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum() == 0


@linear_backends
def test_shapes_strides_and_autocast(backend):
    hidden, weight, _, targets, corrupted, weights = make(12, 16, 101)
    settings = {"reduction": "none", "backend": backend}
    flat = linear_masked_cross_entropy(hidden, weight, targets, corrupted, weights=weights, **settings)
    strided = hidden.T.contiguous().T.view(3, 4, 16), weight.T.contiguous().T, targets.view(3, 4), corrupted.view(3, 4)
    out = linear_masked_cross_entropy(*strided, weights=weights.view(3, 4), **settings)
    assert out.shape == (3, 4) and (out.flatten() - flat).abs().max() < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_masked_cross_entropy(hidden, weight, targets, corrupted, weights=weights, **settings)
    assert out.dtype == torch.float32 and torch.equal(out, flat)


@linear_backends
@settings(max_examples=40, deadline=None, derandomize=True)
@given(N=st.integers(0, 70), D=st.integers(1, 40), V=st.integers(2, 400), dtype=st.sampled_from(FLOATS),
       share=st.floats(0, 1), reduction=st.sampled_from(["mean", "sum", "none"]), with_bias=st.booleans(),
       scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_any_shape_is_as_exact_as_eager(backend, N, D, V, dtype, share, reduction, with_bias, scale):
    hidden, weight, bias, targets, corrupted, weights = make(N, D, V, dtype, share)
    upstream = torch.linspace(-1, 2, N) if reduction == "none" else torch.tensor(-0.7)

    def run(function, cast):
        leaves = [x.to(cast).requires_grad_() for x in (hidden * scale, weight, *([bias] if with_bias else []))]
        loss = function(*leaves)
        gradients = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype).view_as(loss))
        return [loss.detach(), *gradients]

    def eager(h, w, b=None):
        return exact(F.linear(h, w, b), targets, corrupted, weights, reduction)

    def ours(h, w, b=None):
        return linear_masked_cross_entropy(h, w, targets, corrupted, bias=b, weights=weights, reduction=reduction,
                                           backend=backend)

    for mine, theirs, true in zip(run(ours, dtype), run(eager, dtype), run(eager, torch.double), strict=True):
        if not mine.numel():
            continue
        bound = 2 * (theirs.double() - true).abs().max() + 4e-6 * true.abs().max() + 1e-7 * scale
        assert (mine.double() - true).abs().max() <= bound


@linear_backends
@reductions
def test_under_activation_checkpointing(reduction, backend):
    hidden, weight, _, targets, corrupted, _ = make(33, 16, 101)
    hidden.requires_grad_(), weight.requires_grad_()

    def loss(hidden, weight):
        return linear_masked_cross_entropy(hidden.tanh(), weight, targets, corrupted, reduction=reduction,
                                           backend=backend).sum()

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    again = torch.autograd.grad(checkpoint(loss, hidden, weight, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.slow
@reductions
@linear_backends
def test_compiles_whole_and_passes_opcheck(reduction, backend):
    hidden, weight, bias, targets, corrupted, weights = make(9, 4, 17)
    hidden.requires_grad_(), weight.requires_grad_()
    ops = torch.ops.dllm_kernels
    torch.library.opcheck(ops.linear_masked_cross_entropy.default,
                          (hidden, weight, bias, targets, corrupted, weights, weights, None, reduction, 9.0, 1 << 20,
                           [True, True, False], backend))
    logits = F.linear(hidden, weight).detach().requires_grad_()
    torch.library.opcheck(ops.masked_cross_entropy.default,
                          (logits, targets, corrupted, None, None, None, reduction, None, None, [True], None))

    def loss(hidden, weight):
        return linear_masked_cross_entropy(hidden * 2, weight, targets, corrupted, weights=weights, reduction=reduction,
                                           backend=backend)

    eager, compiled = loss(hidden, weight), torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert torch.equal(compiled, eager)
    gradients = [torch.autograd.grad(out.sum(), (hidden, weight)) for out in (compiled, eager)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_gradients_in_double():
    hidden, weight, bias, targets, corrupted, weights = make(5, 3, 7, torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda h, w, b, r=reduction: linear_masked_cross_entropy(
            h, w, targets, corrupted, bias=b, weights=weights.double(), reduction=r), leaves)


@pytest.mark.parametrize("changes, message", [
    ({"targets": torch.zeros(3, dtype=torch.long)},
     "takes hidden [..., D], targets [...], corrupted [...] and weights [...], not [[9, 4], [3]"),
    ({"weight": torch.zeros(17, 5)}, "takes hidden [..., D], weight [V, D] and bias [V], not [[9, 4], [17, 5]]"),
    ({"corrupted": torch.zeros(9)},
     "int64 targets and bool corrupted, not torch.float32, torch.int64 and torch.float32"),
    ({"reduction": "average"}, "reduction must be one of mean, sum, none, not 'average'"),
    ({"backend": "triton9"}, "there is no backend 'triton9'"),
    ({"workspace_bytes": 0}, "workspace_bytes must be above 0, or None for the default, not 0"),
    ({"weight": torch.zeros(17, 4, dtype=torch.int8)}, "takes a floating weight and bias, not torch.int8"),
    ({"weight": torch.zeros(17, 4, device="meta")}, "inputs are on cpu, meta; move them to one device"),
    ({"softcap": 0.0}, "softcap must be above 0, or None for none, not 0.0"),
    ({"count": 99}, "count is the number of corrupted positions, "),
    ({"targets": torch.full((9,), 17)}, "must be in [0, 17), not 17 to 17; is the vocabulary that of the tokenizer?"),
    ({"targets": torch.full((9,), -100)}, "must be in [0, 17), not -100 to -100"),
    ({"targets": torch.zeros(9, dtype=torch.long, device="meta")}, "inputs are on cpu, meta; move them to one device"),
])
def test_errors_say_what_was_wanted_and_what_came(changes, message):
    hidden, weight, _, targets, corrupted, _ = make(9, 4, 17)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "corrupted": corrupted, **changes}
    with pytest.raises(ValueError) as error:
        linear_masked_cross_entropy(**arguments)
    assert message in str(error.value)
