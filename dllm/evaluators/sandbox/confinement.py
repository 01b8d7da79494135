"""The inside of the sandbox: a clean template process that forks one isolated process for each program.

`dllm.evaluators.sandbox` runs this file by its path in a fresh interpreter (standard library only, no environment) and
says what is trusted. The template enters namespaces, in which it is pid 1, and a file system of its own. It never runs
a program and never sees one: a job comes as a file descriptor that only the forked process reads, once it has given up
all that it can. The template kills the process, and all that it may have started, when its owner says so or is gone.
"""

import ctypes
import errno
import functools
import gc
import importlib.util
import json
import operator
import os
import platform
import random
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress

NAMESPACES = {  # name -> flag of unshare(2)
    "user": 0x10000000, "mount": 0x00020000, "network": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000,
    "pid": 0x20000000}
NOBODY = 65534
# The program's folder where there is a mount namespace; not one that Python is in.
WORK = "/sandbox" if any(path.startswith("/tmp/") for path in (sys.prefix, sys.base_prefix)) else "/tmp"
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18)
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_PRELOADED = ("array bisect cmath collections copy functools heapq itertools math operator random re string "
              "typing").split()  # what programs import most; each makes every fork a little slower

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments):
    """A function of the C library that returns -1 with errno when it fails."""
    result = getattr(libc, name)(*(ctypes.c_char_p(os.fsencode(a)) if isinstance(a, str) else
                                   ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    judging = load_judging()
    for name in _PRELOADED:
        importlib.import_module(name)
    layers = isolate(json.loads(sys.argv[2]), control)
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
        status = supervise(control, layers, json.loads(message), descriptors, judging)
        with suppress(BrokenPipeError):  # the owner is gone, as the next receive says
            control.send(str(status).encode())


def load_judging():
    """judging.py beside this file, which is on no path that a program can import from."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "judging.py")
    spec = importlib.util.spec_from_file_location("judging", path)
    module = sys.modules["judging"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# One job


def supervise(control: socket.socket, layers: dict, limits: dict, descriptors: list[int], judging) -> int:
    """Run one job. Returns the exit code of its process, or 128 + the signal that ended it, or -1 if it was killed."""
    own_folder = not layers["mount namespace"]
    if own_folder:
        call("mount", "none", WORK, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC,
             f"size={limits['disk']},nr_inodes={limits['files']},mode=1777")
    pid = os.fork()
    if pid == 0:
        try:
            control.close()
            os.setsid()
            give_up_everything(layers, limits)
            run_job(descriptors, judging)
        except BaseException as error:  # before the job's own code
            os.write(descriptors[1], f"E{type(error).__name__}: {error}".encode("utf-8", "replace")[:500])
        finally:
            os._exit(1)
    for descriptor in descriptors:
        os.close(descriptor)
    watched, poll = os.pidfd_open(pid), select.poll()
    poll.register(watched, select.POLLIN)
    poll.register(control, select.POLLIN)
    poll.poll()
    word = control.recv(16)  # for each job one: "end", where it is ending, or "kill"; none: the owner is gone
    poll.unregister(control)
    killed = not poll.poll(1000 if word == b"end" else 0)
    if killed:
        os.kill(pid, signal.SIGKILL)
    os.close(watched)
    _, status = os.waitpid(pid, 0)
    kill_leftovers(pid)
    if own_folder:
        call("umount2", WORK, 2)
    return -1 if killed else os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def kill_leftovers(group: int) -> None:
    """Kill all that the job has started and that still runs, and wait until it is gone.

    As pid 1 of a namespace that is everyone; elsewhere the process group, and orphans, which come to us.
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


def run_job(descriptors: list[int], judging) -> None:
    """In the program's process, all layers on: read the job, say so, run it, write what came of it."""
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
            [].extend(arm(job, verdict, judging, links))
            # Only the token's first coming counts. Without one, the iterator ended because the module raised this:
            write(verdict, json.dumps({"verdict": "fail", "error": "StopIteration"}).encode())
        os._exit(0)
    except BaseException as error:
        write(verdict, json.dumps(describe(error)).encode())


def arm(job: dict, verdict: int, judging, links: list[int]) -> map:
    """What to run, then the write of the token, as an iterator; the token is taken out of the job."""
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
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))  # never freed: an iterator would untrack itself, unasked
        found += [part for part in gc.get_referents(thing) if type(part) in hidden]
    return steps


def describe(error: BaseException) -> dict:
    """Verdict and reason of an exception, without running code of its class or arguments."""
    kind = type(error)
    plain = kind.__module__ in ("builtins", "judging") and error.args and type(error.args[0]) is str
    text = error.args[0] if plain else ""
    verdict = "oom" if isinstance(error, MemoryError) else error.verdict if kind.__module__ == "judging" else "fail"
    return {"verdict": verdict, "error": (f"{kind.__name__}: {text}" if text else kind.__name__)[:300]}


