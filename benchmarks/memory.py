"""Peak memory of one call in its own process."""

import subprocess
import sys


def peak_memory_mib(module: str, call: str, **variables) -> float:
    """MiB of resident memory that `call(*make_case(**variables))` needs at most besides its case, on one thread.

    Args:
        module: name of the module in benchmarks that has `make_case` and `call`.
        call: name of the function to measure.
    """
    code = (f"import torch; from benchmarks import {module} as bench, memory; torch.set_num_threads(1); "
            f"case = bench.make_case(**{variables!r}); before = memory.forget_peak(); bench.{call}(*case); "
            f"print(memory.read_status('VmHWM') - before)")
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def forget_peak() -> float:
    """Let the peak start anew at this process's resident memory, which is returned in MiB.

    Making a case needs more memory than keeping it, which would hide as much of what a call needs.
    """
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return read_status("VmRSS")


def read_status(name: str) -> float:
    """MiB. getrusage's ru_maxrss would include the peak of the parent process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{name}:"))
