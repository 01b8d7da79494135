"""The scoreboard: the rows of runs, those that are not compared, and damaged or unfinished runs."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from dllm import cli
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.evaluators.code.generating import generate_samples
from dllm.evaluators.code.scoring import summarize
from dllm.evaluators.code.tasks import read_tasks
from dllm.evaluators.scoreboard import make_scoreboard, read_run, to_markdown
from dllm.evaluators.settings import RunSettings
from dllm.model.tokenizer import load_tokenizer
from dllm.pages.scoreboard import spread, to_page, unbeaten

LIMITS = {"memory": 4294967296, "files": 4096}


def write_run(folder: Path, passes=(1, 0), samples: int = 2, tokens_per_forward: float = 1.0, repeat: int = 1,
              generation: dict | None = None, manifest: dict | None = None, **record) -> Path:
    """A finished run of `len(passes) * repeat` tasks; `passes` are the numbers of samples that pass."""
    counts = {f"HumanEval/{i}": count for i, count in enumerate(list(passes) * repeat)}
    results = [{"task_id": task, "line": 0, "verdict": "pass" if n < count else "fail"}
               for task, count in counts.items() for n in range(samples)]
    manifest = {"task": "humaneval", "preset": "open_dllm", "model": "qwen3", "source": "tiny", "weights": "a" * 64,
                "data": {"sha256": "d" * 64}, "generation": {"steps": 8, "alg": "p2", "seed": 0, **(generation or {})},
                "samples": samples, "length": None, "stops": ["\nclass"], "tasks": len(counts),
                "dtype": "torch.float32", "versions": {"dllm": "0.1.0"}, **(manifest or {})}
    record = {"task": "humaneval", **summarize(results, {task: [None] * samples for task in counts}),
              "attempted_tasks": len(counts), "skipped_lines": [], "python": "3.11.7", "sandbox": {"seccomp": "active"},
              "settings": {"timeout": 3.0, "limits": LIMITS}, "speed": {"tokens_per_forward": tokens_per_forward,
              "tokens_per_second": 100.0}, "manifest": manifest, "results": results, **record}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_row_has_the_score_its_interval_the_speed_and_the_method(tmp_path):
    write_run(tmp_path / "deep" / "er", passes=(2, 1, 0, 0), tokens_per_forward=2.5)
    table, = make_scoreboard([tmp_path]).comparisons
    run, = table.runs
    assert run.name == f"{tmp_path.name}/deep/er" and run.curve == (0.375, 0.5)
    text = to_markdown(make_scoreboard([tmp_path]))
    assert "| 37.5 [" in text and "| 2.50 | 100 | open_dllm, 2 samples, alg p2, steps 8 |" in text
    assert "tiny (aaaaaaaa)" in text and "Warning" not in text


def test_a_row_tells_of_remasking_in_the_place_of_alg(tmp_path):
    write_run(tmp_path / "llada", generation={"remasking": "low_confidence"})
    assert "open_dllm, 2 samples, remasking low_confidence, steps 8 |" in to_markdown(make_scoreboard([tmp_path]))


@pytest.mark.parametrize("other, told", [
    ({"manifest": {"data": {"sha256": "e" * 64}}}, "data (dddddddddddd, eeeeeeeeeeee)"),
    ({"passes": (1, 0, 1)}, "tasks (3, 2)"),
    ({"settings": {"timeout": 5.0, "limits": LIMITS}}, "seconds of a program ("),
    ({"settings": {"timeout": 3.0, "timeout_counts": "CPU seconds", "limits": LIMITS}},
     "clock of the limit (wall-clock seconds, CPU seconds)"),
    ({"settings": {"timeout": 3.0, "limits": {**LIMITS, "memory": 1}}}, "limit of memory ("),
    ({"sandbox": {"seccomp": "not in this kernel"}}, "layers that the sandbox lacks ("),
    ({"python": "3.13.1"}, "Python ("), ({"skipped_lines": ["line 3"]}, "lines left out ("),
    ({"manifest": {"stops": []}}, "stop strings (")])
def test_runs_that_answer_different_questions_do_not_share_a_table(other, told, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", **other)
    board = make_scoreboard([tmp_path])
    assert [len(table.runs) for table in board.comparisons] == [1, 1]
    for table in board.comparisons:
        assert table.warnings[0].startswith("Not to be compared with the other tables of humaneval") and (
            told in table.warnings[0])
    assert to_page(board).count("Not to be compared") == to_markdown(board).count("Not to be compared") == 2


@pytest.mark.parametrize("other, told", [
    ({"generation": {"steps": 16}}, "steps (8, 16)"), ({"generation": {"top_p": 0.9}}, "top_p (none, 0.9)"),
    ({"manifest": {"preset": "dream"}}, "preset (open_dllm, dream)"), ({"samples": 1}, "samples of a task (2, 1)"),
    ({"manifest": {"length": "oracle"}}, "length (none, oracle)"),
    ({"manifest": {"dtype": "torch.bfloat16"}}, "dtype (torch.float32, torch.bfloat16)")])
def test_runs_by_different_methods_share_a_table_that_says_so(other, told, tmp_path):
    write_run(tmp_path / "a", passes=(1, 1))
    write_run(tmp_path / "b", **{"passes": (1, 0), **other})
    table, = make_scoreboard([tmp_path]).comparisons
    warning, = table.warnings
    assert told in warning and told in to_page(make_scoreboard([tmp_path]))


def test_seed_time_and_machine_are_no_difference(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", generation={"seed": 5}, manifest={"time": "later", "machine": "another"})
    table, = make_scoreboard([tmp_path]).comparisons
    assert len(table.runs) == 2 and not table.warnings


def test_tasks_stand_apart_and_both_names_of_single_line_infilling_together(tmp_path):
    for name in ("humaneval", "humaneval_infill", "humaneval_infill_single_line"):
        write_run(tmp_path / name, task=name)
    titles = {table.title: len(table.runs) for table in make_scoreboard([tmp_path]).comparisons}
    assert titles == {"humaneval": 1, "humaneval_infill_single_line": 2}


def test_published_rows_stand_beside_whole_benchmarks_only_and_are_marked(tmp_path):
    write_run(tmp_path / "whole" / "run", repeat=82)
    write_run(tmp_path / "part" / "run")
    text = to_markdown(make_scoreboard([tmp_path / "whole"]))
    assert "| A | published | LLaDA 8B | 35.4 | " in text and "Open-dLLM's README, 2025" in text
    assert "issue 17" in text  # the rerun has its own source
    text = to_markdown(make_scoreboard([tmp_path / "part"]))
    assert "LLaDA" not in text and "The published rows are of 164 tasks and not shown beside 2." in text


def test_published_rows_have_a_source_and_are_shares():
    known = json.loads((Path(cli.__file__).parents[1] / "evaluators" / "published.json").read_text())
    for row in known["rows"]:
        assert row["source"] and row["percent"].keys() <= known["tasks"].keys()
        assert all(0 < value < 100 for scores in row["percent"].values() for value in scores.values())
    assert len(known["rows"]) == 12


def test_what_a_run_is_called_is_escaped(tmp_path):
    write_run(tmp_path / "<b>a|b`c<" / "b>", manifest={"source": "<img src=x onerror=alert(1)>"},
              generation={"alg": "<i>\n\x1b[31m\ud800"})
    board = make_scoreboard([tmp_path])
    page, text = to_page(board), to_markdown(board)
    assert "&lt;b&gt;a|b`c&lt;/b&gt;" in page and "<b>a" not in page and "<img" not in page and "<i>" not in page
    assert "&lt;b>a\\|b\\`c&lt;/b>" in text and "<" not in text
    for written in (page, text):
        assert "\x1b" not in written and written.encode()


def test_the_page_has_everything_in_itself(tmp_path):
    write_run(tmp_path / "a", samples=10, passes=(3, 1))
    write_run(tmp_path / "b", samples=10, passes=(2, 1), tokens_per_forward=4.0)
    page = to_page(make_scoreboard([tmp_path]))
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    said = re.findall(r'<svg class="plot" [^>]*role="img" aria-label="([^"]*)"', page)
    assert said == ["pass@k by k, humaneval, percent: run 1 from 20.0 to 100.0, run 2 from 15.0 to 100.0",
                    "pass@1 by tokens per forward pass, humaneval, percent: run 1 20.0 at 1, run 2 15.0 at 4"]


def test_the_frontier_is_what_no_run_beats_in_both():
    assert unbeaten([(1, 0.5), (2, 0.3), (4, 0.4), (4, 0.2), (0.5, 0.5)]) == [(4, 0.4), (1, 0.5)]


def test_one_sample_of_each_task_makes_no_curve_and_one_run_no_frontier(tmp_path):
    write_run(tmp_path / "a", samples=1)
    assert "<svg" not in to_page(make_scoreboard([tmp_path]))
    write_run(tmp_path / "b", samples=1, tokens_per_forward=2.0)
    page = to_page(make_scoreboard([tmp_path]))
    assert page.count("<svg") == 1 and "pass@k by k" not in page


def test_labels_move_apart_and_no_further():
    assert spread([10, 100]) == [10, 100]
    assert spread([50, 50, 50]) == [36, 50, 64]
    assert spread([0, 10, 12, 200]) == pytest.approx([-20 / 3, 22 / 3, 64 / 3, 200])


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no finished run of dllm eval in .*; give folders that it wrote"):
        make_scoreboard([tmp_path])
    with pytest.raises(UserError, match="there is no folder .*/none; give folders with runs of dllm eval"):
        make_scoreboard([tmp_path / "none"])


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"intervals_95": {}}', '{"intervals_95": 3}', "\udcff"])
def test_a_damaged_run_is_named_and_the_others_shown(content, tmp_path):
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad")
    (tmp_path / "bad" / "results.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    board = make_scoreboard([tmp_path])
    assert [run.name for table in board.comparisons for run in table.runs] == [f"{tmp_path.name}/good"]
    problem, = board.problems
    assert problem.startswith(f"{tmp_path.name}/bad/results.json is no result of dllm eval, or damaged (")
    assert problem in to_markdown(board).replace("\\", "") and "Not shown" in to_page(board)
    (tmp_path / "good" / "results.json").unlink()
    with pytest.raises(UserError, match="no finished run .*bad/results.json is no result"):
        make_scoreboard([tmp_path])


@pytest.mark.parametrize("change", [
    {"pass@1": 1.5}, {"pass@1": "high"}, {"pass@1": True}, {"pass@1": float("nan")}, {"speed": {}}, {"manifest": None},
    {"intervals_95": {"pass@1": [0.9, 0.95]}}, {"results": []}, {"sandbox": []}, {"attempted_tasks": None}])
def test_a_result_with_impossible_values_is_damaged(change, tmp_path):
    folder = write_run(tmp_path / "a")
    record = json.loads((folder / "results.json").read_text()) | change
    (folder / "results.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="a/results.json is no result of dllm eval, or damaged"):
        read_run(folder / "results.json", "a")


def test_an_unfinished_run_is_listed_and_files_of_others_are_not(tmp_path):
    write_run(tmp_path / "good")
    killed = write_run(tmp_path / "killed")
    (killed / "results.json").unlink()
    (killed / "part-0.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"torn')
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text('{"name": "an app"}')
    board = make_scoreboard([tmp_path])
    assert board.problems == [f"{tmp_path.name}/killed is not finished: 2 samples; the same command continues it"]


def test_a_run_that_two_folders_have_is_shown_once(tmp_path):
    write_run(tmp_path / "runs" / "a")
    table, = make_scoreboard([tmp_path, tmp_path / "runs", tmp_path / "runs" / "a"]).comparisons
    assert len(table.runs) == 1


def test_a_run_of_lm_eval_has_a_row(tmp_path):
    record = {"task": "arith", "results": {"arith": {"alias": "arith", "acc,none": 0.5, "acc_stderr,none": 0.1,
                                                     "perplexity,none": 12.0, "perplexity_stderr,none": "N/A"}},
              "groups": {}, "task_versions": {"arith": 1},
              "manifest": {"task": "arith", "source": None, "model": "qwen3", "weights": None, "tasks": 4,
                           "data": {"sha256": "d" * 64}, "generation": {}, "num_fewshot": None,
                           "dtype": "torch.float32", "apply_chat_template": False, "likelihood_samples": 128,
                           "versions": {"dllm": "0.1.0", "lm_eval": "0.4.13"}}}
    (tmp_path / "results.json").write_text(json.dumps(record))
    board = make_scoreboard([tmp_path])
    assert "| qwen3 | 0.5 [0.304, 0.696] | 12 |  |  | lm-eval, 128 likelihood samples |" in to_markdown(board)
    assert "<svg" not in to_page(board)


@pytest.mark.slow
def test_the_command_tables_what_eval_wrote(model_folder, tmp_path, capsys):
    rows = [{"task_id": f"HumanEval/{i}", "prompt": "def f():\n", "entry_point": "f",
             "canonical_solution": "    pass\n", "test": "def check(candidate):\n    assert candidate() is None\n"}
            for i in range(2)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_samples(DiffusionLM.from_pretrained(model_folder), load_tokenizer(model_folder),
                     read_tasks("humaneval", str(tmp_path / "tasks.jsonl")), tmp_path / "runs" / "one",
                     RunSettings(samples=2, generation={"max_new_tokens": 4, "steps": 2}), model_folder, workers=1)
    assert cli.main(["scoreboard", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    assert "| 1 | runs/one | tiny (" in text and (tmp_path / "runs" / "scoreboard.md").read_text() == text
    assert cli.main(["scoreboard", str(tmp_path / "runs"), "--output-dir", str(tmp_path / "new" / "folder")]) == 0
    assert capsys.readouterr().out == text and (tmp_path / "new" / "folder" / "scoreboard.html").is_file()
    assert cli.main(["scoreboard", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["scoreboard"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 420, 1280])
def test_nothing_is_wider_than_the_screen(width, chromium, tmp_path):
    write_run(tmp_path / f"long{'x' * 100}", repeat=82, samples=10)
    page = tmp_path / "page.html"
    script = "<script>document.title = document.documentElement.scrollWidth - innerWidth</script></body>"
    page.write_text(to_page(make_scoreboard([tmp_path])).replace("</body>", script))
    done: subprocess.CompletedProcess = chromium(page, "--dump-dom", f"--window-size={width},900")
    assert int(re.search(r"<title>(-?\d+)</title>", done.stdout)[1]) <= 0
