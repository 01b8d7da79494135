"""Fixtures of the kernels' tests: Triton's interpreter in its own process, and CUDA sources compiled for the CPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dllm_kernels import triton_support

HERE = Path(__file__).parent


@pytest.fixture
def run_interpreted() -> Callable[[str], None]:
    """A function that runs a test file in a process where Triton interprets, and fails where its tests do.

    The interpreter must be asked for before Triton is imported, and other tests would find it too. Skips where this
    process can run the file's other tests.
    """
    if triton_support.missing() is None:
        pytest.skip("the tests below run in this process")

    def run(file: str) -> None:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                               "-p", "tests.interpreter", file], cwd=HERE.parents[1], capture_output=True, text=True,
                              env={**os.environ, "TRITON_INTERPRET": "1"})
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture(autouse=True)
def where_triton_runs(request) -> None:
    """Of a file that runs again in the interpreter, skips the other tests where Triton's kernels cannot run."""
    again = getattr(request.module, "test_in_the_interpreter", None)
    if again is not None and request.function is not again and (reason := triton_support.missing()):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def emulator_library() -> Callable[[str], Path]:
    """A function that compiles a file of this folder, which includes CUDA sources, for the CPU; the shared library."""
    from tests.compiled import CSRC, shared_library

    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for the CPU")
    return lambda file: shared_library(HERE / file, "-O2", "-Wno-unknown-pragmas", depends=(HERE / "simt.h", *CSRC))
