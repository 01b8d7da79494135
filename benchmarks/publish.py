"""python -m benchmarks.publish: write the tables of docs/benchmarks.md from benchmarks/history and benchmarks/results.

Between the two marks nothing is written by hand, and a test compares it with the files.
"""

import json
import sys
from pathlib import Path

from benchmarks import predict
from benchmarks.gate import Run, read_run
from benchmarks.gpu import RESULTS, ROOT, rate_of
from benchmarks.history import HISTORY

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- python -m benchmarks.publish writes what follows -->", "<!-- up to here -->"
NOT_YET = "not measured yet"
VENDORS = {"amd": "AMD", "intel": "Intel"}
# Ours, the baseline, and the benchmarks that compare them.
RATIOS = [
    ("sampling, vocabulary 32,768, 6 layers of 256, 64 new tokens in 16 steps: the same tokens",
     "logits at every position, softmax at every masked one, as Open-dLLM does", ["sampler.py::bench_greedy[32768-6]"]),
    ("sampling, vocabulary 151,936, 2 layers of 256: the same tokens", "the same",
     ["sampler.py::bench_greedy[151936-2]"]),
    ("LLaDA's sampler, vocabulary 126,464, 6 layers of 256, 128 tokens in 32 steps: the same tokens", "its own loop",
     ["sampler.py::bench_llada"]),
    ("the same model, prefix and dual cache, threshold 0.9, blocks of 32: the same tokens", "Fast-dLLM's loop",
     ["sampler.py::bench_fast_dllm[prefix]", "sampler.py::bench_fast_dllm[dual]"]),
    ("SDAR's sampler, blocks of 4, a batch of 8 sequences: the same tokens", "one after the other",
     ["sampler.py::bench_batch[sdar]"]),
    ("LLaDA's sampler with the dual cache, a batch of 8 sequences: the same tokens", "one after the other",
     ["sampler.py::bench_batch[llada]"]),
    ("128 new tokens in 200 steps, 73 of which commit nothing", "a forward pass in every step",
     ["sampler.py::bench_steps_that_commit_nothing"]),
    ("p2, temperature 0.6, top-p 0.95, vocabulary 151,936: equal in distribution",
     "sorting the vocabulary at every position", ["sampler.py::bench_evaluation_settings"]),
    ("32 requests of 4 to 16 tokens to `dllm serve`, 16 at a time, 4 layers of 128", "one at a time",
     ["server.py::bench_sixteen_clients[16]"]),
    ("16 requests of 16 to 64 tokens, one of which already keeps the CPU busy", "one at a time",
     ["server.py::bench_sixteen_clients[64]"]),
    ("token and probability of 64 rows of 151,936 logits, fp32 and bf16", "`softmax`, `max`",
     ["topk_unmask.py::bench_token_scores[prob-fp32]", "topk_unmask.py::bench_token_scores[prob-bf16]"]),
    ("token and entropy of the same", "`softmax`, `xlogy`, `sum`",
     ["topk_unmask.py::bench_token_scores[entropy-fp32]", "topk_unmask.py::bench_token_scores[entropy-bf16]"]),
    ("token and probability of 32 rows from hidden states of 256, fp32 and bf16", "matrix product, then our scores",
     ["topk_unmask.py::bench_linear_token_scores[32-fp32]", "topk_unmask.py::bench_linear_token_scores[32-bf16]"]),
    ("DiffusionGemma's statistics of 32 rows, vocabulary 262,144, hidden states of 256, fp32 and bf16",
     "product, soft cap, `log_softmax`, `multinomial`",
     ["denoiser_statistics.py::bench_denoiser_statistics[statistics-float32]",
      "denoiser_statistics.py::bench_denoiser_statistics[statistics-bfloat16]"]),
    ("the same with the soft embedding", "the same, and the product with the head",
     ["denoiser_statistics.py::bench_denoiser_statistics[soft-float32]",
      "denoiser_statistics.py::bench_denoiser_statistics[soft-bfloat16]"]),
    ("a training step, vocabulary 151,936, 512 positions, half corrupted", "the loss over all positions",
     ["train_step.py::bench_train_step"]),
    ("its head and loss alone, forward and backward", "eager PyTorch over all positions",
     ["masked_cross_entropy.py::bench_linear_masked_cross_entropy[eager]"]),
    ("", "eager PyTorch over the corrupted positions",
     ["masked_cross_entropy.py::bench_linear_masked_cross_entropy[eager_of_corrupted]"]),
    ("", "PyTorch's `linear_cross_entropy` over the corrupted positions",
     ["masked_cross_entropy.py::bench_linear_masked_cross_entropy[pytorch_of_corrupted]"]),
    ("the same in bf16, with fp32 products", "eager PyTorch over all positions, which rounds logits to bf16",
     ["masked_cross_entropy.py::bench_in_bf16"]),
    ("three steps of the trainer on the demo's model, with data, checks and logging",
     "forward, backward, optimizer in a bare loop", ["trainer.py::bench_trainer_step"]),
    ("the batches of a step of the demo, read, corrupted and with their targets", "training on them",
     ["data.py::bench_make_batches"]),
    ("attention in 16 packed documents of 128, forward", "`scaled_dot_product_attention` with the mask as a tensor",
     ["attention.py::bench_packed_documents[equal-forward]"]),
    ("attention of block-diffusion training, 1,024 positions, blocks of 32, forward and backward", "the same",
     ["attention.py::bench_block_diffusion[forward_backward]"]),
    ("328 samples of HumanEval's solutions, every third wrong, judged on two cores", "the usual executor",
     ["sandbox.py::bench_scoring_humaneval"]),
]
# Memory in MiB: ours and the baseline's, by the names of their counters.
MEMORY = [
    ("peak memory of that training step", "train_step.py::bench_train_step", "peak_memory_mib",
     "naive_peak_memory_mib"),
    ("memory of that head and loss besides the gradients",
     "masked_cross_entropy.py::bench_linear_masked_cross_entropy[eager]", "extra_memory_mib", "eager_extra_memory_mib"),
    ("memory of those statistics with the soft embedding besides the inputs",
     "denoiser_statistics.py::bench_denoiser_statistics[soft-float32]", "extra_memory_mib", "eager_extra_memory_mib"),
]


