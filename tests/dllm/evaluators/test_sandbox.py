"""The sandbox: the right verdict for every program, nothing outside touched, nothing left, layers or not."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from dllm.errors import Failure
from dllm.evaluators.sandbox import host as sandbox_module
from dllm.evaluators.sandbox.host import LAYERS, PROTECTS, Limits, Outcome, Sandbox
from tests.dllm.evaluators.programs import ADD, PROGRAMS, TESTS, fill

ROOT = Path(__file__).parents[3]
NAMESPACES = tuple(layer for layer in LAYERS if "namespace" in layer)
SECRET = "word-that-nobody-may-read"
# Small enough to be reached in time, large enough for numpy.
LIMITS = Limits(memory=1 << 30, disk=8 << 20, files=200)
SECONDS = {"timeout": 0.25}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """The targets of the attacks, and `touched()`, which lists those that they reached."""
    folder = tmp_path_factory.mktemp("outside")
    os.chmod(folder, 0o777)
    canary = folder / "canary"
    canary.write_text("alive")
    os.chmod(canary, 0o666)
    listeners = {"tcp": socket.create_server(("127.0.0.1", 0)), "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
                 "unix": socket.socket(socket.AF_UNIX), "abstract": socket.socket(socket.AF_UNIX)}
    port = listeners["tcp"].getsockname()[1]
    listeners["udp"].bind(("127.0.0.1", port))
    listeners["unix"].bind(str(folder / "socket"))
    os.chmod(folder / "socket", 0o777)
    listeners["abstract"].bind("\0" + str(folder / "socket"))
    for name, listener in listeners.items():
        listener.setblocking(False)
        if name in ("unix", "abstract"):
            listener.listen()

    def touched() -> list[str]:
        found = [] if canary.is_file() and canary.read_text() == "alive" else ["canary"]
        for name, listener in listeners.items():
            try:
                listener.recv(1) if name == "udp" else listener.accept()
                found.append(name)
            except BlockingIOError:
                pass
        return found

    before, os.environ["SECRET"] = os.environ.get("SECRET"), SECRET
    yield {"places": {"canary": str(canary), "port": port, "socket": str(folder / "socket"), "secret": SECRET,
                      "pid": os.getpid()}, "touched": touched}
    for listener in listeners.values():
        listener.close()
    del os.environ["SECRET"]
    assert before is None


@pytest.fixture(scope="module")
def full():
    with Sandbox(limits=LIMITS) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def judges():
    with Sandbox(limits=LIMITS) as sandbox:
        yield sandbox


def need(sandbox: Sandbox, *layers: str) -> None:
    absent = {layer: reason for layer, reason in sandbox.missing.items() if layer in layers}
    if absent:
        pytest.skip(f"this machine has no {absent}")


def run(sandbox: Sandbox, name: str, places: dict, tests: str = TESTS) -> Outcome:
    program = PROGRAMS[name]
    return sandbox.run(fill(program.text, **places) + tests, SECONDS.get(program.verdict, 4))


def fits(verdict: str, wanted: str) -> bool:
    return wanted == "any" or (verdict != "pass" if wanted == "not pass" else verdict == wanted)


def processes() -> dict[int, str]:
    """Processes of the sandbox, by pid: their command lines."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                command = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "isolation.py" in command:
                found[int(entry)] = command
    return found


def left_behind() -> dict[str, set]:
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:] if Path("/proc/sysvipc/shm").exists() else []
    return {"processes": {pid for pid in processes() if is_below(pid, os.getpid())},
            "folders": {path.name for path in Path("/tmp").glob("dllm-sandbox-*")},
            "shared memory": {path.name for path in Path("/dev/shm").glob("*dllm*")},
            "segments": {segment for segment in segments if " 4711 " in segment},
            "mounts": set(Path("/proc/self/mountinfo").read_text().splitlines()),
            "descriptors": {str(len(os.listdir("/proc/self/fd")))}}


def is_below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_verdict_of_each_program_and_nothing_outside_touched(name, full, outside):
    need(full, *LAYERS)
    outcome = run(full, name, outside["places"])
    assert fits(outcome.verdict, PROGRAMS[name].verdict), outcome
    assert outside["touched"]() == []
    assert full.run(ADD + TESTS, 4).passed  # the next program meets a clean sandbox


