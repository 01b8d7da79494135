"""python -m benchmarks.predict: what the kernels' machine code allows on an H200, from benchmarks/machine_code.json.

Predictions, not measurements, so that a kernel that cannot reach its promise is seen before there is a GPU.

A pass over rows takes the longer of two times: its bytes at the speed of a copy, and its instructions at one per cycle
and scheduler. Products of a library take their multiplications at the speed of a large one. A tile of a kernel that
multiplies takes its products at that speed, those of the head at the L2 cache's if that is longer, and its other
instructions at one per cycle and scheduler. Two numbers are the ends of a range: where the programs on a multiprocessor
always overlap, for a program waits for its products, and where they never do. All of it is over the share that programs
take of the places in all waves.

Left out: latencies, launches, the beginning and end of a program, tiles in which each pair is tested, exponentials
(which a unit of their own computes), products too narrow for full speed, and memory where attention is not decoding.
"""

import sys
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.machine_code import Counts, HeadCounts, RowCounts, TileCounts, read
from dllm_kernels.chunks import WORKSPACE_BYTES, rows_of_chunk

V = 151_936  # the vocabulary of Qwen2.5
LOSS_SHAPES = {"0.5B": (32_768, 896), "7B": (16_384, 3_584)}  # corrupted positions, hidden size; bf16
SCORED_ROWS = 4096
LOSS_AT_MOST, SCORES_AT_LEAST = 1.25, 0.85  # times the products alone; of the speed of a copy
FEW, SETS = 32, 3  # rows of hidden states, or of a cache; sets of inputs in a call of a benchmark
# By hidden size: times as fast as with logits rounded to bf16. Of few rows: times a reading of the head.
HEAD_AT_LEAST, FEW_AT_MOST = {896: 0.75, 3_584: 0.9}, 1.3

HEADS = {"0.5B": (14, 2, 64), "7B": (28, 4, 128)}  # of queries, of keys, size
B, L, DOCUMENT, BLOCK = 8, 4096, 512, 32
CACHED = FEW, 32, 2048  # rows, queries, keys
# By task: the mask that is counted, positions, pairs of a query and a key that it sees, of one head, and the benchmark.
ATTENTION = {
    "dense": ("all", B * L, B * L * L, "bench_dense[triton-cudnn-{}]"),
    "documents of 512": ("all", B * L, B * L * DOCUMENT, "bench_packed_documents[equal-torch_varlen-triton-{}]"),
    "block diffusion": ("diffusion", 2 * B * L, B * L * (L + BLOCK),
                        "bench_block_diffusion[triton-mask_made_before-{}]")}
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_gradient": 4}  # of a tile
NEEDED = {"forward": 2, "forward_backward": 7}  # the others are computed twice
WANTED = {"dense": ("0.7 of cuDNN's speed", "-"), "documents of 512": ("1.25 times `varlen_attn`'s", "1.05 times"),
          "block diffusion": ("1.15 times FlexAttention's", "1.15 times")}
