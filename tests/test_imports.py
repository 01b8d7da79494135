"""The import rules of the two packages, read from the syntax trees; imports with parts missing; how long they take."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dllm
import dllm_kernels

ROOT = Path(__file__).parents[1]
PACKAGES = ("dllm", "dllm_kernels")
OPERATIONS = sorted(path.parent.name for path in ROOT.glob("dllm_kernels/*/reference.py"))


class Import(NamedTuple):
    file: str  # path below the repository
    module: str  # the module imported, or imported from
    names: tuple[str, ...]  # from it
    at_import_time: bool  # not inside a function

    def touches(self, module: str) -> bool:
        """Whether it imports the module, something in it, or a module below it."""
        full = [self.module, *(f"{self.module}.{name}" for name in self.names)]
        return any(name == module or name.startswith(module + ".") for name in full)


def find_imports(path: Path) -> Iterator[Import]:
    name = path.relative_to(ROOT).as_posix()
    package = list(path.relative_to(ROOT).parent.parts)

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name, alias.name, (), at_import_time)
            elif isinstance(child, ast.ImportFrom):
                base = package[:len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                yield Import(name, module, tuple(alias.name for alias in child.names), at_import_time)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, at_import_time and not inside)

    yield from visit(ast.parse(path.read_text()), True)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = [found for path in files for found in find_imports(path)]
    assert len(found) > 100 and len(OPERATIONS) >= 3  # the rules below are about something
    return found


def test_the_reader_of_imports_sees_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "dllm" / "sub" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text("import a.b as c, d\nfrom . import e\nfrom ..f import g\n"
                    "try:\n    import h\nexcept ImportError:\n    pass\n"
                    "class K:\n    import i\n    def m(self):\n        from dllm_kernels import _j as k\n")
    assert [found[1:] for found in find_imports(file)] == [
        ("a.b", (), True), ("d", (), True), ("dllm.sub", ("e",), True), ("dllm.f", ("g",), True), ("h", (), True),
        ("i", (), True), ("dllm_kernels", ("_j",), False)]


def test_kernels_never_import_dllm(imports):
    assert not [i for i in imports if i.file.startswith("dllm_kernels/") and i.touches("dllm")]


def test_kernels_import_themselves_by_relative_names():
    nodes = [node for path in (ROOT / "dllm_kernels").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    assert not [node for node in nodes if isinstance(node, ast.Import) for alias in node.names
                if alias.name.split(".")[0] == "dllm_kernels"]
    own = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    assert own and not [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level
                        and node.module.split(".")[0] == "dllm_kernels"]


def test_kernels_import_neither_transformers_nor_triton_at_import_time(imports):
    # The files of Triton kernels need Triton themselves; they are imported when the backend runs.
    assert not [i for i in imports if i.file.startswith("dllm_kernels/") and i.at_import_time
                and (i.touches("transformers") or i.touches("triton") and "triton" not in Path(i.file).name)]


def test_operations_never_import_one_another(imports):
    for operation in OPERATIONS:
        others = [f"dllm_kernels.{other}" for other in OPERATIONS if other != operation]
        own = [i for i in imports if i.file.startswith(f"dllm_kernels/{operation}/")]
        assert own and not [i for i in own if any(map(i.touches, others))]


def test_dispatch_imports_no_operation(imports):
    assert not [i for i in imports if i.file == "dllm_kernels/dispatch.py" and i.touches("dllm_kernels")]


def test_dllm_uses_only_public_names_of_dllm_kernels(imports):
    public = {*dllm_kernels.__all__, "__version__"}
    for i in (i for i in imports if i.file.startswith("dllm/") and i.touches("dllm_kernels")):
        assert i.module == "dllm_kernels", f"{i.file} reaches into {i.module}"
        assert set(i.names) <= public, f"{i.file} imports {set(i.names) - public}"
        nodes = [node for node in ast.walk(ast.parse((ROOT / i.file).read_text())) if isinstance(node, ast.Attribute)]
        names = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "dllm_kernels"}
        assert names <= public, f"{i.file} uses {names - public}"


# Each floor may import those before it, and itself. Folders of one floor never import one another.
FLOORS = [
    {"errors", "files"}, {"config"}, {"model", "data"}, {"diffusion", "constraints"}, {"training", "generation"},
    {"evaluators"}, {"diffusion_lm", "pages"}, {"demo", "doctor", "train", "server"}, {"cli"}, {"__main__"},
]


def rooms_of(i: Import) -> set[str]:
    """The folders and flat modules of `dllm` that an import names."""
    below = [i.module, *(f"{i.module}.{name}" for name in i.names)] if i.module == "dllm" else [i.module]
    return {name.split(".")[1] for name in below if name.startswith("dllm.")} & set().union(*FLOORS)


def test_folders_are_imported_in_one_order(imports):
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    there = {path.relative_to(ROOT / "dllm").parts[0].removesuffix(".py") for path in (ROOT / "dllm").rglob("*.py")}
    assert there - {"__init__"} == floor_of.keys(), "a folder or module has no floor, or a floor has no module"
    for i in (i for i in imports if i.file.startswith("dllm/") and i.file != "dllm/__init__.py"):
        own = Path(i.file).parts[1].removesuffix(".py")
        for room in rooms_of(i) - {own}:
            allowed = floor_of[room] < floor_of[own] or {own, room} == {"errors", "files"}
            assert allowed, f"{i.file} imports dllm.{room}, which is not on a floor below dllm.{own}"


def test_no_circle_of_imports_lazy_ones_included(imports):
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
               for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    arrows: dict[str, set[str]] = {name: set() for name in modules}
    for i in imports:
        importer = i.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        named = {f"{i.module}.{name}" for name in i.names} & modules.keys()
        arrows[importer] |= (named or {i.module} & modules.keys()) - {importer}
    circles = []
    while ends := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in ends:
            del arrows[name]
    circles = sorted(arrows)  # only modules on a circle, or that import one, are left
    assert not circles, f"a circle of imports among {circles}"


def test_at_most_twelve_modules_lie_flat():
    assert len(list((ROOT / "dllm").glob("*.py"))) <= 12


@pytest.mark.slow
def test_the_trainer_starts_without_sampler_evaluators_and_server():
    run("import dllm.training.trainer, sys; "
        "assert not {'dllm.generation', 'dllm.evaluators', 'dllm.server'} & {*sys.modules}")


def test_nothing_imports_the_command_line(imports):
    importers = {i.file for i in imports if i.touches("dllm.cli") and not i.file.startswith("dllm/cli/")}
    assert importers == {"dllm/__main__.py"}


def test_packages_never_import_tests_or_benchmarks(imports):
    assert not [i for i in imports if i.touches("tests") or i.touches("benchmarks") or i.touches("pytest")]


def run(code: str, **environment: str) -> str:
    """Run Python code in a fresh process at the repository root; its output."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_both_import_and_run_with_triton_transformers_and_the_extension_missing():
    run("""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "transformers", "flash_attn", "liger_kernel"):
            raise ModuleNotFoundError(f"no module named {name}", name=name)

sys.meta_path.insert(0, Blocked())
import torch

def cannot_load(path):
    raise OSError("no such library")

torch.ops.load_library = cannot_load
import dllm, dllm_kernels

logits = torch.zeros(1, 3, 5)
logits[..., 2] = 1
done = dllm_kernels.topk_unmask(logits, torch.full((1, 3), 4), 4, 3)
assert done.tokens.tolist() == [[2, 2, 2]]
text = dllm_kernels.describe_backends()
assert not [line for line in text.splitlines() if line.split()[1] == "cpu" and line.endswith("yes")], text
dllm.DiffusionLM, dllm.MDMGenerationConfig
""", DLLM_BUILD="0")


