"""A pytest plugin, `-p tests.interpreter`, for a process where Triton interprets: without what it computes in vain.

It patches triton.language in each call of a function that a kernel calls, and looks for overflow in each sum of
integers without reporting it, which is left to its debug mode. Together they take three quarters of the time.
"""

from dataclasses import replace
from types import SimpleNamespace


def pytest_configure() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))  # of a kernel that sees both
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
