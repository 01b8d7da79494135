"""The compiled extension: the one that the installation built, else one built at first use from csrc, else a reason.

It uses PyTorch's stable ABI, so one build serves every torch from 2.11 on and every Python. Nothing happens at import.
setup.py loads this file by its path, without the package, and builds with the same `compile_extension`.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "_native.so"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
# Without the two promises about floating-point exceptions, GCC leaves some loops scalar; values do not change.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", STABLE_ABI, "-DUSE_CUDA", "--threads=0",
              *(f"-gencode=arch=compute_{one},code={other}" for one, other in (
                  ("80", "sm_80"), ("90a", "sm_90a"), ("90", "compute_90")))]


def why_missing() -> str | None:
    """Why there is no compiled extension here, None if there is. The first call may build it, in ten seconds or so."""
    return _load()


def why_missing_on_cuda(operator: str) -> str | None:
    """Why an operator of csrc/cuda cannot run on this machine, None if it can."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    if reason := why_missing():
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dllm_kernels_native::{operator}", "CUDA"):
        return "the extension was built without nvcc; install the CUDA toolkit, then this package again"
    return None


def operators():
    """The namespace of its operators. Call only when `why_missing()` is None."""
    if reason := _load():
        raise RuntimeError(f"the compiled extension is not available: {reason}")
    return torch.ops.dllm_kernels_native


def sources() -> list[Path]:
    """What to compile: inside the package in an installed wheel, beside it in a checkout; none if csrc is not there."""
    root = next(
        (folder for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if (folder / "registration.cpp").is_file()),
        None,
    )
    if root is None:
        return []
    kernels = sorted(root.glob("cuda/*.cu")) if torch.version.cuda and shutil.which("nvcc") else []
    return [root / "registration.cpp", *sorted(root.glob("cpu/*.cpp")), *kernels]


def why_unbuildable() -> str | None:
    """Why it cannot be compiled on this machine, None if it can be tried."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not sources():
        return "the C++ sources (csrc) are not there to build it"
    if os.name != "posix":
        return "building it needs Linux or macOS"
    if not compiler or shutil.which(compiler[0]) is None:
        return f"there is no compiler {' '.join(compiler)!r} to build it; install g++ 12 or newer, or set CXX"
    return None


def compile_extension(output: Path) -> None:
    """Compile csrc, one process per source, and put the library at `output` in one move.

    Raises: RuntimeError with the compiler's first error.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    home = Path(torch.__file__).parent
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix="building-") as folder, ThreadPoolExecutor() as pool:
        files = sources()
        objects = [str(Path(folder, f"{file.name}.o")) for file in files]
        commands = [[*(["nvcc", *NVCC_FLAGS] if file.suffix == ".cu" else [*compiler, *CXX_FLAGS]),
                     f"-I{home / 'include'}", "-c", str(file), "-o", target]
                    for file, target in zip(files, objects, strict=True)]
        list(pool.map(_run, commands))
        with_cuda = any(file.suffix == ".cu" for file in files)
        linker = ["nvcc", "-shared"] if with_cuda else [*compiler, "-shared"]
        # Named, though torch has loaded them: Python loads a library without showing its symbols to others.
        torch_libraries = ["-ltorch_cpu", *(["-ltorch_cuda"] if with_cuda else [])]
        _run([*linker, *objects, "-o", str(Path(folder, output.name)), f"-L{home / 'lib'}", *torch_libraries])
        os.replace(Path(folder, output.name), output)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        error = next((line for line in lines if "error" in line), lines[-1])
        raise RuntimeError(f"{command[0]} failed: {error.strip()}")


@functools.cache
def _load() -> str | None:
    failed = "not installed"
    if INSTALLED.is_file() and not _older_than_sources(INSTALLED):
        try:
            torch.ops.load_library(str(INSTALLED))
            return None
        except OSError as error:  # built on another machine, say
            failed = f"{INSTALLED} does not load ({error})"
    if os.environ.get("DLLM_BUILD", "1") == "0":
        return f"{failed}, and DLLM_BUILD=0 forbids building it"
    if reason := why_unbuildable():
        return f"{failed}, and {reason}"
    try:
        torch.ops.load_library(str(_build_in_cache()))
    except (RuntimeError, OSError) as error:
        return f"{failed}, and building it failed: {error}"
    return None


def _older_than_sources(library: Path) -> bool:
    """Whether this is a checkout whose sources have been edited since the installation."""
    files = sources()
    if not files or PACKAGE in files[0].parents:
        return False
    return max(file.stat().st_mtime for file in files[0].parent.rglob("*.*")) > library.stat().st_mtime


def _build_in_cache() -> Path:
    """The library in the user's cache, built if this is the first use of these sources, compiler and torch."""
    import fcntl

    compiler = shlex.split(os.environ.get("CXX", "g++"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(
        repr((torch.__version__, platform.machine(), compiler, version, CXX_FLAGS, NVCC_FLAGS)).encode()
    )
    files = sources()
    for file in (*files, *sorted(files[0].parent.rglob("*.*h"))):  # .h and .cuh
        key.update(file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dllm_kernels" / key.hexdigest()[:16]
    library = cache / INSTALLED.name
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "lock", "w") as lock:  # freed by the system even if its owner is killed
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                print(f"dllm_kernels: building the C++ extension once, into {cache}", file=sys.stderr, flush=True)
                compile_extension(library)
    return library
