"""A training step (forward, loss, backward) against the same model with the loss over all positions."""

import torch
import torch.nn.functional as F

from benchmarks.inputs import scale_logits
from benchmarks.memory import peak_memory_mib
from dllm.diffusion_lm import DiffusionLM
from dllm.model.families import ModelConfig
from dllm_kernels import linear_masked_cross_entropy

VOCABULARY, POSITIONS = 151936, 512


def make_case():
    torch.manual_seed(0)
    model = DiffusionLM(ModelConfig(
        family="qwen2", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, qkv_bias=True, tie_word_embeddings=True,
        mask_token_id=VOCABULARY - 1))
    scale_logits(model)
    clean = torch.randint(VOCABULARY - 1, (1, POSITIONS))
    corrupted = torch.rand(1, POSITIONS) < 0.5
    return model, clean, corrupted, clean.masked_fill(corrupted, VOCABULARY - 1)


def our_step(model, clean, corrupted, noisy):
    model.zero_grad()
    hidden = model.hidden_states(noisy)
    loss = linear_masked_cross_entropy(hidden, model.head_weight, clean, corrupted)
    loss.backward()
    return loss.detach(), model.head_weight.grad


def naive_step(model, clean, corrupted, noisy):
    """Loss over all positions: the head multiplies every row; those that carry no loss are ignored afterwards."""
    model.zero_grad()
    logits = model(noisy).logits
    loss = F.cross_entropy(logits.flatten(0, 1), clean.masked_fill(~corrupted, -100).flatten())
    loss.backward()
    return loss.detach(), model.head_weight.grad


def same(ours, theirs) -> None:
    (loss, gradient), (expected_loss, expected) = ours, theirs
    assert torch.allclose(loss, expected_loss, rtol=1e-5) and (gradient - expected).norm() < 1e-4 * expected.norm()


def bench_train_step(paired):
    ours, naive = (peak_memory_mib("bench_train_step", step) for step in ("our_step", "naive_step"))
    assert 0 < ours <= 0.6 * naive, f"peak memory {ours:.0f} MiB is not 40% below {naive:.0f} MiB"
    case = make_case()
    paired(ours=lambda: our_step(*case), baseline=lambda: naive_step(*case), check=same, at_least=1.7,
           peak_memory_mib=round(ours), naive_peak_memory_mib=round(naive))
