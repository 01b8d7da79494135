"""How a program runs and ends, and the two errors users meet: what was wanted, what came, what to do, in one line."""

import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: a path, file, configuration, flag or request that cannot work. The command line exits with 2."""


class Failure(RuntimeError):
    """Good input, but the machine could not do it (a full disk, say). The command line exits with 1."""


class Notice(UserWarning):
    """Something that was done otherwise than the user may expect. The command line shows it as one line on stderr."""


def warn(text: str) -> None:
    """Warn of something; the same text is shown once."""
    warnings.warn(text, Notice, stacklevel=2)


@contextmanager
def notices_in_a_line() -> Iterator[None]:
    with warnings.catch_warnings():
        show, told = warnings.showwarning, set()  # Python forgets what it has shown when filters change

        def show_warning(message, category, *place, **more):
            if issubclass(category, Notice) and str(message) not in told:
                told.add(str(message))
                print(f"dllm: warning: {message}", file=sys.stderr)
            elif not issubclass(category, Notice):
                show(message, category, *place, **more)

        warnings.showwarning = show_warning
        yield


def first_line(error: Exception) -> str:
    """The first line of an error's text, with the next where it ends in a colon; or its type where it has none."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """The end of a message that names the valid word nearest to `word`; empty where none is near."""
    near = difflib.get_close_matches(word, list(valid), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def silence(*descriptors: int) -> None:
    """Let what is written to the open files go nowhere, because nobody reads it and writing fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def run_command(command: Callable[[], int], debug: bool = False) -> int:
    """Run a program's main part and turn what it raises into one line on stderr and an exit code.

    2: bad input (any ValueError); 1: every other error; 130: interrupted. With `debug`, or DLLM_DEBUG=1 in the
    environment, errors are raised as they are.
    """
    # OpenMP threads that wait give up the core soon, instead of spinning for milliseconds: beside another process on
    # the same cores a training step takes a fifth of the time; alone, the same. Torch, imported later, reads it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    debug = debug or os.environ.get("DLLM_DEBUG", "0") not in ("", "0")
    try:
        with notices_in_a_line():
            code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("dllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough; Python would complain again when it flushes
        silence(sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        if not isinstance(error, (UserError, Failure, OSError)):  # not foreseen: say where to look
            text = f"{type(error).__name__}: {text or 'no reason given'} (DLLM_DEBUG=1 shows where)"
        print(f"dllm: error: {text}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