@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items() if program.verdict in ("pass", "any")])
def test_audit_passes_what_gives_right_values_and_nothing_else(name, full, judges, outside):
    work = {"solution": ADD, "names": ["add"], "tests": TESTS}
    outcome = full.judged(judges, fill(PROGRAMS[name].text, **outside["places"]), work, 8)
    assert fits(outcome.verdict, PROGRAMS[name].audit), outcome
    assert outside["touched"]() == []


@pytest.mark.parametrize("name", ["exit0", "os_exit0", "os_exit0_import", "segv", "loop", "mem_bomb", "print_pass",
                                  "fd_flood", "frames", "raise", "wrong", "recursion"])
def test_a_judge_is_not_deceived_by_a_program_that_ends_or_talks(name, full, judges):
    work = {"solution": ADD, "names": ["add"], "tests": TESTS}
    assert not full.judged(judges, PROGRAMS[name].text, work, 1).passed


def test_a_judge_says_what_it_cannot_judge(full, judges):
    work = {"solution": "class Pair:\n    pass\ndef add(a, b):\n    return 0", "names": ["add"],
            "tests": "\nassert add(Pair(), Pair()) == 0"}
    outcome = full.judged(judges, "def add(a, b): return 0", work, 5)
    assert (outcome.verdict, outcome.error) == ("cannot judge", "CannotJudge: add is called with more than plain data")


# Time


