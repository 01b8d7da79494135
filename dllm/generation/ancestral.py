"""Ancestral sampling of models of uniform words, in which every token may change in every step, and their corrections.

A strategy as those of strategies.py, for the noise of diffusion/uniform.py. B rows, L positions.
"""

import torch
from torch import Tensor

from dllm.diffusion.uniform import Level, Noise
from dllm.generation.steps import Scorer, Step, Update
from dllm_kernels import philox_uniform

CORRECTION_TEMPERATURE, CORRECTION_PATIENCE = 0.1, 32  # GIDD's; the latter in steps without a larger agreement


def begin_with_noise(noise: Noise, tokens: Tensor, editable: Tensor, key_mask: Tensor | None, seed: int | Tensor,
                     sequence: Tensor) -> Tensor:
    """The canvas [B, L] at time 1: masks, or where the noise has none, uniform words in the place of editable tokens.

    seed, sequence: whose random numbers a row has.
    """
    if noise.share < 1:
        return tokens
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if key_mask is not None:
        place = (key_mask.long().cumsum(1) - 1).clamp(min=0)
    return torch.where(editable, noise.pick(philox_uniform(seed, sequence, 2**31, place)[..., 0]), tokens)


class Patience:
    """When the corrections of rows end: they change nothing, or have long brought no larger agreement."""

    def __init__(self, rows: int):
        self.best = torch.full((rows,), -1.0, device="cpu")
        self.waited = torch.zeros(rows, dtype=torch.long, device="cpu")

    def is_over(self, agreement: Tensor, changed: Tensor) -> Tensor:
        """[B] bool on the CPU, of what a step has found and whether it has changed anything, [B] each."""
        agreement = agreement.cpu()
        self.waited = torch.where(agreement > self.best, 0, self.waited + 1)
        self.best = torch.maximum(self.best, agreement)
        return (self.waited > CORRECTION_PATIENCE) | ~changed.cpu()


def renoise(step: Step, scorer: Scorer, *, noise: Noise, greedy: bool) -> Update:
    """Ancestral steps, and after the last of them corrections. All rows are at the same step."""
    if (step.index < step.total).all():
        return step_ancestrally(step, scorer, noise=noise, greedy=greedy)
    return correct(step, scorer)


def step_ancestrally(step: Step, scorer: Scorer, *, noise: Noise, greedy: bool) -> Update:
    """From time t to s, each position keeps its token, or becomes a mask, a uniform word, or one of the model's (UDLM,
    arXiv:2412.10193; GIDD, arXiv:2503.04482), see `ancestral_chances`. Time falls evenly from 1 to 0, and the last step
    follows the same chances, as the bound has it; Duo draws from the model's distribution there.

    greedy: whether the last step takes the most likely words (Duo, arXiv:2506.10892).
    """
    asked = step.editable & step.chances(step.working)
    word = noise.pick(step.uniform[..., 2])
    guess = scorer.predict(asked, word)
    now, then = (noise.at(1 - (step.index + more).double() / step.total) for more in (0, 1))
    chances = ancestral_chances(Level(*map(step.chances, now)), Level(*map(step.chances, then)), guess.of_current.exp(),
                                step.tokens == step.mask_token_id, noise.words)
    stay, to_mask, to_word = torch.stack(chances).cumsum(0)
    drawn = step.uniform[..., 1]
    tokens, sure = guess.drawn, guess.of_drawn
    for bound, its, log in ((to_word, word, guess.of_other), (to_mask, step.mask_token_id, 0.0),
                            (stay, step.tokens, guess.of_current)):
        tokens, sure = torch.where(drawn < bound, its, tokens), torch.where(drawn < bound, log, sure)
    if greedy:
        last = step.chances(step.last)
        tokens, sure = torch.where(last, guess.best, tokens), torch.where(last, guess.of_best, sure)
    tokens = torch.where(asked, tokens, step.tokens)
    scored = asked & (tokens != step.mask_token_id)
    return Update(tokens, torch.where(scored, sure.exp().float(), -torch.inf))


def ancestral_chances(now: Level, then: Level, p: Tensor, masked: Tensor, words: int) -> tuple[Tensor, Tensor, Tensor]:
    """With which chances a position stays as it is, becomes a mask, or a uniform word; else it becomes one drawn from
    the model's distribution.

    This is P(j) = q(z at t | j at s) q(j at s | p) / q(z at t | p) as a mixture, which needs p at the current token z
    alone: 0 at a mask. p, masked: [B, L]; the levels broadcast with them.
    """
    kept = now.alpha / then.alpha
    noise, before = now.of(masked), then.of(masked)
    whole = now.alpha * p + noise
    anew = (noise - kept * before) / whole
    return (now.alpha * p + kept * before) / whole, anew * then.mask, anew * words * then.word


def correct(step: Step, scorer: Scorer) -> Update:
    """Draw words at a low temperature, and replace the token whose drawn other word is the likeliest (GIDD's
    self-correction)."""
    asked = step.editable & step.chances(step.working)
    guess = scorer.predict(asked, step.tokens, temperature=CORRECTION_TEMPERATURE)
    gain = guess.of_drawn.masked_fill(~asked | (guess.drawn == step.tokens), -torch.inf)
    chosen = torch.zeros_like(asked).scatter(1, gain.argmax(1, keepdim=True), True) & (gain > -torch.inf)
    tokens = torch.where(chosen, guess.drawn, step.tokens)
    sure = torch.where(chosen, guess.of_drawn, guess.of_current)
    agreement = ((tokens == guess.best) & asked).sum(1) / asked.sum(1).clamp(min=1)
    return Update(tokens, torch.where(asked, sure.exp().float(), -torch.inf), agreement=agreement)
