"""Processes that begin at once: forks of one that has imported torch and the packages, which takes seconds."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dllm.cli", "dllm.train", "dllm.training.trainer", "dllm.model.loading", "transformers",
                              "huggingface_hub.serialization", "dllm.server.app", "dllm.server.listening",
                              "transformers.models.diffusion_gemma.modeling_diffusion_gemma"])


def start(main: Callable[[Sequence[str]], int], arguments: Sequence, output: Path, **environment: str) -> BaseProcess:
    """A process whose exit code is main(arguments), and whose stdout and stderr go to the file `output`."""
    output.write_text("")  # of a process before
    process = FORKS.Process(target=_run, args=(main, [str(argument) for argument in arguments], output,
                                               {**os.environ, **environment}), daemon=True)
    process.start()
    return process


def _run(main: Callable[[Sequence[str]], int], arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


def end(process: BaseProcess, seconds: float = 120) -> int:
    """Wait for the end of a process. Returns its exit code, -N after signal N."""
    process.join(seconds)
    assert process.exitcode is not None, f"the process goes on after {seconds} seconds"
    return process.exitcode


def wait_until(happened: Callable[[], object], process: BaseProcess | None = None) -> None:
    """Wait until `happened`, at most two minutes, and only as long as the process lives."""
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline and (process is None or process.is_alive())
        time.sleep(0.001)


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
