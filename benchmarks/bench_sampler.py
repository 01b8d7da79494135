"""Sampling against a naive sampler with the same model: same tokens where nothing is random."""

import pytest
import torch

from benchmarks.naive_sampler import naive_denoise, naive_fast_dllm, naive_llada
from dllm.families import ModelConfig
from dllm.model import DiffusionLM
from dllm.sampler import MDMGenerationConfig, denoise

PROMPT, NEW = 64, 64


def make_model(vocab_size: int, layers: int) -> DiffusionLM:
    torch.manual_seed(0)
    return DiffusionLM(ModelConfig(
        family="qwen2", vocab_size=vocab_size, hidden_size=256, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, qkv_bias=True, tie_word_embeddings=True,
        initializer_range=0.1, mask_token_id=vocab_size - 1)).eval()


def make_canvas(model: DiffusionLM) -> torch.Tensor:
    prompt = torch.randint(model.config.vocab_size - 1, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    return torch.cat((prompt, prompt.new_full((1, NEW), model.mask_token_id)), 1)


@pytest.mark.parametrize("vocab_size, layers, at_least", [(32768, 6, 2.0), (151936, 2, 4.5)])
def bench_greedy(paired, vocab_size, layers, at_least):
    """With 6 layers the naive sampler multiplies 1.95 times as much; softmax and copies make the rest of the ratio."""
    model = make_model(vocab_size, layers)
    canvas, config = make_canvas(model), MDMGenerationConfig(steps=NEW)
    expected, naive_forwards = naive_denoise(model, canvas, steps=NEW)
    ours = denoise(model, canvas, config)
    assert torch.equal(ours.sequences, expected)
    paired(ours=lambda: denoise(model, canvas, config), baseline=lambda: naive_denoise(model, canvas, steps=NEW),
           rounds=2, at_least=at_least, forwards=ours.forwards, naive_forwards=naive_forwards)


def make_llada() -> DiffusionLM:
    torch.manual_seed(0)
    return DiffusionLM(ModelConfig(
        family="llada", vocab_size=126464, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, shift_logits=False, initializer_range=0.1,
        mask_token_id=126336)).eval()


def make_llada_canvas(rows: int = 1, new: int = 128) -> torch.Tensor:
    canvas = torch.randint(126000, (rows, 64 + new), generator=torch.Generator().manual_seed(1))
    canvas[:, 64:] = 126336
    return canvas


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def bench_fast_dllm(paired, cache):
    """Against Fast-dLLM's loop with the same cache, threshold 0.9, blocks of 32: the same tokens."""
    model, canvas = make_llada(), make_llada_canvas(new=64)
    with torch.no_grad():
        model.head_weight.mul_(4)  # so that some confidences pass the threshold
    settings = {"block_length": 32, "threshold": 0.9}
    config = MDMGenerationConfig(remasking="low_confidence", cache=cache, **settings)
    outputs = {}
    paired(ours=lambda: outputs.update(ours=denoise(model, canvas, config)),
           baseline=lambda: outputs.update(naive=naive_fast_dllm(model, canvas, dual=cache == "dual", **settings)),
           rounds=1, at_least=1.5)
    expected, naive_forwards = outputs["naive"]
    assert torch.equal(outputs["ours"].sequences, expected) and outputs["ours"].forwards <= naive_forwards


def bench_llada(paired):
    """LLaDA's vocabulary and sampler, prompt of 64, 128 new tokens in 128 steps and blocks of 32: the same tokens."""
    model, canvas = make_llada(), make_llada_canvas()
    config = MDMGenerationConfig(steps=128, block_length=32, remasking="low_confidence")
    outputs = {}
    paired(ours=lambda: outputs.update(ours=denoise(model, canvas, config)),
           baseline=lambda: outputs.update(naive=naive_llada(model, canvas, steps=128, block_length=32)), rounds=1,
           at_least=5)
    assert torch.equal(outputs["ours"].sequences, outputs["naive"][0])


@pytest.mark.parametrize("method, at_least", [("sdar", 2.0), ("llada", None)])
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
        config = MDMGenerationConfig(remasking="low_confidence_dynamic", threshold=0.9, block_length=4, steps=64)
    else:
        model = make_llada()
        config = MDMGenerationConfig(remasking="low_confidence", cache="dual", block_length=32, steps=64)
    canvas = make_llada_canvas(rows=8, new=64)
    together = denoise(model, canvas, config)
    alone = [denoise(model, row.unsqueeze(0), config) for row in canvas]
    assert torch.equal(together.sequences, torch.cat([one.sequences for one in alone]))
    paired(ours=lambda: denoise(model, canvas, config),
           baseline=lambda: [denoise(model, row.unsqueeze(0), config) for row in canvas], rounds=2, at_least=at_least,
           forwards=together.forwards, tokens_per_forward=together.tokens_per_forward)


def bench_steps_that_commit_nothing(paired):
    """128 tokens in 200 steps: 73 of them commit nothing (spec of the original's schedule), so 127 forwards do."""
    model = make_model(1024, 2)
    canvas, config = make_canvas(model), MDMGenerationConfig(steps=200)
    canvas = torch.cat((canvas, canvas[:, -NEW:]), 1)
    expected, _ = naive_denoise(model, canvas, steps=200)
    ours = denoise(model, canvas, config)
    assert torch.equal(ours.sequences, expected) and ours.steps == 200 and ours.forwards == 127
    paired(ours=lambda: denoise(model, canvas, config), baseline=lambda: naive_denoise(model, canvas, steps=200),
           rounds=3, at_least=1.4, forwards=ours.forwards, naive_forwards=200)


def bench_evaluation_settings(paired):
    """Open-dLLM's: p2, temperature 0.6, top-p 0.95. Random, so equal in distribution (tests), not to the token."""
    model = make_model(151936, 2)
    canvas, steps = make_canvas(model), 8
    settings = {"steps": steps, "alg": "p2", "temperature": 0.6, "top_p": 0.95}
    paired(ours=lambda: denoise(model, canvas, MDMGenerationConfig(seed=0, **settings)),
           baseline=lambda: naive_denoise(model, canvas, **settings), rounds=2, at_least=12)
