"""Training, from a configuration to a checkpoint that others load: `train` reads top to bottom.

Every draw of a step is a function of the seed and the step's number, so a run that was killed and started again goes on
to the same losses, bit for bit on a CPU (with max_minutes the clock decides the learning rate, and runs differ).
"""

import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from dllm.batches import MicroBatch, draw_validation, forward, make_batches
from dllm.checkpoint import Checkpoint, load_latest, save_checkpoint, write_atomically
from dllm.config import Config, TrainGroup
from dllm.data import Corpus, TrainingData, open_training_data, read_corpus
from dllm.errors import Failure, UserError
from dllm.families import FAMILIES, ModelConfig, read_config, read_json
from dllm.model import DiffusionLM, find_model
from dllm.optimizer import build_optimizers, set_learning_rate
from dllm.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    output_dir: Path
    checkpoint: Path  # folder of the last step, for `DiffusionLM.from_pretrained` and Transformers
    steps: int
    history: list[dict]  # the lines of metrics.jsonl


def train(config: Config) -> TrainResult:
    """Train as configured, continuing from the newest whole checkpoint in `config.train.output_dir` if there is one.

    Writes there: checkpoints/global_step_N/hf_ckpt, metrics.jsonl (one line per logged step; losses in nats, times in
    seconds) and config.yaml.
    Raises: UserError for input that cannot work; Failure if the disk is full or the loss is no longer finite.
    """
    settings, output = config.train, Path(config.train.output_dir)
    device = choose_device(settings)
    resumed = load_latest(output / "checkpoints")
    if resumed is not None:
        check_same_run(config, resumed, output)
    write_atomically(output / "config.yaml", config.to_yaml().encode())

    corpus = read_corpus(config.data)
    tokenizer, model = build_model(config, corpus, resumed)
    model.to(device).train()
    data = open_training_data(corpus, tokenizer, settings.seed, settings.rows_per_step)
    if resumed is not None and resumed.state.get("fingerprint", data.fingerprint) != data.fingerprint:
        raise UserError(f"{output} holds a run on other documents than data.train_path has now; put them back, or set "
                        "another train.output_dir")
    validation = draw_validation(data, config, model)
    optimizers = build_optimizers(model, settings)
    total = count_steps(config, data)

    print(f"{data.describe()}; {sum(p.numel() for p in model.parameters()):,} parameters on {device}", file=sys.stderr)

    step, tokens_seen, seconds_before = 0, 0, 0.0
    if resumed is not None:
        step, tokens_seen, seconds_before = (resumed.state[name] for name in ("step", "tokens", "seconds"))
        data.rows.restore(resumed.state.get("rows", []))
        for optimizer, state in zip(optimizers, resumed.state["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    metrics = Metrics(output / "metrics.jsonl", step)
    checkpoint = None if resumed is None else resumed.folder
    clock = Clock(seconds_before, settings.max_minutes)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    autocast = torch.autocast(device.type, torch.bfloat16) if use_bf16(settings, device) else nullcontext()

    def save() -> Path:
        state = {"step": step, "tokens": tokens_seen, "seconds": clock.seconds, "config": config.to_dict(),
                 "rows": [data.rows.state()], "fingerprint": data.fingerprint,
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        return save_checkpoint(output / "checkpoints", step, partial(write_model, model, tokenizer), state,
                               settings.keep_last)

    finished = step >= total or clock.expired
    with Progress(step, total, clock) as progress:
        while not finished:
            place = max(step, clock.share * total)
            rate = set_learning_rate(optimizers, settings, place, total)
            batches = make_batches(data.rows, step, range(settings.rows_per_step), settings.rows_per_step, settings,
                                   settings.seed, model)
            normaliser = max(sum(batch.normaliser for batch in batches), 1)
            loss, nll = torch.zeros(2, device=device)
            for batch in batches:
                with autocast:
                    sums = forward(model, batch, device)
                (sums.loss / normaliser).backward()
                loss += sums.loss.detach() / normaliser
                nll += sums.nll
            norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens_seen += sum(batch.tokens for batch in batches)

            finished = step >= total or clock.expired
            measure = validation and (finished or settings.eval_every and step % settings.eval_every == 0)
            periodic = settings.save_steps and step % settings.save_steps == 0
            saving = finished or periodic or clock.due(settings.save_time_interval_minutes)
            logging = finished or measure or step % settings.log_steps == 0
            if (saving or logging) and not math.isfinite(loss.item() + norm.item()):
                raise Failure(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}; lower train.lr, now "
                              f"{settings.lr}, or lengthen the warm-up, and start again")
            if logging:
                scored = max(sum(batch.scored for batch in batches), 1)
                line = {"step": step, "loss": loss.item(), "nll": nll.item() / scored, "grad_norm": norm.item(),
                        "lr": rate, "tokens": tokens_seen, "seconds": round(clock.seconds, 3)}
                if measure:
                    line |= validate(model, validation, autocast, device)
                metrics.append(line)
                progress.show(line, tell=bool(measure or finished))
            if saving:
                checkpoint = save()
    return TrainResult(output_dir=output, checkpoint=checkpoint / "hf_ckpt", steps=step, history=metrics.lines)


@torch.no_grad()
def validate(model: DiffusionLM, validation: list[list[MicroBatch]], autocast,
             device: torch.device) -> dict[str, float]:
    """validation_loss, and for "mdm" also validation_bound: that of the "elbo" objective, nats per token."""
    model.eval()
    result = {}
    for name, batches in zip(("validation_loss", "validation_bound"), validation, strict=False):
        with autocast:
            losses = [forward(model, batch, device).loss.item() for batch in batches]
        result[name] = math.fsum(losses) / max(sum(batch.normaliser for batch in batches), 1)
    model.train()
    return result


def build_model(config: Config, corpus: Corpus, resumed: Checkpoint | None):
    """The tokenizer and the model, in fp32: those of the checkpoint, of model_path, or new ones."""
    group = config.model
    path = resumed.hf_folder if resumed else group.model_path or group.config_path
    folder = find_model(path) if path else None
    model_config = read_config(read_json(folder / "config.json"), where=str(folder / "config.json")) if folder else None
    mask_token_id = model_config.mask_token_id if model_config else None
    if path or group.tokenizer_path:
        tokenizer = load_tokenizer(path if resumed or not group.tokenizer_path else group.tokenizer_path, mask_token_id)
    else:
        tokenizer = train_tokenizer(corpus.texts(), group.vocab_size or 4096)
    if model_config is None:
        model_config = ModelConfig(
            family=check_family(group.family), vocab_size=group.vocab_size or len(tokenizer),
            hidden_size=group.hidden_size, intermediate_size=group.intermediate_size,
            num_hidden_layers=group.num_hidden_layers,
            num_attention_heads=group.num_attention_heads, num_key_value_heads=group.num_key_value_heads,
            head_dim=group.hidden_size // group.num_attention_heads, tie_word_embeddings=group.tie_word_embeddings,
            rope_theta=group.rope_theta, initializer_range=group.initializer_range, shift_logits=group.shift_logits,
            **FAMILIES[group.family].fixed)
    check_vocabulary(tokenizer, model_config.vocab_size)
    if config.data.max_seq_len > model_config.max_position_embeddings:
        raise UserError(f"data.max_seq_len {config.data.max_seq_len} is more than the model's "
                        f"{model_config.max_position_embeddings} positions; lower it")
    model_config = replace(model_config, mask_token_id=tokenizer.mask_token_id, eos_token_id=model_config.eos_token_id
                           if model_config.eos_token_id is not None else tokenizer.eos_token_id,
                           pad_token_id=model_config.pad_token_id if model_config.pad_token_id is not None
                           else tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = DiffusionLM(model_config)
    if resumed or group.model_path:
        # Copied into the fresh model: products can differ in the last bit with the alignment of what came from a file.
        loaded = DiffusionLM.from_pretrained(folder)
        model.load_state_dict(loaded.state_dict())
        model.generation_defaults = loaded.generation_defaults
    return tokenizer, model


def write_model(model: DiffusionLM, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_family(family: str) -> str:
    if family not in FAMILIES:
        raise UserError(f"model.family must be one of {', '.join(FAMILIES)}, not {family!r}")
    return family


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


def choose_device(settings: TrainGroup) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but this torch sees no GPU; set it to auto or cpu, or install a CUDA "
                        "build of torch")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def use_bf16(settings: TrainGroup, device: torch.device) -> bool:
    return settings.precision == "bf16" or settings.precision == "auto" and device.type == "cuda"


def check_same_run(config: Config, resumed: Checkpoint, output: Path) -> None:
    """Refuse to continue a run under settings that would make it another one.

    Raises: UserError naming the first difference and the ways out.
    """
    if not config.train.auto_resume:
        raise UserError(f"{output} already holds checkpoints up to {resumed.folder.name}; set another "
                        "train.output_dir, or train.auto_resume=true to continue")
    fixed = ("objective", "path_term", "mask_at_least_one", "schedule", "optimizer", "seed")

    def describe(groups: dict[str, dict]) -> dict:
        train_group = groups["train"]
        return {**{f"model.{key}": value for key, value in groups["model"].items()},
                **{f"data.{key}": value for key, value in groups["data"].items() if key != "num_workers"},
                **{f"train.{key}": train_group.get(key, False) for key in fixed},  # false: a run older than the key
                "train.global_batch_size": train_group["global_batch_size"] or train_group["micro_batch_size"]}

    before, now = describe(resumed.state["config"]), describe(config.to_dict())
    for key in now:
        if before.get(key) != now[key]:
            raise UserError(f"{output} holds a run with {key} {before.get(key)!r}, not {now[key]!r}; set it back, or "
                            "another train.output_dir")


class Clock:
    """Time spent training, over all restarts."""

    def __init__(self, seconds_before: float, max_minutes: float | None):
        self.start = time.monotonic() - seconds_before
        self.saved = time.monotonic()
        self.budget = None if max_minutes is None else 60 * max_minutes

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        """Of the budget, in [0, 1]; 0 without one."""
        return 0.0 if self.budget is None else min(self.seconds / self.budget, 1.0)

    @property
    def expired(self) -> bool:
        return self.share >= 1

    def due(self, minutes: float) -> bool:
        """Whether it is time for another checkpoint; asking restarts the interval when it is."""
        if not minutes or time.monotonic() - self.saved < 60 * minutes:
            return False
        self.saved = time.monotonic()
        return True


class Metrics:
    """metrics.jsonl. What a killed run wrote after the step that training continues from is dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.lines: list[dict] = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut short by the kill
                continue
            if line["step"] <= step:
                self.lines.append(line)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def append(self, line: dict) -> None:
        self.lines.append(line)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise Failure(f"cannot write {self.path}: {error.strerror}; free space, then start again") from error


class Progress:
    """A bar on a terminal; elsewhere one line per measurement."""

    def __init__(self, step: int, total: int, clock: Clock):
        self.total, self.clock, self.last = total, clock, (clock.seconds, None)
        self.bar = tqdm(total=1.0, initial=max(step / total, clock.share), disable=not sys.stderr.isatty(),
                        bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self, line: dict, tell: bool) -> None:
        seconds, tokens = self.last
        self.last = line["seconds"], line["tokens"]
        speed = 0 if tokens is None else (line["tokens"] - tokens) / max(line["seconds"] - seconds, 1e-6)
        self.bar.n = max(line["step"] / self.total, self.clock.share)
        self.bar.set_postfix_str(f"step {line['step']}/{self.total}, loss {line['loss']:.3f}, {speed:,.0f} tokens/s")
        if tell:
            held_out = f", held out {line['validation_loss']:.3f}" if "validation_loss" in line else ""
            tqdm.write(f"step {line['step']}: loss {line['loss']:.3f}{held_out}, {line['tokens']:,} tokens, "
                       f"{line['seconds']:.0f} s", file=sys.stderr)
