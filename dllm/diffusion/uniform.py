"""Noise of masks and uniform words: GIDD's hybrid (arXiv:2503.04482), with UDLM (arXiv:2412.10193) as its end point.

N words, the mask not among them. At time t a word x is still itself with the chance alpha, else a mask or any word:
q(z | x) = alpha [z = x] + b(z). A model gives a distribution p over the clean words; q(z | p) = alpha p(z) + b(z), and

    -log p(text) <= E over t, z of the sum over its tokens of
        w(z) (KL(q(. | x) || q(. | p)) + r - log r - 1),   r = q(z | x) / q(z | p),
        w(z) = (b'(z) - (alpha' / alpha) b(z)) / q(z | x)

A share of uniform words below 1 has GIDD's schedule: of what is noise at t = 1/2 and of all, that share are words. With
share 1 there are no masks, b = (1 - alpha) / N under any schedule of corruption.py, and the bound is UDLM's and Duo's.
With ratio = alpha / b(word), d_j = log(1 + ratio p_j) and g = log(1 + ratio) - d_x,

    KL = b(word) ((1 + ratio) g - sum of d_j over the words j other than x)
    log r = g where z is x, -d_z where it is another word, 0 where it is a mask
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dllm.diffusion.corruption import SCHEDULES
from dllm.diffusion.objectives import LossSums, sum_by_ratio
from dllm.model.families import ModelConfig
from dllm_kernels import slices_of_rows

LEAST_SHARE = math.exp(-20)  # GIDD's, in the place of 0
MAX_WEIGHT = 2.0  # of "clip" and "dynamic"


class Level(NamedTuple):
    """How noisy words are at some times; fp64 of their shape."""

    alpha: Tensor  # chance of a word to be still itself
    mask: Tensor  # b(mask)
    word: Tensor  # b(any word)

    def of(self, masked: Tensor) -> Tensor:
        """b(z), where z is a mask or a word."""
        return torch.where(masked, self.mask, self.word)


class Noise(NamedTuple):
    """The noise that a model is trained on."""

    share: float  # of uniform words, see above
    vocab_size: int
    mask_token_id: int | None  # no word; None: all are

    @classmethod
    def of(cls, config: ModelConfig, mask_token_id: int | None = None) -> Self:
        """That of a model; mask_token_id: another than the configuration's."""
        mask = config.mask_token_id if mask_token_id is None else mask_token_id
        return cls(config.uniform_share, config.vocab_size, mask)

    @property
    def words(self) -> int:
        """N"""
        return self.vocab_size - (self.mask_token_id is not None)

    @property
    def strength(self) -> float:
        """GIDD's B, for its gamma of 1."""
        share = max(self.share, LEAST_SHARE)
        return 2 * share / (1 - share)

    def at(self, t: Tensor, schedule: str = "linear") -> Level:
        """t: times from 0 (clean) to 1."""
        t = t.double()
        if self.share == 1:
            alpha = SCHEDULES[schedule].alpha(t)
            return Level(alpha, torch.zeros_like(t), (1 - alpha) / self.words)
        c = self.strength * (t * (1 - t)).sqrt()
        return Level((1 - t) / (1 + c), t / (1 + c), c / (self.words * (1 + c)))

    def rates(self, t: Tensor, schedule: str = "linear") -> tuple[Tensor, Tensor]:
        """w(z) q(z | x) of a mask and of a word, fp64; t: above 0 and below 1."""
        t = t.double()
        if self.share == 1:
            kept, weight, _ = SCHEDULES[schedule]
            alpha = kept(t)
            return torch.zeros_like(t), weight(t) * (1 - alpha) / (self.words * alpha)
        c = self.strength * (t * (1 - t)).sqrt()
        return 1 / ((1 - t) * (1 + c)), c / (2 * t * (1 - t) * self.words * (1 + c))

    def pick(self, uniform: Tensor) -> Tensor:
        """A word for each uniform number in [0, 1), int64."""
        words = (uniform * self.words).long()
        return words if self.mask_token_id is None else words + (words >= self.mask_token_id)


