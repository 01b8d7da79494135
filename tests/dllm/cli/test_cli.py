"""The command line: the output of each command, and one line with the right exit code for every error."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dllm
from dllm import cli
from dllm.errors import Failure, run_command
from dllm.evaluators.settings import HeldOutSettings, InfillingSettings
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import Gap, choose_length
from dllm.model.tokenizer import cut_at_end, load_tokenizer

ROOT = Path(__file__).parents[3]
CODE = "".join(f"def add_{i}(x, y):\n    total = x + y + {i}\n    return total\n\n\n" for i in range(30))


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(6):
        (folder / f"file_{i}.py").write_text(CODE.replace("add", f"add{i}"))
    return folder


@pytest.fixture
def broken(model_folder, tmp_path) -> Path:
    """A copy of the model to break."""
    return Path(shutil.copytree(model_folder, tmp_path / "broken"))


@pytest.fixture
def fails(capsys):
    """Run a command that must fail. Returns its one line on stderr."""
    def run(code: int, *arguments) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("dllm: error: ") and err.count("\n") == 1, err
        return err
    return run


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Output of each command


def test_sample_prints_prompt_and_continuation_the_same_for_the_same_seed(model_folder, capsys, monkeypatch, tmp_path):
    flags = ["--max-new-tokens", "12", "--steps", "12", "--temperature", "1", "--seed", "3"]
    (tmp_path / "prompt").write_text("def f(x):")
    monkeypatch.setattr(sys, "stdin", open(tmp_path / "prompt"))
    texts = []
    for source in (["--prompt", "def f(x):"], ["--prompt-file", str(tmp_path / "prompt")], []):
        assert cli.main(["sample", str(model_folder), *source, *flags]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert re.search(r"12 steps, \d+ forward passes, .* seed 3\n$", err)
    assert texts[0].startswith("def f(x):") and len(texts[0]) > len("def f(x):\n")
    assert texts[0] == texts[1] == texts[2]


def test_sample_fills_the_masks_of_a_prompt_and_shows_them(model_folder, capsys, tmp_path):
    command = ["sample", str(model_folder), "--max-new-tokens", "2", "--steps", "6", "--seed", "1", "--output",
               str(tmp_path / "out.json")]
    assert cli.main([*command, "--prompt", "def <|mask|><|mask|>(x): <|mask|> <|endoftext|>"]) == 0
    out, record = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    filled, = record["filled_prompts"]
    assert out == filled + record["texts"][0] + "\n" and "<|mask|>" not in out
    assert re.fullmatch(r"def .*\(x\): .* <\|endoftext\|>", filled, re.S)
    assert len(filled) > len("def (x):  <|endoftext|>")
    assert cli.main([*command, "--prompt", "def f(x):"]) == 0
    assert "filled_prompts" not in json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("flags", [["sample", "--prompt", "caf\udce9"], ["infill", "--prefix", "\udce9"],
                                   ["infill", "--suffix", "\udce9"], ["sample", "--regex", "\udce9"]])
def test_flags_that_are_no_unicode_are_refused(flags, fails, model_folder):
    command, *rest = flags
    assert f"{rest[0]}: is not UTF-8 text; convert it" in fails(2, command, model_folder, *rest)


@pytest.mark.slow
def test_standard_input_that_is_no_unicode_is_refused(model_folder):
    run = subprocess.run([sys.executable, "-m", "dllm", "sample", model_folder], input=b"caf\xe9", capture_output=True)
    assert run.returncode == 2 and run.stderr == (
        b"dllm: error: the prompt on standard input is not UTF-8 text; convert it\n")


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfdef f:\r\n", "def f:\r\n".encode("utf-16")])
def test_standard_input_is_read_as_a_file_is(content, model_folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "prompt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", open(tmp_path / "prompt"))
    flags = ["sample", str(model_folder), "--seed", "1", "--max-new-tokens", "4"]
    assert cli.main(flags) == cli.main([*flags, "--prompt-file", str(tmp_path / "prompt")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("def f:\r\n") and out == out[:len(out) // 2] * 2


def test_infill_with_length_auto_takes_what_fits_near_the_limit(model_folder, capsys):
    assert cli.main(["infill", str(model_folder), "--prefix", "x " * 125, "--suffix", "y", "--steps", "4"]) == 0
    assert capsys.readouterr().out.startswith("x x ")


def test_sample_without_a_seed_takes_and_tells_a_fresh_one(model_folder, capsys):
    seeds = set()
    for _ in range(2):
        assert cli.main(["sample", str(model_folder), "--prompt", "x", "--max-new-tokens", "2", "--steps", "2"]) == 0
        seeds.add(re.search(r"seed (\d+)\n", capsys.readouterr().err)[1])
    assert len(seeds) == 2


@pytest.mark.slow
def test_sample_equals_the_library_and_its_record_says_how(model_folder, capsys, tmp_path):
    file = tmp_path / "new" / "record.json"
    assert cli.main(["sample", str(model_folder), "--prompt", "x = ", "--max-new-tokens", "10", "--steps", "5",
                     "--temperature", "0.8", "--top-p", "0.9", "--top-k", "50", "--alg", "p2", "--seed", "7",
                     "--num-return-sequences", "2", "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    model, tokenizer = dllm.DiffusionLM.from_pretrained(model_folder), load_tokenizer(model_folder)
    config = dllm.MDMGenerationConfig(max_new_tokens=10, steps=5, temperature=0.8, top_p=0.9, top_k=50, alg="p2",
                                      seed=7, num_return_sequences=2)
    ids = tokenizer("x = ", return_tensors="pt")["input_ids"]
    out = model.diffusion_generate(inputs=ids, generation_config=config)
    assert [dllm.MDMGenerationConfig(**record["settings"])] == [config]
    assert record["forwards"] == out.forwards and len(record["texts"]) == 2
    for text, row in zip(record["texts"], out.sequences, strict=True):
        new = row[ids.shape[1]:].tolist()
        new = new[:new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        assert text == tokenizer.decode(new, skip_special_tokens=True)
    assert capsys.readouterr().out == "".join(
        f"--- {i} of 2 ---\nx = {text}\n" for i, text in enumerate(record["texts"], start=1))


@pytest.mark.slow
def test_what_sample_writes_matches_the_expression(model_folder, capsys, tmp_path):
    file = tmp_path / "record.json"
    assert cli.main(["sample", str(model_folder), "--prompt", "x = ", "--max-new-tokens", "9", "--steps", "4",
                     "--alg", "maskgit_plus", "--regex", "[0-9]+", "--output", str(file)]) == 0
    record = json.loads(file.read_text())
    assert re.fullmatch("[0-9]+", record["texts"][0]) and record["settings"]["constraint"] == "[0-9]+"
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}')
    arguments = ["infill", str(model_folder), "--prefix", "x = ", "--suffix", "\n", "--alg", "maskgit_plus", "--steps",
                 "8", "--json-schema", str(schema), "--output", str(file)]
    assert cli.main(arguments) == 0  # only lengths in which such JSON fits
    assert isinstance(json.loads(json.loads(file.read_text())["texts"][0])["a"], bool)
    assert cli.main([*arguments, "--length", "2"]) == 2
    assert "no text of 2 tokens matches the constraint" in capsys.readouterr().err


@pytest.mark.slow
def test_infill_chooses_the_length_itself(model_folder, capsys, tmp_path):
    file = tmp_path / "record.json"
    arguments = ["infill", str(model_folder), "--prefix", "x = ", "--suffix", "\n", "--alg", "maskgit_plus",
                 "--steps", "4"]
    assert cli.main([*arguments, "--output", str(file)]) == 0
    auto, out = json.loads(file.read_text()), capsys.readouterr().out
    assert out == f"x = {auto['texts'][0]}\n\n"
    model, tokenizer = dllm.DiffusionLM.from_pretrained(model_folder), load_tokenizer(model_folder)
    prefix, suffix = (torch.tensor(tokenizer(text)["input_ids"]) for text in ("x = ", "\n"))
    length = choose_length(model, Gap(prefix, suffix, "auto"), dllm.MDMGenerationConfig(alg="maskgit_plus", steps=4))
    assert cli.main([*arguments, "--length", str(length)]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.slow
def test_the_page_of_a_sample_plays_in_a_browser(model_folder, chromium, tmp_path):
    page, probe = tmp_path / "new" / "sample.html", tmp_path / "probe.html"
    assert cli.main(["sample", str(model_folder), "--prompt", "if a < b: # </script>", "--max-new-tokens", "12",
                     "--steps", "6", "--alg", "maskgit_plus", "--num-return-sequences", "2", "--seed", "3",
                     "--save-html", str(page)]) == 0
    assert "--seed 3" in page.read_text() and "<dd>6</dd>" in page.read_text() and "://" not in page.read_text()
    probe.write_text(page.read_text().replace("</body>", """<script>
      const roots = [...document.querySelectorAll(".denoise")], root = roots[1];
      root.querySelector("[data-do=play]").click();
      const slider = root.querySelector("[type=range]");
      slider.value = slider.max; slider.dispatchEvent(new Event("input"));
      root.querySelector("[type=checkbox]").click();
      const steps = [...root.querySelectorAll("[data-at]")].map(slot => +slot.dataset.at);
      const number = getComputedStyle(root.querySelector("[data-at]"), "::after").content;
      const masked = root.querySelectorAll(".mask").length;  // an untrained model may predict the mask token
      document.title = [roots.length, steps.length + masked, steps.length > 6, Math.max(...steps) <= 6,
        number !== "none", document.documentElement.scrollWidth <= innerWidth].join();
    </script></body>"""))
    for width in (500, 1280):
        shown = chromium(probe, f"--window-size={width},900", "--dump-dom")
        assert re.search(r"<title>(.*?)</title>", shown.stdout)[1] == "2,12,true,true,true,true"
        assert "CONSOLE" not in shown.stderr, shown.stderr


def test_sample_stops_the_text_at_the_end_of_text_token(model_folder):
    tokenizer = load_tokenizer(model_folder)
    ids = torch.tensor([5, 6, tokenizer.eos_token_id, 7, tokenizer.eos_token_id])
    assert cut_at_end(tokenizer, ids).tolist() == [5, 6]
    assert cut_at_end(tokenizer, ids[:2]).tolist() == [5, 6]


def test_sample_watch_shows_the_text_that_sample_prints(model_folder, capsys):
    flags = ["sample", str(model_folder), "--prompt", "x", "--max-new-tokens", "6", "--steps", "6", "--seed", "1"]
    shown = []
    for command in (flags, [*flags, "--watch"]):
        assert cli.main(command) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and len(shown[0]) > 3


def test_infill_keeps_what_is_around_the_gap(model_folder, capsys, tmp_path):
    flags = ["--length", "5", "--steps", "5", "--seed", "1"]
    assert cli.main(["infill", str(model_folder), "--prefix", "def f(x):\n    ", "--suffix", "\n    return y", *flags,
                     "--output", str(tmp_path / "record.json")]) == 0
    text = capsys.readouterr().out
    middle = json.loads((tmp_path / "record.json").read_text())["texts"][0]
    assert middle and text == f"def f(x):\n    {middle}\n    return y\n"
    (tmp_path / "gap.py").write_text("def f(x):\n    <FILL>\n    return y")
    assert cli.main(["infill", str(model_folder), "--file", str(tmp_path / "gap.py"), *flags]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("task, flags, keys", [
    ("perplexity", ["--samples", "2"], {"perplexity_bound", "nats_per_token", "bits_per_byte"}),
    ("masked_accuracy", ["--shares", "0.15,0.5"], {"share", "accuracy", "nats"}),
    ("infill", ["--lines", "4"], {"exact_match", "low", "high", "tokens_per_forward"}),
])
def test_eval_gives_json_on_stdout_and_in_a_file(task, flags, keys, model_folder, corpus, capsys, tmp_path):
    arguments = ["eval", task, str(model_folder), "--data", str(corpus), "--max-seq-len", "128", *flags]
    assert cli.main([*arguments, "--output", str(tmp_path / "result.json")]) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads((tmp_path / "result.json").read_text())
    result = printed["result"]
    assert keys <= set(result if isinstance(result, dict) else result[0]) and printed["documents"] == 6
    if task == "infill":
        assert len(written["result"].pop("examples")) == 4
    assert written == printed
    manifest = printed["manifest"]
    assert {"weights", "tokenizer", "versions", "machine", "dtype"} <= manifest.keys()
    assert len(manifest["data"]["sha256"]) == len(manifest["weights"]) == 64
    assert cli.main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    for record in (again, printed):
        del record["manifest"]["time"]
    assert again == printed


def test_eval_can_keep_to_the_held_out_documents(model_folder, corpus, capsys):
    assert cli.main(["eval", "masked_accuracy", str(model_folder), "--data", str(corpus), "--shares", "0.5",
                     "--max-seq-len", "64", "--windows", "4", "--validation-share", "0.3"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["documents"] < 6


def test_train_writes_a_model_that_sample_takes(corpus, capsys, tmp_path):
    assert cli.main(["train", f"--data.train_path={corpus}", *tiny_training(tmp_path / "run")]) == 0
    folder = re.search(r"2 steps; the model is in (\S+)", capsys.readouterr().out)[1]
    assert cli.main(["sample", folder, "--prompt", "def", "--max-new-tokens", "3", "--steps", "3"]) == 0
    assert capsys.readouterr().out.startswith("def")


def tiny_training(output: Path, steps: int = 2) -> list[str]:
    return [f"--train.output_dir={output}", f"--train.max_steps={steps}", "--train.save_steps=1", "--train.device=cpu",
            "--train.eval_tokens=64", "--data.max_seq_len=64", "--model.vocab_size=300", "--model.hidden_size=16",
            "--model.intermediate_size=16", "--model.num_hidden_layers=1", "--model.num_attention_heads=2",
            "--model.num_key_value_heads=2"]


def test_help_states_the_defaults_that_are_taken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    told = {}
    for command, kind in ((["sample"], MDMGenerationConfig), (["infill"], MDMGenerationConfig),
                          (["eval", "perplexity"], HeldOutSettings), (["eval", "masked_accuracy"], HeldOutSettings),
                          (["eval", "infill"], InfillingSettings)):
        assert cli.main([*command, "--help"]) == 0
        defaults = {field.name: field.default for field in fields(kind) if field.default is not None}
        for flag, text in re.findall(r"--([a-z-]+) \S+ +.*default: ([0-9a-z_.,]+)$", capsys.readouterr().out, re.M):
            name = flag.replace("-", "_")
            if name in defaults:
                default = defaults[name]
                assert text in (str(default), f"{default:g}" if isinstance(default, float) else "",
                                ",".join(map(str, default)) if isinstance(default, tuple) else ""), (command, flag)
                told[name] = text
    assert {"max_new_tokens", "steps", "alg", "lines", "windows", "samples", "shares", "max_seq_len"} <= set(told)


def test_train_help_lists_every_key(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--train.output_dir=required" in out and "--data.max_seq_len=2048" in out and "--model.hidden_size=" in out


def test_doctor_reports_versions_devices_and_backends(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for wanted in (dllm.__version__, torch.__version__, "cpu", "g++", "topk_unmask", "reference", "to install:"):
        assert wanted in out


def test_data_count_tells_what_training_would_see(model_folder, corpus, capsys):
    assert cli.main(["data", "count", str(corpus), "--tokenizer", str(model_folder), "--max-seq-len", "64"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["documents"] == 6 and counts["bytes"] == sum(len(f.read_bytes()) for f in corpus.iterdir())
    assert counts["rows"] * 64 >= counts["tokens"] > (counts["rows"] - 1) * 64 * 0.9
    assert 0.9 < counts["packing"] <= 1


def test_data_inspect_shows_the_chunks_their_text_and_masks(model_folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("[bold] é first")
    (tmp_path / "b.txt").write_text("second " * 20)
    command = ["data", "inspect", str(tmp_path), "--tokenizer", str(model_folder), "--rows", "1"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "[bold] é first<|endoftext|>" in out and "second " * 20 + "<|endoftext|>" in out
    assert out.count("chunk of") == out.count("corrupted at t = ") == 2 and "▒" in out and "\x1b" not in out
    assert cli.main(command) == 0 and capsys.readouterr().out == out


def test_data_inspect_marks_the_answers_which_alone_are_masked(model_folder, tmp_path, capsys):
    talk = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "An answer."}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"talk": talk}))
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                                         "{% if add_generation_prompt %}assistant: {% endif %}")
    assert cli.main(["data", "inspect", str(tmp_path / "talk.jsonl"), "--tokenizer", str(model_folder), "--text-keys",
                     "talk", "--data-type", "conversation", "--chat-template", str(tmp_path / "chat.jinja")]) == 0
    out = capsys.readouterr().out
    assert "user: Question?\nassistant: «An answer.\n<|endoftext|>»" in out and "to learn" in out
    assert out.count("user: Question?\nassistant: ") == 4  # clean and corrupted, in both rows


def test_data_inspect_shows_the_edits_of_pairs_and_count_their_columns(model_folder, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"old": "x = 1\nz", "new": "y = 1\nz!"}))
    flags = [str(tmp_path / "pairs.jsonl"), "--tokenizer", str(model_folder), "--data-type", "edits", "--text-keys",
             "old,new"]
    assert cli.main(["data", "inspect", *flags, "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "<|endoftext|>[-x-]{+y+} = 1\nz{+!+}<|endoftext|>" in out and ", 2 edits" in out
    assert cli.main(["data", "count", *flags]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["documents"], counts["rows"], counts["bytes"]) == (1, 1, 8)


def test_data_download_prepares_a_dataset_or_writes_it_where_it_is_told(monkeypatch, tmp_path, capsys, fails):
    import datasets

    from dllm.data import read_documents
    table = datasets.Dataset.from_dict({"text": ["one", "two"]})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    assert cli.main(["data", "download", "owner/name"]) == 0
    assert capsys.readouterr().out == "2 records of owner/name; train with --data.train_path=owner/name\n"
    assert cli.main(["data", "download", "owner/name", "--output-dir", str(tmp_path / "new")]) == 0
    assert [document.text for document in read_documents([tmp_path / "new"])] == ["one", "two"]
    assert "is a local path, there is nothing to download" in fails(2, "data", "download", tmp_path)

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    assert "Couldn't reach 'owner/name' on the Hub" in fails(2, "data", "download", "owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'dllm[data]'" in fails(2, "data", "download", "owner/name")


# Errors


def test_missing_folders(fails, model_folder, tmp_path):
    assert "/no/such/model is not a folder" in fails(2, "sample", "/no/such/model", "--prompt", "x")
    err = fails(2, "eval", "perplexity", model_folder, "--data", "/no/such/data")
    assert "/no/such/data does not exist" in err
    err = fails(2, "train", "--data.train_path=/no/such/data", *tiny_training(tmp_path / "run"))
    assert "/no/such/data does not exist" in err
    assert "no_such.yaml" in fails(2, "train", "no_such.yaml")
    assert "no_such.txt" in fails(2, "sample", model_folder, "--prompt-file", "no_such.txt")
    (tmp_path / "empty").mkdir()
    assert "config.json does not exist" in fails(2, "sample", tmp_path / "empty", "--prompt", "x")


def test_empty_corpus(fails, model_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "nothing.py").write_text("")
    assert f"no text in {empty}" in fails(2, "train", f"--data.train_path={empty}", *tiny_training(tmp_path / "run"))
    assert f"no text in {empty}" in fails(2, "eval", "infill", model_folder, "--data", empty)


def test_undecodable_files_are_skipped_and_counted(model_folder, corpus, capsys, fails):
    (corpus / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    assert cli.main(["eval", "masked_accuracy", str(model_folder), "--data", str(corpus), "--windows", "2",
                     "--max-seq-len", "64"]) == 0
    out, err = capsys.readouterr()
    assert "skipped 1 " in err and "picture.png" in err and json.loads(out)["documents"] == 6
    assert "picture.png is not UTF-8 text" in fails(2, "sample", model_folder, "--prompt-file", corpus / "picture.png")


def test_truncated_weights(fails, broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    err = fails(2, "sample", broken, "--prompt", "x")
    assert f"{weights} is truncated or corrupt" in err and "again" in err


def test_unknown_family(fails, broken):
    edit_json(broken / "config.json", model_type="brand_new")
    err = fails(2, "sample", broken, "--prompt", "x")
    assert "model_type 'brand_new'" in err and "qwen2, qwen3, llama" in err


def test_config_json_that_is_not_json(fails, broken):
    (broken / "config.json").write_text('{"model_type": ')
    assert f"{broken / 'config.json'} is not a readable JSON file" in fails(2, "sample", broken, "--prompt", "x")


def test_vocabulary_mismatch(fails, broken, corpus, tmp_path, capsys):
    tokenizer = load_tokenizer(broken)
    tokenizer.add_tokens([f"<|extra_{i}|>" for i in range(20)])
    tokenizer.save_pretrained(broken)
    for command in (["sample", broken, "--prompt", "x"], ["eval", "perplexity", broken, "--data", corpus]):
        err = fails(2, *command)
        assert f"tokenizer has {len(tokenizer)} tokens" in err and "vocabulary is 400" in err
    assert cli.main(["train", f"--model.model_path={broken}", f"--data.train_path={corpus}", "--data.max_seq_len=64",
                     "--train.max_steps=1", "--train.device=cpu", f"--train.output_dir={tmp_path / 'run'}"]) == 0
    assert "grows from 400 to 448 rows" in capsys.readouterr().err
    edit_json(broken / "config.json", vocab_size=500)
    assert "[400, 32], not [500, 32]" in fails(2, "sample", broken, "--prompt", "x")


def test_a_prompt_longer_than_the_models_positions(fails, model_folder):
    err = fails(2, "sample", model_folder, "--prompt", "x y z " * 80, "--max-new-tokens", "10")
    assert "the model has 256" in err and "shorten the prompt" in err
    err = fails(2, "infill", model_folder, "--prefix", "x", "--length", "300")
    assert "301" in err and "256" in err and "shorten" in err


@pytest.mark.parametrize("flags, wanted", [
    (["--steps", "0"], "steps must be at least 1, not 0"),
    (["--max-new-tokens", "-3"], "max_new_tokens must be at least 1, not -3"),
    (["--temperature", "-1"], "temperature must be at least 0, not -1"),
    (["--top-p", "1.5"], "top_p must be above 0 and at most 1, not 1.5"),
    (["--alg", "beam"], "ancestral, confidence_threshold, entropy_bound, soft_parallel, self_speculation, not 'beam'"),
    (["--seed", str(2**64)], "seed must be a whole number, not one beyond 64 bits"),
    (["--steps", "9" * 5000], "--steps: must be a whole number, not '999999"),
    (["--temperature", "inf"], "temperature must be finite, not inf"),
    (["--steps", "many"], "--steps: must be a whole number, not 'many'"),
    (["--promt", "x"], "has no flag --promt; did you mean --prompt?"),
    (["--device", "gpu"], "--device is one of auto, cpu, cuda, not 'gpu'"),
    (["--seed"], "--seed: expected one argument"),
])
def test_bad_values_and_unknown_flags_of_sample(flags, wanted, fails, model_folder):
    assert wanted in fails(2, "sample", model_folder, "--prompt", "x", *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_is_not_there(fails, model_folder):
    assert "sees no GPU" in fails(2, "sample", model_folder, "--prompt", "x", "--device", "cuda")


@pytest.mark.parametrize("arguments, wanted", [
    ([], "required: COMMAND"),
    (["trian"], "did you mean train?"),
    (["--versoin"], "did you mean --version?"),
    (["eval", "perplexty"], "did you mean perplexity?"),
    (["eval", "perplexity", "x", "--windwos", "3"], "did you mean --windows?"),
    (["eval", "perplexity"], "required: MODEL"),
    (["doctor", "now"], "unrecognized arguments: now"),
    (["train", "--train.lrr=1"], "no configuration key train.lrr; did you mean train.lr?"),
    (["train", "--lr=1"], "--train.lr=1e-3"),
    (["train", "--train.lr=fast", "--train.output_dir=x"], "train.lr must be a number, not 'fast'"),
    (["infill", "model", "--prefix", "x", "--length", "few"], "--length: must be a whole number, not 'few'"),
    (["sample", "model", "--regex", "a", "--json-schema", "b"], "not allowed with"),
    (["infill", "model", "--length", "3"], "give --prefix and --suffix, or --file"),
    (["infill", "model", "--length", "3", "--file", __file__, "--suffix", "x"], "leave out --prefix and --suffix"),
    (["infill", "model", "--length", "3", "--file", __file__, "--marker", "import "], "once, not"),
])
def test_bad_command_lines(arguments, wanted, fails):
    assert wanted in fails(2, *arguments)


def test_an_unknown_key_in_a_configuration_file(fails, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("train:\n  output_dir: runs/x\n  warmup: 3\n")
    assert "train.warmup" in fails(2, "train", file)
    file.write_text("train: [unclosed\n")
    assert f"{file} is not valid YAML" in fails(2, "train", file)


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint_intact(corpus, capsys, tmp_path, full_disk):
    data = f"--data.train_path={corpus}"
    assert cli.main(["train", data, *tiny_training(tmp_path / "run")]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "global_step_2"
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    capsys.readouterr()
    with full_disk(min(path.stat().st_size for path in before if path.name == "model.safetensors") // 2):
        assert cli.main(["train", data, *tiny_training(tmp_path / "run", steps=4)]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("dllm: error: cannot write ") and "global_step_3" in err[-1] and "free space" in err[-1]
    assert not [line for line in err if "Traceback" in line]
    assert {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()} == before
    assert cli.main(["train", data, *tiny_training(tmp_path / "run", steps=4)]) == 0  # with space again, it continues
    assert load_file(tmp_path / "run" / "checkpoints" / "global_step_4" / "hf_ckpt" / "model.safetensors")


def test_a_full_disk_while_writing_a_result(model_folder, capsys, tmp_path, full_disk):
    file = tmp_path / "record.json"
    file.write_text("the previous one")
    with full_disk(100):
        assert cli.main(["sample", str(model_folder), "--prompt", "x", "--max-new-tokens", "2", "--steps", "2",
                         "--output", str(file)]) == 1
    assert f"dllm: error: cannot write {file}" in capsys.readouterr().err and file.read_text() == "the previous one"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("task, few", [("perplexity", "--samples"), ("infill", "--lines")])
def test_a_full_disk_loses_no_measurement(task, few, model_folder, corpus, capsys, tmp_path, full_disk):
    words = ["eval", task, model_folder, "--data", corpus, few, "2", "--max-seq-len", "128", "--output",
             tmp_path / "record.json"]
    with full_disk(100):
        assert cli.main([str(word) for word in words]) == 1
    out, err = capsys.readouterr()
    assert "cannot write" in err and json.loads(out)["task"] == task and "examples" not in out


def test_no_output_is_written_over_an_input(model_folder, corpus, fails, tmp_path):
    """Whatever the command, the flag, and the way to name the file."""
    text, other = tmp_path / "a.txt", tmp_path / "link.txt"
    text.write_text("x<FILL>y")
    other.symlink_to(text)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("text")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"task_id": "HumanEval/0", "completion": "x"}\n')
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    for flag, output, words in (
            ("--output", text, ("sample", model_folder, "--prompt-file", text)),
            ("--save-html", other, ("sample", model_folder, "--prompt-file", text)),
            ("--output", schema, ("sample", model_folder, "--prompt", "x", "--json-schema", schema)),
            ("--output", model_folder / "config.json", ("sample", model_folder, "--prompt", "x")),
            ("--output", tmp_path / "x/../a.txt", ("infill", model_folder, "--file", text)),
            ("--output", data / "a.txt", ("eval", "perplexity", model_folder, "--data", data)),
            ("--output", data / "a.txt", ("eval", "infill", model_folder, "--data", f"{corpus},{data}")),
            ("--output", samples, ("score", samples, "--task", "humaneval")),
            ("--output", manifest, ("score", samples, "--task", "humaneval")),
            ("--output-dir", tmp_path, ("eval", "humaneval", model_folder, "--data", samples))):
        before = {path: path.read_bytes() for path in (text, data / "a.txt", schema, samples, manifest)}
        told = fails(2, *words, flag, output)
        assert f"{flag} {output}" in told and "would overwrite what the command reads" in told
        assert before == {path: path.read_bytes() for path in before}
    page = tmp_path / "page"
    assert "--output and --save-html name the same file" in fails(
        2, "sample", model_folder, "--prompt", "x", "--output", page, "--save-html", page)
    assert f"--output {tmp_path} is a folder; name a file" in fails(
        2, "sample", model_folder, "--prompt", "x", "--output", tmp_path)


# Exit


@pytest.mark.parametrize("error, code, line", [
    (dllm.UserError("x is 3"), 2, "dllm: error: x is 3"),
    (ValueError("from a\nlibrary"), 2, "dllm: error: ValueError: from a library (DLLM_DEBUG=1 shows where)"),
    (Failure("disk"), 1, "dllm: error: disk"),
    (PermissionError(13, "Permission denied", "a.txt"), 1, "dllm: error: [Errno 13] Permission denied: 'a.txt'"),
    (RuntimeError(), 1, "dllm: error: RuntimeError: no reason given (DLLM_DEBUG=1 shows where)"),
    (KeyboardInterrupt(), 130, "dllm: interrupted"),
])
def test_each_kind_of_error_has_its_exit_code_and_one_line(error, code, line, capsys):
    def command():
        raise error

    assert run_command(command) == code
    assert capsys.readouterr().err == line + "\n"


def test_debug_shows_where_an_error_came_from(monkeypatch):
    with pytest.raises(dllm.UserError):
        cli.main(["--debug", "train", "no_such.yaml"])
    monkeypatch.setenv("DLLM_DEBUG", "1")
    with pytest.raises(dllm.UserError):
        cli.main(["train", "no_such.yaml"])


@pytest.mark.parametrize("characters", [10, 10**6])  # buffered until the end; written at once
def test_a_reader_that_stops_reading_is_no_error_to_tell_of(characters):
    code = ("import sys; from dllm.errors import run_command; "
            f"sys.exit(run_command(lambda: print('x' * {characters}) or 0))")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == b""
