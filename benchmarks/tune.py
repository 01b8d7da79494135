"""python -m benchmarks.tune [OPERATION ...]: find the fastest tiles of the Triton kernels on this GPU.

Each candidate is timed in the whole operation, forward and backward, at the shapes of the GPU benchmarks, one kernel
after the other. A candidate at least 2% faster than the best so far, whose results are equal up to rounding, goes into
dllm_kernels/tuned.py. Candidates that do not compile or fit are named and skipped. Takes minutes per operation.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.device import DEVICE, SMALL, device_name, finish, pick
from benchmarks.gpu import seconds_of
from dllm_kernels import bidirectional_attention, linear_token_scores, tuned

CANDIDATES = {"num_warps": (4, 8), "num_stages": (2, 3, 4, 5), "ROWS": (64, 128, 256), "WORDS": (64, 128, 256),
              "COLUMNS": (64, 128, 256), "INNER": (32, 64, 128)}
GAIN = 0.98


class Case(NamedTuple):
    operation: str
    shape: object  # class of the table
    tiles: dict  # the module's own table, changed while tuning: shape class -> kernel -> settings
    kernels: list[str]
    call: Callable[[], list[torch.Tensor]]  # runs the operation and returns its results


def unmask_case() -> Case:
    from benchmarks import bench_gpu_topk_unmask as bench
    from dllm_kernels.topk_unmask import triton_kernels

    hidden, weight, rows = bench.make_head(32, bench.SIZES[0])
    if SMALL:
        hidden, weight = hidden.half(), weight.half()

    def call():
        return [linear_token_scores(hidden, weight, rows, backend="triton").confidence]

    return Case("topk_unmask", 2, triton_kernels.TILES, ["few"], call)


def attention_case(heads: tuple[int, int, int], few: bool) -> Case:
    from benchmarks import bench_gpu_attention as bench
    from dllm_kernels.attention import triton_kernels

    dtype = torch.float16 if SMALL else torch.bfloat16
    rows, queries, keys = bench.CACHED if few else (bench.B, bench.L, bench.L)
    q, k, v = bench.make_heads(queries, rows, keys, heads=heads, dtype=dtype)
    shape = 2, heads[2]

    def call():
        with torch.set_grad_enabled(not few):
            out = bidirectional_attention(q, k, v, backend="triton")
        return [out] if few else [out, *torch.autograd.grad(out, (q, k, v), out.detach())]

    own = triton_kernels.BY_ARCHITECTURE.get(tuned.architecture(), {})
    tiles = own if shape in own else triton_kernels.TILES
    return Case("attention", shape, tiles, [name for name in tiles[shape] if (name == "few") == few], call)


def cases() -> Iterator[Callable[[], Case]]:
    yield "topk_unmask", unmask_case
    for heads in pick([(14, 2, 64), (28, 4, 128)], [(2, 1, 32)]):
        for few in (False, True):
            yield "attention", lambda heads=heads, few=few: attention_case(heads, few)


def neighbours(settings: dict[str, int]) -> Iterator[dict[str, int]]:
    """The settings with one or two values changed."""
    names = [name for name in settings if name in CANDIDATES]
    for count in (1, 2):
        for chosen in itertools.combinations(names, count):
            for values in itertools.product(*(CANDIDATES[name] for name in chosen)):
                changed = settings | dict(zip(chosen, values, strict=True))
                if all(changed[name] != settings[name] for name in chosen):
                    yield changed


def tune(case: Case, limit: int) -> Iterator[tuple[str, dict[str, int], float]]:
    """Yields each kernel that becomes faster, its settings, and how many times as fast the operation is."""
    truth = case.call()
    for kernel in case.kernels:
        before = best = case.tiles[case.shape][kernel]
        fastest = first = min(seconds_of(case.call, DEVICE, pick(10, 1)))
        for candidate in itertools.islice(neighbours(before), limit):
            case.tiles[case.shape][kernel] = candidate
            try:
                results = case.call()
                finish()
            except Exception as error:  # too many registers or bytes of shared memory, or shapes that a product refuses
                print(f"# {case.operation} {case.shape} {kernel} {candidate}: {str(error).splitlines()[0][:100]}")
                continue
            if not all(same(*pair) for pair in zip(results, truth, strict=True)):
                print(f"# {case.operation} {case.shape} {kernel} {candidate}: other results")
                continue
            seconds = min(seconds_of(case.call, DEVICE, pick(10, 1)))
            if seconds < GAIN * fastest:
                fastest, best = seconds, candidate
        case.tiles[case.shape][kernel] = best
        if best is not before:
            yield kernel, {name: value for name, value in best.items() if value != before.get(name)}, first / fastest


def same(result: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool((result.double() - truth.double()).norm() <= 1e-2 * truth.double().norm())


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OPERATION",
                        help="topk_unmask, attention; all by default")
    parser.add_argument("--limit", type=int, default=8, help="most candidates of a kernel; default: %(default)s")
    parser.add_argument("--table", type=Path, default=Path(tuned.__file__), help="the file to rewrite")
    options = parser.parse_args()
    if unknown := set(options.operations) - {name for name, _ in cases()}:
        parser.error(f"there are no tiles to tune for {', '.join(sorted(unknown))}")
    here = tuned.architecture() or "interpreter"
    if here == "interpreter" and not SMALL:
        parser.error("there is no GPU here; BENCH_DEVICE=cpu BENCH_SMALL=1 TRITON_INTERPRET=1 tries the command")
    found = dict(tuned.TILES)
    for name, make in cases():
        if options.operations and name not in options.operations:
            continue
        case = make()
        for kernel, settings, gain in tune(case, options.limit):
            where = f"{device_name()}, torch {torch.__version__}, x{gain:.2f}"
            found[here, name, case.shape, kernel] = settings, where
            print(f"{name} {case.shape} {kernel}: {settings}, {gain:.2f} times as fast", flush=True)
    rewrite(options.table, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
