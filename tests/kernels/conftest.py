"""Runs the files of Triton's tests again, each in a process where Triton interprets, where there is no GPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_interpreted(request) -> Callable[[str], None]:
    """Takes a test file, and fails where its tests do. All those that were asked for run at once.

    The interpreter must be asked for before Triton is imported, and then other tests would find it too.
    """
    def run(path: Path) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
                              cwd=Path(__file__).parents[2], capture_output=True, text=True,
                              env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})

    paths = dict.fromkeys(item.path for item in request.session.items if item.name == "test_in_the_interpreter")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        begun = {path: pool.submit(run, path) for path in paths}

        def finish(file: str) -> None:
            done = begun[Path(file)].result()
            assert done.returncode == 0, done.stdout + done.stderr

        yield finish
