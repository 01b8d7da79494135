"""One Qwen3 computed by our own layers and by Transformers' (borrowed.py): reported, no promise."""

from unittest.mock import patch

import pytest
import torch

from dllm.diffusion.objectives import Targets, sum_losses
from dllm.diffusion_lm import DiffusionLM
from dllm.model.families import FAMILIES, ModelConfig
from dllm.model.layouts import Packed

POSITIONS = 512


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[DiffusionLM, DiffusionLM]:
    folder = tmp_path_factory.mktemp("borrowed") / "qwen3"
    torch.manual_seed(0)
    DiffusionLM(ModelConfig(
        family="qwen3", vocab_size=16384, hidden_size=256, intermediate_size=768, num_hidden_layers=8, qk_norm=True,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True,
        mask_token_id=16383)).save_pretrained(folder)
    own = DiffusionLM.from_pretrained(folder)
    with patch.dict(FAMILIES):
        del FAMILIES["qwen3"]
        return own, DiffusionLM.from_pretrained(folder)


def bench_training_step(paired, pair):
    ids, scored = torch.randint(16383, (4, POSITIONS // 4)), torch.rand(POSITIONS) < 0.5
    layout = Packed(torch.tensor([0, 100, 256, 400, POSITIONS], dtype=torch.int32), 156)
    targets = Targets(ids.flatten(), scored, None, None, scored.sum())

    def step(model):
        model.zero_grad()
        loss = sum_losses(model.hidden_states(ids, layout), model.head_weight, targets).loss
        loss.backward()
        return loss.detach()

    own, borrowed = pair
    paired(ours=lambda: step(borrowed), baseline=lambda: step(own), check=torch.testing.assert_close)


def bench_sampling(paired, pair):
    prompt = torch.randint(16383, (1, 96))

    def sample(model):
        return model.diffusion_generate(prompt, max_new_tokens=32, steps=4).sequences

    own, borrowed = pair
    paired(ours=lambda: sample(borrowed), baseline=lambda: sample(own), check=torch.testing.assert_close)
