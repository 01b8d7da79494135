"""python -m hub.layout FOLDER: dllm_kernels as a project of Hugging Face's kernel-builder.

`make hub-kernel HUB=FOLDER` calls it. The folder gets build.toml (edition 5), flake.nix, CARD.md, csrc and torch-ext:
the sources of this checkout, except that hub/native_extension.py takes the place of the module that finds or builds an
extension, and kernel-builder writes its own _ops.py. Format: https://huggingface.co/docs/kernels/builder/writing-kernels
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from dllm.errors import UserError, run_command
from dllm_kernels.native_extension import CXX_FLAGS

ROOT = Path(__file__).parents[1]
PACKAGE = "dllm_kernels"
# kernel-builder defines the version of the stable ABI itself.
FLAGS = [flag for flag in CXX_FLAGS if not flag.startswith("-D")]
BUILD = """\
[general]
name = "dllm-kernels"
version = 0  # not recommended for production yet
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch]  # compiled for every backend, because a model on a GPU has tensors on the CPU too
src = {common}
cxx-flags = {flags}

[torch.stable-abi]
cpu = "2.11"
cuda = "2.11"

[kernel.gpu]
backend = "cuda"
depends = ["torch"]
cuda-capabilities = ["8.0", "9.0+PTX"]
cuda-flags = ["-std=c++20"]
src = {gpu}
"""


def listed(files: Iterable[Path], folder: Path) -> str:
    """Their paths below the folder, as an array of TOML."""
    return json.dumps(sorted(file.relative_to(folder).as_posix() for file in files), indent=4)


def make(folder: Path) -> int:
    if folder.exists():
        raise UserError(f"{folder} is there already; name a new folder")
    python = folder / "torch-ext" / PACKAGE
    for path in (ROOT / PACKAGE).rglob("*.py"):
        copy = python / path.relative_to(ROOT / PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (python / "_ops.py").unlink()
    shutil.copy(ROOT / "hub" / "native_extension.py", python)
    shutil.copy(ROOT / "hub" / "torch_binding.cpp", python.parent)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for path in (ROOT / "hub" / "CARD.md", ROOT / "hub" / "flake.nix", ROOT / "LICENSE"):
        shutil.copy(path, folder)
    sources = {file for file in (folder / "csrc").rglob("*") if file.is_file()}
    gpu = {file for file in sources if file.parent.name == "cuda"}
    (folder / "build.toml").write_text(BUILD.format(
        common=listed({*sources - gpu, python.parent / "torch_binding.cpp"}, folder), gpu=listed(gpu, folder),
        flags=json.dumps(FLAGS)))
    print(f"{folder}: commit it to a repository of its own, then `kernel-builder build` there")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    return run_command(lambda: make(options.folder))


if __name__ == "__main__":
    sys.exit(main())
