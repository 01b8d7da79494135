"""Noise of masks and uniform words: the recorded losses, weights, gradients and steps, and how often words change."""

import numpy as np
import pytest
import torch

from dllm.diffusion.corruption import SCHEDULES
from dllm.diffusion.uniform import Level, Noise, NoiseTargets, add_noise, noise_losses
from dllm.generation.ancestral import ancestral_chances

V, MASK = 24, 23
SHARES = ("0.0", "0.1", "0.2")


@pytest.fixture
def golden(shared):
    def read(name: str) -> dict[str, torch.Tensor]:
        return {key: torch.as_tensor(value) for key, value in np.load(shared / f"golden/uniform/{name}.npz").items()}
    return read


def score(z: dict, noisy, level: Level, weights, dtype, mask=None):
    """Losses, -log p(x) and gradients [B, L, ...] at the recorded logits."""
    spread = [x.reshape(-1, 1).expand(z["x0"].shape).flatten().to(dtype) for x in (level.alpha, level.word)]
    targets = NoiseTargets(z["x0"].flatten(), noisy.flatten(), torch.ones(noisy.numel(), dtype=torch.bool),
                           weights.flatten().to(dtype), *spread, torch.tensor(noisy.numel()), mask)
    hidden = z["logits"].flatten(0, 1).to(dtype).requires_grad_()
    head = torch.eye(V, dtype=dtype, requires_grad=True)
    total, losses, nll = noise_losses(hidden, head, targets)
    by_hidden, by_head = torch.autograd.grad(3 * total, (hidden, head))
    assert torch.allclose(losses.sum(), total) and torch.allclose(by_head, by_hidden.T @ hidden, rtol=1e-4, atol=1e-5)
    return [x.view(*noisy.shape, *x.shape[1:]).double() for x in (losses, nll, by_hidden / 3)]


def weigh(noise: Noise, z: dict, noisy, schedule="linear"):
    level = noise.at(z["t"].unsqueeze(1), schedule)
    masked = torch.zeros_like(noisy, dtype=torch.bool) if noise.mask_token_id is None else noisy == MASK
    mask_rate, word_rate = noise.rates(z["t"].unsqueeze(1), schedule)
    return torch.where(masked, mask_rate, word_rate) / (level.of(masked) + level.alpha * (noisy == z["x0"]))


@pytest.mark.parametrize("dtype, rtol", [(torch.double, 1e-9), (torch.float, 1e-4)])
@pytest.mark.parametrize("share", SHARES)
def test_the_bound_is_gidds_with_its_gradient(golden, share, dtype, rtol):
    z = golden("gidd")
    want = {key.removeprefix(f"p{share}."): value for key, value in z.items() if key.startswith(f"p{share}.")}
    noise = Noise(float(share), V, MASK)
    level = noise.at(z["t"])
    assert noise.strength == pytest.approx(want["B"].item(), rel=1e-12)
    assert torch.allclose(level.alpha.unsqueeze(1), want["alpha"], rtol=1e-12)
    assert torch.allclose(torch.cat((level.word.unsqueeze(1).expand(-1, V - 1), level.mask.unsqueeze(1)), 1),
                          want["beta_pi"], rtol=1e-9)
    weights = weigh(noise, z, want["z"])
    assert torch.allclose(weights, want["elbo_weights"], rtol=1e-9)
    losses, nll, gradient = score(z, want["z"], level, weights, dtype, MASK)
    assert torch.allclose(losses, want["elbo"], rtol=rtol, atol=rtol / 100)
    assert torch.allclose(gradient, want["grad_of_sum_elbo"], rtol=rtol, atol=rtol)
    words = z["logits"].clone()
    words[..., MASK] = -torch.inf
    assert torch.allclose(nll, -words.log_softmax(-1).gather(2, z["x0"].unsqueeze(2)).squeeze(2), rtol=rtol)


