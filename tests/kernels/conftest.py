"""Fixtures of the kernels' tests: CUDA sources compiled for the CPU."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dllm_kernels import triton_support

HERE = Path(__file__).parent


@pytest.fixture
def run_interpreted(run_interpreted) -> Callable[[str], None]:
    """As elsewhere, but skips where this process can run the file's other tests."""
    if triton_support.missing() is None:
        pytest.skip("the tests below run in this process")
    return run_interpreted


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
