"""The `paired` fixture: ours against a baseline, call by call in one process, into pytest-benchmark's JSON."""

import os
import sys
import time
from collections.abc import Callable

import pytest
import torch

SECONDS = 4.0  # of one benchmark's timed calls; bounds `make bench` on slow machines


@pytest.fixture
def paired(benchmark) -> Callable[..., float]:
    """Call `paired(ours=..., baseline=...)` once in a benchmark.

    After one warm-up call each, both are called `rounds` times in the order baseline, ours, ours, baseline, ..., so
    that a slow moment of the machine affects both. The benchmark's timing is that of ours.

    Args:
        ours, baseline: callables without arguments that do the same work.
        rounds: calls of each at most; fewer, but at least two, where the warm-up calls say that they exceed `seconds`.
        seconds: limit of the timed calls; None for no limit.
        check: called with the results of the two warm-up calls: asserts that they agree, and may return counters for
            extra_info.
        at_least: the promised ratio of the two minima, baseline / ours, which gate.py checks; None reports it only.
        threads: of torch during the calls; None leaves the number as it is.
        finish: called after each call, within its time: waits for a GPU.
        exactly: name -> (measured, promised) counters, which gate.py wants equal.
        extra: anything else for the JSON's extra_info.
    Returns: the ratio of the minima.
    """

    def run(*, ours: Callable[[], object], baseline: Callable[[], object], rounds: int = 40,
            seconds: float | None = SECONDS, check: Callable[[object, object], dict | None] = lambda *results: None,
            at_least: float | None = None, threads: int | None = 1, finish: Callable[[], object] = lambda: None,
            exactly: dict[str, tuple[float, float]] | None = None, **extra) -> float:
        baseline_seconds: list[float] = []
        calls = 0

        def call_ours() -> object:
            result = ours()
            finish()
            return result

        def call_baseline() -> object:
            start = time.perf_counter()
            result = baseline()
            finish()
            baseline_seconds.append(time.perf_counter() - start)
            return result

        def before_ours() -> None:
            nonlocal calls
            while calls % 2 == 0 and len(baseline_seconds) <= calls:
                call_baseline()
            calls += 1

        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            start = time.perf_counter()
            results = call_ours(), call_baseline()
            warm_up = time.perf_counter() - start
            extra |= check(*results) or {}
            del results
            baseline_seconds.clear()
            if seconds is not None:
                rounds = min(rounds, max(2, int(seconds / warm_up)))
            benchmark.pedantic(call_ours, setup=before_ours, rounds=rounds, iterations=1)
            while len(baseline_seconds) < rounds:
                call_baseline()
        finally:
            torch.set_num_threads(before)
        fastest = min(baseline_seconds)
        ratio = fastest / benchmark.stats["min"]
        benchmark.extra_info |= {
            "ratio": ratio, "at_least": at_least, "ours_ms": 1e3 * benchmark.stats["min"],
            "baseline_ms": 1e3 * fastest, "baseline_seconds": baseline_seconds, "rounds": rounds,
            "threads": threads or before, "exactly": exactly or {}, "torch": torch.__version__, **extra}
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
