"""Builds the C++ extension where it can; the metadata is in pyproject.toml.

A build without torch or a compiler (an isolated one, say) still installs: csrc goes into the wheel, and
dllm_kernels/native_extension.py builds it at first use. What was lost is printed.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_native_extension():
    """dllm_kernels/native_extension.py by its path: importing the package would import every operation."""
    path = ROOT / "dllm_kernels" / "native_extension.py"
    spec = importlib.util.spec_from_file_location("dllm_kernels_native_extension", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_extensions() -> list[Extension]:
    try:
        native = load_native_extension()
        reason = native.why_unbuildable()
    except ImportError:
        reason = "the build environment has no torch (pip install --no-build-isolation uses yours)"
    if reason:
        print(
            f"dllm_kernels: the C++ extension is not built now: {reason}; it will be tried at first use",
            file=sys.stderr,
        )
        return []
    files = [str(file.relative_to(ROOT)) for file in native.sources()]
    # optional: an error while building it is a warning
    return [Extension("dllm_kernels._native", files, optional=True)]


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            load_native_extension().build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (RuntimeError, OSError) as error:
            print(
                f"dllm_kernels: the C++ extension was not built: {error}; it will be tried at first use",
                file=sys.stderr,
            )

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # loaded by torch, so no Python version in its name


class BuildPackage(build_py):
    """Puts into a wheel, below the packages, what lies beside them in a checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder, package in (("csrc", "dllm_kernels"), ("configs", "dllm")):
                shutil.copytree(ROOT / folder, Path(self.build_lib, package, folder), dirs_exist_ok=True)


class BuildWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, machine = super().get_tag()
        return "py3", "none", machine  # the stable ABI of torch, none of Python's


setup(ext_modules=find_extensions(),
      cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage, "bdist_wheel": BuildWheel})
