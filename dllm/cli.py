"""The command `dllm`. Nothing heavy is imported before a command needs it, so that --help is quick."""

import argparse
import difflib
import hashlib
import json
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

from dllm.errors import UserError, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for bad input, 1 for another failure, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    return run_command(lambda: dispatch([argument for argument in arguments if argument != "--debug"]), debug)


def dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["train"] and not {"-h", "--help"} & set(arguments):
        return train(arguments[1:])  # its flags are the keys of the configuration, which dllm.config knows
    if arguments[:1] == ["lm_eval"]:
        return run_lm_eval(arguments[1:])  # its flags are lm-eval's
    try:
        args = build_parser(describe_keys=arguments[:1] == ["train"],
                            task=arguments[1] if arguments[:1] == ["eval"] and len(arguments) > 1 else None
                            ).parse_args(arguments)
    except SystemExit as end:  # after --help
        return end.code
    args.given = arguments
    return args.run(args)


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit, and names the nearest flag or command."""

    hint = ""  # what else could be wrong than the arguments

    def __init__(self, **keywords):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)

    def parse_known_args(self, args=None, namespace=None):
        flags = self._option_string_actions
        for argument in args:  # before argparse complains of what is missing
            if self._subparsers is not None and not argument.startswith("-"):
                break  # a command, whose own parser checks the rest
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in flags:
                raise UserError(f"{self.prog} has no flag {flag}{self.hint or name_nearest(flag, flags)}; "
                                f"see {self.prog} --help")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0] if action.option_strings else action.metavar
            raise UserError(f"{name} is one of {', '.join(action.choices)}, not {value!r}"
                            + name_nearest(str(value), action.choices))

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help{self.hint}")


def name_nearest(word: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(valid), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def build_parser(describe_keys: bool = False, task: str | None = None) -> Parser:
    """task: what follows `eval`, which may be a task of lm-eval's."""
    parser = Parser(prog="dllm", description="Train, evaluate and sample masked diffusion language models.",
                    epilog="dllm COMMAND --help says more. --debug, or DLLM_DEBUG=1, shows where an error came from.")
    from dllm import __version__

    parser.add_argument("--version", action="version", version=f"dllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo", help="train a small model on Python's library, evaluate it, infill, write a report",
        description="Train a small model on the source of Python's standard library, measure it on held-out files,\n"
                    "infill held-out functions and write a report. Needs no network.")
    demo.add_argument("--output-dir", default="demo", metavar="DIR", help="default: demo")
    demo.set_defaults(run=run_demo)

    train_help = commands.add_parser(
        "train", help="train, or continue training, as a YAML file and flags say",
        usage="dllm train [CONFIG.yaml] [--group.key=value ...] [--dry-run]",
        description="Train as CONFIG.yaml and the flags say. A stopped run continues from its last checkpoint.\n"
                    "--dry-run only prints what would be done: configuration, parameters, memory, steps.")
    if describe_keys:
        train_help.epilog = list_config_keys()

    sample = commands.add_parser(
        "sample", help="continue a prompt",
        description="Continue a prompt. The text goes to stdout, a line about the run to stderr.")
    add_model(sample)
    source = sample.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="default: standard input, or nothing on a terminal")
    source.add_argument("--prompt-file", type=Path, metavar="FILE")
    sample.add_argument("--max-new-tokens", type=whole, metavar="N", help="default: 128")
    add_generation(sample)
    sample.set_defaults(run=run_sample)

    infill = commands.add_parser("infill", help="fill in a gap in a text",
                                 description="Fill in a gap of --length tokens. The whole text goes to stdout.")
    add_model(infill)
    infill.add_argument("--prefix", metavar="TEXT", help="what comes before the gap")
    infill.add_argument("--suffix", metavar="TEXT", help="what comes after it")
    infill.add_argument("--file", type=Path, metavar="FILE", help="or: a text that has the marker at the gap")
    infill.add_argument("--marker", default="<FILL>", metavar="TEXT", help="default: <FILL>")
    infill.add_argument("--length", type=length, default="auto", metavar="N",
                        help="tokens to fill in; auto, the default, tries several and takes that of the surest text")
    add_generation(infill)
    infill.set_defaults(run=run_infill)

    evaluate = commands.add_parser("eval", help="measure a model on text, or on a code benchmark",
                                   description="Measure a model on text, on a code benchmark, or on any task of "
                                               "lm-eval's (dllm lm_eval ls tasks).")
    tasks = evaluate.add_subparsers(metavar="TASK", required=True)
    wanted = task
    for name, text in (("perplexity", "bound on the perplexity, in nats per token and bits per byte"),
                       ("masked_accuracy", "accuracy at the corrupted tokens, at fixed shares of corruption"),
                       ("infill", "exact match of infilled lines of Python functions")):
        task = tasks.add_parser(name, help=text, description=f"Measure: {text}. The result goes to stdout as JSON.")
        task.add_argument("--model", required=True, metavar="MODEL", help="folder, or hub repository as owner/name")
        add_device(task)
        task.add_argument("--data", metavar="PATHS", help="folders and files, separated by commas; default: the "
                                                          "standard library of the running Python")
        task.add_argument("--text-keys", default="text", metavar="NAMES",
                          help="columns of JSONL and Parquet files, the first present is taken; default: text")
        task.add_argument("--validation-share", type=number, metavar="SHARE",
                          help="only the documents that a training run with this data.validation_share holds out")
        add_setting(task, "--max-seq-len", "tokens of a window; default: 512")
        add_setting(task, "--seed", "default: 0")
        if name == "infill":
            add_setting(task, "--lines", "lines to fill in; default: 100")
            add_setting(task, "--max-line-tokens", "of a line; default: 64")
        else:
            add_setting(task, "--windows", "windows scored, at most; default: 256")
        if name == "perplexity":
            add_setting(task, "--samples", "corrupted copies of each window; default: 4")
        if name == "masked_accuracy":
            task.add_argument("--shares", type=numbers, default=argparse.SUPPRESS, metavar="SHARES",
                              help="corrupted shares, separated by commas; default: 0.15,0.5")
        task.add_argument("--output", type=Path, metavar="FILE",
                          help="write the JSON here too" + (", with every line" if name == "infill" else ""))
        task.set_defaults(run=run_eval, task=name)

    add_code_tasks(tasks)
    if wanted is not None and not wanted.startswith("-") and wanted not in tasks.choices:
        add_harness_task(tasks, wanted)
    add_score(commands)
    add_scoreboard(commands)
    commands.add_parser("lm_eval", help="lm-eval's own command, with the model dllm and our task files")

    add_serve(commands)
    add_export(commands)
    add_data(commands)

    doctor = commands.add_parser("doctor", help="what is installed, what runs here, what to install",
                                 description="Print versions, devices, backends with reasons, and what to install.")
    doctor.set_defaults(run=run_doctor)
    return parser


