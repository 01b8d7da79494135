"""python -m benchmarks.gate RESULTS.json [--again]: fail where a ratio or a counter is not what a benchmark promises.

A ratio may be 15% below its promise before it fails, because machines are noisy; on a GPU 3%. --again measures a
benchmark that fails once more, in a process of its own, and judges by that. Counters must be equal. Milliseconds are
printed, never judged.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SLACK = 0.85
SLACK_ON_GPU = 0.97
COLUMNS = {"ratio", "at_least", "ours_ms", "baseline_ms", "baseline_seconds", "rounds", "exactly", "torch"}


class Run(NamedTuple):
    """A JSON file of pytest-benchmark."""
    machine: str  # in words
    vendor: str  # of the CPU: amd, intel, or the architecture
    commit: str | None  # None if unknown, or if files differed from it
    date: str
    command: str
    benchmarks: dict[str, dict]  # file::name[parameters] -> extra_info of a paired benchmark


def read_run(path: str | Path) -> Run:
    results = json.loads(Path(path).read_text())
    benchmarks = {bench["fullname"].removeprefix("benchmarks/"): bench["extra_info"]
                  for bench in results["benchmarks"] if "ratio" in bench["extra_info"]}
    machine, commit = results["machine_info"], results.get("commit_info", {})
    cpu, versions = machine["cpu"], sorted({info["torch"] for info in benchmarks.values()})
    words = [cpu.get("brand_raw", machine["machine"])]
    if "family" in cpu and "model" in cpu:
        words[0] += f" (family {cpu['family']}, model {cpu['model']})"
    words += [name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in cpu.get("flags", [])][:1]
    words += [f"{cpu.get('count', '?')} cores", f"Python {machine['python_version']}", f"torch {', '.join(versions)}"]
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(cpu.get("vendor_id_raw"), machine["machine"])
    known = len(commit.get("id", "")) == 40 and not commit.get("dirty")
    return Run(", ".join(words), vendor, commit["id"] if known else None, results.get("datetime", "")[:10],
               results.get("command", ""), benchmarks)


def judge(info: dict) -> list[str]:
    """What is wrong with one benchmark's extra_info."""
    wrong, slack = [], SLACK_ON_GPU if "gpu" in info else SLACK
    if info["at_least"] is not None and info["ratio"] < slack * info["at_least"]:
        wrong.append(f"ratio {info['ratio']:.2f} is under {slack} x {info['at_least']:g}")
    wrong += [f"{name} is {measured}, not {promised}" for name, (measured, promised) in info["exactly"].items()
              if measured != promised]
    return wrong


def fails(info: dict) -> bool:
    return "ratio" in info and bool(judge(info))


def measure_again(path: Path) -> None:
    """Measure what fails once more; the new result takes the old one's place, which it keeps as `first_ratio`."""
    results = json.loads(path.read_text())
    first = {bench["fullname"]: bench["extra_info"]["ratio"] for bench in results["benchmarks"]
             if fails(bench["extra_info"])}
    if not first:
        return
    print(f"measuring again: {', '.join(name.removeprefix('benchmarks/') for name in first)}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again.json"
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--benchmark-json={again}", *first], check=True)
        measured = {bench["fullname"]: bench for bench in json.loads(again.read_text())["benchmarks"]}
    for name, bench in measured.items():
        bench["extra_info"]["first_ratio"] = round(first[name], 3)
    results["benchmarks"] = [measured.get(bench["fullname"], bench) for bench in results["benchmarks"]]
    path.write_text(json.dumps(results, indent=4))


def main(path: str, again: bool = False) -> int:
    if again:
        measure_again(Path(path))
    run = read_run(path)
    print(f"{run.machine}\n{run.command}\n")
    width = max(map(len, run.benchmarks), default=0)
    print(f"{'benchmark':<{width}} {'ours ms':>10} {'baseline ms':>12} {'ratio':>7} {'promised':>9}  also")
    failures = []
    for name, info in run.benchmarks.items():
        also = {key: value for key, value in info.items() if key not in COLUMNS}
        also |= {key: measured for key, (measured, _) in info["exactly"].items()}
        promised = "-" if info["at_least"] is None else f"{info['at_least']:g}"
        print(f"{name:<{width}} {info['ours_ms']:>10.3f} {info['baseline_ms']:>12.3f} {info['ratio']:>7.2f} "
              f"{promised:>9}  " + ", ".join(f"{key} {value}" for key, value in also.items()))
        failures += [f"{name}: {problem}" for problem in judge(info)]
    if not run.benchmarks:
        failures.append(f"{path} holds no paired benchmark")
    print("\n" + ("\n".join(f"FAILED {failure}" for failure in failures) or "every promise holds"))
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["--again"]):
        sys.exit(__doc__.splitlines()[0])
    sys.exit(main(sys.argv[1], again=len(sys.argv) == 3))
