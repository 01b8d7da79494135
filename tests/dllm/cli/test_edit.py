"""Edits on the command line: `dllm edit`, and `dllm sample` and `dllm infill` of a model that edits; and errors."""

import io
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from dllm import cli
from dllm.diffusion_lm import DiffusionLM
from dllm.model.growth import add_edit_heads
from dllm.model.tokenizer import anchor_token_id, encode, load_tokenizer

TEXT = "def f(x):\n    return x + y\n"
BRIEF = ["--steps", "8", "--seed", "1", "--temperature", "1"]


def run(capsys, *arguments) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def inserting(model_folder, tmp_path):
    """A folder of a model that inserts alone."""
    model = add_edit_heads(DiffusionLM.from_pretrained(model_folder), "insert")
    model.save_pretrained(tmp_path / "inserting")
    load_tokenizer(model_folder).save_pretrained(tmp_path / "inserting")
    return tmp_path / "inserting"


def test_edit_prints_the_text_that_the_library_makes_from_every_source(edit_folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text(TEXT)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode()), isatty=lambda: False))
    flags = ["edit", edit_folder, *BRIEF, "--max-new-tokens", "9"]
    texts = {run(capsys, *flags, *source) for source in (["--file", tmp_path / "a.py"], ["--text", TEXT], [])}
    model, tokenizer = DiffusionLM.from_pretrained(edit_folder), load_tokenizer(edit_folder)
    ids = encode(tokenizer, TEXT).tolist()
    out = model.edit([[anchor_token_id(tokenizer), *ids, tokenizer.eos_token_id]], steps=8, seed=1, temperature=1.0,
                     max_new_tokens=9, editable=[[0, *[1] * len(ids), 0]])
    edited = out.rows()[0][1:-1]
    text = tokenizer.decode(edited, skip_special_tokens=True)
    assert texts == {text.removesuffix("\n") + "\n"} and text != TEXT and len(edited) <= len(ids) + 9
    assert (tmp_path / "a.py").read_text() == TEXT


def test_nothing_changes_where_the_rates_are_zero(edit_folder, capsys, tmp_path):
    model = DiffusionLM.from_pretrained(edit_folder)
    with torch.no_grad():
        model.rate_head.weight.zero_()
        model.rate_head.bias.fill_(-50.0)
    model.save_pretrained(tmp_path / "still")
    load_tokenizer(edit_folder).save_pretrained(tmp_path / "still")
    for text in (TEXT, TEXT + "\n", "  x", "<|endoftext|>"):
        assert run(capsys, "edit", tmp_path / "still", *BRIEF, "--text", text) == text.removesuffix("\n") + "\n"


def test_the_line_the_record_and_the_page_of_edits(edit_folder, capsys, tmp_path):
    record, page = tmp_path / "record.json", tmp_path / "page.html"
    flags = ["edit", edit_folder, "--text", TEXT, *BRIEF, "--num-return-sequences", "2"]
    assert cli.main([*map(str, flags), "--output", str(record), "--save-html", str(page)]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"8 steps, \d+ forward passes, .* seed 1\n", err)
    written = json.loads(record.read_text())
    assert written["text"] == TEXT and len(set(map(len, written["texts"]))) == 2
    assert written["settings"]["alg"] == "edit" and written["steps"] == 8
    assert out == "".join(f"--- {i} of 2 ---\n" + text.removesuffix("\n") + "\n"
                          for i, text in enumerate(written["texts"], start=1))
    shown = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert len(shown) == 2 and "A text being edited" in page.read_text() and "<dd>edit</dd>" in page.read_text()
    for data, text in zip(map(json.loads, shown), written["texts"], strict=True):
        pieces = data["start"]
        assert "".join(pieces) == TEXT
        for place, piece, *_ in (change for changes in data["steps"] for change in changes):
            pieces[place] = piece
        assert "\ufffd" in text or "".join(pieces) == text
    assert run(capsys, *flags, "--watch").replace("\n", "") == "".join(written["texts"]).replace("\n", "")


@pytest.mark.parametrize("command", [["sample", "--prompt", "x = ", "--max-new-tokens", "20"],
                                     ["sample", "--prompt", "", "--max-new-tokens", "20"],
                                     ["infill", "--prefix", "x = ", "--suffix", " + 1"],
                                     ["infill", "--suffix", " + 1", "--length", "9"]])
