"""The program that compiles every Triton kernel to machine code without a GPU, and prints what came out.

With "every" or "one" for NVIDIA, by the Triton that is imported; with "hip" one variant of each kernel for AMD's MI300,
where nothing has been run. Of those that benchmarks/machine_code.json has counts of, it counts the machine code.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a program can have, by compute capability * 10
# Of the arguments, by name; one without an entry points to fp32. "data" points to the operation's dtype.
DATA = {"bias", "dk", "dout", "dq", "dv", "grad_logits", "hidden", "inputs", "key", "logits", "out", "p",
        "query", "teacher", "value", "weight"}
IN_FP32 = {("attention_parts", "out")}  # though data elsewhere
POINTERS = {
    "allowed": "*i32", "argmax": "*i64", "cache_rows": "*i64", "committed": "*i1", "corrupted": "*i1", "count": "*i64",
    "cu_seqlens": "*i32", "cuts": "*i32", "filled": "*i64", "ids": "*i32", "k": "*i64", "key_mask": "*i1",
    "lasts": "*i32", "live": "*i64", "listed": "*i64", "masked": "*i1", "numbers": "*fp64", "position": "*i64",
    "rows": "*i64", "s": "*fp64", "sequence": "*i64", "step_pointer": "*i64", "t": "*fp64", "targets": "*i32",
    "token": "*i64", "tokens": "*i64", "uniform": "*fp64"}
MULTIPLES_OF_16 = {"D", "N", "V", "hidden_stride", "logits_stride", "size", "start", "teacher_stride", "weight_stride",
                   "width", "z_stride"}
NUMBERS = dict.fromkeys(
    MULTIPLES_OF_16 | {"C", "L", "R", "allowed_stride", "blocks", "high", "low", "mask_token_id",
                       "n", "position_stride0", "position_stride1", "row_tiles", "sequence_stride0",
                       "sequence_stride1", "share", "slabs", "splits", "step", "tiles", "top_k"}, "i32")
NUMBERS |= dict.fromkeys({"Lk", "Lq", "T", "documents", "heads"} | {
    f"{name}_{dimension}" for name in "qkv" for dimension in ("batch", "row", "head")}, "i32")
NUMBERS |= dict.fromkeys(("scale", "softcap", "temperature", "threshold"), "fp32")
NUMBERS |= dict.fromkeys(("temperature_bits", "top_p_bits"), "i64")
PRODUCTS = {"unmask_linear"}


def cases():
    """Name, dtype, kernel, settings, the arguments that are None, and compute capabilities (all if none is given)."""
    from dllm_kernels.masked_cross_entropy import triton_kernels as loss

    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for absent in (set(), {"softcap"}):
            yield "row_statistics", dtype, loss._row_statistics_kernel, loss.ROW, absent
            yield "row_gradient", dtype, loss._row_gradient_kernel, loss.ROW, absent
            for gradient in (False, True):
                chosen = loss.CHUNK[size] | {"GRADIENT": gradient, "CLEAR": gradient}
                missing = absent | (set() if gradient else {"live", "probability_scale"})
                yield "chunk", dtype, loss._chunk_kernel, chosen, missing
        yield "kl", dtype, loss._kl_kernel, loss.CHUNK[size] | {"GRADIENT": True, "CLEAR": True}, set()
    yield from unmask_cases()
    yield from denoiser_cases()
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
        tiles, few = unmask.TILES[size]["linear"], unmask.TILES[size]["few"] | {"ROWS": 32}
        for chosen, measure, raw, ids, absent in (
                (few, "prob", False, True, greedy | {"allowed", "bias", "logits"}), (few, "margin", True, False, set()),
                (few | {"ROWS": 64}, "entropy", True, False, set()),
                (few | {"ROWS": 16}, "margin", False, True, greedy),
                (tiles, "prob", False, True, greedy | {"allowed", "bias", "logits"}),
                (tiles, "entropy", False, False, {"allowed"}), (tiles, "margin", False, True, greedy),
                (tiles, "entropy", True, False, set()), (tiles, "prob", False, False, {"stats", "ids"})):
            chosen = {**chosen, "IDS": ids, "MEASURE": measure, "RAW": raw}
            yield "unmask_linear", dtype, unmask._linear_kernel, chosen, absent
        for i, confidence in enumerate(("prob", "margin", "entropy", "random")):
            chosen = {**unmask.CHOOSE, "CONFIDENCE": confidence, "RAW": confidence != "random", "SHIFT": shift}
            from_logits = chosen | {"BLOCKS": 64, "WORDS": unmask.BLOCK["WORDS"]}
            from_hidden = chosen | {"BLOCKS": 2048, "WORDS": tiles["WORDS"]}
            name, kernel, sampled = "unmask_choose", unmask._choose_kernel, i % 2 == 0  # every two of these meet
            yield name, dtype, kernel, from_logits, set() if sampled else filters | greedy
            yield name, dtype, kernel, from_hidden, filters | (greedy if sampled else set())
    yield "unmask_list", "i64", unmask._list_kernel, unmask.POSITIONS, set()
    yield "unmask_find_rows", "i64", unmask._find_rows_kernel, unmask.POSITIONS | {"PACKED": True}, set()
    for absent in (set(), {"temperature_bits", "uniform", "threshold"}):
        yield "unmask_commit", "fp32", unmask._commit_kernel, unmask.COMMIT, absent
    for absent in (set(), {"step_pointer"}):
        yield "unmask_philox", "fp64", unmask._philox_kernel, unmask.POSITIONS, absent


def denoiser_cases():
    from dllm_kernels.denoiser_statistics import triton_kernels as denoiser

    slab = {"WORDS": denoiser.WORDS, "TILES": denoiser.TILES}
    for dtype in ("bf16", "fp32"):
        for absent in (set(), {"softcap"}, {"p"}):
            yield "denoiser_slab", dtype, denoiser._slab_kernel, slab | denoiser.SLAB, absent
        yield "denoiser_choose", dtype, denoiser._choose_kernel, slab | denoiser.CHOOSE | {"BLOCKS": 2048}, set()


def attention_cases():
    """Heads of 64 and 128 in bf16 for Hopper alone: all sizes, dtypes and architectures take six minutes."""
    from dllm_kernels.attention import triton_kernels as attention

    unused = {"key_mask", "cache_rows"}
    masks = [("blocks", {"cu_seqlens"}), ("diffusion", unused), ("causal", unused), ("all", unused)]
    for E in (64, 128):
        for name, chosen in (attention.TILES | attention.BY_ARCHITECTURE["sm_90"])[2, E].items():
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


def counted_as(name: str, dtype: str, chosen: dict, absent: set[str]) -> str | None:
    """The name of a variant's counts for Hopper in benchmarks/machine_code.json, None if it has none."""
    if dtype != "bf16":
        return None
    if name == "chunk" and chosen["GRADIENT"] and "softcap" in absent:
        return "loss"
    if name == "unmask_statistics" and chosen["MEASURE"] == "prob":
        return "scores" if "temperature" in absent else "scores sampled"
    if name == "unmask_linear" and chosen["MEASURE"] == "prob" and "logits" in absent:
        return f"head {chosen['ROWS']}"
    if name == "attention_few" or chosen.get("MASK") in ("all", "diffusion"):
        return f"{name.removeprefix('attention_')} {chosen['MASK']} {chosen['E']}"
    return None


