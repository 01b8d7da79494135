"""Training, from a configuration to a checkpoint that others load: `train` reads top to bottom.

Every draw of a step is a function of the seed, the step's number and the row's slot, so a run that was killed and
started again goes on to the same losses, bit for bit on a CPU (with max_minutes the clock decides the learning rate,
and runs differ). The same holds for several processes; another number of them adds the same numbers in another order.
"""

import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dllm.accounting import count_copies, peak_flops, step_flops
from dllm.batches import (
    MicroBatch,
    Validation,
    draw_validation,
    forward,
    make_batches,
    opened_share,
    share_positions,
)
from dllm.building import build_model, build_teacher
from dllm.checkpoint import Checkpoint, load_latest, write_atomically
from dllm.config import Config, TrainGroup
from dllm.data import TrainingData, open_training_data, read_corpus
from dllm.distributed import Shared, World, join
from dllm.errors import Failure, UserError
from dllm.evaluating import evaluate_checkpoint
from dllm.families import ModelConfig
from dllm.loss import LossSums
from dllm.metrics import Clock, Metrics, Progress
from dllm.model import DiffusionLM
from dllm.optimizer import build_optimizers, clip_gradients, set_learning_rate
from dllm.saver import Saver, load_state


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    output_dir: Path
    checkpoint: Path | None  # folder of the last checkpoint, for `DiffusionLM.from_pretrained` and Transformers
    steps: int
    finished: bool  # False: SIGTERM came before the last step
    history: list[dict]  # the lines of metrics.jsonl; empty but in the main process


class TrainingStep(nn.Module):
    """The model and its loss, what a process computes of a step."""

    def __init__(self, model: DiffusionLM, device: torch.device):
        super().__init__()
        self.model, self.device = model, device

    def forward(self, batch: MicroBatch, teacher: DiffusionLM | None = None) -> LossSums:
        return forward(self.model, batch, self.device, teacher)


def train(config: Config) -> TrainResult:
    """Train as configured, continuing from the newest whole checkpoint in `config.train.output_dir` if there is one.

    Writes there: checkpoints/global_step_N/hf_ckpt, metrics.jsonl (one line per logged step; losses in nats, times in
    seconds) and config.yaml. Under torchrun, each process calls it.
    Raises: UserError for input that cannot work; Failure if the disk is full or the loss stays not finite.
    """
    with join(config.train) as world:
        return train_in(world, config)


