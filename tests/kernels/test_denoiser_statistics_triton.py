"""The Triton kernels of the denoiser's statistics against the reference, on a GPU or in Triton's interpreter.

Without a GPU the first test runs this file again in a process of its own (conftest.py).
"""

import pytest
import torch

import dllm_kernels
from dllm_kernels.denoiser_statistics import reference
from dllm_kernels.denoiser_statistics.settings import Inputs
from tests.kernels.triton_cases import DEVICE, DTYPES, with_dtypes

pytest.importorskip("triton")
from dllm_kernels.denoiser_statistics import triton_kernels  # noqa: E402

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.mark.slow
def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.fixture
def small_slabs(monkeypatch):
    """Slabs, tiles and chunks of rows so small that every loop has several of them."""
    for name, value in (("WORDS", 32), ("TILES", 4), ("SLAB", {"num_warps": 4}), ("WORKSPACE_BYTES", {"cuda": 8000}),
                        ("CHOOSE", {"INNER": 16, "num_warps": 4})):
        monkeypatch.setattr(triton_kernels, name, value)


@pytest.fixture
def poisoned():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # of a GPU's products, some are not
    yield
    torch.use_deterministic_algorithms(False)


def make(M, V, D, dtype, softcap, seed=0):
    g = torch.Generator().manual_seed(seed + V)
    hidden, weight = 3 * torch.randn(M, D, generator=g) / D**0.5, torch.randn(V, D, generator=g)
    u, temperature = torch.rand(M, dtype=torch.float64, generator=g), 0.3 + torch.rand(M, generator=g)
    return Inputs(hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), temperature.to(DEVICE), softcap), u.to(DEVICE)


def assert_same(ours, want, dtype):
    """The tokens are the reference's: no u here is within rounding of where its token changes."""
    assert torch.equal(ours.token, want.token) and torch.equal(ours.argmax, want.argmax)
    torch.testing.assert_close(ours[2:4], want[2:4], rtol=1e-5, atol=1e-5, equal_nan=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours.soft, want.soft, rtol=tolerance, atol=tolerance, equal_nan=True)


@with_dtypes("M, V, D, softcap", [(1, 1, 1, None), (3, 2, 17, 5.0), (4, 301, 33, None), (2, 129, 8, 30.0),
                                  (12, 128, 16, 5.0)], DTYPES)
def test_equals_the_reference(M, V, D, softcap, dtype, small_slabs, poisoned):
    inputs, u = make(M, V, D, dtype, softcap)
    assert_same(triton_kernels.statistics(inputs, u, True), reference.statistics(inputs, u, True), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_slabs(dtype):
    inputs, u = make(3, 9001, 8, dtype, 10.0)
    assert_same(triton_kernels.statistics(inputs, u, True), reference.statistics(inputs, u, True), dtype)


def test_equal_nan_and_infinite_logits_and_no_rows(small_slabs, poisoned):
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64, device=DEVICE)
    hidden, temperature = torch.ones(3, 1, device=DEVICE), torch.ones(3, device=DEVICE)

    def of(words, z, other=-1.0):
        weight = torch.full((201, 1), other, device=DEVICE)
        weight[words] = z
        return triton_kernels.statistics(Inputs(hidden, weight, temperature, None), u, True)

    assert of([199, 150, 17], 2.0).argmax.tolist() == [17] * 3
    only = of([5, 200], 0.0, other=-torch.inf)
    assert only.token[0] == 5 and only.token[2] == 200 and only.argmax.tolist() == [5] * 3
    for bad in (of(77, torch.nan), of(77, torch.inf), of(77, -torch.inf, other=-torch.inf)):
        assert bad.entropy.isnan().all() and bad.log_normaliser.isnan().all() and bad.soft.isnan().all()
        assert ((bad.token >= 0) & (bad.token < 201) & (bad.argmax >= 0) & (bad.argmax < 201)).all()
    none = triton_kernels.statistics(Inputs(hidden[:0], hidden, temperature[:0], None), u[:0], True)
    assert none.token.shape == none.entropy.shape == (0,) and none.soft.shape == (0, 1)


def test_through_the_public_functions(small_slabs, poisoned):
    inputs, u = make(6, 150, 8, torch.float32, 5.0)
    places, u = torch.tensor([5, 0, 3], device=DEVICE), torch.stack((u, u), 1)[:3]
    settings = {"temperature": inputs.temperature[:3], "softcap": 5.0}
    ours, alone, want = (dllm_kernels.linear_denoiser_statistics(
        inputs.hidden.view(2, 3, 8), inputs.weight, places, generator=u, soft=soft, backend=name, **settings)
        for name, soft in (("triton", True), ("triton", False), ("reference", True)))
    assert_same(ours, want, torch.float32)
    assert alone.soft is None and all(map(torch.equal, alone[:4], ours[:4]))
    soft = dllm_kernels.soft_embedding(inputs.hidden.view(2, 3, 8), inputs.weight, places, ours.log_normaliser,
                                       backend="triton", **settings)
    torch.testing.assert_close(soft, want.soft, rtol=1e-5, atol=1e-5)


@on_gpu
def test_the_host_never_waits_and_a_graph_replays_on_new_inputs():
    inputs, u = make(64, 20_001, 64, torch.bfloat16, 30.0)
    triton_kernels.statistics(inputs, u, True)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_kernels.statistics(inputs, u, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = triton_kernels.statistics(inputs, u, True)
    for _ in range(3):
        inputs.hidden.copy_(torch.randn_like(inputs.hidden))
        u.uniform_()
        graph.replay()
        assert all(map(torch.equal, found, triton_kernels.statistics(inputs, u, True)))
