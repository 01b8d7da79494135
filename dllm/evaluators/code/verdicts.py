"""Verdicts on samples: sandboxes for each worker, the rules of each benchmark, threads that judge all samples.

Verdicts are those of the reference executors: program and tests in one process, 3 seconds. The limit counts CPU time,
and a sample that times out is judged once more, alone, so that a verdict does not depend on the load of the machine.
HumanEval+ and MBPP+ (EvalPlus) have no tests, but arguments and a solution that programs must agree with; they are
always judged from outside the process of the program.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace

from dllm.errors import Failure, UserError
from dllm.evaluators.code.samples import Sample
from dllm.evaluators.code.tasks import BENCHMARKS, Task, TaskSet
from dllm.evaluators.sandbox.host import LAYERS, PROTECTS, Outcome, Sandbox
from dllm.evaluators.sandbox.judging import encode_value, write_table

_TASK_SECONDS = 60.0  # limit of all calls of one program, in EvalPlus
_SOLUTION_SECONDS = 120.0  # limit of one call of the task's own solution


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
        """Judge a pass again, with the tests in another process; the limit doubles, because values cross processes."""
        work = {"solution": task.program(task.canonical), "names": task.names, "tests": task.tests}
        return self.judge(sample, task, work, 2 * seconds)


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
            warn("no layer of the sandbox works on this machine: programs can do everything that you can, within "
                 "limits of memory and time; score only programs that you would run yourself")
        elif missing:
            warn(f"the sandbox lacks {text}")
        self_test(bench)
        return bench.programs.layers
    finally:
        bench.close()


def self_test(bench: Bench) -> None:
    """Judge a right, a wrong and a hanging program, in both ways. Raises: Failure if a verdict is wrong."""
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
                              "verdicts of this machine cannot be trusted")


@contextmanager
def tables(bench: Bench, task: Task, dataset: str, seconds: float) -> Iterator[list[tuple[int, float]]]:
    """[(file of calls and expected outputs, seconds for all calls)] for the base and the plus arguments of a task.

    The task's own solution gives the outputs. A call may take `seconds` of CPU time, or four times as long as the
    solution.
    """
    files = []
    try:
        for calls in (task.base_input, task.plus_input):
            requests = [encode_value((task.names[0], tuple(arguments), {})) for arguments in calls]
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


def judge_samples(bench: Bench, task: Task, samples: list[Sample], benchmark: str, seconds: float,
                  audit: bool = False) -> list[dict]:
    """The records of samples of one task, by the rules of its benchmark.

    audit: judge every pass again from outside the program's process (benchmarks with tests).
    """
    if BENCHMARKS[benchmark].plus:
        return judge_plus(bench, task, samples, benchmark.removesuffix("_plus"), seconds)
    return judge_tests(bench, task, samples, seconds, audit)


def judge_plus(bench: Bench, task: Task, samples: list[Sample], dataset: str, seconds: float) -> list[dict]:
    """EvalPlus: the base arguments and, if these pass, the plus arguments."""
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


Work = tuple[Task, list[Sample]]


def run_all(bench_count: int, make: Callable[[], Bench], work: Sequence[Work],
            do: Callable[[Bench, Task, list[Sample]], list[dict]],
            progress: Callable[[list[dict]], None]) -> list[dict]:
    """The records of do(bench, task, samples) for all work, in threads with a bench each.

    A bench that fails is renewed, once for each item. At the end, samples that timed out are judged once more, one at a
    time; these records count, marked "judged_again".
    """
    free: queue.SimpleQueue[Bench] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(bench_count):
            bench = make()
            stack.callback(bench.close)
            free.put(bench)

        def one(task: Task, samples: list[Sample]) -> list[dict]:
            bench = free.get()
            try:
                try:
                    return do(bench, task, samples)
                except Failure:
                    bench.renew()
                    return do(bench, task, samples)
            finally:
                free.put(bench)

        pool = stack.enter_context(ThreadPoolExecutor(bench_count))
        stack.callback(pool.shutdown, cancel_futures=True)  # before the pool waits for the rest
        results = []
        for future in [pool.submit(one, *item) for item in work]:
            results += future.result()
            progress(results)
        late = {record["line"] for record in results if "timeout" in (record["verdict"], record.get("audit"))}
        again = {}
        for task, samples in work:
            if slow := [sample for sample in samples if sample.line in late]:
                again |= {record["line"]: record | {"judged_again": True} for record in one(task, slow)}
        return [again.get(record["line"], record) for record in results]


class RunningScore:
    """The share of passes while samples are still generated, judged in a thread, for a progress bar.

    The final score judges all samples anew. This one calls only the base arguments of EvalPlus, and judges nothing
    twice.
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
        """rows: each with task_id and completion."""
        for row in rows:
            self.waiting.put(row)

    def _judge(self) -> None:
        with suppress(Failure), closing(Bench(Sandbox)) as bench:  # the final score reports a failing sandbox
            while (row := self.waiting.get()) is not None and not self.ended:
                task = replace(self.tasks.tasks[row["task_id"]], plus_input=())
                sample = Sample(task_id=task.task_id, line=0, text=row["completion"], whole=False)
                result, = judge_samples(bench, task, [sample], self.tasks.name, self.seconds)
                self.passed += result["verdict"] == "pass"
                self.judged += 1
