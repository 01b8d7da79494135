"""What is installed, what runs here and why the rest does not, and what to install."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

import dllm
import dllm_kernels
from dllm.errors import Failure
from dllm.files import name_processor
from dllm.model import liger
from dllm.training.precision import probe

_REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "pyarrow")
_OPTIONAL = ("triton", "flash-attn", "liger-kernel")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# program -> (names it goes by, what is lost without it)
_PROGRAMS = {
    "g++": ((os.environ.get("CXX", "g++"),), "the C++ extension cannot be built"),
    "nvcc": (("nvcc",), "CUDA sources cannot be built"),
    "chromium": (_BROWSERS, "the test that looks at the demo's report is skipped"),
}


def report() -> None:
    """Print the report to stdout. Builds the C++ extension if it is not there yet and can be built."""
    hints = []
    _line("dllm", f"{dllm.__version__}, dllm_kernels {dllm_kernels.__version__}")
    _line("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for name in (*_REQUIRED, *_OPTIONAL):
        try:
            _line(name, version(name))
        except PackageNotFoundError:
            _line(name, "not installed")
            if name in _REQUIRED:
                hints.append(f"pip install {name}")
    if reason := liger.missing():
        _line("", f"layers by Liger-Kernel: {reason}")
    print()
    _line("cpu", f"{name_processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    found = probe()
    _line("", "no units for bf16 (AMX, AVX512-BF16): training in fp32" if found is None else found.describe())
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        _line(f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        _line("gpu", "none: this torch is a CPU build" if cuda is None else f"none seen by this torch, for CUDA {cuda}")
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            hints.append("a CUDA build of torch (pytorch.org/get-started), for the GPU of this machine")

    print()
    for name, (names, loss) in _PROGRAMS.items():
        path = next((found for candidate in names if (found := shutil.which(candidate))), None)
        if path is not None:
            _line(name, " ".join(filter(None, (path, _program_version(path)))))
        else:
            _line(name, f"not found: {loss}")
            if name == "g++":
                hints.append("g++ 11 or newer (apt-get install g++), for the C++ extension")

    print()
    _describe_sandbox()
    print()
    dllm_kernels.describe_backends()
    print("\nto install: " + ("\n            ".join(hints) if hints else "nothing"))


def _describe_sandbox() -> None:
    """The layers that programs run in when samples are scored, and what is not protected without the others."""
    from dllm.evaluators.sandbox.host import PROTECTS, Sandbox

    try:
        with Sandbox() as sandbox:
            layers = sandbox.layers
    except Failure as error:
        _line("sandbox", f"{error}: samples cannot be scored")
        return
    _line("sandbox", ", ".join(name for name, reason in layers.items() if not reason) or "no layer")
    for name, reason in layers.items():
        if reason:
            _line("", f"no {name} ({reason}): {PROTECTS[name]}")
    if not any(layers.values()):
        _line("", "all that --require-sandbox strict asks for")


def _line(name: str, text: str) -> None:
    print(f"{name:<16} {text}")


def _program_version(path: str) -> str:
    """The first number with a dot in what `--version` prints."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\d+\.\d[\d.]*", done.stdout)
    return found[0] if found else ""