def add_export(commands) -> None:
    export = commands.add_parser(
        "export", help="write a trained model as a folder to publish, or upload it to the hub",
        description="Write the newest checkpoint of a run as a folder: weights, configuration, tokenizer, generation\n"
                    "defaults, a model card, and dllm_run.json, which says what made it.")
    export.add_argument("source", metavar="RUN", help="train.output_dir of a run, or one of its folders global_step_N")
    export.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="a new folder")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
                        help="of the weights; default: float32")
    export.add_argument("--push", metavar="OWNER/NAME", help="then upload it as this repository of the hub")
    export.add_argument("--private", action="store_true", help="with --push: a private repository, if it is new")
    export.set_defaults(run=run_export)


def add_serve(commands) -> None:
    serve = commands.add_parser(
        "serve", help="serve a model over HTTP: OpenAI's API, fill-in-the-middle, and a page",
        description="Serve a model: OpenAI's chat and completions, with suffix, fim and edit as Mercury has them, a\n"
                    "stream of the canvas being denoised, and a page at /. The flags about denoising are the defaults\n"
                    "of requests. SIGTERM ends it when all requests are answered.")
    add_model(serve)
    serve.add_argument("--name", metavar="NAME", help="that clients call the model; default: the folder's")
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; any other needs --api-key")
    serve.add_argument("--port", type=whole, default=8000, help="default: 8000")
    serve.add_argument("--api-key", metavar="KEY", help="that requests must send; default: DLLM_API_KEY, or none")
    for flag, default, text in (("--max-tokens", 1024, "of an answer, at most"),
                                ("--max-batch", 32, "texts denoised together, at most"),
                                ("--max-queue", 128, "requests that may wait; more get status 429"),
                                ("--max-seconds", 120, "of a request")):
        serve.add_argument(flag, type=whole, default=default, metavar="N", help=f"{text}; default: {default}")
    add_setting(serve, "--max-new-tokens", "of an answer, where a request does not say; default: 128")
    add_method(serve)
    serve.set_defaults(run=run_serve)

    bench = commands.add_parser(
        "bench-serve", help="measure a server's latency and throughput",
        description="Send completions of random lengths to a server, so many at a time, and print a table.")
    bench.add_argument("url", metavar="URL", help="of the server, as http://127.0.0.1:8000")
    for flag, default, text in (("--requests", 64, "to send"), ("--concurrency", 16, "at a time"),
                                ("--max-tokens", 64, "of the longest answer"), ("--seed", 0, "of the lengths")):
        bench.add_argument(flag, type=whole, default=default, metavar="N", help=f"{text}; default: {default}")
    bench.add_argument("--prompt", default="def fibonacci(n):\n", metavar="TEXT", help="of every request")
    bench.add_argument("--stream", action="store_true", help="ask for the canvas of every step, and time the first one")
    bench.add_argument("--api-key", metavar="KEY", help="default: DLLM_API_KEY, or none")
    bench.add_argument("--output", type=Path, metavar="FILE", help="write the numbers here, as JSON")
    bench.set_defaults(run=run_bench_serve)


