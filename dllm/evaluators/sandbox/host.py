"""Run programs that nobody has read: rootless, without a container engine, in a few milliseconds each.

Processes, and the trust in them:

    this process               trusted. Has the tests, the expected outputs, the secrets of its user. It decides the
                               verdict. It reads only a few bytes from a program, and from a judge.
    the template               trusted, and clean: a fresh interpreter (isolation.py) with an empty environment, which
                               has entered namespaces and waits. It forks a process for each job, measures its CPU
                               time and kills it, but never reads a job.
    the program's process      not trusted: no file but Python's, an empty folder that ends with it, no network, no
                               other process, no environment, limits on everything, and killed at the end.
    the judge's process        has the tests but not the program, and runs in the same isolation.

`Sandbox.run` gives the verdict of the reference executors: program and tests are one module in one process, and it
passes if the module runs to its end. The process then returns a random token, which proves this; exit codes, output and
everything else that the program may write mean nothing. Neither frames nor the garbage collector lead to the token.
`run` cannot detect a program that reads the tests in its own process, returns objects that equal everything, or
searches the memory with native code. `Sandbox.judged` can: the tests run in the process of the judge, the program in
another, and only calls and plain data cross (judging.py), so that a pass means right values.

A limit of time counts the CPU seconds of the process, its threads, and everything that it started. So a verdict does
not depend on the load of the machine. RLIMIT_CPU is the hard stop; the comparison is exact, by the kernel's account of
ended processes. The wall clock ends processes that sleep or wait, after `judging.BACKSTOP` times the limit.

One template serves one program after another. They share its namespaces and nothing else, because all processes are
killed and the folder is unmounted in between. `Sandbox.layers` names the layers that this machine lacks, with reasons;
`PROTECTS` says what is lost without each.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from dllm.errors import Failure
from dllm.evaluators.sandbox.judging import BACKSTOP, Program

PROTECTS = {  # layer -> loss without it
    "user namespace": "only root gets the other namespaces; threads are not limited",
    "mount namespace": "programs see the names of the host's files, and disk use is not capped; only Landlock protects",
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
    memory: int = 4 << 30  # bytes of address space
    disk: int = 64 << 20  # bytes of its folder, and of a file
    files: int = 4096  # in its folder
    descriptors: int = 128
    threads: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """verdict: pass, fail (an exception, by name), timeout, crash (ended without a verdict), oom (MemoryError), or from
    a judge: cannot judge (the tests pass more than plain data)."""

    verdict: str
    error: str = ""
    seconds: float = 0.0  # CPU time of the program

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


@dataclass(frozen=True, slots=True)
class _Job:
    verdict: BinaryIO  # the reading end of its pipe
    token: bytes
    folder: str | None  # its work folder, where there is no mount namespace


@dataclass(frozen=True, slots=True)
class _End:
    status: int  # exit code, or 128 + signal, or -1 if it was killed
    cpu: float  # seconds, of all that the job started
    over: bool  # killed because it reached the limit

    def too_long(self, timeout: float) -> Outcome | None:
        """A timeout if the job used more CPU time than it may, whatever it reported; else None."""
        if not self.over and self.cpu <= timeout:
            return None
        return Outcome(verdict="timeout", error=f"not done in {timeout:g} s of CPU time", seconds=self.cpu)


class Sandbox:
    """One template process. Runs one program at a time; take one Sandbox for each thread. A context manager."""

    def __init__(self, layers: Sequence[str] = LAYERS, limits: Limits | None = None):
        """
        Args:
            layers: layers to use where this machine has them. Fewer are for tests and measurements.
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
        """End the template and everything that it started."""
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()

    @property
    def missing(self) -> dict[str, str]:
        return {name: reason for name, reason in self.layers.items() if reason}

    def run(self, program: str, timeout: float) -> Outcome:
        """Run a program with its tests, as the reference executors do. Passes if it runs to its end.

        Args:
            timeout: CPU seconds; the backstop ends a program that sleeps.
        """
        job = self._start({"kind": "script", "program": program}, [], timeout)
        return self._finish(job, timeout)

    def judged(self, judge: "Sandbox", program: str, work: dict, timeout: float, table: int | None = None) -> Outcome:
        """Run a program here and its judge in another sandbox; see `judging.judge` for `work` and `table`.

        Args:
            timeout: CPU seconds for each of the two.
        """
        (ours, theirs), (asked, asks) = socket.socketpair(), socket.socketpair()
        with ours, theirs, asked, asks:
            running = self._start({"kind": "serve", "program": program}, [ours.fileno()], timeout, asked.fileno())
            try:
                links = [theirs.fileno(), asks.fileno(), *([] if table is None else [table])]
                judging = judge._start({"kind": "judge", **work}, links, timeout)
            except BaseException:
                self._stop(running)
                raise
        try:
            outcome = judge._finish(judging, timeout)
        except BaseException:
            self._stop(running)
            raise
        end = self._stop(running, b"end" if outcome.verdict == "crash" else b"kill")
        if too_long := end.too_long(timeout):
            return too_long
        if outcome.verdict == "crash" and end.status != 0:
            return Outcome(verdict="crash", error=_describe_end(end.status), seconds=end.cpu)
        return replace(outcome, seconds=end.cpu)

    def answers(self, program: str, requests: list[bytes], timeout: float) -> list[tuple[bytes, float]]:
        """Call the functions of a program that is trusted to answer: each encoded result, and its CPU seconds.

        Raises: Failure if the program does not give them all within `timeout` CPU seconds a call.
        """
        (ours, theirs), (asked, asks) = socket.socketpair(), socket.socketpair()
        with ours, asks:
            with theirs, asked:
                job = self._start({"kind": "serve", "program": program}, [theirs.fileno()],
                                  timeout * (len(requests) + 1), asked.fileno())
            try:
                link, results = Program(ours.fileno(), asks.fileno()), []
                link.start(timeout)
                used = link.clock.now()
                for request in requests:
                    answer, before = link.ask(request, 1 << 32, timeout), used
                    used = link.clock.now()
                    results.append((answer, used - before))
            except Exception as error:
                raise Failure(f"a solution of the task's own fails: {type(error).__name__}: {error}") from error
            finally:
                self._stop(job)
        return results

    def _start(self, work: dict, links: list[int], timeout: float, clock: int | None = None) -> _Job:
        """Start a job and leave it running. One at a time. clock: the link on which the template answers a Clock."""
        token = secrets.token_bytes(16)
        folder = None
        if self.layers["mount namespace"]:
            folder = tempfile.mkdtemp(prefix="dllm-sandbox-")
            if os.geteuid() == 0 and not self.layers["unprivileged user"]:
                os.chown(folder, NOBODY, NOBODY)
        limits = {name: getattr(self.limits, name) for name in Limits.__slots__}
        limits |= {"cpu": timeout, "work": folder, "clock": clock is not None}
        read, write = os.pipe()
        job_fd = os.memfd_create("job")
        try:
            with open(job_fd, "wb", closefd=False) as file:
                file.write(json.dumps(work | {"token": token.hex()}).encode())
            os.lseek(job_fd, 0, os.SEEK_SET)
            descriptors = [job_fd, write, *links, *([] if clock is None else [clock])]
            socket.send_fds(self._control, [json.dumps(limits).encode()], descriptors)
        except OSError as error:
            raise Failure(f"the sandbox's template is gone ({error.strerror})") from None
        finally:
            os.close(job_fd)
            os.close(write)
        return _Job(open(read, "rb", buffering=0), token, folder)

    def _finish(self, job: _Job, timeout: float) -> Outcome:
        """Wait for a job's verdict, end it, and clean up."""
        word, said, late = b"kill", b"", False
        try:
            self._await_ready(job)
            deadline = time.monotonic() + BACKSTOP * timeout
            while len(said) < _MOST_SAID and not said.startswith(job.token):
                late = not _readable(job.verdict, deadline)
                part = b"" if late else job.verdict.read(_MOST_SAID)
                if not part:
                    break
                said += part
            if not late and not said.startswith(job.token):
                word = b"end"
        finally:
            end = self._stop(job, word)
        if too_long := end.too_long(timeout):
            return too_long
        if late:
            error = f"not done in {BACKSTOP * timeout:g} s of wall-clock time"
            return Outcome(verdict="timeout", error=error, seconds=end.cpu)
        return Outcome(verdict="pass", seconds=end.cpu) if said.startswith(job.token) else _explain(said, end)

    def _await_ready(self, job: _Job) -> None:
        said = job.verdict.read(1) if _readable(job.verdict, time.monotonic() + _GRACE) else b""
        if said != b"R":
            reason = job.verdict.read(1000) if said else b""
            raise Failure(f"the sandbox cannot start a program: {reason.decode(errors='replace') or 'no reason given'}")

    def _stop(self, job: _Job, word: bytes = b"kill") -> _End:
        """End a job and everything it started: at once, or ("end") when its process ends, at most a second later."""
        job.verdict.close()
        with suppress(OSError):
            self._control.send(word)
        try:
            return _End(**json.loads(self._receive(_GRACE)))
        finally:
            if job.folder is not None:
                remove_folder(job.folder)

    def _receive(self, seconds: float) -> bytes:
        message = b""
        with suppress(ConnectionResetError):  # a template that was killed before it had read everything
            if _readable(self._control, time.monotonic() + seconds):
                message = self._control.recv(1 << 16)
        if not message:
            raise Failure("the sandbox's template ended, or does not answer; take fewer workers if memory is short")
        return message


