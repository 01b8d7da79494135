"""python -m benchmarks.frontier MODEL --output-dir DIR [--name NAME] [--settings NAME/...] [--data PATH]

The frontier of decoding: what of quality a setting gives for tokens per forward pass. MODEL is an adapted model; hidden
words and lines of held-out functions are filled in by each of `SETTINGS`, and what comes back exactly is counted. Texts
are continued by self-speculation too, and compared with one token a pass. DATA is the standard library of this Python,
split as `dllm demo` does. DIR/frontier.json is written after each setting; the same command goes on after a stop,
prints the table, and draws DIR/frontier.svg where matplotlib is installed. Several models, by their NAMEs, share a DIR.
"""

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from dllm.data import Document, read_documents, split_documents
from dllm.errors import UserError, run_command
from dllm.evaluators.estimates import wilson_interval
from dllm.evaluators.held_out import decode
from dllm.evaluators.likelihood import batches_of_similar_length
from dllm.evaluators.line_infilling import HiddenLines, hide_lines
from dllm.evaluators.settings import InfillingSettings
from dllm.files import name_processor, write_json
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import fill
from dllm.generation.sampler import generate
from dllm.model.loading import load_with_tokenizer
from dllm.model.transformer import Transformer
from dllm.pages.base import can_plot

ONE = "one token a step"
SURE = {"alg": "maskgit_plus"}
SETTINGS: Mapping[str, dict] = {
    ONE: {**SURE, "threshold": 1.0},
    **{f"threshold {bound}": {**SURE, "threshold": bound} for bound in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)},
    **{f"factor {factor}": {**SURE, "factor": factor} for factor in (0.5, 1.0, 1.5, 2.0)},
    **{f"entropy_bound {bound}": {"alg": "entropy_bound", "entropy_bound": bound}
       for bound in (0.1, 0.5, 1.0, 2.0, 4.0)},
    **{f"threshold {bound}, sub-blocks of 4": {**SURE, "threshold": bound, "sub_block_length": 4}
       for bound in (0.5, 0.3)},
    **{f"threshold {bound}, window of {n}": {**SURE, "threshold": bound, "window_blocks": n}
       for bound in (0.5, 0.3) for n in (2, 4)},
    "low_confidence_dynamic 0.9, 8 steps": {"remasking": "low_confidence_dynamic", "threshold": 0.9, "steps": 8},
    "p2, 8 steps": {"alg": "p2", "steps": 8},
    "left to right": {"alg": "self_speculation", "draft_length": 0},
    **{f"self_speculation, {n} drafted": {"alg": "self_speculation", "draft_length": n} for n in (1, 2, 4)},
}
KINDS = ("line", "word")
LONGEST = 16  # tokens of a line
BATCH = 1024  # positions of a forward pass; rows of similar length waste few of them
PROMPT, NEW = 64, 64  # tokens of a text before and after


def measure_setting(model: Transformer, tokenizer, hidden: Sequence[HiddenLines], config: MDMGenerationConfig) -> dict:
    """What comes back of hidden words or lines; a block-causal model does not see what stands after them."""
    gaps = [replace(part.gap, suffix=part.gap.suffix[:0]) if model.config.block_causal else part.gap for part in hidden]
    exact, passes = ["0"] * len(gaps), 0.0
    for batch in batches_of_similar_length([gap.positions for gap in gaps], BATCH):
        filled = fill(model, [gaps[i] for i in batch], config)
        passes += sum(gap.length for gap in filled.gaps) / filled.output.tokens_per_forward
        for i, answer in zip(batch, filled.answers, strict=True):
            same = decode(tokenizer, answer).strip() == decode(tokenizer, hidden[i].truth).strip()
            exact[i] = "1" if same else "0"
    tokens = sum(gap.length for gap in gaps)
    return {"exact": "".join(exact), "tokens": tokens, "tokens_per_forward": tokens / passes}


