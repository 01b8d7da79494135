"""Decoding strategies: what one denoising step commits. Pure functions of the canvas and a scorer.

A strategy gets a `Step` and a `Scorer` and returns an `Update`. It asks the scorer only about the positions it needs;
a strategy that never asks costs no forward pass, which is how steps that commit nothing are free.
Symbols: B rows, L positions, step i of n, time running from 1 to eps, t before the step and s after it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dllm.diffusion.corruption import SCHEDULES
from dllm.generation.config import CONFIDENCES, MDMGenerationConfig
from dllm.generation.steps import EditScorer, Scorer, Step, Strategy, Update
from dllm.generation.windows import Window


def commit_most_confident(step: Step, scorer: Scorer, *, confidence: str) -> Update:
    """Commit trunc(masked * (1 - s/t)) positions per row, all at the last step (MaskGIT, arXiv:2202.04200; Dream).

    The product is in fp32, as in the original: exact arithmetic would commit one more now and then.
    """
    k = torch.where(step.last, step.left, (step.left.float() * step.share()).long())
    if not k.any():
        return Update(step.tokens, None)
    return scorer.unmask(k, confidence)


def commit_evenly(step: Step, scorer: Scorer, *, confidence: str) -> Update:
    """Commit as many positions in each step, one more in the first ones where that does not come out (LLaDA,
    arXiv:2502.09992, which calls it remasking). The confidence is that of the distribution before temperature."""
    k = torch.where(step.left > 0, step.size // step.total + (step.index < step.size % step.total), 0)
    if not k.any():
        return Update(step.tokens, None)
    return scorer.unmask(k, confidence, raw=True)


def commit_scheduled(step: Step, scorer: Scorer, *, schedule: str) -> Update:
    """Commit round(masked * (1 - (1 - alpha(s)) / (1 - alpha(t)))) positions, halves to even, so that the share masked
    follows a schedule of corruption.py (MDLM sampler of Tiny-A2D). The confidence is as in `commit_evenly`; the product
    is in fp32, as in the original, which decides where a half would be."""
    alpha = SCHEDULES[schedule].alpha
    t, s = ((1 - i.double() / step.total).float() for i in (step.index, step.index + 1))
    share = 1 - (1 - alpha(s)) / (1 - alpha(t))
    k = (step.left.float() * share).round().long()
    if not k.any():
        return Update(step.tokens, None)
    return scorer.unmask(k, "prob", raw=True)


def commit_evenly_or_above(step: Step, scorer: Scorer, *, block_length: int | None, threshold: float) -> Update:
    """Commit as many of a block's positions in each step, and more if they are so sure (LLaDA2; SDAR's
    low_confidence_dynamic, arXiv:2510.06303). A block that begins within the prompt is so done in fewer steps."""
    length = step.size if block_length is None else block_length
    k = length // step.total + (step.index < length % step.total)
    return scorer.unmask(torch.where(step.left > 0, k, 0), "prob", threshold=threshold)


def commit_and_edit(step: Step, scorer: Scorer, *, threshold: float, editing_threshold: float) -> Update:
    """Commit every position whose confidence reaches the threshold, or the surest; and replace what was committed
    before where the model is surer than `editing_threshold` of another token (LLaDA2.1)."""
    scored = scorer.score(step.editable & step.working.to(step.tokens.device).unsqueeze(1))
    masked = torch.where(step.masked, scored.confidence, -torch.inf)
    surest = torch.zeros_like(step.masked).scatter(1, masked.argmax(1, keepdim=True), True)
    chosen = step.masked & (surest | (masked >= threshold))
    edited = step.editable & ~step.masked & (scored.confidence > editing_threshold)
    return Update(torch.where(chosen | edited, scored.tokens, step.tokens), scored.confidence)


def commit_prefix_and_revise(step: Step, scorer: Scorer, *, threshold: float) -> Update:
    """Commit the masked positions before the first one whose confidence does not reach the threshold, and at least the
    first; and let every position committed before take the token that it would get now (DMax, arXiv:2604.08302)."""
    scored = scorer.score(step.editable & step.working.to(step.tokens.device).unsqueeze(1), raw=True)
    unsure = step.masked & (scored.confidence < threshold)
    chosen = step.masked & ((unsure.cumsum(1) == 0) | (step.masked.cumsum(1) == 1))
    return Update(torch.where(chosen | (~step.masked & (scored.tokens >= 0)), scored.tokens, step.tokens),
                  scored.confidence)


def has_converged(step: Step, tokens: Tensor, confidence: Tensor) -> Tensor:
    """Rows [B], on the CPU, whose block is done after a step of DMax: nothing is masked, and nothing changed or every
    confidence is at least 0.9. tokens: [B, L], after the step."""
    filled = ~(step.editable & (tokens == step.mask_token_id)).any(1)
    return (filled & ((tokens == step.tokens).all(1) | ((confidence >= 0.9) | ~step.editable).all(1))).cpu()


def commit_above(step: Step, scorer: Scorer, *, confidence: str, raw: bool, threshold: float) -> Update:
    """Commit every position whose confidence reaches the threshold, and at least the surest (Fast-dLLM,
    arXiv:2505.22618)."""
    return scorer.unmask((step.left > 0).long(), confidence, raw=raw, threshold=threshold)


def commit_surest(step: Step, scorer: Scorer, *, confidence: str) -> Update:
    """Commit one position of each row (DreamOn, arXiv:2602.01326)."""
    return scorer.unmask((step.left > 0).long(), confidence)


def commit_above_in_time(step: Step, scorer: Scorer, *, steps: int, threshold: float) -> Update:
    """As `commit_above`, but no more positions than an even commitment in so many steps would have committed by now
    (Fast-dLLM's confidence_threshold for Dream, where there are no blocks)."""
    scored = scorer.score(step.masked)
    due = (step.size * (step.index + 1).clamp(max=steps) // steps - (step.size - step.left)).clamp(min=1)
    order = scored.confidence.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
    n = torch.arange(order.shape[1], device=order.device)
    sure = (scored.confidence.gather(1, order) >= threshold) & (n < due.to(n.device).unsqueeze(1)) | (n == 0)
    chosen = torch.zeros_like(step.masked).scatter(1, order, sure) & step.masked
    return Update(torch.where(chosen, scored.tokens, step.tokens), scored.confidence)


def commit_by_factor(step: Step, scorer: Scorer, *, raw: bool, factor: float) -> Update:
    """Commit the n surest, the largest n with (n + 1) (1 - confidence of the n-th) <= factor, at least one (Fast-dLLM):
    the more are committed together, the surer the least sure of them must be."""
    scored = scorer.score(step.masked, raw=raw)
    order = scored.confidence.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
    n = torch.arange(1, order.shape[1] + 1, device=order.device)
    sure = scored.confidence.gather(1, order) >= 1 - factor / (n + 1)
    sure[:, 0] = True
    chosen = torch.zeros_like(step.masked).scatter(1, order, sure) & step.masked
    return Update(torch.where(chosen, scored.tokens, step.tokens), scored.confidence)


def accept_within_entropy(entropy: Tensor, bound: float, eligible: Tensor | None = None) -> Tensor:
    """The largest set of the least entropies of each row that sum, without the last one, to at most `bound`; so at
    least one (EB-Sampler, arXiv:2505.24857: the sum bounds what the tokens could tell about each other).

    Args:
        entropy: [B, C] fp32, in nats; the lowest position goes first among equals.
        eligible: [B, C] bool, the positions that may be accepted; None: all.
    Returns: [B, C] bool.
    """
    if eligible is not None:
        entropy = entropy.masked_fill(~eligible, torch.inf)
    ascending, order = entropy.sort(dim=1, stable=True)
    within = ascending.cumsum(1) - ascending <= bound
    accepted = torch.zeros_like(within).scatter(1, order, within)
    return accepted if eligible is None else accepted & eligible


def commit_within_entropy(step: Step, scorer: Scorer, *, bound: float) -> Update:
    """Commit the positions that `accept_within_entropy` accepts."""
    scored = scorer.score(step.masked, confidence="entropy")
    chosen = accept_within_entropy(-scored.confidence, bound, step.masked)
    return Update(torch.where(chosen, scored.tokens, step.tokens), scored.confidence)


def commit_in_window(step: Step, scorer: Scorer, *, window: Window, confidence: str, raw: bool,
                     threshold: float) -> Update:
    """Commit every position of the window whose confidence reaches the threshold, and at least the surest of each
    block that must commit (D2F, arXiv:2508.09192; multi-block decoding)."""
    joined, must = (x.repeat_interleave(window.block_length, 1)[:, :step.masked.shape[1]] for x in window.open(
        step.masked, step.editable))
    asked = step.masked & joined
    scored = scorer.score(asked, confidence=confidence, raw=raw)
    blocks = window.split(scored.confidence.nan_to_num(-torch.inf), -torch.inf)
    surest = torch.zeros_like(blocks, dtype=torch.bool).scatter(2, blocks.argmax(2, keepdim=True), True).flatten(1)
    chosen = asked & ((scored.confidence >= threshold) | (must & surest[:, :must.shape[1]]))
    return Update(torch.where(chosen, scored.tokens, step.tokens), scored.confidence)


def commit_at_random(step: Step, scorer: Scorer) -> Update:
    """Commit each masked position with probability 1 - s/t, whatever its confidence (MDLM, arXiv:2406.07524)."""
    chosen = step.masked & (step.uniform[..., 1] < step.chances(step.share().masked_fill(step.last, 1.0)))
    if not chosen.any():
        return Update(step.tokens, None)
    scored = scorer.score(chosen)
    return Update(torch.where(chosen, scored.tokens, step.tokens), scored.confidence)


def commit_and_remask_at_random(step: Step, scorer: Scorer, *,
                                chances: Callable[[Step], tuple[Tensor, Tensor]]) -> Update:
    """Commit each masked position by chance, and mask each committed one again by chance.

    chances: of a step the two probabilities, fp64 [B] or [1]: `remdm_chances` or `flow_chances`.
    """
    commit, again = chances(step)
    drawn = step.uniform[..., 1]
    again, commit = step.chances(again.masked_fill(step.last, 0.0)), step.chances(commit.masked_fill(step.last, 1.0))
    tokens = torch.where(step.editable & ~step.masked & (drawn < again), step.mask_token_id, step.tokens)
    chosen = step.masked & (drawn < commit)
    if not chosen.any():
        return Update(tokens, None)
    scored = scorer.score(chosen)
    return Update(torch.where(chosen, scored.tokens, tokens), scored.confidence)


def remdm_chances(step: Step, *, rate: float) -> tuple[Tensor, Tensor]:
    """A committed position is masked again with sigma = min(rate, s / (1 - t)) (ReMDM-cap, arXiv:2503.00307)."""
    t, s = (time.double() for time in step.times())
    again = (s / (1 - t)).clamp(max=rate).masked_fill(t == 1, 0.0)
    return commit_for(1 - t, 1 - s, again), again


def flow_chances(step: Step, *, schedule: str, rule: str,
                 corrector: tuple[float, float, float] | None) -> tuple[Tensor, Tensor]:
    """Discrete flow matching with a mask source ("Mask DFM", arXiv:2407.15595)."""
    commit, again = flow_rates(step, schedule=schedule, rule=rule, corrector=corrector)
    return as_chance(commit, rule), as_chance(again, rule)


def flow_rates(step: Step, *, schedule: str, rule: str,
               corrector: tuple[float, float, float] | None) -> tuple[Tensor, Tensor]:
    """What a step changes of what still waits, and what it undoes of what is done: fp64 [B] or [1] each.

    The flow time t = i / n runs from 0 to 1; kappa is the share that the schedule keeps. What waits happens at the rate
    (1 + beta) kappa' / (1 - kappa), what is done is undone at beta kappa' / kappa, with the corrector
    beta = A t^a (1 - t)^b. Returned are the rates times the length of the step; with the rule "exact" already the
    probabilities that keep as much done as the path does: ReMDM's step with sigma = h beta kappa' / kappa, at most what
    a step can make good.
    """
    kept, weight, _ = SCHEDULES[schedule]
    t, h = step.index.double() / step.total, 1 / step.total.double()
    now, then = kept(1 - t), kept(1 - (step.index + 1).double() / step.total)
    fill, scale = weight(1 - t), torch.zeros_like(t)
    if corrector is not None:
        factor, a, b = corrector
        scale = factor * t**a * (1 - t)**b
    back = torch.where(now > 0, scale * fill * (1 - now) / now, 0.0)  # at t = 0 nothing is done
    if rule == "exact":
        again = torch.minimum(h * back, (1 - then) / now).clamp(max=1)
        return commit_for(now, then, again), again
    return h * (1 + scale) * fill, h * back


def as_chance(rate: Tensor, rule: str) -> Tensor:
    """The probability of a change from its rate in a step: 1 - exp(-rate), or at most 1."""
    return -torch.expm1(-rate) if rule == "exponential" else rate.clamp(max=1)


def commit_for(now: Tensor, then: Tensor, again: Tensor) -> Tensor:
    """With which probability masked positions are committed, so that the share committed goes from `now` to `then`
    although each committed one is masked again with probability `again`."""
    return (then - (1 - again) * now) / (1 - now)


def plan_and_remask(step: Step, scorer: Scorer) -> Update:
    """P2 (arXiv:2502.03540): score every editable position anew, mask the floor(editable * (1 - (i+1)/n)) least sure.

    A position that stays revealed keeps its token; its confidence is that of the token it would get now.
    """
    rows = step.masked.any(1, keepdim=True)
    scored = scorer.score(step.editable & rows)
    kept_masked = (1 - (step.index + 1).double() / step.total).float()
    remasked_count = (step.editable.sum(1, keepdim=True).float() * step.chances(kept_masked)).floor()
    surest = torch.where(step.editable & scored.confidence.isfinite(), scored.confidence, torch.inf)
    rank = surest.argsort(dim=1, stable=True).argsort(dim=1)
    remask = (rank < remasked_count) & step.editable & rows
    tokens = torch.where(step.masked, scored.tokens, step.tokens)
    return Update(torch.where(remask, step.mask_token_id, tokens), scored.confidence)


def take_edits(step: Step, scorer: EditScorer, *, schedule: str, rule: str,
               corrector: tuple[float, float, float] | None) -> Update:
    """Insert, delete and substitute tokens, each by chance at the rate the model gives (Edit Flows, arXiv:2506.09018).

    A position is deleted or substituted, and a token is inserted after it, at most once in a step. The corrector
    deletes tokens, as if the path from an empty source went backwards, and inserts the more for it. The last step
    leaves no mask. A row with no more room keeps the insertions of the least uniform numbers.
    """
    rates = scorer.rates()  # [B, L, 3]
    happens, undone = (step.chances(rate) for rate in flow_rates(step, schedule=schedule, rule=rule,
                                                                corrector=corrector))
    drawn, last = step.uniform, step.chances(step.last)
    change = as_chance(rates[..., :2].sum(-1) * happens, rule).masked_fill(step.masked & last, 1.0)
    changed = step.editable & (drawn[..., 0] < change)
    deleted = changed & (drawn[..., 1] * rates[..., :2].sum(-1) < rates[..., 1])
    substituted = changed & ~deleted
    if corrector is not None:
        deleted = deleted | step.editable & (drawn[..., 3] < as_chance(undone, rule).masked_fill(last, 0.0))
        substituted = substituted & ~deleted
    inserting = step.open & (drawn[..., 2] < as_chance(rates[..., 2] * happens, rule))
    order = drawn[..., 2].masked_fill(~inserting, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
    inserting &= order < (step.room + deleted.sum(1)).unsqueeze(1)
    if not (deleted | substituted | inserting).any():
        return Update(step.tokens, None)
    chosen = scorer.draw(substituted, "substitute")
    inserted = scorer.draw(inserting, "insert")
    return Update(torch.where(substituted, chosen.tokens, step.tokens), chosen.confidence, deleted, inserted.tokens,
                  inserted.confidence)


def accept_draft(step: Step, scorer) -> Update:
    """Commit a draft up to the first token that the model would not write there from left to right, and the one that it
    would; at any temperature, because both are drawn by the same uniform number. The scorer is that of drafting.py."""
    written, draft = scorer.verify()
    wrong = written.tokens != draft
    chosen = (written.tokens >= 0) & (wrong.cumsum(1) == wrong)
    scorer.draft(chosen.sum(1))
    return Update(torch.where(chosen, written.tokens, step.tokens), written.confidence.masked_fill(~chosen, -torch.inf))


STRATEGIES: Mapping[str, Strategy] = {
    "origin": commit_at_random,
    "maskgit_plus": partial(commit_most_confident, confidence="prob"),
    "entropy": partial(commit_most_confident, confidence="entropy"),
    "topk_margin": partial(commit_most_confident, confidence="margin"),
    "p2": plan_and_remask, "edit": take_edits,
    "remdm": commit_and_remask_at_random, "flow": commit_and_remask_at_random,  # with chances of their own
    "confidence_threshold": commit_above_in_time, "entropy_bound": commit_within_entropy,
    "soft_parallel": commit_prefix_and_revise, "self_speculation": accept_draft,
}
# LLaDA's, by the names of its `remasking`
REMASKINGS: Mapping[str, Strategy] = {
    "low_confidence": partial(commit_evenly, confidence="prob"), "random": partial(commit_evenly, confidence="random"),
    "low_confidence_dynamic": commit_evenly_or_above,
}


def begin_with_first(step: Step, scorer: Scorer, *, then: Strategy) -> Update:
    """Commit the first position of a block alone, in the step that computes what is before it; `then` does the rest.

    So Fast-dLLM decodes Dream with a cache: under shifted logits that position is predicted from before the block.
    """
    if step.index.any():
        return then(replace(step, index=step.index - 1), scorer)
    first = step.masked & (step.editable.cumsum(1) == 1)
    scored = scorer.score(first)
    return Update(torch.where(first, scored.tokens, step.tokens), scored.confidence)


def choose_strategy(config: MDMGenerationConfig, block_length: int | None, steps: int) -> Strategy:
    """The strategy of a generation config, for blocks of `block_length` positions and `steps` denoising steps."""
    name, raw, threshold = config.method, config.remasking is not None, config.threshold
    if config.editing_threshold is not None:
        return partial(commit_and_edit, threshold=threshold, editing_threshold=config.editing_threshold)
    if name == "low_confidence_dynamic":
        return partial(commit_evenly_or_above, block_length=block_length, threshold=threshold)
    if name == "confidence_threshold" and block_length is None:
        return partial(commit_above_in_time, steps=steps, threshold=threshold)
    if name == "remdm":
        return partial(commit_and_remask_at_random, chances=partial(remdm_chances, rate=config.remask_rate))
    if name == "flow":
        return partial(commit_and_remask_at_random, chances=partial(
            flow_chances, schedule=config.flow_schedule, rule=config.flow_rule, corrector=config.corrector))
    if name == "edit":
        return partial(take_edits, schedule=config.flow_schedule, rule=config.flow_rule, corrector=config.corrector)
    if config.expand_token_id is not None:
        return partial(commit_surest, confidence=CONFIDENCES[name])
    if name == "entropy_bound":
        return partial(commit_within_entropy, bound=config.entropy_bound)
    if name == "soft_parallel":
        return partial(commit_prefix_and_revise, threshold=threshold)
    if config.window_blocks > 1:
        window = Window(block_length, config.window_blocks, config.enter_share, config.full_share)
        return partial(commit_in_window, window=window, confidence=CONFIDENCES[name], raw=raw, threshold=threshold)
    if threshold is not None:
        return partial(commit_above, confidence=CONFIDENCES[name], raw=raw, threshold=threshold)
    if config.factor is not None:
        return partial(commit_by_factor, raw=raw, factor=config.factor)
    if raw and config.schedule != "even":
        return partial(commit_scheduled, schedule=config.schedule)
    return REMASKINGS[name] if raw else STRATEGIES[name]