def add_data(commands) -> None:
    data = commands.add_parser("data", help="download, count or look at training data",
                               description="Download, count or look at training data.")
    actions = data.add_subparsers(metavar="ACTION", required=True)

    download = actions.add_parser(
        "download", help="fetch a dataset of the Hugging Face hub",
        description="Fetch a dataset of the hub: then data.train_path may name it without a network, or with\n"
                    "--output-dir the folder of Parquet files.")
    download.add_argument("dataset", metavar="DATASET", help="owner/name, owner/name:config or owner/name@split")
    download.add_argument("--output-dir", type=Path, metavar="DIR", help="write it here as Parquet files")
    download.set_defaults(run=run_data_download)

    for name, text, run in (
            ("count", "documents, bytes, tokens and rows, as JSON", run_data_count),
            ("inspect", "some rows as text, what of it is learnt, and a corrupted copy", run_data_inspect)):
        action = actions.add_parser(name, help=text, description=f"Show {text}.")
        action.add_argument("paths", metavar="PATHS", help="what data.train_path takes: folders, files and datasets of "
                                                           "the hub, separated by commas, each with or without *weight")
        action.add_argument("--tokenizer", required=True, metavar="TOKENIZER",
                            help="folder, or hub repository as owner/name")
        for flag, default in (("--data-type", "plaintext"), ("--text-keys", None), ("--chat-template", "default")):
            key = f"data.{flag[2:].replace('-', '_')}"
            action.add_argument(flag, default=default, metavar="VALUE",
                                help=f"as {key} of a training run" + (f"; default: {default}" if default else ""))
        length = 2048 if name == "count" else 256
        action.add_argument("--max-seq-len", type=whole, default=length, metavar="N",
                            help=f"tokens of a row; default: {length}")
        if name == "inspect":
            action.add_argument("--rows", type=whole, default=2, metavar="N", help="to show; default: 2")
            action.add_argument("--seed", type=whole, default=0, metavar="N", help="of the order; default: 0")
        action.set_defaults(run=run)


def add_code_tasks(tasks) -> None:
    from dllm.evaluators.presets import PRESETS
    from dllm.evaluators.tasks import BENCHMARKS

    for name, benchmark in BENCHMARKS.items():
        task = tasks.add_parser(
            name, help="share of the gaps filled rightly" if benchmark.infills else "share of the programs that work",
            description="Generate samples, run them in a sandbox and estimate pass@k. The run is a folder: a stopped\n"
                        "one continues when the same is asked again. The score goes to stdout as JSON.")
        task.add_argument("--model", required=True, metavar="MODEL", help="folder, or hub repository as owner/name")
        add_device(task)
        task.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the folder of the run")
        task.add_argument("--preset", choices=list(PRESETS), default="open_dllm",
                          help="whose settings; flags below go before them; default: open_dllm")
        task.add_argument("--samples", type=whole, metavar="N", help="of each task; default: the preset's")
        if benchmark.infills:
            task.add_argument("--length", metavar="N", help="tokens of a gap; oracle: as many as the answer has; "
                              "average: over 4 to 64; auto: those of the surest text; default: the preset's")
        else:
            task.add_argument("--max-new-tokens", type=whole, metavar="N", help="default: the preset's")
        task.add_argument("--batch-size", type=whole, default=16, metavar="N", help="denoised together; default: 16")
        task.add_argument("--limit", type=whole, metavar="N", help="only the first N tasks")
        add_method(task)
        add_judging(task)
        task.set_defaults(run=run_code_task, task=name)