def train_in(world: World, config: Config) -> TrainResult:
    settings, output = config.train, Path(config.train.output_dir)
    resumed = world.from_main(lambda: find_run(config, output))
    tokenizer, model, data = open_run(config, resumed, world)
    teacher = build_teacher(config, world)
    validation = draw_validation(data, config, model)
    total = count_steps(config, data)

    model.sequence_group = world.sequence_group
    model.checkpointing = settings.enable_gradient_checkpointing
    if settings.enable_compile:
        for layer in model.model.layers:
            layer.compile()
    shared = Shared(TrainingStep(model, world.device), model.model.layers, settings, world).train()
    optimizers = build_optimizers(model, settings)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step, tokens_seen, seconds_before, skipped = 0, 0, 0.0, 0
    if resumed is not None:
        step, tokens_seen, seconds_before, skipped = (resumed.state[name] for name in
                                                      ("step", "tokens", "seconds", "skipped"))
        load_state(resumed.folder, model, optimizers, world)
        data.rows.restore(resumed.state["rows"])
    clock = Clock(seconds_before, settings.max_minutes)
    if world.main:
        across = f" in each of {world.size} processes" if world.size > 1 else ""
        print(f"{data.describe()}; {model.count_parameters():,} parameters on {world.device}{across}", file=sys.stderr)

    def read_step(number: int) -> tuple[list[MicroBatch], dict]:
        """The micro-batches, and where the rows then stand."""
        batches = make_batches(data.rows, number, world.slots(settings.rows_per_step), settings.rows_per_step, settings,
                               settings.seed, model, opened_share(number, total, settings))
        return ([share_positions(batch, world.sequence_rank, world.sequence_size).pin(world.device)
                 for batch in batches], data.rows.state())

    with ExitStack() as stack:
        metrics = stack.enter_context(Metrics(output, step, config, world))
        saver = stack.enter_context(Saver(output / "checkpoints", settings, world))
        sigterm = stack.enter_context(catch_sigterm())
        progress = stack.enter_context(Progress(step, total, clock, world))
        reader = stack.enter_context(ThreadPoolExecutor(1, "reader"))
        profiler = profile(settings, step) if settings.enable_profiling and world.main else None
        if profiler is not None:
            stack.enter_context(profiler)

        def save(last: bool) -> None:
            state = {"step": step, "tokens": tokens_seen, "seconds": clock.seconds, "skipped": skipped,
                     "config": config.to_dict(), "data": data.fingerprint, "rows": world.gather(rows)}
            saver.save(step, model, tokenizer, optimizers, state, last=last)
            if settings.eval_tasks and (last or settings.save_hf_weights):
                folder = saver.wait()
                if world.main:  # the others wait for it in the next step
                    metrics.add_scores(step, evaluate_checkpoint(settings.eval_task_list, folder / "hf_ckpt",
                                                                 output / "evaluations" / folder.name))

        finished, stopped, bad = resumed is not None and (step >= total or clock.expired), False, 0
        upcoming = None if finished else reader.submit(read_step, step)
        while not finished and not stopped:
            batches, rows = upcoming.result()
            upcoming = reader.submit(read_step, step + 1) if step + 1 < total else None
            agreed = agree(world, batches, sigterm.is_set(), clock, settings)
            rate = set_learning_rate(optimizers, settings, max(step, agreed.share * total), total)
            sums = torch.zeros(3, device=world.device)
            for index, batch in enumerate(batches):
                with shared.synchronising(last=index == len(batches) - 1):
                    loss, nll, alignment, _ = shared(batch, teacher)
                    alignment = alignment / agreed.scored
                    loss = loss / agreed.normaliser + settings.repr_align_wt * alignment
                    # Gradients are averaged over the processes: times their number, it is the sum.
                    (loss * world.size).backward()
                sums += torch.stack((loss.detach(), nll / agreed.scored, alignment.detach()))
            norm = clip_gradients(parameters, settings.max_grad_norm).item()
            loss, nll, alignment = world.sum(sums.cpu()).tolist()
            if math.isfinite(loss) and math.isfinite(norm):
                bad = 0
                for optimizer in optimizers:
                    optimizer.step()
            else:
                bad, skipped = bad + 1, skipped + 1
                if bad == min(settings.max_bad_steps, total):
                    raise Failure(f"step {step + 1}: loss {loss}, gradient norm {norm}; not finite in {bad} steps in a "
                                  f"row: lower train.lr, now {settings.lr}, or lengthen the warm-up, and start again")
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens_seen += agreed.tokens
            clock.tick()
            if profiler is not None:
                profiler.step()

            stopped = agreed.stop
            finished = step >= total or agreed.expired
            measure = validation and (finished or settings.eval_every and step % settings.eval_every == 0)
            if finished or stopped or measure or bad or step % settings.log_steps == 0:
                line = {"step": step, "loss": loss, "nll": nll, "grad_norm": norm, "lr": rate, "tokens": tokens_seen,
                        "seconds": round(clock.seconds, 3),
                        "tokens_per_second": round(agreed.tokens / clock.step_seconds)}
                if teacher is not None:
                    line["alignment"] = alignment
                if skipped:
                    line["skipped"] = skipped
                line |= measure_device(world, model.config, agreed, count_copies(settings.objective),
                                       clock.step_seconds)
                if measure:
                    line |= validate(shared, validation, world)
                metrics.append(line)
                progress.show(line, tell=bool(measure or finished or bad))
            due = stopped or agreed.save or settings.save_steps and step % settings.save_steps == 0
            if finished or due and not bad:  # weights that may have diverged replace better ones only at the end
                save(last=finished)
        checkpoint = saver.wait()
    if world.main and bad:
        print(f"the last {bad} steps were skipped, for their loss or gradient was not finite: look at {metrics.path} "
              "before you use the model", file=sys.stderr)
    if world.main and not finished:
        print(f"stopped by SIGTERM after step {step} of {total}; the same command continues", file=sys.stderr)
    if checkpoint is None and resumed is not None:
        checkpoint = resumed.folder
    return TrainResult(output_dir=output, checkpoint=checkpoint and checkpoint / "hf_ckpt", steps=step,
                       finished=finished, history=metrics.lines)


