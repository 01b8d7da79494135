"""python -m dllm.train CONFIG [--group.key=value ...]: train as configured. Exit code 2: bad input; 1: failure."""

import sys
from collections.abc import Sequence

from dllm.config import load_config
from dllm.errors import Failure, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The first argument, unless it is a flag, is a YAML file; see `dllm.config` for the keys."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    path = arguments.pop(0) if arguments and not arguments[0].startswith("--") else None
    try:
        config = load_config(path, arguments)
        from dllm.trainer import train  # after the configuration is known to be good: it imports torch

        result = train(config)
    except (UserError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(f"{result.steps} steps; the model is in {result.checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