@contextmanager
def one_busy_core(burners: int = 3):
    """Processes started inside share one core with others that never rest; each has a session, and so a share."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    code = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    running = [subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True) for _ in range(burners)]
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        for process in running:
            process.kill()
            process.wait()


def timed(sandbox: Sandbox, program: str, limit: float) -> tuple[Outcome, float]:
    start = time.monotonic()
    return sandbox.run(program, limit), time.monotonic() - start


@pytest.mark.slow
def test_a_program_on_a_busy_machine_is_judged_by_its_cpu_time(monkeypatch):
    monkeypatch.setattr(sandbox_module, "BACKSTOP", 100)  # the machine may have other load
    with one_busy_core(), Sandbox() as sandbox:
        outcome, wall = timed(sandbox, "import time\nwhile time.process_time() < 0.25: pass\n" + ADD + TESTS, 0.4)
    assert outcome.passed and 0.25 <= outcome.seconds <= 0.4 < wall, (outcome, wall)


@pytest.mark.parametrize("burn", [
    "while True: pass", "import threading\ndef f():\n    while True: pass\n"
    "for _ in range(4): threading.Thread(target=f).start()\nf()"], ids=["one thread", "five threads"])
def test_a_busy_loop_times_out_at_its_cpu_seconds(burn, full):
    outcome = full.run(burn, 0.2)
    assert (outcome.verdict, outcome.error) == ("timeout", "not done in 0.2 s of CPU time")
    assert 0.2 <= outcome.seconds < 1


def test_what_ends_after_its_limit_is_a_timeout_whatever_it_says(full):
    burn = "import time\nwhile time.process_time() < 0.1: pass\n"
    for end in ("", "raise ValueError", "import os; os._exit(0)", "x = bytearray(10**12)"):
        job = full._start({"kind": "script", "program": burn + end}, [], 10)  # as if nothing had stopped it in time
        assert full._finish(job, 0.05).error == "not done in 0.05 s of CPU time"


def test_a_sleeper_times_out_at_the_backstop(full):
    outcome, wall = timed(full, "import time\ntime.sleep(100)", 0.1)
    assert (outcome.verdict, outcome.error) == ("timeout", "not done in 0.6 s of wall-clock time")
    assert outcome.seconds < 0.1 and 0.6 <= wall < 10


_BURN = "t = time.process_time()\n    while time.process_time() - t < {}: pass\n    os._exit(0)\n"


@pytest.mark.slow
@pytest.mark.parametrize("program", [
    f"if os.fork() == 0:\n    {_BURN.format(0.3)}os.wait()",
    f"for _ in range(3):\n  if os.fork() == 0:\n    {_BURN.format(0.1)}for _ in range(3): os.wait()",
    f"if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n    {_BURN.format(100)}time.sleep(100)",
    f"if os.fork() == 0:\n    {_BURN.format(100)}os.wait()",
], ids=["child", "children", "orphan", "endless child"])
@pytest.mark.parametrize("layers", [tuple(layer for layer in LAYERS if layer != "seccomp"), ()],
                         ids=["no seccomp", "no layer"])
def test_the_cpu_time_of_children_counts(program, layers):
    """Only without seccomp may a program start processes."""
    before = left_behind()
    with Sandbox(layers, LIMITS) as sandbox:
        need(sandbox, *layers)
        outcome = sandbox.run("import os, time\n" + program, 0.2)
        assert (outcome.verdict, outcome.error) == ("timeout", "not done in 0.2 s of CPU time"), outcome
    assert left_behind() == before


def test_a_judge_charges_the_program_and_not_itself(full, judges):
    work = {"solution": ADD, "names": ["add"], "tests": TESTS}
    burn = "import time\nwhile time.process_time() < {}: pass\n" + ADD
    assert full.judged(judges, burn.format(0.1), work, 5).seconds >= 0.1
    outcome = full.judged(judges, burn.format(100), work, 0.2)
    assert (outcome.verdict, outcome.error) == ("timeout", "not done in 0.2 s of CPU time")


def test_a_program_cannot_answer_for_the_clock(full, judges):
    """It holds one socket, the link to the judge."""
    text = ("import os, stat\ndef is_socket(fd):\n    try: return stat.S_ISSOCK(os.fstat(fd).st_mode)\n"
            "    except OSError: return False\nassert sum(map(is_socket, range(64))) == 1\n" + ADD)
    assert full.judged(judges, text, {"solution": ADD, "names": ["add"], "tests": TESTS}, 5).passed


_IMPORTS_NUMPY = "import numpy\ndef add(a, b):\n    return numpy.add(a, b) if a < 10**9 else a + b\n"


def test_numpy_runs_in_the_sandbox(full, judges):
    pytest.importorskip("numpy")
    assert full.run(_IMPORTS_NUMPY + TESTS, 20).passed
    assert full.judged(judges, _IMPORTS_NUMPY, {"solution": ADD, "names": ["add"], "tests": TESTS}, 20).passed


# Fewer layers


@pytest.mark.slow
@pytest.mark.parametrize("layers", [("landlock", "seccomp"), NAMESPACES, ("seccomp",), ()],
                         ids=["no namespaces", "namespaces alone", "seccomp alone", "limits alone"])
def test_fewer_layers_judge_the_same_and_leave_nothing(layers, outside):
    before = left_behind()
    with Sandbox(layers, LIMITS) as sandbox:
        need(sandbox, *layers)
        assert set(sandbox.missing) == set(LAYERS) - set(layers) and set(sandbox.missing.values()) == {"switched off"}
        for name in ("ok", "wrong", "exit0", "os_exit0", "loop", "mem_bomb", "orphan", "frames", "cleanup_blocker",
                     "env_leak", "ok_tempfile", "segv"):
            outcome = run(sandbox, name, outside["places"])
            assert fits(outcome.verdict, PROGRAMS[name].verdict), (name, outcome)
        assert outside["touched"]() == []
    assert left_behind() == before


def test_without_namespaces_landlock_and_seccomp_hold(outside):
    with Sandbox(("landlock", "seccomp", "unprivileged user"), LIMITS) as sandbox:
        need(sandbox, "landlock", "seccomp")
        for name in ("delete_file", "truncate_file", "symlink_escape", "rmtree", "read_file", "proc_mem", "kill_all",
                     "ptrace_parent", "net_tcp", "net_udp", "net_unix", "net_abstract", "shared_memory", "fork_bomb"):
            outcome = run(sandbox, name, outside["places"])
            assert fits(outcome.verdict, PROGRAMS[name].verdict), (name, outcome)
    assert outside["touched"]() == []


def test_namespaces_alone_keep_files_network_and_processes(outside):
    with Sandbox((*NAMESPACES, "unprivileged user"), LIMITS) as sandbox:
        need(sandbox, *NAMESPACES)
        for name in ("delete_file", "truncate_file", "symlink_escape", "rmtree", "read_file", "kill_all", "kill_parent",
                     "ptrace_parent", "net_tcp", "net_udp", "net_unix", "net_abstract", "orphan", "disk_fill",
                     "many_files", "fork_bomb"):
            outcome = run(sandbox, name, outside["places"])
            assert fits(outcome.verdict, PROGRAMS[name].verdict), (name, outcome)
        assert sandbox.run(ADD + TESTS, 4).passed
    assert outside["touched"]() == []


def test_every_layer_says_what_is_lost_without_it(full):
    assert list(full.layers) and set(full.layers) == set(PROTECTS) == set(LAYERS)


# Root and ordinary users, many at once, and leftovers


def find_python() -> str:
    """A Python that nobody can run."""
    for path in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        if path is None:
            continue
        try:
            code = "import sys; print(sys.version_info >= (3, 11))"
            done = subprocess.run([path, "-c", code], user=65534, group=65534, extra_groups=[], capture_output=True,
                                  text=True, cwd="/")
        except PermissionError:
            continue
        if done.stdout.strip() == "True":
            return path
    pytest.skip("there is no Python 3.11 or newer that an ordinary user may run")


_SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from dllm.evaluators.sandbox.host import *
request = json.load(sys.stdin)
with Sandbox(limits=Limits(memory=1 << 30, disk=8 << 20, files=200)) as sandbox, Sandbox() as judges:
    verdicts = {name: sandbox.run(text, seconds).verdict for name, (text, seconds) in request["programs"].items()}
    verdicts["audit"] = sandbox.judged(judges, *request["audit"], 8).verdict
    print(json.dumps([sandbox.layers, verdicts]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; all other tests run as one")
def test_the_same_as_an_ordinary_user(outside):
    python = find_python()
    if not os.access(ROOT, os.X_OK):
        pytest.skip("this checkout cannot be read by others")
    before = left_behind()
    programs = {name: (fill(program.text, **outside["places"]) + TESTS, SECONDS.get(program.verdict, 4))
                for name, program in PROGRAMS.items()}
    audit = PROGRAMS["always_eq"].text, {"solution": ADD, "names": ["add"], "tests": TESTS}
    done = subprocess.run([python, "-c", _SCRIPT, str(ROOT)], user=65534, group=65534, extra_groups=[], cwd="/",
                          input=json.dumps({"programs": programs, "audit": audit}), capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "SECRET": SECRET})
    assert done.returncode == 0, done.stderr
    layers, verdicts = json.loads(done.stdout)
    if any(layers.values()):
        pytest.skip(f"an ordinary user lacks {layers}")
    assert verdicts.pop("audit") == "fail"
    wrong = {name: verdict for name, verdict in verdicts.items() if not fits(verdict, PROGRAMS[name].verdict)}
    assert wrong == {} and len(verdicts) == len(PROGRAMS)
    assert outside["touched"]() == [] and left_behind() == before


@pytest.mark.slow
def test_concurrent_sandboxes_judge_the_same_and_leave_nothing(outside):
    before = left_behind()
    names = [name for name, program in PROGRAMS.items() if program.verdict != "timeout" and name != "stdout_flood"]

    def judge(part: list[str]) -> list[tuple[str, Outcome]]:
        with Sandbox(limits=LIMITS) as sandbox:
            need(sandbox, *LAYERS)
            return [(name, run(sandbox, name, outside["places"])) for name in part]

    with ThreadPoolExecutor(3) as pool:
        results = sum(pool.map(judge, [names[i::3] for i in range(3)]), [])
    assert [(name, outcome) for name, outcome in results if not fits(outcome.verdict, PROGRAMS[name].verdict)] == []
    assert outside["touched"]() == [] and left_behind() == before


def test_nothing_is_left_when_the_owner_is_killed(tmp_path):
    code = ("import sys\nsys.path.insert(0, sys.argv[1])\nfrom dllm.evaluators.sandbox.host import Sandbox\n"
            "with Sandbox() as sandbox:\n    print('started', flush=True)\n    sandbox.run('while True: pass', 100)\n")
    owner = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"started\n"
    time.sleep(0.3)
    started = {pid for pid in processes() if is_below(pid, owner.pid)}
    assert len(started) >= 2  # the template and the program, at least
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 10
    while started & set(processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started & set(processes()) == set()


def test_a_template_that_is_killed_is_a_failure_and_not_a_verdict():
    with Sandbox() as sandbox:
        threading.Timer(0.5, sandbox._process.kill).start()
        with pytest.raises(Failure, match="template"):
            sandbox.run("while True: pass", 20)
        with pytest.raises(Failure, match="template"):
            sandbox.run(ADD, 20)


def test_a_template_that_dies_with_words_unread_is_a_failure_too():
    """The system then resets the connection instead of closing it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(b"unread")
    theirs.close()
    sandbox = Sandbox.__new__(Sandbox)
    sandbox._control = ours
    with ours, pytest.raises(Failure, match="template ended"):
        sandbox._receive(1)


