"""The inside of the sandbox: a clean template process that forks one isolated process for each program.

`host.py` runs this file by its path in a fresh interpreter (standard library only, no environment) and says what is
trusted. The template confines itself (confinement.py): it enters namespaces, in which it is pid 1, and a file system
of its own. It never runs a program and never sees one: a job comes as a file descriptor that only the forked process
reads, once it has given up all that it can. The template kills the process, and all that it may have started, when its
owner says so or is gone.
"""

import ctypes
import functools
import gc
import importlib.util
import json
import operator
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

_PRELOADED = ("array bisect cmath collections copy functools heapq itertools math operator random re string "
              "typing").split()  # what programs import most; each makes every fork a little slower


def load(name: str):
    """A module beside this file, which is on no path that a program can import from."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Loaded before the template enters a file system that does not have them.
confinement, judging = load("confinement"), load("judging")


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in _PRELOADED:
        importlib.import_module(name)
    layers = confinement.isolate(json.loads(sys.argv[2]), control)
    del sys.argv[1:]
    os.dup2(1, 2)  # until here, where setting up could complain
    sys.stdout.reconfigure(errors="backslashreplace")  # printing must not fail a program
    sys.stderr.reconfigure(errors="backslashreplace")
    os.umask(0o077)
    gc.collect()
    gc.freeze()  # forks share these pages for longer
    control.send(json.dumps(layers).encode())
    while True:
        message, descriptors, *_ = socket.recv_fds(control, 1 << 16, 8)
        if not message:
            return
        ended = supervise(control, layers, json.loads(message), descriptors)
        with suppress(BrokenPipeError):  # the owner is gone, as the next receive says
            control.send(json.dumps(ended).encode())


# One job


def supervise(control: socket.socket, layers: dict, limits: dict, descriptors: list[int]) -> dict:
    """Run one job. Returns `status`: the exit code of its process, or 128 + the signal that ended it, or -1 if it was
    killed; `cpu`: CPU seconds of all that it started; `over`: whether it was killed because these reached the limit."""
    clock = descriptors.pop() if limits["clock"] else None
    used_before = reaped_seconds()
    own_folder = not layers["mount namespace"]
    if own_folder:
        confinement.mount_work(limits)
    pid = os.fork()
    if pid == 0:
        try:
            control.close()
            if clock is not None:
                os.close(clock)
            os.setsid()
            confinement.give_up_everything(layers, limits)
            run_job(descriptors)
        except BaseException as error:  # before the job's own code
            os.write(descriptors[1], f"E{type(error).__name__}: {error}".encode("utf-8", "replace")[:500])
        finally:
            os._exit(1)
    for descriptor in descriptors:
        os.close(descriptor)
    watched = os.pidfd_open(pid)
    killed = over = watch(control.fileno(), watched, clock, pid, limits["cpu"])
    if clock is not None:
        os.close(clock)
    if not over:
        word = control.recv(16)  # one per job: "end" if it is ending, or "kill"; none if the owner is gone
        killed = not select.select([watched], [], [], 1 if word == b"end" else 0)[0]
    if killed:
        os.kill(pid, signal.SIGKILL)
    os.close(watched)
    _, status = os.waitpid(pid, 0)
    kill_leftovers(pid)
    if own_folder:
        confinement.unmount_work()
    if over:
        control.recv(16)  # the owner sends a word once it sees the end
    status = -1 if killed else os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
    return {"status": status, "cpu": reaped_seconds() - used_before, "over": over}


def watch(control: int, watched: int, clock: int | None, pid: int, limit: float) -> bool:
    """Wait until the owner speaks or the process ends. Returns whether the process used `limit` CPU seconds before.

    `clock` is the link on which a judge asks, by a byte, for the CPU seconds used so far. Only the process is measured
    here; its children count at the end. Seccomp forbids children; without it the owner's backstop stops them.
    """
    poll = select.poll()
    for descriptor in (control, watched) if clock is None else (control, watched, clock):
        poll.register(descriptor, select.POLLIN)
    while (left := limit - process_seconds(pid)) > 0:
        ready = {descriptor for descriptor, _ in poll.poll(min(1000 * left + 1, 1 << 30))}
        if ready - {clock}:
            return False
        if ready and os.read(clock, 1):
            with suppress(BrokenPipeError):
                os.write(clock, struct.pack("<d", process_seconds(pid)))
        elif ready:  # the judge is gone
            poll.unregister(clock)
    return True


def process_seconds(pid: int) -> float:
    """CPU seconds of a process, all its threads together, until it is waited for."""
    return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3), which Python lacks


def reaped_seconds() -> float:
    """CPU seconds of all processes that this one has waited for, with their own children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def kill_leftovers(group: int) -> None:
    """Kill every process that the job has left, and wait for its end.

    Pid 1 of a namespace kills all processes; otherwise the process group, and orphans, whose parent we become.
    """
    for _ in range(2000):
        with suppress(ProcessLookupError):
            os.kill(-1 if os.getpid() == 1 else -group, signal.SIGKILL)
        if os.getpid() != 1:
            with suppress(OSError):  # gone meanwhile; or this kernel has no such file, and the group is all we can find
                with open(f"/proc/self/task/{os.getpid()}/children") as file:
                    for orphan in file.read().split():
                        os.kill(int(orphan), signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
        except ChildProcessError:
            return
    raise OSError("a process of the last job cannot be killed")


def run_job(descriptors: list[int]) -> None:
    """Inside all layers: read the job, report that, run it, and write its verdict."""
    job_fd, verdict, *links = descriptors
    with open(job_fd, "rb", buffering=0) as file:
        job = json.loads(file.readall())
    random.seed(0)
    write = os.write
    write(verdict, b"R")
    try:
        if job["kind"] == "serve":
            judging.serve(job, *links)
        else:
            # The module runs to its end, then the token is written: from C, by objects that no name leads to and the
            # garbage collector does not know. extend() puts them into no tuple, and as a method has the list for its
            # first argument, which is what sys.monitoring tells.
            [].extend(arm(job, verdict, links))
            # Only the first arrival of the token counts. If it is missing, the module raised this exception:
            write(verdict, json.dumps({"verdict": "fail", "error": "StopIteration"}).encode())
        os._exit(0)
    except BaseException as error:
        write(verdict, json.dumps(describe(error)).encode())


def arm(job: dict, verdict: int, links: list[int]) -> map:
    """An iterator that runs the job, then writes the token, which is removed from the job."""
    token = bytes.fromhex(job.pop("token"))
    if job["kind"] == "judge":
        first = functools.partial(judging.judge, job, *links)
    else:
        first = functools.partial(exec, job.pop("program"), {})
    steps = map(operator.call, [first, functools.partial(os.write, verdict, token)])
    hidden, found = (map, list, tuple, type(iter([])), functools.partial), [steps]
    while found:
        thing = found.pop()
        ctypes.pythonapi.PyObject_GC_UnTrack(ctypes.py_object(thing))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))  # never freed: that would untrack it again
        found += [part for part in gc.get_referents(thing) if type(part) in hidden]
    return steps


def describe(error: BaseException) -> dict:
    """Verdict and reason of an exception, without running code of its class or arguments."""
    kind = type(error)
    plain = kind.__module__ in ("builtins", "judging") and error.args and type(error.args[0]) is str
    text = error.args[0] if plain else ""
    verdict = "oom" if isinstance(error, MemoryError) else error.verdict if kind.__module__ == "judging" else "fail"
    return {"verdict": verdict, "error": (f"{kind.__name__}: {text}" if text else kind.__name__)[:300]}


if __name__ == "__main__":
    main()
