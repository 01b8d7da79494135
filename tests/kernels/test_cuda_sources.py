"""Every CUDA source, compiled for Ampere and Hopper without a GPU: what it spills, and how wide it reads."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dllm_kernels import library

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90a"]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to compile CUDA")


class Extension(NamedTuple):
    library: Path
    stand_in: Path | None  # for PyTorch's CUDA library, where torch is a build without it
    said: dict[str, str]  # by nvcc, of each source


@pytest.fixture(scope="module")
def extension(tmp_path_factory) -> Extension:
    """The extension as an installation with CUDA builds it, which takes two minutes."""
    folder = tmp_path_factory.mktemp("extension")
    stand_in, said = None, {}

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.update({Path(part).name: done.stderr for part in command if part.endswith(".cu")})

    with pytest.MonkeyPatch.context() as patch:
        if torch.version.cuda is None:  # the one function that is called of it
            stand_in = folder / "libtorch_cuda.so"
            (folder / "stream.c").write_text("int aoti_torch_get_current_cuda_stream(int i, void** s) { return 1; }")
            subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", stand_in,
                            folder / "stream.c"], check=True)
            patch.setenv("LIBRARY_PATH", str(folder))
            patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(library, "NVCC_FLAGS", [*library.NVCC_FLAGS, "-Xptxas", "-v"])
        patch.setattr(library, "_run", run)
        library.compile_extension(folder / "extension.so")
    assert said.keys() == {path.name for path in SOURCES}
    return Extension(folder / "extension.so", stand_in, said)


def disassembler() -> str | None:
    """cuobjdump: that of the CUDA toolkit, else the one in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if os.access(path, os.X_OK) else None


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_neither_spill_nor_use_local_memory(source, architecture, extension):
    parts = re.split(r"Compiling entry function '\w+' for 'sm_(\w+)'", extension.said[source.name])
    memory = [re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
              for compiled_for, said in zip(parts[1::2], parts[2::2], strict=True) if compiled_for == architecture]
    assert memory and all(memory)
    assert {numbers for found in memory for numbers in found} == {("0", "0", "0")}, extension.said[source.name]


@pytest.mark.slow
@pytest.mark.skipif(disassembler() is None, reason="there is no cuobjdump, neither CUDA's nor in a Triton wheel")
def test_kernels_read_16_bytes_at_once(extension):
    listing = subprocess.run([disassembler(), "-sass", "-arch", "sm_90a", extension.library], capture_output=True,
                             text=True, check=True).stdout
    kernels = listing.split("Function : ")[1:]
    assert len(kernels) > len(SOURCES)
    for kernel in kernels:
        name = kernel.split(None, 1)[0]
        if "find_rows" in name or "commit" in name:  # a few thousand tokens
            continue
        loads = re.findall(r"LDG\.E\.128|LDGSTS\.E\S*\.128", kernel)  # into registers, or straight into shared memory
        assert len(loads) >= 4, f"{name} has fewer than four 16-byte loads in flight"
        if "gradients" in name:
            assert "STG.E.128" in kernel, f"{name} does not write 16 bytes at once"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="the real library is there, and other tests load it")
def test_extension_with_cuda_loads_where_torch_has_its_cuda_library(extension):
    load = ("import ctypes, sys, torch; ctypes.CDLL(sys.argv[1]); torch.ops.load_library(sys.argv[2]); "
            "print(torch.ops.dllm_kernels_native.cross_entropy_statistics_cuda, "
            "torch._C._dispatch_has_kernel_for_dispatch_key('dllm_kernels_native::decode_attention_cuda', 'CUDA'))")
    done = subprocess.run([sys.executable, "-c", load, extension.stand_in, extension.library], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "cross_entropy_statistics_cuda True" in done.stdout, done.stderr + done.stdout
