"""Peak memory of one call in its own process."""

import subprocess
import sys


def peak_memory_mib(module: str, call: str, **variables) -> float:
    """MiB by which `call(*make_case(**variables))` raises the peak of resident memory, on one thread.

    Args:
        module: name of the module in benchmarks that has `make_case` and `call`.
        call: name of the function to measure.
    """
    code = (f"import torch; from benchmarks import {module} as bench, memory; torch.set_num_threads(1); "
            f"case = bench.make_case(**{variables!r}); before = memory.resident_peak_mib(); bench.{call}(*case); "
            f"print(memory.resident_peak_mib() - before)")
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def resident_peak_mib() -> float:
    """Peak of this process so far. getrusage's ru_maxrss would include the peak of the parent process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))
