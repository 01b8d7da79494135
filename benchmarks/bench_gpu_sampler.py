"""Sampling on a GPU against the naive loop of the same method with the same model.

Qwen2.5-0.5B's shape with random weights, bf16, 128 new tokens after a prompt of 128; no cache with and without CUDA
graphs, and each cache.
"""

import pytest
import torch

from benchmarks.device import DEVICE, measure, on_device, pick
from benchmarks.inputs import scale_logits
from benchmarks.naive_sampler import naive_fast_dllm, naive_llada
from dllm.diffusion_lm import DiffusionLM
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import denoise
from dllm.model.families import ModelConfig

PROMPT, NEW, BLOCK = pick((128, 128, 32), (8, 16, 8))
SHAPE = pick({"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864, "num_hidden_layers": 24,
              "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64},
             {"vocab_size": 1_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
pytestmark = on_device


def make_case(rows: int, device: str = DEVICE, dtype: torch.dtype = torch.bfloat16, **shape):
    torch.manual_seed(0)
    config = ModelConfig(family="qwen2", qkv_bias=True, tie_word_embeddings=True, shift_logits=False,
                         **{**SHAPE, **shape})
    with torch.device(device):
        model = DiffusionLM(config).to(dtype).eval()
    model.mask_token_id = config.vocab_size - 1
    scale_logits(model)
    with torch.no_grad():
        model.head_weight[-1] = 0  # never predicted
    canvas = torch.randint(config.vocab_size - 1, (rows, PROMPT + NEW), device=device)
    canvas[:, PROMPT:] = model.mask_token_id
    return model, canvas


def naive(model, canvas, cache: str):
    """Each in the batch that its original takes: Fast-dLLM's caches hold one sequence."""
    if cache in ("none", "graphs"):
        return naive_llada(model, canvas, steps=NEW, block_length=BLOCK)
    for row in canvas:
        naive_fast_dllm(model, row.unsqueeze(0), block_length=BLOCK, threshold=0.9, dual=cache == "dual")


@pytest.mark.parametrize("rows", pick([1, 8, 64], [2]))
@pytest.mark.parametrize("cache", ["none", "graphs", "prefix", "dual"])
def bench_tokens_per_second(paired, cache, rows):
    if cache == "graphs" and DEVICE == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    model, canvas = make_case(rows)
    settings = {"none": {"steps": NEW}, "graphs": {"steps": NEW, "cuda_graphs": True}}.get(
        cache, {"threshold": 0.9, "cache": cache})
    config = MDMGenerationConfig(remasking="low_confidence", block_length=BLOCK, **settings)
    out = denoise(model, canvas, config)
    one_at_a_time = cache in ("prefix", "dual")
    few = canvas[:2] if one_at_a_time else canvas  # two sequences are enough to time one at a time
    share = len(canvas) / len(few)
    ratio = measure(paired, lambda: denoise(model, canvas, config), lambda: naive(model, few, cache), rounds=2,
                    forwards=out.forwards, tokens_per_forward=out.tokens_per_forward, new_tokens=rows * NEW,
                    baseline_share_of_the_rows=1 / share)
    print(f"{cache}, batch of {rows}: {ratio * share:.1f} times the tokens per second of the naive loop")
