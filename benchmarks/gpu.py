"""python -m benchmarks.gpu [--device cpu --small] [--group NAME ...]: every check and benchmark of a GPU, in minutes.

What matters most comes first: the machine, its packages and ceilings (copy, matrix product) with a control of a call
against itself, the tests, then the benchmarks in groups, each with seconds of its own; compute-sanitizer comes last.
A finished benchmark is a line of records.jsonl, on the disk before the next one begins, and <gpu>.json is written anew
after each group, so that a run which is cut off keeps what it has measured. The exit status is 1 if a test, the control
or a promise fails. A small run on a CPU tries the command and measures nothing.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gate import judge
from benchmarks.records import read
from dllm.training.cost import peak_flops

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 8.5
SLACK = 30  # seconds after which a group that does not end is ended


class Group(NamedTuple):
    """Benchmarks that run together. seconds: on an H200; afterwards no other benchmark of the group begins. A small run
    has no limit but --minutes."""
    seconds: float
    file: str = ""  # bench_gpu_<file>.py
    names: str = ""  # pytest's -k; empty: all


GROUPS = {
    "tests": Group(60),
    "loss": Group(25, "masked_cross_entropy", "products_alone"),
    "logits": Group(20, "topk_unmask", "against_the_memory"),
    "head": Group(20, "topk_unmask", "bench_head"),
    "attention": Group(45, "attention", "bench_decoding or bench_dense"),
    "step": Group(40, "train_step", "bench_step"),
    "training_attention": Group(60, "attention", "block_diffusion or packed"),
    "sampler": Group(45, "sampler"),
    "other_losses": Group(45, "masked_cross_entropy", "not products_alone"),
    "other_scores": Group(30, "topk_unmask", "not against_the_memory and not bench_head"),
    "caches": Group(20, "attention", "rows_of_a_cache or new_length"),
    "layers": Group(40, "train_step", "bench_layers"),
    "sanitizer": Group(50),
}
PACKAGES = ["torch", "triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "transformers"]
TESTS = ["tests/kernels/test_shipped_tiles.py", "tests/dllm/test_on_gpu.py",
         *(f"tests/kernels/test_{name}_cuda.py" for name in ("attention", "masked_cross_entropy", "topk_unmask"))]


def environment(device: str) -> dict:
    """The machine and its packages. The commit is None, and whether files differ from it, where there is no git."""
    def git(*command: str) -> str | None:
        if shutil.which("git") is None:
            return None
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain")
    found = {"device": "CPU" if device == "cpu" else torch.cuda.get_device_name(), "machine": platform.machine(),
             "python": platform.python_version(), "commit": git("rev-parse", "HEAD") or carried_commit(),
             "changed": None if changed is None else bool(changed),
             "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d")}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                capture_output=True, text=True) if shutil.which("nvidia-smi") else None
        found |= {"capability": f"sm_{properties.major}{properties.minor}", "memory_gib": properties.total_memory >> 30,
                  "processors": properties.multi_processor_count, "cuda": torch.version.cuda,
                  "driver": driver.stdout.strip() if driver and driver.returncode == 0 else None}
    return found


def carried_commit() -> str | None:
    """That of a kit (benchmarks/gpu_kit.py), which has no repository."""
    note = ROOT / "COMMIT"
    return note.read_text().strip() if note.is_file() else None


def seconds_of(call, device: str, calls: int) -> list[float]:
    """Seconds of each call, by CUDA events on a GPU."""
    taken = []
    for _ in range(calls):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return taken


def ceilings(device: str, small: bool) -> dict:
    """Limits of the machine.

    Returns: bytes per second of a copy, read and written; operations per second of a bf16 product, and by the GPU's
    data sheet if known; the ratio of the minima of one copy timed against itself.
    """
    size, n = (1 << 20, 64) if small else (1 << 31, 8192)
    source, to = torch.randint(256, (2, size), dtype=torch.uint8, device=device)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

    def copy():
        to.copy_(source)

    def multiply():
        torch.mm(a, b)

    for call in (copy, multiply):
        seconds_of(call, device, 3)
    turns = [seconds_of(copy, device, 1)[0] for _ in range(40)]
    return {"copy_bytes_per_s": 2 * size / min(turns),
            "product_flop_per_s": 2 * n**3 / min(seconds_of(multiply, device, 20)),
            "data_sheet_flop_per_s": peak_flops(torch.device(device)) if device == "cuda" else None,
            "control_ratio": min(turns[::2]) / min(turns[1::2])}


def run(command: list[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """Exit status, None after `seconds`, and the output. What the command has started ends with it."""
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=max(seconds, 1))
            return process.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        except BaseException:  # Ctrl-C, which reaches this process alone
            os.killpg(process.pid, signal.SIGKILL)
            raise


def tests(small: bool, seconds: float) -> dict:
    """The tests of operations, training and sampling, in as many processes as there are cores, if xdist is there."""
    files = ["tests/kernels/test_dispatch.py"] if small else TESTS
    parallel = ["--numprocesses", "auto"] if find_spec("xdist") and not small else []
    tier = "not slow" if small else "gpu and not slow"
    status, said = run([sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-m", tier,
                        "-p", "no:cacheprovider", *parallel, *files], seconds)
    lines = said.strip().splitlines()
    return {"passed": status == 0, "summary": lines[-1] if status is not None and lines else "not finished in its time",
            "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.M)}


def sanitize(device: str, seconds: float) -> dict[str, str]:
    """Tool of compute-sanitizer -> "clean", its findings, or the reason why it did not run."""
    tool = shutil.which("compute-sanitizer")
    absent = "needs a GPU" if device == "cpu" else None if tool else "compute-sanitizer is not installed"
    found = {}
    for name in ("memcheck", "racecheck"):
        if absent:
            found[name] = absent
            continue
        status, said = run([tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m",
                            "benchmarks.every_cuda_kernel"], seconds / 2)
        errors = [line for line in said.splitlines() if "=========" in line and "SUMMARY" in line]
        found[name] = ("clean" if status == 0 else "not finished in its time" if status is None else
                       errors[-1].strip("= ") if errors else (said.strip().splitlines() or ["failed"])[-1])
    return found


def measure(group: Group, device: str, small: bool, deadline: float, records: Path) -> tuple[list[str], str | None]:
    """Run a group's benchmarks, whose results go to `records`.

    Returns: why some were skipped, and the problem, if any.
    """
    status, said = run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
                        *(["-k", group.names] if group.names else []), f"benchmarks/bench_gpu_{group.file}.py"],
                       deadline + SLACK - time.time(), BENCH_DEVICE=device, BENCH_SMALL=str(int(small)),
                       BENCH_DEADLINE=str(deadline), BENCH_RECORDS=str(records))
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", said, re.M)
    problem = None if status == 0 else "; ".join(failed) or (
        "not finished in its time" if status is None else (said.strip().splitlines() or ["no output"])[-1])
    return re.findall(r"^SKIPPED (.*)", said, re.M), problem


def summarise(bench: dict, limits: dict) -> dict:
    """One benchmark's line: seconds of ours and of the baseline, with all samples."""
    info, samples = dict(bench["extra_info"]), bench["stats"]["data"]
    theirs = info.pop("baseline_seconds")
    floor = max(info.get("must_read_bytes", 0) / limits["copy_bytes_per_s"],
                info.get("must_multiply_flop", 0) / limits["product_flop_per_s"])
    line = {"name": bench["fullname"].split("/")[-1], "ours_s": statistics.median(samples),
            "spread": (max(samples) - min(samples)) / min(samples), "baseline_s": statistics.median(theirs),
            "ratio": info["ratio"], "at_least": info["at_least"],
            "share_of_floor": floor / min(samples) if floor else None}
    for rate, amount in (("tflop_per_s", "must_multiply_flop"), ("tb_per_s", "must_read_bytes")):
        if amount in info:
            line[rate] = info[amount] / min(samples) / 1e12
    wrong = judge(info)
    wanted, peak = info.get("mfu_at_least"), limits["data_sheet_flop_per_s"]
    if wanted is not None and peak is not None:
        line["mfu"] = info["must_multiply_flop"] / min(samples) / peak
        if line["mfu"] < wanted:
            wrong.append(f"{line['mfu']:.0%} of the data sheet's rate, not {wanted:.0%}")
    skip = {"ratio", "at_least", "ours_ms", "baseline_ms", "torch", "gpu"}
    return line | {"wrong": wrong, "extra": {key: value for key, value in info.items() if key not in skip},
                   "samples_s": samples, "baseline_samples_s": theirs}


