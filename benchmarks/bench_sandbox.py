"""Scoring HumanEval's samples against the usual executor, and the cost of the sandbox's layers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm.evaluators.code.tasks import read_tasks
from dllm.evaluators.sandbox.host import Sandbox

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"
WORKERS, COPIES = 2, 2
PROGRAM = "def add(a, b):\n    return a + b\n\nassert add(1, 2) == 3\n"


@pytest.mark.skipif(not DATA.is_file(), reason="HumanEval's data (../shared/data) is not on this machine")
def bench_scoring_humaneval(paired, tmp_path):
    """Each is a whole command in its own process, so that neither forks from this one; ours includes its self-test."""
    tasks = read_tasks("humaneval", str(DATA)).tasks
    samples = tmp_path / "samples.jsonl"
    answers = [(task.task_id, task.canonical) for task in tasks.values() for _ in range(COPIES)]
    lines = [{"task_id": task_id, "completion": "    raise ValueError\n" if i % 3 == 2 else answer}
             for i, (task_id, answer) in enumerate(answers)]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def ours() -> int:
        done = subprocess.run([sys.executable, "-m", "dllm", "score", samples, "--task", "humaneval", "--data", DATA,
                               "--workers", str(WORKERS)], capture_output=True, check=True, cwd=ROOT)
        return json.loads(done.stdout)["verdicts"]["pass"]

    def usual() -> int:
        script = ROOT / "benchmarks" / "reference_executor.py"
        done = subprocess.run([sys.executable, script, DATA, samples, str(WORKERS)], capture_output=True, check=True)
        return int(done.stdout)

    def same(passed: int, expected: int) -> None:
        assert passed == expected == len(lines) - len(lines) // 3

    paired(ours=ours, baseline=usual, check=same, at_least=1.5, samples=len(lines), workers=WORKERS)


def bench_layers(paired):
    """All layers against a forked process with limits alone: at most 10 ms more a program."""
    count = 50
    with Sandbox() as full, Sandbox(layers=()) as bare:
        if full.missing:
            pytest.skip(f"this machine lacks {full.missing}")

        def run(sandbox: Sandbox) -> float:
            start = time.perf_counter()
            for _ in range(count):
                assert sandbox.run(PROGRAM, 10).passed
            return (time.perf_counter() - start) / count * 1e3

        times = [(run(full), run(bare)) for _ in range(4)]
        layers_ms = min(ours for ours, _ in times) - min(theirs for _, theirs in times)
        paired(ours=lambda: run(full), baseline=lambda: run(bare), programs=count, cores=os.cpu_count(),
               layers_ms_a_program=round(layers_ms, 2), exactly={"layers_over_10_ms": (int(layers_ms > 10), 0)})
