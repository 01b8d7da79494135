"""python -m benchmarks.history record RESULTS.json | compare REF RESULTS.json: keep runs of `make bench`, and compare.

A record is pytest-benchmark's JSON, unchanged, at benchmarks/history/<date>-<commit>-<CPU vendor>.json; therefore
`pytest-benchmark compare` and its histogram read it too. REF is a record's file, or a commit that has a record.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gate import SLACK, Run, read_run

ROOT = Path(__file__).parents[1]
HISTORY = ROOT / "benchmarks" / "history"


def record(results: Path, folder: Path) -> Path:
    """Copy a run into the history. Raises: ValueError if it belongs to no commit."""
    run = read_run(results)
    if run.commit is None:
        raise ValueError("a record belongs to a commit, and this run's files differed from it; commit, then run again")
    folder.mkdir(exist_ok=True)
    return Path(shutil.copyfile(results, folder / f"{run.date}-{run.commit[:12]}-{run.vendor}.json"))


def find_record(ref: str, vendor: str, folder: Path) -> Path:
    """The record of a file's name or of a commit. Of several, the newest of this CPU vendor is taken."""
    if Path(ref).is_file():
        return Path(ref)
    resolved = subprocess.run(["git", "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"], cwd=ROOT,
                              capture_output=True, text=True).stdout.strip() or ref
    found = [path for path in folder.glob("*.json") if path.stem.rsplit("-", 2)[1] == resolved[:12]]
    if not found:
        names = ", ".join(sorted(path.name for path in folder.glob("*.json"))) or "none"
        raise ValueError(f"no record of {ref!r}; REF is a file or a commit with one in benchmarks/history: {names}")
    return max(found, key=lambda path: (path.stem.endswith(vendor), path.name))


def compare(before: Run, after: Run) -> str:
    """A table of the ratios before and after, and of the counters that changed.

    A ratio is marked where it changed by more than the gate's slack.
    """
    lines = [f"before: {before.commit or 'not committed'} on {before.machine}",
             f"after:  {after.commit or 'not committed'} on {after.machine}", ""]
    width = max(map(len, before.benchmarks | after.benchmarks), default=0)
    lines.append(f"{'benchmark':<{width}} {'before':>8} {'after':>8} {'change':>7}")
    for name in before.benchmarks | after.benchmarks:
        if name not in before.benchmarks or name not in after.benchmarks:
            old, new = ("-" if name not in run.benchmarks else f"{run.benchmarks[name]['ratio']:.2f}"
                        for run in (before, after))
            lines.append(f"{name:<{width}} {old:>8} {new:>8} {'':>7}  {'new' if old == '-' else 'gone'}")
            continue
        old, new = before.benchmarks[name], after.benchmarks[name]
        change = new["ratio"] / old["ratio"]
        notes = ["worse"] if change < SLACK else ["better"] if change > 1 / SLACK else []
        notes += [f"{counter} {old['exactly'][counter][0]} -> {measured}"
                  for counter, (measured, _) in new["exactly"].items()
                  if counter in old["exactly"] and old["exactly"][counter][0] != measured]
        lines.append(f"{name:<{width}} {old['ratio']:>8.2f} {new['ratio']:>8.2f} {change - 1:>+7.0%}  "
                     + ", ".join(notes))
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: list[str], folder: Path = HISTORY) -> int:
    try:
        match arguments:
            case ["record", results]:
                print(f"recorded in {record(Path(results), folder)}")
            case ["compare", ref, results]:
                after = read_run(results)
                print(compare(read_run(find_record(ref, after.vendor, folder)), after))
            case _:
                raise ValueError(__doc__.splitlines()[0])
    except FileNotFoundError as error:
        print(f"there is no {error.filename}; run make bench first", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