def test_a_template_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(sandbox_module.sys, "executable", shutil.which("false"))
    with pytest.raises(Failure, match="the sandbox cannot start"):
        Sandbox()


def test_programs_of_one_sandbox_do_not_meet(full):
    need(full, *LAYERS)
    assert full.run("open('left', 'w').close()\nimport math\nmath.pi = 3", 4).passed
    assert full.run("import math, os\nassert os.listdir('.') == [] and math.pi > 3.1", 4).passed


def test_the_same_program_meets_the_same_randomness_and_set_order(full):
    text = "import random\nassert [random.random(), list({'a', 'b', 'c', 'd', 'e', 'f'})] == "
    values = []
    for _ in range(2):
        with Sandbox() as sandbox:
            program = text + "None, str([random.random(), list({'a', 'b', 'c', 'd', 'e', 'f'})])"
            values.append(sandbox.run(program, 4).error)
    assert values[0] == values[1] and "[0." in values[0]


def test_the_error_is_told_in_one_line(full):
    assert full.run("raise ValueError('x' * 1000)", 4).error == "ValueError: " + "x" * 288
    assert full.run("assert 1 == 2", 4).error == "AssertionError"
    assert full.run("import os; os._exit(3)", 4).error == "the process ended by itself, with exit code 3"
    assert full.run("import ctypes; ctypes.string_at(0)", 4).error == "the process was ended by SIGSEGV"


