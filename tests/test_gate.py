"""Benchmarks: what the gate fails on, how calls are paired and bounded, how runs are recorded and compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gate, history, publish

ROOT = Path(__file__).parents[1]


def results(path: Path, *infos: dict, vendor: str = "AuthenticAMD", **commit) -> str:
    common = {"ours_ms": 1.0, "baseline_ms": 2.0, "at_least": None, "exactly": {}, "threads": 1, "rounds": 3,
              "torch": "2"}
    path.write_text(json.dumps({
        "machine_info": {"cpu": {"brand_raw": "a cpu", "count": 2, "vendor_id_raw": vendor, "flags": ["avx2"]},
                         "python_version": "3.11", "machine": "x86_64"},
        "commit_info": commit, "datetime": "2026-11-29T03:29:00+00:00",
        "benchmarks": [{"fullname": f"benchmarks/bench_{i}", "extra_info": common | info}
                       for i, info in enumerate(infos)]}))
    return str(path)


@pytest.mark.parametrize("info, problem", [
    ({"ratio": 1.0}, None),
    ({"ratio": 2.56, "at_least": 3.0}, None),  # within the 15%
    ({"ratio": 2.54, "at_least": 3.0}, "ratio 2.54 is under 0.85 x 3"),
    ({"ratio": 9.0, "at_least": 3.0, "exactly": {"forwards": [127, 127]}}, None),
    ({"ratio": 9.0, "at_least": 3.0, "exactly": {"forwards": [128, 127]}}, "forwards is 128, not 127"),
])
def test_what_passes_and_what_fails(info, problem, tmp_path, capsys):
    code = gate.main(results(tmp_path / "r.json", {"ratio": 2.0}, info))
    out = capsys.readouterr().out
    assert code == (0 if problem is None else 1)
    assert f"FAILED bench_1: {problem}" in out if problem else "every promise holds" in out


def test_no_result_is_a_failure(tmp_path, capsys):
    assert gate.main(results(tmp_path / "r.json")) == 1
    assert "holds no paired benchmark" in capsys.readouterr().out


@pytest.mark.parametrize("second, code", [(3.0, 0), (1.2, 1)])
def test_what_fails_is_measured_once_more_and_judged_by_that(second, code, tmp_path, capsys, monkeypatch):
    path = results(tmp_path / "r.json", {"ratio": 5.0, "at_least": 3.0}, {"ratio": 1.0, "at_least": 3.0})

    def run(command, check):
        assert command[-1] == "benchmarks/bench_1" and check
        target = Path(command[-2].removeprefix("--benchmark-json="))
        measured = json.loads(Path(path).read_text())["benchmarks"][1]
        measured["extra_info"]["ratio"] = second
        target.write_text(json.dumps({"benchmarks": [measured]}))

    monkeypatch.setattr(subprocess, "run", run)
    assert gate.main(path, again=True) == code
    assert "measuring again: bench_1" in capsys.readouterr().out
    infos = [bench["extra_info"] for bench in json.loads(Path(path).read_text())["benchmarks"]]
    assert [info["ratio"] for info in infos] == [5.0, second] and infos[1]["first_ratio"] == 1.0
    assert "first_ratio" not in infos[0]


def test_nothing_is_measured_again_where_every_promise_holds(tmp_path, monkeypatch):
    path = results(tmp_path / "r.json", {"ratio": 5.0, "at_least": 3.0})
    monkeypatch.setattr(subprocess, "run", None)
    assert gate.main(path, again=True) == 0


@pytest.mark.alone
def test_paired_calls_both_in_turns_and_leaves_the_ratio_of_the_minima(tmp_path):
    infos = run_benchmarks(tmp_path, (
        "import time\n"
        "def bench_x(paired):\n"
        "    calls = []\n"
        "    def call(name, seconds):\n"
        "        calls.append(name), time.sleep(seconds)\n"
        "        return {'o': 2, 'b': 3}[name]\n"
        "    ratio = paired(ours=lambda: call('o', 0.02), baseline=lambda: call('b', 0.08), rounds=4, at_least=3,\n"
        "                   exactly={'calls': (len(calls), 0)}, size=7, check=lambda o, b: {'sum': o + b})\n"
        "    assert ''.join(calls) == 'ob' + 'boobboob' and 2 < ratio < 8\n"))
    [info] = infos
    assert 2 < info["ratio"] < 8 and info["size"] == 7 and info["threads"] == 1 and info["sum"] == 5
    assert gate.main(str(tmp_path / "r.json")) == 0


def run_benchmarks(tmp_path: Path, source: str) -> list[dict]:
    """The extra_info of each benchmark of the source, in a process of its own."""
    (tmp_path / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text())
    (tmp_path / "bench_x.py").write_text(source)
    flags = ["-q", "-c", "/dev/null", "--rootdir", ".", "-o", "python_functions=bench_*", "--benchmark-json=r.json"]
    done = subprocess.run([sys.executable, "-m", "pytest", *flags, "bench_x.py"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout
    return [bench["extra_info"] for bench in json.loads((tmp_path / "r.json").read_text())["benchmarks"]]


@pytest.mark.slow
def test_rounds_are_as_many_as_fit_in_the_seconds_and_at_least_two(tmp_path):
    infos = run_benchmarks(tmp_path, (
        "import time\n"
        "import pytest\n"
        "@pytest.mark.parametrize('seconds', [30, 0.01, None])\n"
        "def bench_x(paired, seconds):\n"
        "    wait = lambda: time.sleep(0.05)\n"
        "    paired(ours=wait, baseline=wait, rounds=6, seconds=seconds)\n"))
    assert [info["rounds"] for info in infos] == [6, 2, 6]


AMD, INTEL = {"id": 40 * "a"}, {"id": 40 * "b", "vendor": "GenuineIntel"}


def test_a_run_is_recorded_by_date_commit_and_vendor(tmp_path, capsys):
    folder = tmp_path / "history"
    run = results(tmp_path / "r.json", {"ratio": 2.0}, **AMD)
    assert history.main(["record", run], folder) == 0
    assert [path.name for path in folder.iterdir()] == ["2026-11-29-aaaaaaaaaaaa-amd.json"]
    for commit in ({}, {"id": "unknown"}, AMD | {"dirty": True}):
        assert history.main(["record", results(tmp_path / "r.json", {"ratio": 2.0}, **commit)], folder) == 2
        assert "a record belongs to a commit" in capsys.readouterr().err
    assert history.main(["record", str(tmp_path / "none.json")], folder) == 2
    assert "run make bench first" in capsys.readouterr().err


def test_a_record_is_found_by_commit_or_file(tmp_path):
    for name in ("2026-11-28-aaaaaaaaaaaa-amd", "2026-11-29-aaaaaaaaaaaa-amd", "2026-11-29-aaaaaaaaaaaa-intel"):
        (tmp_path / f"{name}.json").write_text("")
    assert history.find_record(40 * "a", "amd", tmp_path).name == "2026-11-29-aaaaaaaaaaaa-amd.json"
    assert history.find_record(12 * "a", "intel", tmp_path).name == "2026-11-29-aaaaaaaaaaaa-intel.json"
    file = str(tmp_path / "2026-11-28-aaaaaaaaaaaa-amd.json")
    assert str(history.find_record(file, "intel", tmp_path)) == file
    with pytest.raises(ValueError, match="no record of 'HEAD'; REF is a file or a commit with one"):
        history.find_record("HEAD", "amd", tmp_path)


def test_a_comparison_shows_each_ratio_and_what_changed(tmp_path):
    before = gate.read_run(results(tmp_path / "a.json", {"ratio": 4.0}, {"ratio": 4.0}, {"ratio": 4.0}, **AMD))
    after = gate.read_run(results(tmp_path / "b.json", {"ratio": 4.4}, {"ratio": 3.3}, {"ratio": 5.0},
                                  {"ratio": 9.0}, **INTEL))
    lines = history.compare(before, after).splitlines()
    assert 40 * "a" in lines[0] and 40 * "b" in lines[1] and "a cpu, AVX2, 2 cores" in lines[1]
    assert [line.split() for line in lines[-4:]] == [
        ["bench_0", "4.00", "4.40", "+10%"], ["bench_1", "4.00", "3.30", "-18%", "worse"],
        ["bench_2", "4.00", "5.00", "+25%", "better"], ["bench_3", "-", "9.00", "new"]]
    counted = [gate.read_run(results(tmp_path / "c.json", {"ratio": 1.0, "exactly": {"launches": [n, n]}}))
               for n in (5, 6)]
    assert history.compare(*counted).endswith("launches 5 -> 6")


def test_the_page_shows_the_newest_run_of_each_vendor(tmp_path):
    run = gate.read_run(results(tmp_path / "r.json", {"ratio": 2.0}, **AMD))
    name = publish.RATIOS[0][2][0]
    section = publish.of_cpu([run._replace(benchmarks={f"bench_{name}": {"ratio": 2.345}})])
    assert "- AMD: a cpu, AVX2, 2 cores" in section and "- Intel: not measured yet" in section
    assert "| 2.35 | not measured yet |" in section and "| - | not measured yet |" in section


def test_the_page_says_what_was_measured():
    page = publish.PAGE.read_text()
    assert publish.with_sections(page, publish.read_history(), publish.read_results()) == page, (
        "python -m benchmarks.publish writes it anew")
