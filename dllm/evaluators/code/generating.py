"""Generate and score a model's samples of a code benchmark: a run in a folder (see evaluators/runs.py).

    samples.jsonl  all samples, as `dllm score` reads them
    results.json   the score, with intervals, counts, speed, and the verdict on every sample

Settings and data alone determine the batches, and the random numbers of a sample depend on the seed, its task and its
number. So a killed run that is started again makes the same samples, and so do several processes (torchrun), which
share the batches.
"""

import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dllm.errors import UserError
from dllm.evaluators.code.presets import CODE_STOPS, LENGTHS, MBPP_STOPS, Preset
from dllm.evaluators.code.scoring import score_samples
from dllm.evaluators.code.tasks import BENCHMARKS, Task, TaskSet
from dllm.evaluators.code.verdicts import RunningScore, check_sandbox
from dllm.evaluators.runs import (
    append_samples,
    check_continues,
    count_samples,
    identify_model,
    key_of,
    read_parts,
    to_lines,
    wait_for_all,
)
from dllm.evaluators.sandbox.host import Sandbox
from dllm.evaluators.settings import RunSettings
from dllm.files import own_folder, write_atomically, write_json
from dllm.generation.checks import find_mask_token
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import Gap, fill
from dllm.model.tokenizer import begin_text, cut_at_end, decode_after, encode
from dllm.model.transformer import Transformer

Progress = Callable[[int, int, float | None], None]


class Item(NamedTuple):
    task: Task
    sample: int
    gap: Gap

    @property
    def key(self) -> tuple[str, int]:
        return self.task.task_id, self.sample

    @property
    def size(self) -> int:
        """Positions, without those of a gap of unknown length."""
        length = 0 if self.gap.length == "auto" else self.gap.length
        return len(self.gap.prefix) + len(self.gap.suffix) + length


def generate_samples(model: Transformer, tokenizer, tasks: TaskSet, folder: str | Path, settings: RunSettings,
                     source: Path | None = None, progress: Progress | None = None, **scoring) -> dict:
    """Generate the samples that the run in `folder` lacks, then score it.

    Args:
        source: the model's folder; its weights are hashed into the manifest.
        progress: called with the number of finished samples, of all samples, and the share that passes so far (or
            None).
        scoring: arguments of `score_samples`.
    Returns: the record of results.json, in process 0 of several; in the others only {}.
    Raises: UserError if the folder has another run, or a prompt does not fit the model.
    """
    folder = Path(folder)
    preset, config = settings.resolve(BENCHMARKS[tasks.name].infills)
    tasks = replace(tasks, tasks=dict(list(tasks.tasks.items())[:settings.limit]))
    items = make_items(model, tokenizer, tasks, preset, config)
    batches = [items[start:start + settings.batch_size] for start in range(0, len(items), settings.batch_size)]
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    manifest = make_manifest(model, tokenizer, tasks, settings, preset, config, source)
    with own_folder(folder, rank):
        check_continues(folder, manifest)
        if rank == 0:
            write_json(folder / "manifest.json", manifest)
        check_sandbox(Sandbox, scoring.get("require", "best"), lambda text: None)  # refuses now; scoring warns
        done = set(map(key_of, read_parts(folder)))
        with ExitStack() as stack:
            score = None if progress is None else stack.enter_context(RunningScore(tasks, scoring.get("timeout")))
            for number, batch in enumerate(batches):
                if number % world != rank or all(item.key in done for item in batch):
                    continue
                rows = denoise_batch(model, tokenizer, batch, tasks.name, config, number)
                rows = [row for row in rows if key_of(row) not in done]
                append_samples(folder / f"part-{rank}.jsonl", rows)
                if progress is not None:
                    score.add(rows)
                    progress(count_samples(folder), len(items), score.share)
        if world > 1:
            wait_for_all(folder, {item.key for item in items})
        return score_run(folder, tasks, settings, preset, manifest, **scoring) if rank == 0 else {}


def score_run(folder: Path, tasks: TaskSet, settings: RunSettings, preset: Preset, manifest: dict, **scoring) -> dict:
    """Write samples.jsonl and results.json of a complete run. Returns the record of results.json."""
    place = {task_id: i for i, task_id in enumerate(tasks.tasks)}
    rows = sorted(read_parts(folder), key=lambda row: (place[row["task_id"]], row["sample"]))
    write_atomically(folder / "samples.jsonl", to_lines(rows))
    record = score_samples(folder / "samples.jsonl", tasks, **scoring)
    record |= {"preset": settings.preset, "unfilled_tokens": sum(row["unfilled"] for row in rows),
               "speed": measure_speed(rows), "manifest": manifest}
    if preset.length == "average":
        passed = {line["line"]: line["verdict"] == "pass" for line in record["results"]}
        record["pass@1_by_length"] = {
            str(length): sum(passed[i] for i, row in enumerate(rows, 1) if row["length"] == length) / len(place)
            for length in LENGTHS}
    write_json(folder / "results.json", record)
    return record