def _readable(file, deadline: float) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(min(max(0.0, 1000 * (deadline - time.monotonic())), 1 << 30)))


def _explain(said: bytes, end: _End) -> Outcome:
    """The outcome of a job that did not return its token. Its report is believed only to its disadvantage."""
    try:
        verdict, error = (json.loads(said)[key] for key in ("verdict", "error"))
        if verdict in ("fail", "oom", "timeout", "crash", "cannot judge") and isinstance(error, str):
            return Outcome(verdict=verdict, error=error, seconds=end.cpu)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    error = "nonsense instead of a verdict" if said else _describe_end(end.status)
    return Outcome(verdict="crash", error=error, seconds=end.cpu)


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
    """Map root and nobody into the new user namespace of a process, so that it can become nobody. For root only."""
    try:
        for kind in ("uid", "gid"):
            with open(f"/proc/{pid}/{kind}_map", "w") as file:
                file.write(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
    except OSError:  # our own namespace has no such user
        return False
    return True


def remove_folder(folder: str) -> None:
    """shutil.rmtree, which also removes folders that nobody may read."""
    for path, folders, _ in os.walk(folder):  # from the top, so that a folder is opened up before it is entered
        for name in folders:
            inner = os.path.join(path, name)
            if not os.path.islink(inner):
                os.chmod(inner, 0o700)
    shutil.rmtree(folder)