def sections(runs: list[Run], results: list[dict]) -> str:
    """Markdown of all measurements: runs of `make bench`, oldest first, and of `make bench-gpu`."""
    on_gpu = "\n\n".join(map(of_gpu, results)) if results else f"On a GPU: **{NOT_YET}**."
    return (f"### On a CPU\n\n{of_cpu(runs)}\n\n"
            f"### Predicted for an H200, not measured\n\n{of_machine_code(results)}\n\n### On a GPU\n\n{on_gpu}")


def of_machine_code(results: list[dict]) -> str:
    """The predictions, beside what an H200 measured, where one did."""
    on_h200 = (run for run in results if "H200" in run["machine"]["device"])
    measured = {line["name"]: line for run in on_h200 for line in run["benchmarks"]}

    def with_measured(*cells: str) -> list[str]:
        *cells, name = cells
        line = measured.get(name)
        return row(*cells, "" if not name else NOT_YET if line is None else f"{1e3 * line['ours_s']:.3g} ms")

    tritons = [*predict.counts_by_triton()]
    lines = ["From the instructions of the compiled kernels; `benchmarks/predict.py` says how, and what is left out.",
             "Tests hold the counts to these, and the predictions to what is wanted. Triton's scores of logits miss it",
             "and run only where the CUDA C++ kernels are not built.", "",
             *row("task", "predicted", "wanted", "counted", "measured"), *row(*["---"] * 5)]
    for cells in predict.row_passes():
        lines += with_measured(*cells)
    lines += ["", "Attention by Triton in bf16: from programs that always overlap to ones that never do.",
              "What is wanted depends on a library's speed, which nothing here predicts.", "",
              *row("task", *(f"predicted, {name}" for name in tritons), "wanted", "measured"),
              *row(*["---"] * (3 + len(tritons)))]
    for cells in predict.attention_tasks():
        lines += with_measured(*cells)
    lines += ["", "Its kernels for Hopper, by mask and head size: programs at once on a multiprocessor, and the share",
              "of the places in all waves that the benchmark's programs take; instructions of a warp per tile of",
              "queries x keys; the smallest N of a `wgmma`; bytes of a load (4: numbers of a row, such as `lse`).", "",
              *row("kernel", "tile", *tritons), *row(*["---"] * (2 + len(tritons)))]
    for cells in predict.attention_kernels():
        lines += row(*cells)
    return "\n".join(lines)