def make_items(model: Transformer, tokenizer, tasks: TaskSet, preset: Preset,
               config: MDMGenerationConfig) -> list[Item]:
    """Every sample of every task, the longest first, so that a batch has samples of similar length."""
    items, infills = [], BENCHMARKS[tasks.name].infills
    for task in tasks.tasks.values():
        before, after = frame(tokenizer, *texts_around(tasks.name, task), preset.framed)
        before = begin_text(tokenizer, before)
        if not infills:
            lengths = [config.max_new_tokens]
        elif preset.length == "oracle":
            lengths = [max(1, len(encode(tokenizer, task.canonical, after=True)))]
        else:
            lengths = LENGTHS if preset.length == "average" else [preset.length]
        for sample, length in enumerate([length for length in lengths for _ in range(preset.samples)]):
            longest = max(max(config.infill_lengths) if length == "auto" else length,
                          config.max_infill_length if infills else 0)
            gap = Gap(*fit(model, before, after, longest, preset.context, task), length)
            items.append(Item(task, sample, gap))
    return sorted(items, key=lambda item: -item.size)


def texts_around(name: str, task: Task) -> tuple[str, str]:
    """The texts before and after the answer, as the model sees them."""
    if name == "mbpp":  # as in Open-dLLM, without a newline before the fence
        return f"{task.text} Your code should pass these tests:\n\n" + "\n".join(task.asserts) + "```python\n", ""
    if name == "santacoder_fim":  # as in DreamOn and Open-dLLM: a newline more, and none before the suffix
        return task.prompt + "\n", task.suffix
    return task.prompt, task.suffix


def frame(tokenizer, before: str, after: str, framed: bool) -> tuple[Tensor, Tensor]:
    """Tokens of both, encoded separately, because a joint tokenization would move the edges of the gap."""
    ids = encode(tokenizer, before), encode(tokenizer, after, after=True)
    if not framed:
        return ids
    start, end = (torch.tensor([] if token is None else [token], dtype=torch.long)
                  for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    return torch.cat((start, ids[0])), torch.cat((ids[1], end))


def fit(model: Transformer, before: Tensor, after: Tensor, length: int, context: int,
        task: Task) -> tuple[Tensor, Tensor]:
    """Cut the text that is furthest from the gap, so that the rest fits the model."""
    room = min(context, model.config.max_position_embeddings - length)
    if room < 2:
        raise UserError(f"{length} tokens to fill in leave no room for task {task.task_id}: the model has "
                        f"{model.config.max_position_embeddings} positions; lower max_new_tokens or the length")
    over = max(0, len(before) + len(after) - room)
    cut = min(over, max(0, len(before) - room // 2))
    before = before[cut:]
    return before, after[:len(after) - (over - cut)]


def denoise_batch(model: Transformer, tokenizer, batch: Sequence[Item], name: str, config: MDMGenerationConfig,
                  number: int) -> list[dict]:
    """The lines of samples.jsonl of a batch."""
    mask_token_id = find_mask_token(model, config)
    sequence = torch.tensor([zlib.crc32(f"{item.task.task_id} {item.sample}".encode()) for item in batch])
    start = time.perf_counter()
    gaps, answers, out = fill(model, [item.gap for item in batch], config, sequence=sequence)
    seconds, lines = time.perf_counter() - start, []
    for item, gap, answer in zip(batch, gaps, answers, strict=True):
        text = decode_after(tokenizer, gap.prefix, cut_at_end(tokenizer, answer))
        lines.append({
            "task_id": item.task.task_id, "sample": item.sample, "length": gap.length,
            "completion": finish_text(name, text),
            "tokens": len(answer), "unfilled": int((answer == mask_token_id).sum()),
            "batch": number, "rows": len(batch), "forwards": out.forwards, "seconds": round(seconds, 4)})
    return lines


def finish_text(name: str, text: str) -> str:
    """The answer up to its first stop. The answer in a gap stays as it is: its blanks and newlines count."""
    for stop in stops_of(name):
        text = text.split(stop)[0]
    return text.replace("```", "").strip() if name == "mbpp" else text


def stops_of(name: str) -> tuple[str, ...]:
    """The strings that end an answer; none for gaps, and for lm-eval's tasks, which have their own."""
    if name not in BENCHMARKS or BENCHMARKS[name].infills:
        return ()
    return MBPP_STOPS if name.startswith("mbpp") else CODE_STOPS


def measure_speed(rows: list[dict]) -> dict:
    batches = {row["batch"]: row for row in rows}.values()
    forwards, seconds = sum(row["forwards"] for row in batches), sum(row["seconds"] for row in batches)
    row_forwards = sum(row["forwards"] * row["rows"] for row in batches)
    tokens = sum(row["tokens"] for row in rows)
    return {"tokens": tokens, "forwards": forwards, "seconds": round(seconds, 2),
            "tokens_per_forward": tokens / max(row_forwards, 1), "tokens_per_second": tokens / max(seconds, 1e-9)}


def make_manifest(model: Transformer, tokenizer, tasks: TaskSet, settings: RunSettings, preset: Preset,
                  config: MDMGenerationConfig, source: Path | None) -> dict:
    """Everything on which a score depends, and the machine that made it."""
    return {
        "task": tasks.name, "preset": settings.preset,
        "data": {"source": tasks.source, "md5": tasks.md5, "sha256": tasks.sha256},
        "generation": asdict(config), "samples": preset.samples, "length": preset.length,
        "stops": stops_of(tasks.name), "batch_size": settings.batch_size, "tasks": len(tasks.tasks),
        **identify_model(model, tokenizer, source)}


def bar(name: str):
    """A progress bar on stderr for `generate_samples`; only process 0 of several has one."""
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
