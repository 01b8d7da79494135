"""dllm eval, score, scoreboard and lm_eval."""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from dllm.cli.flags import Parser, add_model, add_output, load_model, number, path, whole
from dllm.config.fields import add_fields, given
from dllm.errors import UserError, did_you_mean
from dllm.evaluators.settings import HeldOutSettings, InfillingSettings, RunSettings
from dllm.files import check_outputs, write_json
from dllm.generation.config import MDMGenerationConfig

TEXT_TASKS = {"perplexity": "bound on the perplexity, in nats per token and bits per byte",
              "masked_accuracy": "accuracy at the corrupted tokens, at fixed shares of corruption",
              "infill": "exact match of infilled lines of Python functions"}


def add_commands(commands, task: Sequence[str]) -> None:
    """task: the word after `eval`, if there is one."""
    commands.add_parser(
        "eval", fill=partial(add_tasks, task=task), help="measure a model on text, or on a code benchmark",
        description="Measure a model on text, on a code benchmark, or on any task of lm-eval's. The command\n"
                    "'dllm lm_eval ls tasks' lists those.")
    commands.add_parser(
        "score", fill=add_score, help="score samples of a code benchmark, in a sandbox, without a model",
        description="Run samples of a code benchmark in a sandbox, and estimate pass@k. The result goes to stdout as\n"
                    "JSON. Data that differ from what a manifest.json beside the samples names are refused.")
    commands.add_parser(
        "scoreboard", fill=add_scoreboard, help="a table and a page of finished runs of eval, beside published results",
        description="Table the finished runs of dllm eval in some folders, beside published results, and tell where\n"
                    "they cannot be compared. The table goes to stdout as Markdown, and with plots to a page.")
    commands.add_parser("lm_eval", help="lm-eval's own command, with the model dllm and our task files")


def add_tasks(evaluate: Parser, task: Sequence[str]) -> None:
    tasks = evaluate.add_subparsers(metavar="TASK", required=True)
    for name in TEXT_TASKS:
        add_text_task(tasks, name)
    add_code_tasks(tasks)
    for name in task:
        if not name.startswith("-") and name not in tasks.choices:
            add_harness_task(tasks, name)


def add_text_task(tasks, name: str) -> None:
    text = TEXT_TASKS[name]
    tasks.add_parser(name, fill=partial(add_text_flags, name=name), help=text,
                     description=f"Measure: {text}. The result goes to stdout as JSON.")


def add_text_flags(task: Parser, name: str) -> None:
    add_model(task)
    task.add_argument("--data", metavar="PATHS", help="folders and files, separated by commas; default: the "
                                                      "standard library of the running Python")
    task.add_argument("--text-keys", default="text", metavar="NAMES",
                      help="columns of JSONL and Parquet files, the first present is taken; default: text")
    task.add_argument("--validation-share", type=number, metavar="SHARE",
                      help="only the documents that a training run with this data.validation_share holds out")
    if name == "infill":
        add_fields(task, InfillingSettings)
    else:
        add_fields(task, HeldOutSettings, leave_out=("shares" if name == "perplexity" else "samples",))
    task.add_argument("--output", type=path, metavar="FILE",
                      help="write the JSON here too" + (", with every line" if name == "infill" else ""))
    task.set_defaults(run=run_eval, task=name)


def add_code_tasks(tasks) -> None:
    from dllm.evaluators.code.tasks import BENCHMARKS

    for name, benchmark in BENCHMARKS.items():
        tasks.add_parser(
            name, fill=partial(add_code_flags, name=name, infills=benchmark.infills),
            help="share of the gaps filled rightly" if benchmark.infills else "share of the programs that work",
            description="Generate samples, run them in a sandbox and estimate pass@k. The run is a folder: a stopped\n"
                        "one continues when the same is asked again. The score goes to stdout as JSON.")


def add_code_flags(task: Parser, name: str, infills: bool) -> None:
    from dllm.evaluators.code.presets import PRESETS

    add_model(task)
    add_output(task)
    add_fields(task, RunSettings)
    if infills:
        task.add_argument("--length", metavar="N", help="tokens of a gap; oracle: the length of the answer; average: "
                          "over 4 to 64; auto: the length with the highest confidence; default: the preset's")
    fixed = {setting for preset in PRESETS.values() for kind in preset.values() for setting in kind.generation}
    leave_out = ("num_return_sequences", "mask_token_id", *(["max_new_tokens"] if infills else []))
    add_fields(task, MDMGenerationConfig, leave_out=leave_out,
               defaults={setting: "the preset's" for setting in fixed} | {"seed": "0"})
    add_judging(task)
    task.set_defaults(run=run_code_task, task=name)


