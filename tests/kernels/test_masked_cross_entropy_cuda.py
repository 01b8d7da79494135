"""The CUDA C++ kernels of masked cross-entropy: on a GPU against float64, elsewhere what nvcc makes of them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dllm_kernels import library, masked_cross_entropy
from dllm_kernels.masked_cross_entropy import cuda

ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.skipif(cuda.missing() is not None, reason=f"cannot run here: {cuda.missing()}")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_kernels_compile_without_spills_and_read_16_bytes_at_once(source, architecture, tmp_path):
    flags = [flag for flag in library.NVCC_FLAGS if "gencode" not in flag]
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", *flags, code, f"-I{Path(torch.__file__).parent / 'include'}", "-Xptxas", "-v", source]
    said = subprocess.run([*command, "-c", "-o", tmp_path / "kernels.o"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said.stderr)
    assert len(spills) >= 6 and set(spills) == {("0", "0", "0")}
    subprocess.run([*command, "-ptx", "-o", tmp_path / "kernels.ptx"], check=True, capture_output=True)
    text = (tmp_path / "kernels.ptx").read_text()
    assert re.search(r"ld\.global\S*\.v4\.(u32|b32|f32)|ld\.global\S*\.v2\.(u64|b64)", text)


@needs_gpu
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap, z_loss", [(None, 0.0), (5.0, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, offset", [((1, 2), 0), ((33, 1001), 0), ((9, 151_936), 0), ((33, 4099), 1)])
def test_loss_and_gradients_against_float64(shape, offset, dtype, softcap, z_loss, reduction):
    (N, V), g = shape, torch.Generator().manual_seed(0)
    whole = (4 * torch.randn(N, V + offset, generator=g)).to("cuda", dtype)
    targets, corrupted = torch.randint(V, (N,), generator=g).cuda(), (torch.rand(N, generator=g) < 0.6).cuda()
    whole[~corrupted] = torch.nan
    weights = torch.rand(N, generator=g).cuda() * 9
    logits = whole[:, offset:].requires_grad_()
    upstream = torch.linspace(-1, 2, N, device="cuda") if reduction == "none" else torch.tensor(0.7, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = masked_cross_entropy(logits, targets, corrupted, weights=weights, reduction=reduction, softcap=softcap,
                                    z_loss=z_loss, backend="cuda")
        gradient, = torch.autograd.grad(loss, logits, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    truth = logits.detach().double().masked_fill(~corrupted[:, None], 0).requires_grad_()
    z = truth if softcap is None else softcap * torch.tanh(truth / softcap)
    nll = F.cross_entropy(z, targets, reduction="none") + z_loss * z.logsumexp(1) ** 2
    expected = torch.where(corrupted, nll * weights.double(), 0)
    if reduction != "none":
        expected = expected.sum() / (corrupted.sum().clamp(min=1) if reduction == "mean" else 1)
    true_gradient, = torch.autograd.grad(expected, truth, upstream.double())
    step = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert (loss - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9
    assert (gradient - true_gradient).abs().max() <= step * true_gradient.abs().max() + 1e-7
    assert (gradient[~corrupted] == 0).all()


@needs_gpu
def test_a_target_out_of_range_shows_in_the_loss():
    loss = masked_cross_entropy(torch.zeros(2, 7, device="cuda"), torch.tensor([3, 7], device="cuda"),
                                torch.ones(2, dtype=torch.bool, device="cuda"), reduction="none", backend="cuda")
    assert loss[0].isfinite() and loss[1].isnan()
