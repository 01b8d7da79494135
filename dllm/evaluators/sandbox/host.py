"""Runs programs that nobody has read: rootless, without a container engine, a few milliseconds each.

Who is trusted, and what crosses:

    this process               trusted. Has the tests, the expected outputs, the secrets of its user. It decides the
                               verdict and keeps the time. From a program, and from a judge, it reads a few bytes.
    the template               trusted, and clean: a fresh interpreter (isolation.py) with an empty environment, which
                               has entered namespaces and waits. It forks a process for each job and kills it, but
                               never reads a job.
    the program's process      not trusted: no file but Python's, an empty folder that is gone with it, no network, no
                               other process, no environment, limits on everything, and killed in the end.
    the judge's process        has the tests but not the program, and runs in the same isolation.

`Sandbox.run` gives the verdict of the reference executors: program and tests are one module in one process, and it
passes if the module runs to its end. A random token that the process gives back afterwards tells that; exit codes,
output, and whatever else the program may write mean nothing. Neither frames nor the garbage collector lead to the
token. What `run` cannot tell: a program in the same process can read the tests, return objects that equal everything,
or search the memory with native code. That is what `Sandbox.judged` is for: tests in the judge's process, the program
in another, and between them calls and plain data (judging.py), so that a pass means that right values came out.

One template serves one program after another, which share its namespaces and nothing else: all processes are killed and
the folder is unmounted in between. Layers that this machine does not have are named in `Sandbox.layers`, with the
reason; `PROTECTS` says what is lost.
"""

import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dllm.errors import Failure
from dllm.evaluators.judging import Program

PROTECTS = {  # layer -> what is lost without it
    "user namespace": "only root gets the other namespaces; threads are not limited",
    "mount namespace": "programs see the file system's names, and its size limits them not; Landlock must hold",
    "network namespace": "the network is closed by seccomp and Landlock alone",
    "ipc namespace": "System V memory is closed by seccomp alone",
    "uts namespace": "programs see the machine's name",
    "pid namespace": "programs see other processes; what they start is found by group and parentage alone",
    "unprivileged user": "programs run as root, without its capabilities",
    "landlock": "files are closed by the mount namespace alone",
    "seccomp": "programs may start processes and reach more of the kernel",
}
LAYERS = tuple(PROTECTS)
NOBODY = 65534
_GRACE = 20.0  # seconds for a process to get ready, on a busy machine
_MOST_SAID = 1 << 10  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one program."""

    memory: int = 4 << 30  # bytes of address space
    disk: int = 64 << 20  # bytes of its folder, and of a file
    files: int = 4096  # in its folder
    descriptors: int = 128
    threads: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """verdict: pass, fail (an exception, by name), timeout, crash (ended without a verdict), oom (MemoryError); and
    of a judge too: cannot judge (the tests pass more than plain data)."""

    verdict: str
    error: str = ""
    seconds: float = 0.0  # since the process was ready

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


@dataclass(frozen=True, slots=True)
class _Job:
    verdict: BinaryIO  # the reading end of its pipe
    token: bytes
    folder: str | None  # its work folder, where there is no mount namespace


class Sandbox:
    """One template process. Runs one program at a time; take one Sandbox for each thread. A context manager."""

    def __init__(self, layers: Sequence[str] = LAYERS, limits: Limits | None = None):
        """
        Args:
            layers: those to use where they can be had. Fewer are for tests and measurements.
        Raises: Failure if the template cannot start.
        """
        self.limits = limits or Limits()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-B", str(Path(__file__).with_name("isolation.py")), str(theirs.fileno()),
                 json.dumps(layers)],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, cwd="/", start_new_session=True,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
                     "OPENBLAS_NUM_THREADS": "1"})
        self._control = ours
        try:
            message = self._receive(_GRACE)
            if message == b"map":
                ours.send(b"mapped" if _map_nobody(self._process.pid) else b"not mapped")
                message = self._receive(_GRACE)
            self.layers: dict[str, str] = json.loads(message)
        except Failure:
            self._process.kill()
            reason = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise Failure(f"the sandbox cannot start: {reason[-1] if reason else 'no reason given'}") from None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the template, and with it what it started."""
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()

    @property
    def missing(self) -> dict[str, str]:
        """layer -> why it is absent."""
        return {name: reason for name, reason in self.layers.items() if reason}

    def run(self, program: str, timeout: float) -> Outcome:
        """Run a program with its tests, as the reference executors do. Passes if it runs to its end in `timeout` s."""
        job = self._start({"kind": "script", "program": program}, [], timeout)
        return self._finish(job, timeout)

    def judged(self, judge: "Sandbox", program: str, work: dict, timeout: float, table: int | None = None) -> Outcome:
        """Run a program here and its judge in another sandbox; see `judging.judge` for `work` and `table`."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            running = self._start({"kind": "serve", "program": program}, [ours.fileno()], timeout)
            try:
                judging = judge._start({"kind": "judge", **work},
                                       [theirs.fileno(), *([] if table is None else [table])], timeout)
            except BaseException:
                self._stop(running)
                raise
        try:
            outcome = judge._finish(judging, timeout)
        except BaseException:
            self._stop(running)
            raise
        status = self._stop(running, b"end" if outcome.verdict == "crash" else b"kill")
        if outcome.verdict == "crash" and status != 0:
            return Outcome(verdict="crash", error=_describe_end(status), seconds=outcome.seconds)
        return outcome

    def answers(self, program: str, requests: list[bytes], timeout: float) -> list[tuple[bytes, float]]:
        """Call the functions of a program that is trusted to answer: each encoded result, and its seconds.

        Raises: Failure if the program does not give them all within `timeout` seconds a call.
        """
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                job = self._start({"kind": "serve", "program": program}, [theirs.fileno()], timeout * len(requests))
            try:
                link, results = Program(ours.fileno()), []
                link.start(timeout)
                for request in requests:
                    start = time.perf_counter()
                    answer = link.ask(request, 1 << 32, timeout)
                    results.append((answer, time.perf_counter() - start))
            except Exception as error:
                raise Failure(f"a solution of the task's own fails: {type(error).__name__}: {error}") from error
            finally:
                self._stop(job)
        return results

    def _start(self, work: dict, links: list[int], timeout: float) -> _Job:
        """Start a job and leave it running. One at a time."""
        token = secrets.token_bytes(16)
        folder = None
        if self.layers["mount namespace"]:
            folder = tempfile.mkdtemp(prefix="dllm-sandbox-")
            if os.geteuid() == 0 and not self.layers["unprivileged user"]:
                os.chown(folder, NOBODY, NOBODY)
        limits = {name: getattr(self.limits, name) for name in Limits.__slots__}
        limits |= {"cpu": int(timeout) + 2, "work": folder}
        read, write = os.pipe()
        job_fd = os.memfd_create("job")
        try:
            with open(job_fd, "wb", closefd=False) as file:
                file.write(json.dumps(work | {"token": token.hex()}).encode())
            os.lseek(job_fd, 0, os.SEEK_SET)
            socket.send_fds(self._control, [json.dumps(limits).encode()], [job_fd, write, *links])
        except OSError as error:
            raise Failure(f"the sandbox's template is gone ({error.strerror})") from None
        finally:
            os.close(job_fd)
            os.close(write)
        return _Job(open(read, "rb", buffering=0), token, folder)

    def _finish(self, job: _Job, timeout: float) -> Outcome:
        """Wait for a job's verdict, end it, and clean up."""
        word = b"kill"
        try:
            self._await_ready(job)
            start = time.monotonic()
            said = b""
            while len(said) < _MOST_SAID and not said.startswith(job.token):
                if not _readable(job.verdict, start + timeout):
                    return Outcome(verdict="timeout", error=f"not done in {timeout:g} s", seconds=timeout)
                part = job.verdict.read(_MOST_SAID)
                if not part:
                    break
                said += part
            seconds = time.monotonic() - start
            if said.startswith(job.token):
                return Outcome(verdict="pass", seconds=seconds)
            word = b"end"
        finally:
            status = self._stop(job, word)
        return _explain(said, status, seconds)

    def _await_ready(self, job: _Job) -> None:
        said = job.verdict.read(1) if _readable(job.verdict, time.monotonic() + _GRACE) else b""
        if said != b"R":
            reason = job.verdict.read(1000) if said else b""
            raise Failure(f"the sandbox cannot start a program: {reason.decode(errors='replace') or 'no reason given'}")

    def _stop(self, job: _Job, word: bytes = b"kill") -> int:
        """End a job and whatever it started: at once, or ("end") a second after its process. Returns its status."""
        job.verdict.close()
        with suppress(OSError):
            self._control.send(word)
        try:
            return int(self._receive(_GRACE))
        finally:
            if job.folder is not None:
                remove_folder(job.folder)

    def _receive(self, seconds: float) -> bytes:
        message = self._control.recv(1 << 16) if _readable(self._control, time.monotonic() + seconds) else b""
        if not message:
            raise Failure("the sandbox's template ended, or does not answer; take fewer workers if memory is short")
        return message


