"""Generates a model's samples of a code benchmark and has them scored: a run, in a folder.

    manifest.json   what was asked of what: hashes of weights, tokenizer and data, settings, versions
    part-<rank>.jsonl  what each process has written so far, a batch at a time
    samples.jsonl   all of it, as `dllm score` reads it
    results.json    the score, with intervals, counts, speed, and the verdict on every sample

Samples are generated in batches that settings and data alone determine, and a sample's random numbers depend on the
seed, its task and its number. So a killed run that is started again makes the very samples that it would have made, and
so do several processes (torchrun), which share the batches.
"""

import hashlib
import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dllm
from dllm.checkpoint import write_atomically, write_json
from dllm.errors import UserError
from dllm.evaluators.presets import CODE_STOPS, LENGTHS, MBPP_STOPS, PRESETS, Preset
from dllm.evaluators.sandbox import Sandbox
from dllm.evaluators.scoring import RunningScore, check_sandbox, score_samples
from dllm.evaluators.tasks import BENCHMARKS, Task, TaskSet
from dllm.model import DiffusionLM
from dllm.sampler import MDMGenerationConfig, denoise, find_mask_token
from dllm.tokenizer import cut_at_end, decode_after, encode

# What must be the same for a run to continue, by its name in the manifest.
_SAME = ("task", "preset", "model", "weights", "tokenizer", "data", "generation", "samples", "length", "stops",
         "batch_size", "tasks", "dtype")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """What is asked of the model. `preset` is a key of PRESETS; what is None is the preset's."""

    preset: str = "open_dllm"
    samples: int | None = None  # of each task
    length: int | str | None = None  # of a gap, see `Preset`
    generation: dict | None = None  # fields of MDMGenerationConfig, over the preset's
    seed: int = 0
    batch_size: int = 16  # sequences denoised together
    limit: int | None = None  # the first so many tasks

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise UserError(f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")
        for name in ("samples", "batch_size", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        fixed = isinstance(self.length, int) and self.length >= 1
        if self.length is not None and not fixed and self.length not in ("oracle", "average", "auto"):
            raise UserError(f"length must be a number of tokens, oracle, average or auto, not {self.length!r}")

    def resolve(self, infills: bool) -> tuple[Preset, MDMGenerationConfig]:
        preset = PRESETS[self.preset]["infill" if infills else "completion"]
        if not infills and self.length is not None:
            raise UserError("length is for tasks with a gap; give max_new_tokens")
        length = preset.length if self.length is None else self.length
        preset = replace(preset, samples=self.samples or preset.samples, length=length if infills else None)
        return preset, MDMGenerationConfig(**{**preset.generation, **(self.generation or {}), "seed": self.seed})


class Item(NamedTuple):
    """A sample to generate: tokens before and after a gap of `length` masked positions."""

    task: Task
    sample: int
    before: Tensor  # [P] int64
    after: Tensor  # [S]
    length: int

    @property
    def key(self) -> tuple[str, int]:
        return self.task.task_id, self.sample


def generate_samples(model: DiffusionLM, tokenizer, tasks: TaskSet, folder: str | Path, settings: RunSettings,
                     source: Path | None = None, progress=None, **scoring) -> dict:
    """Generate what is missing of a run in `folder`, then score it.

    Args:
        source: the model's folder, whose weights the manifest has a hash of.
        progress: called with the number of samples there are, of all, and the share that passes so far, or None.
        scoring: as `score_samples` takes it.
    Returns: the record of results.json, in process 0 of several; in the others only {}.
    Raises: UserError if the folder has another run, or a prompt does not fit the model.
    """
    folder = Path(folder)
    infills = BENCHMARKS[tasks.name].infills
    preset, config = settings.resolve(infills)
    chosen = list(tasks.tasks.values())[:settings.limit]
    batches = make_batches(model, tokenizer, tasks.name, chosen, preset, config, settings.batch_size)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    manifest = describe(model, tokenizer, tasks, settings, preset, config, source, len(chosen))
    check_same_run(folder, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_json(folder / "manifest.json", manifest)
    check_sandbox(Sandbox, scoring.get("require", "best"), lambda text: None)  # to refuse now; scoring warns
    total = sum(map(len, batches))
    done = {(row["task_id"], row["sample"]) for row in read_parts(folder)}
    with ExitStack() as stack:
        shares = None if progress is None else stack.enter_context(RunningScore(tasks, scoring.get("timeout")))
        for number, batch in enumerate(batches):
            wanted = [item for item in batch if item.key not in done]
            if number % world == rank and wanted:
                rows = denoise_batch(model, tokenizer, batch, tasks.name, config, number)
                rows = [row for row in rows if (row["task_id"], row["sample"]) not in done]
                append(folder / f"part-{rank}.jsonl", rows)
                done |= {item.key for item in batch}
                if progress is not None:
                    shares.add(rows)
                    progress(sum(path.read_bytes().count(b"\n") for path in folder.glob("part-*.jsonl")), total,
                             shares.share)
    if world > 1:
        wait_for_all(folder, {item.key for batch in batches for item in batch})
    if rank != 0:
        return {}
    place = {task.task_id: i for i, task in enumerate(chosen)}
    rows = sorted(read_parts(folder), key=lambda row: (place[row["task_id"]], row["sample"]))
    write_atomically(folder / "samples.jsonl", b"".join(_line(row) for row in rows))
    part = replace(tasks, tasks={task.task_id: task for task in chosen})
    record = score_samples(folder / "samples.jsonl", part, **scoring)
    record |= {"preset": settings.preset, "unfilled_tokens": sum(row["unfilled"] for row in rows),
               "speed": speed_of(rows), "manifest": manifest}
    if preset.length == "average":
        passed = {line["line"]: line["verdict"] == "pass" for line in record["results"]}
        record["pass@1_by_length"] = {
            str(length): sum(passed[i] for i, row in enumerate(rows, 1) if row["length"] == length) / len(chosen)
            for length in LENGTHS}
    write_json(folder / "results.json", record)
    return record


def make_batches(model: DiffusionLM, tokenizer, name: str, tasks: Sequence[Task], preset: Preset,
                 config: MDMGenerationConfig, batch_size: int) -> list[list[Item]]:
    """Every sample of every task, those of similar length together."""
    items, infills = [], BENCHMARKS[name].infills
    for task in tasks:
        before, after = frame(tokenizer, *texts_around(name, task), preset.framed)
        if not infills:
            lengths = [config.max_new_tokens]
        elif preset.length == "oracle":
            lengths = [max(1, len(encode(tokenizer, task.canonical)))]
        elif preset.length == "auto":  # gaps that grow begin small; for the others 0: each batch chooses
            lengths = [0 if config.expand_token_id is None else min(config.infill_lengths)]
        else:
            lengths = LENGTHS if preset.length == "average" else [preset.length]
        for sample, length in enumerate([length for length in lengths for _ in range(preset.samples)]):
            longest = max(length, config.max_infill_length if infills else 0)
            items.append(Item(task, sample, *fit(model, before, after, longest, preset.context, task), length))
    items.sort(key=lambda item: -(len(item.before) + len(item.after) + item.length))
    return [items[start:start + batch_size] for start in range(0, len(items), batch_size)]


def texts_around(name: str, task: Task) -> tuple[str, str]:
    """What the model is given before and after its answer."""
    if name == "mbpp":  # Open-dLLM's; there is no line's end before the fence
        return f"{task.text} Your code should pass these tests:\n\n" + "\n".join(task.asserts) + "```python\n", ""
    if name == "santacoder_fim":  # DreamOn's and Open-dLLM's: one line's end more, and none before the suffix
        return task.prompt + "\n", task.suffix
    return task.prompt, task.suffix


def frame(tokenizer, before: str, after: str, framed: bool) -> tuple[Tensor, Tensor]:
    """Tokens of both, each by itself: a joint tokenization would move the gap's edges."""
    ids = encode(tokenizer, before), encode(tokenizer, after)
    if not framed:
        return ids
    start, end = (torch.tensor([] if token is None else [token], dtype=torch.long)
                  for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    return torch.cat((start, ids[0])), torch.cat((ids[1], end))


def fit(model: DiffusionLM, before: Tensor, after: Tensor, length: int, context: int,
        task: Task) -> tuple[Tensor, Tensor]:
    """Cut what is furthest from the gap, so that all has room."""
    room = min(context, model.config.max_position_embeddings - length)
    if room < 2:
        raise UserError(f"{length} tokens to fill in leave no room for task {task.task_id}: the model has "
                        f"{model.config.max_position_embeddings} positions; lower max_new_tokens or the length")
    over = max(0, len(before) + len(after) - room)
    cut = min(over, max(0, len(before) - room // 2))
    before = before[cut:]
    return before, after[:len(after) - (over - cut)]


def denoise_batch(model: DiffusionLM, tokenizer, batch: Sequence[Item], name: str, config: MDMGenerationConfig,
                  number: int) -> list[dict]:
    """The lines of samples.jsonl of a batch."""
    mask_token_id = find_mask_token(model, config)
    sequence = torch.tensor([zlib.crc32(f"{item.task.task_id} {item.sample}".encode()) for item in batch])
    start = time.perf_counter()
    lengths = [item.length for item in batch]
    if 0 in lengths:
        from dllm.lengths import choose_lengths

        lengths = [choose_lengths(model, item.before.unsqueeze(0), item.after.unsqueeze(0), config)[0]
                   for item in batch]
    rows = [torch.cat((item.before, torch.full((length,), mask_token_id), item.after))
            for item, length in zip(batch, lengths, strict=True)]
    canvas = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    visible = torch.arange(canvas.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    out = denoise(model, canvas, config, visible, sequence=sequence)
    sequences = out.sequences.cpu()
    if out.attention_mask is not None:
        visible = out.attention_mask.cpu()
    seconds, lines = time.perf_counter() - start, []
    for item, length, row, real in zip(batch, lengths, sequences, visible, strict=True):
        row = row[real]
        answer = row[len(item.before):len(row) - len(item.after)]
        lines.append({
            "task_id": item.task.task_id, "sample": item.sample, "length": length,
            "completion": finish_text(name, decode_after(tokenizer, item.before, cut_at_end(tokenizer, answer))),
            "tokens": len(answer), "unfilled": int((answer == mask_token_id).sum()),
            "batch": number, "rows": len(batch), "forwards": out.forwards, "seconds": round(seconds, 4)})
    return lines


def finish_text(name: str, text: str) -> str:
    """The answer without what follows it. A gap's is left as it is: blanks and lines' ends belong to it."""
    for stop in stops_of(name):
        text = text.split(stop)[0]
    return text.replace("```", "").strip() if name == "mbpp" else text


def stops_of(name: str) -> tuple[str, ...]:
    """What an answer is cut at; nothing for gaps, and for lm-eval's tasks, which have stops of their own."""
    if name not in BENCHMARKS or BENCHMARKS[name].infills:
        return ()
    return MBPP_STOPS if name.startswith("mbpp") else CODE_STOPS


def speed_of(rows: list[dict]) -> dict:
    batches = {row["batch"]: row for row in rows}.values()
    forwards, seconds = sum(row["forwards"] for row in batches), sum(row["seconds"] for row in batches)
    row_forwards = sum(row["forwards"] * row["rows"] for row in batches)
    tokens = sum(row["tokens"] for row in rows)
    return {"tokens": tokens, "forwards": forwards, "seconds": round(seconds, 2),
            "tokens_per_forward": tokens / max(row_forwards, 1), "tokens_per_second": tokens / max(seconds, 1e-9)}


def describe(model: DiffusionLM, tokenizer, tasks: TaskSet, settings: RunSettings, preset: Preset,
             config: MDMGenerationConfig, source: Path | None, count: int) -> dict:
    """All that a score depends on, and where it was made."""
    return {
        "task": tasks.name, "preset": settings.preset,
        "data": {"source": tasks.source, "md5": tasks.md5, "sha256": tasks.sha256},
        "generation": asdict(config), "samples": preset.samples, "length": preset.length,
        "stops": stops_of(tasks.name), "batch_size": settings.batch_size, "tasks": count,
        **describe_model(model, tokenizer, source)}


def describe_model(model: DiffusionLM, tokenizer, source: Path | None) -> dict:
    """Of a manifest: hashes, what computes, and when. source: the model's folder."""
    import transformers

    weight = next(model.parameters())
    return {
        "model": model.config.family, "source": None if source is None else Path(source).name,
        "weights": None if source is None else hash_files(sorted(Path(source).glob("*.safetensors"))),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "dtype": str(weight.dtype),
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else "cpu",
        "machine": platform.platform(),
        "versions": {"dllm": dllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def check_same_run(folder: Path, manifest: dict) -> None:
    """Raises: UserError if the folder has samples of a run that asked for something else."""
    path = folder / "manifest.json"
    if not path.is_file():
        return
    try:
        recorded = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no manifest ({error}); take the folder away, or name another") from None
    ours = json.loads(json.dumps(manifest))
    for name in _SAME:
        was, now = recorded.get(name), ours[name]
        if name == "data":  # wherever it lies
            was, now = ({"sha256": data["sha256"]} if isinstance(data, dict) and "sha256" in data else data
                        for data in (was, now))
        if was != now:
            key = ""
            if isinstance(was, dict) and isinstance(now, dict):
                key = next(key for key in {**was, **now} if was.get(key) != now.get(key))
                was, now, key = was.get(key), now.get(key), f"{key} "
            raise UserError(f"{folder} has a run with another {name} ({key}{json.dumps(was)[:100]}, now "
                            f"{json.dumps(now)[:100]}); name another folder, or give the same settings to continue it")


def read_parts(folder: Path) -> list[dict]:
    """The samples that all processes have written; what a kill has torn off is not counted.

    Raises: UserError if a line is none of theirs.
    """
    rows = {}
    for path in sorted(folder.glob("part-*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                rows[row["task_id"], row["sample"]] = row
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}: line {number} is no sample of this run ({type(error).__name__}); take the "
                                "line out, and it is generated again") from None
    return list(rows.values())


def append(path: Path, rows: list[dict]) -> None:
    """Add lines to a file, after what is whole of it, and see them on the disk."""
    with open(path, "ab") as file:
        torn = path.read_bytes()
        file.truncate(torn.rfind(b"\n") + 1)
        file.write(b"".join(map(_line, rows)))
        file.flush()
        os.fsync(file.fileno())


def wait_for_all(folder: Path, wanted: set, patience: float = 24 * 3600.0) -> None:
    """Until every process's samples are in the folder, which all of them see."""
    start = time.monotonic()
    while not wanted <= {(row["task_id"], row["sample"]) for row in read_parts(folder)}:
        if time.monotonic() - start > patience:
            raise UserError(f"{folder} has not all samples after {patience:g} s; start the same command again")
        time.sleep(1.0)


def _line(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()


def bar(name: str):
    """A progress bar on stderr, as `generate_samples` calls it; process 0 of several has one, for all of them."""
    from tqdm import tqdm

    if os.environ.get("RANK", "0") != "0":
        return None
    shown = tqdm(desc=name, unit="sample", disable=None, file=sys.stderr)

    def progress(done: int, total: int, share: float | None) -> None:
        shown.total = total
        if share is not None:
            shown.set_postfix(passed=f"{share:.3f}", refresh=False)
        shown.update(done - shown.n)

    return progress
