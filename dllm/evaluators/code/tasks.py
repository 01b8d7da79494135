"""The code benchmarks: their published data, read into one kind of task.

A program is prompt + completion + suffix, joined as the benchmark does, followed by the tests. The data is a file, a
folder that has it under its published name, or a repository of the Hugging Face hub.
"""

import ast
import gzip
import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm.errors import UserError, first_line


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    task_id: str
    prompt: str
    canonical: str  # the completion that the benchmark gives
    tests: str  # follow the program on a new line, and raise if it is wrong
    names: tuple[str, ...]  # functions of the program that the tests call
    suffix: str = ""
    text: str = ""  # MBPP: description of the function
    asserts: tuple[str, ...] = ()  # MBPP: tests that the model sees
    join: str = ""  # separates prompt, completion and suffix
    # HumanEval+ and MBPP+ have lists of arguments instead of tests.
    base_input: tuple = ()
    plus_input: tuple = ()
    atol: float = 0.0

    def program(self, completion: str) -> str:
        return self.join.join((self.prompt, completion, self.suffix))


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSet:
    name: str
    tasks: Mapping[str, Task]
    source: str  # path, or hub repository
    md5: str  # hash of the uncompressed data, as EvalPlus reports it
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    read: Callable[[dict], Task]
    files: tuple[str, ...]  # possible names of the data, without .gz
    hub: str | None = None  # repository of the hub
    parquet: str = "*.parquet"  # files in that repository
    origin: str = ""  # source of the data, if not the hub
    keep: Callable[[str], bool] = lambda task_id: True
    seconds: float = 3.0  # CPU seconds of a program, or for EvalPlus of a call
    plus: bool = False  # lists of arguments, and the rules of EvalPlus
    infills: bool = False  # the answer fills a gap, instead of ending a text


def _read_humaneval(row: dict) -> Task:
    entry_point = row["entry_point"]
    return Task(task_id=row["task_id"], prompt=row["prompt"], suffix=row.get("suffix", ""),
                canonical=row["canonical_solution"], names=(entry_point,),
                tests=f"{row['test']}\ncheck({entry_point})")


def _read_mbpp(row: dict) -> Task:
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    tests = "\n".join((setup, *row["test_list"]))
    with warnings.catch_warnings(action="ignore"):  # about escapes in regular expressions
        code, asserts = (ast.parse(text) for text in (row["code"], "\n".join(row["test_list"])))
    defined = {node.name for node in code.body if isinstance(node, ast.FunctionDef)}
    used = [node.id for node in ast.walk(asserts) if isinstance(node, ast.Name)]
    return Task(task_id=str(row["task_id"]), prompt="", canonical=row["code"], tests=tests, text=row.get("text", ""),
                asserts=tuple(row["test_list"]),
                names=tuple(name for name in dict.fromkeys(used) if name in defined))


def _read_plus(row: dict) -> Task:
    task_id, entry_point = row["task_id"], row["entry_point"]
    convert = _MBPP_INPUTS.get(int(task_id.rpartition("/")[2]), list) if task_id.startswith("Mbpp/") else list
    base, plus = (tuple(convert(inputs) for inputs in row[f"{kind}_input"] or ()) for kind in ("base", "plus"))
    # A solution of MBPP+ is a whole program; its prompt is a comment before it.
    return Task(task_id=task_id, prompt=row["prompt"], canonical=row["canonical_solution"], tests="",
                names=(entry_point,), base_input=base, plus_input=plus, atol=row["atol"])


def _read_santacoder(row: dict) -> Task:
    return Task(task_id=row["name"], prompt=row["prompt"], suffix=row["suffix"], join="\n",
                canonical=row["canonical_solution"], tests=row["tests"],
                names=(re.search(r"\bcheck\((\w+)\)\s*\n\s*test_check\(\)\s*$", row["tests"])[1],))


# MBPP+ is JSON, which has no tuples, sets or complex numbers: conversions of the arguments of a call, by task.


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _deep(value):
    return tuple(map(_deep, value)) if isinstance(value, list) else value


def _first(change: Callable) -> Callable:
    return lambda inputs: [change(inputs[0]), *inputs[1:]]


_CONVERSIONS = [
    ((2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809),
     lambda inputs: [tuple(value) for value in inputs]),
    ((63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780),
     lambda inputs: [[tuple(item) for item in value] for value in inputs]),
    ((75, 413, 444, 753), _first(lambda value: [tuple(item) for item in value])),
    ((106, 750), lambda inputs: [inputs[0], tuple(inputs[1])]),
    ((115,), lambda inputs: [[set(item) if isinstance(item, list) and item else {} for item in inputs[0]]]),
    ((124,), lambda inputs: [float(inputs[0]), complex(inputs[1])]),
    ((250, 307, 405, 446, 617, 720, 763, 808), _first(tuple)),
    ((252,), lambda inputs: [complex(inputs[0])]),
    ((259, 401, 445), lambda inputs: [tuple(tuple(item) for item in value) for value in inputs]),
    ((278,), lambda inputs: [tuple(map(_tuple, inputs[0]))]),
    ((722,), _first(lambda value: {key: tuple(item) for key, item in value.items()})),
    ((580, 615, 791), lambda inputs: list(map(_deep, inputs))),
]
_MBPP_INPUTS = {task: change for tasks, change in _CONVERSIONS for task in tasks}


