"""Scores samples of code benchmarks: runs them in the sandbox, and estimates pass@k. Needs no model.

Samples are the field's JSON lines: task_id, and completion (what the model wrote) or solution (a whole program).
Verdicts are those of the reference executors: program and tests in one process, 3 seconds. Two benchmarks have no tests
but arguments and a solution to agree with (EvalPlus: HumanEval+, MBPP+); they are always judged from outside the
program's process. With `audit` every pass of the others is judged so again, which finds programs that read the tests,
or return objects that equal everything.
"""

import json
import os
import platform
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dllm.errors import Failure, UserError
from dllm.evaluators.estimates import pass_at_k, wilson_interval
from dllm.evaluators.judging import encode, write_table
from dllm.evaluators.sandbox import LAYERS, PROTECTS, Limits, Outcome, Sandbox
from dllm.evaluators.tasks import BENCHMARKS, Task, TaskSet

_TASK_SECONDS = 60.0  # all calls of one program, in EvalPlus
_SOLUTION_SECONDS = 120.0  # a call of a task's own solution may take
_KS = (1, 10, 100)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    task_id: str
    line: int  # in the file, from 1
    text: str
    whole: bool  # a program, not a completion

    def program(self, task: Task) -> str:
        return self.text if self.whole else task.program(self.text)


def read_samples(path: Path, tasks: TaskSet, skip_bad: bool = False) -> tuple[list[Sample], list[str], list[str]]:
    """(samples, what is wrong with the lines left out, tasks without a sample).

    Raises: UserError if anything is wrong, unless skip_bad; and if no sample is left.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a file of JSON lines") from None
    samples, bad = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                samples.append(_read_sample(number, line, tasks))
            except UserError as error:
                bad.append(f"line {number} {error}")
    sampled = {sample.task_id for sample in samples}
    missing = [task_id for task_id in tasks.tasks if task_id not in sampled]
    if not samples:
        raise UserError(f"{path} has no sample of {tasks.name}" + (f": {_some(bad, '; ')}" if bad else ""))
    if bad and not skip_bad:
        raise UserError(f"{path}: {_some(bad, '; ')}; correct them, or score the rest with --skip-bad")
    if missing and not skip_bad:
        raise UserError(f"{path} has no sample for {len(missing)} of {len(tasks.tasks)} tasks: {_some(missing, ', ')}; "
                        "score those that are there with --skip-bad")
    return samples, bad, missing


def _read_sample(number: int, line: bytes, tasks: TaskSet) -> Sample:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("is not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("task_id"), (str, int)):
        raise UserError("has no task_id")
    task_id = str(row["task_id"])
    if tasks.name == "mbpp":  # 11, "11" and "MBPP/11" are in use
        task_id = task_id.rpartition("/")[2]
    if task_id not in tasks.tasks:
        raise UserError(f"is of task {task_id[:80]}, which {tasks.name} has not")
    for key in ("completion", "solution"):
        if isinstance(row.get(key), str):
            return Sample(task_id=task_id, line=number, text=row[key], whole=key == "solution")
    raise UserError("has neither completion nor solution as text")


def _some(things: list[str], separator: str) -> str:
    return separator.join(things[:5]) + (f"{separator}and {len(things) - 5} more" if len(things) > 5 else "")


def check_manifest(samples: Path, tasks: TaskSet) -> None:
    """Refuse data that is not what the samples were made from, if manifest.json beside them says what that was.

    Raises: UserError where its data.md5 or data.sha256 (of the uncompressed data) is another.
    """
    path = samples.with_name("manifest.json")
    if not path.is_file():
        return
    try:
        recorded = json.loads(path.read_bytes()).get("data")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is no manifest ({error}); take it away, or write it again") from None
    for kind in ("md5", "sha256"):
        wanted = recorded.get(kind) if isinstance(recorded, dict) else None
        if wanted not in (None, getattr(tasks, kind)):
            raise UserError(f"the samples were made from data with {kind} {wanted}, as {path} says; {tasks.source} has "
                            f"{getattr(tasks, kind)}; give the same data with --data")


# Judging


class Bench:
    """Sandboxes for one worker: one for programs, one for judges."""

    def __init__(self, make: Callable[[], Sandbox]):
        self.make = make
        self.programs, self.judges = make(), None

    def close(self) -> None:
        for sandbox in (self.programs, self.judges):
            if sandbox is not None:
                sandbox.close()

    def renew(self) -> None:
        self.close()
        self.programs, self.judges = self.make(), None

    def run(self, task: Task, sample: Sample, seconds: float) -> Outcome:
        return self.programs.run(f"{sample.program(task)}\n{task.tests}", seconds)

    def judge(self, sample: Sample, task: Task, work: dict, seconds: float, table: int | None = None) -> Outcome:
        if self.judges is None:
            self.judges = self.make()
        return self.programs.judged(self.judges, sample.program(task), work, seconds, table)

    def audit(self, task: Task, sample: Sample, seconds: float) -> Outcome:
        """Judge a pass again, with the tests in another process; the limit is for two processes' work."""
        work = {"solution": task.program(task.canonical), "names": task.names, "tests": task.tests}
        return self.judge(sample, task, work, 2 * seconds)


