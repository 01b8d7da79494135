"""Training, from a configuration to a checkpoint that others load: `train` opens a `Run` and takes its steps.

Every draw of a step is a function of the seed, the number of the step and the slot of the row, so a run that is killed
and started again has the same losses, bit for bit on a CPU. (With max_minutes the clock decides the learning rate, so
runs differ.) The same holds for several processes; another number of processes adds the same numbers in another order.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dllm.config.schema import Config, TrainGroup
from dllm.data import TrainingData
from dllm.diffusion.objectives import LossSums
from dllm.errors import Failure, UserError, silence
from dllm.files import own_folder
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.families import ModelConfig
from dllm.model.transformer import Transformer
from dllm.training.batches import MicroBatch, forward, make_batches, opened_share, share_positions
from dllm.training.build import build_teacher, check_apart, find_run, open_run
from dllm.training.checkpoint import Saver, load_state
from dllm.training.cost import count_copies, peak_flops, step_flops
from dllm.training.distributed import Shared, World, join
from dllm.training.evaluating import evaluate_checkpoint
from dllm.training.metrics import Clock, ProgressBar, RunLog
from dllm.training.optimizer import build_optimizers, clip_gradients, set_learning_rate
from dllm.training.precision import as_record, settle_precision
from dllm.training.validation import draw_validation, validate


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    output_dir: Path
    checkpoint: Path | None  # folder of the last checkpoint, for `DiffusionLM.from_pretrained` and Transformers
    steps: int
    finished: bool  # False: a signal came before the last step
    history: list[dict]  # the lines of metrics.jsonl; empty except in the main process


def train(config: Config) -> TrainResult:
    """Train as configured, continuing from the newest whole checkpoint in `config.train.output_dir` if there is one.

    Writes there: checkpoints/global_step_N/hf_ckpt, metrics.jsonl (one line per logged step; losses in nats, times in
    seconds) and config.yaml. Under torchrun, each process calls it.
    Raises: UserError for input that cannot work, or if another run owns the folder; Failure if the disk is full or the
        loss stays not finite.
    """
    with join(config.train) as world, ExitStack() as owned:
        check_apart(config)
        world.from_main(lambda: owned.enter_context(own_folder(Path(config.train.output_dir))))
        return Run(config, world).train()


class TrainingStep(nn.Module):
    """The model and its loss: the part of a step that one process computes."""

    def __init__(self, model: Transformer, world: World):
        super().__init__()
        self.model, self.world = model, world

    def forward(self, batch: MicroBatch, teacher: Transformer | None = None) -> LossSums:
        return forward(self.model, batch, self.world.device, teacher, self.world.sequence_group)


class Run:
    """A run in one process of its world, with its progress."""

    def __init__(self, config: Config, world: World):
        self.output, self.world = Path(config.train.output_dir), world
        self.resumed = world.from_main(lambda: find_run(config, self.output))
        self.tokenizer, self.model, self.data = open_run(config, self.resumed, world)
        config, found = settle_precision(config, self.model.config, self.resumed, world)
        self.config, self.settings = config, config.train
        self.probe = self.resumed.state.get("probe") if self.resumed else as_record(found)
        self.teacher = build_teacher(config, self.model.config.vocab_size, world)
        self.validation = draw_validation(self.data, config, self.model)
        self.total = count_steps(config, self.data)
        self.shared = self._share_model()
        self.optimizers = build_optimizers(self.model, self.settings)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        self.step = self.tokens = 0  # steps taken and tokens trained on, over all restarts
        self.skipped = self.bad = 0  # steps without an update: in the whole run, and since the last update
        self.rows: dict = {}  # state of the row source after the current step
        self.clock = Clock(self._restore(), self.settings.max_minutes)

    def _share_model(self) -> Shared:
        self.model.checkpointing = self.settings.enable_gradient_checkpointing
        layers = self.model.layers
        if not isinstance(self.model, DiffusionGemma):
            self.model.layers_backend = self.settings.layers_backend
        if self.settings.enable_compile:
            for layer in layers:
                layer.compile()
        return Shared(TrainingStep(self.model, self.world), layers, self.settings, self.world).train()

    def _restore(self) -> float:
        """Continue from the checkpoint, if there is one. Returns the seconds trained before."""
        if self.resumed is None:
            return 0.0
        state = self.resumed.state
        self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped"]
        load_state(self.resumed.folder, self.model, self.optimizers, self.world)
        self.data.rows.restore(state["rows"])
        return state["seconds"]

    def train(self) -> TrainResult:
        world = self.world
        if world.main:
            across = f" in each of {world.size} processes" if world.size > 1 else ""
            print(f"{self.data.describe()}; {self.model.count_parameters():,} parameters on {world.device}{across}, "
                  f"{self.settings.precision}",
                  file=sys.stderr)
        with ExitStack() as stack:
            self.log = stack.enter_context(RunLog(self.output, self.step, self.config, world))
            self.saver = stack.enter_context(Saver(self.output / "checkpoints", self.settings, world))
            self.stop = stack.enter_context(catch_stop())
            self.bar = stack.enter_context(ProgressBar(self.step, self.total, self.clock, world))
            reader = stack.enter_context(ThreadPoolExecutor(1, "reader"))
            profiler = None
            if self.settings.enable_profiling and world.main:
                profiler = stack.enter_context(profile(self.settings, self.step))
            finished = self._take_steps(reader, profiler)
            checkpoint = self.saver.wait()
        if world.main:
            self._report(finished)
        if checkpoint is None and self.resumed is not None:
            checkpoint = self.resumed.folder
        return TrainResult(output_dir=self.output, checkpoint=checkpoint and checkpoint / "hf_ckpt", steps=self.step,
                           finished=finished, history=self.log.lines)

    def _take_steps(self, reader: Executor, profiler) -> bool:
        """The loop. Returns whether the run reached its end; False after a signal."""
        settings, stopped = self.settings, False
        finished = self.resumed is not None and (self.step >= self.total or self.clock.expired)
        upcoming = None if finished else reader.submit(self._read, self.step)
        while not finished and not stopped:
            batches, self.rows = upcoming.result()
            upcoming = reader.submit(self._read, self.step + 1) if self.step + 1 < self.total else None
            agreed = agree(self.world, batches, self.stop.signal is not None, self.clock, settings)
            line = self._take_step(batches, agreed)
            if profiler is not None:
                profiler.step()
            stopped, finished = agreed.stop, self.step >= self.total or agreed.expired
            measure = bool(self.validation and (finished or is_due(self.step, settings.eval_every)))
            if finished or stopped or measure or self.bad or is_due(self.step, settings.log_steps):
                self._log(line, agreed, measure, tell=measure or finished or bool(self.bad))
            due = stopped or agreed.save or is_due(self.step, settings.save_steps)
            if finished or due and not self.bad:  # weights that may have diverged replace better ones only at the end
                self._save(last=finished)
        return finished

    def _read(self, number: int) -> tuple[list[MicroBatch], dict]:
        """(micro-batches of a step, state of the row source after it). Runs in the reader's thread."""
        world, rows = self.world, self.settings.rows_per_step
        batches = make_batches(self.data.rows, number, world.slots(rows), rows, self.settings, self.settings.seed,
                               self.model, opened_share(number, self.total, self.settings))
        return ([share_positions(batch, world.sequence_rank, world.sequence_size).pin(world.device)
                 for batch in batches], self.data.rows.state())

    def _take_step(self, batches: Sequence[MicroBatch], agreed: "Agreed") -> dict[str, float]:
        """Compute the gradients of all micro-batches, then update if they are finite. Returns the values to log."""
        rate = set_learning_rate(self.optimizers, self.settings, max(self.step, agreed.share * self.total), self.total)
        sums = self._backward(batches, agreed)
        norm = clip_gradients(self.parameters, self.settings.max_grad_norm).item()
        loss, nll, alignment, encoder = self.world.sum(sums.cpu()).tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            self.bad = 0
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            self._skip(loss, norm)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += agreed.tokens
        self.clock.tick()
        line = {"step": self.step, "loss": loss, "nll": nll, "grad_norm": norm, "lr": rate}
        if self.settings.objective == "canvas":
            line["encoder_nll"] = encoder
        return line if self.teacher is None else {**line, "alignment": alignment}

    def _backward(self, batches: Sequence[MicroBatch], agreed: "Agreed") -> torch.Tensor:
        """Accumulate the gradients. Returns this process's share of loss, nll, alignment, the encoder's loss, [4]."""
        sums = torch.zeros(4, device=self.world.device)
        for index, batch in enumerate(batches):
            with self.shared.synchronising(last=index == len(batches) - 1):
                found = self.shared(batch, self.teacher)
                alignment = found.alignment / agreed.scored
                encoder = torch.zeros_like(alignment) if found.encoder is None else found.encoder / agreed.encoded
                loss = found.loss / agreed.normaliser + self.settings.repr_align_wt * alignment + encoder
                # Gradients are averaged over the processes: the factor makes the average a sum.
                (loss * self.world.size).backward()
            sums += torch.stack((loss, found.nll / agreed.scored, alignment, encoder)).detach()
        return sums

    def _skip(self, loss: float, norm: float) -> None:
        self.bad, self.skipped = self.bad + 1, self.skipped + 1
        if self.bad == min(self.settings.max_bad_steps, self.total):
            raise Failure(f"step {self.step + 1}: loss {loss}, gradient norm {norm}; not finite in {self.bad} steps in "
                          f"a row: lower train.lr, now {self.settings.lr}, or lengthen the warm-up, and start again")

    def _log(self, line: dict, agreed: "Agreed", measure: bool, tell: bool) -> None:
        seconds = self.clock.step_seconds
        line |= {"tokens": self.tokens, "seconds": round(self.clock.seconds, 3),
                 "tokens_per_second": round(agreed.tokens / seconds)}
        if self.skipped:
            line["skipped"] = self.skipped
        line |= measure_device(self.world, self.model.config, agreed, count_copies(self.settings.objective), seconds)
        if measure:
            line |= validate(self.shared, self.validation, self.world)
        self.log.append(line)
        self.bar.show(line, tell)

    def _save(self, last: bool) -> None:
        settings = self.settings
        state = {"step": self.step, "tokens": self.tokens, "seconds": self.clock.seconds, "skipped": self.skipped,
                 "config": self.config.to_dict(), "data": self.data.fingerprint, "rows": self.world.gather(self.rows),
                 "probe": self.probe}
        self.saver.save(self.step, self.model, self.tokenizer, self.optimizers, state, last=last)
        if settings.eval_tasks and (last or settings.save_hf_weights):
            folder = self.saver.wait()
            if self.world.main:  # the other processes wait in the next step
                scores = evaluate_checkpoint(settings.eval_task_list, folder / "hf_ckpt",
                                             self.output / "evaluations" / folder.name)
                self.log.add_scores(self.step, scores)

    def _report(self, finished: bool) -> None:
        if self.bad:
            print(f"the last {self.bad} steps were skipped, because loss or gradient was not finite: look at "
                  f"{self.log.path} before you use the model", file=sys.stderr)
        if not finished:
            print(f"stopped by {self.stop.signal or 'a signal'} after step {self.step} of {self.total}; the same "
                  "command continues", file=sys.stderr)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after this one; 0 is never."""
    return every > 0 and step % every == 0


class Agreed(NamedTuple):
    """The sums over all processes that each needs before it computes a step."""

    normaliser: int
    tokens: int
    scored: int
    pairs: int
    encoded: int
    stop: bool  # a process received a signal to stop
    share: float  # share of the time budget that is spent, by the clock of the main process
    save: bool  # a checkpoint is due by that clock

    @property
    def expired(self) -> bool:
        return self.share >= 1


def agree(world: World, batches: Sequence[MicroBatch], stop: bool, clock: Clock, settings: TrainGroup) -> Agreed:
    counts = [sum(getattr(batch, name) for batch in batches) for name in Agreed._fields[:5]]
    own = [clock.share, clock.due(settings.save_time_interval_minutes)] if world.main else [0, 0]
    numbers = world.sum(torch.tensor([*counts, stop, *own], dtype=torch.float64)).tolist()
    normaliser, tokens, scored, pairs, encoded = map(int, numbers[:5])
    return Agreed(max(normaliser, 1), tokens, max(scored, 1), pairs, max(encoded, 1), numbers[5] > 0, numbers[6],
                  numbers[7] > 0)


class Stop:
    """The first signal that asked a run to save and end: SIGTERM, SIGINT (Ctrl-C) or SIGHUP (its terminal closed).

    A second Ctrl-C ends the run at once, unless it is within two seconds, because torchrun repeats the first one.
    """

    def __init__(self):
        self.signal: str | None = None
        self._since = 0.0
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def receive(self, number: int, _) -> None:
        if number == signal.SIGHUP:
            silence(*self._terminals)
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > 2:
            raise KeyboardInterrupt


@contextmanager
def catch_stop() -> Iterator[Stop]:
    """Signals set this instead of ending the process; only the main thread can catch them.

    An ignored signal stays ignored, as nohup wants it.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    caught = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
              if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.receive) for number in caught}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def profile(settings: TrainGroup, step: int) -> torch.profiler.profile:
    """A profiler of the steps profile_start_step to profile_end_step, counted from where the run starts or continues.

    It writes one file for chrome://tracing or Perfetto."""
    folder = Path(settings.profile_trace_dir)
    first, count = settings.profile_start_step, settings.profile_end_step - settings.profile_start_step

    def write(profiler) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"steps_{step + first + 1}_to_{step + first + count}.json.gz"
        profiler.export_chrome_trace(str(file))
        print(f"the profile of {count} steps is in {file}", file=sys.stderr)

    warmup = min(first, 1)
    schedule = torch.profiler.schedule(wait=first - warmup, warmup=warmup, active=count, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True, profile_memory=True)