class NoiseTargets(NamedTuple):
    """What the hidden states at T positions are scored on."""

    tokens: Tensor  # [T] int64, the clean words
    noisy: Tensor  # [T] int64
    scored: Tensor  # [T] bool
    weights: Tensor  # [T] fp32, w(z) or what stands for it
    alpha: Tensor  # [T] fp32
    word: Tensor  # [T] fp32, b(word)
    normaliser: Tensor  # int64 scalar: scored tokens; divide the sum over all micro-batches of a step by their total
    mask_token_id: int | None = None  # no word
    ratio: Tensor | None = None  # [T] fp32: 1 - alpha, if the losses are wanted by it too
    count: int | None = None  # how many are scored


def add_noise(noise: Noise, tokens: Tensor, cu_seqlens: Tensor, times: Tensor, uniform: Tensor, *, shift: bool,
              schedule: str = "linear", weighting: str | None = None, trainable: Tensor | None = None,
              by_ratio: bool = False) -> tuple[Tensor, NoiseTargets]:
    """Noisy words [T], and what is learnt from them.

    Args:
        tokens: [T] int64, documents one after the other, which end at cu_seqlens [S + 1].
        times: [S], one a document, above 0 and below 1.
        uniform: [T, 2] in [0, 1): which kind of noise a token becomes, and which word.
        schedule: with share 1, a key of `SCHEDULES`.
        weighting: None: w, for the bound; "clip": at most 2; "dynamic": GIDD's, 2 for masks, 1 for other words.
        trainable: [T] bool; tokens elsewhere stay clean, and are not scored (a prompt, say).
        by_ratio: whether the losses are wanted by the share of noise too.
    """
    lengths = cu_seqlens.diff().long()
    spread = torch.repeat_interleave(torch.stack((*noise.at(times, schedule), *noise.rates(times, schedule),
                                                  times.double())), lengths, dim=1)
    level, (mask_rate, word_rate, t) = Level(*spread[:3]), spread[3:]
    kind, words = uniform[:, 0].double(), noise.words * level.word
    noisy = torch.where(kind < level.mask + words, noise.pick(uniform[:, 1].double()), tokens)
    if noise.mask_token_id is not None:
        noisy = noisy.masked_fill(kind < level.mask, noise.mask_token_id)
    scored = torch.ones_like(tokens, dtype=torch.bool) if trainable is None else trainable.clone()
    if trainable is not None:
        noisy = torch.where(trainable, noisy, tokens)
    if shift:
        scored[cu_seqlens[:-1].long()] = False
    own, masked = noisy == tokens, noisy == (-1 if noise.mask_token_id is None else noise.mask_token_id)
    weights = torch.where(masked, mask_rate, word_rate) / (level.of(masked) + level.alpha * own)
    if weighting == "dynamic":
        weights = torch.where(own, noise.strength / noise.vocab_size * (torch.sigmoid(-t) / 2).exp(), 1.0 + masked)
    if weighting is not None:
        weights = weights.clamp(max=MAX_WEIGHT)
    targets = NoiseTargets(tokens, noisy, scored, weights.float(), level.alpha.float(), level.word.float(),
                           scored.sum(), noise.mask_token_id, (1 - level.alpha).float() if by_ratio else None,
                           int(scored.sum()))
    if shift:  # what wraps around is a first token, which is not scored
        targets = NoiseTargets(*(x.roll(-1) if isinstance(x, Tensor) and x.ndim else x for x in targets))
    return noisy, targets