def test_importing_dllm_and_its_help_import_nothing_heavy():
    heavy = ("assert not {'torch', 'numpy', 'transformers', 'rich', 'yaml', 'jinja2', 'matplotlib', 'dllm_kernels'}"
             " & {*sys.modules}")
    run(f"import sys, dllm; {heavy}; dir(dllm); {heavy}")
    run(f"import sys; from dllm.cli import main; assert main(['--help']) == 0 == main(['sample', '--help']); {heavy}")


@pytest.mark.alone
@pytest.mark.parametrize("code, seconds", [
    ("import dllm", 2.5),
    ("import sys; from dllm.cli import main; sys.exit(main(['--help']))", 0.5),
])
def test_import_time(code, seconds):
    times = []
    for _ in range(5):  # the fastest: other programs can only slow it down
        start = time.perf_counter()
        run(code)
        times.append(time.perf_counter() - start)
    assert min(times) < seconds


def test_every_public_name_of_dllm_is_there():
    for name in dllm.__all__:
        assert getattr(dllm, name).__doc__
    assert {*dllm.__all__} <= {*dir(dllm)}
    with pytest.raises(AttributeError, match="no attribute 'DiffusionML'"):
        dllm.DiffusionML  # noqa: B018


def test_both_packages_have_one_version():
    assert dllm.__version__ == dllm_kernels.__version__
