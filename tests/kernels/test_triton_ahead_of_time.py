"""Every Triton kernel, compiled to machine code for Ampere, Hopper and Blackwell without a GPU: what it spills.

Run as a program, it compiles them and prints what came out: not in the process of the tests, where Triton may be set to
interpret.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a program can have, by compute capability * 10
# Of the arguments, by name; one without an entry points to fp32. "data" points to the operation's dtype.
DATA = {"bias", "g", "grad_hidden", "grad_logits", "hidden", "logits", "weight"}
POINTERS = {"corrupted": "*i1", "count": "*i64", "rows": "*i64", "targets": "*i32"}
MULTIPLES_OF_16 = {"D", "N", "V", "hidden_stride", "logits_stride", "size", "span", "start", "weight_stride", "width"}
NUMBERS = MULTIPLES_OF_16 | {"column_tiles", "group", "row_tiles", "splits"}
OPTIONAL = {"bias", "softcap"}


def cases():
    """Name, dtype, kernel, settings, and the arguments that are None."""
    from dllm_kernels.masked_cross_entropy import triton_kernels as loss

    for dtype, size in (("bf16", 2), ("fp32", 4)):
        rows = {"row_statistics": loss.ROW, "row_gradient": loss.ROW, "grad_bias": loss.GRAD_BIAS}
        for name, chosen in (rows | loss.TILES[size]).items():
            kernel = getattr(loss, f"_{name}_kernel")
            yield name, dtype, kernel, chosen, set()
            if OPTIONAL & {*kernel.arg_names}:
                yield name, dtype, kernel, chosen, OPTIONAL & {*kernel.arg_names}


def compile_all() -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = []
    for name, dtype, kernel, chosen, absent in cases():
        signature, attributes = {}, {}
        constants = {key: value for key, value in chosen.items() if not key.startswith("num_")} | dict.fromkeys(absent)
        for place, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument in NUMBERS or argument == "softcap":
                signature[argument] = "fp32" if argument == "softcap" else "i32"
            else:
                signature[argument] = f"*{dtype}" if argument in DATA else POINTERS.get(argument, "*fp32")
            if argument in MULTIPLES_OF_16 or signature[argument].startswith("*"):
                attributes[(place,)] = [["tt.divisibility", 16]]
        for capability in SHARED_BYTES:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
            options = {key: value for key, value in chosen.items() if key.startswith("num_")}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True,
                                       check=True).stdout
            registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
            found.append({"kernel": name, "dtype": dtype, "without": sorted(absent), "capability": capability,
                          "registers": registers, "stack": stack, "shared": compiled.metadata.shared,
                          "wgmma": "wgmma.mma_async" in compiled.asm["ptx"]})
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    pytest.importorskip("triton.backends.nvidia")
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_no_kernel_spills_registers(compiled):
    assert compiled and not [x for x in compiled if x["stack"]]


@pytest.mark.slow
def test_shared_memory_fits(compiled):
    assert not [x for x in compiled if x["shared"] > SHARED_BYTES[x["capability"]]]


@pytest.mark.slow
def test_products_use_the_tensor_cores_of_hopper(compiled):
    products = ("statistics", "gradient", "grad_hidden", "grad_weight")
    hopper = [x for x in compiled if x["kernel"] in products and x["capability"] == 90 and x["dtype"] == "bf16"]
    assert len(hopper) == 6 and all(x["wgmma"] for x in hopper)


if __name__ == "__main__":
    print(json.dumps(compile_all()))
