"""python -m benchmarks.machine_code EXTENSION.so CUOBJDUMP, or FOUND.json: count the machine code for Hopper.

The extension of the CUDA C++ kernels is disassembled; FOUND.json is what `python -m tests.kernels.ahead_of_time one`
prints of the kernels that Triton compiles. The counts go to benchmarks/machine_code.json, each compiler's in the place
of its former ones. benchmarks/predict.py predicts from them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from dllm.files import write_json

COUNTS = Path(__file__).with_name("machine_code.json")
READ, WRITE = "LDG.E.128", "STG.E.128"
WIDTHS = {"U8": 1, "U16": 2, "64": 8, "128": 16}  # bytes, by a part of the instruction's name
KERNELS = {"loss": "loss_kernelINS_8BFloat16ELb0E",  # parts of the mangled names
           "scores": "score_rows_kernelINS_8BFloat16ELNS_7MeasureE0ELb0ELb0E"}


class RowCounts(NamedTuple):
    """Of the loops of one kernel that read or write a row of bf16 16 bytes at a time, in instructions per word."""

    reading: float
    writing: float  # 0: it writes none
    registers: int


class TileCounts(NamedTuple):
    """Of an attention kernel, and of its loop over the tiles that need no test of what is visible."""

    rows: int  # queries in a tile
    columns: int  # keys in a tile
    instructions: int  # of a warp, per tile
    smallest_n: int  # of the products of a warp group, wgmma of 64 x N x 16
    load_bytes: list[int]  # each width that a load from global memory has
    warps: int
    registers: int
    shared: int  # bytes


class HeadCounts(NamedTuple):
    """Of a kernel whose programs multiply a tile of the head by hidden states, INNER at a time, and reduce logits."""

    rows: int  # of hidden states in a tile
    words: int  # in a tile
    inner: int
    instructions: int  # of a warp, besides those of the loop
    step_instructions: int  # of a warp, per step of the loop
    smallest_n: int
    load_bytes: list[int]  # in the loop
    warps: int
    registers: int
    shared: int


Counts = RowCounts | TileCounts | HeadCounts


class Line(NamedTuple):
    address: int
    text: str


def lines_of(function: str) -> list[Line]:
    return [Line(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", function)]


def jumps_of(lines: list[Line]) -> dict[int, int]:
    return {line.address: int(to[1], 16) for line in lines if (to := re.search(r"\bBRA\b.*0x([0-9a-f]+)", line.text))}


def loops_of(lines: list[Line]) -> list[list[Line]]:
    """The instructions from where a branch jumps back to, to the branch."""
    return [[line for line in lines if begin <= line.address <= end] for end, begin in jumps_of(lines).items()
            if begin <= end]


def per_word(function: str, access: str) -> float:
    """Instructions per word of bf16 in the innermost loop that has such accesses and exponentials; 0 if none has.

    A loop that writes what it reads counts as writing. What reads single words, at the ends of a row, does not count:
    no 16 bytes pass through it.
    """
    lines = lines_of(function)
    jumps = jumps_of(lines)
    edges = {*jumps.values(), *(at + 16 for at in jumps)}
    costs = []
    for body in loops_of(lines):
        blocks: list[list[str]] = []
        for line in body:
            if line.address in edges or not blocks:
                blocks.append([])
            blocks[-1].append(line.text)
        accesses = sum(access in line.text for line in body)
        if access == READ and any(WRITE in line.text for line in body):
            continue
        if accesses and any("MUFU.EX2" in line.text for line in body):
            whole = [block for block in blocks if not any("LDG.E.U16" in text for text in block)]
            costs.append((len(body), sum(map(len, whole)) / (8 * accesses)))
    return round(min(costs)[1], 2) if costs else 0.0


def row_counts(function: str, registers: int) -> RowCounts:
    return RowCounts(per_word(function, READ), per_word(function, WRITE), registers)


def product_counts(function: str, settings: dict[str, int], registers: int, shared: int) -> TileCounts | HeadCounts:
    """Of the shortest loop with products: of attention, the one that tests no pair; of the head, the only one."""
    lines = [line for line in lines_of(function) if not line.text.startswith("NOP")]
    loop = min((x for x in loops_of(lines) if any("HGMMA" in line.text for line in x)), key=len)
    code = "\n".join(line.text for line in loop)
    widths = {next((WIDTHS[part] for part in load.split(".") if part in WIDTHS), 4)
              for load in re.findall(r"\bLDG(?:STS)?\.E[.\w]*", code)}
    rest = (min(int(n) for n in re.findall(r"HGMMA\.64x(\d+)x16", code)), sorted(widths), settings["num_warps"],
            registers, shared)
    if "COLUMNS" in settings:
        return TileCounts(settings["ROWS"], settings["COLUMNS"], len(loop), *rest)
    return HeadCounts(settings["ROWS"], settings["WORDS"], settings["INNER"], len(lines) - len(loop), len(loop), *rest)


def count_extension(library: Path, disassembler: str) -> dict[str, RowCounts]:
    """The counts of `KERNELS` in an extension's code for sm_90."""
    run = [disassembler, "-arch", "sm_90"]
    listing, usage = (subprocess.run([*run, option, library], capture_output=True, text=True, check=True).stdout
                      for option in ("-sass", "-res-usage"))
    found = {}
    for name, mangled in KERNELS.items():
        function, = (part for part in listing.split("Function : ")[1:] if mangled in part.split(None, 1)[0])
        symbol = function.split(None, 1)[0]
        found[name] = row_counts(function, int(re.search(rf"Function {re.escape(symbol)}:\s+REG:(\d+)", usage)[1]))
    return found


def as_counts(numbers: dict) -> Counts:
    kind, = (kind for kind in Counts.__args__ if {*kind._fields} == {*numbers})
    return kind(**numbers)


def of_triton(found: list[dict]) -> tuple[str, dict[str, Counts]]:
    """The compiler and its counts, of what tests/kernels/ahead_of_time.py found."""
    compiler, = {x["compiler"] for x in found}
    return compiler, {x["counted_as"]: as_counts(x["counts"]) for x in found if x["counted_as"]}


def read() -> dict[str, dict[str, Counts]]:
    """Compiler and version -> kernel -> counts."""
    return {compiler: {name: as_counts(numbers) for name, numbers in kernels.items()}
            for compiler, kernels in json.loads(COUNTS.read_text()).items()}


def main() -> int:
    path, *disassembler = sys.argv[1:]
    if disassembler:
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        compiler = "nvcc " + re.search(r"release ([\d.]+)", said)[1]
        counts = count_extension(Path(path), *disassembler)
    else:
        compiler, counts = of_triton(json.loads(Path(path).read_text()))
    write_json(COUNTS, {name: {kernel: numbers._asdict() for kernel, numbers in kernels.items()}
                        for name, kernels in sorted((read() | {compiler: counts}).items())})
    return 0


if __name__ == "__main__":
    sys.exit(main())
