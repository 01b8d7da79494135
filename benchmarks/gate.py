"""python benchmarks/gate.py RESULTS.json: fail where a speed ratio or a counter is not what a benchmark promises.

A ratio may be 15% below its promise before it fails: machines are noisy. Counters must be equal. Milliseconds are
printed, never judged.
"""

import json
import sys

SLACK = 0.85


def judge(info: dict) -> list[str]:
    """What is wrong with one benchmark's extra_info."""
    wrong = []
    if info["at_least"] is not None and info["ratio"] < SLACK * info["at_least"]:
        wrong.append(f"ratio {info['ratio']:.2f} is under {SLACK} x {info['at_least']:g}")
    wrong += [f"{name} is {measured}, not {promised}" for name, (measured, promised) in info["exactly"].items()
              if measured != promised]
    return wrong


def main(path: str) -> int:
    with open(path) as file:
        results = json.load(file)
    machine = results["machine_info"]
    runs = [(bench["fullname"].removeprefix("benchmarks/"), bench["extra_info"]) for bench in results["benchmarks"]]
    torch_versions = sorted({info["torch"] for _, info in runs if "torch" in info})
    print(f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['cpu'].get('count', '?')} cores, "
          f"Python {machine['python_version']}, torch {', '.join(torch_versions)}")
    print(f"{results.get('command', '')}\n")
    width = max((len(name) for name, _ in runs), default=0)
    print(f"{'benchmark':<{width}} {'ours ms':>10} {'baseline ms':>12} {'ratio':>7} {'promised':>9}  also")
    failures = []
    for name, info in runs:
        if "ratio" not in info:
            continue
        known = {"ratio", "at_least", "ours_ms", "baseline_ms", "rounds", "threads", "exactly", "torch",
                 "baseline_seconds"}
        also = {"threads": info["threads"]} | {key: value for key, value in info.items() if key not in known}
        also |= {key: measured for key, (measured, _) in info["exactly"].items()}
        promised = "-" if info["at_least"] is None else f"{info['at_least']:g}"
        print(f"{name:<{width}} {info['ours_ms']:>10.3f} {info['baseline_ms']:>12.3f} {info['ratio']:>7.2f} "
              f"{promised:>9}  " + ", ".join(f"{key} {value}" for key, value in also.items()))
        failures += [f"{name}: {problem}" for problem in judge(info)]
    if not any("ratio" in info for _, info in runs):
        failures.append(f"{path} holds no paired benchmark")
    print("\n" + ("\n".join(f"FAILED {failure}" for failure in failures) or "every promise holds"))
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[0])
    sys.exit(main(sys.argv[1]))
