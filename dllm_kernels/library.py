"""The compiled extension: found where the installation put it, else built once from csrc with ninja, else a reason.

It uses PyTorch's stable ABI, so one build serves every torch from 2.11 on and every Python. Nothing happens at import.
"""

import functools
import hashlib
import os
import shutil
import sys
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
COMPILE_FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def sources() -> list[Path]:
    """The C++ sources: beside the package in a checkout, inside it in an installed wheel."""
    root = next((folder for folder in (PACKAGE.parent / "csrc", PACKAGE / "csrc") if folder.is_dir()), None)
    return [] if root is None else [root / "registration.cpp", *sorted((root / "cpu").glob("*.cpp"))]


def why_missing() -> str | None:
    """Why there is no compiled extension here, None if there is. The first call may build it, in half a minute."""
    return _load()


def operators():
    """The namespace of its operators. Call only when `why_missing()` is None."""
    if reason := _load():
        raise RuntimeError(f"the compiled extension is not available: {reason}")
    return torch.ops.dllm_kernels_native


@functools.cache
def _load() -> str | None:
    installed = next(PACKAGE.glob("_native*.so"), None)
    try:
        if installed is None:
            return _build()
        torch.ops.load_library(installed)
    except OSError as error:  # built for another machine, say
        return f"{installed or 'the extension just built'} does not load: {error}"
    return None


def _build() -> str | None:
    if os.environ.get("DLLM_BUILD", "1") == "0":
        return "not installed, and DLLM_BUILD=0 forbids building it"
    files = sources()
    compiler = os.environ.get("CXX", "g++")
    if not files:
        return "not installed, and the C++ sources are not there to build it"
    if shutil.which(compiler) is None:
        return f"not installed, and there is no compiler {compiler!r} to build it; install g++ 11 or newer"
    if shutil.which("ninja") is None:  # the package's program is not on the path when its environment is not activated
        try:
            import ninja
        except ImportError:
            return "not installed, and there is no ninja to build it; pip install ninja"
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), ninja.BIN_DIR])
    key = hashlib.sha256("".join([torch.__version__, compiler, *COMPILE_FLAGS]).encode())
    for file in (*files, *sorted(files[0].parent.glob("**/*.h"))):
        key.update(file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dllm_kernels" / key.hexdigest()[:16]
    print(f"dllm_kernels: building the C++ extension once, into {cache}", file=sys.stderr)
    try:
        from torch.utils.cpp_extension import load  # needs setuptools

        cache.mkdir(parents=True, exist_ok=True)
        load("dllm_kernels_native", [str(file) for file in files], extra_cflags=COMPILE_FLAGS, build_directory=str(cache),
             is_python_module=False)
    except (ImportError, RuntimeError, OSError) as error:
        return f"not installed, and building it failed: {str(error).strip().splitlines()[0]}"
    return None
