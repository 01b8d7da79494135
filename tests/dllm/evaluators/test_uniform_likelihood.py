"""The bound of models of uniform words: exact where it can be known, and each row's own."""

import math

import pytest
import torch

from dllm.errors import UserError
from dllm.evaluators.likelihood import bound_likelihood, perplexity_bound
from dllm.evaluators.settings import HeldOutSettings
from tests.dllm.evaluators.test_evaluators import DOCUMENTS, KnownModel
from tests.dllm.training.test_uniform_training import make_model


def known(probability, share: float, mask: int) -> KnownModel:
    """A model of frequencies, which are the true reverse process of single words, so that its bound is tight."""
    V = len(probability)
    logits = probability.log().clamp(min=-50).float()
    model = KnownModel(lambda row: logits.expand(len(row), V), V, mask)
    model.config.uniform_share, model.config.mask_token_id = share, mask
    return model


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_bound_of_a_model_that_knows_only_frequencies_is_their_cross_entropy(tokenizer, share):
    V, mask = len(tokenizer), tokenizer.mask_token_id
    probability = torch.rand(V, dtype=torch.double, generator=torch.Generator().manual_seed(1)) + 0.1
    probability[mask] = 0
    probability /= probability.sum()
    settings = HeldOutSettings(max_seq_len=50, windows=8, samples=32)
    result = perplexity_bound(known(probability, share, mask), tokenizer, DOCUMENTS, settings)
    uniform = perplexity_bound(known((probability > 0) / (V - 1), share, mask), tokenizer, DOCUMENTS, settings)
    assert result.nats_per_token != uniform.nats_per_token
    assert abs(uniform.nats_per_token - math.log(V - 1)) < 5 * uniform.monte_carlo_stderr < 2
    tokens = torch.tensor([[5, 6, 7, 9, 11]])
    exact = -probability[tokens[0, 2:]].log().sum().item()
    ours = bound_likelihood(known(probability, share, mask), tokens, scored=torch.arange(5).unsqueeze(0) >= 2,
                            samples=5000)
    assert abs(ours.nats.item() - exact) < 5 * ours.stderr.item() < 0.2 * exact and ours.tokens.item() == 3


@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("shift", [False, True])
def test_rows_have_their_own_bounds_and_given_tokens_stay(share, shift, monkeypatch):
    model = make_model(uniform_share=share, shift_logits=shift)
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    scored = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    seen, compute = [], model.hidden_states
    def record(tokens, layout):
        seen.extend(tokens[0].tensor_split(layout.cu_seqlens[1:-1].long()))
        return compute(tokens, layout)

    monkeypatch.setattr(model, "hidden_states", record)
    both = bound_likelihood(model, ids, mask, scored=scored, samples=8, batch_tokens=24)
    for row, tokens, own in zip(ids, (seen[8:], seen[:8]), (slice(2, 6), slice(0, 6)), strict=True):
        given = scored[0 if own.start else 1, own] == 0
        assert len(tokens) == 8 and all(torch.equal(noisy[given], row[own][given]) for noisy in tokens)
        assert any(not torch.equal(noisy, row[own]) for noisy in tokens)
    alone = bound_likelihood(model, ids[:1, 2:], scored=scored[:1, 2:], samples=8)
    assert both.nats[0].item() == pytest.approx(alone.nats.item(), rel=1e-5)
    assert both.tokens.tolist() == [2, 5] and (both.nats > 0).all()


def test_windows_longer_than_the_model_are_refused(tokenizer):
    model = make_model(uniform_share=1.0, vocab_size=400, max_position_embeddings=8)
    with pytest.raises(UserError, match="windows of 32 tokens, but the model has 8 positions"):
        perplexity_bound(model, tokenizer, DOCUMENTS, HeldOutSettings(max_seq_len=32))
