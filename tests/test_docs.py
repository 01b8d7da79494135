"""The code blocks of the README and of docs/, run as they stand in a temporary folder with a tiny model and some code.

A block after `<!-- network -->` names a model of the hub; the tiny model takes its place. Training stops after 2 steps.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.request import urlopen

import pytest

import dllm
from dllm import cli
from dllm.config.reading import load_config
from tests.dllm.tiny_models import save_tiny_gemma
from tests.processes import end, find_free_port, start, wait_until

ROOT = Path(__file__).parents[1]
HUB = ("fredzzp/open-dcoder-0.5B", "Qwen/Qwen2.5-Coder-0.5B")
BRIEF = ["--train.max_steps=2", "--train.max_minutes=", "--train.micro_batch_size=2", "--train.global_batch_size=2",
         "--train.save_time_interval_minutes=0"]
BLOCK = re.compile(r"^(?P<mark><!-- network -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = [(page, block) for page in PAGES for block in BLOCK.finditer(page.read_text())]


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder, edit_folder) -> Path:
    """A folder with what the README's commands name: models, code, data, configurations, samples, tasks."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(model_folder, folder / "my_model")
    shutil.copytree(edit_folder, folder / "my_edit_model")
    save_tiny_gemma(folder / "my_gemma_model")
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
    pairs = [{"before": f"def f(x):\n    return x + {i}\n", "after": f"def f(x, y={i}):\n    return x + y\n"}
             for i in range(20)]
    (folder / "my_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
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
    def line(block) -> int:
        return block.string[:block.start()].count("\n") + 2

    return [pytest.param(block, id=f"{page.name}:{line(block)}") for page, block in BLOCKS
            if block["language"] == language]


def make_local(text: str) -> str:
    for name in HUB:
        text = text.replace(name, "my_model")
    return text


def test_every_block_is_in_a_language_that_is_run():
    assert {block["language"] for _, block in BLOCKS} == {"bash", "python"} and len(BLOCKS) >= 20
    for page in PAGES:
        assert page.read_text().count("```") == 2 * sum(page == its for its, _ in BLOCKS), page.name


def test_the_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_lists_all_public_names():
    listed = re.search(r"`from dllm import ([^`]*)`", (ROOT / "README.md").read_text())
    exec(listed[0].strip("`"), {})
    assert set(listed[1].split(", ")) == set(dllm.__all__)
    assert all(hasattr(dllm, name) for name in dllm.__all__)
    assert {"Regex", "json_schema", "AllowedTokens"} <= set(dir(importlib.import_module("dllm.constraints")))


def test_the_readme_lists_all_extras():
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.M)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(listed) == sorted(extras.keys() - {"dev"})


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks(block, capsys):
    code = make_local(block["code"]) if block["mark"] else block["code"]
    assert block["mark"] or not any(name in code for name in HUB), "this block needs the mark <!-- network -->"
    exec(compile(code, "<docs>", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.slow
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
            assert words[0] == "dllm", f"the docs run {words[0]}, which this test does not"
            assert cli.main([*words[1:], *(BRIEF if words[1] == "train" else [])]) == 0, capsys.readouterr().err


@pytest.fixture
def serving(tmp_path):
    """A function that starts a server by its command line, and waits until it answers; the test's end stops it."""
    started = []

    def serve(words: list[str]) -> None:
        told = tmp_path / f"told{len(started)}"
        started.append(start(cli.main, words[1:], told))
        wait_until(lambda: "serving on" in told.read_text(), started[-1])
        urlopen(f"http://127.0.0.1:{words[words.index('--port') + 1]}/health").close()

    yield serve
    for process in started:
        process.terminate()
        assert end(process) == 0


def check_recipe(place: Path, arguments: list[str]) -> None:
    """Train by a published model's recipe, cut down to the tiny model: two steps of short rows."""
    file, *flags = arguments
    load_config(file, flags)
    cut = place / "recipe.yaml"
    cut.write_text(make_local(Path(file).read_text()))
    assert cli.main(["train", str(cut), *flags, "--data.max_seq_len=64", *BRIEF, "--train.device=cpu"]) == 0
    assert list(place.glob("logs/*/checkpoints/global_step_2/hf_ckpt/model.safetensors"))


def test_links_lead_to_files_that_exist():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target, _, anchor in re.findall(r"\]\(([^)#:]*)(#([^)]+))?\)", page.read_text()):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            heads = re.findall(r"^#+ (.+)$", there.read_text(), re.M) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.mark.slow
def test_the_map_names_every_module_and_nothing_else():
    text = (ROOT / "docs/architecture.md").read_text().split("## The map")[1]
    for package in ("dllm", "dllm_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            operation = package == "dllm_kernels" and path.parent.name != "dllm_kernels"  # a file a backend, named so
            if not path.name.startswith("_") and not operation:
                assert path.name in text, f"docs/architecture.md lacks {path.relative_to(ROOT)}"
        for path in (ROOT / package).rglob("__init__.py"):
            assert f"{path.parent.name}/" in text, f"docs/architecture.md lacks {path.parent.relative_to(ROOT)}"
    for name in re.findall(r"\b[a-z_]+\.(?:py|yaml|cpp)\b", text):
        assert list(ROOT.glob(f"[!.]*/**/{name}")), f"there is no {name}"