def self_test(bench: Bench) -> None:
    """A right, a wrong and a hanging program, by the sandbox and by a judge. Raises: Failure."""
    task = Task(task_id="self-test", prompt="def add(x, y):\n", canonical="    return x + y\n", names=("add",),
                tests="assert add(1, 2) == 3")
    for text, wanted in (("    return x + y", "pass"), ("    return x - y", "fail"),
                         ("    while True: pass", "timeout")):
        sample = Sample(task_id=task.task_id, line=0, text=text, whole=False)
        seconds = 0.1 if wanted == "timeout" else 20.0
        for judge in (bench.run, bench.audit):
            got = judge(task, sample, seconds)
            if got.verdict != wanted:
                raise Failure(f"the sandbox's self-test wanted {wanted} and got {got.verdict} ({got.error}); "
                              "no verdict of this machine would mean anything")


@contextmanager
def tables(bench: Bench, task: Task, dataset: str, seconds: float) -> Iterator[list[tuple[int, float]]]:
    """[(file of calls and expected outputs, seconds for all)] of the base and of the plus arguments of a task.

    The outputs are those of the task's own solution, and its times. A call may take `seconds`, or four times as long as
    the solution took.
    """
    files = []
    try:
        for calls in (task.base_input, task.plus_input):
            requests = [encode((task.names[0], tuple(arguments), {})) for arguments in calls]
            answers = bench.programs.answers(task.program(task.canonical), requests, _SOLUTION_SECONDS)
            limits = [max(seconds, 4 * taken) for _, taken in answers]
            rows = [(request, output, limit)
                    for request, (output, _), limit in zip(requests, answers, limits, strict=True)]
            file = os.memfd_create("calls")
            files.append((file, min(_TASK_SECONDS, sum(limits)) + 1))
            with open(file, "wb", closefd=False) as out:
                out.write(write_table(rows, dataset, task.names[0], task.atol))
        yield files
    finally:
        for file, _ in files:
            os.close(file)


def judge_plus(bench: Bench, task: Task, samples: list[Sample], dataset: str, seconds: float) -> list[dict]:
    """EvalPlus: the base arguments, and if they pass the plus arguments."""
    results = []
    with tables(bench, task, dataset, seconds) as files:
        work = {"dataset": dataset, "entry_point": task.names[0]}
        for sample in samples:
            parts = {}
            for kind, (file, limit) in zip(("base", "plus"), files, strict=True):
                outcome = bench.judge(sample, task, work, limit, file)
                parts[kind] = outcome.verdict
                if not outcome.passed:
                    break
            results.append(_record(sample, outcome) | parts)
    return results


def judge_tests(bench: Bench, task: Task, samples: list[Sample], seconds: float, audit: bool) -> list[dict]:
    results = []
    for sample in samples:
        outcome = bench.run(task, sample, seconds)
        record = _record(sample, outcome)
        if audit and outcome.passed:
            again = bench.audit(task, sample, seconds)
            record["audit"] = again.verdict
            if not again.passed:
                record["audit_error"] = again.error
        results.append(record)
    return results


def _record(sample: Sample, outcome: Outcome) -> dict:
    return {"task_id": sample.task_id, "line": sample.line, **asdict(outcome) | {"seconds": round(outcome.seconds, 4)}}


