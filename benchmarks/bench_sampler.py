"""Sampling against a naive sampler with the same model: same tokens where nothing is random."""

import pytest
import torch

from benchmarks.inputs import scale_logits
from benchmarks.naive_sampler import naive_denoise, naive_fast_dllm, naive_llada
from dllm.diffusion_lm import DiffusionLM
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import denoise
from dllm.model.families import ModelConfig

PROMPT, NEW = 64, 64


def make_model(vocab_size: int, layers: int) -> DiffusionLM:
    torch.manual_seed(0)
    model = DiffusionLM(ModelConfig(
        family="qwen2", vocab_size=vocab_size, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, qkv_bias=True, tie_word_embeddings=True,
        initializer_range=0.1, mask_token_id=vocab_size - 1)).eval()
    scale_logits(model)
    return model


def make_canvas(model: DiffusionLM) -> torch.Tensor:
    prompt = torch.randint(model.config.vocab_size - 1, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    return torch.cat((prompt, prompt.new_full((1, NEW), model.mask_token_id)), 1)


def same_tokens(ours, naive) -> dict[str, float]:
    """Ours, an output of `denoise`, and a naive sampler's tokens and forward passes."""
    expected, naive_forwards = naive
    assert torch.equal(ours.sequences, expected) and ours.forwards <= naive_forwards
    return {"forwards": ours.forwards, "naive_forwards": naive_forwards, "tokens_per_forward": ours.tokens_per_forward}


@pytest.mark.parametrize("vocab_size, layers, at_least", [
    pytest.param(32768, 6, 2.0, id="32768-6"), pytest.param(151936, 2, 4.5, id="151936-2")])
def bench_greedy(paired, vocab_size, layers, at_least):
    """With 6 layers the naive sampler multiplies 1.95 times as much; softmax and copies make the rest of the ratio."""
    model, steps = make_model(vocab_size, layers), 16
    canvas, config = make_canvas(model), MDMGenerationConfig(steps=steps)
    paired(ours=lambda: denoise(model, canvas, config), baseline=lambda: naive_denoise(model, canvas, steps=steps),
           check=same_tokens, at_least=at_least)


def make_llada() -> DiffusionLM:
    torch.manual_seed(0)
    model = DiffusionLM(ModelConfig(
        family="llada", vocab_size=126464, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, shift_logits=False, initializer_range=0.1,
        mask_token_id=126336)).eval()
    scale_logits(model)
    return model


def make_llada_canvas(rows: int = 1, new: int = 128) -> torch.Tensor:
    canvas = torch.randint(126000, (rows, 64 + new), generator=torch.Generator().manual_seed(1))
    canvas[:, 64:] = 126336
    return canvas


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def bench_fast_dllm(paired, cache):
    """Against Fast-dLLM's loop with the same cache, threshold 0.9, blocks of 32: the same tokens."""
    model, canvas = make_llada(), make_llada_canvas(new=64)
    scale_logits(model, 6.4)  # some confidences pass the threshold, and no probability is denormal
    settings = {"block_length": 32, "threshold": 0.9}
    config = MDMGenerationConfig(remasking="low_confidence", cache=cache, **settings)
    paired(ours=lambda: denoise(model, canvas, config),
           baseline=lambda: naive_fast_dllm(model, canvas, dual=cache == "dual", **settings), check=same_tokens,
           at_least=1.5)


def bench_llada(paired):
    """LLaDA's vocabulary and sampler, prompt of 64, 128 new tokens in 32 steps and blocks of 32: the same tokens."""
    model, canvas = make_llada(), make_llada_canvas()
    config = MDMGenerationConfig(steps=32, block_length=32, remasking="low_confidence")
    paired(ours=lambda: denoise(model, canvas, config),
           baseline=lambda: naive_llada(model, canvas, steps=32, block_length=32), check=same_tokens, at_least=5)


@pytest.mark.parametrize("method, at_least", [
    pytest.param("sdar", 2.0, id="sdar"), pytest.param("llada", None, id="llada")])
def bench_batch(paired, method, at_least):
    """Eight sequences together against one after the other: the same tokens.

    sdar: blocks of 4 with the exact cache, where a step reads the weights for few rows. llada: blocks of 32 with the
    dual cache, where the products of one sequence already take most of the time.
    """
    if method == "sdar":
        torch.manual_seed(0)
        model = DiffusionLM(ModelConfig(
            family="sdar", vocab_size=151936, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64, qk_norm=True, shift_logits=False,
            block_causal=True, block_length=4, initializer_range=0.1, mask_token_id=126336)).eval()
        scale_logits(model)
        config = MDMGenerationConfig(remasking="low_confidence_dynamic", threshold=0.9, block_length=4, steps=16)
        canvas = make_llada_canvas(rows=8, new=16)
    else:
        model = make_llada()
        config = MDMGenerationConfig(remasking="low_confidence", cache="dual", block_length=32, steps=8)
        canvas = make_llada_canvas(rows=8, new=32)

    def same(together, alone) -> dict[str, float]:
        assert torch.equal(together.sequences, torch.cat([one.sequences for one in alone]))
        return {"forwards": together.forwards, "tokens_per_forward": together.tokens_per_forward}

    paired(ours=lambda: denoise(model, canvas, config),
           baseline=lambda: [denoise(model, row.unsqueeze(0), config) for row in canvas], check=same, at_least=at_least)


def bench_steps_that_commit_nothing(paired):
    """128 tokens in 200 steps: by the original's schedule 73 steps commit nothing, and need no forward pass."""
    model = make_model(1024, 1)
    canvas, config = make_canvas(model), MDMGenerationConfig(steps=200)
    canvas = torch.cat((canvas, canvas[:, -NEW:]), 1)

    def same(ours, naive) -> dict[str, float]:
        assert (ours.steps, ours.forwards, naive[1]) == (200, 127, 200)
        return same_tokens(ours, naive)

    paired(ours=lambda: denoise(model, canvas, config), baseline=lambda: naive_denoise(model, canvas, steps=200),
           check=same, at_least=1.4)


def bench_evaluation_settings(paired):
    """Open-dLLM's: p2, temperature 0.6, top-p 0.95. Random, so equal in distribution (tests), not to the token."""
    model = make_model(151936, 2)
    canvas, settings = make_canvas(model), {"steps": 2, "alg": "p2", "temperature": 0.6, "top_p": 0.95}
    paired(ours=lambda: denoise(model, canvas, MDMGenerationConfig(seed=0, **settings)),
           baseline=lambda: naive_denoise(model, canvas, **settings), at_least=12)
