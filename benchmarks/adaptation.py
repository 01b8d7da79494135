"""python -m benchmarks.adaptation MODEL --minutes M --output-dir DIR [--variants NAME/...] [--data PATH] [--tasks PATH]

The adaptation study: an autoregressive model becomes a masked diffusion model in M minutes (or --steps of equally many
tokens, on a machine that does other work), once for each variant of the recipe, by the trainer; held-out files tell
which recipe wins. MODEL is a folder, a hub repository or a GGUF file,
DATA the standard library of this Python, TASKS the file of HumanEval's single-line infilling. DIR/results.json is
written after each variant; the same command goes on after a stop, and prints the table.

Open-dLLM's recipe as shipped is among the variants, its two defects included:
- Its gradient (liger-kernel 0.5.8, linkedin/Liger-Kernel#968): the backward pass of the fused cross-entropy with
  reduction="none" multiplies every row by the upstream gradient of row 0. The gradient of a micro-batch is therefore
  zero where its first scored position is not masked, else that of the plain sum, scaled by that position's weight.
- Its data loss: the loader reads a batch of samples and hands on the first of them, so with 8 rows a step it trains on
  one row in 8 of those it reads.
"""

import argparse
import json
import math
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from dllm.config.reading import load_config
from dllm.data import Document, read_documents, split_documents
from dllm.data.packing import Packed, RowSource, merge
from dllm.demo import left_to_right
from dllm.diffusion import objectives
from dllm.diffusion.corruption import T_MIN, Corruption
from dllm.errors import UserError, run_command
from dllm.evaluators.code.generating import generate_samples
from dllm.evaluators.code.tasks import read_tasks
from dllm.evaluators.held_out import cut_windows, decode
from dllm.evaluators.likelihood import masked_accuracy, perplexity_bound
from dllm.evaluators.line_infilling import hide_lines, line_infilling
from dllm.evaluators.settings import HeldOutSettings, InfillingSettings, RunSettings
from dllm.files import name_processor, write_json
from dllm.generation.infilling import fill
from dllm.model.layouts import Padded
from dllm.model.loading import load_with_tokenizer
from dllm.model.tokenizer import load_tokenizer
from dllm.model.transformer import Transformer
from dllm.model.weights import find_model
from dllm.training import batches, trainer
from dllm_kernels import linear_masked_cross_entropy, philox_uniform

ROWS = 8  # of a step
TASKS = 50  # of HumanEval's single-line infilling
DISCARDED = ROWS  # Open-dLLM's loader keeps one sample of as many
COMMON = {"micro_batch_size": ROWS, "global_batch_size": ROWS, "lr": 2e-4, "lr_decay_style": "linear",
          "lr_warmup_ratio": 0.03, "num_train_epochs": 1000, "eval_every": 20, "eval_tokens": 4096,
          "use_tensorboard": False}
OPEN_DLLM = "Open-dLLM as shipped"
OWN_TOKEN, COMPLEMENTS, INDEPENDENT = "own token", "complementary masks", "independent times"
EQUAL = "blocks of 4, equal weights"
BLOCKS = {"objective": "block_diffusion", "block_length": 4}
CAUSAL = {**BLOCKS, "causal_blocks": True}
VARIANTS = {  # name -> keys of train, over COMMON; what no key says is in `rendition` and `prepare`
    "mdm": {},
    OWN_TOKEN: {},
    COMPLEMENTS: {},
    INDEPENDENT: {},
    "elbo": {"objective": "elbo"},
    "cart": {"objective": "cart"},
    **{f"blocks of {n}": {**BLOCKS, "block_length": n} for n in (4, 8, 32)},
    "blocks of 4, lr 5e-5": {**BLOCKS, "lr": 5e-5},
    "blocks of 4, LoRA of rank 16": {**BLOCKS, "lora_rank": 16, "lr": 1e-3},
    "blocks of 4, 2 rows a step": {**BLOCKS, "micro_batch_size": 2, "global_batch_size": 2},
    "blocks of 4, attention alone": {**BLOCKS, "freeze_layers": "mlp,embed"},
    EQUAL: BLOCKS,
    **{f"causal blocks of {n}": {**CAUSAL, "block_length": n} for n in (4, 8)},
    "causal blocks of 4, lr 1e-4": {**CAUSAL, "lr": 1e-4},
    "causal blocks of 4, lr 5e-5": {**CAUSAL, "lr": 5e-5},
    "causal blocks of 4, LoRA of rank 16": {**CAUSAL, "lora_rank": 16, "lr": 1e-3},
    "annealed": {"anneal_attention_ratio": 0.3},
    "lr 5e-5": {"lr": 5e-5},
    "lr 1e-3": {"lr": 1e-3},
    "muon": {"optimizer": "muon"},
    "LoRA of rank 16": {"lora_rank": 16, "lr": 1e-3},
    OPEN_DLLM: {"path_term": True, "lr": 3e-4, "lr_decay_style": "cosine", "lr_warmup_ratio": 0.001, "lr_min": 3e-6,
                "weight_decay": 0.01, "micro_batch_size": 2},
}