# The layers


def isolate(wanted: list[str], control: socket.socket) -> dict[str, str]:
    """Enter what namespaces there are, and try out the rest. Returns layer -> why it is absent, "" if it is on."""
    layers = {name: "" if name in wanted else "switched off" for name in (
        *(f"{name} namespace" for name in NAMESPACES), "unprivileged user", "landlock", "seccomp")}

    def attempt(layer: str, enter, *arguments) -> None:
        if not layers[layer]:
            try:
                enter(*arguments)
            except (OSError, AttributeError) as error:
                layers[layer] = str(error)

    root = os.geteuid() == 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
    attempt("user namespace", enter_user_namespace, control, root)
    attempt("pid namespace", enter_pid_namespace, control)
    if layers["pid namespace"]:
        call("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to us
    for name in ("mount", "network", "ipc", "uts"):
        attempt(f"{name} namespace", call, "unshare", NAMESPACES[name])
    attempt("mount namespace", build_root)
    if root:
        attempt("unprivileged user", probe, import_as_nobody)
    attempt("landlock", probe, lambda: restrict_files(layers, WORK))
    attempt("seccomp", probe, forbid_calls)
    call("prctl", 4, 0)  # PR_SET_DUMPABLE: not to be traced by what it forks
    return layers


def probe(attempt) -> None:
    """Try in a forked process what cannot be undone; its error is raised here."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
        except BaseException as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        reason = file.read().decode()
    os.waitpid(pid, 0)
    if reason:
        raise OSError(reason)


def enter_user_namespace(control: socket.socket, root: bool) -> None:
    user, group = os.geteuid(), os.getegid()
    call("unshare", NAMESPACES["user"])
    if root:  # only a process outside, with its capabilities, may map a second user
        control.send(b"map")
        if control.recv(16) == b"mapped":
            return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def enter_pid_namespace(control: socket.socket) -> None:
    """The one that goes on is a forked process, pid 1 of the namespace; with it the namespace and all in it end."""
    call("unshare", NAMESPACES["pid"])
    template = os.fork()
    if template:
        control.close()
        os.waitpid(template, 0)
        os._exit(0)
    call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nor does it outlive the process that the owner can kill


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def import_as_nobody() -> None:
    """Raises OSError if root cannot be given up, or if nobody cannot read this Python, as a program must."""
    become_nobody()
    os.listdir(os.path.dirname(os.__file__))


def build_root() -> None:
    """Move to a file system of its own: Python and the system's libraries, read-only, and a place for WORK."""
    call("mount", "none", "/", None, _MS_REC | _MS_PRIVATE, None)
    python = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)} | {sys.prefix, sys.base_prefix}
    sources = {}  # opened before the new root covers where some of them may be
    for path in sorted({*_SYSTEM, *python, *_DEVICES}):
        inside = any(path.startswith(f"{other}/") for other in sources if not os.path.islink(other))
        if os.path.exists(path) and not inside:
            sources[path] = os.readlink(path) if os.path.islink(path) else os.open(path, os.O_PATH | os.O_CLOEXEC)
    root = next(path for path in ("/tmp", "/mnt", "/run", "/home") if os.path.isdir(path))
    call("mount", "none", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.chdir(root)
    try:
        fill_root(sources)
        call("pivot_root", ".", ".")
    except OSError:
        os.chdir("/")
        call("umount2", root, 2)  # MNT_DETACH
        raise
    call("umount2", ".", 2)  # the old root, stacked on the new one
    os.chdir("/")
    call("mount", None, "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV, None)
    sys.path[:] = [path for path in sys.path if os.path.exists(path)]


def fill_root(sources: dict[str, str | int]) -> None:
    """Make each path below the current folder: a symbolic link, or the mounted file or folder of a descriptor."""
    for path, source in sources.items():
        target = path.lstrip("/")
        os.makedirs(os.path.dirname(target) or ".", 0o755, exist_ok=True)
        if isinstance(source, str):
            os.symlink(source, target)
            continue
        if stat.S_ISDIR(os.fstat(source).st_mode):
            os.makedirs(target, 0o755, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        call("mount", f"/proc/self/fd/{source}", target, None, _MS_BIND | _MS_REC, None)
        if path not in _DEVICES:  # mount_setattr(2), recursive: read-only, no set-user-id
            attributes = struct.pack("QQQQ", _MS_RDONLY | _MS_NOSUID, 0, 0, 0)
            call("syscall", 442, -100, target, 0x8000, attributes, len(attributes))
        os.close(source)
    os.makedirs(WORK.lstrip("/"), 0o755, exist_ok=True)


def give_up_everything(layers: dict, limits: dict) -> None:
    """In the program's process: what cannot be taken back."""
    work = limits["work"] or WORK
    os.chdir(work)
    for name, value in (("AS", limits["memory"]), ("CPU", limits["cpu"]), ("FSIZE", limits["disk"]),
                        ("NOFILE", limits["descriptors"]), ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0)):
        set_limit(getattr(resource, f"RLIMIT_{name}"), value)
    if not layers["user namespace"]:  # elsewhere the user's other processes count too
        set_limit(resource.RLIMIT_NPROC, limits["threads"])
    if os.geteuid() == 0 and not layers["unprivileged user"]:
        become_nobody()
    call("prctl", 1, signal.SIGKILL)  # again, for one that lives without the template's namespace
    call("prctl", 47, 4, 0, 0, 0)  # PR_CAP_AMBIENT, clear all
    no_new_privileges()
    call("capset", struct.pack("II", 0x20080522, 0), bytes(24))
    os.environ["TMPDIR"] = os.environ["HOME"] = work
    if not layers["landlock"]:
        restrict_files(layers, work)
    if not layers["seccomp"]:
        forbid_calls()


def set_limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def no_new_privileges() -> None:
    """What Landlock and seccomp ask for first: no set-user-id program can give back what is given up."""
    call("prctl", 38, 1, 0, 0, 0)


def restrict_files(layers: dict, work: str) -> None:
    """Landlock: write only below `work`, read only what the new root or else Python has, no TCP, no signal outside."""
    no_new_privileges()
    abi = call("syscall", 444, None, 0, 1)
    everything = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    attributes = struct.pack("QQQ", everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    attributes = attributes[:8 if abi < 4 else 16 if abi < 6 else 24]
    rules = call("syscall", 444, attributes, len(attributes), 0)
    whole = not layers["mount namespace"]
    readable = ["/"] if whole else [*_SYSTEM, *_DEVICES, sys.prefix, sys.base_prefix]
    device = write_file | read_file | (1 << 15 if abi >= 5 else 0)
    for path, rights in [*((path, execute | read_file | read_dir) for path in readable),
                         (work, everything), ("/dev/null", device)]:
        try:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            rights &= execute | read_file | device
        call("syscall", 445, rules, 1, struct.pack("=Qi", rights, folder), 0)
        os.close(folder)
    call("syscall", 446, rules, 0)
    os.close(rules)


# The filter of system calls: a list of what is forbidden, with the numbers of x86-64 and of arm64 (None: has it not).

_FORBIDDEN = {
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setsid": (112, 157), "setpgid": (109, 154), "setrlimit": (160, 164),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # the network; socketpair() stays, for event loops
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201),
    # memory that outlives or escapes the limit
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    # large or privileged parts of the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "personality": (135, 92), "vhangup": (153, 58),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "iopl": (172, None), "ioperm": (173, None)}
_SPECIAL = {"clone": (56, 220), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "clone3": (435, 435)}
_LAST = 461  # newer system calls do not exist for a program
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, name in the kernel


def forbid_calls() -> None:
    """seccomp: forbidden calls fail with EPERM, unknown ones with ENOSYS. Threads may start, processes may not."""
    if platform.machine() not in _MACHINES or sys.maxsize < 2**32:
        raise OSError(f"no table of the system calls of {platform.machine()}")
    no_new_privileges()
    column, architecture = _MACHINES[platform.machine()]
    load, equal, at_least, bits, stop = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, unknown = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    def argument(index: int) -> int:
        return 16 + 8 * index  # offset of its low half in struct seccomp_data

    number = {name: numbers[column] for name, numbers in _SPECIAL.items()}
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (stop, 0, 0, kill),
            (load, 0, 0, 0), (at_least, 0, 1, _LAST + 1), (stop, 0, 0, unknown)]
    code += [(equal, 0, 1, number["clone3"]), (stop, 0, 0, unknown)]  # the C library then takes clone
    code += [(equal, 0, 5, number["clone"]), (load, 0, 0, argument(0)), (bits, 0, 0, 0x10000),  # CLONE_THREAD
             (equal, 0, 1, 0x10000), (stop, 0, 0, allow), (stop, 0, 0, refuse)]
    for name in ("kill", "tgkill"):  # only itself: raise() and abort()
        code += [(equal, 0, 4, number[name]), (load, 0, 0, argument(0)), (equal, 0, 1, os.getpid()),
                 (stop, 0, 0, allow), (stop, 0, 0, refuse)]
    code += [(equal, 0, 6, number["prlimit64"]), (load, 0, 0, argument(2)), (equal, 0, 3, 0),
             (load, 0, 0, argument(2) + 4), (equal, 0, 1, 0), (stop, 0, 0, allow), (stop, 0, 0, refuse)]
    for numbers in _FORBIDDEN.values():
        if numbers[column] is not None:
            code += [(equal, 0, 1, numbers[column]), (stop, 0, 0, refuse)]
    code.append((stop, 0, 0, allow))
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    call("prctl", 22, 2, struct.pack("HxxxxxxQ", len(code), ctypes.addressof(text)), 0, 0)  # PR_SET_SECCOMP, filter


if __name__ == "__main__":
    main()
