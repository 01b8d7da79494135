"""The CUDA C++ kernels of masked cross-entropy against float64: on a GPU and, thread by thread, on a CPU (simt.h)."""

import contextlib
import ctypes
import importlib

import pytest
import torch
import torch.nn.functional as F

from dllm_kernels import linear_masked_cross_entropy, masked_cross_entropy, native_extension
from dllm_kernels.masked_cross_entropy import cuda
from dllm_kernels.masked_cross_entropy.products import Chunk
from dllm_kernels.masked_cross_entropy.rows import Form, Scale, Scored

loss = importlib.import_module("dllm_kernels.masked_cross_entropy")
ON_GPU = cuda.missing() is None
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=f"cannot run here: {cuda.missing()}")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of a gradient, relative to the largest


NUMBERS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 1}  # as the emulator calls them


class Emulated:
    """The operators of the extension, run by the emulator."""

    kept = 40  # packs of a row in shared memory, fewer than a long row has

    def __init__(self, path):
        self.compiled = ctypes.CDLL(str(path))

    def _run(self, name, logits, *arguments):
        given = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else
                 ctypes.c_double(x) if isinstance(x, float) else None if x is None else ctypes.c_int64(x)
                 for x in (logits, *arguments)]
        function = getattr(self.compiled, name)
        function.restype = ctypes.c_int64
        assert function(NUMBERS[logits.dtype], *given) == 0

    def cross_entropy_statistics_cuda(self, logits, targets, corrupted, softcap, *out):
        self._run("statistics", logits, targets, corrupted, torch.tensor([*logits.shape, logits.stride(0)]), softcap,
                  *out)

    def cross_entropy_gradients_cuda(self, logits, targets, corrupted, softcap, top, probability, target, grad):
        sizes = torch.tensor([*logits.shape, logits.stride(0), grad.stride(0)])
        self._run("gradients", logits, targets, corrupted, sizes, softcap, top, probability, target, grad)

    def cross_entropy_rows_cuda(self, logits, targets, scale, probability_scale, live, softcap, gradient, clear, nll):
        self._run("loss", logits, targets, scale, probability_scale, live,
                  torch.tensor([*logits.shape, logits.stride(0)]), softcap, gradient, clear, self.kept, nll)


@pytest.fixture(scope="module")
def emulator(emulator_library):
    return Emulated(emulator_library("cross_entropy_on_cpu.cpp"))


