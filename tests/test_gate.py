"""The benchmark gate: it fails on a ratio under its bound, a counter that differs, and on no result at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gate

ROOT = Path(__file__).parents[1]


def results(path: Path, *infos: dict) -> str:
    common = {"ours_ms": 1.0, "baseline_ms": 2.0, "at_least": None, "exactly": {}, "threads": 1, "rounds": 3,
              "torch": "2"}
    path.write_text(json.dumps({
        "machine_info": {"cpu": {"brand_raw": "a cpu", "count": 2}, "python_version": "3.11", "machine": "x86_64"},
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


def test_paired_calls_both_in_turns_and_leaves_the_ratio_of_the_minima(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text())
    (tmp_path / "bench_x.py").write_text(
        "import time\n"
        "def bench_x(paired):\n"
        "    calls = []\n"
        "    def call(name, seconds):\n"
        "        calls.append(name), time.sleep(seconds)\n"
        "    ratio = paired(ours=lambda: call('o', 0.02), baseline=lambda: call('b', 0.08), rounds=4, at_least=3,\n"
        "                   exactly={'calls': (len(calls), 0)}, size=7)\n"
        "    assert ''.join(calls) == 'ob' + 'boobboob' and 2 < ratio < 8\n")
    flags = ["-q", "-c", "/dev/null", "--rootdir", ".", "-o", "python_functions=bench_*", "--benchmark-json=r.json"]
    done = subprocess.run([sys.executable, "-m", "pytest", *flags, "bench_x.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout
    info = json.loads((tmp_path / "r.json").read_text())["benchmarks"][0]["extra_info"]
    assert 2 < info["ratio"] < 8 and info["size"] == 7 and info["threads"] == 1
    assert gate.main(str(tmp_path / "r.json")) == 0