def noise_losses(hidden: Tensor, head_weight: Tensor, targets: NoiseTargets) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the scored positions; [T, V] logits never exist.

    Args:
        hidden: [..., D], T of them. head_weight: [V, D].
    Returns: their sum, with exact gradients; each of them, and each -log p(x), [R] without gradients, fp32 (fp64 of
        fp64 hidden states).
    """
    rows = (targets.scored.nonzero() if targets.count is None else
            torch.nonzero_static(targets.scored, size=targets.count)).squeeze(1)  # which waits for no GPU
    values = [x[rows] for x in (targets.tokens, targets.noisy, targets.weights, targets.alpha, targets.word)]
    return _NoiseLoss.apply(hidden.flatten(0, -2)[rows], head_weight, targets.mask_token_id, *values)


def sum_noise_losses(hidden: Tensor, head_weight: Tensor, targets: NoiseTargets) -> LossSums:
    """The weighted sum of the losses of one micro-batch; see `noise_losses`."""
    total, _, nll = noise_losses(hidden, head_weight, targets)
    each = torch.zeros(len(targets.scored), device=hidden.device).masked_scatter(targets.scored, nll.float())
    return LossSums(total, nll.sum(), torch.zeros((), device=hidden.device), sum_by_ratio(each, targets))


class _NoiseLoss(torch.autograd.Function):
    """Computes the gradients with the losses, so that logits are multiplied once: what comes upstream is a number."""

    @staticmethod
    def forward(ctx, hidden, weight, mask_token_id, x, z, w, alpha, word):
        kind, own = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(kind):
            own = torch.get_autocast_dtype(kind)
        exact = torch.promote_types(own, torch.float32)
        rows, head, learns = hidden.to(own), weight.to(own), any(ctx.needs_input_grad[:2])
        losses, nll = (torch.empty(len(x), dtype=exact, device=x.device) for _ in range(2))
        if learns:
            for_hidden, for_weight = torch.empty_like(rows), torch.zeros_like(weight, dtype=exact)
        with torch.autocast(kind, enabled=False):
            for part in slices_of_rows(len(x), len(weight), x.device):
                logits = (rows[part] @ head.T).to(exact)
                losses[part], nll[part], gradient = score_noise(
                    logits, mask_token_id, *(values[part] for values in (x, z, w, alpha, word)))
                if learns:
                    gradient = gradient.to(own)
                    for_hidden[part] = gradient @ head
                    for_weight += gradient.T @ rows[part]
        if learns:
            ctx.save_for_backward(for_hidden.to(hidden.dtype), for_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, nll)
        return losses.sum(), losses, nll

    @staticmethod
    def backward(ctx, upstream, *_):
        for_hidden, for_weight = ctx.saved_tensors
        return for_hidden * upstream, for_weight * upstream, *[None] * 6


def score_noise(logits: Tensor, mask_token_id: int | None, x: Tensor, z: Tensor, w: Tensor, alpha: Tensor,
                word: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [R], -log p(x) [R] and the gradients [R, V] of the losses' sum, of logits [R, V], which are overwritten.

    With a_j = ratio p_j / (1 + ratio p_j) and e = r - 1, 0 at a mask, the gradient to logit j is
    w (p_j (b A + alpha a_x + e a_z) - b a_j - [j = x] alpha a_x - [j = z] e a_z), A the sum of all a.
    """
    w, alpha, word, x, z = (values.unsqueeze(1) for values in (w.to(logits.dtype), alpha.to(logits.dtype),
                                                               word.to(logits.dtype), x, z))
    if mask_token_id is not None:
        logits[:, mask_token_id] = -torch.inf
    logits -= logits.logsumexp(1, keepdim=True)
    log_x, ratio = logits.gather(1, x), alpha / word
    p = logits.exp_()
    scaled = p * ratio
    scaled_x, scaled_z = scaled.gather(1, x), scaled.gather(1, z)
    gap = torch.log1p(ratio * -torch.expm1(log_x) / (1 + scaled_x))
    others = scaled.log1p().scatter_(1, x, 0).sum(1, keepdim=True)
    log_r = torch.where(z == x, gap, -scaled_z.log1p())
    if mask_token_id is not None:
        log_r = log_r.masked_fill(z == mask_token_id, 0)
    excess = log_r.expm1()
    loss = w * (word * ((1 + ratio) * gap - others) + excess - log_r)

    a = scaled.div_(1 + scaled)
    at_x, at_z = alpha * a.gather(1, x), excess * a.gather(1, z)
    gradient = p.mul_(word * a.sum(1, keepdim=True) + at_x + at_z).sub_(a.mul_(word))
    gradient = gradient.scatter_add_(1, x, -at_x).scatter_add_(1, z, -at_z).mul_(w)
    return loss.squeeze(1), -log_x.squeeze(1), gradient
