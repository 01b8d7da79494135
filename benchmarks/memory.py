"""Peak memory of one call in a process of its own."""

import subprocess
import sys


def peak_memory_mib(module: str, call: str, **variables) -> float:
    """Peak resident memory of `function(*case)` above what the process held before it, in MiB, on one thread.

    Args:
        module: of benchmarks; its `make_case(**variables)` makes the case.
        call: the name of the function there.
    """
    code = (f"import torch; from benchmarks import {module} as bench, memory; torch.set_num_threads(1); "
            f"case = bench.make_case(**{variables!r}); before = memory.resident_peak_mib(); bench.{call}(*case); "
            f"print(memory.resident_peak_mib() - before)")
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def resident_peak_mib() -> float:
    """Of this process so far; ru_maxrss of getrusage would begin with the peak of the process that started this one."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))
