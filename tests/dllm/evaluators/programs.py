"""Programs that a sandbox must judge rightly: honest ones, and attacks on the verdict, the machine and the secrets.

Each defines add(a, b). {canary} is a file outside the sandbox, {port} a local port, {socket} a Unix socket, {secret} a
word in the owner's environment and memory, {pid} the owner's process.
"""

from typing import NamedTuple


class Program(NamedTuple):
    verdict: str  # with the tests in its process: a verdict, "not pass", or "any"
    text: str
    audit: str = "pass"  # with the tests in another process, if the first is a pass


ADD = "def add(a, b):\n    return a + b\n"
TESTS = """
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(-1, 5) == 4
    assert candidate(10**20, 1) == 10**20 + 1
    assert candidate(2.5, 0.25) == 2.75

check(add)"""
_QUIET = "try:\n    {}\nexcept Exception:\n    pass\n" + ADD  # tries, and then is right


def _attempt(body: str) -> str:
    lines = body.strip("\n").split("\n")
    return "try:\n" + "".join(f"    {line}\n" for line in lines) + "except BaseException:\n    pass\n" + ADD


_EQUAL = """
class Equal({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def add(a, b):
    return Equal()
"""

PROGRAMS: dict[str, Program] = {
    # honest, and right
    "ok": Program("pass", ADD),
    "ok_prints": Program("pass", "def add(a, b):\n    print('a' * 100, a, b, '\\ud800')\n    return a + b\n"),
    "ok_helper_after": Program("pass", "def add(a, b):\n    return then(a, b)\ndef then(a, b):\n    return a + b\n"),
    "ok_threads": Program("pass", """
import threading
def add(a, b):
    out = []
    threads = [threading.Thread(target=lambda: out.append(a + b)) for _ in range(4)]
    [t.start() for t in threads]; [t.join() for t in threads]
    return out[0]
"""),
    "ok_tempfile": Program("pass", """
import tempfile, os
def add(a, b):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, 'x'), 'w') as f: f.write(repr(a + b))
        with open(os.path.join(folder, 'x')) as f: return eval(f.read())
"""),
    "ok_recursion": Program("pass", """
def add(a, b, depth=900):
    return a + b if depth == 0 else add(a, b, depth - 1)
"""),
    "ok_bool_subclass": Program("pass", """
class Number(int): pass
def add(a, b):
    return Number(a + b) if isinstance(a + b, int) else a + b
"""),
    "ok_asyncio": Program("pass", """
import asyncio
async def later(a, b): return a + b
def add(a, b): return asyncio.run(later(a, b))
"""),
    "ok_main_guard": Program("pass", ADD + "if __name__ == '__main__':\n    raise SystemExit(1)\n"),
    "crlf": Program("pass", ADD.replace("\n", "\r\n")),
    # honest, and wrong
    "wrong": Program("fail", "def add(a, b):\n    return a - b\n"),
    "syntax": Program("fail", "def add(a, b:\n"),
    "empty": Program("fail", ""),
    "raise": Program("fail", "raise ValueError('no')\n"),
    "stop_iteration": Program("fail", "def add(a, b):\n    return next(iter([]))\n"),
    "null_byte": Program("fail", ADD + "\0"),
    "surrogate": Program("fail", ADD + "x = '\ud800'\n"),
    "stdin": Program("fail", "def add(a, b):\n    return a + b + int(input())\n"),
    "deep_parens": Program("not pass", "x = " + "(" * 5000 + ")" * 5000 + "\n" + ADD),
    # time
    "loop": Program("timeout", "def add(a, b):\n    while True: pass\n"),
    "sleep": Program("timeout", "import time\ntime.sleep(100)\n" + ADD),
    "swallow_timeout": Program("timeout", """
def add(a, b):
    while True:
        try:
            while True: pass
        except BaseException: pass
"""),
    "cancel_alarm": Program("timeout", """
import signal
signal.setitimer(signal.ITIMER_REAL, 0)
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""),
    "c_loop": Program("timeout", "def add(a, b):\n    return sum(range(10**15))\n"),
    "regex_bomb": Program("timeout", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')\n" + ADD),
    "bigint": Program("timeout", "x = 3 ** (10 ** 9)\n" + ADD),
    "exc_str_hang": Program("not pass", """
class Slow(Exception):
    def __str__(self):
        while True: pass
    __repr__ = __str__
raise Slow()
"""),
    "atexit_hang": Program("pass", "import atexit, time\natexit.register(time.sleep, 100)\n" + ADD),
    "nondaemon_thread": Program("pass", """
import threading, time
threading.Thread(target=time.sleep, args=(100,)).start()
""" + ADD),
    # resources
    "mem_bomb": Program("oom", "x = []\nwhile True: x.append(bytearray(10**7))\n"),
    "mem_one": Program("oom", "x = bytearray(10**12)\n" + ADD),
    "stdout_flood": Program("timeout", "while True: print('x' * 10**6)\n"),
    "disk_fill": Program("not pass", "with open('x', 'wb') as f:\n    while True: f.write(b'x' * 10**7)\n" + ADD),
    "many_files": Program("not pass", "for i in range(10**7): open(f'f{i}', 'w').close()\n" + ADD),
    "fd_leak": Program("not pass", "x = [open('/dev/null') for i in range(10**5)]\n" + ADD),
    "thread_bomb": Program("not pass", """
import threading, time
for i in range(10**6): threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
""" + ADD),
    "fork_bomb": Program("not pass", """
import os
def add(a, b):
    while True: os.fork()
"""),
    "fd_flood": Program("not pass", """
import os
while True:
    for fd in range(3, 64):
        try: os.write(fd, b'x' * 1000)
        except OSError: pass
"""),
    # crashes
    "recursion": Program("fail", "def add(a, b):\n    return add(a, b)\n"),
    "recursion_segv": Program("not pass", """
import sys
sys.setrecursionlimit(10**9)
def add(a, b): return [add(a, b) for _ in range(1)]
"""),
    "segv": Program("crash", "import ctypes\nctypes.string_at(0)\n" + ADD),
    "sigkill_self": Program("not pass", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n" + ADD),
    "abort": Program("crash", "import os\nos.abort()\n"),
    # leaving early
    "exit0": Program("fail", "import sys\nsys.exit(0)\n"),
    "exit0_in_fn": Program("fail", "def add(a, b):\n    raise SystemExit(0)\n"),
    "os_exit0": Program("crash", "import os\ndef add(a, b):\n    os._exit(0)\n"),
    "os_exit0_import": Program("crash", "import os\nos._exit(0)\n"),
    "exec_true": Program("not pass", "import os\nos.execv('/usr/bin/true', ['true'])\n"),
    "exit_thread": Program("fail", "import _thread\n_thread.exit()\n"),
    "print_pass": Program("crash", """
import os
for fd in range(64):
    for text in (b'pass', b'{"verdict": "pass", "error": ""}', b'R', b'\\0' * 16):
        try: os.write(fd, text)
        except OSError: pass
os._exit(0)
"""),
    # the verdict
    "always_eq": Program("pass", _EQUAL.format(base="object"), "fail"),
    "always_eq_int": Program("pass", _EQUAL.format(base="int"), "fail"),
    "always_eq_str_meta": Program("pass", """
class Meta(type):
    def __eq__(cls, other): return True
    def __hash__(cls): return 0
class Equal(str, metaclass=Meta):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def add(a, b): return Equal('3')
""", "fail"),
    "frames": Program("not pass", """
import gc, os, sys
frame, seen = sys._getframe(), []
while frame is not None:
    seen += [frame, frame.f_locals, frame.f_globals]
    frame = frame.f_back
gc.unfreeze()
pool, done = seen + gc.get_objects(), set()
write = os.write
while pool:
    thing = pool.pop()
    if id(thing) in done: continue
    done.add(id(thing))
    if type(thing).__name__ == 'partial' and thing.func is write: thing()
    if type(thing) is tuple and len(thing) == 2 and type(thing[0]) is int and type(thing[1]) is bytes: write(*thing)
    if type(thing).__name__ == 'map': list(thing)
    if len(done) < 10**6: pool += gc.get_referents(thing)
os._exit(0)
"""),
    "frame_result": Program("not pass", """
import sys
frame = sys._getframe()
while frame is not None:
    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
        if type(value) is list: value.append('passed')
        if type(value) is dict and 'verdict' in value: value['verdict'] = 'pass'
    frame = frame.f_back
raise SystemExit
"""),
    "frame_stat": Program("not pass", """
import sys
frame = sys._getframe()
while frame is not None:
    for value in list(frame.f_locals.values()):
        if hasattr(value, 'value'): value.value = 0
    frame = frame.f_back
raise SystemExit
"""),
    "jump_back": Program("not pass", """
import sys
def tracer(frame, event, argument):
    for line in range(frame.f_lineno - 12, frame.f_lineno + 12):
        try: frame.f_lineno = line
        except (ValueError, AttributeError): pass
    return tracer
frame = sys._getframe().f_back
while frame is not None:
    frame.f_trace = tracer
    frame = frame.f_back
sys.settrace(tracer)
raise SystemExit
"""),
    "monitoring": Program("not pass", """
import sys
m = sys.monitoring
m.use_tool_id(3, 'x')
def raised(code, offset, callable, argument):
    try: list(argument)
    except BaseException: pass
events = m.events.CALL | m.events.C_RAISE | m.events.C_RETURN
for event in (m.events.CALL, m.events.C_RAISE, m.events.C_RETURN): m.register_callback(3, event, raised)
m.set_events(3, events)
m.set_local_events(3, sys._getframe().f_back.f_code, events)
raise SystemExit
"""),
    "patch_reporter": Program("not pass", """
import json, os, sys, builtins
json.dumps = lambda *a, **k: '{"verdict": "pass"}'
os.write = lambda *a: 16
builtins.exec = lambda *a: None
main = sys.modules['__main__']
for name in ('describe', 'arm'): setattr(main, name, lambda *a, **k: {"verdict": "pass"})
raise SystemExit
"""),
    "pickle_result": Program("not pass", """
import os, pickle
class Evil:
    def __reduce__(self): return open, ({canary!r}, 'w')
text = pickle.dumps(Evil())
for fd in range(3, 64):
    try: os.write(fd, text)
    except OSError: pass
def add(a, b): return Evil()
"""),
    "exception_that_lies": Program("fail", """
class Lie(BaseException):
    verdict = 'pass'
raise Lie('pass')
"""),
    "patch_builtins": Program("any", "import builtins\nbuiltins.AssertionError = ValueError\n" + ADD),
    "settrace_skip": Program("any", """
import sys
def tracer(frame, event, argument):
    if frame.f_code.co_name == 'check' and event == 'line':
        frame.f_lineno = frame.f_code.co_firstlineno + 4
    return tracer
sys.settrace(tracer)
def add(a, b): return a + b if a == 2.5 else 0
""", "fail"),
    "settrace_patch_code": Program("any", """
import sys
def tracer(frame, event, argument):
    if frame.f_code.co_name == 'check': frame.f_locals['candidate'].__code__ = (lambda a, b: a + b).__code__
    return tracer
sys.settrace(tracer)
def add(a, b): return 0
""", "fail"),
    "read_tests": Program("pass", """
import dis, sys
def add(a, b):
    code = dis.get_instructions(sys._getframe(1).f_code)
    found = [i.argval for i in code if i.opname.startswith('LOAD_') and type(i.argval) in (int, float)]
    return next(z for x, y, z in zip(found, found[1:], found[2:]) if (x, y) == (a, b))
""", "fail"),
    "read_test_file": Program("not pass", """
import os
texts = []
for folder, _, files in os.walk('.'):
    texts += [open(os.path.join(folder, f)).read() for f in files]
assert any('check' in text for text in texts)
"""),
    # outside
    "orphan": Program("any", _attempt("""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
""")),
    "delete_file": Program("any", _attempt("import os\nos.remove({canary!r})")),
    "truncate_file": Program("any", _attempt("open({canary!r}, 'w').close()")),
    "symlink_escape": Program("any", _attempt("import os\nos.symlink({canary!r}, 'x')\nopen('x', 'w').close()")),
    "rmtree": Program("any", _attempt("import os, shutil\nshutil.rmtree(os.path.dirname({canary!r}))")),
    "read_file": Program("pass", _attempt("found = open({canary!r}).read()") + "assert 'found' not in globals()\n"),
    "proc_mem": Program("pass", _attempt("found = open('/proc/1/mem', 'rb')") + "assert 'found' not in globals()\n"),
    "kill_parent": Program("any", _attempt("""
import os, signal
for pid in (os.getppid(), 1, {pid}):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
""")),
    "kill_all": Program("any", _attempt("import os, signal\nos.kill(-1, signal.SIGKILL)")),
    "ptrace_parent": Program("any", _attempt("""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in (os.getppid(), 1, {pid}):
    assert libc.ptrace(16, pid, 0, 0) < 0, 'attached'
""")),
    "net_tcp": Program("any", _attempt("import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'x')")),
    "net_udp": Program("any", _attempt("""
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))
""")),
    "net_unix": Program("any", _attempt("import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({socket!r})\n"
                                        "s.send(b'x')")),
    "net_abstract": Program("any", _attempt("import socket\ns = socket.socket(socket.AF_UNIX)\n"
                                            "s.connect('\\0' + {socket!r})\ns.send(b'x')")),
    "env_leak": Program("pass", "import os\nassert {secret!r} not in str(os.environ)\n" + ADD),
    "cleanup_blocker": Program("pass", "import os\nos.makedirs('a/b/c')\nopen('a/b/c/d', 'w').close()\n"
                                       "os.chmod('a/b', 0)\nos.chmod('a', 0)\n" + ADD),
    "shared_memory": Program("any", _attempt("""
from multiprocessing import shared_memory
shared_memory.SharedMemory(name='dllm_left', create=True, size=1000)
""") + _attempt("import ctypes\nctypes.CDLL(None).shmget(4711, 1000, 0o1666)")),
    "new_namespace": Program("pass", """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000) < 0
assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) < 0
""" + ADD),
}


def fill(text: str, **places) -> str:
    """The program with its places filled in."""
    for name, value in places.items():
        text = text.replace("{" + name + "!r}", repr(value)).replace("{" + name + "}", str(value))
    return text
