"""Tiny models with random weights: any change of the shape, any family."""

from dataclasses import replace
from pathlib import Path

import torch

from dllm.diffusion_lm import DiffusionLM
from dllm.generation.strategies import STRATEGIES
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.families import FAMILIES, ModelConfig
from dllm.model.gemma_config import read_gemma_config
from dllm.model.tokenizer import train_tokenizer

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


def save_tiny_gemma(folder: Path) -> Path:
    """A folder with a random DiffusionGemma (404 tokens, canvases of 8 of them, 256 positions), and a tokenizer that
    names a mask token."""
    tokenizer = train_tokenizer([Path(__file__).read_text()], 400)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "mask_token": "<mask>"})
    torch.manual_seed(0)
    model = DiffusionGemma(read_gemma_config({
        "model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"], "canvas_length": 8,
        "boi_token_id": 402, "image_token_id": 403, "text_config": {
            "model_type": "diffusion_gemma_text", "vocab_size": 404, "hidden_size": 16, "intermediate_size": 24,
            "moe_intermediate_size": 8, "num_experts": 4, "top_k_experts": 2, "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"], "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 8, "num_global_key_value_heads": 1, "global_head_dim": 16, "sliding_window": 6,
            "max_position_embeddings": 256, "initializer_range": 0.3}}))
    model.generation_defaults |= {"eos_token_id": [0], "max_denoising_steps": 3, "max_new_tokens": 20,
                                  "sampler_config": {"entropy_bound": 8.0}}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