def count_steps(config: Config, training: TrainingData) -> int:
    """Optimizer steps: the epochs' tokens (train_size, or the corpus) over the tokens of a step, at most max_steps.

    Raises: UserError if the data is a stream, and neither train_size nor max_steps is set.
    """
    settings, data = config.train, config.data
    if data.train_size is None and training.rows_per_epoch is None:
        if settings.max_steps is None:
            raise UserError("a stream has no known length; set data.train_size to the tokens of an epoch, or "
                            "train.max_steps")
        return settings.max_steps
    if data.train_size is None:
        steps = math.ceil(training.rows_per_epoch * settings.num_train_epochs / settings.rows_per_step)
    else:
        steps = math.ceil(data.train_size / (settings.rows_per_step * data.max_seq_len)) * settings.num_train_epochs
    return min(steps, settings.max_steps or steps)


def measure_device(world: World, config: ModelConfig, agreed: Agreed, copies: int, seconds: float) -> dict[str, float]:
    """Peak memory of a GPU, and mfu: the step's FLOPs (`step_flops`) as a share of the device's peak.

    copies: how often the layers compute each token.
    A model that writes in canvases has no mfu, because its layers differ and its passes are several.
    """
    if world.device.type != "cuda":
        return {}
    result = {"peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    peak = peak_flops(world.device)
    if peak is not None and config.canvas_length is None:
        flops = step_flops(config, copies * agreed.tokens, agreed.pairs, agreed.scored)
        result["mfu"] = round(flops / (seconds * peak * world.size), 4)
    return result