def measure_texts(model: Transformer, tokenizer, documents: Sequence[Document], texts: int,
                  drafts: Sequence[int]) -> dict:
    """Tokens per forward pass of texts that are continued greedily, and how many equal those of one token a pass."""
    tokens = [torch.tensor(tokenizer(document.text[:20_000]).input_ids) for document in documents]
    prompts = torch.stack([ids[len(ids) // 3:len(ids) // 3 + PROMPT] for ids in tokens
                           if len(ids) >= 2 * (PROMPT + NEW)][:texts])
    written, measured = None, {"texts": len(prompts), "prompt": PROMPT, "new": NEW, "drafts": {}}
    for length in (0, *drafts):
        out = generate(model, prompts, config=MDMGenerationConfig(alg="self_speculation", draft_length=length,
                                                                  max_new_tokens=NEW))
        written = out.sequences if written is None else written
        measured["drafts"][str(length)] = {"tokens_per_forward": out.tokens_per_forward,
                                           "equal": int((out.sequences == written).all(1).sum())}
        print(f"{length} drafted: {measured['drafts'][str(length)]}", file=sys.stderr)
    return measured


def show(model: dict) -> str:
    """The tables of a model, by tokens per forward pass, and what the best setting reaches."""
    parts = []
    for kind in (kind for kind in KINDS if kind in model):
        rows = [[f"{kind}s", "exact", "95% interval", "lost", "won", "tokens per forward"], ["---"] * 6]
        base = model[kind][ONE]["exact"]
        for name, its in sorted(model[kind].items(), key=lambda item: item[1]["tokens_per_forward"]):
            exact = its["exact"]
            low, high = wilson_interval(exact.count("1"), len(exact))
            pairs = list(zip(base, exact, strict=True))
            rows.append([name, f"{share(its):.0%}", f"{low:.0%} to {high:.0%}", str(pairs.count(("1", "0"))),
                         str(pairs.count(("0", "1"))), f"{its['tokens_per_forward']:.2f}"])
        name = best(model[kind])
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
        parts.append(f"Of {len(base)} {kind}s; at no more than one point lost: {name}, "
                     f"{model[kind][name]['tokens_per_forward']:.2f} tokens per forward.")
    texts = model.get("texts", {"drafts": {}})
    parts += [f"Texts, {length} drafted: {its['tokens_per_forward']:.2f} tokens per forward, {its['equal']} of "
              f"{texts['texts']} equal." for length, its in texts["drafts"].items()]
    return "\n\n".join(parts)


def share(measured: dict) -> float:
    """Of the words or lines, those that came back exactly."""
    return measured["exact"].count("1") / len(measured["exact"])


def best(settings: Mapping[str, dict]) -> str:
    """The setting of most tokens per forward that loses at most one point against one token a step."""
    wanted = share(settings[ONE]) - 0.01 - 1e-9  # and rounding
    return max((name for name, its in settings.items() if share(its) >= wanted),
               key=lambda name: settings[name]["tokens_per_forward"])


def draw(record: dict, path: Path) -> None:
    """Shares that come back against tokens per forward pass, a plot for each model and kind."""
    from matplotlib.figure import Figure

    drawn = [(f"{name}: hidden {kind}s", its[kind]) for name, its in record["models"].items() for kind in KINDS
             if kind in its]
    figure = Figure(figsize=(7, 5 * len(drawn)), layout="constrained")
    for axis, (title, settings) in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
        places: dict[tuple[float, float], list[str]] = {}
        for name, its in settings.items():
            places.setdefault((its["tokens_per_forward"], 100 * share(its)), []).append(name)
        for place, names in places.items():
            speculates = any("draft_length" in SETTINGS[name] for name in names)
            axis.plot(*place, "o", color="tab:orange" if speculates else "tab:blue")
            axis.annotate("\n".join(names), place, fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.margins(0.15)  # room for the names
        axis.set(title=title, xlabel="tokens per forward pass", ylabel="exact, %")
    figure.savefig(path)


def study(args: argparse.Namespace) -> int:
    names = list(SETTINGS) if args.settings is None else args.settings.split("/")
    if unknown := [name for name in names if name not in SETTINGS]:
        raise UserError(f"--settings has no {unknown[0]!r}; they are {'/'.join(SETTINGS)}")
    path = args.output_dir / "frontier.json"
    record = json.loads(path.read_text()) if path.exists() else {"models": {}}
    mine = record["models"].setdefault(args.name or Path(args.model).name, {})
    mine |= {"command": " ".join(["python -m benchmarks.frontier", *sys.argv[1:]]),
             "machine": f"{name_processor()}, {torch.get_num_threads()} threads",
             "versions": {"python": platform.python_version(), "torch": torch.__version__,
                          "transformers": transformers.__version__}}
    model, tokenizer = load_with_tokenizer(args.model)
    _, held_out = split_documents(read_documents(args.data and [args.data], ["text"]), 0.05)
    for kind in filter(None, args.kinds.split(",")):
        measured = mine.setdefault(kind, {})
        hidden = hide_lines(tokenizer, held_out, InfillingSettings(hide=kind, lines=args.items, max_seq_len=args.length,
                                                                   max_line_tokens=LONGEST))
        for name in [ONE, *(name for name in names if name != ONE)]:  # the others are compared with it
            if name not in measured:
                measured[name] = measure_setting(model, tokenizer, hidden, MDMGenerationConfig(**SETTINGS[name]))
                write_json(path, record)
    if args.texts and "texts" not in mine:
        mine["texts"] = measure_texts(model, tokenizer, held_out, args.texts,
                                      [int(n) for n in args.drafts.split(",")])
        write_json(path, record)
    print(show(mine))
    if can_plot() and any(kind in its for its in record["models"].values() for kind in KINDS):
        draw(record, args.output_dir / "frontier.svg")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--name", help="of the model in the table; default: that of its folder")
    parser.add_argument("--settings", help=f"separated by slashes; default: {'/'.join(SETTINGS)}")
    parser.add_argument("--kinds", default=",".join(KINDS), help="what is hidden, or nothing: ''; default: %(default)s")
    parser.add_argument("--data", help="default: the standard library of this Python")
    parser.add_argument("--length", type=int, default=96, help="tokens of a window")
    parser.add_argument("--items", type=int, default=100, help="words and lines filled in")
    parser.add_argument("--drafts", default="1,2,4", help="tokens drafted a pass in texts; default: %(default)s")
    parser.add_argument("--texts", type=int, default=20, help="texts continued; 0: none")
    return run_command(lambda: study(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