def _readable(file, deadline: float) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))))


def _explain(said: bytes, status: int, seconds: float) -> Outcome:
    """The outcome of a job that did not give its token back. What it said is believed only to its disadvantage."""
    try:
        verdict, error = (json.loads(said)[key] for key in ("verdict", "error"))
        if verdict in ("fail", "oom", "timeout", "crash", "cannot judge") and isinstance(error, str):
            return Outcome(verdict=verdict, error=error, seconds=seconds)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return Outcome(verdict="crash", error=_describe_end(status) if not said else "nonsense in the place of a verdict",
                   seconds=seconds)


def _describe_end(status: int) -> str:
    if status < 0:
        return "the process closed its channel and went on"
    if status <= 128:
        return f"the process ended by itself, with exit code {status}"
    try:
        return f"the process was ended by {signal.Signals(status - 128).name}"
    except ValueError:
        return f"the process ended with exit code {status}"


def _map_nobody(pid: int) -> bool:
    """Give a process's new user namespace root and nobody, so that it can become the second. For root only."""
    try:
        for kind in ("uid", "gid"):
            with open(f"/proc/{pid}/{kind}_map", "w") as file:
                file.write(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
    except OSError:  # we are ourselves in a namespace that has no such user
        return False
    return True


def remove_folder(folder: str) -> None:
    """shutil.rmtree, also of folders that nobody may read."""
    for path, folders, _ in os.walk(folder):  # from the top: a folder is opened up before it is entered
        for name in folders:
            inner = os.path.join(path, name)
            if not os.path.islink(inner):
                os.chmod(inner, 0o700)
    shutil.rmtree(folder)
