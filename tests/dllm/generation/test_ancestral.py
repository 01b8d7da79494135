"""Ancestral sampling of uniform words: the chances of a step, the model's words, corrections, rows, refusals."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dllm import MDMGenerationConfig, UserError
from dllm.diffusion.uniform import Noise
from dllm.evaluators.likelihood import masked_accuracy
from dllm.generation.ancestral import CORRECTION_PATIENCE, Patience, correct, step_ancestrally
from dllm.generation.sampler import denoise
from dllm.generation.scorers import score_words
from dllm.generation.steps import Prediction, Step
from dllm_kernels import chunks, filter_logits
from tests.dllm.tiny_models import tiny
from tests.dllm.training.test_uniform_training import make_model

MASK = 60


class Table:
    """A scorer that gives the same distribution [V] everywhere, or one for each position [L, V]."""

    def __init__(self, step: Step, p: torch.Tensor):
        self.step, self.p = step, p.double()

    def predict(self, positions, other, *, temperature=1.0):
        p = (self.p.log() / (temperature or 1.0)).softmax(-1).expand(*positions.shape, -1)
        drawn = (p.cumsum(-1) < self.step.uniform[..., :1]).sum(-1).clamp(max=p.shape[-1] - 1)
        best = p.argmax(-1)
        logs = (p.gather(2, words.unsqueeze(2)).squeeze(2).log() for words in (self.step.tokens, other, drawn, best))
        return Prediction(drawn, best, *logs)


def make_step(tokens, index, total, uniform=None, mask=MASK):
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    if uniform is None:
        uniform = torch.rand(*tokens.shape, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return Step(index, total, 1e-3, tokens, tokens == mask, everywhere, mask, uniform, size=tokens.shape[1:].numel(),
                working=torch.ones(len(tokens), dtype=torch.bool))


@pytest.mark.parametrize("share, current, index", [
    (1.0, 2, 0), (1.0, 2, 2), (1.0, 0, 3), (0.3, 5, 0), (0.3, 5, 2), (0.3, 1, 2), (0.3, 5, 3)])
def test_words_change_as_often_as_the_posterior_says(share, current, index):
    V, mask, total, count = 6, 5, 4, 40_000
    noise, p = Noise(share, V, mask), torch.tensor([0.05, 0.15, 0.3, 0.4, 0.1, 0.0])
    step = make_step(torch.full((1, count), current), index, total, mask=mask)
    out = step_ancestrally(step, Table(step, p), noise=noise, greedy=False)
    now, then = (noise.at(torch.tensor(1 - i / total)) for i in (index, index + 1))
    kept, words = now.alpha / then.alpha, torch.arange(V)
    noisy, before = now.of(words == mask), then.of(words == mask)
    here = noisy[current] - kept * before[current] + kept * (words == current)  # q(z at t | j at s)
    posterior = here * (then.alpha * p + before) / (now.alpha * p[current] + noisy[current])
    assert posterior.sum().item() == pytest.approx(1)
    assert torch.allclose(torch.bincount(out.tokens[0], minlength=V) / count, posterior.float(), atol=0.01)
    sure = p[out.tokens].masked_fill(out.tokens == mask, -torch.inf)
    assert torch.allclose(out.confidence, sure)
    if index == total - 1:
        assert (out.tokens != mask).all()
        greedy = step_ancestrally(step, Table(step, p), noise=noise, greedy=True)
        assert (greedy.tokens == 3).all() and torch.allclose(greedy.confidence, torch.tensor(0.4))


@pytest.mark.parametrize("settings", [
    {"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 2, "top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_words_are_scored_as_by_their_definition_in_chunks_and_whole(settings, monkeypatch):
    torch.manual_seed(0)
    settings = {"top_k": None, "top_p": None, **settings}
    M, D, V, mask = 29, 8, 17, 4
    hidden, weight = torch.randn(M, D), torch.randn(V, D)
    given, uniform = torch.randint(5, V, (M, 2)), torch.rand(M, 2, dtype=torch.double)
    logits = hidden.double() @ weight.double().T
    logits[:, mask] = -torch.inf
    kept = filter_logits(logits / (settings["temperature"] or 1), settings["top_k"], settings["top_p"])
    logs = kept.log_softmax(1) if settings["temperature"] else torch.where(
        F.one_hot(logits.argmax(1), V).bool(), 0.0, -torch.inf)
    for rows in (1 << 20, 4):
        monkeypatch.setattr(chunks, "WORKSPACE_BYTES", {"cpu": rows * V * 4, "cuda": 0})
        words, found = score_words(hidden, weight, given, uniform, mask, **settings)
        assert torch.equal(words[:, 1], logits.argmax(1)) and (words != mask).all()
        cumulative = logs.exp().cumsum(1)
        assert torch.equal(words[:, 0], (cumulative <= uniform[:, :1]).sum(1))
        assert torch.allclose(found, logs.gather(1, torch.cat((given, words), 1)).double(), atol=1e-5)


def test_a_correction_replaces_the_token_whose_other_word_is_likeliest():
    p = torch.full((4, 5), 0.01)
    for place, (word, chance) in enumerate([(1, 0.96), (2, 0.9), (3, 0.8), (0, 0.7)]):
        p[place, word] = chance
    tokens = torch.tensor([[1, 4, 4, 4], [1, 2, 3, 0], [4, 4, 4, 4]])
    step = make_step(tokens, 9, 9)
    out = correct(step, Table(step, p / p.sum(1, keepdim=True)))
    assert out.tokens.tolist() == [[1, 2, 4, 4], [1, 2, 3, 0], [1, 4, 4, 4]]
    assert out.agreement.tolist() == [0.5, 1.0, 0.25]


def test_corrections_end_where_nothing_changes_or_nothing_gets_better():
    patience, better = Patience(2), torch.tensor([0.5, 0.5])
    assert patience.is_over(better, torch.tensor([True, False])).tolist() == [False, True]
    for _ in range(CORRECTION_PATIENCE):
        assert not patience.is_over(better, torch.tensor([True, True])).any()
    assert patience.is_over(torch.tensor([0.5, 0.6]), torch.tensor([True, True])).tolist() == [True, False]


MODELS = [{"uniform_share": 1.0}, {"uniform_share": 0.3}, {"uniform_share": 1.0, "shift_logits": False},
          {"uniform_share": 1.0, "self_conditioning": True}]


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_a_row_is_sampled_in_a_batch_as_alone_and_its_prompt_stays(changes):
    model = make_model(**changes)
    settings = {"alg": "ancestral", "max_new_tokens": 8, "steps": 6, "temperature": 1.0, "seed": 3,
                "correction_steps": 3}
    rows = [[5, 6, 7], [9], [5, 6, 7]]
    ids = torch.tensor([[0] * (3 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (3 - len(row)) + [1] * len(row) for row in rows])
    out = model.diffusion_generate(ids, mask, output_history=True, **settings)
    assert torch.equal(out.sequences[:, :3], ids) and (out.sequences[:, 3:] != model.mask_token_id).all()
    assert out.confidence[:, 3:].isfinite().all()
    assert not torch.equal(out.sequences[0], out.sequences[2])  # copies draw others
    first = out.history[0][:, 3:] == model.mask_token_id
    assert first.any() == (changes["uniform_share"] < 1)
    for row, whole in zip(rows[:2], out.sequences, strict=False):
        alone = model.diffusion_generate([row], **settings).sequences[0]
        assert torch.equal(alone[len(row):], whole[3:])
    again = model.diffusion_generate([rows[0]], num_return_sequences=2, **settings).sequences
    assert torch.equal(again[1, 3:], out.sequences[2, 3:])


def test_a_gap_is_filled_between_what_stays_and_auto_lengths_work():
    model = make_model(uniform_share=1.0)
    settings = {"alg": "ancestral", "steps": 5, "temperature": 1.0, "seed": 1}
    out = model.infill([5, 6], [7, 8, 9], length=4, **settings).sequences[0]
    assert out[:2].tolist() == [5, 6] and out[6:].tolist() == [7, 8, 9] and (out != model.mask_token_id).all()
    auto = model.infill([5, 6], [7, 8, 9], length="auto", infill_lengths=(2, 3), **settings).sequences[0]
    assert len(auto) in (7, 8)


def test_a_hybrid_model_fills_masks_by_the_other_methods_too():
    out = make_model(uniform_share=0.3).diffusion_generate([5], max_new_tokens=6, steps=3, alg="maskgit_plus", seed=0)
    assert (out.sequences != 63).all()


@pytest.mark.parametrize("share, settings, message", [
    (None, {}, "alg ancestral needs a model that is trained on uniform words; train one by dllm train"),
    (1.0, {"alg": "p2"}, "p2 fills masks, and this model is trained on uniform words without masks; set alg to ancest"),
    (1.0, {"alg": "entropy", "threshold": 0.9}, "entropy fills masks"),
    (1.0, {"alg": "edit"}, "edit fills masks, and this model is trained on uniform words"),
    (0.3, {"block_length": 2}, "block_length does not go with alg ancestral"),
    (0.3, {"stop_at_eos": True}, "stop_at_eos does not go with alg ancestral"),
    (0.3, {"block_causal": True}, "block_causal does not go with alg ancestral"),
    (1.0, {"cfg_scale": 1.0}, "cfg_scale masks the prompt, and this model is trained on uniform words")])
def test_what_does_not_go_together_is_refused_with_the_remedy(share, settings, message):
    model = make_model(uniform_share=share)
    with pytest.raises(UserError, match=message):
        denoise(model, torch.tensor([[5, 63, 63]]), MDMGenerationConfig(**{"alg": "ancestral", **settings}))


@pytest.mark.parametrize("settings", [{"correction_steps": 4}, {"greedy_end": True}], ids=str)
def test_settings_of_ancestral_sampling_need_it(settings):
    with pytest.raises(UserError, match="needs alg ancestral, and no remasking; the method is entropy"):
        MDMGenerationConfig(**settings)


def test_evaluations_of_masks_refuse_a_model_without_them(model, tokenizer):
    from dllm.data import Document

    model.config = replace(model.config, uniform_share=1.0)
    with pytest.raises(UserError, match="dllm eval perplexity gives its own bound"):
        masked_accuracy(model, tokenizer, [Document("def f(x):\n    return x\n", "a.py")])


@pytest.mark.parametrize("settings, name", [
    ({"cache": "dual", "block_length": 2}, "cache"), ({"expand_token_id": 3, "alg": "maskgit_plus"}, "expand_token_id"),
    ({"block_causal": True}, "block_causal")])
def test_self_conditioning_is_refused_by_name_where_it_does_not_fit(settings, name):
    with pytest.raises(UserError, match=f"{name} does not go with self-conditioning"):
        denoise(make_model(self_conditioning=True), torch.tensor([[5, 63, 63]]), MDMGenerationConfig(**settings))


@pytest.mark.parametrize("share", [None, 0.3])
def test_each_step_sees_what_the_last_one_predicted(share):
    """Of masked models at the masks alone; asked with a recording forward pass."""
    model, seen = make_model(self_conditioning=True, uniform_share=share, shift_logits=False), []
    torch.nn.init.normal_(model.self_condition.weight)
    compute = model.hidden_states

    def record(tokens, layout, *, predicted=None):
        hidden = compute(tokens, layout, predicted=predicted)
        seen.append((tokens, predicted, hidden))
        return hidden

    model.hidden_states = record
    alg = {"alg": "entropy"} if share is None else {"alg": "ancestral", "temperature": 1.0}
    model.diffusion_generate([5, 6], max_new_tokens=6, steps=4, seed=0, **alg)
    assert (seen[0][1] == 0).all() and len(seen) >= 3
    for (before, _, hidden), (tokens, predicted, _) in zip(seen, seen[1:], strict=False):
        asked = before == 63 if share is None else torch.arange(8).unsqueeze(0) >= 2
        expected = torch.zeros_like(predicted)
        expected[asked] = (hidden[0] @ model.head_weight.T).softmax(-1) @ model.model.embed_tokens.weight
        expected = expected * ((tokens == 63) if share is None else asked).unsqueeze(-1)
        assert torch.allclose(predicted, expected, atol=1e-5) and expected.any()
    assert tiny().config.self_conditioning is False
