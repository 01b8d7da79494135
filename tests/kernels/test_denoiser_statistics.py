"""The denoiser's statistics and soft embedding: every backend against the definition in float64."""

import numpy as np
import pytest
import torch

from dllm_kernels import linear_denoiser_statistics, soft_embedding
from dllm_kernels.denoiser_statistics import SOFT_BACKENDS, STATISTICS_BACKENDS
from dllm_kernels.dispatch import runnable

BACKENDS = runnable(STATISTICS_BACKENDS, torch.zeros(1))
SOFT = runnable(SOFT_BACKENDS, torch.zeros(1))
SHAPES = [(1, 2, 1), (7, 41, 5), (33, 1031, 66), (200, 1400, 8), (3, 9001, 8)]  # M, V, D: no block divides them


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(M, V, D, dtype=torch.float32, scale=3.0, seed=0):
    """Hidden states and a head whose logits have the standard deviation `scale`; uniforms."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(M, D, generator=g), torch.randn(V, D, generator=g)
    return (hidden * scale / D**0.5).to(dtype), weight.to(dtype), torch.rand(M, 2, dtype=torch.float64, generator=g)


def z64(hidden, weight, temperature=1.0, softcap=None):
    z = hidden.double() @ weight.double().T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / (temperature.double().unsqueeze(1) if isinstance(temperature, torch.Tensor) else temperature)


def check(ours, z, u):
    p = z.softmax(-1)
    exact = -torch.xlogy(p, p).sum(-1)
    torch.testing.assert_close(ours.entropy.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.log_normaliser.double(), z.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert ours.entropy.dtype == ours.log_normaliser.dtype == torch.float32
    assert ours.token.dtype == ours.argmax.dtype == torch.int64
    top = z.gather(1, ours.argmax.unsqueeze(1)).squeeze(1)
    assert (top >= z.amax(-1) - 1e-4).all()
    ends = p.cumsum(-1)
    begin, end = (torch.where(place >= 0, ends.gather(1, place.clamp(min=0).unsqueeze(1)).squeeze(1), 0)
                  for place in (ours.token - 1, ours.token))
    assert (begin - 1e-5 <= u[:, 0]).all() and (u[:, 0] < end + 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M, V, D", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_statistics_equal_the_definition(M, V, D, dtype, softcap, backend):
    hidden, weight, u = make(M, V, D, dtype)
    for temperature in (1.0, 0.4, torch.linspace(0.3, 2, M)):
        ours = linear_denoiser_statistics(hidden, weight, None, temperature=temperature, softcap=softcap, generator=u,
                                          backend=backend)
        check(ours, z64(hidden, weight, temperature, softcap), u)


@pytest.mark.parametrize("backend", SOFT)
@pytest.mark.parametrize("M, V, D", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_soft_embedding_error_at_most_twice_that_of_eager(M, V, D, dtype, softcap, backend):
    hidden, weight, _ = make(M, V, D, dtype)
    for temperature in (1.0, torch.linspace(0.3, 2, M)):
        settings = {"temperature": temperature, "softcap": softcap}
        z = z64(hidden, weight, **settings)
        exact = z.softmax(-1) @ weight.double()
        z_of_eager = hidden.float() @ weight.float().T
        if softcap is not None:
            z_of_eager = torch.tanh(z_of_eager / softcap) * softcap
        divisor = temperature.unsqueeze(1) if isinstance(temperature, torch.Tensor) else temperature
        eager = (z_of_eager / divisor).softmax(-1).to(dtype) @ weight
        alone = soft_embedding(hidden, weight, None, z.logsumexp(-1).float(), backend=backend, **settings)
        with_statistics = linear_denoiser_statistics(hidden, weight, None, soft=True, backend=backend, **settings).soft
        for ours in (alone, with_statistics):
            assert ours.dtype == dtype and ours.shape == (M, D)
            assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_entropies_of_the_goldens(backend, shared):
    golden = np.load(shared / "golden/diffusion_gemma/sampler.npz")
    z, entropy = (torch.from_numpy(golden[name]).flatten(0, 1) for name in ("logits", "entropy"))
    ours = linear_denoiser_statistics(z, torch.eye(z.shape[1]), None, backend=backend)
    torch.testing.assert_close(ours.entropy, entropy, rtol=0, atol=2e-5)
    assert torch.equal(ours.argmax, z.argmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_are_rows_of_the_flattened_leading_shape(backend):
    hidden, weight, u = make(12, 41, 5)
    hidden, places = hidden.view(2, 6, 5), torch.tensor([11, 0, 7, 7])
    unread = torch.full((12, 1), True).index_fill(0, places, False).view(2, 6, 1)
    poisoned = hidden.masked_fill(unread, torch.nan)
    ours = linear_denoiser_statistics(poisoned, weight, places, generator=u[:4], backend=backend)
    check(ours, z64(hidden.flatten(0, 1)[places], weight), u[:4])
    soft = soft_embedding(poisoned, weight, places, ours.log_normaliser)
    exact = z64(hidden.flatten(0, 1)[places], weight).softmax(-1) @ weight.double()
    torch.testing.assert_close(soft.double(), exact, rtol=1e-5, atol=1e-5)
    none = linear_denoiser_statistics(hidden, weight, places[:0], backend=backend)
    assert all(x.shape == (0,) for x in none[:4])
    assert soft_embedding(hidden, weight, places[:0], none.log_normaliser).shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_nan_and_infinite_ones(backend):
    hidden, u = torch.ones(1, 1), torch.tensor([[0.3, 0.5]], dtype=torch.double)

    def of(*changes):
        weight = torch.linspace(-1, 1, 3001).unsqueeze(1)
        for words, z in changes:
            weight[words] = z
        return linear_denoiser_statistics(hidden, weight, None, generator=u, soft=True, backend=backend)

    inf, every = torch.inf, slice(None)
    assert of(([2999, 1500, 17], 9.0)).argmax == 17
    only = of((every, -inf), (2000, 7.0))
    assert only[:4] == (2000, 2000, 0.0, 7.0) and only.soft.isnan()  # 0 * -inf, as softmax(z) @ weight has it
    half = of((slice(0, None, 2), -inf), (slice(1, None, 2), 0.0))
    assert half.token == 2 * int(0.3 * 1500) + 1 and half.argmax == 1 and abs(half.entropy - np.log(1500)) < 1e-5
    for bad in (of((1234, torch.nan)), of((5, inf)), of((every, -inf)), of((every, torch.nan))):
        assert bad.entropy.isnan() and bad.log_normaliser.isnan() and bad.soft.isnan()
        assert 0 <= bad.token < 3001 and 0 <= bad.argmax < 3001


def test_errors_say_what_is_wanted():
    hidden, weight, u = make(4, 9, 3)
    for wrong, message in (
            ({"temperature": 0.0}, "temperature must be above 0 and finite, not 0.0"),
            ({"temperature": torch.ones(3)}, r"takes temperature \[4\] of floats, or one number, not \[3\]"),
            ({"temperature": torch.tensor([1.0, 1.0, -2.0, 1.0])}, "temperatures must be above 0, not -2"),
            ({"softcap": 0.0}, "softcap must be above 0 and finite, or None for no cap, not 0.0"),
            ({"generator": u[:2]}, r"takes uniforms \[4, 2\] float64, not \[2, 2\]"),
            ({"backend": "abacus"}, "there is no backend 'abacus'")):
        with pytest.raises(ValueError, match=f"linear_denoiser_statistics.*{message}"):
            linear_denoiser_statistics(hidden, weight, None, **wrong)
    with pytest.raises(ValueError, match=r"takes hidden \[..., D\] and weight \[V, D\], not \[4, 3\] and \[3, 9\]"):
        linear_denoiser_statistics(hidden, weight.T, None)
    with pytest.raises(ValueError, match=r"takes positions \[M\] int64, or None for all, not \[2\] torch.int32"):
        linear_denoiser_statistics(hidden, weight, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"soft_embedding takes log_normaliser \[4\] float32, not \[4, 1\]"):
        soft_embedding(hidden, weight, None, torch.zeros(4, 1))


def test_threads_share_the_words_and_give_the_same():
    hidden, weight, u = make(21, 1501, 9)
    settings = {"softcap": 5.0, "generator": u, "soft": True, "backend": BACKENDS[0]}
    alone = linear_denoiser_statistics(hidden, weight, None, **settings)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = linear_denoiser_statistics(hidden, weight, None, **settings)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.token, together.token) and torch.equal(alone.argmax, together.argmax)
    torch.testing.assert_close(alone[2:], together[2:], rtol=1e-5, atol=1e-6)


def test_any_strides_and_a_dtype_for_each():
    hidden, weight, u = make(9, 301, 6)
    want = linear_denoiser_statistics(hidden, weight, None, generator=u, soft=True, backend="reference")
    for backend in BACKENDS:
        ours = linear_denoiser_statistics(hidden.T.contiguous().T, weight.T.contiguous().T, None,
                                          generator=u.repeat(1, 2)[:, ::2][:, [0, 0]], soft=True, backend=backend)
        assert torch.equal(ours.token, want.token)
        torch.testing.assert_close(ours[2:], want[2:], rtol=1e-5, atol=1e-5)
        mixed = linear_denoiser_statistics(hidden.double().float(), weight.bfloat16(), None, soft=True, backend=backend)
        assert mixed.soft.dtype == torch.bfloat16 and mixed.entropy.dtype == torch.float32
        torch.testing.assert_close(mixed.soft.float(), want.soft, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend):
    hidden, weight, u = make(4, 41, 3)
    inputs, ops = (hidden, weight, torch.ones(4), 5.0), torch.ops.dllm_kernels
    for soft in (False, True):
        torch.library.opcheck(ops.linear_denoiser_statistics.default, (*inputs, u[:, 0].clone(), soft, backend))
    torch.library.opcheck(ops.soft_embedding.default, (*inputs, torch.full((4,), 4.0), backend))


def test_torch_compile_keeps_both_operators_whole():
    hidden, weight, u = make(4, 41, 3)

    def both(hidden, u):
        found = linear_denoiser_statistics(hidden, weight, None, temperature=0.7, softcap=5.0, generator=u, soft=True)
        return *found, soft_embedding(hidden, weight, None, found.log_normaliser, temperature=0.7, softcap=5.0)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, want in zip(compiled(hidden, u), both(hidden, u), strict=True):
        torch.testing.assert_close(ours, want)