def of_cpu(runs: list[Run]) -> str:
    """The newest run of each vendor's CPU, side by side."""
    newest = {run.vendor: run for run in runs}
    lines = [f"- {name}: {describe(newest.get(vendor))}" for vendor, name in VENDORS.items()]
    lines += ["", *row("ours", "baseline", *(f"times as fast, {name}" for name in VENDORS.values())),
              *row(*["---"] * (2 + len(VENDORS)))]
    for ours, baseline, names in RATIOS:
        lines += row(ours, baseline, *(cell(newest.get(vendor), names, "ratio") for vendor in VENDORS))
    lines += ["", *row("MiB, ours and the baseline's", *VENDORS.values()), *row(*["---"] * (1 + len(VENDORS)))]
    for what, name, *counters in MEMORY:
        lines += row(what, *(cell(newest.get(vendor), [name], *counters) for vendor in VENDORS))
    return "\n".join(lines)


def row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def describe(run: Run | None) -> str:
    return NOT_YET if run is None else f"{run.machine}; commit {run.commit[:12]}, {run.date}"


def cell(run: Run | None, names: list[str], *keys: str) -> str:
    """Some numbers of some benchmarks of a run. A benchmark that the run skipped shows a dash."""
    if run is None:
        return NOT_YET
    found = [run.benchmarks.get(f"bench_{name}") for name in names]
    return " and ".join("-" if info is None else f"{info[key]:,.3g}" if info[key] < 1000 else f"{info[key]:,.0f}"
                        for info in found for key in keys)


def of_gpu(run: dict) -> str:
    machine, limits = run["machine"], run["limits"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "cuda") if machine.get(name))
    copy, product = limits["copy_bytes_per_s"] / 1e12, limits["product_flop_per_s"] / 1e12
    commit = machine["commit"]
    at = f"at {commit[:12]}" if commit else "at an unknown commit"
    lines = [f"On {machine['device']}, {versions}, {at} on {machine['date']}: {copy:.2f} TB/s, "
             f"bf16 product {product:.0f} TFLOP/s.", ""]
    if run["void"]:
        lines[:0] = ["The run is void: one and the same copy differed by more than 3%.", ""]
    lines += ["| benchmark | ms | rate | of the floor | times as fast | wanted |", "|---|---|---|---|---|---|"]
    for line in run["benchmarks"]:
        share, wanted = line["share_of_floor"], line["at_least"]
        name = line["name"].removeprefix("bench_gpu_").replace(".py::bench_", ": ").replace("_", " ")
        lines.append(f"| {name} | {1e3 * line['ours_s']:.3g} | {rate_of(line)} "
                     f"| {'' if share is None else f'{share:.0%}'} | {line['ratio']:.2f} "
                     f"| {'' if wanted is None else f'{wanted:.2f}'}{' **missed**' if line['wrong'] else ''} |")
    if run["skipped"]:
        lines += ["", "Not run: " + "; ".join(reason.split(": ", 1)[-1] for reason in run["skipped"]) + "."]
    return "\n".join(lines)


def with_sections(page: str, runs: list[Run], results: list[dict]) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{sections(runs, results)}\n\n{END}{rest.split(END)[1]}"


def read_history(folder: Path = HISTORY) -> list[Run]:
    return [read_run(path) for path in sorted(folder.glob("*.json"))]


def read_results(folder: Path = RESULTS) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main() -> int:
    PAGE.write_text(with_sections(PAGE.read_text(), read_history(), read_results()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