class Agreed(NamedTuple):
    """What all processes know of a step before they compute it."""

    normaliser: int
    tokens: int
    scored: int
    pairs: int
    stop: bool  # SIGTERM came to one of them
    share: float  # of the main process's time that is spent
    save: bool  # by the main process's clock

    @property
    def expired(self) -> bool:
        return self.share >= 1


def agree(world: World, batches: Sequence[MicroBatch], stop: bool, clock: Clock, settings: TrainGroup) -> Agreed:
    counts = [sum(getattr(batch, name) for batch in batches) for name in Agreed._fields[:4]]
    own = [clock.share, clock.due(settings.save_time_interval_minutes)] if world.main else [0, 0]
    numbers = world.sum(torch.tensor([*counts, stop, *own], dtype=torch.float64)).tolist()
    normaliser, tokens, scored, pairs = map(int, numbers[:4])
    return Agreed(max(normaliser, 1), tokens, max(scored, 1), pairs, numbers[4] > 0, numbers[5], numbers[6] > 0)


@torch.no_grad()
def validate(shared: Shared, validation: Validation, world: World) -> dict[str, float]:
    """On the held-out rows: validation_loss of the objective; if that is no bound also validation_bound, that of
    "elbo", nats per token; validation_bits_per_byte of that bound; validation_nll_0_25 and so on, nats per token masked
    with a chance of 0 to 25%."""
    shared.eval()
    losses, by_ratio = sum_validation(shared, validation.loss, world)
    result = {"validation_loss": losses / max(sum(batch.normaliser for batch in validation.loss), 1)}
    if validation.bound is not validation.loss:
        losses, by_ratio = sum_validation(shared, validation.bound, world)
        result["validation_bound"] = losses / max(sum(batch.normaliser for batch in validation.bound), 1)
    bound = result.get("validation_bound", result["validation_loss"])
    result["validation_bits_per_byte"] = bound * validation.tokens_per_byte / math.log(2)
    for quarter, (nll, scored) in enumerate(zip(*by_ratio, strict=True)):
        if scored:
            result[f"validation_nll_{25 * quarter}_{25 * quarter + 25}"] = nll / scored
    shared.train()
    return result


def sum_validation(shared: Shared, batches: list[MicroBatch], world: World) -> tuple[float, list[list[float]]]:
    """The sum of the losses, and those by the chance of being masked, [2, 4] (none: all 0).

    The micro-batches are dealt to the processes; all compute equally many, for with fsdp2 they exchange weights.
    """
    groups, group = world.size // world.sequence_size, world.rank // world.sequence_size
    mine = []
    for first in range(0, len(batches), groups):
        batch = batches[min(first + group, len(batches) - 1)]
        sums = shared(share_positions(batch, world.sequence_rank, world.sequence_size))
        by_ratio = [0.0] * 8 if sums.by_ratio is None else sums.by_ratio.flatten().tolist()
        if first + group < len(batches):
            mine.append([sums.loss.item(), *by_ratio])
    loss, *by_ratio = map(math.fsum, zip(*(sums for part in world.gather(mine) for sums in part), strict=True))
    return loss, [by_ratio[:4], by_ratio[4:]]


@contextmanager
def catch_sigterm() -> Iterator[threading.Event]:
    """Set an event when the signal comes, instead of ending; only the main thread can."""
    sigterm = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield sigterm
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sigterm.set())
    try:
        yield sigterm
    finally:
        signal.signal(signal.SIGTERM, before)


def profile(settings: TrainGroup, step: int) -> torch.profiler.profile:
    """Around the steps: records those from profile_start_step to profile_end_step, counted from where the run starts
    or continues, into one file for chrome://tracing or Perfetto."""
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


