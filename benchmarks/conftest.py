"""The `paired` fixture: ours against a baseline, call by call in one process, into pytest-benchmark's JSON."""

import os
import sys
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.records import append

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
        clock: seconds of a call, by its device; None: by the host.
        exactly: name -> (measured, promised) counters, which gate.py wants equal.
        extra: anything else for the JSON's extra_info.
    Returns: the ratio of the minima.
    """

    def run(*, ours: Callable[[], object], baseline: Callable[[], object], rounds: int = 40,
            seconds: float | None = SECONDS, check: Callable[[object, object], dict | None] = lambda *results: None,
            at_least: float | None = None, threads: int | None = 1,
            clock: Callable[[Callable[[], object]], float] | None = None,
            exactly: dict[str, tuple[float, float]] | None = None, **extra) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            start = time.perf_counter()
            results = ours(), baseline()
            warm_up = time.perf_counter() - start
            extra |= check(*results) or {}
            del results
            if seconds is not None:
                rounds = min(rounds, max(2, int(seconds / warm_up)))
            if clock is None:
                our_seconds, baseline_seconds = in_turns_by_the_host(benchmark, ours, baseline, rounds)
            else:
                our_seconds, baseline_seconds = in_turns(clock, ours, baseline, rounds)
        finally:
            torch.set_num_threads(before)
        fastest = min(baseline_seconds)
        ratio = fastest / min(our_seconds)
        benchmark.extra_info |= {
            "ratio": ratio, "at_least": at_least, "ours_ms": 1e3 * min(our_seconds),
            "baseline_ms": 1e3 * fastest, "baseline_seconds": baseline_seconds, "rounds": rounds,
            "threads": threads or before, "exactly": exactly or {}, "torch": torch.__version__, **extra}
        if path := os.environ.get("BENCH_RECORDS"):
            append(path, {"fullname": benchmark.fullname, "extra_info": benchmark.extra_info,
                          "stats": {"data": our_seconds}})
        return ratio

    return run


def in_turns(clock, ours: Callable, baseline: Callable, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of ours and of the baseline, called in the order baseline, ours, ours, baseline, ..."""
    taken: dict[Callable, list[float]] = {ours: [], baseline: []}
    for turn in range(rounds):
        for call in (baseline, ours) if turn % 2 == 0 else (ours, baseline):
            taken[call].append(clock(call))
    return taken[ours], taken[baseline]


def in_turns_by_the_host(benchmark, ours: Callable, baseline: Callable, rounds: int) -> tuple[list[float], list[float]]:
    """As `in_turns`; pytest-benchmark times ours."""
    theirs: list[float] = []
    turn = 0

    def call_baseline() -> None:
        start = time.perf_counter()
        baseline()
        theirs.append(time.perf_counter() - start)

    def before_ours() -> None:
        nonlocal turn
        while turn % 2 == 0 and len(theirs) <= turn:
            call_baseline()
        turn += 1

    benchmark.pedantic(ours, setup=before_ours, rounds=rounds, iterations=1)
    while len(theirs) < rounds:
        call_baseline()
    return benchmark.stats.stats.data, theirs


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
