"""Outputs of compilers, made once for all tests, runs and checkouts of a user, in ~/.cache/dllm-tests."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHELVES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dllm-tests"
KEPT = 3  # folders for each name: of several checkouts, and of the states an edit is tried in
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())


def make_once(name: str, make: Callable[[Path], object], *ingredients: object) -> Path:
    """The folder that `make` filled for these ingredients; a Path among them stands for the file's content.

    Processes that ask at the same time wait for the first. A `make` that fails leaves nothing. Of what was made under
    the same name, the KEPT folders that were asked for last remain.
    """
    key = hashlib.sha256()
    for ingredient in ingredients:
        key.update(ingredient.read_bytes() if isinstance(ingredient, Path) else repr(ingredient).encode())
        key.update(b"\0")
    shelf = SHELVES / name
    shelf.mkdir(parents=True, exist_ok=True)
    folder = shelf / key.hexdigest()[:16]
    with open(shelf / "lock", "w") as lock:  # released by the system even if its owner is killed
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            fresh = Path(tempfile.mkdtemp(dir=shelf))
            try:
                make(fresh)
                os.rename(fresh, folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            others = sorted((path for path in shelf.iterdir() if path.is_dir()), key=os.path.getmtime)
            for old in others[:-KEPT]:
                shutil.rmtree(old)
        os.utime(folder)
    return folder


def version_of(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def shared_library(source: Path, *flags: str, compiler: tuple[str, ...] = ("g++",), depends: tuple = ()) -> Path:
    """The shared library that the compiler makes of a C++ source; `depends` names what else it is made from.

    Folders (-I, -L) are not among its ingredients, because they differ between checkouts.
    """
    command = [*compiler, "-std=c++20", "-shared", "-fPIC", str(source), *flags]
    key = [*compiler, *(flag for flag in flags if not flag.startswith(("-I", "-L")))]

    def make(folder: Path) -> None:
        subprocess.run([*command, "-o", folder / "library.so"], check=True)

    return make_once(source.stem, make, key, version_of(compiler[0]), source, *depends) / "library.so"