def add_harness_task(tasks, name: str) -> None:
    near = name_nearest(name, tasks.choices)
    task = tasks.add_parser(name, description="Evaluate on a task or group of lm-eval's. Likelihoods are bounds, by "
                                              "Monte Carlo.\nThe run is a folder; the score goes to stdout as JSON.")
    task.hint = near
    task.add_argument("--model", required=True, metavar="MODEL", help="folder, or hub repository as owner/name")
    add_device(task)
    task.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the folder of the run")
    task.add_argument("--batch-size", type=whole, default=16, metavar="N", help="denoised together; default: 16")
    task.add_argument("--likelihood-samples", type=whole, default=128, metavar="N",
                      help="corrupted copies of a text whose likelihood is bounded; default: 128")
    task.add_argument("--limit", type=whole, metavar="N", help="only the first N documents of each task")
    task.add_argument("--num-fewshot", type=whole, metavar="N", help="examples in the prompt; default: the task's")
    task.add_argument("--apply-chat-template", action="store_true", help="write prompts as the model's conversations")
    task.add_argument("--include-path", metavar="DIR", help="a folder with more task files")
    task.add_argument("--unsafe-code", action="store_true",
                      help="let lm-eval's own tasks run what the model writes, without our sandbox")
    add_setting(task, "--max-new-tokens", "default: the task's max_gen_toks")
    add_method(task)
    task.set_defaults(run=run_harness_task, task=name)


def add_score(commands) -> None:
    score = commands.add_parser(
        "score", help="score samples of a code benchmark, in a sandbox, without a model",
        description="Run samples of a code benchmark in a sandbox, and estimate pass@k. The result goes to stdout as\n"
                    "JSON. Data other than a manifest.json beside the samples names (data.md5, .sha256) is refused.")
    score.add_argument("samples", type=Path, metavar="SAMPLES.jsonl",
                       help="lines with task_id, and completion or solution (a whole program)")
    score.add_argument("--task", required=True, metavar="TASK", help="humaneval, humaneval_plus, mbpp, mbpp_plus, "
                       "humaneval_infill_single_line (or _multi_line, _random_span), santacoder_fim")
    add_judging(score)
    score.add_argument("--skip-bad", action="store_true", help="score what is left without bad lines and missing tasks")
    score.add_argument("--output", type=Path, metavar="FILE", help="write the JSON here too, with every sample")
    score.set_defaults(run=run_score)


def add_scoreboard(commands) -> None:
    scoreboard = commands.add_parser(
        "scoreboard", help="a table and a page of finished runs of eval, beside published results",
        description="Table the finished runs of dllm eval in some folders, beside published results, and tell where\n"
                    "they cannot be compared. The table goes to stdout as Markdown, and with plots to a page.")
    scoreboard.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="folders that have runs, at any depth")
    scoreboard.add_argument("--output-dir", type=Path, metavar="DIR",
                            help="gets scoreboard.md and scoreboard.html; default: the first folder of RUNS")
    scoreboard.set_defaults(run=run_scoreboard)


def add_judging(parser: Parser) -> None:
    parser.add_argument("--data", metavar="PATH", help="the benchmark's file, a folder that has it, or a hub "
                        "repository as owner/name; default: its own repository")
    parser.add_argument("--workers", type=whole, metavar="N", help="programs at a time; default: one for each core")
    parser.add_argument("--timeout", type=number, metavar="S", help="seconds for a program and its tests, or with "
                        "humaneval_plus and mbpp_plus for a call; default: the benchmark's, 3 or 4")
    parser.add_argument("--audit", action="store_true",
                        help="judge every pass again with the tests out of the program's reach, and tell what differs")
    parser.add_argument("--require-sandbox", choices=("strict", "best"), default="best",
                        help="strict: refuse to run without every layer of the sandbox; default: best, with a warning")


def add_model(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, or hub repository as owner/name")
    add_device(parser)


def add_device(parser: Parser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: the GPU if there is one")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="auto: bfloat16 on a GPU, else float32")


def add_method(parser: Parser) -> None:
    """Flags for the fields of `MDMGenerationConfig`; those not given keep its defaults."""
    add_setting(parser, "--steps", "denoising steps at most; default: 512")
    add_setting(parser, "--temperature", "0 takes the most likely token; default: 0", number)
    add_setting(parser, "--top-p", "keep the most likely tokens until their probability passes this", number)
    add_setting(parser, "--top-k", "keep the K most likely tokens")
    add_setting(parser, "--alg", "origin, maskgit_plus, entropy, topk_margin, p2, remdm or confidence_threshold; "
                                 "default: entropy", str)
    add_setting(parser, "--remasking", "low_confidence, random (LLaDA's sampler) or low_confidence_dynamic (LLaDA2's), "
                                       "in the place of --alg", str)
    add_setting(parser, "--block-length", "denoise so many masked positions after the other, from left to right")
    add_setting(parser, "--threshold", "commit all that are so sure, in as many steps as that takes", number)
    add_setting(parser, "--factor", "the same, the surer the more are committed together", number)
    add_setting(parser, "--editing-threshold", "replace committed tokens if so sure of others (LLaDA2.1)", number)
    add_setting(parser, "--expand-token-id", "the token that becomes two masked ones (DreamOn): the gap grows, shrinks")
    add_setting(parser, "--cache", "none, prefix or dual: keep keys and values outside the block as they were", str)
    add_setting(parser, "--cfg-scale", "classifier-free guidance; default: 0", number)
    add_setting(parser, "--alg-temp", "noise on the confidences; default: 0", number)
    parser.add_argument("--stop-at-eos", action="store_true", default=argparse.SUPPRESS,
                        help="end a text at its first end-of-text token, without computing what follows")
    add_setting(parser, "--seed", "default: a fresh one, which is printed; eval: 0")


def add_generation(parser: Parser) -> None:
    """And how many texts, what they must be, and how they are shown."""
    add_method(parser)
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument("--regex", metavar="PATTERN", help="the new text must match this regular expression")
    constraint.add_argument("--json-schema", type=Path, metavar="FILE", help="it must be JSON that this schema accepts")
    add_setting(parser, "--num-return-sequences", "default: 1")
    parser.add_argument("--watch", action="store_true", help="show the text being unmasked, coloured by confidence")
    parser.add_argument("--save-html", type=Path, metavar="FILE", help="write a page here that shows it step by step")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="write the texts, the settings and the counts here, as JSON")


def add_setting(parser: Parser, flag: str, text: str, kind: Callable | None = None) -> None:
    metavar = "N" if kind is None else "X"
    parser.add_argument(flag, type=kind or whole, default=argparse.SUPPRESS, metavar=metavar, help=text)


def length(text: str) -> int | str:
    """A whole number or auto."""
    return text if text == "auto" else whole(text)


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number is wanted, not {text!r}") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number is wanted, not {text!r}") from None