def test_sample_and_infill_of_a_model_whose_folder_says_edit(edit_folder, capsys, tmp_path, command):
    record, page = tmp_path / "record.json", tmp_path / "page.html"
    name, *flags = command
    command = [name, edit_folder, *flags, *BRIEF, "--num-return-sequences", "2"]
    out = run(capsys, *command, "--output", record, "--save-html", page)
    written = json.loads(record.read_text())
    before = flags[1] if flags[0] != "--suffix" else ""
    after = " + 1" if name == "infill" else ""
    assert written["settings"]["alg"] == "edit" and len(set(written["texts"])) == 2
    assert out == "".join(f"--- {i} of 2 ---\n{before}{text}{after}\n"
                          for i, text in enumerate(written["texts"], start=1))
    starts = [json.loads(data)["start"] for data in re.findall(
        r'<script type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)]
    assert ["".join(start) for start in starts] == [before + after] * 2  # gaps begin empty
    whole = "".join(before + text + after for text in written["texts"])
    assert run(capsys, *command, "--watch").replace("\n", "") == whole.replace("\n", "") or name == "sample"


def test_a_model_that_inserts_alone_keeps_every_token_and_says_so(inserting, capsys):
    assert cli.main(["edit", str(inserting), "--text", "abc abc", *BRIEF]) == 0
    out, err = capsys.readouterr()
    assert "this model only inserts: it deletes and substitutes nothing\n" in err and err.count("\n") == 2
    kept = iter(out)
    assert all(character in kept for character in "abc abc") and len(out) > len("abc abc\n")


def test_what_cannot_be_edited_is_refused_in_one_line(edit_folder, model_folder, capsys, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    threshold = shutil.copytree(edit_folder, tmp_path / "threshold")
    (threshold / "generation_config.json").write_text('{"alg": "entropy", "threshold": 0.9, "steps": 3}')
    for arguments, message in (
            ([model_folder, "--text", "x"], "alg edit needs a model with heads for edits; train one by dllm train"),
            ([edit_folder, "--text", ""], "the text to edit is empty; give one by --file or --text"),
            ([edit_folder, "--file", tmp_path / "empty.txt"], "the text to edit is empty"),
            ([edit_folder, "--file", tmp_path / "none.txt"], "none.txt"),
            ([edit_folder, "--file", tmp_path / "latin.txt"], "latin.txt is not UTF-8 text"),
            ([edit_folder, "--file", tmp_path / "latin.txt", "--output", tmp_path / "latin.txt"], "latin.txt"),
            ([edit_folder, "--text", "x y z " * 80], "positions with what is before and after it, the model has 256"),
            ([edit_folder, "--text", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
            ([edit_folder, "--text", "x", "--block-length", "4"], "dllm edit has no flag --block-length"),
            ([edit_folder, "--text", "x", "--file", "y"], "not allowed with")):
        assert cli.main(["edit", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("dllm: error: ") and err.count("\n") == 1 and message in err, err
    assert cli.main(["sample", str(edit_folder), "--prompt", "a <|mask|> b"]) == 2
    assert "alg edit fills one gap, after the prompt" in capsys.readouterr().err
    # Of a folder's settings, those of other methods are left out.
    assert cli.main(["edit", str(threshold), "--text", "x", "--seed", "1"]) == 0
    assert capsys.readouterr().err.startswith("3 steps, ")


@pytest.mark.slow
def test_the_page_of_edits_plays_in_a_browser(edit_folder, chromium, capsys, tmp_path):
    page, probe = tmp_path / "page.html", tmp_path / "probe.html"
    run(capsys, "edit", edit_folder, "--text", TEXT, *BRIEF, "--save-html", page)
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    marks = [[mark for *_, mark in changes] for changes in data["steps"]]
    step = next(index for index, step in enumerate(marks, start=1) if 2 in step and 3 in step)
    probe.write_text(page.read_text().replace("</body>", f"""<script>
      const root = document.querySelector(".denoise"), slider = root.querySelector("[type=range]");
      root.querySelector("[data-do=play]").click();
      const at = value => {{ slider.value = value; slider.dispatchEvent(new Event("input")); }};
      const count = () => ["inserted", "deleted"].map(kind => root.querySelectorAll("." + kind).length);
      at({step});
      const struck = getComputedStyle(root.querySelector(".deleted")).textDecorationLine, then = count();
      at(slider.max);
      document.title = [...then, struck, ...count(), root.querySelector("pre").innerText.length > 0].join();
    </script></body>"""))
    shown = chromium(probe, "--dump-dom")
    made = marks[step - 1]
    assert re.search(r"<title>(.*?)</title>", shown.stdout)[1] == (
        f"{made.count(2)},{made.count(3)},line-through,0,0,true")
    assert "CONSOLE" not in shown.stderr, shown.stderr


def test_flags_of_flows_hold_for_the_method_that_the_folder_names(edit_folder, model_folder, capsys, tmp_path):
    prompt, record = ["--prompt", "def f(x):", *BRIEF], tmp_path / "record.json"
    run(capsys, "sample", edit_folder, *prompt, "--flow-rule", "euler", "--output", record)
    assert json.loads(record.read_text())["settings"]["flow_rule"] == "euler"
    assert cli.main(["sample", str(model_folder), *prompt, "--flow-rule", "euler"]) == 2
    assert "flow_rule needs alg flow or edit, and no remasking; the method is entropy" in capsys.readouterr().err
