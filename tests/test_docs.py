"""The code blocks of the README, run as they stand in a temporary folder with a tiny model and a little code.

A block after `<!-- network -->` names a model of the hub; the tiny model takes its place. Training stops after 2 steps.
"""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from dllm import cli
from dllm.config import load_config

ROOT = Path(__file__).parents[1]
HUB = ("fredzzp/open-dcoder-0.5B", "Qwen/Qwen2.5-Coder-0.5B")
BRIEF = ["--train.max_steps=2", "--train.max_minutes=", "--train.micro_batch_size=2", "--train.global_batch_size=2",
         "--train.save_time_interval_minutes=0"]
BLOCK = re.compile(r"^(?P<mark><!-- network -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
BLOCKS = list(BLOCK.finditer((ROOT / "README.md").read_text()))


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder) -> Path:
    """A folder with what the README's commands name: models, code, data, configurations, samples, tasks."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(model_folder, folder / "my_model")
    shutil.copytree(ROOT / "configs", folder / "configs")
    code = "".join(f"def add_{i}(x, y):\n    total = x + y + {i}\n    return total\n\n\n" for i in range(60))
    for name in ("my_code", "data/data"):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            (folder / name / f"file_{i}.py").write_text(code.replace("add", f"add{i}"))
    (folder / "my_code" / "example.py").write_text("def f(x):\n")
    (folder / "my_code" / "gap.py").write_text("def f(x):\n    <FILL>\n    return y\n")
    (folder / "my_code" / "data.jsonl").write_text('{"text": "x = 1\\n"}\n{"text": "y = 2\\n"}\n' * 200)
    talk = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    (folder / "my_chats.jsonl").write_text(20 * (json.dumps(talk) + "\n"))
    (folder / "my_chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                                          "{% if add_generation_prompt %}assistant: {% endif %}")
    task = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n",
            "entry_point": "f", "test": "def check(candidate):\n    assert candidate() == 1\n"}
    (folder / "my_tasks").mkdir()
    (folder / "my_tasks" / "HumanEval.jsonl").write_text(json.dumps(task))
    (folder / "my_samples.jsonl").write_text('{"task_id": "HumanEval/0", "completion": "    return 1"}\n')
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("DLLM_CACHE", str(place / "cache"))


def blocks(language: str):
    found = [block for block in BLOCKS if block["language"] == language]
    return [pytest.param(block, id=f"line {block.string[:block.start()].count(chr(10)) + 2}") for block in found]


def make_local(text: str) -> str:
    for name in HUB:
        text = text.replace(name, "my_model")
    return text


def test_every_block_is_in_a_language_that_is_run():
    assert {block["language"] for block in BLOCKS} == {"bash", "python"} and len(BLOCKS) >= 8
    assert (ROOT / "README.md").read_text().count("```") == 2 * len(BLOCKS)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks(block, capsys):
    code = make_local(block["code"]) if block["mark"] else block["code"]
    assert block["mark"] or not any(name in code for name in HUB), "this block needs the mark <!-- network -->"
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands(block, place, capsys, request):
    free_port = find_free_port()
    for line in block["code"].replace("8000", str(free_port)).splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        elif words[:3] == ["python", "-m", "dllm.train"]:
            check_recipe(place, words[3:])
        elif words[0] == "torchrun":
            launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:], "--train.device=cpu",
                        *(flag for flag in BRIEF if "batch_size" not in flag)]
            done = subprocess.run(launched, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif words[:2] == ["dllm", "serve"]:
            request.getfixturevalue("serving")(words)
        elif words[0] == "curl":
            if shutil.which("curl"):
                answer = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
                assert answer["choices"][0]["finish_reason"] in ("stop", "length"), answer
        else:
            assert words[0] == "dllm", f"the README runs {words[0]}, which this test does not"
            assert cli.main([*words[1:], *(BRIEF if words[1] == "train" else [])]) == 0, capsys.readouterr().err


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serving():
    """A function that starts a server by its command line, and waits until it answers; the test's end stops it."""
    started = []

    def start(words: list[str]) -> None:
        process = subprocess.Popen([sys.executable, "-m", *words])
        started.append(process)
        url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/health"
        for _ in range(600):
            assert process.poll() is None, "the server has ended"
            try:
                urlopen(url).close()
                return
            except URLError:
                time.sleep(0.1)
        raise AssertionError("the server does not answer after a minute")

    yield start
    for process in started:
        process.terminate()
        assert process.wait(30) == 0


def check_recipe(place: Path, arguments: list[str]) -> None:
    """Train by a published model's recipe, cut down to the tiny model: two steps of short rows."""
    file, *flags = arguments
    load_config(file, flags)
    cut = place / "recipe.yaml"
    cut.write_text(make_local(Path(file).read_text()))
    assert cli.main(["train", str(cut), *flags, "--data.max_seq_len=64", *BRIEF, "--train.device=cpu"]) == 0
    assert list(place.glob("logs/*/checkpoints/global_step_2/hf_ckpt/model.safetensors"))


def test_links_lead_to_files_that_exist():
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / target).exists(), f"{page} links to {target}"


def test_the_map_of_the_tree_names_what_is_there_and_all_of_it():
    text = (ROOT / "README.md").read_text().split("## The tree")[1].split("\n## ")[0]
    for package in ("dllm", "dllm_kernels"):
        for path in (ROOT / package).iterdir():
            if not path.name.startswith(("_", ".")) and (path.suffix == ".py" or path.is_dir()):
                if path.name not in ("errors.py", "train.py", "operators.py"):
                    assert path.name in text, f"the README's map lacks {package}/{path.name}"
    names = re.findall(r"\b[a-z_]+\.(?:py|yaml|cpp)\b", text)
    for name in names:
        assert list(ROOT.glob(f"*/{name}")) or list(ROOT.glob(f"*/*/{name}")), f"there is no {name}"