def numbers(text: str) -> tuple[float, ...]:
    return tuple(number(part) for part in text.split(","))


def list_config_keys() -> str:
    from dllm.config import GROUPS

    lines = ["keys and their defaults (what each means: dllm/config.py):"]
    for group, cls in GROUPS.items():
        for field in fields(cls):
            required = field.default is field.default_factory  # both MISSING
            lines.append(f"  --{group}.{field.name}=" + ("(required)" if required else str(field.default)))
    return "\n".join(lines)


def run_demo(args: argparse.Namespace) -> int:
    from dllm.demo import run

    return run(args.output_dir)


def train(arguments: list[str]) -> int:
    from dllm.train import run

    return run(arguments)


def run_doctor(args: argparse.Namespace) -> int:
    from dllm.doctor import report

    report()
    return 0


def run_sample(args: argparse.Namespace) -> int:
    from dllm.sampler import generate
    from dllm.tokenizer import cut_at_end, decode_after, encode

    prompt = read_prompt(args)
    config = generation_config(args)
    model, tokenizer = load_model(args)
    config = replace(config, constraint=read_constraint(args, tokenizer, model))
    ids = encode(tokenizer, prompt)
    out, seconds, traces = denoise_shown(args, config, model, tokenizer, ids, config.max_new_tokens, ids[:0],
                                         lambda on_step: generate(model, ids.unsqueeze(0), None, config, on_step))
    texts = [decode_after(tokenizer, ids, cut_at_end(tokenizer, row[len(ids):])) for row in out.sequences.cpu()]
    if not args.watch:
        print_texts([prompt + text for text in texts])
    finish(args, config, out, seconds, {"prompt": prompt, "texts": texts}, tokenizer, traces)
    return 0


def run_infill(args: argparse.Namespace) -> int:
    from dllm.lengths import choose_lengths
    from dllm.sampler import infill
    from dllm.tokenizer import decode_after, encode

    before, after = read_gap(args)
    config = generation_config(args)
    model, tokenizer = load_model(args)
    config = replace(config, constraint=read_constraint(args, tokenizer, model))
    prefix, suffix = encode(tokenizer, before), encode(tokenizer, after)
    length = args.length
    if length == "auto" and config.expand_token_id is not None:
        length = min(config.infill_lengths)
    elif length == "auto":
        length, = choose_lengths(model, prefix.unsqueeze(0), suffix.unsqueeze(0), config)
    out, seconds, traces = denoise_shown(
        args, config, model, tokenizer, prefix, length, suffix,
        lambda on_step: infill(model, prefix, suffix, length=length, generation_config=config, on_step=on_step))
    rows = out.sequences if out.attention_mask is None else [
        row[visible] for row, visible in zip(out.sequences, out.attention_mask, strict=True)]
    texts = [decode_after(tokenizer, prefix, row[len(prefix):len(row) - len(suffix)].cpu()) for row in rows]
    if not args.watch:
        print_texts([before + text + after for text in texts])
    finish(args, config, out, seconds, {"prefix": before, "suffix": after, "texts": texts}, tokenizer, traces)
    return 0


