"""Evaluation during training: `dllm eval` in its own process, so that training imports no evaluator."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_OF_THE_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
                    "MASTER_PORT", "ROLE_WORLD_SIZE")


def evaluate_checkpoint(tasks: Sequence[Sequence[str]], checkpoint: Path, folder: Path) -> dict[str, float]:
    """Measure a model folder on each task. `folder` gets the results, one folder or file per task.

    Args:
        tasks: for each task the words after `dllm eval`.
    Returns: "<task>/<score>" -> number. A task that fails is a line on stderr, and training continues.
    """
    environment = {name: value for name, value in os.environ.items()
                   if name not in _OF_THE_LAUNCHER and not name.startswith("TORCHELASTIC")}
    scores: dict[str, float] = {}
    for task, *flags in tasks:
        folder.mkdir(parents=True, exist_ok=True)
        where = (["--output", str(folder / f"{task}.json")] if task in ("perplexity", "masked_accuracy", "infill") else
                 ["--output-dir", str(folder / task)])
        done = subprocess.run([sys.executable, "-m", "dllm", "eval", task, str(checkpoint), *where, *flags],
                              env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            print(f"note: evaluation {task} of {checkpoint.parent.name} failed: {reason.removeprefix('dllm: error: ')}",
                  file=sys.stderr)
            continue
        record = json.loads(done.stdout)
        record = record.get("result", record)
        scores |= {f"{task}/{name}": value for name, value in record.items() if isinstance(value, float)}
    return scores
