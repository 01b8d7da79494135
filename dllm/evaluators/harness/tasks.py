"""Functions that the task files in lm_eval_tasks/ call: our benchmarks' data for lm-eval, and our verdicts."""

import functools

from dllm.evaluators.code.generating import finish_text, texts_around
from dllm.evaluators.code.presets import CODE_STOPS, MBPP_STOPS
from dllm.evaluators.code.samples import Sample
from dllm.evaluators.code.scoring import print_warning
from dllm.evaluators.code.tasks import BENCHMARKS, TaskSet, read_tasks
from dllm.evaluators.code.verdicts import Bench, check_sandbox, judge_samples, run_all
from dllm.evaluators.estimates import pass_at_k
from dllm.evaluators.sandbox.host import Sandbox

CODE_UNTIL, MBPP_UNTIL = list(CODE_STOPS), list(MBPP_STOPS)  # lm-eval wants lists
_read = functools.cache(read_tasks)


def read(benchmark: str, data: str | None = None, **_) -> dict:
    """{"test": rows}. data: a file, a folder or a hub repository, from --metadata data=PATH; None: the benchmark's own
    repository. lm-eval also passes the arguments of its model."""
    import datasets

    return {"test": datasets.Dataset.from_list([
        dict(zip(("before", "after"), texts_around(benchmark, task), strict=True), benchmark=benchmark,
             data=data or "", task_id=task.task_id, canonical=task.canonical)
        for task in _read(benchmark, data).tasks.values()])}


def keep_all(answers: list[list[str]], docs) -> list[list[str]]:
    """A filter that keeps all repeats of a task."""
    return answers


def judge(doc: dict, results: list[list[str]]) -> dict[str, float]:
    """pass@1 of a task over its repeats, by the verdicts of `dllm score`."""
    name, answers = doc["benchmark"], results[0]
    tasks: TaskSet = _read(name, doc["data"] or None)
    task, seconds = tasks.tasks[doc["task_id"]], BENCHMARKS[name].seconds
    samples = [Sample(task_id=task.task_id, line=line, text=finish_text(name, answer), whole=False)
               for line, answer in enumerate(answers, start=1)]
    _check()
    records = run_all(1, lambda: Bench(Sandbox), [(task, samples)],
                      functools.partial(judge_samples, benchmark=name, seconds=seconds), lambda records: None)
    passed = sum(record["verdict"] == "pass" for record in records)
    return {"pass@1": pass_at_k(len(samples), passed, 1)}


@functools.cache
def _check() -> None:
    check_sandbox(Sandbox, "best", print_warning)
