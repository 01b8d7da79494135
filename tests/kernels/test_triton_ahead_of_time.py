"""Every Triton kernel, compiled to machine code for Ampere, Hopper and Blackwell without a GPU: what it spills.

By the Triton that is installed and by 3.6, which comes with torch 2.11 (`make .venv/triton-3.6` puts it there); and,
one variant of each kernel, for AMD's MI300, where nothing has been run. In a program of its own (ahead_of_time.py),
because in the process of the tests Triton may be set to interpret.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import machine_code, predict
from tests.compiled import SHELVES, make_once
from tests.kernels.ahead_of_time import PRODUCTS, SHARED_BYTES

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("ahead_of_time.py")
COUNTING = ROOT / "benchmarks" / "machine_code.py"
KERNELS = [*sorted((ROOT / "dllm_kernels").rglob("triton*.py")), ROOT / "dllm_kernels" / "tuned.py"]
OLDEST = Path(sys.prefix, "triton-3.6")


@pytest.fixture(scope="module")
def compile_apart():
    """What the program compiles: a function of "installed", "3.6" and "hip"; all begun at once."""
    triton = pytest.importorskip("triton")
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def compile_(name: str, mode: str, *paths: Path):
        environment = {**plain, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))),
                       "TRITON_CACHE_DIR": str(SHELVES / "triton")}

        def make(folder: Path) -> None:
            done = subprocess.run([sys.executable, PROGRAM, mode], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            (folder / "found.json").write_text(done.stdout)

        made = make_once(f"triton_{name}", make, triton.__version__, PROGRAM, COUNTING, *KERNELS)
        return json.loads((made / "found.json").read_text())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        begun = {"installed": pool.submit(compile_, "installed", "every"), "hip": pool.submit(compile_, "hip", "hip")}
        if OLDEST.is_dir():
            begun["3.6"] = pool.submit(compile_, "3.6", "one", OLDEST)
        yield lambda name: begun[name].result()


@pytest.fixture(scope="module", params=["installed", "3.6"])
def compiled(request, compile_apart) -> list[dict]:
    if request.param == "3.6" and not OLDEST.is_dir():
        pytest.skip("Triton 3.6 is not there to compile with; make .venv/triton-3.6 puts it there")
    return [x | {"oldest": request.param == "3.6"} for x in compile_apart(request.param)]


@pytest.mark.slow
def test_no_kernel_spills_registers(compiled):
    """Triton 3.6: a few of the unmasking's, four registers at most."""
    assert compiled and not [x for x in compiled if x["stack"] > (16 if x["oldest"] else 0)]


@pytest.mark.slow
def test_kernels_compile_for_amd(compile_apart):
    """Without having run there. What has more shared memory than an MI300 would need smaller tiles."""
    found = compile_apart("hip")
    too_large = {name.split()[0] for name, shared in found.items() if shared > 64 << 10}
    assert len(found) > 24 and not too_large


@pytest.mark.slow
def test_shared_memory_fits(compiled):
    assert not [x for x in compiled if x["shared"] > SHARED_BYTES[x["capability"]]]


@pytest.mark.slow
def test_products_use_the_tensor_cores_of_hopper(compiled):
    hopper = [x for x in compiled if x["kernel"] in PRODUCTS and x["capability"] == 90 and x["dtype"] == "bf16"]
    assert len(hopper) == 9 and all(x["wgmma"] for x in hopper)


@pytest.mark.slow
def test_attention_uses_the_tensor_cores_of_hopper_and_reads_sixteen_bytes_at_a_time(compiled):
    found = [x for x in compiled if x["kernel"].startswith("attention") and x["kernel"] != "attention_combine"]
    assert len(found) == 28 and all(x["wgmma"] and x["wide_loads"] for x in found)


@pytest.mark.slow
def test_logits_are_read_sixteen_bytes_at_a_time(compiled):
    # A thread of `unmask_statistics` reads 16 words of a block, as does one of `chunk` in bf16, and 8 in fp32.
    loads = {"unmask_statistics": {"bf16": 2, "fp32": 4}, "unmask_cut": {"bf16": 2, "fp32": 4},
             "chunk": {"bf16": 2, "fp32": 2}, "kl": {"bf16": 4, "fp32": 4}}
    readers = [x for x in compiled if x["kernel"] in loads]
    assert len(readers) == (22 if readers[0]["oldest"] else 38)
    assert all(x["wide_loads"] >= loads[x["kernel"]][x["dtype"]] for x in readers)


@pytest.mark.slow
def test_the_machine_code_allows_what_is_promised_and_the_page_says_what_it_counts(compiled):
    compiler, counts = machine_code.of_triton(compiled)
    for sizes in predict.LOSS_SHAPES.values():
        assert predict.loss_against_products(counts["loss"], *sizes)[1] <= predict.LOSS_AT_MOST
    for name, least in (("scores", 0.65), ("scores sampled", 0.42)):  # not what is wanted: CUDA C++ comes first
        assert predict.scores_against_copy(counts[name], "triton")[1] >= least
    for D in predict.HEAD_AT_LEAST:
        few = predict.head_in_tiles(counts["head 32"], predict.FEW, D)
        assert few.most <= predict.FEW_AT_MOST * predict.reading_of_head(D)
    tiles = {name: x for name, x in counts.items() if isinstance(x, machine_code.TileCounts)}
    assert len(tiles) == 14
    for name, x in tiles.items():
        assert predict.filled(predict.programs_of(name, x), predict.programs_at_once(x)) >= 0.9
        assert x.smallest_n >= 16 and 16 in x.load_bytes
    for heads in predict.HEADS.values():  # at least 45% of a large product's speed, if programs never overlap
        for task, (_, _, pairs, _) in predict.ATTENTION.items():
            seconds = predict.seconds_of_attention(counts, task, heads, "forward").most
            assert 4 * pairs * heads[0] * heads[2] / seconds >= 0.45 * predict.PRODUCT_FLOP_PER_S
    if compiler in machine_code.read():
        assert counts == machine_code.read()[compiler], (
            "python -m tests.kernels.ahead_of_time one > FOUND.json; python -m benchmarks.machine_code FOUND.json; "
            "python -m benchmarks.publish")