def exact_match(task: Task, text: str) -> dict[str, bool]:
    """SantaCoder-FIM's rules. exact_match_strict: all of the text, stripped (SantaCoder). exact_match: its first line,
    or its second where the text starts with a line's end, stripped (Qwen2.5-Coder, DreamOn, Open-dLLM)."""
    lines = text.split("\n")
    line = lines[1] if text.startswith(("\n", " \n")) else lines[0]
    wanted = task.canonical.strip()
    return {"exact_match": line.strip() == wanted, "exact_match_strict": text.strip() == wanted}


def run_all(bench_count: int, make: Callable[[], Bench], work: Iterable, do: Callable[[Bench, object], list[dict]],
            progress: Callable[[list[dict]], None]) -> list[dict]:
    """do(bench, item) for every item, in threads with a bench each; a bench that fails is renewed, once an item."""
    free: queue.SimpleQueue[Bench] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(bench_count):
            bench = make()
            stack.callback(bench.close)
            free.put(bench)

        def one(item) -> list[dict]:
            bench = free.get()
            try:
                try:
                    return do(bench, item)
                except Failure:
                    bench.renew()
                    return do(bench, item)
            finally:
                free.put(bench)

        pool = stack.enter_context(ThreadPoolExecutor(bench_count))
        stack.callback(pool.shutdown, cancel_futures=True)  # before the pool waits for the rest
        results = []
        for future in [pool.submit(one, item) for item in work]:
            results += future.result()
            progress(results)
        return results


