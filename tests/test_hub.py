"""The project for Hugging Face's kernel-builder: what it names, the rules its Python keeps, that it runs once built."""

import ast
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from dllm.errors import UserError
from dllm_kernels import native_extension
from hub import layout
from tests.compiled import CSRC, make_once, version_of

NAME = "_dllm_kernels_cpu_0123abc"  # kernel-builder's pattern: package, backend, commit
# What kernel-builder generates, reduced to what the sources use.
REGISTRATION = """#include <Python.h>
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define REGISTER_EXTENSION(NAME) PyMODINIT_FUNC JOIN(PyInit_, NAME)() { \\
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "extension"}; return PyModule_Create(&module); }
"""
OPS = f"""import torch
from . import {NAME}
ops = torch.ops.{NAME}
def add_op_namespace_prefix(name): return "{NAME}::" + name
"""
# Loads the package by its path under another name, as the library `kernels` does, and later dllm_kernels beside it.
LOAD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location(sys.argv[2], sys.argv[1] + "/__init__.py")
kernel = sys.modules[sys.argv[2]] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
assert "dllm_kernels" not in sys.modules and "filelock" not in sys.modules
assert not [name for name in dir(torch.ops) if name.startswith("dllm_kernels")]
import dllm_kernels
from dllm_kernels import layers
torch.manual_seed(0)
hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(33, 16)
targets, corrupted = torch.randint(33, (9,)), torch.rand(9) < 0.5
logits, tokens = torch.randn(2, 5, 33), torch.full((2, 5), 32)
q = torch.randn(2, 5, 4, 8)
for layer, inputs in (("MaskedLinearCrossEntropy", (hidden, weight, targets, corrupted)),
                      ("TopKUnmask", (logits, tokens, 32, 2)), ("BidirectionalAttention", (q, q, q))):
    theirs, ours = getattr(kernel.layers, layer)(), getattr(layers, layer)()
    torch.testing.assert_close([*theirs(*inputs)] if layer == "TopKUnmask" else theirs(*inputs),
                               [*ours(*inputs)] if layer == "TopKUnmask" else ours(*inputs))
    torch.compile(theirs, fullgraph=True, backend="aot_eager")(*inputs)
exact = dllm_kernels.linear_masked_cross_entropy(hidden, weight, targets, corrupted, backend="reference")
torch.testing.assert_close(kernel.linear_masked_cross_entropy(hidden, weight, targets, corrupted, backend="cpu"), exact)
print(kernel.describe_backends())
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "project"
    assert layout.make(folder) == 0
    return folder


def test_build_toml_names_each_source_once_and_nothing_else(project):
    build = tomllib.loads((project / "build.toml").read_text())
    assert build["general"]["edition"] == 5 and build["general"]["name"].replace("-", "_") == layout.PACKAGE
    assert build["torch"]["stable-abi"] == {backend: "2.11" for backend in build["general"]["backends"]}
    assert native_extension.STABLE_ABI.endswith("0x020b000000000000")  # the same 2.11
    named = build["torch"]["src"] + [file for kernel in build["kernel"].values() for file in kernel["src"]]
    there = [path.relative_to(project).as_posix() for pattern in ("csrc/**/*.*", "torch-ext/*.cpp")
             for path in project.glob(pattern)]
    assert sorted(named) == sorted(there) and len(there) == len(CSRC) + 1
    assert not [file for file in build["torch"]["src"] if "cuda" in file]


def test_its_python_imports_itself_only_by_relative_names(project):
    package = project / "torch-ext" / layout.PACKAGE
    ours = {path.relative_to(layout.ROOT / layout.PACKAGE) for path in (layout.ROOT / layout.PACKAGE).rglob("*.py")}
    files = {path.relative_to(package): path for path in package.rglob("*.*")}
    assert files.keys() == ours - {Path("_ops.py")}
    outside = {"flash_attn", "transformers", "triton"}  # each imported where it is used
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | outside | {"torch"}, path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("dllm_kernels::", "dllm_kernels_native")), path
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "custom_op":
                assert node.args[0].func.id == "add_op_namespace_prefix", path


def test_an_existing_folder_is_refused(project):
    with pytest.raises(UserError, match="is there already; name a new folder"):
        layout.make(project)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_built_it_runs_under_another_name_beside_dllm_kernels(project, tmp_path):
    build = tomllib.loads((project / "build.toml").read_text())["torch"]
    made = make_once("hub_kernel", lambda folder: compile_kernel(project, build, folder), version_of("g++"),
                     torch.__version__, sys.version, build, REGISTRATION, project / "torch-ext" / "torch_binding.cpp",
                     *CSRC)
    package = shutil.copytree(project / "torch-ext" / layout.PACKAGE, tmp_path / "variant")
    shutil.copy(made / "extension.so", package / f"{NAME}.abi3.so")
    (package / "_ops.py").write_text(OPS)
    done = subprocess.run([sys.executable, "-c", LOAD, package, NAME], capture_output=True, text=True,
                          cwd=layout.ROOT)
    assert done.returncode == 0, done.stderr
    assert "linear_masked_cross_entropy      cpu        yes" in done.stdout


def compile_kernel(project: Path, build: dict, folder: Path) -> None:
    """As kernel-builder for CPUs, in one call of the compiler and not optimised."""
    (folder / "registration.h").write_text(REGISTRATION)
    sources = [project / file for file in build["src"] if file.endswith(".cpp")]
    includes = [folder, sysconfig.get_path("include"), *cpp_extension.include_paths()]
    subprocess.run(["g++", "-shared", "-fPIC", *build["cxx-flags"], "-O0", "-DCPU_KERNEL",
                    "-DPy_LIMITED_API=0x03090000", f"-DTORCH_EXTENSION_NAME={NAME}", native_extension.STABLE_ABI,
                    *(f"-I{path}" for path in includes), *sources,
                    *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu",
                    "-lc10", "-o", folder / "extension.so"], check=True)