def add_harness_task(tasks, name: str) -> None:
    tasks.add_parser(name, fill=partial(add_harness_flags, name=name), hint=did_you_mean(name, tasks.choices),
                     description="Evaluate on a task or group of lm-eval's. Likelihoods are bounds, by Monte Carlo.\n"
                                 "The run is a folder; the score goes to stdout as JSON.")


def add_harness_flags(task: Parser, name: str) -> None:
    add_model(task)
    add_output(task)
    task.add_argument("--batch-size", type=whole, default=16, metavar="N", help="texts denoised together; default: 16")
    task.add_argument("--likelihood-samples", type=whole, default=128, metavar="N",
                      help="corrupted copies of a text whose likelihood is bounded; default: 128")
    task.add_argument("--limit", type=whole, metavar="N", help="only the first N documents of each task")
    task.add_argument("--num-fewshot", type=whole, metavar="N", help="examples in the prompt; default: the task's")
    task.add_argument("--apply-chat-template", action="store_true", help="write prompts as the model's conversations")
    task.add_argument("--include-path", metavar="DIR", help="a folder with more task files")
    task.add_argument("--unsafe-code", action="store_true",
                      help="let lm-eval's own tasks run the model's code without our sandbox")
    add_fields(task, MDMGenerationConfig, leave_out=("num_return_sequences", "mask_token_id"),
               defaults={"max_new_tokens": "the task's max_gen_toks", "steps": "max_new_tokens", "seed": "0"})
    task.set_defaults(run=run_harness_task, task=name)


def add_score(score: Parser) -> None:
    from dllm.evaluators.code.tasks import BENCHMARKS

    score.add_argument("samples", type=path, metavar="SAMPLES.jsonl",
                       help="lines with task_id, and completion or solution (a whole program)")
    score.add_argument("--task", required=True, choices=tuple(BENCHMARKS), metavar="TASK", help=", ".join(BENCHMARKS))
    add_judging(score)
    score.add_argument("--skip-bad", action="store_true", help="score the rest where lines are bad or tasks missing")
    score.add_argument("--output", type=path, metavar="FILE", help="write the JSON here too, with every sample")
    score.set_defaults(run=run_score)


def add_scoreboard(scoreboard: Parser) -> None:
    scoreboard.add_argument("runs", type=path, nargs="+", metavar="RUNS", help="folders that have runs, at any depth")
    scoreboard.add_argument("--output-dir", type=path, metavar="DIR",
                            help="gets scoreboard.md and scoreboard.html; default: the first folder of RUNS")
    scoreboard.set_defaults(run=run_scoreboard)


def add_judging(parser: Parser) -> None:
    parser.add_argument("--data", type=os.path.expanduser, metavar="PATH",
                        help="the benchmark's file, a folder that has it, or a hub repository as owner/name; default: "
                             "its own repository")
    parser.add_argument("--workers", type=whole, metavar="N", help="programs at a time; default: one for each core")
    parser.add_argument("--timeout", type=number, metavar="S", help="CPU seconds for a program and its tests, or for a "
                        "call with humaneval_plus and mbpp_plus; a program that sleeps ends after several times as "
                        "long; default: the benchmark's, 3 or 4")
    parser.add_argument("--audit", action="store_true",
                        help="judge every pass again with the tests out of the program's reach, and tell what differs")
    parser.add_argument("--require-sandbox", choices=("strict", "best"), default="best",
                        help="strict: refuse to run without every layer of the sandbox; default: best, with a warning")


def show(record: dict, *leave_out: str) -> int:
    """Print a record as JSON, without the fields that are too long for a terminal."""
    print(json.dumps({name: value for name, value in record.items() if name not in leave_out}, indent=2,
                     ensure_ascii=False))
    return 0


