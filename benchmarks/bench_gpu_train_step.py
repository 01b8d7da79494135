"""A training step on a GPU: Qwen2.5-0.5B's shape with random weights, bf16, documents packed in rows of 4,096.

The baseline renders Open-dLLM's step: the same model and mask ratio, PyTorch's attention across the documents of a
row, and the loss over all positions, by Liger-Kernel where installed. A second comparison is of norms, rotary embedding
and SwiGLU by PyTorch with those by torch.compile (`train.enable_compile`) and by Liger-Kernel (`layers_backend`).
"""

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.device import DEVICE, measure, mixed_ends, on_device, peak_memory, pick
from benchmarks.inputs import scale_logits
from dllm.diffusion_lm import DiffusionLM
from dllm.model import liger
from dllm.model.families import ModelConfig
from dllm.model.layouts import Packed
from dllm_kernels import linear_masked_cross_entropy

LENGTH, LONGEST, ROWS = pick((4096, 1024, [1, 4, 8]), (32, 16, [2]))
SHAPE = pick({"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864, "num_hidden_layers": 24,
              "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64},
             {"vocab_size": 1_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
pytestmark = on_device


def make_case(rows: int, device: str = DEVICE, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(0)
    with torch.device(device):
        model = DiffusionLM(ModelConfig(family="qwen2", qkv_bias=True, tie_word_embeddings=True, shift_logits=False,
                                        **SHAPE)).to(dtype)
        clean = torch.randint(SHAPE["vocab_size"] - 1, (rows, LENGTH))
        corrupted = torch.rand(rows, LENGTH) < 0.5
        weights = 1 / (0.1 + torch.rand(rows, LENGTH))
        ends = mixed_ends(rows * LENGTH, LONGEST, device)
    scale_logits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    return model, optimizer, clean, corrupted, clean.masked_fill(corrupted, SHAPE["vocab_size"] - 1), weights, ends


def our_step(model, optimizer, clean, corrupted, noisy, weights, ends):
    hidden = model.hidden_states(noisy, Packed(ends, LONGEST))
    linear_masked_cross_entropy(hidden, model.head_weight, clean, corrupted, weights=weights).backward()
    optimizer.step()
    optimizer.zero_grad()


def open_dllm_step(model, optimizer, clean, corrupted, noisy, weights, ends):
    hidden, targets = model.hidden_states(noisy), clean.masked_fill(~corrupted, -100).flatten()
    if DEVICE == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()(model.head_weight, hidden.flatten(0, 1), targets)
    else:
        loss = F.cross_entropy(F.linear(hidden.flatten(0, 1), model.head_weight).float(), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def model_flop(rows: int, corrupted: int, pairs: int) -> int:
    """Operations of a step: six per weight and position, the head's per corrupted position, attention's per pair."""
    D, kept = SHAPE["hidden_size"], SHAPE["head_dim"]
    q, kv = SHAPE["num_attention_heads"] * kept, SHAPE["num_key_value_heads"] * kept
    layer = D * (2 * q + 2 * kv) + 3 * D * SHAPE["intermediate_size"]
    positions, layers = rows * LENGTH, SHAPE["num_hidden_layers"]
    attention = 3 * 4 * pairs * q * layers
    return 6 * positions * layer * layers + attention + 6 * corrupted * D * SHAPE["vocab_size"]


def largest_micro_batch(step: Callable) -> int:
    """Most rows of a step that fit into the GPU's memory, within a sixteenth; 0 on a CPU."""
    if DEVICE == "cpu":
        return 0

    def fits(rows: int) -> bool:
        try:
            step(*make_case(rows))
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    most, too_many = 1, 2
    while fits(too_many):
        most, too_many = too_many, 2 * too_many
    while too_many - most > max(1, most // 16):
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most


@pytest.mark.parametrize("rows", ROWS)
def bench_step(paired, rows):
    """Promised: 2.5 times as fast, and with 4 rows 45% of the operations per second of the GPU's data sheet."""
    memory = {}
    if rows == ROWS[0]:
        memory = {"largest_micro_batch": largest_micro_batch(our_step),
                  "baseline_largest_micro_batch": largest_micro_batch(open_dllm_step)}
    case = make_case(rows)
    for name, step in (("", our_step), ("baseline_", open_dllm_step)):
        step(*case)
        memory[f"{name}peak_memory_mib"] = round(peak_memory(lambda step=step: step(*case)) / 2**20)
    flop = model_flop(rows, int(case[3].sum()), int(case[-1].diff().long().square().sum()))
    measure(paired, lambda: our_step(*case), lambda: open_dllm_step(*case), 2.5, rounds=6, positions=rows * LENGTH,
            must_multiply_flop=flop, mfu_at_least=0.45 if rows == 4 else None, **memory)


@pytest.mark.parametrize("how", ["compile", "liger"])
def bench_layers(paired, how):
    """Nothing is promised: the first run decides which is faster."""
    if how == "liger" and (reason := "needs a GPU" if DEVICE == "cpu" else liger.missing()):
        pytest.skip(f"layers by Liger-Kernel: {reason}")
    (plain, *case), (changed, *its_case) = make_case(ROWS[-1] // 2), make_case(ROWS[-1] // 2)
    plain.layers_backend = "torch"
    if how == "compile":
        for layer in changed.model.layers:
            layer.compile()
    else:
        changed.layers_backend = "liger"
    measure(paired, lambda: our_step(changed, *its_case), lambda: our_step(plain, *case), rounds=6)
