"""Score samples of code benchmarks: judge them in the sandbox, and estimate pass@k. No model is needed.

With `audit` every pass is judged again from outside the process of the program (verdicts.py), which finds programs that
read the tests, or return objects that equal everything.
"""

import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dllm.errors import UserError
from dllm.evaluators.code.samples import Sample, check_data, exact_match, name_some, read_samples
from dllm.evaluators.code.tasks import BENCHMARKS, TaskSet
from dllm.evaluators.code.verdicts import Bench, check_sandbox, judge_samples, run_all
from dllm.evaluators.estimates import pass_at_k, wilson_interval
from dllm.evaluators.sandbox.host import LAYERS, Limits, Sandbox
from dllm.evaluators.sandbox.judging import BACKSTOP

_KS = (1, 10, 100)
_AGAINST = ("fail", "timeout", "crash", "oom")  # verdicts of an audit that contradict a pass; "cannot judge" does not


def score_samples(samples_path: str | Path, tasks: TaskSet, *, workers: int | None = None,
                  timeout: float | None = None, audit: bool = False, require: str = "best", skip_bad: bool = False,
                  limits: Limits | None = None, layers: Sequence[str] = LAYERS,
                  warn: Callable[[str], None] | None = None) -> dict:
    """Score a file of samples.

    Args:
        workers: programs at a time; None: one for each core.
        timeout: CPU seconds for a program and its tests (None: 3); for HumanEval+ and MBPP+, for a call (None: 4). The
            wall clock ends programs that sleep, after `judging.BACKSTOP` times as long.
        audit: judge every pass again from outside the program's process.
        require: "strict" refuses to run without all layers of the sandbox; "best" warns of missing ones.
        skip_bad: leave out bad lines, and tasks without samples.
        limits, layers: of the sandbox.
        warn: called with each warning; None prints them on stderr.
    Returns: a record for JSON: pass@k (for each k for which every task has samples) with 95% intervals over the tasks,
        counts of the verdicts, settings, hashes of the data, and every sample.
    Raises: UserError for bad input, or too few layers; Failure if the sandbox does not work.
    """
    path = Path(samples_path)
    warn = warn or print_warning
    limits = limits or Limits()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    seconds = BENCHMARKS[tasks.name].seconds if timeout is None else timeout
    if not 0 < seconds < float("inf") or workers < 1:
        raise UserError(f"--timeout and --workers must be above 0, not {seconds:g} and {workers}")
    samples, bad, missing = read_samples(path, tasks, skip_bad)
    check_data(path, tasks)
    for things, text in ((bad, "bad lines are left out"), (missing, "tasks without samples are left out of the score")):
        if things:
            warn(f"{len(things)} {text}: {name_some(things, '; ')}")
    by_task: dict[str, list[Sample]] = {task_id: [] for task_id in tasks.tasks if task_id not in set(missing)}
    for sample in samples:
        by_task[sample.task_id].append(sample)

    def make_sandbox() -> Sandbox:
        return Sandbox(layers, limits)

    start = time.monotonic()
    active_layers = check_sandbox(make_sandbox, require, warn)
    results = judge_all(tasks, by_task, make_sandbox, workers, seconds, audit)
    record = {
        "task": tasks.name, "samples": str(path), **summarize(results, by_task),
        "attempted_tasks": len(by_task), "tasks": len(tasks.tasks), "skipped_lines": bad, "missing_tasks": missing,
        "data": {"source": tasks.source, "md5": tasks.md5, "sha256": tasks.sha256},
        "settings": {"timeout": seconds, "timeout_counts": "CPU seconds", "wall_clock_backstop": BACKSTOP * seconds,
                     "workers": workers, "audit": audit, "limits": asdict(limits)},
        "sandbox": {name: reason or "active" for name, reason in active_layers.items()},
        "python": platform.python_version(), "seconds": round(time.monotonic() - start, 2), "results": results}
    if differing := [f"{r['task_id']} (line {r['line']})" for r in results if r.get("audit") in _AGAINST]:
        warn(f"{len(differing)} passes do not hold with the tests out of the program's reach: {name_some(differing)}")
    return record


def judge_all(tasks: TaskSet, by_task: Mapping[str, list[Sample]], make_sandbox: Callable[[], Sandbox], workers: int,
              seconds: float, audit: bool) -> list[dict]:
    """The records of all samples in the order of their lines, with a progress bar."""
    from tqdm import tqdm

    # EvalPlus computes expected outputs once per task; other samples spread evenly over the workers.
    whole = BENCHMARKS[tasks.name].plus
    work = [(tasks.tasks[task_id], part) for task_id, own in by_task.items()
            for part in ([own] if whole else ([sample] for sample in own))]
    with tqdm(total=sum(map(len, by_task.values())), desc=tasks.name, unit="sample", disable=None,
              file=sys.stderr) as bar:
        def progress(results: list[dict]) -> None:
            bar.update(len(results) - bar.n)
            bar.set_postfix(passed=f"{sum(r['verdict'] == 'pass' for r in results) / len(results):.3f}")

        results = run_all(min(workers, len(work)), lambda: Bench(make_sandbox), work,
                          partial(judge_samples, benchmark=tasks.name, seconds=seconds, audit=audit), progress)
    if tasks.name == "santacoder_fim":
        texts = {sample.line: sample.text for own in by_task.values() for sample in own if not sample.whole}
        for result in results:
            if result["line"] in texts:
                result |= exact_match(tasks.tasks[result["task_id"]], texts[result["line"]])
    return sorted(results, key=lambda result: result["line"])


def print_warning(text: str) -> None:
    print(f"dllm: warning: {text}", file=sys.stderr)


def summarize(results: list[dict], by_task: Mapping[str, list]) -> dict:
    """pass@k over the tasks with samples, with intervals and counts."""
    kinds = {"pass": lambda result: result["verdict"] == "pass"}
    if any("base" in result for result in results):
        kinds["base_pass"] = lambda result: result["base"] == "pass"
    if any("audit" in result for result in results):
        kinds["audited_pass"] = lambda result: result["verdict"] == "pass" and result["audit"] not in _AGAINST
    for name in ("exact_match", "exact_match_strict"):
        if any(name in result for result in results):
            kinds[name] = lambda result, name=name: result.get(name, False)
    summary, intervals = {}, {}
    fewest = min(map(len, by_task.values()))
    for name, right in kinds.items():
        passed = Counter(result["task_id"] for result in results if right(result))
        for k in _KS if "pass" in name else (1,):
            if k <= fewest:
                values = [pass_at_k(len(own), passed[task_id], k) for task_id, own in by_task.items()]
                key = f"{name}@{k}" if "pass" in name else name
                summary[key] = sum(values) / len(values)
                intervals[key] = wilson_interval(sum(values), len(values))
    verdicts = Counter(result["verdict"] for result in results)
    return {**summary, "intervals_95": intervals, "verdicts": dict(sorted(verdicts.items())),
            "judged_again": sum(result.get("judged_again", False) for result in results),
            "samples_scored": len(results), "fewest_samples_of_a_task": fewest,
            **({"audit": dict(sorted(Counter(r["audit"] for r in results if "audit" in r).items()))}
               if "audited_pass" in kinds else {})}