def compile_all(each_for: str) -> list[dict]:
    """Each variant for one compute capability: products and what is counted for Hopper, the others in turn.

    With "every" the first variant of each kernel and dtype is compiled for all of them.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from benchmarks import machine_code

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found, seen = [], set()
    for i, (name, dtype, kernel, chosen, absent, *capabilities) in enumerate(cases()):
        label = counted_as(name, dtype, chosen, absent)
        if not capabilities and (each_for == "one" or (name, dtype) in seen):
            capabilities = [90 if name in PRODUCTS or label else [*SHARED_BYTES][i % len(SHARED_BYTES)]]
        seen.add((name, dtype))
        for capability in capabilities or SHARED_BYTES:
            compiled = compile_one(GPUTarget("cuda", capability, 32), name, dtype, kernel, chosen, absent)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage, code = (subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True,
                                              check=True).stdout if wanted else "" for option, wanted in (
                    ("-res-usage", True), ("-sass", label and capability == 90)))
            registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
            counts = None
            if code:
                counts = (machine_code.product_counts(code, chosen, registers, compiled.metadata.shared)
                          if "HGMMA" in code else machine_code.row_counts(code, registers))._asdict()
            found.append({"kernel": name, "dtype": dtype, "without": sorted(absent), "capability": capability,
                          "compiler": f"Triton {triton.__version__}", "counts": counts,
                          "counted_as": label if code else None,
                          "settings": {key: value for key, value in chosen.items() if not key.startswith("num_")},
                          "registers": registers, "stack": stack, "shared": compiled.metadata.shared,
                          "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
                          "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"]))})
    return found


if __name__ == "__main__":
    print(json.dumps(compile_for_amd() if sys.argv[1] == "hip" else compile_all(sys.argv[1])))
