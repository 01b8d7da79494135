"""What the task files in lm_eval_tasks/ call: our benchmarks' data for lm-eval, and our verdicts."""

import functools
import sys

from dllm.evaluators.estimates import pass_at_k
from dllm.evaluators.generating import finish_text, texts_around
from dllm.evaluators.presets import CODE_STOPS, MBPP_STOPS
from dllm.evaluators.sandbox import LAYERS, Limits, Sandbox
from dllm.evaluators.scoring import Bench, Sample, check_sandbox, judge_plus, judge_tests, run_all
from dllm.evaluators.tasks import BENCHMARKS, TaskSet, read_tasks

CODE_UNTIL, MBPP_UNTIL = list(CODE_STOPS), list(MBPP_STOPS)  # lm-eval wants lists
_read = functools.cache(read_tasks)


def read(benchmark: str, data: str | None = None, **_) -> dict:
    """{"test": rows}. data: a file, a folder or a hub repository, as --metadata data=PATH gives it; None: the
    benchmark's own repository. lm-eval passes its model's arguments too."""
    import datasets

    return {"test": datasets.Dataset.from_list([
        dict(zip(("before", "after"), texts_around(benchmark, task), strict=True), benchmark=benchmark,
             data=data or "", task_id=task.task_id, canonical=task.canonical)
        for task in _read(benchmark, data).tasks.values()])}


def keep_all(answers: list[list[str]], docs) -> list[list[str]]:
    """A filter that leaves all repeats of a task in."""
    return answers


def judge(doc: dict, results: list[list[str]]) -> dict[str, float]:
    """pass@1 of a task over its repeats, by the verdicts of `dllm score`."""
    name, answers = doc["benchmark"], results[0]
    tasks: TaskSet = _read(name, doc["data"] or None)
    task, seconds = tasks.tasks[doc["task_id"]], BENCHMARKS[name].seconds
    samples = [Sample(task_id=task.task_id, line=line, text=finish_text(name, answer), whole=False)
               for line, answer in enumerate(answers, start=1)]
    _check()

    def do(bench: Bench, _) -> list[dict]:
        if BENCHMARKS[name].plus:
            return judge_plus(bench, task, samples, name.removesuffix("_plus"), seconds)
        return judge_tests(bench, task, samples, seconds, audit=False)

    records = run_all(1, lambda: Bench(_sandbox), [None], do, lambda records: None)
    passed = sum(record["verdict"] == "pass" for record in records)
    return {"pass@1": pass_at_k(len(samples), passed, 1)}


def _sandbox() -> Sandbox:
    return Sandbox(LAYERS, Limits())


@functools.cache
def _check() -> None:
    check_sandbox(_sandbox, "best", lambda text: print(f"dllm: warning: {text}", file=sys.stderr))
