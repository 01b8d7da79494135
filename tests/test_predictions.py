"""What is counted in a listing of machine code, and how many programs a multiprocessor of an H200 takes."""

import pytest

from benchmarks import machine_code, predict


def listing(*instructions: str) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/    {text} ;    /* 0x0 */" for i, text in enumerate(instructions))


def test_instructions_per_word_are_those_of_the_loop_that_moves_sixteen_bytes_at_a_time():
    read = ["LDG.E.128 R4, desc[UR4][R2.64]", "MUFU.EX2 R5, R4", "FADD R6, R6, R5", "@P0 BRA 0x{:x}"]
    write = ["LDG.E.128 R4, desc[UR4][R2.64]", "MUFU.EX2 R5, R4", "BRA.U 0x{:x}", "LDG.E.U16 R4, desc[UR4][R2.64]",
             "STG.E.128 desc[UR4][R2.64], R5", "@P0 BRA 0x{:x}"]
    code = ["MOV R1, R2", *read, *write, "EXIT"]
    code[4] = code[4].format(0x10)
    code[7], code[10] = code[7].format(0x90), code[10].format(0x50)  # past the single word, and back to the beginning
    assert machine_code.row_counts(listing(*code), 40) == machine_code.RowCounts(4 / 8, 0.62, 40)  # 5 / 8, rounded
    assert machine_code.row_counts(listing("MOV R1, R2", "EXIT"), 40) == machine_code.RowCounts(0.0, 0.0, 40)


def test_instructions_per_tile_are_those_of_the_shortest_loop_with_products_and_what_surrounds_the_heads():
    inner = ["LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "LDGSTS.E [R1], desc[UR4][R2.64]",
             "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
             "@P0 BRA 0x20"]
    code = listing("MOV R1, R2", "MOV R3, R4", *inner, "MUFU.EX2 R5, R4", "@P1 BRA 0x10", "EXIT", "NOP")
    settings = {"ROWS": 64, "num_warps": 4}
    assert machine_code.product_counts(code, settings | {"COLUMNS": 32}, 100, 2048) == machine_code.TileCounts(
        rows=64, columns=32, instructions=5, smallest_n=32, load_bytes=[4, 16], warps=4, registers=100, shared=2048)
    head = machine_code.product_counts(code, settings | {"WORDS": 128, "INNER": 64}, 100, 2048)
    assert head == machine_code.HeadCounts(64, 128, 64, instructions=5, step_instructions=5, smallest_n=32,
                                           load_bytes=[4, 16], warps=4, registers=100, shared=2048)
    for counts in (head, machine_code.RowCounts(1.5, 0.0, 40)):
        assert machine_code.as_counts(counts._asdict()) == counts


@pytest.mark.parametrize("registers, warps, shared, programs", [
    (168, 4, 56 << 10, 3), (169, 4, 56 << 10, 2), (168, 8, 56 << 10, 1), (32, 4, 1 << 10, 16), (32, 1, 0, 32),
    (40, 4, 100 << 10, 2)])
def test_programs_on_a_multiprocessor_share_registers_memory_and_threads(registers, warps, shared, programs):
    counts = machine_code.TileCounts(64, 64, 300, 64, [16], warps, registers, shared)
    assert predict.programs_at_once(counts) == programs


def test_waves_that_are_not_full_cost_as_much_as_full_ones():
    assert predict.filled(132 * 6, 3) == 1 and predict.filled(132 * 6 + 1, 3) == pytest.approx(793 / (132 * 9))
    counts = machine_code.TileCounts(64, 64, 312, 64, [16], 4, 168, 56 << 10)
    full, more = (predict.seconds_of_tiles(counts, 1e6, programs, 2**20, 312) for programs in (396, 397))
    assert more.most == pytest.approx(full.most * 396 * 2 / 397)
    # 312 instructions of 4 warps on 4 schedulers, and 2**20 operations at 790e12 / 132 a second.
    cycles, product = 312 / 1.755e9, 2**20 * 132 / 790e12
    assert full == pytest.approx((1e6 / 132 * max(cycles, product), 1e6 / 132 * (cycles + product)))
    cached = predict.seconds_of_tiles(counts, 1e6, 396, 2**20, 312, 2**16)
    assert cached.most == pytest.approx(1e6 / 132 * (cycles + 2**16 * 132 / predict.CACHE_BYTES_PER_S))


def test_the_head_by_products_is_as_fast_as_wanted_beside_rounded_logits():
    scores = predict.counts_by_nvcc()["scores"]
    for D, least in predict.HEAD_AT_LEAST.items():
        ours, rounded = (predict.head_by_products(scores, predict.SCORED_ROWS, D, size) for size in (4, 2))
        assert rounded / ours >= least
    # 32 rows of one wave: the head is read once, and a program waits for each 8,192 bytes of its row.
    by_hand = 151_936 * 896 * 2 / 4.3e12 + 32 * 151_936 * 4 / 4.3e12 + 151_936 * 4 / 8192 * 600e-9
    assert predict.head_by_products(scores, 32, 896) == pytest.approx(by_hand)
