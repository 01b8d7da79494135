"""A pytest plugin, `-p tests.interpreter`, for a process where Triton interprets: without what it computes in vain.

It patches triton.language in each call of a function that a kernel calls, and looks for overflow in each sum of
integers without reporting it, which is left to its debug mode. Together they take three quarters of the time.
It also has what Liger-Kernel's kernels need and the interpreter lacks: numbers as fp32 scalars, libdevice's rsqrt.
"""

from dataclasses import replace
from types import SimpleNamespace


def pytest_configure() -> None:
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))  # of a kernel that sees both
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    libdevice.rsqrt = tl.rsqrt  # as patched
    as_argument = interpreter._implicit_cvt

    def scalar(argument):
        if not isinstance(argument, float):
            return as_argument(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = scalar
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
