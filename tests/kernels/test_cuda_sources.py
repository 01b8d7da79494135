"""Every CUDA source, compiled for Ampere and Hopper without a GPU: what it spills, and how wide it reads."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dllm_kernels import library

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90a"]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to compile CUDA")


@pytest.fixture(scope="module")
def compile_for(tmp_path_factory):
    """(architecture, source) -> what ptxas said, and the object file; all compiled at once, which takes a minute."""
    folder = tmp_path_factory.mktemp("objects")
    pool = ThreadPoolExecutor(os.cpu_count())

    def start(architecture: str, source: Path):
        output = folder / f"{source.stem}_{architecture}.o"
        return pool.submit(lambda: (_compile(architecture, source, output), output))

    sources = sorted(SOURCES, key=lambda path: path.stat().st_size, reverse=True)
    begun = {(architecture, source): start(architecture, source)
             for source in sources for architecture in ARCHITECTURES}
    yield lambda architecture, source: begun[architecture, source].result()
    pool.shutdown(cancel_futures=True)


def _compile(architecture: str, source: Path, output: Path) -> str:
    """With the flags of the installation."""
    flags = [flag for flag in library.NVCC_FLAGS if "gencode" not in flag]
    include = f"-I{Path(torch.__file__).parent / 'include'}"
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    done = subprocess.run(["nvcc", *flags, code, include, "-Xptxas", "-v", "-c", source, "-o", output],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def disassembler() -> str | None:
    """cuobjdump: that of the CUDA toolkit, else the one in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if os.access(path, os.X_OK) else None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_neither_spill_nor_use_local_memory(source, architecture, compile_for):
    said, _ = compile_for(architecture, source)
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert kernels and len(memory) >= len(kernels)
    assert set(memory) == {("0", "0", "0")}, said


@pytest.mark.skipif(disassembler() is None, reason="there is no cuobjdump, neither CUDA's nor in a Triton wheel")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_read_16_bytes_at_once(source, compile_for):
    _, objects = compile_for("90a", source)
    listing = subprocess.run([disassembler(), "-sass", objects], capture_output=True, text=True,
                             check=True).stdout
    kernels = listing.split("Function : ")[1:]
    assert kernels
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
def test_extension_with_cuda_loads_where_torch_has_its_cuda_library(tmp_path, monkeypatch):
    """Here there is no CUDA build of torch: a library with the one function that is called stands in for its own."""
    stand_in = tmp_path / "libtorch_cuda.so"
    (tmp_path / "stream.c").write_text("int aoti_torch_get_current_cuda_stream(int device, void** s) { return 1; }")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", stand_in, tmp_path / "stream.c"],
                   check=True)
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert any(file.suffix == ".cu" for file in library.sources())
    library.compile_extension(tmp_path / "extension.so")
    load = ("import ctypes, sys, torch; ctypes.CDLL(sys.argv[1]); torch.ops.load_library(sys.argv[2]); "
            "print(torch.ops.dllm_kernels_native.cross_entropy_statistics_cuda, "
            "torch._C._dispatch_has_kernel_for_dispatch_key('dllm_kernels_native::decode_attention_cuda', 'CUDA'))")
    done = subprocess.run([sys.executable, "-c", load, stand_in, tmp_path / "extension.so"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "cross_entropy_statistics_cuda True" in done.stdout, done.stderr + done.stdout