def generation_config(args: argparse.Namespace):
    """What the flags say, with a seed that can be told."""
    from dllm.sampler import MDMGenerationConfig

    given = {field.name: getattr(args, field.name) for field in fields(MDMGenerationConfig)
             if getattr(args, field.name, None) is not None}
    return MDMGenerationConfig(**{"seed": secrets.randbelow(2**31), **given})


def read_constraint(args: argparse.Namespace, tokenizer, model):
    """What the flags say that the new text must be, or None."""
    from dllm.constraints import Regex, json_schema

    if args.regex is not None:
        return Regex(args.regex, tokenizer, model.config.vocab_size)
    if args.json_schema is not None:
        return json_schema(read_text(args.json_schema), tokenizer, model.config.vocab_size)
    return None


def load_model(args: argparse.Namespace):
    """The model on its device, and its tokenizer."""
    from dllm.model import load_with_tokenizer

    return load_with_tokenizer(args.model, args.device, args.dtype)


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        return read_text(args.prompt_file)
    return "" if sys.stdin.isatty() else sys.stdin.read()


def read_gap(args: argparse.Namespace) -> tuple[str, str]:
    """The texts before and after the gap."""
    if args.file is None:
        if args.prefix is None and args.suffix is None:
            raise UserError(f"give --prefix and --suffix, or --file FILE with {args.marker} at the gap")
        return args.prefix or "", args.suffix or ""
    if args.prefix is not None or args.suffix is not None:
        raise UserError("--file already has what comes before and after the gap; leave out --prefix and --suffix")
    parts = read_text(args.file).split(args.marker) if args.marker else []
    if len(parts) != 2:
        raise UserError(f"{args.file} must have the marker {args.marker!r} once, not {max(len(parts) - 1, 0)} times; "
                        "put it at the gap, or name another with --marker")
    return parts[0], parts[1]


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a text file") from None


def denoise_shown(args: argparse.Namespace, config, model, tokenizer, prefix, length: int, suffix, run: Callable):
    """Call run(on_step), drawing each step with --watch. Returns its output, the seconds that it took, and for
    --save-html a trace of each text."""
    import torch

    from dllm.sampler import find_mask_token

    shown, traces = nullcontext(), []
    if args.watch or args.save_html is not None:
        from dllm.visualize import Trace, watch

        mask_token_id = find_mask_token(model, config)
        canvas = torch.cat((prefix, prefix.new_full((length,), mask_token_id), suffix))
        canvas = canvas.expand(config.num_return_sequences, -1)
        kind = config.remasking or config.alg
        if args.watch:
            shown = watch(tokenizer, canvas, mask_token_id, kind)
        if args.save_html is not None:
            traces = [Trace(row, mask_token_id, kind, index) for index, row in enumerate(canvas)]
    start = time.perf_counter()
    with shown as draw:
        def on_step(step) -> None:
            for note in (*traces, *([draw] if args.watch else [])):
                note(step)

        out = run(on_step)
    return out, time.perf_counter() - start, traces


def print_texts(texts: list[str]) -> None:
    for index, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"--- {index} of {len(texts)} ---")
        print(text)


def finish(args: argparse.Namespace, config, out, seconds: float, texts: dict, tokenizer, traces: list) -> None:
    """A line about the run on stderr, its record in --output, its page in --save-html."""
    counts = (f"{out.steps} steps, {out.forwards} forward passes, {out.tokens_per_forward:.2f} tokens in each, "
              f"{seconds:.2f} s, seed {config.seed}")
    print(counts, file=sys.stderr)
    constraint = args.regex if args.json_schema is None else str(args.json_schema)
    if args.output is not None:
        settings = {**asdict(replace(config, constraint=None)), "constraint": constraint}
        from dllm.checkpoint import write_json

        write_json(args.output, {"model": args.model, **texts, "settings": settings, "steps": out.steps,
                                 "forwards": out.forwards, "tokens_per_forward": out.tokens_per_forward,
                                 "seconds": round(seconds, 3)})
    if args.save_html is not None:
        from dllm.checkpoint import write_atomically
        from dllm.report import write_sample
        from dllm.visualize import animation

        facts = {"Model": args.model, "Method": config.remasking or config.alg, "Denoising steps": str(out.steps),
                 "Forward passes": str(out.forwards), "Tokens per forward pass": f"{out.tokens_per_forward:.2f}",
                 "Seconds": f"{seconds:.2f}", "Seed": str(config.seed)}
        page = write_sample([animation(trace, tokenizer) for trace in traces], facts, shlex.join(["dllm", *args.given]))
        write_atomically(args.save_html, page.encode("utf-8", "replace"))


