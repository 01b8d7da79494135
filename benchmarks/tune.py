"""python -m benchmarks.tune --output-dir DIR [OPERATION ...]: find the fastest tiles of the Triton kernels on this GPU.

First a process for each core runs its share of the candidates once, which compiles them. Then each kernel is timed
alone, in a process of its own: in the whole operation, forward and backward, at the shapes of the GPU benchmarks, each
candidate right after the tiles in use. A finished candidate is a line of DIR/tune.records.jsonl, on the disk before the
next one begins. One that crashes its process or hangs is recorded as failed, and a new process goes on with the next;
the same command continues where it was cut off. A candidate at least 2% faster than the tiles in use, whose results are
equal up to rounding, goes into dllm_kernels/tuned.py.
"""

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.device import DEVICE, SMALL, device_name, finish, pick
from benchmarks.gpu import ROOT, run, seconds_of
from benchmarks.records import append, read
from dllm_kernels import bidirectional_attention, linear_token_scores, triton_support, tuned

CANDIDATES = {"num_warps": (4, 8), "num_stages": (2, 3, 4, 5), "ROWS": (64, 128, 256), "WORDS": (64, 128, 256),
              "COLUMNS": (64, 128, 256), "INNER": (32, 64, 128)}
GAIN = 0.98
COMPILING, TIMING = 240, 60  # most seconds of a process that compiles, and of one that times without finishing any


class Kernel(NamedTuple):
    operation: str
    shape: object  # class of the table
    name: str
    tiles: dict  # the module's own table, changed while a candidate runs: shape class -> kernel -> settings
    make: Callable[[], Callable[[], list[torch.Tensor]]]  # inputs, and what runs the operation and returns its results

    @property
    def label(self) -> str:
        return f"{self.operation} {self.shape} {self.name}"

    @property
    def settings(self) -> dict[str, int]:
        return self.tiles[self.shape][self.name]

    @contextlib.contextmanager
    def with_settings(self, settings: dict[str, int]) -> Iterator[None]:
        before = self.settings
        self.tiles[self.shape][self.name] = settings
        try:
            yield
        finally:
            self.tiles[self.shape][self.name] = before


def make_unmasking() -> Callable[[], list[torch.Tensor]]:
    from benchmarks import bench_gpu_topk_unmask as bench

    hidden, weight, rows = bench.make_head(32, bench.SIZES[0])
    if SMALL:
        hidden, weight = hidden.half(), weight.half()
    return lambda: [linear_token_scores(hidden, weight, rows, backend="triton").confidence]


def make_attention(heads: tuple[int, int, int], few: bool) -> Callable[[], list[torch.Tensor]]:
    from benchmarks import bench_gpu_attention as bench

    dtype = torch.float16 if SMALL else torch.bfloat16
    rows, queries, keys = bench.CACHED if few else (bench.B, bench.L, bench.L)
    q, k, v = bench.make_heads(queries, rows, keys, heads=heads, dtype=dtype)

    def call():
        with torch.set_grad_enabled(not few):
            out = bidirectional_attention(q, k, v, backend="triton")
        return [out] if few else [out, *torch.autograd.grad(out, (q, k, v), out.detach())]

    return call


def kernels() -> list[Kernel]:
    from dllm_kernels.attention import triton_kernels as attention
    from dllm_kernels.topk_unmask import triton_kernels as unmask

    found = [Kernel("topk_unmask", 2, "few", unmask.TILES, make_unmasking)]
    own = attention.BY_ARCHITECTURE.get(tuned.architecture(), {})
    for heads in pick([(14, 2, 64), (28, 4, 128)], [(2, 1, 32)]):
        shape = 2, heads[2]
        tiles = own if shape in own else attention.TILES
        found += [Kernel("attention", shape, name, tiles, partial(make_attention, heads, name == "few"))
                  for name in tiles[shape]]
    return found


