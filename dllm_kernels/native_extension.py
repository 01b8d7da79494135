"""The compiled extension: the one that the installation built, else one built at first use from csrc, else a reason.

It uses PyTorch's stable ABI, so one build serves every Python and every torch from 2.11 on. Importing this module loads
nothing. setup.py loads this file by its path, without the package, and calls `build`.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "_native.so"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
# GCC vectorises some loops only with the two promises about floating-point exceptions; values do not change.
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI]
NVCC_FLAGS = ["-std=c++20", "-O3", STABLE_ABI, "-DUSE_CUDA", "--threads=0",
              *(f"-gencode=arch=compute_{one},code={other}" for one, other in (
                  ("80", "sm_80"), ("90", "sm_90"), ("90", "compute_90")))]
# Linked into the extension, because torch may have been built for another version of CUDA than nvcc.
CUDA_RUNTIME = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]


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
    if reason := why_missing():
        raise RuntimeError(f"the compiled extension is not available: {reason}")
    return torch.ops.dllm_kernels_native


def sources() -> list[Path]:
    """The files to compile, in the package if it was installed, beside it in a checkout; none if csrc is not there."""
    root = next((folder for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc")
                 if (folder / "registration.cpp").is_file()), None)
    if root is None:
        return []
    kernels = sorted(root.glob("cuda/*.cu")) if torch.version.cuda and shutil.which("nvcc") else []
    return [root / "registration.cpp", *sorted(root.glob("cpu/*.cpp")), *kernels]


def why_unbuildable() -> str | None:
    """Why it cannot be compiled on this machine, None if it can be tried."""
    if not sources():
        return "the C++ sources (csrc) are not there to build it"
    if os.name != "posix":
        return "building it needs Linux or macOS"
    compiler, _ = _compiler_and_flags()
    if shutil.which(compiler) is None:
        return f"there is no compiler {compiler!r} to build it; install g++ 12 or newer, or set CXX"
    if shutil.which("ninja", path=_path_with_ninja()) is None:
        return "there is no ninja to build it; pip install ninja"
    return None


def build(library: Path) -> None:
    """Compile csrc with ninja, load the result, and put it at `library` in one move.

    Raises: RuntimeError with the compiler's first error, OSError if the result cannot be loaded or written.
    """
    from torch.utils import cpp_extension

    files, (compiler, flags) = [str(file) for file in sources()], _compiler_and_flags()
    cuda_runtime = CUDA_RUNTIME if any(file.endswith(".cu") for file in files) else []
    library.parent.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    # The check of the C++ ABI fails on unknown compilers, and the stable ABI does not depend on the compiler.
    os.environ.update(CXX=compiler, PATH=_path_with_ninja(), TORCH_DONT_CHECK_COMPILER_ABI="1")
    try:
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as folder:
            cpp_extension.load("_native", files, extra_cflags=[*flags, *CXX_FLAGS], extra_cuda_cflags=NVCC_FLAGS,
                               extra_ldflags=["-Wl,--as-needed", *cuda_runtime], build_directory=folder,
                               is_python_module=False)
            os.replace(next(Path(folder).glob("*.so")), library)
    except RuntimeError as failure:
        error = re.search(r"^.*(?:\b(?:error|fatal)\s*:|\bld: ).*$", str(failure), re.M)
        raise RuntimeError(error[0].strip() if error else str(failure).strip().splitlines()[-1]) from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def _compiler_and_flags() -> tuple[str, list[str]]:
    """Compiler and flags that CXX names, without ccache, which torch.utils.cpp_extension adds."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    names = [*itertools.takewhile(lambda word: not word.startswith("-"), words)] or ["g++"]
    return names[-1], words[len(names):]


def _path_with_ninja() -> str:
    """PATH behind the folder of the ninja that pip installed, whose environment need not be activated."""
    path = os.environ.get("PATH", os.defpath)
    with contextlib.suppress(ImportError):
        from ninja import BIN_DIR

        path = os.pathsep.join(filter(None, (BIN_DIR, path)))
    return path


@functools.cache
def why_missing() -> str | None:
    """Why there is no compiled extension here, None if there is. The first call may build it, in half a minute."""
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
    except (RuntimeError, OSError, ImportError) as error:
        return f"{failed}, and building it failed: {error}"
    return None


def _older_than_sources(library: Path) -> bool:
    """Whether this is a checkout with sources edited since the installation."""
    files = sources()
    if not files or PACKAGE in files[0].parents:
        return False
    return max(file.stat().st_mtime for file in files[0].parent.rglob("*.*")) > library.stat().st_mtime


def _build_in_cache() -> Path:
    """The library in the user's cache, built at the first use of these sources, compiler and torch."""
    compiler, flags = _compiler_and_flags()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(repr((torch.__version__, platform.machine(), compiler, flags, version, CXX_FLAGS,
                               NVCC_FLAGS)).encode())
    files = sources()
    for file in (*files, *sorted(files[0].parent.rglob("*.*h"))):  # .h and .cuh
        key.update(file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dllm_kernels" / key.hexdigest()[:16]
    library = cache / INSTALLED.name
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "lock"):  # released by the system even if its owner is killed
            if not library.is_file():
                print(f"dllm_kernels: building the C++ extension once, into {cache}", file=sys.stderr, flush=True)
                build(library)
    return library
