"""The search for faster tiles: with processes that crash or hang in place of its own, and once in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tune
from benchmarks.records import append, read
from dllm_kernels import tuned

ROOT = Path(__file__).parents[1]
IN_USE = {"ROWS": 64, "num_warps": 4}
FIRST, SECOND, THIRD = ({"ROWS": 128, "num_warps": 4}, {"ROWS": 256, "num_warps": 4}, {"ROWS": 64, "num_warps": 8})
# Follows a script instead of timing: for each candidate without a result a line to append, or how the process ends.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from benchmarks.records import append, read
records, script, _, kernel = sys.argv[1:]
with open(records + ".started", "a") as file:
    file.write(kernel + "\\n")
done = [(line["kernel"], line["settings"]) for line in read(Path(records))]
for settings, line in json.loads(script)[kernel]:
    if (kernel, settings) not in done:
        if line == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if line == "hang":
            time.sleep(60)
        if line == "raise":
            sys.exit("out of memory")
        append(records, line)
"""


def kernel(name: str) -> tune.Kernel:
    return tune.Kernel("attention", (2, 64), name, {(2, 64): {name: IN_USE}}, lambda: None)


def result(name: str, settings: dict, **found) -> dict:
    return {"kernel": kernel(name).label, "machine": "a GPU", "in_use": IN_USE, "settings": settings, **found}


@pytest.fixture
def time_apart(tmp_path, monkeypatch):
    """`tune.time_apart` of kernels whose processes follow a script: name -> for each candidate seconds, or a word of
    STAND_IN. Returns the problems, and what is recorded: name, settings, and seconds or the failure."""
    monkeypatch.setattr(tune, "machine", lambda: "a GPU")
    records = tmp_path / "records"

    def run(**script):
        steps = {kernel(name).label: [
            (settings, result(name, settings, seconds=end, seconds_in_use=2.0) if isinstance(end, float) else end)
            for settings, end in zip((FIRST, SECOND, THIRD), ends, strict=True)] for name, ends in script.items()}
        command = [sys.executable, "-c", STAND_IN, str(records), json.dumps(steps)]
        problems = [tune.time_apart(kernel(name), records, 3, command) for name in script]
        return problems, [(line["kernel"].split()[-1], line["settings"], line.get("failed") or line["seconds"])
                          for line in read(records)]

    run.records, run.started = records, tmp_path / "records.started"
    return run


def test_a_crash_costs_one_candidate_and_no_other_kernel(time_apart):
    problems, found = time_apart(forward=(1.0, 2.5, 3.0), few=(1.5, "crash", 1.0), key_gradient=("crash", 1.0, "crash"))
    assert problems == [None, None, None] and found == [
        ("forward", FIRST, 1.0), ("forward", SECOND, 2.5), ("forward", THIRD, 3.0),
        ("few", FIRST, 1.5), ("few", SECOND, "ended by SIGKILL"), ("few", THIRD, 1.0),
        ("key_gradient", FIRST, "ended by SIGKILL"), ("key_gradient", SECOND, 1.0),
        ("key_gradient", THIRD, "ended by SIGKILL")]


@pytest.mark.slow
def test_what_hangs_is_ended_and_the_next_process_goes_on(time_apart, monkeypatch):
    monkeypatch.setattr(tune, "TIMING", 1)
    problems, found = time_apart(forward=(1.0, "hang", 3.0))
    assert problems == [None] and found == [
        ("forward", FIRST, 1.0), ("forward", SECOND, "not finished in 2 s"), ("forward", THIRD, 3.0)]
    # One that was ended while it made progress, one that makes none, and one for the last.
    assert time_apart.started.read_text().count("forward") == 3


def test_a_second_run_continues_and_measures_nothing_twice(time_apart):
    append(time_apart.records, result("forward", FIRST, seconds=1.25, seconds_in_use=2.0))
    with open(time_apart.records, "a") as file:
        file.write('{"kernel": "cut o')
    script = {"forward": (1.0, 2.5, 3.0), "few": (1.5, 1.0, 1.0)}
    found = time_apart(**script)[1]
    assert found[:3] == [("forward", FIRST, 1.25), ("forward", SECOND, 2.5), ("forward", THIRD, 3.0)]
    assert time_apart(**script)[1] == found and len(found) == 6
    assert time_apart.started.read_text().split("\n")[:-1] == [kernel("forward").label, kernel("few").label]


