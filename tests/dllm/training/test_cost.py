"""The cost of a step, against the counters of PyTorch and the tensors that autograd keeps."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dllm.config.schema import TrainGroup
from dllm.diffusion_lm import DiffusionLM
from dllm.model.families import ModelConfig
from dllm.training.cost import count_pairs, estimate_memory, layer_matrices, step_flops
from dllm.training.optimizer import build_optimizers, count_states

CONFIG = ModelConfig(family="qwen2", vocab_size=700, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                     num_attention_heads=6, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, qkv_bias=True,
                     mask_token_id=699)


def test_flops_are_those_that_pytorch_counts():
    model = DiffusionLM(CONFIG)
    tokens = torch.randint(699, (4, 32))
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens).logits
        logits.sum().backward()
    counted = counter.get_total_flops()
    ours = step_flops(CONFIG, tokens=128, pairs=4 * 32 * 32, scored=128)
    attention = 6 * 2 * 3 * 6 * 16 * 4 * 32 * 32  # our own operator, which the counter does not see
    assert counted in (pytest.approx(ours, rel=0.01), pytest.approx(ours - attention, rel=0.01))


def test_matrices_are_those_of_the_layers():
    model = DiffusionLM(CONFIG)
    assert layer_matrices(CONFIG) == sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)


def test_pairs_are_those_that_attend_to_each_other():
    ends = torch.tensor([0, 3, 5])
    assert count_pairs(ends, "mdm", 32) == 9 + 4 and count_pairs(ends, "ar", 32) == 6 + 3
    # 8 positions in noisy blocks of 2: 2 x (2 + 4 + 6 + 8) pairs, and the same number in the clean ones.
    assert count_pairs(torch.tensor([0, 8]), "block_diffusion", 2) == 2 * 2 * (2 + 4 + 6 + 8)
    # A shorter last block: 3 x 3 + 3 x 6 + 1 x 7; and a document shorter than a block.
    assert count_pairs(torch.tensor([0, 7, 10]), "block_diffusion", 3) == 2 * (9 + 18 + 7) + 2 * 9
    assert count_pairs(torch.tensor([0, 3]), "block_diffusion", 32) == 2 * 9
    assert count_pairs(torch.tensor([0, 7, 10]), "block_diffusion", 3, causal_blocks=True) == 2 * (28 + 6)
    assert count_pairs(torch.tensor([0, 7, 10]), "block_diffusion", 3, causal_context=True) == 34 + 9 + 28 + 6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_estimate_is_near_what_autograd_keeps(checkpointing):
    model = DiffusionLM(CONFIG).train()
    model.checkpointing = checkpointing
    tokens = torch.randint(699, (4, 64))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden_states(tokens)
    measured = sum(size for place, size in kept.items() if place not in owned)
    settings = TrainGroup(output_dir="x", enable_gradient_checkpointing=checkpointing)
    count = model.count_parameters()
    estimate = estimate_memory(CONFIG, count, count, 2 * count, settings, tokens.numel(), 1, bf16=False)
    assert hidden.shape[-1] == 96
    if checkpointing:  # the estimate has the recomputed layer, which autograd does not keep
        whole = estimate_memory(CONFIG, count, count, 2 * count, replace(settings, enable_gradient_checkpointing=False),
                                tokens.numel(), 1, bf16=False)
        assert measured < estimate["activations"] < whole["activations"]
    else:
        assert 0.7 * measured < estimate["activations"] < 1.6 * measured
    assert estimate["weights"] == estimate["gradients"] == estimate["optimizer"] / 2 == 4 * count


def test_sharding_divides_what_is_sharded():
    settings = TrainGroup(output_dir="x", data_parallel_mode="fsdp2")
    one, eight = (estimate_memory(CONFIG, 1000, 1000, 2000, settings, 64, n, bf16=True) for n in (1, 8))
    for name in ("weights", "gradients", "optimizer"):
        assert eight[name] == one[name] / 8
    assert eight["activations"] == one["activations"]


def test_block_diffusion_keeps_the_activations_of_two_copies():
    one, two = (estimate_memory(CONFIG, 1000, 1000, 2000, TrainGroup(output_dir="x", **keys), 64, 1, bf16=False)
                for keys in ({}, {"objective": "block_diffusion", "block_length": 8}))
    assert two == {**one, "activations": 2 * one["activations"]}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers_keep_as_many_numbers_as_counted(optimizer):
    model, settings = DiffusionLM(CONFIG), TrainGroup(output_dir="x", optimizer=optimizer)
    optimizers = build_optimizers(model, settings)
    model(torch.arange(8).unsqueeze(0)).logits.sum().backward()
    for one in optimizers:
        one.step()
    kept = sum(state.numel() for one in optimizers for states in one.state.values() for state in states.values()
               if state.ndim > 0)
    assert kept == count_states(model, settings)
