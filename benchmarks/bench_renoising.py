"""Denoising steps of a model shaped as DiffusionGemma, with its vocabulary, against Transformers' own `generate`."""

import tempfile
import warnings

import torch
from transformers import DiffusionGemmaForBlockDiffusion

from benchmarks import memory
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.output import GenerationOutput
from dllm.generation.sampler import generate
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.gemma_config import read_gemma_config

PROMPT, CANVAS, STEPS, WORDS = 32, 32, 2, 262_144
CONFIG = {
    "model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"], "canvas_length": CANVAS,
    "text_config": {
        "model_type": "diffusion_gemma_text", "vocab_size": WORDS, "hidden_size": 128, "intermediate_size": 96,
        "moe_intermediate_size": 32, "num_experts": 8, "top_k_experts": 2, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_global_key_value_heads": 1, "global_head_dim": 64,
        "sliding_window": 64}}


def make_model() -> DiffusionGemma:
    torch.manual_seed(0)
    return DiffusionGemma(read_gemma_config(CONFIG)).eval()


def make_prompt() -> torch.Tensor:
    return torch.randint(WORDS, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def sample(model: DiffusionGemma, prompt: torch.Tensor, steps: int) -> GenerationOutput:
    return generate(model, prompt, None, MDMGenerationConfig(
        alg="entropy_bound", steps=steps, max_new_tokens=CANVAS, seed=0))


def bench_steps(paired):
    """Random weights are never sure, so both take all steps of one canvas. Both encode the prompt once.

    Of memory the steps need, beside the model, less than a quarter of the logits of a canvas in fp32.
    """
    logits_mib = CANVAS * WORDS * 4 / 2**20
    extra_mib = memory.peak_memory_mib("bench_renoising", "sample_again")
    assert extra_mib < logits_mib / 4
    model, prompt = make_model(), make_prompt()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()

    def baseline():
        return theirs.generate(prompt, max_new_tokens=CANVAS, max_denoising_steps=STEPS).sequences

    def check(ours, sequences):
        assert ours.steps == STEPS and ours.sequences.shape == sequences.shape == (1, PROMPT + CANVAS)
        return {"steps": ours.steps}

    paired(ours=lambda: sample(model, prompt, STEPS), baseline=baseline, check=check, at_least=3.0,
           extra_memory_mib=round(extra_mib, 1), logits_mib=logits_mib)


def make_case() -> tuple:
    model, prompt = make_model(), make_prompt()
    sample(model, prompt[:, :1], 1)  # the first call imports and allocates
    return model, prompt


def sample_again(model: DiffusionGemma, prompt: torch.Tensor) -> None:
    sample(model, prompt, STEPS)  # the last step but one makes a soft embedding