def test_a_kernel_that_cannot_be_timed_at_all_is_named_and_tried_again_the_next_time(time_apart):
    assert time_apart(forward=("raise", 1.0, 1.0), few=(1.0, 1.0, 1.0))[0] == ["out of memory", None]
    assert [name for name, *_ in time_apart(forward=(1.5, 1.0, 1.0))[1]] == 3 * ["few"] + 3 * ["forward"]


def test_the_choice_is_the_fastest_of_the_records_of_this_machine_and_these_tiles(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "machine", lambda: "a GPU")
    monkeypatch.setattr(tuned, "architecture", lambda: "sm_90")
    for line in (result("forward", FIRST, seconds=1.6, seconds_in_use=2.0), result("forward", SECOND, failed="spills"),
                 result("forward", THIRD, seconds=1.9, seconds_in_use=2.6),
                 result("forward", SECOND, seconds=0.1, seconds_in_use=2.0) | {"machine": "another"},
                 result("few", FIRST, seconds=0.1, seconds_in_use=2.0) | {"in_use": {"ROWS": 16}},
                 result("few", SECOND, seconds=1.97, seconds_in_use=2.0)):
        append(tmp_path / "records", line)
    before = {("sm_90", "attention", (2, 64), "forward"): ({"ROWS": 64}, "x1.1"),
              ("sm_80", "topk_unmask", 2, "few"): ({"ROWS": 64}, "another GPU")}
    after = tune.improved(before, [kernel("forward"), kernel("few")], tmp_path / "records")
    assert after == before | {("sm_90", "attention", (2, 64), "forward"): (
        {"ROWS": 64, "num_warps": 8}, "a GPU, x1.37")}
    assert "attention (2, 64) forward: {'num_warps': 8}, 1.37 times as fast" in capsys.readouterr().out


def test_the_table_is_rewritten_and_read(tmp_path):
    path = tmp_path / "tuned.py"
    path.write_text(Path(tuned.__file__).read_text())
    found = {("sm_90", "attention", (2, 64), "forward"): ({"ROWS": 64}, "a GPU, x1.20")}
    for table in (found, {}, found | {("sm_80", "topk_unmask", 2, "few"): ({"num_warps": 4}, "another")}):
        tune.rewrite(path, table)
        names = {}
        exec(path.read_text(), names)
        assert names["TILES"] == table
    settings = {"forward": {"ROWS": 128, "num_warps": 8}, "few": {"ROWS": 1}}
    tiles = {(2, 64): dict(settings), (2, 32): dict(settings)}
    names["architecture"] = lambda: "sm_90"
    assert names["apply"]("attention", tiles)[2, 64] == {"forward": {"ROWS": 64, "num_warps": 8}, "few": {"ROWS": 1}}
    assert tiles[2, 32] == settings


def tune_in_the_interpreter(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", "--output-dir", str(folder / "out"), "--limit", "1", "--table",
         str(folder / "tuned.py"), *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "BENCH_DEVICE": "cpu", "BENCH_SMALL": "1", "TRITON_INTERPRET": "1"})


@pytest.mark.slow
def test_a_whole_run_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "tuned.py").write_text(Path(tuned.__file__).read_text())
    done = tune_in_the_interpreter(tmp_path, "topk_unmask")
    line, = read(tmp_path / "out" / "tune.records.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert line["kernel"] == "topk_unmask 2 few" and line["seconds"] > 0 and line["seconds_in_use"] > 0
    assert f"# topk_unmask 2 few {line['settings']}: " in done.stdout


@pytest.mark.parametrize("command, message", [
    (["attention"], "the following arguments are required: --output-dir"),
    (["--output-dir", "x"], "there is no GPU here; BENCH_DEVICE=cpu BENCH_SMALL=1 TRITON_INTERPRET=1 tries")])
def test_a_command_that_cannot_work_says_what_to_do(command, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks.tune", *command])
    monkeypatch.setattr(tuned, "architecture", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        tune.main()
    assert message in capsys.readouterr().err


def test_what_cannot_be_tuned_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks.tune", "sampling", "attention", "--output-dir", "x"])
    monkeypatch.setattr(tuned, "architecture", lambda: "sm_90")
    monkeypatch.setattr(tune.triton_support, "missing", lambda: None)
    monkeypatch.setattr(tune, "kernels", lambda: [kernel("forward")])
    with pytest.raises(SystemExit, match="2"):
        tune.main()
    assert "there are no tiles to tune for sampling" in capsys.readouterr().err
