"""Published folders through the commands, as their users run them."""

import json
import re
import urllib.request
import warnings

import pytest

from dllm import cli
from dllm.errors import run_command, warn
from dllm.model.loading import load_with_tokenizer
from tests.dllm.published import FOLDERS, NEWER, TEXTS, change, publish
from tests.processes import end, start, wait_until

FEW = ["--max-new-tokens", "8", "--steps", "4", "--seed", "1"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": TEXTS[0].replace("add", f"add_{i}")}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def run(capfd, monkeypatch):
    """Run a command that must succeed, without asking anything. Returns what it prints on stdout and stderr."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))

    def run(*arguments):
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out, err
    return run


def complete(model, *flags) -> str:
    """The answer of `dllm serve` to one completion."""
    told = model.parent / "told"
    server = start(cli.main, ["serve", model, "--port", "0", *flags], told)
    address = re.compile(r"serving on (http://\S+)\n")
    wait_until(lambda: address.search(told.read_text()), server)
    request = urllib.request.Request(
        f"{address.search(told.read_text())[1]}/v1/completions", headers={"Content-Type": "application/json"},
        data=json.dumps({"prompt": "def add(", "max_tokens": 4, "seed": 1}).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = json.load(answer)["choices"][0]["text"]
    server.terminate()
    assert end(server) == 0 and "[y/N]" not in told.read_text()
    return text


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOLDERS, *NEWER])
def test_a_published_folder_goes_through_every_command(name, run, corpus, tmp_path):
    folder = publish(name, tmp_path / name)
    mask = ["--mask-token", "<|im_start|>"] if name == "qwen2.5" else []  # an autoregressive model names none
    for model, flags in ((folder, mask), (tmp_path / "exported", [])):
        if model != folder:
            mask = [f"--model.mask_token={mask[1]}"] if mask else []
            run("train", f"--model.model_path={folder}", f"--data.train_path={corpus}", "--data.max_seq_len=64", *mask,
                "--train.max_steps=2", "--train.micro_batch_size=2", f"--train.output_dir={tmp_path / 'run'}")
            run("export", tmp_path / "run", "--output-dir", model)
        out, err = run("sample", model, "--prompt", "def add(", *FEW, *flags)
        assert out.startswith("def add(") and "forward passes" in err
        out, _ = run("infill", model, "--prefix", "def add(", "--suffix", "\n", "--length", "4", *FEW[2:], *flags)
        assert out.startswith("def add(")
        out, _ = run("eval", "perplexity", model, "--data", corpus, "--max-seq-len", "64", "--samples", "2", *flags)
        assert json.loads(out)["result"]["bits_per_byte"] > 0
        assert isinstance(complete(model, "--steps", "4", *flags), str)
    assert not list(tmp_path.rglob("RAN"))


def test_commands_take_a_mask_token_by_text_or_id(run, corpus, tmp_path, capfd):
    folder = publish("qwen2.5", tmp_path / "model")
    change(folder / "generation_config.json", max_new_tokens=8)
    mask_id = load_with_tokenizer(folder, "cpu", mask_token="<|im_start|>")[0].mask_token_id
    texts = {run("sample", folder, "--prompt", "x", "--steps", "4", "--seed", "1", *flags)[0]
             for flags in (["--mask-token", "<|im_start|>"], ["--mask-token-id", mask_id])}
    assert len(texts) == 1
    for command in (["sample", folder, "--prompt", "x"], ["eval", "perplexity", folder, "--data", corpus],
                    ["eval", "infill", folder, "--data", corpus], ["serve", folder, "--port", "0"]):
        capfd.readouterr()
        assert cli.main([str(word) for word in command]) == 2
        assert "mask token: neither a setting, nor generation_config.json, config.json or" in capfd.readouterr().err
    for flags in (["--mask-token", "<|im_start|>"], ["--mask-token-id", mask_id]):
        run("data", "inspect", corpus, "--tokenizer", folder, "--max-seq-len", "32", *flags)


def test_commands_follow_generation_config_json_where_no_flag_is_given(run, tmp_path):
    folder = publish("dream", tmp_path / "model")
    change(folder / "generation_config.json", max_new_tokens=6, steps=3, alg="maskgit_plus", temperature=0.5)
    for flags, expected in (([], (6, 3, "maskgit_plus", 0.5)),
                            (["--max-new-tokens", "4", "--steps", "2", "--alg", "entropy", "--temperature", "0"],
                             (4, 2, "entropy", 0.0))):
        run("sample", folder, "--prompt", "x", "--output", tmp_path / "record.json", *flags)
        settings = json.loads((tmp_path / "record.json").read_text())["settings"]
        assert tuple(settings[name] for name in ("max_new_tokens", "steps", "alg", "temperature")) == expected


def test_sample_cuts_the_folders_new_tokens_to_what_fits(run, tmp_path):
    folder = publish("dream", tmp_path / "model")
    change(folder / "generation_config.json", max_new_tokens=4096, steps=3)
    change(folder / "config.json", max_position_embeddings=32)
    run("sample", folder, "--prompt", "x", "--output", tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text())["settings"]["max_new_tokens"] == 31
    assert cli.main(["sample", str(folder), "--prompt", "x", "--max-new-tokens", "32"]) == 2


def test_warnings_are_one_line_each(run, tmp_path):
    folder = publish("llada", tmp_path / "model")
    change(folder / "config.json", novelty=3)
    out, err = run("sample", folder, "--prompt", "x", *FEW)
    assert re.findall("^dllm: warning: (.*)$", err, re.M) == [
        f"{folder}/config.json: llada has no configuration key 'novelty', ignored"] and "novelty" not in out


def test_a_command_shows_a_warning_once(capsys):
    def command():
        for _ in range(2):
            with warnings.catch_warnings():  # after which Python forgets what it has shown
                pass
            warn("said")
        return 0

    assert run_command(command) == 0
    assert capsys.readouterr().err == "dllm: warning: said\n"