def rate_of(line: dict) -> str:
    if "tflop_per_s" in line:
        return f"{line['tflop_per_s']:.0f} TFLOP/s"
    return f"{line['tb_per_s']:.2f} TB/s" if "tb_per_s" in line else ""


def print_table(lines: list[dict]) -> None:
    width = max((len(line["name"]) for line in lines), default=0)
    print(f"\n{'benchmark':<{width}} {'ours ms':>9} {'spread':>7} {'rate':>13} {'of floor':>8} {'ratio':>7} "
          f"{'wanted':>7}")
    for line in lines:
        share, wanted = line["share_of_floor"], line["at_least"]
        print(f"{line['name']:<{width}} {1e3 * line['ours_s']:>9.3f} {line['spread']:>7.0%} {rate_of(line):>13} "
              f"{'' if share is None else format(share, '.0%'):>8} {line['ratio']:>7.2f} "
              f"{'-' if wanted is None else format(wanted, '.2f'):>7} {'; '.join(line['wrong']) or 'ok'}")


def write(results: dict, path: Path) -> None:
    """Replaces the file in one move, so that a killed run leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(results, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="small shapes and few tests, to try the command")
    parser.add_argument("--group", action="append", choices=[*GROUPS], help="run this group; several may be named")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of the run; later groups are skipped")
    parser.add_argument("--output-dir", type=Path, help="folder of the files to write (default: benchmarks/results)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --small tries the command without one")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu proves nothing about a GPU and would take hours; add --small")
    if options.device == "cpu" and options.output_dir is None:
        parser.error("--device cpu needs --output-dir DIR: its numbers do not belong among those of GPUs")
    if options.group and options.output_dir is None:
        parser.error("--group needs --output-dir DIR: a part would replace the results of a whole run")
    if options.output_dir and (there := sorted(options.output_dir.glob("*.records.jsonl"))):
        parser.error(f"--output-dir {options.output_dir} holds the results of another run, {there[0].name}; name "
                     "another folder")
    return options


def main() -> int:
    options, start = read_options(), time.time()
    machine = environment(options.device)
    print("\n".join(f"{key}: {'unknown' if value is None else value}" for key, value in machine.items()), flush=True)
    limits = ceilings(options.device, options.small)
    print(f"copy {limits['copy_bytes_per_s'] / 1e12:.3f} TB/s, "
          f"product {limits['product_flop_per_s'] / 1e12:.1f} TFLOP/s, "
          f"a copy against itself {limits['control_ratio']:.3f}", flush=True)
    folder = (options.output_dir or RESULTS).resolve()
    name = re.sub(r"[^a-z0-9]+", "_", machine["device"].lower()).strip("_")
    records = folder / f"{name}.records.jsonl"
    results = {"machine": machine, "limits": limits, "tests": None, "sanitizer": None, "skipped": [], "problems": {},
               "void": options.device == "cuda" and abs(limits["control_ratio"] - 1) > 0.03, "benchmarks": []}
    folder.mkdir(parents=True, exist_ok=True)
    records.unlink(missing_ok=True)
    end = start + 60 * options.minutes
    for group in options.group or GROUPS:
        if (left := end - time.time()) <= 0:
            results["skipped"].append(f"{group}: out of time")
            continue
        take(group, results, options, left if options.small else min(GROUPS[group].seconds, left), records)
        write(results | {"seconds": time.time() - start}, folder / f"{name}.json")
    print_table(results["benchmarks"])
    print("".join(f"\nskipped {reason}" for reason in results["skipped"]))
    wrong = what_is_wrong(results)
    print(f"\n{folder / name}.json written after {time.time() - start:.0f} s\n"
          + ("\n".join(f"FAILED {one}" for one in wrong) or "every promise holds"))
    return 1 if wrong else 0


def take(name: str, results: dict, options: argparse.Namespace, seconds: float, records: Path) -> None:
    """Run a group, and put what it found into the results."""
    if name == "tests":
        results["tests"] = found = tests(options.small, seconds)
        print(f"tests: {found['summary']}", *found["failed"], sep="\n  ", flush=True)
    elif name == "sanitizer":
        results["sanitizer"] = found = sanitize(options.device, seconds)
        print("compute-sanitizer: " + ", ".join(f"{tool}: {what}" for tool, what in found.items()), flush=True)
    else:
        skipped, problem = measure(GROUPS[name], options.device, options.small, time.time() + seconds, records)
        results["skipped"] += skipped
        if problem:
            results["problems"][name] = problem
        results["benchmarks"] = [summarise(bench, results["limits"]) for bench in read(records)]
        print(f"{name}: {problem or 'done'}, {len(results['benchmarks'])} results so far", flush=True)


def what_is_wrong(results: dict) -> list[str]:
    wrong = [f"{line['name']}: {', '.join(line['wrong'])}" for line in results["benchmarks"] if line["wrong"]]
    if results["void"]:
        wrong.append(f"void: a copy against itself is off by {results['limits']['control_ratio'] - 1:+.1%}; run again")
    if results["tests"] and not results["tests"]["passed"]:
        wrong.append(f"tests: {results['tests']['summary']}")
    wrong += [f"{tool}: {what}" for tool, what in (results["sanitizer"] or {}).items() if "ERROR SUMMARY" in what]
    return wrong + [f"{group}: {problem}" for group, problem in results["problems"].items()]


if __name__ == "__main__":
    sys.exit(main())
