"""Flags that several commands share, and readers of numbers, files and models."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from dllm.config.names import LayersBackend
from dllm.errors import UserError, did_you_mean
from dllm.files import decode_text


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit, and names the nearest flag or command.

    Args:
        fill: adds the flags once the command is parsed, because `dllm --help` needs none of them.
        hint: a further cause of errors, added to their text.
    """

    def __init__(self, fill: Callable[["Parser"], None] | None = None, hint: str = "", **keywords):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)
        self.fill, self.hint = fill, hint

    def parse_known_args(self, args=None, namespace=None):
        if self.fill is not None:
            self.fill(self)
            self.fill = None
        flags = self._option_string_actions
        for argument in args:  # before argparse complains of a missing argument
            if self._subparsers is not None and not argument.startswith("-"):
                break  # a command; its own parser checks the rest
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in flags:
                raise UserError(f"{self.prog} has no flag {flag}{self.hint or did_you_mean(flag, flags)}; "
                                f"see {self.prog} --help")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0] if action.option_strings else action.metavar
            raise UserError(f"{name} is one of {', '.join(action.choices)}, not {value!r}"
                            + did_you_mean(str(value), action.choices))

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help{self.hint}")


def add_model(parser: Parser) -> None:
    parser.add_argument("model", type=os.path.expanduser, metavar="MODEL",
                        help="folder, hub repository as owner/name, or GGUF file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: the GPU if there is one")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="auto: bfloat16 on a GPU, else float32")
    parser.add_argument("--layers-backend", choices=get_args(LayersBackend), default="auto",
                        help="norms, rotary embedding and SwiGLU; auto: Liger-Kernel on a GPU, where it is installed")
    add_tokenizer(parser)


def add_tokenizer(parser: Parser) -> None:
    """Flags of every command that loads a tokenizer."""
    parser.add_argument("--mask-token", metavar="TEXT", help="the mask token, one that the tokenizer has; default: "
                        "what the folder's generation_config.json, config.json or tokenizer name")
    parser.add_argument("--mask-token-id", type=whole, default=argparse.SUPPRESS, metavar="N", help="or its id")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="let code of the folder make its tokenizer; none runs otherwise")


def add_output(parser: Parser) -> None:
    parser.add_argument("--output-dir", type=path, required=True, metavar="DIR", help="the folder of the run")


def path(text: str) -> Path:
    """A path, with a ~ at its beginning written out, which shells leave in --flag=~/file."""
    return Path(text).expanduser()


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def utf8(given: str) -> str:
    try:
        given.encode("utf-8")
    except UnicodeEncodeError:  # how Python shows bytes that are not UTF-8
        raise argparse.ArgumentTypeError("is not UTF-8 text; convert it") from None
    return given


def read_text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a text file") from None


def load_model(args: argparse.Namespace):
    """The model on its device, and its tokenizer."""
    from dllm.model.loading import load_with_tokenizer

    return load_with_tokenizer(args.model, args.device, args.dtype, layers_backend=args.layers_backend,
                               **given_tokenizer(args))


def given_tokenizer(args: argparse.Namespace) -> dict:
    """What the flags of `add_tokenizer` say, as keywords of `load_tokenizer`."""
    return {"mask_token": args.mask_token, "mask_token_id": getattr(args, "mask_token_id", None),
            "trust_remote_code": args.trust_remote_code}
