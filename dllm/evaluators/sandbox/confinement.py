"""The layers around a program: namespaces, a root of its own, limits, Landlock, seccomp. Standard library only.

`isolate` enters, in the template, the layers that all jobs share; `give_up_everything` limits the process of one job
for good. isolation.py loads this file by its path.
"""

import ctypes
import errno
import math
import os
import platform
import resource
import signal
import socket
import stat
import struct
import sys

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

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments):
    """Call a function of the C library. Raises: OSError if it returns -1."""
    result = getattr(libc, name)(*(ctypes.c_char_p(os.fsencode(a)) if isinstance(a, str) else
                                   ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def isolate(wanted: list[str], control: socket.socket) -> dict[str, str]:
    """Enter the available namespaces, and try the other layers. Returns layer -> reason of absence, "" if active."""
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
        call("prctl", 36, 1)  # PR_SET_CHILD_SUBREAPER: we become the parent of orphans
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
    """Try something irreversible in a forked process; its error is raised here."""
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
    """Continue in a forked process, pid 1 of the namespace; its end ends every process in the namespace."""
    call("unshare", NAMESPACES["pid"])
    template = os.fork()
    if template:
        control.close()
        os.waitpid(template, 0)
        os._exit(0)
    call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the process that the owner can kill


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def import_as_nobody() -> None:
    """Raises: OSError if root cannot be given up, or nobody cannot read this Python, which a program must."""
    become_nobody()
    os.listdir(os.path.dirname(os.__file__))


def build_root() -> None:
    """Move to a new root: Python and the libraries of the system, read-only, and a place for WORK."""
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
    """Create each path below the current folder: a symbolic link, or a mount of the file or folder of a descriptor."""
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


def mount_work(limits: dict) -> None:
    """An empty folder of limited size at WORK, for one job."""
    call("mount", "none", WORK, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC,
         f"size={limits['disk']},nr_inodes={limits['files']},mode=1777")


def unmount_work() -> None:
    call("umount2", WORK, 2)


def give_up_everything(layers: dict, limits: dict) -> None:
    """In the process of a program: irreversible limits."""
    work = limits["work"] or WORK
    os.chdir(work)
    for name, value in (("AS", limits["memory"]), ("CPU", math.ceil(limits["cpu"]) + 1), ("FSIZE", limits["disk"]),
                        ("NOFILE", limits["descriptors"]), ("CORE", 0), ("MEMLOCK", 0), ("MSGQUEUE", 0)):
        set_limit(getattr(resource, f"RLIMIT_{name}"), value)
    if not layers["user namespace"]:  # otherwise all processes of the user count
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
    """A condition of Landlock and seccomp: no set-user-id program can restore privileges."""
    call("prctl", 38, 1, 0, 0, 0)


def restrict_files(layers: dict, work: str) -> None:
    """Landlock: write only below `work`, read only the new root, or else Python; no TCP, no signals to others."""
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


# The system calls that the filter forbids: their numbers on x86-64 and on arm64 (None: arm64 has no such call).

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
