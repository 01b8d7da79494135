"""python benchmarks/reference_executor.py TASKS.jsonl.gz SAMPLES.jsonl WORKERS: the usual executor of HumanEval.

Forks two processes for each sample, a manager for the result and one for the program, with a timer of 3 s, discarded
output, a temporary folder, and harmful functions set to None. Prints the number of samples that pass.
"""

import builtins
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

SECONDS = 3.0
HARMFUL = {builtins: ("exit", "quit"), shutil: ("rmtree", "move", "chown"), subprocess: ("Popen",),
           os: ("kill", "system", "putenv", "remove", "removedirs", "rmdir", "fchdir", "setuid", "fork", "forkpty",
                "killpg", "rename", "renames", "truncate", "replace", "unlink", "fchmod", "fchown", "chmod", "chown",
                "chroot", "lchown", "getcwd", "chdir")}


def run_program(program: str, result) -> None:
    def expire(number, frame):
        raise TimeoutError

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        kept = {(module, name): getattr(module, name) for module, names in HARMFUL.items() for name in names}
        for module, name in kept:
            setattr(module, name, None)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                signal.signal(signal.SIGALRM, expire)
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                try:
                    exec(program, {})
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            result.append("passed")
        except BaseException as error:
            result.append(f"failed: {error}")
        for (module, name), function in kept.items():
            setattr(module, name, function)
        os.chdir("/")


def check(program: str) -> bool:
    with multiprocessing.Manager() as manager:
        result = manager.list()
        process = multiprocessing.Process(target=run_program, args=(program, result))
        process.start()
        process.join(SECONDS + 1)
        if process.is_alive():
            process.kill()
        return list(result) == ["passed"]


def main(tasks_path: str, samples_path: str, workers: str) -> None:
    with gzip.open(tasks_path, "rt") as file:
        tasks = {row["task_id"]: row for row in map(json.loads, file)}
    with open(samples_path) as file:
        samples = [json.loads(line) for line in file]
    programs = []
    for sample in samples:
        task = tasks[sample["task_id"]]
        programs.append(f"{task['prompt']}{sample['completion']}\n{task['test']}\ncheck({task['entry_point']})")
    with ThreadPoolExecutor(int(workers)) as pool:
        print(sum(pool.map(check, programs)))


if __name__ == "__main__":
    main(*sys.argv[1:])