# Threads of a program that scores a row of logits, and its programs: Triton's take up to 4 blocks of 4,096 words.
SCORING = {"cuda": (128, 1), "triton": (256, -(-V // (4 * 4096)))}
LAUNCHES = {"cuda": 3, "triton": 4, "head": 5}  # of a denoising step

# Of an H200: lanes are those of four schedulers; the last two are what large bf16 products and copies reach.
MULTIPROCESSORS, LANES, HERTZ, PRODUCT_FLOP_PER_S, COPY_BYTES_PER_S = 132, 128, 1.755e9, 790e12, 4.3e12
REGISTERS, SHARED_BYTES, THREADS, PROGRAMS = 65_536, 228 << 10, 2048, 32  # of a multiprocessor
# Estimates: the L2 cache, which allows tiles of 128 x 128 some 500e12 FLOP/s; and what one program of CUDA C++ that
# scores a row has on its way, over the memory's latency.
CACHE_BYTES_PER_S, ROW_BYTES_PER_S = 7.8e12, 8192 / 600e-9


def programs_at_once(counts: TileCounts | HeadCounts) -> int:
    """On a multiprocessor. Registers come in eights a thread, and each program has a KiB of shared memory besides."""
    threads = 32 * counts.warps
    return min(REGISTERS // (-(-counts.registers // 8) * 8 * threads), SHARED_BYTES // (counts.shared + 1024),
               THREADS // threads, PROGRAMS)


def filled(programs: float, at_once: int) -> float:
    """Share of the places of all waves of programs that have one, as if each took equally long."""
    waves = programs / (at_once * MULTIPROCESSORS)
    return waves / -(-waves // 1)


def seconds_of_pass(rows: float, bytes_per_word: float, slots_per_word: float) -> float:
    """Over rows of V words, where every wave is filled."""
    by_memory = rows * V * bytes_per_word / COPY_BYTES_PER_S
    by_instructions = rows * V * slots_per_word / (MULTIPROCESSORS * LANES * HERTZ)
    return max(by_memory, by_instructions)


def chunks_of_loss(rows: int) -> int:
    return -(-rows // rows_of_chunk(rows, 2 * V, WORKSPACE_BYTES["cuda"]))


def loss_against_products(counts: RowCounts, rows: int, D: int) -> tuple[float, float]:
    """Seconds of a training step's head and loss, and how many times the three products' alone."""
    chunks = chunks_of_loss(rows)
    products = 3 * 2 * rows * V * D / PRODUCT_FLOP_PER_S
    passes = seconds_of_pass(rows, 4, counts.reading + counts.writing) / filled(rows / chunks, 1)
    sums = (2 * chunks - 1) * V * D * 4 / COPY_BYTES_PER_S  # grad_weight in fp32, read and written
    return products + passes + sums, (products + passes + sums) / products


def seconds_of_scores(counts: RowCounts, backend: str, rows: int, bytes_per_word: int) -> float:
    """Of rows of logits. The programs of less than a wave wait for the memory."""
    threads, programs = SCORING[backend]
    at_once = min(REGISTERS // (-(-counts.registers // 8) * 8 * threads), THREADS // threads)
    seconds = seconds_of_pass(rows, bytes_per_word, counts.reading)
    if rows * programs < at_once * MULTIPROCESSORS:
        return max(seconds, V * bytes_per_word / programs / ROW_BYTES_PER_S)
    return seconds / filled(rows * programs, at_once)


def scores_against_copy(counts: RowCounts, backend: str) -> tuple[float, float]:
    """Seconds of the scores of rows of bf16 logits, and the share of a copy's speed at which they are read."""
    seconds = seconds_of_scores(counts, backend, SCORED_ROWS, 2)
    return seconds, SCORED_ROWS * V * 2 / COPY_BYTES_PER_S / seconds


class Range(NamedTuple):
    """Seconds, where programs on a multiprocessor always overlap and where they never do."""

    least: float
    most: float


def seconds_of_tiles(counts: TileCounts | HeadCounts, tiles: float, programs: int, flop: float,
                     instructions: float, cached_bytes: float = 0) -> Range:
    """flop, instructions of a warp and bytes that the products read from the L2 cache: of a tile."""
    at_once = programs_at_once(counts)
    multiplying = max(flop / PRODUCT_FLOP_PER_S, cached_bytes / CACHE_BYTES_PER_S) * MULTIPROCESSORS
    issuing = instructions * counts.warps * 32 / (LANES * HERTZ)
    share = tiles / MULTIPROCESSORS / filled(programs, at_once)
    alone = multiplying + issuing
    return Range(share * max(multiplying, issuing, alone / at_once), share * alone)


def programs_of(name: str, counts: TileCounts) -> int:
    """Of a kernel at the shapes of the benchmarks of its mask."""
    kernel, mask, E = name.split()
    queries, keys = next(heads[:2] for heads in HEADS.values() if heads[2] == int(E))
    if kernel == "few":  # heads of a group share tiles of queries, which they may not fill
        rows, length, _ = CACHED
        return rows * keys * -(-length * queries // keys // counts.rows)
    positions = next(task[1] for task in ATTENTION.values() if task[0] == mask)
    return positions // counts.columns * keys if kernel == "key_gradient" else positions // counts.rows * queries


def seconds_of_attention(counts: dict[str, TileCounts], task: str, heads: tuple[int, int, int], kernel: str) -> Range:
    mask, _, pairs, _ = ATTENTION[task]
    name = f"{kernel} {mask} {heads[2]}"
    found = counts[name]
    area = found.rows * found.columns
    return seconds_of_tiles(found, pairs * heads[0] / area, programs_of(name, found),
                            PRODUCTS[kernel] * 2 * area * heads[2], found.instructions)


def seconds_of_decoding(counts: dict[str, TileCounts], heads: tuple[int, int, int]) -> Range:
    """Keys and values are read at a copy's speed."""
    rows, _, length = CACHED
    name = f"few blocks {heads[2]}"
    found, programs = counts[name], programs_of(name, counts[name])
    computing = seconds_of_tiles(found, programs * length / found.columns, programs,
                                 2 * 2 * found.rows * found.columns * heads[2], found.instructions)
    reading = 2 * rows * length * heads[1] * heads[2] * 2 / COPY_BYTES_PER_S
    return Range(*(SETS * max(seconds, reading) for seconds in computing))


def head_in_tiles(counts: HeadCounts, rows: int, D: int) -> Range:
    """Seconds of the scores of rows of bf16 hidden states at temperature 0, in Triton: a program for each tile."""
    tiles = -(-rows // counts.rows) * -(-V // counts.words)
    found = seconds_of_tiles(counts, tiles, tiles, 2 * counts.rows * counts.words * D,
                             counts.instructions + counts.step_instructions * D / counts.inner,
                             2 * (counts.rows + counts.words) * D)
    return Range(*(max(seconds, reading_of_head(D)) for seconds in found))


def reading_of_head(D: int) -> float:
    return V * D * 2 / COPY_BYTES_PER_S


def head_by_products(counts: RowCounts, rows: int, D: int, bytes_per_logit: int = 4) -> float:
    """Seconds of the same by cuBLAS, which writes the logits, and the CUDA C++ pass over them."""
    products = max(reading_of_head(D), 2 * -(-rows // 128) * 128 * V * D / PRODUCT_FLOP_PER_S)
    writing = rows * V * bytes_per_logit / COPY_BYTES_PER_S
    return products + writing + seconds_of_scores(counts, "cuda", rows, bytes_per_logit)


def counts_by_nvcc() -> dict[str, Counts]:
    counts, = (counts for compiler, counts in read().items() if compiler.startswith("nvcc"))
    return counts


def counts_by_triton() -> dict[str, dict[str, Counts]]:
    return {compiler: counts for compiler, counts in read().items() if compiler.startswith("Triton")}


def row_passes() -> list[tuple[str, str, str, str, str]]:
    """Task, prediction, what is wanted, counts, and the benchmark that measures it, if one does."""
    found = []
    for compiler, counts in sorted(read().items(), key=lambda item: (item[0].startswith("Triton"), item[0])):
        ours, loss = "cuda" if compiler.startswith("nvcc") else "triton", counts["loss"]
        for shape, (rows, D) in LOSS_SHAPES.items():
            (seconds, ratio), chunks = loss_against_products(loss, rows, D), chunks_of_loss(rows)
            measured = f"bench_gpu_masked_cross_entropy.py::bench_against_the_products_alone[{shape}-counted]"
            found.append((
                f"{compiler}: head and loss, {shape}, {rows:,} corrupted positions, forward and backward",
                f"{1e3 * seconds:.1f} ms, {ratio:.2f} times the products alone", f"at most {LOSS_AT_MOST}",
                f"{loss.reading} + {loss.writing} instructions and 4 bytes a word, {loss.registers} registers; "
                f"{3 * chunks} products and {chunks} row passes", measured if ours == "cuda" else ""))
        for name, temperature in (("scores", "0.0"), ("scores sampled", "0.7")):
            if name in counts:
                seconds, share = scores_against_copy(counts[name], ours)
                found.append((
                    f"{compiler}: token and probability of {SCORED_ROWS:,} rows of logits, temperature {temperature}",
                    f"{1e3 * seconds:.2f} ms, {share:.0%} of a copy's speed", f"at least {SCORES_AT_LEAST:.0%}",
                    f"{counts[name].reading} instructions and 2 bytes a word, {counts[name].registers} registers; "
                    f"{LAUNCHES[ours]} launches a step",
                    f"bench_gpu_topk_unmask.py::bench_logits_against_the_memory[{ours}-{SCORED_ROWS}-{temperature}]"))
        found += head_by_nvcc(compiler, counts["scores"]) if ours == "cuda" else head_by_triton(compiler, counts)
    return found


def head_by_nvcc(compiler: str, counts: RowCounts) -> list[tuple[str, str, str, str, str]]:
    found = []
    for D, least in HEAD_AT_LEAST.items():
        seconds, rounded = (head_by_products(counts, SCORED_ROWS, D, size) for size in (4, 2))
        found.append((
            f"{compiler}: a product, then token and probability of {SCORED_ROWS:,} rows of hidden states of {D:,}",
            f"{1e3 * seconds:.2f} ms, {rounded / seconds:.2f} times as fast as with logits rounded to bf16",
            f"at least {least}", "4 bytes a word, written and read",
            f"bench_gpu_topk_unmask.py::bench_head_against_product_then_logits[{D}-{least}-{SCORED_ROWS}-0.0]"))
    return found


def head_by_triton(compiler: str, kernels: dict[str, Counts]) -> list[tuple[str, str, str, str, str]]:
    """Few rows, and many of which only the GPU knows which are asked for."""
    found = []
    for D in HEAD_AT_LEAST:
        for rows, times, measured in ((FEW, SETS, f"bench_gpu_topk_unmask.py::bench_head_of_one_block[{D}-0.0]"),
                                      (SCORED_ROWS, 1, "")):
            counts = kernels[f"head {min(rows, 128)}"]
            seconds = head_in_tiles(counts, rows, D)
            known = head_by_products(counts_by_nvcc()["scores"], rows, D)
            found.append((
                f"{compiler}: {f'{times} times ' * (times > 1)}token and probability of {rows:,} rows of hidden states "
                f"of {D:,}",
                f"{span(f'{1e3 * times * x:.3g}' for x in seconds)} ms, "
                f"{span(f'{known / x:.2f}' for x in reversed(seconds))} times as fast as a product, then scores",
                f"at most {FEW_AT_MOST} times reading the head" if measured else "-",
                f"{counts.instructions} + {D // counts.inner} x {counts.step_instructions} instructions per tile of "
                f"{counts.words} words x {counts.rows} rows, {programs_at_once(counts)} at once with "
                f"{counts.registers} registers, N {counts.smallest_n}; {LAUNCHES['head']} launches a step", measured))
    return found


def attention_tasks() -> list[tuple[str, ...]]:
    """Task, prediction by each Triton, what is wanted, and the benchmark that measures it."""
    found = []
    for shape, heads in HEADS.items():
        for task, (_, _, pairs, benchmark) in ATTENTION.items():
            for direction, needed, wanted in zip(NEEDED, NEEDED.values(), WANTED[task], strict=True):
                cells, kernels = [], ["forward"] if direction == "forward" else [*PRODUCTS]
                for counts in counts_by_triton().values():
                    parts = [seconds_of_attention(counts, task, heads, kernel) for kernel in kernels]
                    seconds = Range(*map(sum, zip(*parts, strict=True)))
                    flop = needed * 2 * pairs * heads[0] * heads[2]
                    rates = (f"{flop / x / 1e12:.0f}" for x in reversed(seconds))
                    cells.append(f"{span(f'{1e3 * x:.3g}' for x in seconds)} ms, {span(rates)} TFLOP/s")
                found.append((f"{task}, heads of {shape}, {direction.replace('_', ' and ')}", *cells, wanted,
                              f"bench_gpu_attention.py::{benchmark.format(f'{shape}-{direction}')}"))
        ranges = [seconds_of_decoding(counts, heads) for counts in counts_by_triton().values()]
        rows, queries, length = CACHED
        found.append((f"decoding {SETS} times, {queries} queries and {length:,} keys in {rows} rows, heads of {shape}",
                      *(f"{span(f'{1e3 * x:.3g}' for x in seconds)} ms" for seconds in ranges), "-",
                      f"bench_gpu_attention.py::bench_decoding[triton-chosen_by_torch-{shape}]"))
    return found


def span(values: Iterable[str]) -> str:
    return " to ".join(dict.fromkeys(values))


def attention_kernels() -> list[tuple[str, ...]]:
    """Kernel with mask and head size, its tile, and what each Triton makes of it."""
    found: dict[str, list[str]] = {}
    for kernels in counts_by_triton().values():
        for name, counts in kernels.items():
            if isinstance(counts, TileCounts):
                at_once = programs_at_once(counts)
                tile = f"{counts.rows} x {counts.columns}, {32 * counts.warps} threads"
                found.setdefault(name, [name, tile]).append(
                    f"{at_once} ({counts.registers} registers, {counts.shared >> 10} KiB), "
                    f"{filled(programs_of(name, counts), at_once):.0%}; {counts.instructions}; {counts.smallest_n}; "
                    f"{' and '.join(map(str, counts.load_bytes))}")
    return [tuple(row) for row in found.values()]


def main() -> int:
    for line in (*row_passes(), *attention_tasks(), *attention_kernels()):
        print("; ".join(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