def neighbours(settings: dict[str, int]) -> Iterator[dict[str, int]]:
    """The settings with one or two values changed."""
    names = [name for name in settings if name in CANDIDATES]
    for count in (1, 2):
        for chosen in itertools.combinations(names, count):
            for values in itertools.product(*(CANDIDATES[name] for name in chosen)):
                changed = settings | dict(zip(chosen, values, strict=True))
                if all(changed[name] != settings[name] for name in chosen):
                    yield changed


@cache  # a candidate may leave the device unable to answer
def machine() -> str:
    return f"{device_name()}, torch {torch.__version__}"


def results_of(kernel: Kernel, records: Path) -> list[dict]:
    """What was found on this machine about candidates to replace the tiles in use."""
    wanted = {"kernel": kernel.label, "machine": machine(), "in_use": kernel.settings}
    return [line for line in read(records) if wanted.items() <= line.items()]


def left(kernel: Kernel, records: Path, limit: int) -> list[dict[str, int]]:
    """The first `limit` candidates, without those of which there is a result."""
    done = [line["settings"] for line in results_of(kernel, records)]
    return [settings for settings in itertools.islice(neighbours(kernel.settings), limit) if settings not in done]


def note(kernel: Kernel, records: Path, settings: dict[str, int], **found) -> None:
    append(records, {"kernel": kernel.label, "machine": machine(), "in_use": kernel.settings, "settings": settings,
                     **found})


def compile_all(command: list[str], shares: int) -> None:
    deadline = time.monotonic() + COMPILING
    begun = [subprocess.Popen([*command, "--compile", str(i), str(shares)], cwd=ROOT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) for i in range(shares)]
    for process in begun:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:  # what it has left is compiled when it is timed
            process.kill()
            process.wait()


def compile_share(chosen: list[Kernel], records: Path, limit: int, share: int, shares: int) -> None:
    """Run some of the candidates once."""
    pairs = [(kernel, settings) for kernel in chosen for settings in left(kernel, records, limit)]
    for kernel, some in itertools.groupby(pairs[share::shares], key=lambda pair: pair[0]):
        call = kernel.make()
        for _, settings in some:
            with contextlib.suppress(Exception), kernel.with_settings(settings):  # `time_candidates` names what fails
                call()
                finish()


def time_candidates(kernel: Kernel, records: Path, limit: int) -> None:
    call = kernel.make()
    truth = call()
    finish()
    for settings in left(kernel, records, limit):
        in_use = min(seconds_of(call, DEVICE, pick(10, 1)))
        found = {}
        try:
            with kernel.with_settings(settings):
                results = call()
                finish()
                if all(same(*pair) for pair in zip(results, truth, strict=True)):
                    found = {"seconds": min(seconds_of(call, DEVICE, pick(10, 1))), "seconds_in_use": in_use}
                else:
                    found = {"failed": "other results"}
        except Exception as error:  # too many registers or bytes of shared memory, or shapes that a product refuses
            found = {"failed": (str(error).strip() or repr(error)).splitlines()[0][:200]}
        note(kernel, records, settings, **found)
        finish()  # raises where an error has left the device unusable, and another process goes on


def time_apart(kernel: Kernel, records: Path, limit: int, command: list[str]) -> str | None:
    """Time the candidates in processes, one after the other. Returns the problem that keeps the kernel from it."""
    while before := left(kernel, records, limit):
        status, said = run([*command, "--time", kernel.label], TIMING * len(before))
        after = left(kernel, records, limit)
        if after == before and status is not None and status >= 0:
            return (said.strip().splitlines() or ["no output"])[-1]
        if after and status is not None and status < 0:
            note(kernel, records, after[0], failed=f"ended by {signal.Signals(-status).name}")
        elif after == before:
            note(kernel, records, after[0], failed=f"not finished in {TIMING * len(before)} s")
    return None


