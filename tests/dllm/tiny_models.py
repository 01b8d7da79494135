"""Tiny models with random weights: any change of the shape, any family."""

from dataclasses import replace

import torch

from dllm.diffusion_lm import DiffusionLM
from dllm.generation.strategies import STRATEGIES
from dllm.model.families import FAMILIES, ModelConfig

MASKED_ALGS = sorted(STRATEGIES.keys() - {"edit", "soft_parallel", "self_speculation"})  # those of any model

TINY = ModelConfig(family="qwen3", vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                   num_attention_heads=4, num_key_value_heads=2, head_dim=8, qk_norm=True, mask_token_id=60)


def tiny(**changes) -> DiffusionLM:
    torch.manual_seed(0)
    return DiffusionLM(replace(TINY, **{"initializer_range": 0.2, **changes})).eval()


def tiny_of(family, **changes) -> DiffusionLM:
    torch.manual_seed(0)
    fixed = FAMILIES[family].fixed
    return DiffusionLM(ModelConfig(**{
        "family": family, "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, **fixed, **changes,
    })).eval()