@pytest.mark.parametrize("weighting", ["none", "clip", "dynamic"])
@pytest.mark.parametrize("share", SHARES)
def test_what_is_learnt_of_a_text_has_gidds_weights(golden, share, weighting):
    z = golden("gidd")
    noise, noisy = Noise(float(share), V, MASK), z[f"p{share}.z"]
    level = noise.at(z["t"].unsqueeze(1))
    kind = torch.where(noisy == MASK, 0.5 * level.mask, torch.where(
        noisy == z["x0"], 1.0, level.mask + 0.5 * noise.words * level.word))
    uniform = torch.stack((kind, (noisy + 0.5) / noise.words), -1).flatten(0, 1)
    drawn, targets = add_noise(noise, z["x0"].flatten(), torch.arange(4) * 7, z["t"], uniform, shift=False,
                               weighting=None if weighting == "none" else weighting)
    assert torch.equal(drawn.view(3, 7), noisy)
    assert torch.allclose(targets.weights.view(3, 7).double(), z[f"p{share}.{weighting}.weights"], rtol=1e-6)
    losses = noise_losses(z["logits"].float(), torch.eye(V), targets)[1]
    assert torch.allclose(losses.view(3, 7).double(), z[f"p{share}.{weighting}.loss"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype, rtol", [(torch.double, 1e-9), (torch.float, 1e-4)])
def test_the_bound_of_uniform_words_is_udlms_with_its_gradient(golden, dtype, rtol):
    z = golden("udlm")
    noise, noisy = Noise(1.0, V, None), z["z_uniform"]
    losses, _, gradient = score(z, noisy, noise.at(z["t"]), weigh(noise, z, noisy), dtype)
    assert torch.allclose(losses, z["diffusion_loss"], rtol=rtol, atol=rtol / 100)
    assert torch.allclose(gradient, z["grad_of_sum"], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype, rtol", [(torch.double, 1e-9), (torch.float, 1e-4)])
@pytest.mark.parametrize("name", ["LogLinear", "LogLinear0", "Cosine"])
def test_the_bound_is_duos_under_any_schedule(golden, name, dtype, rtol):
    z = golden("duo")
    alpha, noisy = z[f"{name}.alpha"], z["z_uniform"]
    level = Level(alpha, torch.zeros_like(alpha), (1 - alpha) / V)
    own = alpha.unsqueeze(1) * (noisy == z["x0"])
    weights = (-z[f"{name}.dalpha"] / (V * alpha)).unsqueeze(1) / (level.word.unsqueeze(1) + own)
    losses, _, gradient = score(z, noisy, level, weights, dtype)
    assert torch.allclose(losses, z[f"{name}.nll"], rtol=rtol, atol=rtol / 100)
    assert torch.allclose(gradient, z[f"{name}.grad_of_sum"], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rates_are_those_of_the_schedules_derivative(schedule):
    noise, t = Noise(1.0, 50, 7), torch.tensor([0.1, 0.5, 0.9], dtype=torch.double, requires_grad=True)
    alpha = noise.at(t, schedule).alpha
    slope, = torch.autograd.grad(alpha.sum(), t)
    assert torch.allclose(noise.rates(t, schedule)[1], -slope / (49 * alpha), rtol=1e-9)


def enumerate_chances(noise: Noise, z: dict, noisy, now: Level, then: Level, mask=None) -> torch.Tensor:
    """[B, L, V]: the chances of all words after a step."""
    words = z["logits"].clone()
    if mask is not None:
        words[..., mask] = -torch.inf
    p = words.softmax(-1)
    masked = torch.zeros_like(noisy, dtype=torch.bool) if mask is None else noisy == mask
    stay, to_mask, to_word = ancestral_chances(now, then, p.gather(2, noisy.unsqueeze(2)).squeeze(2), masked,
                                               noise.words)
    chances = (1 - stay - to_mask - to_word).unsqueeze(2) * p
    uniform = torch.full((V,), 1 / noise.words, dtype=torch.double)
    if mask is not None:
        uniform[mask] = 0
        chances[..., mask] += to_mask
    return (chances + to_word.unsqueeze(2) * uniform).scatter_add(2, noisy.unsqueeze(2), stay.unsqueeze(2))


@pytest.mark.parametrize("share", SHARES)
def test_an_ancestral_step_is_gidds(golden, share):
    z = golden("gidd")
    noise = Noise(float(share), V, MASK)
    now, then = (noise.at(z[name].unsqueeze(1)) for name in "ts")
    chances = enumerate_chances(noise, z, z[f"p{share}.z"], now, then, MASK)
    assert torch.allclose(chances, z[f"p{share}.posterior"], rtol=1e-9, atol=1e-12)


def test_an_ancestral_step_is_udlms_and_duos(golden):
    noise = Noise(1.0, V, None)
    z = golden("udlm")
    now, then = (noise.at(z[name].unsqueeze(1)) for name in "ts")
    assert torch.allclose(enumerate_chances(noise, z, z["z_uniform"], now, then), z["posterior_model"], rtol=1e-9)
    z = golden("duo")
    for name in ("LogLinear", "LogLinear0", "Cosine"):
        now, then = (Level(a, torch.zeros_like(a), (1 - a) / V) for a in (
            z[f"{name}.alpha"].unsqueeze(1), z[f"{name}.alpha_s"].unsqueeze(1)))
        assert torch.allclose(enumerate_chances(noise, z, z["z_uniform"], now, then), z[f"{name}.posterior"], rtol=1e-9)


@pytest.mark.parametrize("share, mask", [(0.0, 3), (0.4, 3), (1.0, None), (1.0, 3)])
def test_words_become_noise_as_often_as_they_should(share, mask):
    noise, t, count = Noise(share, 8, mask), 0.6, 40_000
    tokens = torch.full((count,), 5)
    uniform = torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    noisy, targets = add_noise(noise, tokens, torch.tensor([0, count]), torch.tensor([t]), uniform, shift=False)
    level = noise.at(torch.tensor(t))
    expected = torch.full((8,), level.word.item())
    expected[5] += level.alpha
    if mask is not None:
        expected[mask] = level.mask
    assert expected.sum().item() == pytest.approx(1)
    assert torch.allclose(torch.bincount(noisy, minlength=8) / count, expected, atol=0.01)
    assert targets.scored.all() and torch.equal(targets.tokens, tokens)


def test_given_tokens_stay_clean_and_first_tokens_are_not_scored_under_shift():
    tokens, ends = torch.arange(1, 11), torch.tensor([0, 4, 10])
    trainable = torch.arange(10) >= 6
    uniform = torch.zeros(10, 2)
    noisy, targets = add_noise(Noise(1.0, 20, 0), tokens, ends, torch.tensor([0.5, 0.5]), uniform, shift=False,
                               trainable=trainable)
    assert torch.equal(noisy, torch.where(trainable, 1, tokens)) and torch.equal(targets.scored, trainable)
    _, shifted = add_noise(Noise(1.0, 20, 0), tokens, ends, torch.tensor([0.5, 0.5]), uniform, shift=True)
    assert (~shifted.scored).nonzero().flatten().tolist() == [3, 9] and shifted.normaliser == 8
    assert torch.equal(shifted.tokens[:-1], tokens[1:])


def test_nothing_scored_gives_no_loss_and_no_gradient():
    _, targets = add_noise(Noise(1.0, V, None), torch.arange(3), torch.tensor([0, 3]), torch.tensor([0.5]),
                           torch.rand(3, 2), shift=False, trainable=torch.zeros(3, dtype=torch.bool))
    hidden = torch.randn(3, V, requires_grad=True)
    total = noise_losses(hidden, torch.eye(V), targets)[0]
    total.backward()
    assert total == 0 and (hidden.grad == 0).all()


@pytest.mark.parametrize("share, mask", [(0.0, 4), (0.2, 4), (1.0, None)])
def test_the_bound_of_single_words_with_known_frequencies_is_their_likelihood(share, mask):
    """The reverse process that frequencies give is then the true one, so the bound is tight. t by Gauss-Legendre, in
    the logit of t, because the loss is large near 0 and 1."""
    V = 5
    noise, p = Noise(share, V, mask), torch.tensor([0.1, 0.2, 0.4, 0.25, 0.05], dtype=torch.double)
    if mask is not None:
        p[mask] = 0
        p = p / p.sum()
    places, parts = (torch.as_tensor(values) for values in np.polynomial.legendre.leggauss(400))
    t = torch.sigmoid(20 * places)
    parts = parts * 20 * t * (1 - t)
    level, rates = noise.at(t), noise.rates(t)
    for x in range(noise.words):
        total = 0.0
        for z in range(V):
            masked, own = torch.full_like(t, z == mask, dtype=torch.bool), level.alpha * (z == x)
            chance = level.of(masked) + own
            targets = NoiseTargets(torch.full((400,), x), torch.full((400,), z), torch.ones(400, dtype=torch.bool),
                                   torch.where(masked, *rates) / chance, level.alpha, level.word, torch.tensor(400),
                                   mask)
            losses = noise_losses(p.log().clamp(min=-50).expand(400, V), torch.eye(V, dtype=torch.double), targets)[1]
            total += (parts * chance * losses).sum().item()
        assert total == pytest.approx(-p[x].log().item(), rel=5e-4)