def same(result: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool((result.double() - truth.double()).norm() <= 1e-2 * truth.double().norm())


def fastest(results: list[dict]) -> tuple[dict[str, int], float] | None:
    """The settings of the best result and how many times as fast the operation is; None if it is not worth a change."""
    gains = [(line["seconds_in_use"] / line["seconds"], line["settings"]) for line in results if "seconds" in line]
    gain, settings = max(gains, key=lambda pair: pair[0], default=(1, None))
    return (settings, gain) if gain > 1 / GAIN else None


def rewrite(path: Path, found: dict) -> None:
    """Replace the table in tuned.py, in one move."""
    text = path.read_text()
    head, rest = text.split("TILES: dict[tuple, tuple[dict[str, int], str]] = {\n")
    tail = rest.split("}\n", 1)[1] if rest.startswith("}") else rest.split("\n}\n", 1)[1]
    rows = "".join(f"    {key!r}:\n        ({settings!r},\n         {where!r}),\n"
                   for key, (settings, where) in found.items())
    part = path.with_suffix(".part")
    part.write_text(f"{head}TILES: dict[tuple, tuple[dict[str, int], str]] = {{\n{rows}}}\n{tail}")
    part.replace(path)


def improved(table: dict, chosen: list[Kernel], records: Path) -> dict:
    """The table of tuned.py with what the records say of these kernels."""
    table, here = dict(table), tuned.architecture() or "interpreter"
    for kernel in chosen:
        if (best := fastest(results_of(kernel, records))) is None:
            continue
        settings, gain = best
        key, in_use = (here, kernel.operation, kernel.shape, kernel.name), kernel.settings
        changed = {name: value for name, value in settings.items() if value != in_use[name]}
        table[key] = table.get(key, ({}, ""))[0] | changed, f"{machine()}, x{gain:.2f}"
        print(f"{kernel.label}: {changed}, {gain:.2f} times as fast")
    return table


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OPERATION",
                        help="topk_unmask, attention; all by default")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the results, to go on from as well")
    parser.add_argument("--limit", type=int, default=8, help="most candidates of a kernel; default: %(default)s")
    parser.add_argument("--table", type=Path, default=Path(tuned.__file__), help="the file to rewrite")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("SHARE", "SHARES"), help=argparse.SUPPRESS)
    parser.add_argument("--time", metavar="KERNEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if tuned.architecture() is None and not SMALL:
        parser.error("there is no GPU here; BENCH_DEVICE=cpu BENCH_SMALL=1 TRITON_INTERPRET=1 tries the command")
    if reason := triton_support.missing():
        parser.error(f"the kernels of Triton cannot run here: {reason}")
    options.kernels = [x for x in kernels() if not options.operations or x.operation in options.operations]
    if unknown := {*options.operations} - {kernel.operation for kernel in options.kernels}:
        parser.error(f"there are no tiles to tune for {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    options = read_options()
    chosen, records, limit = options.kernels, options.output_dir / "tune.records.jsonl", options.limit
    if options.compile:
        compile_share(chosen, records, limit, *options.compile)
        return 0
    if options.time:
        time_candidates(*(kernel for kernel in chosen if kernel.label == options.time), records, limit)
        return 0
    options.output_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.tune", *options.operations, "--limit", str(limit), "--output-dir",
               str(options.output_dir.resolve())]
    shares = min(len(os.sched_getaffinity(0)), sum(len(left(kernel, records, limit)) for kernel in chosen))
    compile_all(command, shares)
    problems = []
    for kernel in chosen:
        if problem := time_apart(kernel, records, limit, command):
            problems.append(f"{kernel.label}: {problem}")
        for line in results_of(kernel, records):
            ending = line.get("failed") or f"{line['seconds_in_use'] / line['seconds']:.2f} times as fast"
            print(f"# {kernel.label} {line['settings']}: {ending}", flush=True)
    rewrite(options.table, improved(tuned.TILES, chosen, records))
    print("".join(f"FAILED {problem}\n" for problem in problems), end="")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
