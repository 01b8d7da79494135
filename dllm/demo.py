"""`dllm demo`: train a small model on the running Python's standard library, measure it, show it, write a report.

Started again, it continues where it was stopped. Started again after the end, it keeps the model and redoes the
measurements and the report; delete the folder to start over.
"""

import dataclasses
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllm import __version__
from dllm.checkpoint import write_atomically
from dllm.config import Config, load_config
from dllm.data import Document, read_documents, split_documents, tokenize
from dllm.distributed import choose_device
from dllm.evaluators import (
    BaselineResult,
    HeldOutSettings,
    InfillingResult,
    InfillingSettings,
    MaskedResult,
    PerplexityResult,
    baseline_accuracy,
    count_ngrams,
    line_infilling,
    masked_accuracy,
    perplexity_bound,
)
from dllm.evaluators.held_out import decode
from dllm.evaluators.infilling import draw_gaps
from dllm.model import DiffusionLM
from dllm.report import Report, write_report
from dllm.sampler import MDMGenerationConfig
from dllm.tokenizer import load_tokenizer
from dllm.trainer import train
from dllm.visualize import animation, record

# A GPU does some thousand times the work of two CPU cores, so there the demo is larger and shorter.
ON_GPU = ("--model.vocab_size=4096", "--model.hidden_size=512", "--model.intermediate_size=1536",
          "--model.num_hidden_layers=8", "--model.num_attention_heads=8", "--model.num_key_value_heads=8",
          "--data.max_seq_len=256", "--train.micro_batch_size=64", "--train.lr=0.004", "--train.muon_lr=0.01",
          "--train.max_minutes=3", "--train.log_steps=10")
STATEMENTS_ANIMATED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    report: Path
    checkpoint: Path  # for `DiffusionLM.from_pretrained`, `dllm sample` and `dllm infill`
    perplexity: PerplexityResult
    masked: tuple[MaskedResult, ...]
    baselines: tuple[BaselineResult, ...]
    infilling: InfillingResult
    success: bool  # beats unigram at every share, and bigram at the largest, in accuracy and in nats
    verdict: str  # the same in words


def run(output_dir: str | os.PathLike) -> int:
    """The command line's demo; 0 also where a slow machine trained too little to beat the baselines, which it says."""
    run_demo(output_dir)
    return 0


