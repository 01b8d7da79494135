"""A backbone of Transformers in several processes: its layers are sharded, and its positions shared, as our own are."""

import json

import pytest
import torch
import yaml
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.dllm.training.test_distributed import assert_close, make_config, read, run, weights  # noqa: F401
from tests.dllm.training.test_growth import make_tokenizer


@pytest.mark.slow
def test_two_processes_equal_one(make_config, functions, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    start = tmp_path / "start"
    Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=64, initializer_range=0.2,
        eos_token_id=0, bos_token_id=None, pad_token_id=None)).save_pretrained(start)
    make_tokenizer(functions, ["<|mask|>"]).save_pretrained(start)
    for processes, more in ((1, ()), (2, ("--train.enable_gradient_checkpointing=true",))):
        path = make_config(tmp_path / str(processes), data_parallel_mode="fsdp2", ulysses_parallel_size=processes,
                           optimizer="adamw", max_steps=3, save_steps=3, eval_every=3, lr=1e-3)
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": {"model_path": str(start)}}))
        run(processes, path, *more)
    assert_close(read(tmp_path / "2"), read(tmp_path / "1"), 1e-4)
    ours, alone = weights(tmp_path / "2", 3), weights(tmp_path / "1", 3)
    for name in alone:
        torch.testing.assert_close(ours[name], alone[name], rtol=1e-3, atol=1e-4)
    raw = json.loads((tmp_path / "2/checkpoints/global_step_3/hf_ckpt/config.json").read_text())
    assert raw["model_type"] == "gemma3_text"
