"""A scoreboard of finished runs of `dllm eval`, beside published results: Markdown, and a page.

Rows share a table only if they answer one question: the same benchmark, data, subset of tasks, rules of the verdict and
cutting of answers. Where the rows of a table were generated with different settings, the table names these.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dllm.errors import UserError
from dllm.evaluators.estimates import pass_at_k

_ALIASES = {"humaneval_infill": "humaneval_infill_single_line"}
_METHOD = ("alg", "remasking", "steps", "max_new_tokens", "block_length", "temperature", "top_p", "top_k", "threshold",
           "factor", "cache")  # settings of the generation that a row shows


class Score(NamedTuple):
    value: float  # a share in 0..1; for tasks of lm-eval, in their own unit
    low: float | None = None  # the 95% interval
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A row of the scoreboard. All text is plain."""

    name: str
    model: str
    task: str
    scores: dict[str, Score]  # by metric; the first is the headline
    question: dict  # settings that must agree before scores are compared
    method: dict  # settings of the generation, which influence scores too
    told: str  # the method in words
    curve: tuple[float, ...] = ()  # pass@1, pass@2, ...
    tokens_per_forward: float | None = None  # per sequence
    tokens_per_second: float | None = None
    shares: bool = True  # scores are shares, to be shown in percent


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    method: str
    how: str
    source: str
    scores: dict[str, Score]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Runs that answer one question, the best first."""

    title: str
    runs: list[Run]
    published: list[Published]
    warnings: list[str]
    notes: list[str]

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for row in (*self.runs, *self.published) for name in row.scores))

    @property
    def columns(self) -> list[str]:
        return ["", "run", "model", *self.metrics, "tokens per forward", "tokens/s", "method"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    comparisons: list[Comparison]
    problems: list[str]  # runs that are not shown, and why


def make_scoreboard(folders: Sequence[str | Path]) -> Board:
    """The runs in these folders, at any depth.

    Raises: UserError if a folder does not exist, or if none of them has a finished run that can be read.
    """
    runs, problems, seen = [], [], set()
    for root in map(Path, folders):
        if not root.is_dir():
            raise UserError(f"there is no folder {root}; give folders with runs of dllm eval")
        for folder in sorted({path.parent for path in root.rglob("*.json")
                              if path.name in ("results.json", "manifest.json")}):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            name = _plain("/".join((root.resolve().name, *folder.relative_to(root).parts)))
            if not (folder / "results.json").exists():
                if (samples := _count_samples(folder)) is not None:
                    problems.append(f"{name} is not finished: {samples} samples; the same command continues it")
                continue
            try:
                run = read_run(folder / "results.json", name)
            except UserError as error:
                problems.append(str(error))
            else:
                runs.append(run)
    if not runs:
        raise UserError(f"there is no finished run of dllm eval in {', '.join(map(str, folders))}"
                        + (f" ({'; '.join(problems[:3])})" if problems else "") + "; give folders that it wrote")
    return Board(comparisons=_compare(runs), problems=problems)


def _count_samples(folder: Path) -> int | None:
    """Samples of an unfinished run; None if the manifest is not that of a run."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if not isinstance(manifest, dict) or not {"task", "generation"} <= manifest.keys():
            return None
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("part-*.jsonl"))
    except (OSError, ValueError):
        return None