class RunningScore:
    """The share of passes while samples are still generated, judged in a thread beside that. It is for a progress bar:
    the score itself is made anew from all samples. Of EvalPlus' arguments, only the base ones.
    """

    def __init__(self, tasks: TaskSet, timeout: float | None = None):
        self.tasks, self.judged, self.passed = tasks, 0, 0
        self.seconds = timeout or BENCHMARKS[tasks.name].seconds
        self.waiting: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self.ended = False
        self.thread = threading.Thread(target=self._judge, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended = True
        self.waiting.put(None)
        self.thread.join()

    @property
    def share(self) -> float | None:
        return self.passed / self.judged if self.judged else None

    def add(self, rows: list[dict]) -> None:
        """rows: task_id and completion of each."""
        for row in rows:
            self.waiting.put(row)

    def _judge(self) -> None:
        with suppress(Failure), closing(Bench(Sandbox)) as bench:  # a sandbox that fails does so again at the end
            while (row := self.waiting.get()) is not None and not self.ended:
                task = replace(self.tasks.tasks[row["task_id"]], plus_input=())
                sample = Sample(task_id=task.task_id, line=0, text=row["completion"], whole=False)
                if BENCHMARKS[self.tasks.name].plus:
                    result, = judge_plus(bench, task, [sample], self.tasks.name.removesuffix("_plus"), self.seconds)
                else:
                    result, = judge_tests(bench, task, [sample], self.seconds, audit=False)
                self.passed += result["verdict"] == "pass"
                self.judged += 1


def score_samples(samples_path: str | Path, tasks: TaskSet, *, workers: int | None = None,
                  timeout: float | None = None, audit: bool = False, require: str = "best", skip_bad: bool = False,
                  limits: Limits | None = None, layers: Sequence[str] = LAYERS,
                  warn: Callable[[str], None] | None = None) -> dict:
    """Score a file of samples.

    Args:
        workers: programs at a time; None: one for each core.
        timeout: seconds for a program and its tests; for HumanEval+ and MBPP+, for a call. None: 3 and 4.
        audit: judge every pass again from outside the program's process.
        require: "strict" refuses to run without all layers of the sandbox; "best" takes those there are, and warns.
        skip_bad: leave out lines that are no samples, and tasks without samples.
        limits, layers: of the sandbox.
        warn: called with each warning; None prints them on stderr.
    Returns: a record for JSON: pass@k (for each k that every task has samples for) with 95% intervals over the tasks,
        counts of the verdicts, settings, hashes of the data, and every sample.
    Raises: UserError for bad input, or too few layers; Failure if the sandbox does not work.
    """
    path = Path(samples_path)
    warn = warn or (lambda text: print(f"dllm: warning: {text}", file=sys.stderr))
    limits = limits or Limits()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    benchmark = BENCHMARKS[tasks.name]
    seconds = benchmark.seconds if timeout is None else timeout
    if not 0 < seconds < float("inf") or workers < 1:
        raise UserError(f"--timeout and --workers must be above 0, not {seconds:g} and {workers}")
    samples, bad, missing = read_samples(path, tasks, skip_bad)
    check_manifest(path, tasks)
    by_task: dict[str, list[Sample]] = {task_id: [] for task_id in tasks.tasks if task_id not in set(missing)}
    for sample in samples:
        by_task[sample.task_id].append(sample)
    for things, text in ((bad, "bad lines are left out"), (missing, "tasks without samples are left out of the score")):
        if things:
            warn(f"{len(things)} {text}: {_some(things, '; ')}")

    def do(bench: Bench, item: tuple[Task, list[Sample]]) -> list[dict]:
        if benchmark.plus:
            return judge_plus(bench, *item, tasks.name.removesuffix("_plus"), seconds)
        return judge_tests(bench, *item, seconds, audit)

    # The answers of a task's own solution are found once a task; without them, samples spread evenly.
    work = [(tasks.tasks[task_id], part) for task_id, own in by_task.items()
            for part in ([own] if benchmark.plus else ([sample] for sample in own))]
    start = time.monotonic()
    layers_here = check_sandbox(lambda: Sandbox(layers, limits), require, warn)
    from tqdm import tqdm

    with tqdm(total=len(samples), desc=tasks.name, unit="sample", disable=None, file=sys.stderr) as bar:
        def progress(results: list[dict]) -> None:
            bar.update(len(results) - bar.n)
            bar.set_postfix(passed=f"{sum(r['verdict'] == 'pass' for r in results) / len(results):.3f}")

        results = run_all(min(workers, len(work)), lambda: Bench(lambda: Sandbox(layers, limits)), work, do, progress)
    if tasks.name == "santacoder_fim":
        texts = {sample.line: sample.text for sample in samples if not sample.whole}
        for result in results:
            if result["line"] in texts:
                result |= exact_match(tasks.tasks[result["task_id"]], texts[result["line"]])
    results.sort(key=lambda result: result["line"])
    record = {
        "task": tasks.name, "samples": str(path), **summarize(results, by_task),
        "attempted_tasks": len(by_task), "tasks": len(tasks.tasks), "skipped_lines": bad, "missing_tasks": missing,
        "data": {"source": tasks.source, "md5": tasks.md5, "sha256": tasks.sha256},
        "settings": {"timeout": seconds, "workers": workers, "audit": audit, "limits": asdict(limits)},
        "sandbox": {name: reason or "active" for name, reason in layers_here.items()},
        "python": platform.python_version(), "seconds": round(time.monotonic() - start, 2), "results": results}
    if differing := [f"{r['task_id']} (line {r['line']})" for r in results if r.get("audit") in _AGAINST]:
        warn(f"{len(differing)} passes do not hold with the tests out of the program's reach: {_some(differing, ', ')}")
    return record


_AGAINST = ("fail", "timeout", "crash", "oom")  # of an audit; "cannot judge" says nothing


def check_sandbox(make: Callable[[], Sandbox], require: str, warn: Callable[[str], None]) -> dict[str, str]:
    """Refuse or warn where layers are missing, then test the sandbox. Returns its layers."""
    bench = Bench(make)
    try:
        missing = bench.programs.missing
        text = "; ".join(f"{name} ({reason}): {PROTECTS[name]}" for name, reason in missing.items())
        if missing and require == "strict":
            raise UserError(f"--require-sandbox strict: this machine lacks {text}; take another, or "
                            "--require-sandbox best if you trust the programs that far")
        if len(missing) == len(LAYERS):
            warn("no layer of the sandbox can be had here: programs can do all that you can, within limits of memory "
                 "and time; score nothing that you would not run")
        elif missing:
            warn(f"the sandbox lacks {text}")
        self_test(bench)
        return bench.programs.layers
    finally:
        bench.close()


def summarize(results: list[dict], by_task: Mapping[str, list]) -> dict:
    """pass@k of the tasks sampled, their intervals, and counts."""
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
            "samples_scored": len(results), "fewest_samples_of_a_task": fewest,
            **({"audit": dict(sorted(Counter(r["audit"] for r in results if "audit" in r).items()))}
               if "audited_pass" in kinds else {})}