def test_a_python_in_the_temporary_folder(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    code = ("import sys\nsys.path.insert(0, sys.argv[1])\nfrom dllm.evaluators.sandbox.host import Sandbox\n"
            "with Sandbox() as sandbox:\n"
            "    assert sandbox.run('import csv, tempfile, sys\\ntempfile.TemporaryFile()', 10).passed\n")
    subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", code, str(ROOT)], check=True)


def test_a_root_that_cannot_be_built_costs_one_layer_only(full, tmp_path):
    """As in a container that forbids pivot_root: the folder of a program is then one that the owner made."""
    need(full, *LAYERS)
    folder = tmp_path / "evaluators"
    shutil.copytree(Path(sandbox_module.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    layers = (folder / "confinement.py").read_text()
    assert 'call("pivot_root", ".", ".")' in layers
    (folder / "confinement.py").write_text(layers.replace('call("pivot_root", ".", ".")', 'raise OSError("forbidden")'))
    code = ("import sys\nsys.path.insert(0, sys.argv[1])\nfrom dllm.evaluators.sandbox import host as sandbox\n"
            "sandbox.__file__ = sys.argv[2]\nwith sandbox.Sandbox() as box:\n"
            "    assert box.missing.pop('mount namespace') == 'forbidden'\n"
            "    assert set(box.missing) <= {'mount namespace', 'unprivileged user'}, box.missing  # Python in /root\n"
            "    assert box.run('open(\"x\", \"w\").close()', 10).passed\n")
    subprocess.run([sys.executable, "-c", code, str(ROOT), str(folder / "host.py")], check=True)


@pytest.mark.slow
def test_remove_folder_also_where_nobody_may_read(tmp_path):
    inner = tmp_path / "folder" / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "file").write_text("x")
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    inner.chmod(0)
    inner.parent.chmod(0)
    sandbox_module.remove_folder(str(tmp_path / "folder"))
    assert list(tmp_path.iterdir()) == []