def read_run(path: Path, name: str) -> Run:
    """Raises: UserError if the file is no result of `dllm eval`, or a damaged one."""
    try:
        record = json.loads(path.read_bytes())
        return (_read_own if "intervals_95" in record else _read_harness)(record, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"[:100]
        raise UserError(_plain(f"{name}/{path.name} is no result of dllm eval, or damaged ({what}); the command that "
                               "made it writes it again")) from None


def _read_own(record: dict, name: str) -> Run:
    """A run of a benchmark that we score ourselves."""
    manifest, settings = record["manifest"], record["settings"]
    scores = {}
    for metric, interval in record["intervals_95"].items():
        score = Score(_number(record[metric]), *map(_number, interval))
        if not 0 <= score.low <= score.value <= score.high <= 1:
            raise ValueError(f"{metric} is {score.value} in {interval}")
        scores[_plain(metric)] = score
    if not scores:
        raise ValueError("no score")
    missing = sorted(layer for layer, state in record["sandbox"].items() if state != "active")
    question = {
        "data": manifest["data"]["sha256"][:12], "tasks": int(_number(record["attempted_tasks"])),
        "lines left out": len(record["skipped_lines"]), "seconds of a program": settings["timeout"],
        "clock of the limit": settings.get("timeout_counts", "wall-clock seconds"),
        **{f"limit of {key}": value for key, value in settings["limits"].items()},
        "layers that the sandbox lacks": missing, "Python": ".".join(record["python"].split(".")[:2]),
        "stop strings": manifest["stops"]}
    generation = {key: value for key, value in manifest["generation"].items() if key != "seed"}
    method = {"preset": manifest["preset"], "samples of a task": manifest["samples"], "length": manifest["length"],
              **generation, "dtype": manifest["dtype"], "dllm": manifest["versions"]["dllm"]}
    told = [manifest["preset"], f"{manifest['samples']} sample{'s' * (manifest['samples'] > 1)}"]
    told += [f"length {manifest['length']}"] if manifest["length"] is not None else []
    told += _tell(generation)
    speed = record["speed"]
    return Run(
        name=name, model=_name_model(manifest), task=_ALIASES.get(record["task"], _plain(record["task"])),
        scores=scores, question=question, method=method, told=_plain(", ".join(told)),
        curve=() if manifest["length"] == "average" else _curve(record["results"]),
        tokens_per_forward=_number(speed["tokens_per_forward"]), tokens_per_second=_number(speed["tokens_per_second"]))


def _read_harness(record: dict, name: str) -> Run:
    """A run of a task of lm-eval's. The interval is 1.96 standard errors."""
    manifest, task = record["manifest"], record["task"]
    scores = {}
    for metric, value in (record["groups"].get(task) or record["results"][task]).items():
        base, _, filtered = metric.partition(",")
        if isinstance(value, (int, float)) and filtered and not base.endswith("_stderr"):
            error = record["results"].get(task, {}).get(f"{base}_stderr,{filtered}")
            half = 1.96 * error if isinstance(error, (int, float)) and math.isfinite(error) else None
            label = base if filtered == "none" else f"{base} ({filtered})"
            interval = () if half is None else (value - half, value + half)
            scores[_plain(label)] = Score(_number(value), *interval)
    if not scores:
        raise ValueError("no score")
    question = {"data": manifest["data"]["sha256"][:12], "tasks": int(_number(manifest["tasks"])),
                "examples in the prompt": manifest["num_fewshot"], "chat template": manifest["apply_chat_template"],
                "version of the task": record["task_versions"], "lm-eval": manifest["versions"]["lm_eval"]}
    generation = {key: value for key, value in manifest["generation"].items() if key != "seed"}
    method = {**generation, "likelihood samples": manifest["likelihood_samples"], "dtype": manifest["dtype"],
              "dllm": manifest["versions"]["dllm"]}
    told = ["lm-eval", f"{manifest['likelihood_samples']} likelihood samples"]
    told += _tell(generation)
    return Run(name=name, model=_name_model(manifest), task=_plain(task), scores=scores, question=question,
               method=method, told=_plain(", ".join(told)), shares=False)


def _tell(generation: dict) -> list[str]:
    told = {key: generation.get(key) for key in _METHOD}
    if told["remasking"] is not None:  # which replaces alg
        del told["alg"]
    return [f"{key} {value}" for key, value in told.items() if value not in (None, 0, "none")]


def _name_model(manifest: dict) -> str:
    weights = manifest["weights"]
    return _plain(f"{manifest['source'] or manifest['model']}" + (f" ({weights[:8]})" if weights else ""))


def _curve(results: list[dict]) -> tuple[float, ...]:
    """pass@1 to pass@n, where n is the smallest number of samples of a task."""
    samples, passed = Counter(), Counter()
    for result in results:
        samples[result["task_id"]] += 1
        passed[result["task_id"]] += result["verdict"] == "pass"
    kinds = Counter((count, passed[task_id]) for task_id, count in samples.items())
    return tuple(sum(tasks * pass_at_k(count, right, k) for (count, right), tasks in kinds.items()) / len(samples)
                 for k in range(1, min(samples.values()) + 1))


def _number(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _plain(text: str) -> str:
    """One line of printable characters."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def _compare(runs: list[Run]) -> list[Comparison]:
    known = json.loads(Path(__file__).with_name("published.json").read_text())
    by_task = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_task[run.task][json.dumps(run.question, sort_keys=True)].append(run)
    comparisons = []
    for task, questions in sorted(by_task.items()):
        parts = sorted(questions.values(), key=lambda part: -part[0].question["tasks"])
        apart = _differences(part[0].question for part in parts)
        for number, part in enumerate(parts, start=1):
            part.sort(key=lambda run: -next(iter(run.scores.values())).value)
            warnings, notes, published = [], [], []
            if apart:
                warnings.append(f"Not to be compared with the other tables of {task}, because they differ in {apart}.")
            if ways := _differences(run.method for run in part):
                warnings.append(f"These runs differ in {ways}: their scores reflect that, not the model alone.")
            if task in known["tasks"]:
                entry = known["tasks"][task]
                if part[0].question["tasks"] == entry["tasks"]:
                    published = [Published(method=row["method"], how=row["how"], source=row["source"], scores={
                        metric: Score(percent / 100) for metric, percent in row["percent"][task].items()})
                        for row in known["rows"] if task in row["percent"]]
                    notes += [entry["note"]] if "note" in entry else []
                else:
                    notes.append(f"The published rows are of {entry['tasks']} tasks and not shown beside "
                                 f"{part[0].question['tasks']}.")
            comparisons.append(Comparison(
                title=f"{task}, table {number} of {len(parts)}" if apart else task, runs=part, published=published,
                warnings=warnings, notes=notes))
    return comparisons


def _differences(settings: Iterable[Mapping]) -> str:
    """The settings that differ, with their values: 'steps (64, 128), top_k (none, 200)'."""
    settings = list(settings)
    told = []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = list(dict.fromkeys(_show(one.get(key)) for one in settings))
        if len(values) > 1:
            told.append(f"{key} ({', '.join(values[:4])}{', ...' * (len(values) > 4)})")
    return _plain(", ".join(told))


def _show(value) -> str:
    if value is None or value == []:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def to_markdown(board: Board) -> str:
    text = "# Scoreboard\n"
    for table in board.comparisons:
        text += f"\n## {_escape(table.title)}\n\n{_row(table.columns)}{_row(['---'] * len(table.columns))}"
        for cells in to_cells(table):
            text += _row(map(_escape, cells))
        text += f"\n{unit_of(table)}\n"
        text += "".join(f"\n**Warning.** {_escape(warning)}\n" for warning in table.warnings)
        text += "".join(f"\n{_escape(note)}\n" for note in table.notes)
    if board.problems:
        text += "\n## Not shown\n\n" + "".join(f"- {_escape(problem)}\n" for problem in board.problems)
    return text


def to_cells(table: Comparison) -> list[list[str]]:
    """The rows of the table, runs by number and published results by letter."""
    rows = []
    for number, run in enumerate(table.runs, start=1):
        scores = [show_score(run.scores.get(metric), run.shares) for metric in table.metrics]
        speed = ["" if run.tokens_per_forward is None else f"{run.tokens_per_forward:.2f}",
                 "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"]
        rows.append([str(number), run.name, run.model, *scores, *speed, run.told])
    for number, row in enumerate(table.published):
        scores = [show_score(row.scores.get(metric), True) for metric in table.metrics]
        how = "; ".join(filter(None, (row.how, row.source)))
        rows.append([letter(number), "published", row.method, *scores, "", "", how])
    return rows


def letter(number: int) -> str:
    return chr(ord("A") + number)


def unit_of(table: Comparison) -> str:
    start = "Scores in percent" if table.runs[0].shares else "Scores as lm-eval gives them"
    published = " Published rows are as their source states them." if table.published else ""
    return f"{start}, with 95% intervals over the tasks.{published}"


def show_score(score: Score | None, shares: bool) -> str:
    if score is None:
        return ""
    factor, form = (100, ".1f") if shares else (1, ".4g")
    text = format(factor * score.value, form)
    return text if score.low is None else f"{text} [{factor * score.low:{form}}, {factor * score.high:{form}}]"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + letter if letter in "\\|`*" else letter for letter in text)
