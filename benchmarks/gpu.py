"""python -m benchmarks.gpu [--device cpu --small]: every check and benchmark of a GPU, in under nine minutes.

In this order: the machine and its packages; the ceilings (copy, matrix product) and a control of a call against itself;
the tests of the operations, of training and of sampling; compute-sanitizer on a small call of every CUDA C++ kernel,
where it is installed; the benchmarks. Prints a table and writes benchmarks/results/<gpu>.json. The exit status is 1 if
a test, the control or a promise fails. A small run on a CPU tries the command and measures nothing.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gate import judge
from dllm.training.cost import peak_flops

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 8.5 * 60
SHARES = {"tests": 0.35, "sanitizer": 0.1}  # at most, of the seconds
PACKAGES = ["torch", "triton", "liger-kernel", "cut-cross-entropy", "flash-attn", "transformers"]
OPERATIONS = ["attention", "masked_cross_entropy", "topk_unmask"]
TESTS = [f"tests/kernels/test_{name}{part}.py" for name in OPERATIONS for part in ("", "_cuda", "_triton")]
TESTS.append("tests/dllm/test_on_gpu.py")


def environment(device: str) -> dict:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    found = {"device": "CPU" if device == "cpu" else torch.cuda.get_device_name(), "machine": platform.machine(),
             "python": platform.python_version(), "commit": git("rev-parse", "HEAD") or None,
             "changed": bool(git("status", "--porcelain")),
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
    """Exit status, None after `seconds`, and the output."""
    try:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, timeout=max(seconds, 1), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace")


def tests(small: bool, seconds: float) -> dict:
    files = ["tests/kernels/test_dispatch.py"] if small else TESTS
    status, said = run([sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-k", "not emulated", "-p",
                        "no:cacheprovider", *files], seconds)
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


def benchmarks(device: str, small: bool, deadline: float, only: str | None) -> tuple[list[dict], list[str], str | None]:
    """The results, the reasons why others were skipped, and the problem, if any."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("bench_gpu_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmarks.json")
        status, said = run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
                            f"--benchmark-json={path}", *(["-k", only] if only else []), *files],
                           deadline + 60 - time.time(), BENCH_DEVICE=device, BENCH_SMALL=str(int(small)),
                           BENCH_DEADLINE=str(deadline))
        found = json.loads(path.read_text())["benchmarks"] if path.is_file() and path.stat().st_size else []
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", said, re.M)
    problem = None if status == 0 else "; ".join(failed) or (said.strip().splitlines() or ["no output"])[-1]
    return found, re.findall(r"^SKIPPED (.*)", said, re.M), problem


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="small shapes and few tests, to try the command")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of the run; later benchmarks are skipped")
    parser.add_argument("--only", metavar="NAMES", help="pytest's -k for the benchmarks; skips tests and sanitizer")
    parser.add_argument("--results", type=Path, help="the file to write (default: benchmarks/results/<gpu>.json)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --small tries the command without one")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu proves nothing about a GPU and would take hours; add --small")
    if options.device == "cpu" and options.results is None:
        parser.error("--device cpu needs --results FILE: its numbers do not belong among those of GPUs")
    start = time.time()
    machine = environment(options.device)
    print("\n".join(f"{key}: {'absent' if value is None else value}" for key, value in machine.items()), flush=True)
    limits = ceilings(options.device, options.small)
    print(f"copy {limits['copy_bytes_per_s'] / 1e12:.3f} TB/s, "
          f"product {limits['product_flop_per_s'] / 1e12:.1f} TFLOP/s, "
          f"a copy against itself {limits['control_ratio']:.3f}", flush=True)
    void = options.device == "cuda" and abs(limits["control_ratio"] - 1) > 0.03
    checked, sanitized = None, None
    if options.only is None:
        checked = tests(options.small, SHARES["tests"] * options.seconds)
        print(f"tests: {checked['summary']}", *checked["failed"], sep="\n  ", flush=True)
        sanitized = sanitize(options.device, SHARES["sanitizer"] * options.seconds)
        print("compute-sanitizer: " + ", ".join(f"{tool}: {what}" for tool, what in sanitized.items()), flush=True)
    found, skipped, problem = benchmarks(options.device, options.small, start + options.seconds, options.only)
    lines = [summarise(bench, limits) for bench in found if "ratio" in bench["extra_info"]]
    print_table(lines)
    print("".join(f"\nskipped {reason}" for reason in skipped))
    path = options.results or RESULTS / (re.sub(r"[^a-z0-9]+", "_", machine["device"].lower()).strip("_") + ".json")
    write({"machine": machine, "limits": limits, "void": void, "tests": checked, "sanitizer": sanitized,
           "seconds": time.time() - start, "skipped": skipped, "problem": problem, "benchmarks": lines}, path)
    wrong = [f"{line['name']}: {', '.join(line['wrong'])}" for line in lines if line["wrong"]]
    if void:
        wrong.append(f"void: a copy against itself is off by {limits['control_ratio'] - 1:+.1%}; run again")
    if checked and not checked["passed"]:
        wrong.append(f"tests: {checked['summary']}")
    wrong += [f"{tool}: {what}" for tool, what in (sanitized or {}).items() if "ERROR SUMMARY" in what]
    if problem:
        wrong.append(f"benchmarks: {problem}")
    print(f"\n{path} written after {time.time() - start:.0f} s\n"
          + ("\n".join(f"FAILED {one}" for one in wrong) or "every promise holds"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
