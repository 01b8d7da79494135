"""python -m benchmarks.predict EXTENSION.so CUOBJDUMP: what the machine code of the CUDA C++ kernels allows on an H200.

Predictions, not measurements, so that a kernel that cannot reach its promise is seen before there is a GPU. The
extension is disassembled; of each kernel's loops over a row it counts the instructions per word. The time of a pass is
then the longer of two: the bytes at the speed of a copy, and the instructions at one per cycle and scheduler; over the
share of the last wave of blocks that is filled. Products take their multiplications at the speed of a large one.
The counts go to benchmarks/machine_code.json, from which docs/benchmarks.md has its table.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from dllm.files import write_json
from dllm_kernels.chunks import WORKSPACE_BYTES, rows_of_chunk

COUNTS = Path(__file__).with_name("machine_code.json")
V = 151_936  # the vocabulary of Qwen2.5
LOSS_SHAPES = {"0.5B": (32_768, 896), "7B": (16_384, 3_584)}  # corrupted positions, hidden size; bf16
SCORED_ROWS = 4096
READ, WRITE = "LDG.E.128", "STG.E.128"
BENCHMARKS = (*(f"bench_gpu_masked_cross_entropy.py::bench_against_the_products_alone[{shape}-counted]"
                for shape in LOSS_SHAPES), "bench_gpu_topk_unmask.py::bench_logits_against_the_memory[cuda-4096-0.0]")
LOSS_AT_MOST, SCORES_AT_LEAST = 1.25, 0.85  # times the products alone; of the speed of a copy


# Of an H200: lanes are those of four schedulers; the last two are what large bf16 products and copies reach.
MULTIPROCESSORS, LANES, HERTZ, PRODUCT_FLOP_PER_S, COPY_BYTES_PER_S = 132, 128, 1.755e9, 790e12, 4.3e12


# Of Triton's 128 x 128 tiles of words and rows, eight warps each: their products, which wait for the L2 cache
# (estimated), and the instructions per warp that follow them (counted in the machine code for sm_90).
TILE_FLOP_PER_S, TILE_INSTRUCTIONS = 500e12, 2_100
BLOCK_BYTES_PER_S = 8192 / 600e-9  # of the scores: what a block has on its way, over the memory's latency (estimated)


class Counts(NamedTuple):
    """Of the loops of one kernel that read or write a row of bf16 16 bytes at a time, in instructions per word."""

    reading: float
    writing: float  # 0: it writes none
    registers: int


KERNELS = {"loss": "loss_kernelINS_8BFloat16ELb0E",  # parts of the mangled names
           "scores": "score_rows_kernelINS_8BFloat16ELNS_7MeasureE0ELb0ELb0E"}


def count(library: Path, disassembler: str) -> dict[str, Counts]:
    """The counts of `KERNELS` in an extension's code for sm_90."""
    run = [disassembler, "-arch", "sm_90"]
    listing, usage = (subprocess.run([*run, option, library], capture_output=True, text=True, check=True).stdout
                      for option in ("-sass", "-res-usage"))
    found = {}
    for name, mangled in KERNELS.items():
        function, = (part for part in listing.split("Function : ")[1:] if mangled in part.split(None, 1)[0])
        symbol = function.split(None, 1)[0]
        registers = int(re.search(rf"Function {re.escape(symbol)}:\s+REG:(\d+)", usage)[1])
        found[name] = Counts(*(per_word(function, kind) for kind in (READ, WRITE)), registers)
    return found


def per_word(function: str, access: str) -> float:
    """Instructions per word of bf16 in the innermost loop that has such accesses and exponentials; 0 if none has.

    A loop that writes what it reads counts as writing. What reads single words, at the ends of a row, does not count:
    no 16 bytes pass through it.
    """
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", function)]
    jumps = {at: int(to[1], 16) for at, text in lines if (to := re.search(r"\bBRA\b.*0x([0-9a-f]+)", text))}
    edges = {*jumps.values(), *(at + 16 for at in jumps)}
    costs = []
    for end, begin in jumps.items():
        blocks, body = [], [(at, text) for at, text in lines if begin <= at <= end]
        for at, text in body:
            if at in edges or not blocks:
                blocks.append([])
            blocks[-1].append(text)
        accesses = sum(access in text for _, text in body)
        if access == READ and any(WRITE in text for _, text in body):
            continue
        if accesses and any("MUFU.EX2" in text for _, text in body):
            whole = [block for block in blocks if not any("LDG.E.U16" in text for text in block)]
            costs.append((len(body), sum(map(len, whole)) / (8 * accesses)))
    return round(min(costs)[1], 2) if costs else 0.0


