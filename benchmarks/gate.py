"""python -m benchmarks.gate RESULTS.json: fail where a speed ratio or a counter is not what a benchmark promises.

A ratio may be 15% below its promise before it fails, because machines are noisy. Counters must be equal. Milliseconds
are printed, never judged.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

SLACK = 0.85
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
    wrong = []
    if info["at_least"] is not None and info["ratio"] < SLACK * info["at_least"]:
        wrong.append(f"ratio {info['ratio']:.2f} is under {SLACK} x {info['at_least']:g}")
    wrong += [f"{name} is {measured}, not {promised}" for name, (measured, promised) in info["exactly"].items()
              if measured != promised]
    return wrong


def main(path: str) -> int:
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
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[0])
    sys.exit(main(sys.argv[1]))
