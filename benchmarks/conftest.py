"""The `paired` fixture: ours against a baseline, call by call in one process, into pytest-benchmark's JSON."""

import os
import sys
import time
from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def paired(benchmark) -> Callable[..., float]:
    """Call `paired(ours=..., baseline=...)` once in a benchmark.

    Both are called `rounds` times after one call each to warm up, in the order baseline, ours, ours, baseline, ..., so
    that a slow moment of the machine meets both. The benchmark's timing is that of ours.

    Args:
        ours, baseline: callables without arguments that do the same work.
        rounds: calls of each.
        at_least: the promised ratio of the two minima, baseline / ours, which gate.py checks; None reports it only.
        threads: of torch, within; None leaves them as they are.
        finish: called after each call, within its time: waits for a GPU.
        exactly: name -> (measured, promised) counters, which gate.py wants equal.
        extra: anything else for the JSON's extra_info.
    Returns: the ratio of the minima.
    """

    def run(*, ours: Callable[[], object], baseline: Callable[[], object], rounds: int = 10,
            at_least: float | None = None, threads: int | None = 1, finish: Callable[[], object] | None = None,
            exactly: dict[str, tuple[float, float]] | None = None, **extra) -> float:
        seconds: list[float] = []
        calls = 0
        if finish is not None:
            ours, baseline = ((lambda f=f: (f(), finish())) for f in (ours, baseline))

        def time_baseline() -> None:
            start = time.perf_counter()
            baseline()
            seconds.append(time.perf_counter() - start)

        def before_ours() -> None:
            nonlocal calls
            while calls % 2 == 0 and len(seconds) <= calls:
                time_baseline()
            calls += 1

        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            ours()
            baseline()
            benchmark.pedantic(ours, setup=before_ours, rounds=rounds, iterations=1)
            while len(seconds) < rounds:
                time_baseline()
        finally:
            torch.set_num_threads(before)
        fastest = min(seconds)
        ratio = fastest / benchmark.stats["min"]
        benchmark.extra_info |= {
            "ratio": ratio, "at_least": at_least, "ours_ms": 1e3 * benchmark.stats["min"],
            "baseline_ms": 1e3 * fastest, "baseline_seconds": seconds, "rounds": rounds, "threads": threads or before,
            "exactly": exactly or {}, "torch": torch.__version__, **extra}
        return ratio

    return run


@pytest.fixture
def benchmark(benchmark):
    if benchmark.disabled:
        pytest.skip("there is nothing to compare with --benchmark-disable")
    if time.time() > float(os.environ.get("BENCH_DEADLINE", "inf")):
        pytest.skip("out of time")
    return benchmark


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Note the command; leave out the machine's name on its network."""
    output_json["command"] = " ".join(["pytest", *sys.argv[1:]])
    output_json["machine_info"].pop("node", None)
