"""A wheel holds everything, and works from another folder; without torch or a compiler it still builds."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel, built from a copy of the sources (building leaves files behind), and what was said."""
    sources = folder / "sources"
    sources.mkdir(parents=True)
    subprocess.run(["cp", "-r", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "csrc", "configs",
                    "dllm", "dllm_kernels", sources], cwd=ROOT, check=True)
    for built in sources.glob("dllm_kernels/*.so"):  # an editable installation's
        built.unlink()
    flags = ["-v", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, sources],
                          env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl")), done.stdout + done.stderr


def relative_files(folder: str, pattern: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


@pytest.mark.slow
def test_a_wheel_holds_every_file_and_works_from_another_folder(tmp_path):
    wheel, _ = build_wheel(tmp_path / "build")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert relative_files("dllm", "*.py") | relative_files("dllm_kernels", "*.py") <= names
    assert {f"dllm_kernels/{name}" for name in relative_files("csrc", "*.*")} <= names
    assert {f"dllm/{name}" for name in relative_files("configs", "*.yaml")} <= names
    assert relative_files("dllm/evaluators/harness/lm_eval_tasks", "*.*") <= names
    assert relative_files("dllm/pages/templates", "*.*") <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc", "configs"))]
    code = """
import os, dllm, dllm_kernels
from importlib import import_module
from pathlib import Path
site = Path(os.environ["PYTHONPATH"])
assert Path(dllm.__file__).is_relative_to(site) and Path(dllm_kernels.__file__).is_relative_to(site)
for file in site.rglob("*.py"):
    parts = file.relative_to(site).with_suffix("").parts
    if "triton" not in parts[-1] and parts[-1] != "__main__":
        import_module(".".join(parts).removesuffix(".__init__"))
from dllm_kernels import native_extension
print(native_extension.why_missing())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "DLLM_BUILD": "0"})
    assert done.returncode == 0, done.stderr
    if shutil.which("g++"):
        assert "dllm_kernels/_native.so" in names and "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
        assert done.stdout.strip() == "None", "the wheel's extension does not load"


@pytest.mark.slow
def test_without_a_compiler_the_wheel_says_what_is_lost_and_holds_the_sources(tmp_path):
    wheel, said = build_wheel(tmp_path / "build", CXX="no-such-compiler")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "dllm_kernels/_native.so" not in names and "dllm_kernels/csrc/registration.cpp" in names
    assert "no compiler 'no-such-compiler'" in said


def test_the_tested_set_is_inside_the_open_ranges():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    tested = dict(line.lower().replace("_", "-").split("==") for line in lines)
    extras = [text for name, wanted in project["optional-dependencies"].items() if name != "gpu" for text in wanted]
    for text in [*project["dependencies"], *extras]:
        requirement = Requirement(text)
        if requirement.name in ("dllm", "triton"):  # on a GPU machine, Triton's version is torch's choice
            continue
        assert requirement.specifier.contains(tested[requirement.name.replace("_", "-")]), text
        assert all(part.operator == ">=" for part in requirement.specifier), f"{text} is not an open range"
