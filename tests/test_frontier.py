"""The frontier of decoding: a study runs, goes on, and says which setting loses at most a point."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import frontier


def test_the_best_setting_loses_at_most_a_point():
    def measured(exact, speed):
        return {"exact": "1" * exact + "0" * (100 - exact), "tokens": 500, "tokens_per_forward": speed}

    settings = {frontier.ONE: measured(12, 1.0), "threshold 0.5": measured(11, 2.0), "threshold 0.3": measured(10, 3.0),
                "threshold 0.9": measured(13, 1.5)}
    assert frontier.best(settings) == "threshold 0.5"
    assert frontier.best({**settings, frontier.ONE: measured(14, 1.0)}) == "threshold 0.9"
    shown = frontier.show({"line": settings})
    assert "| threshold 0.3 | 10% | 6% to 17% | 2 | 0 | 3.00 |" in shown
    assert "Of 100 lines; at no more than one point lost: threshold 0.5, 2.00 tokens per forward." in shown


@pytest.mark.slow
def test_a_study_measures_goes_on_and_is_shown(model_folder, tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "code.jsonl"
    functions = (f"def add_{i}(x, y):\n    return x + y + {i}\n\n" * (1 + i % 5) for i in range(40))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in functions))
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_size": 4, "causal_blocks": True,
                                                    "shift_logits": True}))
    settings = ["threshold 0.3", "self_speculation, 2 drafted", "left to right"]
    for count in (1, 3):
        monkeypatch.setattr(sys, "argv", [
            "frontier", str(folder), "--output-dir", str(tmp_path), "--data", str(corpus), "--length", "32", "--items",
            "2", "--texts", "0", "--settings", "/".join(settings[:count])])
        assert frontier.main() == 0
        its = json.loads((tmp_path / "frontier.json").read_text())["models"]["model"]
        assert set(its["line"]) == set(its["word"]) == {frontier.ONE, *settings[:count]}
    assert its["line"]["left to right"]["exact"] == its["line"]["self_speculation, 2 drafted"]["exact"]
    assert its["line"]["left to right"]["tokens_per_forward"] == 1 and len(its["word"][frontier.ONE]["exact"]) == 2
    assert "| left to right | " in capsys.readouterr().out and (tmp_path / "frontier.svg").exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "fast"])
    assert frontier.main() != 0 and "--settings has no 'fast'" in capsys.readouterr().err
