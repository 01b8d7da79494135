"""Device and sizes of the GPU benchmarks: a GPU, or small shapes on a CPU to try the command without one.

`benchmarks.gpu` sets BENCH_DEVICE=cpu and BENCH_SMALL=1 in the environment for the latter.
"""

import os
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from dllm_kernels.dispatch import Backend

DEVICE = os.environ.get("BENCH_DEVICE", "cuda")
SMALL = os.environ.get("BENCH_SMALL", "0") == "1"
on_device = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")


def pick(full, small):
    return small if SMALL else full


def skip_where_missing(backends: Sequence[Backend], name: str | None, tensor: torch.Tensor) -> None:
    for backend in backends:
        if backend.name == name and (reason := backend.missing() or backend.refuses(tensor)):
            pytest.skip(f"{name}: {reason}")


def mixed_ends(T: int, longest: int, device: str = DEVICE) -> torch.Tensor:
    """cu_seqlens of T positions in documents of 1 to `longest` positions, like packed text."""
    lengths = torch.randint(1, longest + 1, (T,), generator=torch.Generator().manual_seed(0))
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    return torch.cat((ends[ends < T], torch.tensor([T]))).to(device, torch.int32)


def finish() -> None:
    """Wait until the device has finished all its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE


def captured(*calls: Callable[[], object]) -> Callable[[], object]:
    """One replay of a CUDA graph of these calls in order, so that launching does not count."""
    if DEVICE == "cpu":
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def measure(paired: Callable[..., float], ours: Callable[[], object], baseline: Callable[[], object],
            at_least: float | None = None, *, rounds: int = 20, **extra) -> float:
    """`paired` on the device, without a limit of time. A CPU is not held to a GPU's promises."""
    if DEVICE == "cpu":
        at_least, extra["exactly"] = None, {}
    return paired(ours=ours, baseline=baseline, clock=time_on_device, rounds=pick(rounds, 2), seconds=None,
                  threads=None, at_least=at_least, gpu=device_name(), **extra)


def time_on_device(call: Callable[[], object]) -> float:
    """Seconds of a call by CUDA events: the mean of several in a row, at most 20, where one takes under a millisecond.
    On a CPU by the clock."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def several(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        finish()
        return begin.elapsed_time(end) / 1e3 / calls

    finish()
    once = several(1)
    return once if once >= 1e-3 else several(min(20, int(1e-3 / max(once, 1e-6)) + 1))


def peak_memory(call: Callable[[], object]) -> int:
    """Peak of the bytes that the call allocates; 0 on a CPU, where they are not counted."""
    if DEVICE == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def without_waiting(call: Callable[[], object]) -> None:
    """Run the call; on a GPU, PyTorch raises at the first host synchronisation."""
    if DEVICE == "cpu":
        call()
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