def run_eval(args: argparse.Namespace) -> int:
    from dllm.data import read_documents, split_documents
    from dllm.evaluators import (
        HeldOutSettings,
        InfillingSettings,
        line_infilling,
        masked_accuracy,
        perplexity_bound,
    )
    from dllm.evaluators.generating import describe_model
    from dllm.model import find_model

    evaluator, kind = {"perplexity": (perplexity_bound, HeldOutSettings), "infill": (line_infilling, InfillingSettings),
                       "masked_accuracy": (masked_accuracy, HeldOutSettings)}[args.task]
    settings = kind(**{field.name: getattr(args, field.name) for field in fields(kind) if hasattr(args, field.name)})
    share = args.validation_share
    if share is not None and not 0 < share < 1:
        raise UserError(f"--validation-share must be between 0 and 1, not {share}")
    paths = None if args.data is None else [path.strip() for path in args.data.split(",")]
    documents = read_documents(paths, args.text_keys.split(","))
    if share is not None:
        documents = split_documents(documents, share)[1]
    model, tokenizer = load_model(args)
    result = evaluator(model, tokenizer, documents, settings)
    result = [part.to_dict() for part in result] if isinstance(result, tuple) else result.to_dict()
    digest = hashlib.sha256(json.dumps([document.text for document in documents]).encode())
    record = {"task": args.task, "model": args.model, "data": args.data, "documents": len(documents),
              "validation_share": share, "settings": asdict(settings), "result": result,
              "manifest": {"data": {"sha256": digest.hexdigest()},
                           **describe_model(model, tokenizer, find_model(args.model))}}
    if args.output is not None:
        from dllm.checkpoint import write_json

        write_json(args.output, record)
    if args.task == "infill":
        del record["result"]["examples"]
    print(json.dumps(record, indent=2, ensure_ascii=False))
    return 0


def run_code_task(args: argparse.Namespace) -> int:
    from dllm.evaluators.generating import RunSettings, bar, generate_samples
    from dllm.evaluators.tasks import BENCHMARKS, read_tasks
    from dllm.model import find_model
    from dllm.sampler import MDMGenerationConfig

    tasks = read_tasks(args.task, args.data)
    length = getattr(args, "length", None)
    generation = {field.name: getattr(args, field.name) for field in fields(MDMGenerationConfig)
                  if field.name != "seed" and getattr(args, field.name, None) is not None}
    settings = RunSettings(
        preset=args.preset, samples=args.samples, batch_size=args.batch_size, limit=args.limit, generation=generation,
        length=int(length) if length is not None and length.isdecimal() else length, seed=getattr(args, "seed", 0))
    settings.resolve(BENCHMARKS[args.task].infills)  # before a model is loaded
    model, tokenizer = load_model(args)
    record = generate_samples(
        model, tokenizer, tasks, args.output_dir, settings, find_model(args.model), bar(args.task),
        workers=args.workers, timeout=args.timeout, audit=args.audit, require=args.require_sandbox)
    if record:
        del record["results"]
        print(json.dumps(record, indent=2, ensure_ascii=False))
    return 0


def run_serve(args: argparse.Namespace) -> int:
    import os

    key = args.api_key or os.environ.get("DLLM_API_KEY") or None
    if args.host not in ("127.0.0.1", "::1", "localhost") and key is None:
        raise UserError(f"--host {args.host} is open to others, so --api-key (or DLLM_API_KEY) is needed")
    try:
        from dllm.server.app import Limits, make_app
        from dllm.server.listening import bind, serve
    except ImportError as error:
        raise UserError(f"dllm serve needs {error.name}: pip install 'dllm[serve]'") from None
    from dllm.sampler import MDMGenerationConfig

    given = {field.name: getattr(args, field.name) for field in fields(MDMGenerationConfig)
             if field.name != "seed" and getattr(args, field.name, None) is not None}
    defaults = MDMGenerationConfig(**given)
    limits = Limits(api_key=key, max_tokens=args.max_tokens, max_seconds=args.max_seconds, max_rows=args.max_batch,
                    max_waiting=args.max_queue)
    listening = bind(args.host, args.port)  # before the model is loaded, which can take minutes
    with listening:
        model, tokenizer = load_model(args)
        name = args.name or Path(args.model).resolve().name
        serve(make_app(model, tokenizer, name, defaults, limits), listening)
    return 0


def run_bench_serve(args: argparse.Namespace) -> int:
    import os

    try:
        from dllm.server.bench import measure, table
    except ImportError as error:
        raise UserError(f"dllm bench-serve needs {error.name}: pip install 'dllm[serve]'") from None
    record = measure(args.url, requests=args.requests, concurrency=args.concurrency, max_tokens=args.max_tokens,
                     prompt=args.prompt, stream=args.stream, seed=args.seed,
                     api_key=args.api_key or os.environ.get("DLLM_API_KEY"))
    if args.output is not None:
        from dllm.checkpoint import write_json

        write_json(args.output, record)
    print(table(record))
    return 0


