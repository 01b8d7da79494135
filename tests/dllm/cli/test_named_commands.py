"""Every command that docstrings, messages, model cards, pages and docs name is a command that dllm takes."""

import re
import shlex
from pathlib import Path

import pytest

from dllm import UserError, cli
from dllm.config.reading import load_config

ROOT = Path(__file__).parents[3]
SUFFIXES = {".py", ".html", ".js", ".md", ".yaml"}
CUT_SHORT = ("are required", "expected one argument")  # a mention need not be complete


def find_commands() -> list[str]:
    found = {}
    for path in [ROOT / "README.md", *(path for folder in ("dllm", "dllm_kernels", "docs", "configs")
                                       for path in sorted((ROOT / folder).rglob("*")))]:
        if path.suffix not in SUFFIXES:
            continue
        text = path.read_text()
        commands = re.findall(r"`(dllm [a-z][^`\n]*)`", text)  # whole, in code
        commands += re.findall(r"\b(dllm [a-z][a-z_-]*(?: --[a-z][a-z-]*)+)", text)  # and its flags, in prose
        if path.suffix in (".md", ".yaml"):
            commands += re.findall(r"^(?:#\s+)?(dllm [a-z].*)$", text, re.M)
        found |= dict.fromkeys(re.split(r" (?:[|>&]|\.\.\.)", command)[0] for command in commands)
    return list(found)


@pytest.mark.parametrize("command", find_commands())
def test_a_command_that_is_named_parses(command):
    words = shlex.split(command, comments=True)[1:]
    try:
        if words[0] == "train":
            load_config(None, ["--train.output_dir=x", *(word for word in words if re.match(r"--\w+\.", word))])
        elif words[0] != "lm_eval" and not {"--help", "-h"} & set(words):
            cli.build_parser(words).parse_args(words)
    except UserError as error:
        assert any(reason in str(error) for reason in CUT_SHORT), error


def test_commands_are_found():
    assert any(command.startswith("dllm sample this/repository --prompt") for command in find_commands())
    with pytest.raises(UserError, match="no flag --model"):
        cli.build_parser().parse_args(["sample", "--model", "this/repository"])