@pytest.fixture(params=[
    pytest.param("emulated", marks=pytest.mark.slow), pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
def device(request, monkeypatch):
    """Where the tensors are; on the CPU the operators are the emulator's."""
    if request.param == "gpu":
        return "cuda"
    emulated = request.getfixturevalue("emulator")
    monkeypatch.setattr(native_extension, "operators", lambda: emulated)
    here = {op: [b._replace(missing=lambda: None, refuses=lambda tensor: None) if b.name == "cuda" else b
                 for b in backends] for op, backends in loss.BACKENDS.items()}
    monkeypatch.setattr(loss, "BACKENDS", here)
    return "cpu"


@contextlib.contextmanager
def no_synchronisation():
    """On a GPU."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_batch(N, V, dtype, device, offset=0, share=0.6):
    """Logits [N, V], a view `offset` numbers into their rows, with NaN where not corrupted; targets and corrupted."""
    g = torch.Generator().manual_seed(0)
    whole = (4 * torch.randn(N, V + offset, generator=g)).to(device, dtype)
    targets, corrupted = torch.randint(V, (N,), generator=g), torch.rand(N, generator=g) < share
    targets, corrupted = targets.to(device), corrupted.to(device)
    whole[~corrupted] = torch.nan
    return whole[:, offset:], targets, corrupted


def exact_loss(logits, targets, corrupted, weights=None, reduction="mean", softcap=None):
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(z, targets, reduction="none")
    loss = torch.where(corrupted, nll if weights is None else nll * weights.double(), 0)
    if reduction == "none":
        return loss
    return loss.sum() / (corrupted.sum().clamp(min=1) if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape, offset", [((5, 2), 0), ((9, 1001), 0), ((3, 40_000), 0), ((9, 4099), 1)])
def test_loss_and_gradients_against_float64(shape, offset, dtype, softcap, reduction, device):
    N, V = shape
    logits, targets, corrupted = make_batch(N, V, dtype, device, offset)
    logits.requires_grad_()
    weights = torch.linspace(1, 9, N, device=device)
    upstream = torch.linspace(-1, 2, N, device=device) if reduction == "none" else torch.tensor(0.7, device=device)
    with no_synchronisation():
        loss = masked_cross_entropy(logits, targets, corrupted, weights=weights, reduction=reduction, softcap=softcap,
                                    backend="cuda")
        gradient, = torch.autograd.grad(loss, logits, upstream)
    truth = logits.detach().double().masked_fill(~corrupted[:, None], 0).requires_grad_()
    expected = exact_loss(truth, targets, corrupted, weights, reduction, softcap)
    true_gradient, = torch.autograd.grad(expected, truth, upstream.double())
    assert (loss - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9
    assert (gradient - true_gradient).abs().max() <= ROUNDING[dtype] * true_gradient.abs().max() + 1e-7
    assert (gradient[~corrupted] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_minus_infinity_and_of_10000(dtype, softcap, device):
    V = 1001
    logits = torch.zeros(4, V, device=device, dtype=dtype)
    logits[0, 1::2] = -torch.inf  # forbidden words
    logits[1] = -1e4
    logits[2, ::3], logits[2, 1::3] = 1e4, -1e4
    logits[3, 1:] = -torch.inf  # one word is left, the target
    targets, corrupted = torch.tensor([2, 7, 3, 0], device=device), torch.ones(4, dtype=torch.bool, device=device)
    truth = logits.double().requires_grad_()
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, targets, corrupted, reduction="none", softcap=softcap, backend="cuda")
    expected = exact_loss(truth, targets, corrupted, reduction="none", softcap=softcap)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    gradient, = torch.autograd.grad(loss.sum(), logits)
    true_gradient, = torch.autograd.grad(expected.sum(), truth)
    assert (gradient - true_gradient).abs().max() <= ROUNDING[dtype] * true_gradient.abs().max() + 1e-6


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_row_shows_in_its_own_loss_only(poison, device):
    logits, targets = torch.zeros(3, 5003, device=device), torch.tensor([1, 2, 3], device=device)
    corrupted = torch.ones(3, dtype=torch.bool)
    logits[0, 4000] = poison
    logits[2] = -torch.inf
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, targets, corrupted.to(device), reduction="none", backend="cuda")
    gradient, = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().tolist() == [False, True, False] and loss[0].isnan() and loss[2].isnan()
    assert gradient[1].isfinite().all() and gradient[0].isnan().any() and gradient[2].isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_corrupted_is_a_loss_and_a_gradient_of_zero(reduction, device):
    logits, targets, corrupted = make_batch(5, 1001, torch.bfloat16, device, share=0.0)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, targets, corrupted, reduction=reduction, backend="cuda")
    gradient, = torch.autograd.grad(loss.sum(), logits)
    assert (loss == 0).all() and (gradient == 0).all()


def test_no_rows(device):
    logits = torch.zeros(0, 7, device=device, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    loss = masked_cross_entropy(logits, nothing, nothing.bool(), backend="cuda")
    gradient, = torch.autograd.grad(loss, logits)
    assert loss == 0 and gradient.shape == (0, 7)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("V, offset", [(4096, 0), (4099, 0), (4099, 1)])
def test_gradient_onto_the_logits_equals_that_apart(V, offset, dtype, device):
    logits, targets, corrupted = make_batch(7, V, dtype, device, offset)
    whole = logits._base
    top, total, target_logit = (torch.empty(7, device=device) for _ in range(3))
    operators = native_extension.operators()
    operators.cross_entropy_statistics_cuda(logits, targets, corrupted, 0.0, top, total, target_logit)
    arguments = targets, corrupted, 0.0, top, 1 / total, torch.ones(7, device=device)
    apart = torch.full((7, V), 77, device=device, dtype=dtype)
    operators.cross_entropy_gradients_cuda(logits, *arguments, apart)
    beside = whole[:, :offset].clone()
    operators.cross_entropy_gradients_cuda(logits, *arguments, logits)
    assert (logits[~corrupted] == 0).all() and (apart[~corrupted] == 0).all()
    assert (logits - apart).abs().max() <= ROUNDING[dtype]  # of at most 1; numbers read one by one may round otherwise
    assert torch.equal(whole[:, :offset].nan_to_num(), beside.nan_to_num())  # what lies between the rows


@needs_gpu
def test_runs_on_the_current_stream():
    device = "cuda"
    logits, targets, corrupted = make_batch(64, 32_000, torch.float32, device, share=1.0)
    expected = exact_loss(logits.double(), targets, corrupted)
    stream, later = torch.cuda.Stream(), torch.zeros_like(logits)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the logits are not there before it ends
        later.copy_(logits)
        loss = masked_cross_entropy(later, targets, corrupted, backend="cuda")
    stream.synchronize()
    assert (loss - expected).abs() <= 1e-5 * expected


def test_a_target_out_of_range_shows_in_the_loss(device):
    targets, every = torch.tensor([3, 7, -1], device=device), torch.ones(3, dtype=torch.bool, device=device)
    found = cuda.statistics(torch.zeros(3, 7, device=device), Scored(targets, every, None), Form("none", None))
    assert found[2].isnan().tolist() == [False, True, True]


def test_second_derivative_is_refused(device):
    logits, targets, corrupted = make_batch(5, 11, torch.float32, device)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, targets, corrupted, backend="cuda")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_one_word(device):
    logits = torch.randn(1, 5, device=device).T.requires_grad_()  # [5, 1], the last dimension's stride is 5
    loss = masked_cross_entropy(logits, torch.zeros(5, dtype=torch.int64, device=device),
                                torch.ones(5, dtype=torch.bool, device=device), backend="cuda")
    assert loss == 0


def chunk_of(logits, targets, live=None, clear=True):
    return Chunk(torch.arange(len(logits), device=logits.device), logits, targets, live, clear)


def make_rows(C, V, dtype, device, offset=0):
    """Logits [C, V], a view `offset` numbers into their rows, targets, and both scales, of which one is 0."""
    logits, targets, _ = make_batch(C, V, dtype, device, offset, share=1.0)
    return logits, targets, Scale(torch.linspace(0, 2, C, device=device), torch.linspace(1, 3, C, device=device))


@pytest.mark.parametrize("planner", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape, offset", [((5, 2), 0), ((9, 1001), 0), ((3, 40_000), 0), ((9, 4099), 1)])
def test_loss_and_gradient_in_one_pass_over_a_chunk(shape, offset, dtype, softcap, planner, device):
    logits, targets, scale = make_rows(*shape, dtype, device, offset)
    scale = scale if planner else scale._replace(of_probability=None)
    truth, beside = logits.double().requires_grad_(), logits._base[:, :offset].clone()
    expected = exact_loss(truth, targets, torch.ones_like(targets, dtype=torch.bool), reduction="none", softcap=softcap)
    factor = scale.plain + (scale.of_probability * (-expected.detach()).exp() if planner else 0)
    true_gradient, = torch.autograd.grad((factor * expected).sum(), truth)
    with no_synchronisation():
        alone = cuda.row_pass(chunk_of(logits.clone(), targets), scale, softcap, False)
        nll = cuda.row_pass(chunk_of(logits, targets), scale, softcap, True)
    assert (alone - nll).abs().max() <= 1e-6 * nll.abs().max()
    assert (nll - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits - true_gradient).abs().max() <= ROUNDING[dtype] * true_gradient.abs().max() + 1e-7
    assert torch.equal(logits._base[:, :offset], beside)


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("live", [-3, 0, 2, 5, 9])
def test_rows_that_are_not_live_are_not_read(live, clear, device):
    logits, targets, scale = make_rows(5, 1001, torch.float32, device)
    plain, expected = logits.clone(), logits.clone()
    nll = cuda.row_pass(chunk_of(expected, targets), scale, None, True)
    count = min(max(live, 0), 5)
    logits[count:] = plain[count:] = torch.nan
    found = cuda.row_pass(chunk_of(logits, targets, torch.tensor(live, device=device), clear), scale, None, True)
    assert torch.equal(found[:count], nll[:count]) and (found[count:] == 0).all()
    assert torch.equal(logits[:count], expected[:count])
    assert (logits[count:] == 0).all() if clear else logits[count:].isnan().all()


@pytest.mark.parametrize("target", [-1, 7, 2**40])
def test_a_chunks_target_out_of_range_shows_in_its_loss(target, device):
    logits, targets = torch.zeros(2, 7, device=device), torch.tensor([3, target], device=device)
    nll = cuda.row_pass(chunk_of(logits, targets), Scale(torch.ones(2, device=device), None), None, True)
    assert nll[0].isfinite() and nll[1].isnan()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_from_hidden_states(reduction, dtype, device):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).to(device, dtype) for shape in ((20, 16), (1003, 16)))
    targets, corrupted = torch.randint(1003, (20,), generator=g), torch.rand(20, generator=g) < 0.5
    targets, corrupted = targets.to(device), corrupted.to(device)
    weights, upstream = torch.linspace(1, 9, 20, device=device), torch.linspace(-1, 2, 20, device=device)

    def run(dtype, function):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        found = function(*leaves)
        given = upstream if reduction == "none" else upstream[3]
        return found, *torch.autograd.grad(found, leaves, given.to(found.dtype))

    def ours(x, w):
        return linear_masked_cross_entropy(x, w, targets, corrupted, weights=weights, reduction=reduction,
                                           workspace_bytes=9 * 1008 * 4, backend="cuda")

    def eager(x, w):
        return exact_loss(F.linear(x, w), targets, corrupted, weights, reduction)

    with no_synchronisation():
        found = run(dtype, ours)
    for mine, its, true in zip(found, run(dtype, eager), run(torch.double, eager), strict=True):
        assert (mine - true).abs().max() <= 2 * (its - true).abs().max() + ROUNDING[dtype] * true.abs().max()
