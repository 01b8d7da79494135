"""Every operation with the tiles that users get, against the reference: what `make bench-gpu` runs first on a GPU.

Few shapes and one dtype, so that a GPU compiles few kernels, which are counted; the other files have the shapes, dtypes
and tiles that could go wrong. Without a GPU the first test runs this file again in Triton's interpreter (conftest.py).
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dllm_kernels as dk
from dllm_kernels.dispatch import runnable
from tests.kernels.triton_cases import DEVICE, DTYPES, INTERPRETED

pytest.importorskip("triton")

DTYPE = DTYPES[-1]  # of 16 bits
MOST_KERNELS = 80  # compiled by a GPU: a second each on one core
attention, masked_cross_entropy, topk_unmask = (  # whose names the package has for functions
    importlib.import_module(f"dllm_kernels.{name}") for name in ("attention", "masked_cross_entropy", "topk_unmask"))
B, L, V, MASK = 2, 80, 1001, 3


@pytest.mark.exhaustive
@pytest.mark.slow
def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


pytestmark = pytest.mark.gpu


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(DEVICE, DTYPE)


def backends(table) -> list[str]:
    """Ours that run here."""
    return [name for name in runnable(table, torch.empty(1, dtype=DTYPE, device=DEVICE)) if name in ("triton", "cuda")]


def assert_near(ours, truth, rounding: float):
    for mine, true in zip(ours, truth, strict=True):
        true = true.double().cpu()
        assert (mine.double().cpu() - true).abs().max() <= rounding * true.abs().max()


def with_gradients(function, *leaves: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.linspace(0.5, 1, out.numel()).view_as(out).to(out))]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize("backend", backends(masked_cross_entropy.LINEAR_BACKENDS))
def test_the_loss_of_hidden_states_and_of_logits(backend, count, softcap):
    hidden, weight = random(B * L, 64), random(V, 64, scale=0.3)
    targets, corrupted = torch.arange(B * L, device=DEVICE) * 5, torch.arange(B * L, device=DEVICE) % 3 > 0

    def linear(backend):
        return lambda x, w: dk.linear_masked_cross_entropy(
            x, w, targets, corrupted, weights=corrupted.float() * 2, softcap=softcap, backend=backend,
            count=int(corrupted.sum()) if count else None)

    def of_logits(backend):
        return lambda z: dk.masked_cross_entropy(z, targets, corrupted, softcap=softcap, backend=backend)

    assert_near(with_gradients(linear(backend), hidden, weight),
                with_gradients(linear("reference"), hidden.float(), weight.float()), 0.02)
    logits = F.linear(hidden, weight)
    truth = with_gradients(of_logits("reference"), logits.float())
    assert_near(with_gradients(of_logits(backend), logits), truth, 0.02)


def test_the_divergence_from_a_teacher():
    hidden, weight, teacher = random(B * L, 64), random(V, 64, scale=0.3), random(V, 64, scale=0.2)
    corrupted = torch.arange(B * L, device=DEVICE) % 3 > 0

    def run(backend):
        return lambda x, w: dk.linear_masked_kl_divergence(x, w, hidden.to(x.dtype), teacher.to(x.dtype), corrupted,
                                                           backend=backend)

    assert_near(with_gradients(run("triton"), hidden, weight),
                with_gradients(run("reference"), hidden.float(), weight.float()), 0.02)


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0.7}, {"temperature": 0.9, "top_p": 0.9}, {"confidence": "entropy"}], ids=str)
@pytest.mark.parametrize("form, backend", [
    *(("logits", name) for name in backends(topk_unmask.LOGITS_BACKENDS)),
    *(("linear", name) for name in backends(topk_unmask.LINEAR_BACKENDS))])
def test_a_denoising_step(form, backend, settings):
    tokens = torch.where(torch.arange(B * L, device=DEVICE).view(B, L) % 3 > 0, MASK, 7)
    hidden, weight = random(B, L, 64), random(V, 64, scale=0.3)
    uniform = torch.rand(B, L, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(backend, cast):
        rest = {"generator": uniform, "backend": backend, **settings}
        if form == "linear":
            return dk.linear_topk_unmask(hidden.to(cast), weight.to(cast), tokens, MASK, 5, **rest)
        return dk.topk_unmask(F.linear(hidden, weight).to(cast), tokens, MASK, 5, **rest)

    if form == "linear" and "top_p" in settings:
        pytest.skip("with filters the logits are stored, and tokens near the cut differ by rounding")
    ours, truth = run(backend, DTYPE), run("reference", torch.float32)
    same = ours.tokens == truth.tokens
    assert same.float().mean() > 0.98 and (ours.committed.sum(1) == 5).all()
    masked = tokens == MASK
    assert (ours.confidence - truth.confidence)[masked & same].abs().max() <= 0.02


@pytest.mark.parametrize("E", [64, 128])
@pytest.mark.parametrize("kind", ["dense", "blocks", "packed", "diffusion", "causal"])
def test_attention(kind, E):
    q, k, v = random(B, 2 * L, 4, E), random(B, 2 * L, 2, E), random(B, 2 * L, 2, E, scale=0.5)
    keys = torch.arange(2 * L, device=DEVICE).unsqueeze(0) < torch.tensor([[2 * L], [90]], device=DEVICE)
    ends = torch.tensor([0, 33, 2 * L, 4 * L], dtype=torch.int32, device=DEVICE)

    def run(backend):
        def attend(q, k, v):
            if kind == "packed":
                flat = (x.flatten(0, 1) for x in (q, k, v))
                return dk.bidirectional_attention_varlen(*flat, ends, 2 * L, backend=backend)
            if kind in ("diffusion", "causal"):
                return dk.block_diffusion_attention(q, k, v, 8, causal=kind == "causal", backend=backend)
            masks = {"block_length": 32} if kind == "blocks" else {"key_mask": keys}
            return dk.bidirectional_attention(q, k, v, **masks, backend=backend)
        return attend

    assert_near(with_gradients(run("triton"), q, k, v),
                with_gradients(run("reference"), *(x.float() for x in (q, k, v))), 0.02)


@pytest.mark.parametrize("backend", backends(attention.DENSE_BACKENDS))
def test_decoding_from_a_cache(backend):
    q, cache = random(B, 8, 14, 64), random(5, 200, 4, 64)
    k, v, rows = cache[:, :, :2], cache[:, :, 2:], torch.tensor([4, 1], device=DEVICE)
    ours, truth = (dk.bidirectional_attention(q.to(cast), k.to(cast), v.to(cast), cache_rows=rows, backend=name)
                   for name, cast in ((backend, DTYPE), ("reference", torch.float32)))
    assert_near([ours], [truth], 0.02)


@pytest.fixture(scope="module", autouse=True)
def few_kernels():
    """What a GPU would compile for this file: kernels by their constants, dtypes, absent arguments and divisibility."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    seen, launch = set(), interpreter.GridExecutor.__call__

    def kind(value):
        if isinstance(value, Tensor):
            return str(value.dtype), value.data_ptr() % 16 == 0
        return ("int", value == 1, value % 16 == 0) if type(value) is int else repr(value)

    def watched(self, *args, **kwargs):
        # The interpreter ignores numbers of warps and stages, which the tables fix for each kernel.
        seen.add((self.fn.__name__, *map(kind, args), *((name, repr(value)) for name, value in kwargs.items())))
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", watched)
        yield
    assert len(seen) <= MOST_KERNELS, sorted(name for name, *_ in seen)