def seconds_of_pass(rows: int, words: int, bytes_per_word: float, slots_per_word: float, blocks_at_once: int) -> float:
    """Of a kernel with one block for each row."""
    by_memory = rows * words * bytes_per_word / COPY_BYTES_PER_S
    by_instructions = rows * words * slots_per_word / (MULTIPROCESSORS * LANES * HERTZ)
    waves = rows / (blocks_at_once * MULTIPROCESSORS)
    return max(by_memory, by_instructions) * -(-waves // 1) / waves


def loss_against_products(counts: Counts, rows: int, D: int) -> tuple[float, float]:
    """Seconds of a training step's head and loss, and how many times the three products' alone."""
    size = rows_of_chunk(rows, 2 * V, WORKSPACE_BYTES["cuda"])
    chunks = -(-rows // size)
    products = 3 * 2 * rows * V * D / PRODUCT_FLOP_PER_S
    passes = chunks * seconds_of_pass(rows / chunks, V, 4, counts.reading + counts.writing, 1)
    sums = (2 * chunks - 1) * V * D * 4 / COPY_BYTES_PER_S  # grad_weight in fp32, read and written
    return products + passes + sums, (products + passes + sums) / products


def scores_against_copy(counts: Counts) -> tuple[float, float]:
    """Seconds of the scores of rows of logits, and the share of a copy's speed at which they are read."""
    blocks = min(65_536 // (counts.registers * 128), 16)
    seconds = seconds_of_pass(SCORED_ROWS, V, 2, counts.reading, blocks)
    return seconds, SCORED_ROWS * V * 2 / COPY_BYTES_PER_S / seconds


def head_in_tiles(rows: int, D: int) -> float:
    """Seconds of the scores of a few rows of bf16 hidden states at temperature 0, in Triton."""
    padded = next((size for size in (16, 32, 64) if rows <= size), -(-rows // 128) * 128)
    products = 2 * padded * V * D / TILE_FLOP_PER_S
    rest = padded * V / 128**2 * TILE_INSTRUCTIONS * 8 * 32 / (MULTIPROCESSORS * LANES * HERTZ)
    return max(V * D * 2 / COPY_BYTES_PER_S, products + rest)


def head_by_products(counts: Counts, rows: int, D: int) -> float:
    """The same by cuBLAS, which writes fp32 logits, and the CUDA C++ pass over them."""
    padded, blocks = -(-rows // 128) * 128, 65_536 // (counts.registers * 128)
    products = max(V * D * 2 / COPY_BYTES_PER_S, 2 * padded * V * D / PRODUCT_FLOP_PER_S)
    copied = rows * V * 4 / COPY_BYTES_PER_S
    full = rows >= blocks * MULTIPROCESSORS
    reads = seconds_of_pass(rows, V, 4, counts.reading, blocks) if full else max(copied, V * 4 / BLOCK_BYTES_PER_S)
    return products + copied + reads


def table(counts: dict[str, Counts]) -> list[tuple[str, str, str, str]]:
    """Task, prediction, what it is to be, and the counts behind it."""
    loss, scores = counts["loss"], counts["scores"]
    lines = []
    for shape, sizes in LOSS_SHAPES.items():
        seconds, ratio = loss_against_products(loss, *sizes)
        lines.append((f"head and loss, {shape}, {sizes[0]:,} corrupted positions, forward and backward",
                      f"{1e3 * seconds:.1f} ms, {ratio:.2f} times the products alone", f"at most {LOSS_AT_MOST}",
                      f"{loss.reading} + {loss.writing} instructions a word, {loss.registers} registers"))
    seconds, share = scores_against_copy(scores)
    lines.append((f"token and probability of {SCORED_ROWS:,} rows of logits",
                  f"{1e3 * seconds:.2f} ms, {share:.0%} of a copy's speed", f"at least {SCORES_AT_LEAST:.0%}",
                  f"{scores.reading} instructions a word, {scores.registers} registers"))
    return lines


def read() -> dict[str, Counts]:
    return {name: Counts(**numbers) for name, numbers in json.loads(COUNTS.read_text())["kernels"].items()}


def main() -> int:
    library, disassembler = sys.argv[1:]
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    counts = count(Path(library), disassembler)
    write_json(COUNTS, {"nvcc": re.search(r"release ([\d.]+)", said)[1],
                        "kernels": {name: numbers._asdict() for name, numbers in counts.items()}})
    for line in table(counts):
        print("; ".join(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
