"""Where the tests of Triton's kernels run, and their cases, thinned where the interpreter runs them."""

import itertools
from collections.abc import Iterable

import pytest
import torch

from dllm_kernels import triton_support

INTERPRETED = triton_support.interpreted()
DEVICE = "cuda" if triton_support.missing() is None and not INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter is wrong on bf16


def with_dtypes(names: str, cases: Iterable, dtypes: list):
    """Parametrize a test by `names` and dtype. On a GPU each case meets each dtype.

    In the interpreter, which computes with NumPy, shapes and dtypes do not depend on one another: there the dtypes take
    turns over the cases, so that each case and each dtype is tested.
    """
    cases = [case if isinstance(case, tuple) and "," in names else (case,) for case in cases]
    on_gpu = len(dtypes) > 2  # the interpreter has no bf16
    pairs = itertools.product(cases, dtypes) if on_gpu else zip(cases, itertools.cycle(dtypes), strict=False)
    return pytest.mark.parametrize(f"{names}, dtype", [(*case, dtype) for case, dtype in pairs])
