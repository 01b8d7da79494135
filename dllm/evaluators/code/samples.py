"""Samples of a code benchmark: JSON lines with task_id, and completion or solution (a whole program)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dllm.errors import UserError
from dllm.evaluators.code.tasks import Task, TaskSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    task_id: str
    line: int  # number in the file, from 1
    text: str
    whole: bool  # the text is a program, not a completion

    def program(self, task: Task) -> str:
        return self.text if self.whole else task.program(self.text)


def read_samples(path: Path, tasks: TaskSet, skip_bad: bool = False) -> tuple[list[Sample], list[str], list[str]]:
    """(samples, faults of the lines that are left out, tasks without a sample).

    Raises: UserError if a line is bad or a task has no sample, unless skip_bad; and if no sample is left.
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
        raise UserError(f"{path} has no sample of {tasks.name}" + (f": {name_some(bad, '; ')}" if bad else ""))
    if bad and not skip_bad:
        raise UserError(f"{path}: {name_some(bad, '; ')}; correct them, or score the rest with --skip-bad")
    if missing and not skip_bad:
        raise UserError(f"{path} has no sample for {len(missing)} of {len(tasks.tasks)} tasks: {name_some(missing)}; "
                        "score the other tasks with --skip-bad")
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
        raise UserError(f"is of task {task_id[:80]}, which is not in {tasks.name}")
    for key in ("solution", "completion"):  # as EvalPlus, where a sample has both
        if isinstance(row.get(key), str):
            return Sample(task_id=task_id, line=number, text=row[key], whole=key == "solution")
    raise UserError("has neither completion nor solution as text")


def name_some(things: Sequence[str], separator: str = ", ") -> str:
    """The first five, and the number of the rest."""
    return separator.join(things[:5]) + (f"{separator}and {len(things) - 5} more" if len(things) > 5 else "")


def check_data(samples: Path, tasks: TaskSet) -> None:
    """Refuse data that differs from the data of the samples, if a manifest.json beside them names it.

    Raises: UserError if its data.md5 or data.sha256 (of the uncompressed data) differs.
    """
    path = samples.with_name("manifest.json")
    if not path.is_file():
        return
    try:
        recorded = json.loads(path.read_bytes()).get("data")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is no manifest ({error}); delete it, or write it again") from None
    for kind in ("md5", "sha256"):
        wanted = recorded.get(kind) if isinstance(recorded, dict) else None
        if wanted not in (None, getattr(tasks, kind)):
            raise UserError(f"the samples were made from data with {kind} {wanted}, as {path} says; {tasks.source} has "
                            f"{getattr(tasks, kind)}; give the same data with --data")


def exact_match(task: Task, text: str) -> dict[str, bool]:
    """SantaCoder-FIM's rules, on stripped texts. exact_match_strict: the whole text (SantaCoder). exact_match: its
    first line, or the second if the text starts with a newline (Qwen2.5-Coder, DreamOn, Open-dLLM)."""
    lines = text.split("\n")
    line = lines[1] if text.startswith(("\n", " \n")) else lines[0]
    wanted = task.canonical.strip()
    return {"exact_match": line.strip() == wanted, "exact_match_strict": text.strip() == wanted}
