"""Every Triton kernel, compiled to machine code for Ampere, Hopper and Blackwell without a GPU: what it spills.

By the Triton that is installed and by 3.6, which comes with torch 2.11 (`make .venv/triton-3.6` puts it there); and,
one variant of each kernel, for AMD's MI300, where nothing has been run. As a program (with "cuda" or "hip"), this
file compiles and prints what came out: not in the process of the tests, where Triton may be set to interpret.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = Path(sys.prefix, "triton-3.6")
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a program can have, by compute capability * 10
# Of the arguments, by name; one without an entry points to fp32. "data" points to the operation's dtype.
DATA = {"bias", "dk", "dout", "dq", "dv", "g", "grad_hidden", "grad_logits", "hidden", "inputs", "key", "logits", "out",
        "query", "value", "weight"}
IN_FP32 = {("attention_parts", "out")}  # though data elsewhere
POINTERS = {
    "allowed": "*i32", "cache_rows": "*i64", "committed": "*i1", "corrupted": "*i1", "count": "*i64",
    "cu_seqlens": "*i32", "cuts": "*i32", "filled": "*i64", "ids": "*i32", "k": "*i64", "key_mask": "*i1",
    "lasts": "*i32", "listed": "*i64", "masked": "*i1", "numbers": "*fp64", "position": "*i64",
    "rows": "*i64", "sequence": "*i64", "step_pointer": "*i64", "targets": "*i32", "tile_counts": "*i32",
    "tiles": "*i32", "token": "*i64", "tokens": "*i64", "uniform": "*fp64", "written": "*i8"}
MULTIPLES_OF_16 = {"D", "N", "V", "hidden_stride", "inputs_stride", "logits_stride", "size", "span", "start",
                   "weight_stride", "width"}
NUMBERS = dict.fromkeys(
    MULTIPLES_OF_16 | {"L", "R", "allowed_stride", "blocks", "column_tiles", "group", "high", "low", "mask_token_id",
                       "n", "position_stride0", "position_stride1", "row_tiles", "sequence_stride0",
                       "sequence_stride1", "share", "splits", "step", "top_k"}, "i32")
NUMBERS |= dict.fromkeys({"Lk", "Lq", "T", "documents", "heads"} | {
    f"{name}_{dimension}" for name in "qkv" for dimension in ("batch", "row", "head")}, "i32")
NUMBERS |= dict.fromkeys(("scale", "softcap", "temperature", "threshold"), "fp32")
NUMBERS |= dict.fromkeys(("temperature_bits", "top_p_bits"), "i64")
OPTIONAL = {"bias", "softcap"}
SKIPPING = {"limits", "tile_counts", "tiles", "written"}  # of masked cross-entropy, without skip_below


def cases():
    """Name, dtype, kernel, settings, the arguments that are None, and compute capabilities (all if none is given)."""
    from dllm_kernels.masked_cross_entropy import triton_kernels as loss

    for dtype, size in (("bf16", 2), ("fp32", 4)):
        rows = {"row_statistics": loss.ROW, "row_gradient": loss.ROW, "grad_bias": loss.GRAD_BIAS}
        outer = loss.TILES[size]["gradient"]
        for name, chosen in (rows | loss.TILES[size]).items():
            kernel = getattr(loss, f"_{name}_kernel")
            if name.startswith("grad_"):
                chosen = chosen | {"TILE_ROWS": outer["ROWS"], "TILE_WORDS": outer["WORDS"]}
            skipping, optional = SKIPPING & {*kernel.arg_names}, OPTIONAL & {*kernel.arg_names}
            for absent in (skipping, *([skipping | optional] if optional else [])):
                yield name, dtype, kernel, chosen, absent
            if skipping:
                yield name, dtype, kernel, chosen | loss.LISTED[size].get(name, {}), set()
    yield from unmask_cases()
    yield from attention_cases()


def unmask_cases():
    from dllm_kernels.topk_unmask import triton_kernels as unmask

    filters, greedy = {"cuts", "lasts"}, {"temperature"}
    for dtype, size, shift in (("bf16", 2, 16), ("fp32", 4, 0)):
        plain = {**unmask.BLOCK, "SHIFT": shift, "IDS": False, "MEASURE": "prob", "RAW": False}
        name, kernel = "unmask_statistics", unmask._statistics_kernel
        yield name, dtype, kernel, plain | {"IDS": True}, filters | greedy | {"rows", "allowed"}
        yield name, dtype, kernel, plain, filters | {"allowed"}
        yield name, dtype, kernel, plain | {"MEASURE": "margin", "IDS": True}, greedy
        yield name, dtype, kernel, plain | {"MEASURE": "entropy"}, set()
        yield name, dtype, kernel, plain | {"MEASURE": "margin", "RAW": True}, filters
        yield "unmask_cut", dtype, unmask._cut_kernel, {**unmask.CUT, "SHIFT": shift, "BLOCKS": 64}, set()
        tiles = unmask.TILES[size]["linear"]
        for measure, raw, ids, absent in (
                ("prob", False, True, greedy | {"allowed", "bias"}), ("entropy", False, False, {"allowed"}),
                ("margin", False, True, greedy), ("entropy", True, False, set()), ("margin", True, False, set())):
            words = tiles["WORDS"] if "allowed" in absent else unmask.NARROW[size]
            chosen = {**tiles, "WORDS": words, "IDS": ids, "MEASURE": measure, "RAW": raw}
            yield "unmask_linear_statistics", dtype, unmask._linear_statistics_kernel, chosen, absent
        yield "unmask_linear_logits", dtype, unmask._linear_logits_kernel, tiles, set()
        for confidence in ("prob", "margin", "entropy", "random"):
            name, kernel, head = "unmask_choose", unmask._choose_kernel, {"weight", "bias"}
            chosen = {"CONFIDENCE": confidence, "RAW": confidence != "random", "SHIFT": shift}
            from_logits = chosen | {**unmask.CHOOSE["logits"], "BLOCKS": 64, "WORDS": unmask.BLOCK["WORDS"]}
            from_hidden = chosen | {**unmask.CHOOSE["linear"], "BLOCKS": 512, "WORDS": unmask.SAMPLED}
            yield name, dtype, kernel, from_logits, head
            yield name, dtype, kernel, from_logits, filters | head | greedy
            yield name, dtype, kernel, from_hidden, filters
            yield name, dtype, kernel, from_hidden, filters | greedy
    yield "unmask_list", "i64", unmask._list_kernel, unmask.POSITIONS, set()
    yield "unmask_find_rows", "i64", unmask._find_rows_kernel, unmask.POSITIONS | {"PACKED": True}, set()
    for absent in (set(), {"temperature_bits", "uniform", "threshold"}):
        yield "unmask_commit", "fp32", unmask._commit_kernel, unmask.COMMIT, absent
    for absent in (set(), {"step_pointer"}):
        yield "unmask_philox", "fp64", unmask._philox_kernel, unmask.POSITIONS, absent


def attention_cases():
    """Heads of 64 and 128 in bf16 for Hopper alone: all sizes, dtypes and architectures take six minutes."""
    from dllm_kernels.attention import triton_kernels as attention

    unused = {"key_mask", "cache_rows"}
    masks = [("blocks", {"cu_seqlens"}), ("diffusion", unused), ("all", unused)]
    for E in (64, 128):
        for name, chosen in attention.TILES[2, E].items():
            few, sizes = name == "few", {"E": E, "EP": E, "GROUP": 7}
            kernel = attention._forward_kernel if few else getattr(attention, f"_{name}_kernel")
            for mask, absent in masks[:1] if few else masks:
                settings = sizes | {"MASK": mask} | ({"PACKED": few} if few or name == "forward" else {})
                for label in (name, "parts") if few else (name,):
                    yield f"attention_{label}", "bf16", kernel, settings | chosen, absent & {*kernel.arg_names}, 90
        yield "attention_combine", "bf16", attention._combine_kernel, {"E": E, "EP": E, **attention.COMBINE}, set(), 90


def compile_one(target, name, dtype, kernel, chosen, absent):
    import triton
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    constants = {key: value for key, value in chosen.items() if not key.startswith("num_")} | dict.fromkeys(absent)
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in NUMBERS:
            signature[argument] = NUMBERS[argument]
        else:
            data = argument in DATA and (name, argument) not in IN_FP32
            signature[argument] = f"*{dtype}" if data else POINTERS.get(argument, "*fp32")
        if argument in MULTIPLES_OF_16 or signature[argument].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {key: value for key, value in chosen.items() if key.startswith("num_")}
    return triton.compile(source, target=target, options=options)


def compile_for_amd() -> dict[str, int]:
    """Bytes of shared memory of one variant of each kernel."""
    from triton.backends.compiler import GPUTarget

    shared = {}
    for name, dtype, *rest in cases():
        if f"{name} {dtype}" not in shared:
            compiled = compile_one(GPUTarget("hip", "gfx942", 64), name, dtype, *rest[:3])
            assert compiled.asm["hsaco"]
            shared[f"{name} {dtype}"] = compiled.metadata.shared
    return shared


def compile_all() -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = []
    for name, dtype, kernel, chosen, absent, *capabilities in cases():
        for capability in capabilities or SHARED_BYTES:
            compiled = compile_one(GPUTarget("cuda", capability, 32), name, dtype, kernel, chosen, absent)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True,
                                       check=True).stdout
            registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
            found.append({"kernel": name, "dtype": dtype, "without": sorted(absent), "capability": capability,
                          "settings": {key: value for key, value in chosen.items() if not key.startswith("num_")},
                          "registers": registers, "stack": stack, "shared": compiled.metadata.shared,
                          "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
                          "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"]))})
    return found


@pytest.fixture(scope="module")
def compile_apart(tmp_path_factory):
    """(maker, Triton) -> what this file, as a program, compiles for a maker's GPUs; all begun at once."""
    pytest.importorskip("triton.backends")
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def compile_(maker: str, paths: list[Path]):
        environment = {**plain, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))),
                       "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
        done = subprocess.run([sys.executable, __file__, maker], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        begun = {("cuda", "installed"): pool.submit(compile_, "cuda", [])}
        if OLDEST.is_dir():
            begun["cuda", "3.6"] = pool.submit(compile_, "cuda", [OLDEST])
        begun["hip", "installed"] = pool.submit(compile_, "hip", [])
        yield lambda maker, version: begun[maker, version].result()


@pytest.fixture(scope="module", params=["installed", "3.6"])
def compiled(request, compile_apart) -> list[dict]:
    if request.param == "3.6" and not OLDEST.is_dir():
        pytest.skip("Triton 3.6 is not there to compile with; make .venv/triton-3.6 puts it there")
    return [x | {"oldest": request.param == "3.6"} for x in compile_apart("cuda", request.param)]


@pytest.mark.slow
def test_no_kernel_spills_registers(compiled):
    """Triton 3.6: a few of the unmasking's, four registers at most."""
    assert compiled and not [x for x in compiled if x["stack"] > (16 if x["oldest"] else 0)]


@pytest.mark.slow
def test_kernels_compile_for_amd(compile_apart):
    """Without having run there. What has more shared memory than an MI300 would need smaller tiles."""
    found = compile_apart("hip", "installed")
    too_large = {name.split()[0] for name, shared in found.items() if shared > 64 << 10}
    assert len(found) > 30 and too_large == {"grad_weight"}


@pytest.mark.slow
def test_shared_memory_fits(compiled):
    assert not [x for x in compiled if x["shared"] > SHARED_BYTES[x["capability"]]]


@pytest.mark.slow
def test_products_use_the_tensor_cores_of_hopper(compiled):
    products = ("statistics", "gradient", "grad_hidden", "grad_weight")
    hopper = [x for x in compiled if x["kernel"] in products and x["capability"] == 90 and x["dtype"] == "bf16"]
    assert len(hopper) == 9 and all(x["wgmma"] for x in hopper)
    products = ("unmask_linear_statistics", "unmask_linear_logits")
    hopper = [x for x in compiled if x["kernel"] in products and x["capability"] == 90 and x["dtype"] == "bf16"]
    assert len(hopper) == 6 and all(x["wgmma"] for x in hopper)


@pytest.mark.slow
def test_attention_uses_the_tensor_cores_of_hopper_and_reads_sixteen_bytes_at_a_time(compiled):
    found = [x for x in compiled if x["kernel"].startswith("attention") and x["kernel"] != "attention_combine"]
    assert len(found) == 22 and all(x["wgmma"] and x["wide_loads"] for x in found)


@pytest.mark.slow
def test_logits_are_read_sixteen_bytes_at_a_time(compiled):
    # A thread of `unmask_statistics` reads 16 words of a block.
    loads = {"unmask_statistics": {"bf16": 2, "fp32": 4}, "unmask_cut": {"bf16": 2, "fp32": 4}}
    readers = [x for x in compiled if x["kernel"] in loads]
    assert len(readers) == 36 and all(x["wide_loads"] >= loads[x["kernel"]][x["dtype"]] for x in readers)


if __name__ == "__main__":
    print(json.dumps({"cuda": compile_all, "hip": compile_for_amd}[sys.argv[1]]()))
