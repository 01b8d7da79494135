"""python -m dllm.train CONFIG [--group.key=value ...] [--dry-run]: as `dllm train`. Exit code 2: bad input; 1: failure.

--dry-run prints the resolved configuration, parameters, memory, tokens per step and steps, and trains nothing.
"""

import os
import sys
from collections.abc import Sequence

from dllm.config.reading import load_config
from dllm.errors import run_command


def run(arguments: Sequence[str]) -> int:
    """The first argument, unless it is a flag, is a YAML file; see `dllm.config.schema` for the keys."""
    dry = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    path = arguments.pop(0) if arguments and not arguments[0].startswith("--") else None
    config = load_config(path, arguments)
    main_process = os.environ.get("RANK", "0") == "0"
    if dry:
        from dllm.training.dry_run import plan

        if main_process:
            print(plan(config))
        return 0
    from dllm.training.trainer import train  # after the configuration is known to be good: it imports torch

    result = train(config)
    if main_process and result.finished:
        print(f"{result.steps} steps; the model is in {result.checkpoint}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
