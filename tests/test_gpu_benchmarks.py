"""The command that measures on a GPU, tried on a CPU; what it writes, and what the page makes of it."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_kit, predict, publish
from benchmarks.records import read
from dllm.errors import UserError

ROOT = Path(__file__).parents[1]


def run(*command, **variables):
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **variables})


SMALL = ["benchmarks.gpu", "--device", "cpu", "--small", "--minutes", "60", "--output-dir"]


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "new"
    done = run(*SMALL, str(folder), "--group", "head", "--group", "loss")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "cpu.json").read_text()), folder


@pytest.mark.slow
def test_a_run_reports_its_machine_its_limits_and_every_benchmark(tried):
    said, results, folder = tried
    assert results["machine"]["device"] == "CPU" and len(results["machine"]["commit"] or 40 * "0") == 40
    assert results["limits"]["copy_bytes_per_s"] > 1e6 and results["limits"]["product_flop_per_s"] > 1e6
    assert {line["name"].split("::")[1] for line in results["benchmarks"]} == {
        *(f"bench_head_against_product_then_logits[{size}-{case}]" for size in ("16-0.75", "32-0.9")
          for case in ("16-0.0", "16-0.7", "32-0.0")),
        "bench_head_of_counted_positions[16]", "bench_head_of_counted_positions[32]",
        *(f"bench_against_the_products_alone[{shape}-{known}counted]" for shape in ("0.5B", "7B")
          for known in ("", "not ")),
        *(f"bench_head_of_one_block[{D}-{temperature}]" for D in (16, 32) for temperature in (0.0, 0.7))}
    for line in results["benchmarks"]:
        assert len(line["samples_s"]) == len(line["baseline_samples_s"]) == 2 and line["ours_s"] > 0
        assert line["name"] in said and line["at_least"] is None and not line["wrong"]
    assert said.index("head: done, 12 results so far") < said.index("loss: done, 16 results so far")
    assert "every promise holds" in said
    assert {file.name for file in folder.iterdir()} == {"cpu.json", "cpu.records.jsonl"}


def test_a_small_run_has_no_limit_but_that_of_the_whole_run(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "take", lambda name, results, options, seconds, records: given.append(seconds))
    monkeypatch.setattr("sys.argv", [*SMALL, str(tmp_path), "--group", "logits"])
    assert gpu.main() == 0 and given[0] > max(group.seconds for group in gpu.GROUPS.values())


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_has_measured(tmp_path):
    records = tmp_path / "cpu.records.jsonl"
    command = [sys.executable, "-m", *SMALL, str(tmp_path), "--group", "head"]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                          start_new_session=True) as process:
        while len(read(records)) < 3 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    cut = tmp_path / "cut"  # a group's process may write on for a moment
    cut.write_text("\n".join([*records.read_text().splitlines()[:3], '{"fullname": "cut o']))
    found = read(cut)
    assert len(found) == 3 and all("bench_head" in bench["fullname"] for bench in found)
    assert all(gpu.summarise(bench, LIMITS)["ours_s"] > 0 for bench in found)


def test_a_machine_without_git_or_a_repository_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert (gpu.environment("cpu")["commit"], gpu.environment("cpu")["changed"]) == (None, None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert (gpu.environment("cpu")["commit"], gpu.environment("cpu")["changed"]) == (None, None)


@pytest.mark.slow
@pytest.mark.skipif(gpu.environment("cpu")["commit"] is None, reason="there is no git repository here")
def test_a_kit_runs_without_a_repository_and_knows_its_commit(tmp_path, monkeypatch, capsys):
    built = []
    monkeypatch.setattr(gpu_kit, "build_extension", lambda library, folder, names: built.append((library.name, names)))
    monkeypatch.setattr(gpu_kit, "download", lambda folder, python: folder.mkdir())
    monkeypatch.setattr(gpu_kit.shutil, "which", lambda tool: tool)
    if gpu.environment("cpu")["changed"]:
        original = gpu_kit.git
        monkeypatch.setattr(gpu_kit, "git", lambda *words: "" if words[0] == "status" else original(*words))
    kit = tmp_path / "kit"
    assert gpu_kit.make(kit, "90", "3.12") == 0 and built == [("_native.so", ["sm_90a"])]
    assert {path.name for path in kit.iterdir()} == {"dllm", "run.sh", "wheels"}
    assert f"{kit}: " in capsys.readouterr().out and not (kit / "dllm" / ".git").exists()
    subprocess.run(["bash", "-n", kit / "run.sh"], check=True)
    (kit / "wheels" / "one.whl").touch()
    python, library = tmp_path / "bin" / "python3", kit / "dllm" / "dllm_kernels" / "_native.so"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho $PYTHONPATH: $@\n")
    python.chmod(0o755)
    library.touch()
    os.utime(library, (0, 0))
    said = subprocess.run(["bash", kit / "run.sh", "--minutes", "3"], capture_output=True, text=True, check=True,
                          env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}).stdout
    assert f"{kit}/packages: -m benchmarks.gpu --output-dir {kit}/results --minutes 3" in said
    assert f"--target {kit}/packages {kit}/wheels/one.whl" in said and library.stat().st_mtime > 1e9
    done = subprocess.run([sys.executable, "-m", *SMALL, str(tmp_path / "out"), "--group", "logits"], cwd=kit / "dllm",
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    machine = json.loads((tmp_path / "out" / "cpu.json").read_text())["machine"]
    assert machine["commit"] == gpu.environment("cpu")["commit"] and machine["changed"] is None


def test_a_kit_says_what_keeps_it_from_being_made(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kit.shutil, "which", lambda tool: None if tool == "nvcc" else tool)
    with pytest.raises(UserError, match="made with nvcc, which is not installed"):
        gpu_kit.make(tmp_path / "kit", "90", "3.12")
    monkeypatch.setattr(gpu_kit.shutil, "which", lambda tool: tool)
    with pytest.raises(UserError, match="is there already; name a new folder"):
        gpu_kit.make(tmp_path, "90", "3.12")
    monkeypatch.setattr(gpu_kit, "git", lambda *words: " M README.md")
    with pytest.raises(UserError, match="commit first: README.md differs from HEAD"):
        gpu_kit.make(tmp_path / "kit", "90", "3.12")


def bench(ratio=1.0, at_least=None, exactly=None, **extra):
    info = {"ratio": ratio, "at_least": at_least, "exactly": exactly or {}, "baseline_seconds": [2e-3, 4e-3], **extra}
    return {"fullname": "benchmarks/bench_gpu_x.py::bench_y", "extra_info": info, "stats": {"data": [1e-3, 3e-3, 2e-3]}}


LIMITS = {"copy_bytes_per_s": 4e12, "product_flop_per_s": 8e14, "data_sheet_flop_per_s": 1e15}


def test_the_floor_is_the_larger_of_bytes_and_operations():
    line = gpu.summarise(bench(must_read_bytes=2e9, must_multiply_flop=1e11), LIMITS)
    assert line["share_of_floor"] == pytest.approx(0.5) and line["tb_per_s"] == pytest.approx(2.0)
    assert (line["ours_s"], line["baseline_s"], line["spread"]) == (2e-3, 3e-3, pytest.approx(2.0))
    assert gpu.summarise(bench(must_multiply_flop=6e11), LIMITS)["share_of_floor"] == pytest.approx(0.75)


@pytest.mark.parametrize("given, wrong", [
    (bench(0.8, 1.0), "ratio 0.80 is under 0.85 x 1"), (bench(0.9, 1.0), None),
    (bench(0.96, 1.0, gpu="NVIDIA H200"), "ratio 0.96 is under 0.97 x 1"), (bench(0.98, 1.0, gpu="NVIDIA H200"), None),
    (bench(exactly={"launches": (6, 5)}), "launches is 6, not 5"),
    (bench(must_multiply_flop=2e11, mfu_at_least=0.45), "20% of the data sheet's rate, not 45%")])
def test_what_misses_its_promise_says_so(given, wrong):
    assert gpu.summarise(given, LIMITS)["wrong"] == ([wrong] if wrong else [])


@pytest.mark.parametrize("command, message", [
    (["--device", "cpu"], "--device cpu proves nothing about a GPU and would take hours; add --small"),
    (["--device", "cpu", "--small"], "--device cpu needs --output-dir DIR"),
    (["--device", "cpu", "--small", "--output-dir", "full"], "--output-dir full holds the results of another run"),
    ([], "there is no GPU here; --device cpu --small tries the command without one")])
def test_a_command_that_cannot_work_says_what_to_do(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/cpu.records.jsonl").touch()
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", *command])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert message in capsys.readouterr().err


def test_what_takes_too_long_is_stopped_and_named(tmp_path):
    code = "print('begun', flush=True); import time; time.sleep(60)"
    assert gpu.run([sys.executable, "-c", code], 1) == (None, "begun\n")
    started = "import subprocess, sys; subprocess.run([sys.executable, '-c', \"" + code.replace("'", "\\'") + "\"])"
    begun = time.monotonic()
    assert gpu.run([sys.executable, "-c", started], 2)[0] is None and time.monotonic() - begun < 20
    begun = tmp_path / "begun"
    program = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # who starts may ignore it
               f"from benchmarks import gpu; gpu.run(['bash', '-c', 'touch {begun}; exec sleep 60'], 60)")
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not begun.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]


@pytest.mark.slow
def test_a_section_names_machine_rates_and_what_was_missed(tried):
    assert publish.sections([], []).endswith("On a GPU: **not measured yet**.")
    results = tried[1]
    results["benchmarks"][0] |= {"at_least": 2.0, "wrong": ["too slow"]}
    results["machine"] |= {"commit": 40 * "a", "triton": "3.6.0"}
    section = publish.sections([], [results])
    assert "On CPU, torch" in section and "triton 3.6.0" in section and "at aaaaaaaaaaaa on" in section
    assert "| 2.00 **missed** |" in section and section.count("**missed**") == 1
    assert "The run is void" in publish.sections([], [results | {"void": True}])
    results["machine"]["commit"] = None
    assert "at an unknown commit on" in publish.sections([], [results])


def test_predictions_stand_beside_what_an_h200_measured():
    name = "bench_gpu_attention.py::bench_dense[triton-cudnn-7B-forward]"
    for device, cell in (("NVIDIA H200", "5.1 ms"), ("NVIDIA A100", publish.NOT_YET)):
        section = publish.of_machine_code([{"machine": {"device": device},
                                            "benchmarks": [{"name": name, "ours_s": 5.1e-3}]}])
        line, = (line for line in section.splitlines() if line.startswith("| dense, heads of 7B, forward |"))
        assert line.endswith(f" | {cell} |") and section.count("5.1 ms") == (cell == "5.1 ms")


@pytest.mark.slow
def test_every_benchmark_on_a_gpu_has_shapes_for_a_cpu_and_is_in_one_group():
    """Collected small on a CPU, so that a slip shows before a GPU is there."""
    files = {path.stem.removeprefix("bench_gpu_"): str(path) for path in (ROOT / "benchmarks").glob("bench_gpu_*.py")}
    done = run("pytest", "--collect-only", "-q", *files.values(), BENCH_DEVICE="cpu", BENCH_SMALL="1")
    assert done.returncode == 0 and len(files) == 5, done.stdout
    groups = [group for group in gpu.GROUPS.values() if group.file]

    def takes(group: gpu.Group, file: str, name: str) -> bool:
        """As pytest's -k decides."""
        words = re.sub(r"\b(?!and\b|or\b|not\b)\w+", lambda word: str(word[0] in name), group.names)
        return file == group.file and eval(words or "True")

    predicted = {names[-1] for names in (*predict.row_passes(), *predict.attention_tasks())} - {""}
    sizes = {str(predict.SCORED_ROWS): "16", "[896-": "[16-", "[3584-": "[32-"}  # and on a CPU
    small = {functools.reduce(lambda name, size: name.replace(size, sizes[size]), sizes, name) for name in predicted}
    assert small <= set(re.findall(r"bench_gpu_\S+", done.stdout))
    found = set(re.findall(r"bench_gpu_(\w+)\.py::(\w+)", done.stdout))
    assert {group.file for group in groups} == {file for file, _ in found} == files.keys()
    for file, name in found:
        assert sum(takes(group, file, name) for group in groups) == 1, name
