"""The record of a run: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar; and the run's clock."""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from dllm.config.schema import Config
from dllm.errors import Failure, UserError, silence
from dllm.files import write_atomically
from dllm.training.distributed import World


class RunLog:
    """Writes metrics to JSONL, TensorBoard and W&B; no-op outside the main process.

    Lines that a killed run wrote after the step that training continues from are dropped.
    """

    def __init__(self, output: Path, step: int, config: Config, world: World):
        self.path, self.lines, self.main = output / "metrics.jsonl", [], world.main
        self._board = self._wandb = None
        if not world.main:
            return
        self.lines = read_lines(self.path, step)
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        if config.train.use_tensorboard:
            self._board = open_tensorboard(output / "tensorboard", step)
        if config.train.use_wandb:
            self._wandb = open_wandb(config, output)

    def append(self, line: dict) -> None:
        if not self.main:
            return
        self.lines.append(line)
        self._write(self.path, line)

    def add_scores(self, step: int, scores: dict[str, float]) -> None:
        """Write the scores of a checkpoint to evaluations.jsonl."""
        if self.main and scores:
            self._write(self.path.with_name("evaluations.jsonl"), {"step": step, **scores})

    def _write(self, path: Path, line: dict) -> None:
        try:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise Failure(f"cannot write {path}: {error.strerror}; free space, then start again") from error
        values = {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=line["step"])

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_lines(path: Path, step: int) -> list[dict]:
    """The lines of metrics.jsonl up to a step; none if there is no such file."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        if line["step"] <= step:
            lines.append(line)
    return lines


def open_tensorboard(folder: Path, step: int):
    """A writer that hides the events a killed run wrote after `step`; None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("note: no TensorBoard events are written: pip install tensorboard, or set train.use_tensorboard=false",
              file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def open_wandb(config: Config, output: Path):
    """Raises: UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("train.use_wandb needs Weights & Biases: pip install wandb, or set it to false") from None
    # The id is the name of the run, so a run that continues appends to itself.
    return wandb.init(project=config.train.wandb_project, name=config.train.wandb_name or output.name,
                      id=(config.train.wandb_name or output.name).replace("/", "-"), resume="allow",
                      config=config.to_dict(), dir=str(output))


class Clock:
    """Time spent training, over all restarts."""

    def __init__(self, seconds_before: float, max_minutes: float | None):
        self.start = time.monotonic() - seconds_before
        self.saved = self.ticked = time.monotonic()
        self.step_seconds = 0.0  # duration of the last step
        self.budget = None if max_minutes is None else 60 * max_minutes

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        """Share of the budget that is spent, in [0, 1]; 0 without a budget."""
        return 0.0 if self.budget is None else min(self.seconds / self.budget, 1.0)

    @property
    def expired(self) -> bool:
        return self.share >= 1

    def tick(self) -> None:
        now = time.monotonic()
        self.step_seconds, self.ticked = max(now - self.ticked, 1e-9), now

    def due(self, minutes: float) -> bool:
        """Whether another checkpoint is due; if so, the interval starts again."""
        if not minutes or time.monotonic() - self.saved < 60 * minutes:
            return False
        self.saved = time.monotonic()
        return True


class ProgressBar:
    """A progress bar on a terminal; elsewhere one line per measurement."""

    def __init__(self, step: int, total: int, clock: Clock, world: World):
        self.total, self.clock, self.main = total, clock, world.main
        self.bar = tqdm(total=1.0, initial=max(step / total, clock.share),
                        disable=not world.main or not sys.stderr.isatty(),
                        bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self, line: dict, tell: bool) -> None:
        """Update the bar. tell: also print a line."""
        if not self.main:
            return
        try:
            self._show(line, tell)
        except OSError:  # the terminal is closed, which is no reason to lose the run
            silence(1, 2)

    def _show(self, line: dict, tell: bool) -> None:
        self.bar.n = max(line["step"] / self.total, self.clock.share)
        self.bar.set_postfix_str(f"step {line['step']}/{self.total}, loss {line['loss']:.3f}, "
                                 f"{line['tokens_per_second']:,.0f} tokens/s")
        if tell:
            held_out = f", held out {line['validation_loss']:.3f}" if "validation_loss" in line else ""
            tqdm.write(f"step {line['step']}: loss {line['loss']:.3f}{held_out}, {line['tokens']:,} tokens, "
                       f"{line['seconds']:.0f} s", file=sys.stderr)
