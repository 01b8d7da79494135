"""Fixtures of the kernels' tests: CUDA sources compiled for the CPU."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def emulator_library() -> Callable[[str], Path]:
    """A function that compiles a file of this folder, which includes CUDA sources, for the CPU; the shared library."""
    from tests.compiled import CSRC, shared_library

    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for the CPU")
    return lambda file: shared_library(HERE / file, "-O2", "-Wno-unknown-pragmas", depends=(HERE / "simt.h", *CSRC))