def run_eval(args: argparse.Namespace) -> int:
    from dllm.data import read_documents, split_documents
    from dllm.evaluators.likelihood import masked_accuracy, perplexity_bound
    from dllm.evaluators.line_infilling import line_infilling
    from dllm.evaluators.runs import identify_model
    from dllm.model.weights import find_model

    evaluator, kind = {"perplexity": (perplexity_bound, HeldOutSettings), "infill": (line_infilling, InfillingSettings),
                       "masked_accuracy": (masked_accuracy, HeldOutSettings)}[args.task]
    settings = kind(**given(args, kind))
    share = args.validation_share
    if share is not None and not 0 < share < 1:
        raise UserError(f"--validation-share must be between 0 and 1, not {share}")
    paths = None if args.data is None else [path.strip() for path in args.data.split(",")]
    check_outputs({"--output": args.output}, [*(paths or ()), args.model])
    documents = read_documents(paths, args.text_keys.split(","))
    if share is not None:
        documents = split_documents(documents, share)[1]
    model, tokenizer = load_model(args)
    result = evaluator(model, tokenizer, documents, settings)
    result = list(map(asdict, result)) if isinstance(result, tuple) else asdict(result)
    digest = hashlib.sha256(json.dumps([document.text for document in documents]).encode())
    record = {"task": args.task, "model": args.model, "data": args.data, "documents": len(documents),
              "validation_share": share, "settings": asdict(settings), "result": result,
              "manifest": {"data": {"sha256": digest.hexdigest()},
                           **identify_model(model, tokenizer, find_model(args.model))}}
    brief = {"result": {name: value for name, value in result.items() if name != "examples"}} if isinstance(
        result, dict) else {}
    show({**record, **brief})  # before it is written, which a full disk may prevent
    if args.output is not None:
        write_json(args.output, record)
    return 0


def run_code_task(args: argparse.Namespace) -> int:
    from dllm.evaluators.code.generating import bar, generate_samples
    from dllm.evaluators.code.tasks import BENCHMARKS, read_tasks
    from dllm.evaluators.runs import RUN_FILES
    from dllm.model.weights import find_model

    for name in RUN_FILES:
        check_outputs({"--output-dir": args.output_dir / name}, [args.data])
    tasks = read_tasks(args.task, args.data)
    length = getattr(args, "length", None)
    generation = given(args, MDMGenerationConfig)
    seed = generation.pop("seed", 0)
    settings = RunSettings(**given(args, RunSettings), generation=generation, seed=seed,
                           length=int(length) if length is not None and length.isdecimal() else length)
    settings.resolve(BENCHMARKS[args.task].infills)  # before a model is loaded
    model, tokenizer = load_model(args)
    record = generate_samples(
        model, tokenizer, tasks, args.output_dir, settings, find_model(args.model), bar(args.task),
        workers=args.workers, timeout=args.timeout, audit=args.audit, require=args.require_sandbox)
    return show(record, "results") if record else 0


def run_harness_task(args: argparse.Namespace) -> int:
    harness = load_harness(args.task)
    manager = harness.find_task(args.task, args.include_path, own_tasks())
    model, tokenizer = load_model(args)
    lm = harness.HarnessLM(model, tokenizer, batch_size=args.batch_size, likelihood_samples=args.likelihood_samples,
                           source=harness.find_model(args.model), **given(args, MDMGenerationConfig))
    record = harness.evaluate_task(
        lm, args.task, manager, args.output_dir, limit=args.limit, num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template, unsafe_code=args.unsafe_code)
    return show(record, "samples")


def run_lm_eval(arguments: list[str]) -> int:
    return load_harness("lm_eval").run_command_line(arguments)


def load_harness(wanted: str):
    """The module that needs lm-eval."""
    try:
        from dllm.evaluators.harness import lm as harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UserError(f"{wanted} needs lm-eval{did_you_mean(wanted, own_tasks())}; dllm's own tasks are "
                        f"{', '.join(own_tasks())}; for lm-eval's: pip install 'dllm[eval]'") from None
    return harness


def own_tasks() -> tuple[str, ...]:
    from dllm.evaluators.code.tasks import BENCHMARKS

    return (*TEXT_TASKS, *BENCHMARKS)


def run_score(args: argparse.Namespace) -> int:
    from dllm.evaluators.code.scoring import score_samples
    from dllm.evaluators.code.tasks import read_tasks

    check_outputs({"--output": args.output}, [args.samples, args.samples.with_name("manifest.json"), args.data])
    if not args.samples.exists():  # before the benchmark's data are fetched
        raise UserError(f"cannot read {args.samples}: No such file or directory; give a file of JSON lines")
    record = score_samples(args.samples, read_tasks(args.task, args.data), workers=args.workers, timeout=args.timeout,
                           audit=args.audit, require=args.require_sandbox, skip_bad=args.skip_bad)
    show(record, "results")  # before it is written
    if args.output is not None:
        write_json(args.output, record)
    return 0


def run_scoreboard(args: argparse.Namespace) -> int:
    from dllm.pages.scoreboard import write_scoreboard

    print(write_scoreboard(args.runs, args.output_dir or args.runs[0]), end="")
    return 0
