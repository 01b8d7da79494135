"""The compiled extension: found, built once, or a reason."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_kernels import library

ROOT = Path(__file__).parents[2]


def copy_checkout(tmp_path) -> Path:
    """A copy of the package and its sources that was never built."""
    copy = tmp_path / "checkout"
    if not copy.is_dir():
        leave = shutil.ignore_patterns("*.so", "__pycache__", "csrc")
        shutil.copytree(ROOT / "dllm_kernels", copy / "dllm_kernels", ignore=leave)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
    return copy


def reason_in_new_process(tmp_path, **environment) -> tuple[str, str]:
    """why_missing() and standard error of a copy of the package that was never built."""
    copy = copy_checkout(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "from dllm_kernels import library; print(library.why_missing())"],
        cwd=copy,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(copy), "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment},
    )
    return done.stdout.strip(), done.stderr


def fake_compiler(tmp_path, script: str) -> str:
    path = tmp_path / "fake-compiler"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


def test_missing_compiler_gives_a_reason(tmp_path):
    reason, _ = reason_in_new_process(tmp_path, CXX="no-such-compiler")
    assert reason == (
        "not installed, and there is no compiler 'no-such-compiler' to build it; install g++ 12 or newer, or set CXX"
    )


def test_failing_compiler_gives_its_first_error_and_leaves_nothing(tmp_path):
    reason, _ = reason_in_new_process(
        tmp_path, CXX=fake_compiler(tmp_path, "echo 'a.cpp:1: error: too old' >&2; exit 1")
    )
    assert "building it failed" in reason and reason.endswith("a.cpp:1: error: too old")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


def test_building_can_be_forbidden(tmp_path):
    reason, _ = reason_in_new_process(tmp_path, DLLM_BUILD="0")
    assert reason == "not installed, and DLLM_BUILD=0 forbids building it"
    assert not (tmp_path / "cache").exists()


def test_missing_sources_give_a_reason(tmp_path):
    reason_in_new_process(tmp_path, DLLM_BUILD="0")
    shutil.rmtree(tmp_path / "checkout" / "csrc")
    assert reason_in_new_process(tmp_path)[0] == "not installed, and the C++ sources (csrc) are not there to build it"


def test_unwritable_cache_gives_a_reason(tmp_path):
    (tmp_path / "cache").write_text("a file")
    reason, _ = reason_in_new_process(tmp_path)
    assert "building it failed" in reason and "Not a directory" in reason


def test_a_library_that_does_not_load_is_named(tmp_path):
    reason_in_new_process(tmp_path, DLLM_BUILD="0")
    (tmp_path / "checkout" / "dllm_kernels" / "_native.so").write_bytes(b"of another machine")
    reason, _ = reason_in_new_process(tmp_path, DLLM_BUILD="0")
    assert "_native.so does not load" in reason and reason.endswith("DLLM_BUILD=0 forbids building it")


def test_operators_without_an_extension_say_why(monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: "no compiler")
    with pytest.raises(RuntimeError, match="the compiled extension is not available: no compiler"):
        library.operators()


needs_compiler = pytest.mark.skipif(
    library.why_unbuildable() is not None, reason=f"cannot build: {library.why_unbuildable()}"
)


@needs_compiler
def test_processes_that_start_together_build_once_and_later_ones_not_at_all(tmp_path):
    # A compiler that counts its calls; the output need not load for that.
    compiler = fake_compiler(tmp_path, f"""echo call >> {tmp_path}/calls
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo not a library > "$2"; fi; shift; done""")
    reason_in_new_process(tmp_path, DLLM_BUILD="0")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "checkout"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CXX": compiler,
    }
    command = [sys.executable, "-c", "from dllm_kernels import library; library._build_in_cache()"]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    assert sum("building the C++ extension once" in error for error in errors) == 1
    calls = (tmp_path / "calls").read_text().count("call")
    subprocess.run(command, env=environment, check=True)
    versions = 4  # each process asks for the compiler's version, which is part of the key
    assert calls == versions - 1 + len(library.sources()) + 1
    assert (tmp_path / "calls").read_text().count("call") == calls + 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one width")
@pytest.mark.parametrize("width", [4, 8])
def test_narrower_vectors_than_this_machine_has_compute_the_same(width, tmp_path):
    copy = copy_checkout(tmp_path)
    shutil.copytree(ROOT / "tests" / "kernels", copy / "tests")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu and not compile",
         "tests/test_masked_cross_entropy.py", "tests/test_topk_unmask.py"],
        cwd=copy, capture_output=True, text=True, env={
            **os.environ, "PYTHONPATH": str(copy), "XDG_CACHE_HOME": str(tmp_path), "CXX": f"g++ -DDLLM_WIDTH={width}"})
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout and "no compiled extension" not in done.stdout


def test_the_extension_that_is_there_registers_its_operators():
    if reason := library.why_missing():
        pytest.skip(f"no compiled extension: {reason}")
    assert callable(library.operators().score_rows_cpu)
    assert torch.ops.dllm_kernels_native.score_rows_cpu is library.operators().score_rows_cpu
