"""python -m benchmarks.publish: write the GPU section of README.md from benchmarks/results/*.json.

Between the two marks nothing is written by hand, and a test checks that it is what the files say.
"""

import json
import sys
from pathlib import Path

from benchmarks.gpu import RESULTS, ROOT, rate_of

BEGIN, END = "<!-- benchmarks.publish writes what follows -->", "<!-- up to here -->"
NOTHING = "**Nothing has been measured on a GPU yet.**"


def section(results: list[dict]) -> str:
    """Markdown of the GPU measurements."""
    return "\n\n".join(map(of_machine, results)) if results else NOTHING


def of_machine(run: dict) -> str:
    machine, limits = run["machine"], run["limits"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "cuda") if machine.get(name))
    copy, product = limits["copy_bytes_per_s"] / 1e12, limits["product_flop_per_s"] / 1e12
    lines = [f"On {machine['device']}, {versions}, at {machine['commit'][:12]} on {machine['date']}: {copy:.2f} TB/s, "
             f"bf16 product {product:.0f} TFLOP/s.", ""]
    if run["void"]:
        lines[:0] = ["The run is void: one and the same copy differed by more than 3%.", ""]
    lines += ["| benchmark | ms | rate | of the floor | times as fast | wanted |", "|---|---|---|---|---|---|"]
    for line in run["benchmarks"]:
        share, wanted = line["share_of_floor"], line["at_least"]
        name = line["name"].removeprefix("bench_gpu_").replace(".py::bench_", ": ").replace("_", " ")
        lines.append(f"| {name} | {1e3 * line['ours_s']:.3g} | {rate_of(line)} "
                     f"| {'' if share is None else f'{share:.0%}'} | {line['ratio']:.2f} "
                     f"| {'' if wanted is None else f'{wanted:.2f}'}{' **missed**' if line['wrong'] else ''} |")
    if run["skipped"]:
        lines += ["", "Not run: " + "; ".join(reason.split(": ", 1)[-1] for reason in run["skipped"]) + "."]
    return "\n".join(lines)


def with_section(readme: str, results: list[dict]) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{rest.split(END)[1]}"


def read_results(folder: Path = RESULTS) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main() -> int:
    path = ROOT / "README.md"
    path.write_text(with_section(path.read_text(), read_results()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