def run_demo(output_dir: str | os.PathLike = "demo", overrides: Sequence[str] = (), *, windows: int = 512,
             lines: int = 200) -> DemoResult:
    """Train, evaluate, infill and report, as configs/demo.yaml says; larger where there is a GPU.

    Args:
        output_dir: gets report.html and what training writes (checkpoints/, metrics.jsonl, config.yaml).
        overrides: configuration flags such as "--train.max_minutes=1"; they win.
        windows, lines: how many held-out windows and lines of functions are scored.
    Raises: UserError or Failure as training does.
    """
    console = Console()
    config = demo_config(output_dir, overrides)
    console.print(f"Training on {config.data.train_path or 'the standard library of this Python'} for up to "
                  f"{config.train.max_minutes:g} minutes, into {output_dir}. Stopped, it continues when started again.")
    trained = train(config)

    device = choose_device(config.train)
    model = DiffusionLM.from_pretrained(trained.checkpoint, device=device)
    tokenizer = load_tokenizer(trained.checkpoint, model.mask_token_id)
    documents = read_documents(config.data.path_list, config.data.key_list)
    training, held_out = split_documents(documents, config.data.validation_share)
    length = config.data.max_seq_len
    settings = HeldOutSettings(max_seq_len=length, windows=windows)
    infill = InfillingSettings(max_seq_len=length, lines=lines, max_line_tokens=min(64, length // 2))
    with console.status("") as status:
        status.update("Counting words for the baselines")
        sequences = [tokens.long() for tokens in tokenize(tokenizer, training)]
        baselines = baseline_accuracy(count_ngrams(sequences, model.config.vocab_size), tokenizer, held_out, settings)
        status.update(f"Predicting hidden tokens of {len(held_out)} held-out files")
        masked = masked_accuracy(model, tokenizer, held_out, settings)
        perplexity = perplexity_bound(model, tokenizer, held_out, settings)
        status.update(f"Infilling {lines} lines of held-out functions")
        infilling = line_infilling(model, tokenizer, held_out, infill)
        shown, source, truth = animate_function(model, tokenizer, held_out, infill)

    success, verdict = judge(masked, baselines)
    tokens = sum(map(len, sequences))
    last = trained.history[-1]
    facts = {
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "Training data": f"{len(training):,} files, {tokens:,} tokens of "
                         + (config.data.train_path or f"the standard library of Python {platform.python_version()}"),
        "Training time": format_seconds(last["seconds"]),
        "Training": f"{trained.steps:,} steps, {last['tokens']:,} tokens seen, {last['tokens'] / last['seconds']:,.0f} "
                    "tokens/s, measurements and checkpoints included",
        "Held out": f"{len(held_out):,} files, chosen by a hash of their names",
        "Machine": describe_machine(device),
        "Software": f"dllm {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
                    f"{platform.platform()}",
    }
    command = " ".join(["dllm demo --output-dir", str(output_dir)])
    page = write_report(Report(
        verdict=verdict, success=success, perplexity=perplexity, masked=masked, baselines=baselines,
        infilling=infilling, training=[(line["step"], line["nll"]) for line in trained.history],
        validation=[(line["step"], line["validation_loss"]) for line in trained.history if "validation_loss" in line],
        animation=shown, animation_source=source, animation_truth=truth, facts=facts, command=command,
        config=config.to_yaml()))
    report = Path(output_dir) / "report.html"
    write_atomically(report, page.encode("utf-8", "replace"))

    result = DemoResult(report=report, checkpoint=trained.checkpoint, perplexity=perplexity, masked=masked,
                        baselines=baselines, infilling=infilling, success=success, verdict=verdict)
    show(console, result)
    return result


def demo_config(output_dir: str | os.PathLike, overrides: Sequence[str]) -> Config:
    """configs/demo.yaml of the checkout or, once installed, of the package; enlarged where training finds a GPU."""
    here = Path(__file__).resolve().parent
    path = next(p for p in (here / "configs" / "demo.yaml", here.parent / "configs" / "demo.yaml") if p.exists())
    flags = [f"--train.output_dir={output_dir}", *overrides]
    config = load_config(path, flags)
    return load_config(path, [*ON_GPU, *flags]) if choose_device(config.train).type == "cuda" else config


def judge(masked: Sequence[MaskedResult], baselines: Sequence[BaselineResult]) -> tuple[bool, str]:
    """Whether the model beats unigram everywhere and bigram at the largest share; and what it beats, in words.

    To beat is to be better in accuracy and in nats.
    """
    won, lost = [], []
    for model, baseline in zip(masked, baselines, strict=True):
        for name in ("unigram", "bigram"):
            rival: MaskedResult = getattr(baseline, name)
            beats = model.accuracy > rival.accuracy and model.nats < rival.nats
            (won if beats else lost).append((name, model.share))
    largest = max(model.share for model in masked)
    success = all(name == "bigram" and share < largest for name, share in lost)

    def describe(pairs: Sequence[tuple[str, float]]) -> str:
        parts = []
        for name in ("unigram", "bigram"):
            shares = [f"{share:.0%}" for other, share in pairs if other == name]
            if shares:
                parts.append(f"the {name} baseline with {' and '.join(shares)} of the tokens hidden")
        return ", and ".join(parts)

    verdict = f"On held-out files the model beats {describe(won) or 'neither baseline'}"
    return success, verdict + (f"; it does not beat {describe(lost)}." if lost else ".")


def animate_function(model: DiffusionLM, tokenizer, documents: Sequence[Document],
                     settings: InfillingSettings) -> tuple[str, str, str]:
    """Some statements of one held-out function filled in: the animation's HTML, the source's name, the true text.

    The function is the first drawn that the model sees whole; if there is none, the first.
    """
    longer = dataclasses.replace(settings, max_line_tokens=settings.max_seq_len // 4, seed=settings.seed + 1)
    gaps = draw_gaps(tokenizer, documents, longer, STATEMENTS_ANIMATED)
    gap = next((gap for gap in gaps if gap.whole), gaps[0])
    canvas = gap.tokens.clone()
    canvas[gap.start:gap.end] = model.mask_token_id
    trace = record(model, canvas, MDMGenerationConfig(alg="maskgit_plus", steps=gap.end - gap.start, seed=0))
    truth = gap.prefix + decode(tokenizer, gap.tokens[gap.start:gap.end]) + gap.suffix
    return animation(trace, tokenizer, gap.function), gap.source, truth.strip("\n")


def show(console: Console, result: DemoResult) -> None:
    """Examples beside the truth, the numbers and the verdict, in the terminal."""
    examples = Table(title="Held-out lines, filled in", show_lines=False, title_justify="left")
    for column in ("", "model", "truth", "from"):
        examples.add_column(column, overflow="fold")
    for example in result.infilling.examples[:12]:
        examples.add_row(Text("=" if example.exact else "≠", style="green" if example.exact else "yellow"),
                         Text(example.infilled.strip()), Text(example.truth.strip()), Text(example.source, style="dim"))
    console.print(examples)

    numbers = Table(title="Hidden tokens of held-out files: accuracy, nats per token", title_justify="left")
    numbers.add_column("")
    for model in result.masked:
        numbers.add_column(f"{model.share:.0%} hidden", justify="right")
    rows = {"model": result.masked, "bigram": [b.bigram for b in result.baselines],
            "unigram": [b.unigram for b in result.baselines]}
    for name, results in rows.items():
        numbers.add_row(name, *(f"{100 * r.accuracy:.1f}%  {r.nats:.2f}" for r in results))
    console.print(numbers)
    infilling = result.infilling
    console.print(f"At most {result.perplexity.bits_per_byte:.2f} bits per byte "
                  f"({result.perplexity.nats_per_token:.2f} nats per token). {infilling.exact_match:.1%} of "
                  f"{infilling.lines} lines infilled exactly ({infilling.low:.1%} to {infilling.high:.1%}).")
    console.print(Text(result.verdict, style="bold green" if result.success else "bold red"))
    console.print(f"Report: {result.report}   Model: {result.checkpoint}", soft_wrap=True)


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
