"""Every CUDA source, compiled for Ampere and Hopper without a GPU: what it spills, and how wide it reads."""

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks import gpu_kit, machine_code, predict
from dllm_kernels import native_extension
from tests.compiled import CSRC, make_once, version_of

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ["80", "90"]

pytestmark = [pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to compile CUDA"),
              pytest.mark.timeout(1800)]  # ptxas takes minutes of CPU time, and other processes may want the CPU too


class Extension(NamedTuple):
    library: Path
    stand_in: Path | None  # for PyTorch's CUDA library, where torch is a build without it


@pytest.fixture(scope="module")
def extension() -> Extension:
    """The extension as an installation with CUDA builds it, except that the code for the CPU is not optimised."""
    flags = native_extension.CXX_FLAGS, native_extension.NVCC_FLAGS, native_extension.CUDA_RUNTIME
    code = [inspect.getsource(part) for part in (build_with_cuda, gpu_kit.as_with_cuda, native_extension.build)]
    folder = make_once("extension_with_cuda", build_with_cuda, version_of("nvcc"), version_of("g++"), torch.__version__,
                       flags, code, *CSRC)
    stand_in = folder / "libtorch_cuda.so"
    return Extension(folder / "built" / "extension.so", stand_in if stand_in.is_file() else None)


def build_with_cuda(folder: Path) -> None:
    gpu_kit.build_extension(folder / "built" / "extension.so", folder, ["sm_80", "sm_90"], ["-O0"])


def disassembler() -> str | None:
    """cuobjdump: that of the CUDA toolkit, else the one in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if os.access(path, os.X_OK) else None


needs_disassembler = pytest.mark.skipif(
    disassembler() is None, reason="there is no cuobjdump, neither CUDA's nor in a Triton wheel")


@pytest.mark.slow
@needs_disassembler
def test_kernels_neither_spill_nor_use_local_memory(extension):
    said = subprocess.run([disassembler(), "-res-usage", extension.library], capture_output=True, text=True,
                          check=True).stdout
    found = {}
    for part in said.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = sm_(\w+)", part)[1]
        found.setdefault(architecture, []).extend(
            re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part))
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").iterdir())
    kernels = {*re.findall(r"__global__[^;{]*?(\w+_kernel)\(", text)}
    assert found.keys() == {*ARCHITECTURES} and len(kernels) == 8
    for usage in found.values():
        assert kernels == {name for name in kernels if any(name in function for function, *_ in usage)}
        assert {number for _, *stack_and_local in usage for number in stack_and_local} == {"0"}, usage


@pytest.mark.slow
@needs_disassembler
def test_kernels_read_16_bytes_at_once(extension):
    listing = subprocess.run([disassembler(), "-sass", "-arch", "sm_90", extension.library], capture_output=True,
                             text=True, check=True).stdout
    kernels = listing.split("Function : ")[1:]
    assert len(kernels) > 8
    for kernel in kernels:
        name = kernel.split(None, 1)[0]
        if "find_rows" in name or "commit" in name:  # a few thousand tokens
            continue
        loads = re.findall(r"LDG\.E\.128|LDGSTS\.E\S*\.128", kernel)  # into registers, or straight into shared memory
        assert len(loads) >= 4, f"{name} has fewer than four 16-byte loads in flight"
        if "gradients" in name or "loss" in name:
            assert "STG.E.128" in kernel, f"{name} does not write 16 bytes at once"


@pytest.mark.slow
@needs_disassembler
def test_the_machine_code_allows_what_is_promised_and_the_page_says_what_it_counts(extension):
    counts = machine_code.count_extension(extension.library, disassembler())
    for sizes in predict.LOSS_SHAPES.values():
        assert predict.loss_against_products(counts["loss"], *sizes)[1] <= predict.LOSS_AT_MOST
    assert predict.scores_against_copy(counts["scores"], "cuda")[1] >= predict.SCORES_AT_LEAST
    compiler = "nvcc " + re.search(r"release ([\d.]+)", version_of("nvcc"))[1]
    if compiler in machine_code.read():
        assert counts == machine_code.read()[compiler], (
            "python -m benchmarks.machine_code EXTENSION.so CUOBJDUMP, then benchmarks.publish")


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="the real library is there, and other tests load it")
def test_extension_with_cuda_loads_where_torch_has_its_cuda_library(extension):
    load = ("import ctypes, sys, torch; ctypes.CDLL(sys.argv[1]); torch.ops.load_library(sys.argv[2]); "
            "print(torch.ops.dllm_kernels_native.cross_entropy_statistics_cuda, "
            "torch._C._dispatch_has_kernel_for_dispatch_key('dllm_kernels_native::decode_attention_cuda', 'CUDA'))")
    done = subprocess.run([sys.executable, "-c", load, extension.stand_in, extension.library], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "cross_entropy_statistics_cuda True" in done.stdout, done.stderr + done.stdout
