"""python -m benchmarks.gpu_kit FOLDER: what `make bench-gpu` needs, in one folder for a machine without a network.

It holds the files of the commit, the extension built here for GPUs of compute capability 9.0 (--capability names
another), wheels of what a machine with PyTorch, Triton and NumPy lacks, and run.sh, which installs them beside itself
and measures: `bash run.sh`, with flags of benchmarks.gpu. Needs git, nvcc and pip; not the CUDA build of PyTorch.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils import cpp_extension

from dllm.errors import UserError, run_command
from dllm_kernels import native_extension

ROOT = Path(__file__).parents[1]
MOST_BYTES = 60 << 20
# With what they need themselves, as far as a machine with PyTorch has it not.
WHEELS = ["cut-cross-entropy==25.1.1", "liger-kernel==0.8.5", "execnet", "huggingface_hub", "iniconfig", "ninja",
          "packaging", "pluggy", "py-cpuinfo", "pygments", "pytest", "pytest-benchmark", "pytest-timeout",
          "pytest-xdist", "pyyaml", "regex", "rich", "safetensors", "tokenizers", "tqdm", "transformers"]
RUN = """#!/usr/bin/env bash
# Installs what is missing beside this file, measures, and leaves the results in results/.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$here/packages" "$here"/wheels/*.whl
cd "$here/dllm"
touch dllm_kernels/_native.so  # newer than its sources, in whatever order they were copied
PYTHONPATH="$here/packages" DLLM_BUILD=0 python3 -m benchmarks.gpu --output-dir "$here/results" "$@"
"""


@contextmanager
def as_with_cuda(folder: Path, architectures: list[str], cxx_flags: Sequence[str]) -> Iterator[None]:
    """Build as a PyTorch with CUDA would, for some architectures ("sm_90a"). What it links is stood in for in `folder`
    where PyTorch is a build without it: the machine that loads the extension has the real one."""
    codes = [f"-gencode=arch=compute_{name.removeprefix('sm_')},code={name}" for name in architectures]
    others = [flag for flag in native_extension.NVCC_FLAGS if not flag.startswith("-gencode")]
    patches = [mock.patch.object(native_extension, "NVCC_FLAGS", others + codes),
               mock.patch.object(native_extension, "CXX_FLAGS", [*native_extension.CXX_FLAGS, *cxx_flags]),
               mock.patch.object(torch.ops, "load_library", lambda path: None)]  # a second one does not load here
    if torch.version.cuda is None:
        stream = "int aoti_torch_get_current_cuda_stream(int i, void** s) { return 1; }"  # all that is called of it
        for name, code in (("libc10_cuda.so", ""), ("libtorch_cuda.so", stream)):
            subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, "-x", "c", "-"],
                           input=code, text=True, check=True)
        said = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        home = str(Path(re.search(r"_HERE_=(.*)", said)[1]).parent)
        patches += [mock.patch.object(cpp_extension, "CUDA_HOME", home),
                    mock.patch.object(torch.version, "cuda", "13.0"),
                    mock.patch.dict("os.environ", {"LIBRARY_PATH": str(folder)})]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def build_extension(library: Path, folder: Path, architectures: list[str], cxx_flags: Sequence[str] = ()) -> None:
    with as_with_cuda(folder, architectures, cxx_flags):
        native_extension.build(library)


def copy_commit(folder: Path) -> None:
    """The files of HEAD; what is not committed would measure something that nobody can name."""
    if changed := git("status", "--porcelain", "--untracked-files=no"):
        raise UserError(f"commit first: {changed.splitlines()[0].split()[-1]} differs from HEAD")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    (folder / "COMMIT").write_text(git("rev-parse", "HEAD") + "\n")


def git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def download(folder: Path, python: str) -> None:
    platforms = [flag for version in ("17", "28") for flag in ("--platform", f"manylinux_2_{version}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms,
               "--platform", "manylinux2014_x86_64", "--python-version", python, "--dest", str(folder), *WHEELS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the wheels cannot be had: {done.stderr.strip().splitlines()[-1]}")


def make(folder: Path, capability: str, python: str) -> int:
    if missing := [tool for tool in ("git", "nvcc") if shutil.which(tool) is None]:
        raise UserError(f"a kit is made with {missing[0]}, which is not installed")
    if folder.exists():
        raise UserError(f"{folder} is there already; name a new folder")
    folder.mkdir(parents=True)
    copy_commit(folder / "dllm")
    download(folder / "wheels", python)
    stand_ins = folder / "stand_ins"
    stand_ins.mkdir()
    build_extension(folder / "dllm" / "dllm_kernels" / "_native.so", stand_ins, [f"sm_{capability}a"])
    shutil.rmtree(stand_ins)
    (folder / "run.sh").write_text(RUN)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise UserError(f"{folder} has {size >> 20} MiB, more than the {MOST_BYTES >> 20} that can be carried")
    print(f"{folder}: {size / 2**20:.0f} MiB; on the machine with the GPU: bash {folder.name}/run.sh")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--capability", default="90", help="of the GPU, without the point (default: %(default)s)")
    parser.add_argument("--python", default="3.12", help="its version on that machine (default: %(default)s)")
    options = parser.parse_args()
    return run_command(lambda: make(options.folder, options.capability, options.python))


if __name__ == "__main__":
    sys.exit(main())