class Discarding:
    """The rows of a source of which the first of every `DISCARDED` is kept."""

    def __init__(self, rows: RowSource):
        self.rows = rows

    def read(self, places: range) -> Packed:
        kept = [self.rows.read(range(place * DISCARDED, place * DISCARDED + 1)) for place in places]
        return merge(kept, [torch.tensor([index]) for index in range(len(kept))])


def shipped_losses(hidden, head_weight, targets, **keywords) -> objectives.LossSums:
    """`sum_losses` with the right value, and the gradient that liger-kernel 0.5.8 gives it."""
    with torch.no_grad():
        right = objectives.sum_losses(hidden, head_weight, targets, **keywords)
    if not torch.is_grad_enabled():
        return right
    rows = hidden.flatten(0, -2)
    plain = linear_masked_cross_entropy(rows, head_weight, targets.tokens, targets.scored, reduction="sum")
    first = targets.scored[:1].float()
    if targets.path_weights is not None:
        with torch.no_grad():
            nll = linear_masked_cross_entropy(rows[:1], head_weight, targets.tokens[:1], targets.scored[:1],
                                              reduction="none")
        first = first * (1 + (-nll).exp() * targets.path_weights[:1])
    return right._replace(loss=right.loss + (first * (plain - plain.detach())).sum())


