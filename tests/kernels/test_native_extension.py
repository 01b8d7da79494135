"""The compiled extension: found, built once, or a reason."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_kernels import native_extension
from tests.compiled import CSRC, make_once, version_of

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    native_extension.why_unbuildable() is not None, reason=f"cannot build: {native_extension.why_unbuildable()}")


def copy_checkout(tmp_path) -> Path:
    """A copy of the package and its sources that was never built."""
    copy = tmp_path / "checkout"
    if not copy.is_dir():
        leave = shutil.ignore_patterns("*.so", "__pycache__", "csrc")
        shutil.copytree(ROOT / "dllm_kernels", copy / "dllm_kernels", ignore=leave)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
    return copy


@pytest.fixture
def why_missing(tmp_path, monkeypatch):
    """A function of environment variables that asks a copy of the module in such a checkout."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def ask(**environment) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        path = copy_checkout(tmp_path) / "dllm_kernels" / "native_extension.py"
        spec = importlib.util.spec_from_file_location("never_built", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.why_missing()

    return ask


def fake_compiler(tmp_path, script: str) -> str:
    path = tmp_path / "fake-compiler"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


def test_missing_compiler_gives_a_reason(why_missing):
    assert why_missing(CXX="no-such-compiler") == (
        "not installed, and there is no compiler 'no-such-compiler' to build it; install g++ 12 or newer, or set CXX"
    )


@needs_compiler
def test_missing_ninja_gives_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native_extension, "_path_with_ninja", lambda: str(tmp_path))
    assert native_extension.why_unbuildable() == "there is no ninja to build it; pip install ninja"


@pytest.mark.parametrize("value, found", [
    (None, ("g++", [])), ("clang++", ("clang++", [])), ("ccache g++-14 -m64 -I x", ("g++-14", ["-m64", "-I", "x"]))])
def test_cxx_may_have_flags_and_ccache(value, found, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    if value:
        monkeypatch.setenv("CXX", value)
    assert native_extension._compiler_and_flags() == found


@pytest.mark.slow
def test_failing_compiler_gives_its_first_error_and_leaves_nothing(tmp_path, why_missing):
    reason = why_missing(CXX=fake_compiler(tmp_path, "echo 'a.cpp:1: error: too old' >&2; exit 1"))
    assert "building it failed" in reason and reason.endswith("a.cpp:1: error: too old")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


def test_building_can_be_forbidden(tmp_path, why_missing):
    assert why_missing(DLLM_BUILD="0") == "not installed, and DLLM_BUILD=0 forbids building it"
    assert not (tmp_path / "cache").exists()


def test_missing_sources_give_a_reason(tmp_path, why_missing):
    shutil.rmtree(copy_checkout(tmp_path) / "csrc")
    assert why_missing() == "not installed, and the C++ sources (csrc) are not there to build it"


def test_unwritable_cache_gives_a_reason(tmp_path, why_missing):
    (tmp_path / "cache").write_text("a file")
    reason = why_missing()
    assert "building it failed" in reason and "Not a directory" in reason


def test_a_library_that_does_not_load_is_named(tmp_path, why_missing):
    (copy_checkout(tmp_path) / "dllm_kernels" / "_native.so").write_bytes(b"of another machine")
    reason = why_missing(DLLM_BUILD="0")
    assert "_native.so does not load" in reason and reason.endswith("DLLM_BUILD=0 forbids building it")


def test_operators_without_an_extension_say_why(monkeypatch):
    monkeypatch.setattr(native_extension, "why_missing", lambda: "no compiler")
    with pytest.raises(RuntimeError, match="the compiled extension is not available: no compiler"):
        native_extension.operators()


@pytest.mark.slow
@needs_compiler
def test_processes_that_start_together_build_once_and_later_ones_not_at_all(tmp_path):
    # A compiler that counts its calls; all its output is an empty library.
    subprocess.run(["g++", "-shared", "-x", "c", os.devnull, "-o", tmp_path / "empty.so"], check=True)
    compiler = fake_compiler(tmp_path, f"""echo call >> {tmp_path}/calls
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then cp {tmp_path}/empty.so "$2"; fi; shift; done""")
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy_checkout(tmp_path)),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "CXX": compiler,
    }
    command = [sys.executable, "-c", "from dllm_kernels import native_extension; native_extension._build_in_cache()"]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    assert sum("building the C++ extension once" in error for error in errors) == 1
    calls = (tmp_path / "calls").read_text().count("call")
    subprocess.run(command, env=environment, check=True)
    versions = 3  # each process asks for the compiler's version, which is part of the key
    assert calls == versions - 1 + len(native_extension.sources()) + 1
    assert (tmp_path / "calls").read_text().count("call") == calls + 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one width")
@pytest.mark.parametrize("width", [4, 8])
def test_narrower_vectors_than_this_machine_has_compute_the_same(width, tmp_path):
    def build(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", f"g++ -DDLLM_WIDTH={width}")
            patch.setattr(native_extension, "CXX_FLAGS", flags)
            patch.setattr(torch.ops, "load_library", lambda path: None)  # a second one cannot be loaded here
            native_extension.build(folder / "_native.so")

    flags = [*native_extension.CXX_FLAGS, "-O1"]  # how fast it is does not matter
    made = make_once(f"width_{width}", build, version_of("g++"), torch.__version__, flags,
                     *(path for path in CSRC if path.parent.name != "cuda"))
    copy = copy_checkout(tmp_path)
    shutil.copy(made / "_native.so", copy / "dllm_kernels")
    shutil.copytree(ROOT / "tests" / "kernels", copy / "tests")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu and not compile",
         "tests/test_masked_cross_entropy.py", "tests/test_topk_unmask.py"],
        cwd=copy, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(copy), "DLLM_BUILD": "0"})
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout and "no compiled extension" not in done.stdout


def test_the_extension_that_is_there_registers_its_operators():
    if reason := native_extension.why_missing():
        pytest.skip(f"no compiled extension: {reason}")
    assert callable(native_extension.operators().score_rows_cpu)
    assert torch.ops.dllm_kernels_native.score_rows_cpu is native_extension.operators().score_rows_cpu