def _infilling(subset: str) -> Benchmark:
    return Benchmark(read=_read_humaneval, files=(f"HumanEval-{subset}Infilling.jsonl",), infills=True,
                     origin="github.com/openai/human-eval-infilling")


BENCHMARKS: dict[str, Benchmark] = {
    "humaneval": Benchmark(read=_read_humaneval, files=("HumanEval.jsonl",), hub="openai/openai_humaneval"),
    "humaneval_plus": Benchmark(read=_read_plus, files=("HumanEvalPlus.jsonl",), seconds=4.0, plus=True,
                                origin="github.com/evalplus/humanevalplus_release"),
    "mbpp": Benchmark(read=_read_mbpp, files=("mbpp.jsonl",), hub="google-research-datasets/mbpp",
                      parquet="full/test-*.parquet", keep=lambda task_id: 11 <= int(task_id) <= 510),
    "mbpp_plus": Benchmark(read=_read_plus, files=("MbppPlus.jsonl",), seconds=4.0, plus=True,
                           origin="github.com/evalplus/mbppplus_release"),
    "humaneval_infill": _infilling("SingleLine"),
    "humaneval_infill_single_line": _infilling("SingleLine"),
    "humaneval_infill_multi_line": _infilling("MultiLine"),
    "humaneval_infill_random_span": _infilling("RandomSpan"),
    "santacoder_fim": Benchmark(read=_read_santacoder, files=("santacoder_fim_py.jsonl", "train.parquet"),
                                hub="bigcode/santacoder-fim-task", infills=True),
}


def read_tasks(name: str, data: str | None = None, every_row: bool = False) -> TaskSet:
    """The tasks of a benchmark.

    Args:
        data: a file, a folder that has it (or a folder in it), or a hub repository as owner/name; None takes the
            benchmark's own repository.
        every_row: also tasks outside the test split of the benchmark (MBPP: ids 11 to 510).
    Raises: UserError if there is no such data, or it belongs to another benchmark.
    """
    if name not in BENCHMARKS:
        raise UserError(f"there is no task {name!r}; the tasks are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    path = _find(name, benchmark, data)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; give the data of {name}") from None
    tasks = {}
    for number, row in enumerate(_rows(path, content), start=1):
        try:
            if row.get("language", "py") != "py":  # SantaCoder-FIM has other languages too
                continue
            task = benchmark.read(row)
        except (KeyError, TypeError, ValueError, AttributeError, SyntaxError) as error:
            raise UserError(f"{path}: row {number} is no task of {name} ({type(error).__name__}: {error}); "
                            f"its file is {' or '.join(benchmark.files)}") from None
        if every_row or benchmark.keep(task.task_id):
            tasks[task.task_id] = task
    if not tasks:
        raise UserError(f"{path} has no task of {name}; its file is {' or '.join(benchmark.files)}")
    return TaskSet(name=name, tasks=tasks, source=str(data or benchmark.hub), md5=hashlib.md5(content).hexdigest(),
                   sha256=hashlib.sha256(content).hexdigest())


def _find(name: str, benchmark: Benchmark, data: str | None) -> Path:
    wanted = [file + ending for file in benchmark.files for ending in ("", ".gz")]
    source = data or benchmark.hub
    if source is None:
        raise UserError(f"the hub has no repository with all of {name}; get {benchmark.files[0]} of {benchmark.origin} "
                        "and name it with --data")
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        path = _download(source, benchmark, wanted)
    for file in wanted:
        for found in (path / file, *sorted(path.glob(f"*/{file}"))):
            if found.is_file():
                return found
    parquet = sorted(path.rglob(benchmark.parquet))
    if len(parquet) != 1:
        raise UserError(f"{source} has neither {' nor '.join(wanted)} nor one file {benchmark.parquet}; "
                        "name the file itself with --data")
    return parquet[0]


def _download(source: str, benchmark: Benchmark, wanted: list[str]) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source} does not exist; give a file, a folder, or a hub repository as owner/name")
    from huggingface_hub import snapshot_download

    patterns = [benchmark.parquet, f"*/{benchmark.parquet}", *wanted, *(f"*/{file}" for file in wanted)]
    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen kinds; all mean that the data is unavailable
        reason = first_line(error)
        raise UserError(f"{source} is neither here nor a repository of data that can be reached ({reason}); "
                        "name a file with --data") from error


def _rows(path: Path, content: bytes) -> Iterator[dict]:
    if path.suffix == ".parquet":
        import io

        import pyarrow
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not Parquet ({first_line(error)[:60]})") from None
        return
    try:
        text = content.decode("utf-8")
        if path.name.removesuffix(".gz").endswith(".json"):  # one list
            yield from json.loads(text)
        else:
            yield from (json.loads(line) for line in text.split("\n") if line.strip())
    except ValueError as error:
        raise UserError(f"{path} is not JSON lines ({error})") from None