def run_export(args: argparse.Namespace) -> int:
    import torch

    from dllm.export import export, push

    if args.private and not args.push:
        raise UserError("--private goes with --push")
    print(export(args.source, args.output_dir, getattr(torch, args.dtype)))
    if args.push:
        print(push(args.output_dir, args.push, args.private))
    return 0


def run_data_download(args: argparse.Namespace) -> int:
    from dllm.data.sources import find_shards, write_parquet

    shards = find_shards([args.dataset])
    if not shards or shards[0].table is None:
        raise UserError(f"{args.dataset} is a local path, there is nothing to download; give a dataset of the hub, as "
                        "owner/name")
    records = len(shards[0].table)
    if args.output_dir is not None:
        write_parquet(shards[0].table, args.output_dir)
    print(f"{records:,} records of {args.dataset}; train with --data.train_path={args.output_dir or args.dataset}")
    return 0


def open_data(args: argparse.Namespace, seed: int = 0):
    """(corpus, tokenizer, training data) of the flags, nothing held out."""
    from dllm.config import DataGroup
    from dllm.data import open_training_data, read_corpus
    from dllm.tokenizer import load_tokenizer

    group = DataGroup(train_path=args.paths, data_type=args.data_type, text_keys=args.text_keys, validation_share=0.0,
                      chat_template=args.chat_template, max_seq_len=args.max_seq_len)
    corpus, tokenizer = read_corpus(group), load_tokenizer(args.tokenizer)
    return corpus, tokenizer, open_training_data(corpus, tokenizer, seed)


def run_data_count(args: argparse.Namespace) -> int:
    corpus, _, data = open_data(args)
    print(json.dumps({"documents": data.documents, "bytes": corpus.num_bytes, "tokens": data.tokens,
                      "bytes_per_token": round(corpus.num_bytes / data.tokens, 3), "max_seq_len": args.max_seq_len,
                      "rows": data.rows_per_epoch,
                      "packing": round(data.tokens / (data.rows_per_epoch * args.max_seq_len), 4)}, indent=2))
    return 0


def run_data_inspect(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dllm.data.showing import show_rows

    _, tokenizer, data = open_data(args, args.seed)
    show_rows(data.rows.read(range(max(1, args.rows))), tokenizer, args.seed, Console(highlight=False))
    return 0


def run_harness_task(args: argparse.Namespace) -> int:
    from dllm.sampler import MDMGenerationConfig

    harness = load_harness(args.task)
    manager = harness.find_task(args.task, args.include_path, own_tasks())
    generation = {field.name: getattr(args, field.name) for field in fields(MDMGenerationConfig)
                  if getattr(args, field.name, None) is not None}
    model, tokenizer = load_model(args)
    lm = harness.HarnessLM(model, tokenizer, batch_size=args.batch_size, likelihood_samples=args.likelihood_samples,
                           source=harness.find_model(args.model), **generation)
    record = harness.evaluate_task(
        lm, args.task, manager, args.output_dir, limit=args.limit, num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template, unsafe_code=args.unsafe_code)
    del record["samples"]
    print(json.dumps(record, indent=2, ensure_ascii=False))
    return 0


def run_lm_eval(arguments: list[str]) -> int:
    return load_harness("lm_eval").run_command_line(arguments)


def load_harness(wanted: str):
    """The module that needs lm-eval."""
    try:
        from dllm.evaluators import harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UserError(f"{wanted} needs lm-eval{name_nearest(wanted, own_tasks())}; dllm's own tasks are "
                        f"{', '.join(own_tasks())}; for lm-eval's: pip install 'dllm[eval]'") from None
    return harness


def own_tasks() -> tuple[str, ...]:
    from dllm.evaluators.tasks import BENCHMARKS

    return ("perplexity", "masked_accuracy", "infill", *BENCHMARKS)


def run_score(args: argparse.Namespace) -> int:
    from dllm.evaluators.scoring import score_samples
    from dllm.evaluators.tasks import read_tasks

    record = score_samples(args.samples, read_tasks(args.task, args.data), workers=args.workers, timeout=args.timeout,
                           audit=args.audit, require=args.require_sandbox, skip_bad=args.skip_bad)
    if args.output is not None:
        from dllm.checkpoint import write_json

        write_json(args.output, record)
    del record["results"]
    print(json.dumps(record, indent=2, ensure_ascii=False))
    return 0


def run_scoreboard(args: argparse.Namespace) -> int:
    from dllm.evaluators.scoreboard import write_scoreboard

    print(write_scoreboard(args.runs, args.output_dir or args.runs[0]), end="")
    return 0