def find_run(config: Config, output: Path) -> Checkpoint | None:
    """The checkpoint to continue from, None to begin; writes config.yaml."""
    resumed = load_latest(output / "checkpoints")
    if resumed is not None:
        check_same_run(config, resumed, output)
    write_atomically(output / "config.yaml", config.to_yaml().encode())
    return resumed


def open_run(config: Config, resumed: Checkpoint | None, world: World) -> tuple[Any, DiffusionLM, TrainingData]:
    """The tokenizer, the model and the data. The main process goes first, and leaves the others the cached tokens."""
    def open_data(tokenizer) -> TrainingData:
        return open_training_data(corpus, tokenizer, config.train.seed, config.train.rows_per_step)

    corpus = read_corpus(config.data)
    if resumed is not None and resumed.state["data"] != corpus.fingerprint:
        where = config.data.train_path or "the standard library"
        raise UserError(f"{resumed.folder} continues a run on other documents than there are now in {where}; bring "
                        "them back, or set another train.output_dir")
    tokenizer, model = build_model(config, corpus, resumed, world)
    data = open_data(tokenizer) if world.main else None
    world.barrier()
    return tokenizer, model, data or open_data(tokenizer)


def count_steps(config: Config, training: TrainingData) -> int:
    """Optimizer steps: the epochs' tokens (train_size, or the corpus) over the tokens of a step, at most max_steps.

    Raises: UserError if the data is streamed and nothing says how much of it to train on.
    """
    settings, data = config.train, config.data
    if data.train_size is None and training.rows_per_epoch is None:
        if settings.max_steps is None:
            raise UserError("nobody knows how long a stream is; set data.train_size to the tokens of an epoch, or "
                            "train.max_steps")
        return settings.max_steps
    if data.train_size is None:
        steps = math.ceil(training.rows_per_epoch * settings.num_train_epochs / settings.rows_per_step)
    else:
        steps = math.ceil(data.train_size / (settings.rows_per_step * data.max_seq_len)) * settings.num_train_epochs
    return min(steps, settings.max_steps or steps)


def check_same_run(config: Config, resumed: Checkpoint, output: Path) -> None:
    """Refuse to continue a run under settings that would make it another one.

    Raises: UserError naming the first difference and the ways out.
    """
    if not config.train.auto_resume:
        raise UserError(f"{output} already holds checkpoints up to {resumed.folder.name}; set another "
                        "train.output_dir, or train.auto_resume=true to continue")
    fixed = ("objective", "path_term", "mask_at_least_one", "schedule", "optimizer", "seed", "lora_rank", "lora_alpha",
             "freeze_layers", "repr_align_wt", "anneal_attention_ratio", "block_length", "expand_token_id",
             "corrupt_prompt")
    defaults = {field.name: field.default for field in fields(TrainGroup)}  # of a run older than a key

    def describe(groups: dict[str, dict]) -> dict:
        train_group = groups["train"]
        return {**{f"model.{key}": value for key, value in groups["model"].items()},
                **{f"data.{key}": value for key, value in groups["data"].items() if key != "num_workers"},
                **{f"train.{key}": train_group.get(key, defaults[key]) for key in fixed},
                "train.global_batch_size": train_group["global_batch_size"] or train_group["micro_batch_size"]}

    before, now = describe(resumed.state["config"]), describe(config.to_dict())
    for key in now:
        if before.get(key) != now[key]:
            raise UserError(f"{output} holds a run with {key} {before.get(key)!r}, not {now[key]!r}; set it back, or "
                            "another train.output_dir")


def measure_device(world: World, config: ModelConfig, agreed: Agreed, copies: int, seconds: float) -> dict[str, float]:
    """Of a GPU: peak memory, and mfu, the share of the peak that the step's FLOPs (`step_flops`) are.

    copies: of each token that the layers compute.
    """
    if world.device.type != "cuda":
        return {}
    result = {"peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    peak = peak_flops(world.device)
    if peak is not None:
        flops = step_flops(config, copies * agreed.tokens, agreed.pairs, agreed.scored)
        result["mfu"] = round(flops / (seconds * peak * world.size), 4)
    return result
