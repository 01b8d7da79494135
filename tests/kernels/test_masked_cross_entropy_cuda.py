"""The CUDA C++ kernels of masked cross-entropy on a GPU, against float64; test_cuda_sources.py compiles them here."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from dllm_kernels import masked_cross_entropy, native_extension
from dllm_kernels.masked_cross_entropy import cuda

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=f"cannot run here: {cuda.missing()}")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of a gradient, relative to the largest


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_batch(N, V, dtype, offset=0, share=0.6):
    """Logits [N, V], a view `offset` numbers into their rows, with NaN where not corrupted; targets and corrupted."""
    g = torch.Generator().manual_seed(0)
    whole = (4 * torch.randn(N, V + offset, generator=g)).to("cuda", dtype)
    targets, corrupted = torch.randint(V, (N,), generator=g).cuda(), (torch.rand(N, generator=g) < share).cuda()
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
@pytest.mark.parametrize("shape, offset", [((5, 2), 0), ((33, 1001), 0), ((9, 151_936), 0), ((33, 4099), 1)])
def test_loss_and_gradients_against_float64(shape, offset, dtype, softcap, reduction):
    N, V = shape
    logits, targets, corrupted = make_batch(N, V, dtype, offset)
    logits.requires_grad_()
    weights = torch.linspace(1, 9, N, device="cuda")
    upstream = torch.linspace(-1, 2, N, device="cuda") if reduction == "none" else torch.tensor(0.7, device="cuda")
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
def test_logits_of_minus_infinity_and_of_10000(dtype, softcap):
    V = 1001
    logits = torch.zeros(4, V, device="cuda", dtype=dtype)
    logits[0, 1::2] = -torch.inf  # forbidden words
    logits[1] = -1e4
    logits[2, ::3], logits[2, 1::3] = 1e4, -1e4
    logits[3, 1:] = -torch.inf  # one word is left, the target
    targets, corrupted = torch.tensor([2, 7, 3, 0], device="cuda"), torch.ones(4, dtype=torch.bool, device="cuda")
    truth = logits.double().requires_grad_()
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, targets, corrupted, reduction="none", softcap=softcap, backend="cuda")
    expected = exact_loss(truth, targets, corrupted, reduction="none", softcap=softcap)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    gradient, = torch.autograd.grad(loss.sum(), logits)
    true_gradient, = torch.autograd.grad(expected.sum(), truth)
    assert (gradient - true_gradient).abs().max() <= ROUNDING[dtype] * true_gradient.abs().max() + 1e-6


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_row_shows_in_its_own_loss_only(poison):
    logits, targets, corrupted = torch.zeros(3, 5003, device="cuda"), torch.tensor([1, 2, 3]).cuda(), torch.ones(3) > 0
    logits[0, 4000] = poison
    logits[2] = -torch.inf
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, targets, corrupted.cuda(), reduction="none", backend="cuda")
    gradient, = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().tolist() == [False, True, False] and loss[0].isnan() and loss[2].isnan()
    assert gradient[1].isfinite().all() and gradient[0].isnan().any() and gradient[2].isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_corrupted_is_a_loss_and_a_gradient_of_zero(reduction):
    logits, targets, corrupted = make_batch(5, 1001, torch.bfloat16, share=0.0)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, targets, corrupted, reduction=reduction, backend="cuda")
    gradient, = torch.autograd.grad(loss.sum(), logits)
    assert (loss == 0).all() and (gradient == 0).all()


def test_no_rows():
    logits = torch.zeros(0, 7, device="cuda", requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64, device="cuda")
    loss = masked_cross_entropy(logits, nothing, nothing.bool(), backend="cuda")
    gradient, = torch.autograd.grad(loss, logits)
    assert loss == 0 and gradient.shape == (0, 7)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("V, offset", [(4096, 0), (4099, 0), (4099, 1)])
def test_gradient_onto_the_logits_equals_that_apart(V, offset, dtype):
    logits, targets, corrupted = make_batch(7, V, dtype, offset)
    whole = logits._base
    top, total, target_logit = (torch.empty(7, device="cuda") for _ in range(3))
    operators = native_extension.operators()
    operators.cross_entropy_statistics_cuda(logits, targets, corrupted, 0.0, top, total, target_logit)
    arguments = targets, corrupted, 0.0, top, 1 / total, torch.ones(7, device="cuda")
    apart = torch.full((7, V), 77, device="cuda", dtype=dtype)
    operators.cross_entropy_gradients_cuda(logits, *arguments, apart)
    beside = whole[:, :offset].clone()
    operators.cross_entropy_gradients_cuda(logits, *arguments, logits)
    assert (logits[~corrupted] == 0).all() and (apart[~corrupted] == 0).all()
    assert (logits - apart).abs().max() <= ROUNDING[dtype]  # of at most 1; numbers read one by one may round otherwise
    assert torch.equal(whole[:, :offset].nan_to_num(), beside.nan_to_num())  # what lies between the rows


def test_runs_on_the_current_stream():
    logits, targets, corrupted = make_batch(64, 32_000, torch.float32, share=1.0)
    expected = exact_loss(logits.double(), targets, corrupted)
    stream, later = torch.cuda.Stream(), torch.zeros_like(logits)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the logits are not there before it ends
        later.copy_(logits)
        loss = masked_cross_entropy(later, targets, corrupted, backend="cuda")
    stream.synchronize()
    assert (loss - expected).abs() <= 1e-5 * expected


def test_a_target_out_of_range_shows_in_the_loss():
    loss = masked_cross_entropy(torch.zeros(3, 7, device="cuda"), torch.tensor([3, 7, -1], device="cuda"),
                                torch.ones(3, dtype=torch.bool, device="cuda"), reduction="none", backend="cuda")
    assert loss[0].isfinite() and loss[1:].isnan().all()


def test_second_derivative_is_refused():
    logits, targets, corrupted = make_batch(5, 11, torch.float32)
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, targets, corrupted, backend="cuda")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_one_word():
    logits = torch.randn(1, 5, device="cuda").T.requires_grad_()  # [5, 1], the last dimension's stride is 5
    loss = masked_cross_entropy(logits, torch.zeros(5, dtype=torch.int64, device="cuda"),
                                torch.ones(5, dtype=torch.bool, device="cuda"), backend="cuda")
    assert loss == 0