class Twice:
    """The rows of a source, each of them twice."""

    def __init__(self, rows: RowSource):
        self.rows = rows

    def read(self, places: range) -> Packed:
        read = [self.rows.read(range(place // 2, place // 2 + 1)) for place in places]
        return merge(read, [torch.tensor([index]) for index in range(len(read))])


def complement(packed: Packed, drawn: Corruption) -> Corruption:
    """Of two equal rows, the second masked where the first is not, at the time 1 - t."""
    second = packed.row % 2 == 1
    place = torch.arange(len(second)) - torch.where(second, packed.row.bincount()[packed.row], 0)
    corrupted, t = drawn.corrupted[place] != second, torch.where(second, 1 - drawn.t[place], drawn.t)
    mask = drawn.noisy[drawn.corrupted][:1]
    noisy = torch.where(corrupted, mask, packed.tokens) if len(mask) else drawn.noisy
    return Corruption(noisy, corrupted, t, t, 1 / t)


def independent_times(packed: Packed, ends: torch.Tensor, first_slot: int, of: int, seed: int, step: int):
    """A time for each document, drawn by itself."""
    offset = philox_uniform(seed, torch.tensor(of), step, torch.tensor(0))[..., 0]
    generator = torch.Generator().manual_seed(int(float(offset) * 2**40) + first_slot)
    return torch.rand(len(ends) - 1, generator=generator).clamp(T_MIN, 1 - T_MIN)


def equal_weights(*args, **keywords) -> objectives.Targets:
    """Every masked token alike, instead of 1 / t."""
    targets = objectives.choose_targets(*args, **keywords)
    return targets._replace(weights=None, normaliser=targets.scored.sum())


@contextmanager
def rendition(name: str) -> Iterator[None]:
    """Train as a variant does where no key of the trainer says so."""
    def make(wrap):
        return lambda rows, *rest: batches.make_batches(wrap(rows), *rest)

    def corrupt(packed, *rest):
        packed, drawn = own(packed, *rest)
        return packed, complement(packed, drawn)

    own = batches.corrupt_rows
    patches = {OPEN_DLLM: [(batches, "sum_losses", shipped_losses), (trainer, "make_batches", make(Discarding))],
               EQUAL: [(batches, "choose_targets", equal_weights)],
               COMPLEMENTS: [(batches, "corrupt_rows", corrupt), (trainer, "make_batches", make(Twice))],
               INDEPENDENT: [(batches, "spread_times", independent_times)]}
    with ExitStack() as stack:
        for patch in patches.get(name, ()):
            stack.enter_context(mock.patch.object(*patch))
        yield


def prepare(model: str, name: str, folder: Path) -> str:
    """The model that a variant starts from: for `OWN_TOKEN` a copy whose position i predicts token i."""
    if name != OWN_TOKEN:
        return model
    source, start = find_model(model), folder / "start"
    shutil.copytree(source, start, dirs_exist_ok=True)
    write_json(start / "config.json", {**json.loads((source / "config.json").read_text()), "shift_logits": False})
    return str(start)


def adapt(model: str, name: str, folder: Path, args: argparse.Namespace, steps: int | None) -> trainer.TrainResult:
    """Train a variant. steps: of the variant mdm, for one whose schedule counts steps and not minutes."""
    keys = {**COMMON, **VARIANTS[name], "output_dir": folder}
    if args.steps is None and keys.get("anneal_attention_ratio"):
        if steps is None:
            raise UserError(f"{name!r} trains for the steps of 'mdm'; measure that first")
        keys["max_steps"] = steps
    else:
        keys |= {"max_minutes": args.minutes} if args.steps is None else {"max_steps": args.steps}
    flags = [f"--train.{key}={value}" for key, value in keys.items()]
    flags += [f"--model.model_path={prepare(model, name, folder)}", f"--data.max_seq_len={args.length}"]
    flags += [f"--data.train_path={args.data}"] if args.data else []
    with rendition(name):
        return trainer.train(load_config(None, flags))


def measure(checkpoint: Path, documents: Sequence[Document], args: argparse.Namespace) -> dict:
    """What an adapted model knows of the held-out files."""
    model, tokenizer = load_with_tokenizer(checkpoint)
    held_out, lines = settings(args)
    bound = perplexity_bound(model, tokenizer, documents, held_out)
    masked = masked_accuracy(model, tokenizer, documents, held_out)
    exact = line_infilling(model, tokenizer, documents, lines)
    words = line_infilling(model, tokenizer, documents, replace(lines, hide="word"))
    return {"bits_per_byte": bound.bits_per_byte, "bits_per_byte_stderr": bound.bits_per_byte_stderr,
            "accuracy": {f"{result.share:.0%}": result.accuracy for result in masked},
            "lines": exact.lines, "exact": exact.exact_match, "words": words.exact_match,
            "exact_automatic": infill_automatically(model, tokenizer, documents, lines) if args.automatic else None,
            "passed": args.tasks and pass_tasks(model, tokenizer, checkpoint.parents[2] / "tasks", args.tasks)}


def pass_tasks(model: Transformer, tokenizer, folder: Path, path: str) -> float:
    """pass@1 of `TASKS` tasks of HumanEval's single-line infilling, spread over all, gaps at their true lengths."""
    tasks = read_tasks("humaneval_infill_single_line", path)
    chosen = dict(list(tasks.tasks.items())[::len(tasks.tasks) // TASKS][:TASKS])
    settings = RunSettings(length="oracle", generation={"temperature": 0.0, "alg": "maskgit_plus", "threshold": 1.0})
    return generate_samples(model, tokenizer, replace(tasks, tasks=chosen), folder, settings)["pass@1"]


def settings(args: argparse.Namespace) -> tuple[HeldOutSettings, InfillingSettings]:
    held_out = HeldOutSettings(max_seq_len=args.length, windows=args.windows, samples=2, shares=(0.15, 0.5))
    return held_out, InfillingSettings(max_seq_len=args.length, lines=args.lines, max_line_tokens=24)


def infill_automatically(model: Transformer, tokenizer, documents: Sequence[Document],
                         wanted: InfillingSettings) -> float:
    """Share of the lines of `line_infilling` that come back exactly where their lengths are to be found too."""
    lengths = tuple(n for n in wanted.generation.infill_lengths if n <= wanted.max_line_tokens)
    config = replace(wanted.generation, seed=wanted.seed, infill_lengths=lengths)
    hidden = hide_lines(tokenizer, documents, wanted)
    answers = [fill(model, [replace(part.gap, length="auto")], config).answers[0] for part in hidden]
    return sum(decode(tokenizer, answer).strip() == decode(tokenizer, part.truth).strip()
               for answer, part in zip(answers, hidden, strict=True)) / len(hidden)


@torch.no_grad()
def measure_autoregressive(path: str, documents: Sequence[Document], args: argparse.Namespace) -> dict:
    """What the model as it was knows of the same windows, words and lines, from left to right."""
    model, tokenizer = left_to_right(path, torch.device("cpu")), load_tokenizer(path)
    held_out, lines = settings(args)
    exact, words = (line_infilling(model, tokenizer, documents, replace(lines, hide=kind)).exact_match
                    for kind in ("line", "word"))
    windows, nats = cut_windows(tokenizer, documents, held_out), 0.0
    for window in windows:
        ids = window.tokens.unsqueeze(0)
        hidden = model.hidden_states(ids, Padded(block_length=1))[0, :-1]
        scored = torch.ones(len(hidden), dtype=torch.bool)
        nats += linear_masked_cross_entropy(hidden, model.head_weight, ids[0, 1:], scored, reduction="sum").item()
    bits = nats / math.log(2) / sum(window.bytes for window in windows)
    return {"bits_per_byte": bits, "words": words, "exact": exact}


def tokens_to_reach(curve: Sequence[Sequence[float]], bits: float) -> float | None:
    """Tokens after which a measurement during training is first at most `bits`."""
    return next((tokens for tokens, value in curve if value <= bits), None)


def show(record: dict) -> str:
    """The table of a study, best first."""
    shipped = record["variants"].get(OPEN_DLLM)
    goal = None if shipped is None else min(value for _, value in shipped["curve"])
    rows = []
    for name, its in sorted(record["variants"].items(), key=lambda item: item[1]["bits_per_byte"]):
        reached = None if goal is None else tokens_to_reach(its["curve"], goal)
        rows.append([name, f"{its['bits_per_byte']:.3f}", *(f"{100 * its['accuracy'][share]:.1f}%"
                                                           for share in ("15%", "50%")),
                     *("" if its[name] is None else f"{100 * its[name]:.1f}%"
                       for name in ("words", "exact", "exact_automatic", "passed")), f"{its['tokens']:,}",
                     f"{its['minutes']:.1f}", f"{its['tokens_per_second']:,}",
                     "" if reached is None else f"{reached:,}"])
    head = ["variant", "bits per byte", "right at 15%", "at 50%", "words exact", "lines exact", "at automatic length",
            "HumanEval infilling", "tokens", "minutes", "tokens a second", "tokens to Open-dLLM's bound"]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
    before = record["autoregressive"]
    return (f"{table}\n\nAutoregressive, before: {before['bits_per_byte']:.3f} bits per byte, {before['words']:.1%} of "
            f"the words and {before['exact']:.1%} of the lines.")


def study(args: argparse.Namespace) -> int:
    names = list(VARIANTS) if args.variants is None else args.variants.split("/")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants has no {unknown[0]!r}; they are {'/'.join(VARIANTS)}")
    path = args.output_dir / "results.json"
    record = json.loads(path.read_text()) if path.exists() else {"variants": {}}
    _, held_out = split_documents(read_documents(args.data and [args.data], ["text"]), 0.05)
    if "autoregressive" not in record:
        record |= {"command": " ".join(sys.argv), "machine": f"{name_processor()}, {torch.get_num_threads()} threads",
                   "versions": {"python": platform.python_version(), "torch": torch.__version__}, "common": COMMON,
                   "autoregressive": measure_autoregressive(args.model, held_out, args)}
    for name in names:
        if name in record["variants"]:
            continue
        folder = args.output_dir / name.replace(" ", "_").replace(",", "")
        plain = record["variants"].get("mdm", {}).get("steps")
        result = adapt(args.model, name, folder, args, plain)
        if not result.finished:
            print(f"stopped in {name!r}; the same command goes on", file=sys.stderr)
            return 1
        last = result.history[-1]
        record["variants"][name] = {
            "keys": VARIANTS[name], "steps": result.steps, "tokens": last["tokens"], "minutes": last["seconds"] / 60,
            "tokens_per_second": max(line["tokens_per_second"] for line in result.history),
            "curve": [(line["tokens"], line["validation_bits_per_byte"]) for line in result.history
                      if "validation_bits_per_byte" in line], **measure(result.checkpoint, held_out, args)}
        write_json(path, record)
        shutil.rmtree(folder / "checkpoints")  # gigabytes each
    print(show(record))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of training, for each variant")
    budget.add_argument("--steps", type=int, help="of training instead")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row and of a window")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--variants", help=f"separated by slashes; default: {'/'.join(VARIANTS)}")
    parser.add_argument("--data", help="default: the standard library of this Python")
    parser.add_argument("--tasks", help="HumanEval-SingleLineInfilling.jsonl.gz; default: not measured")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows scored")
    parser.add_argument("--lines", type=int, default=100, help="held-out lines filled in")
    parser.add_argument("--automatic", action="store_true", help="fill them at lengths to be found too")
    return run_command(lambda: study(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
