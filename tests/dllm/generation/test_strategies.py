"""The commits of each strategy, without a model: a scorer answers from a table."""

import pytest
import torch

from dllm.generation.steps import Step, Update
from dllm.generation.strategies import STRATEGIES

MASK, L = 9, 6


class Table:
    """A scorer with fixed tokens and confidences that records its calls."""

    def __init__(self, tokens, confidence, canvas):
        self.tokens, self.confidence, self.canvas = torch.tensor([tokens]), torch.tensor([confidence]), canvas
        self.asked = []

    def unmask(self, k, confidence):
        self.asked.append((k.tolist(), confidence))
        masked = self.canvas == MASK
        confidence = torch.where(masked, self.confidence, -torch.inf)
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        commit = masked & (rank < k[:, None])
        return Update(torch.where(commit, self.tokens, self.canvas), self.confidence)

    def score(self, positions):
        self.asked.append(positions[0].nonzero().squeeze(1).tolist())
        return Update(torch.where(positions, self.tokens, -1), torch.where(positions, self.confidence, -torch.inf))


def step(canvas, index=0, total=4, editable=None, uniform=None, eps=1e-3):
    tokens = torch.tensor([canvas])
    masked = tokens == MASK
    editable = masked if editable is None else torch.tensor([editable])
    return Step(index, total, eps, tokens, masked, editable, MASK, uniform)


@pytest.mark.parametrize("masked, steps, free", [
    (64, 64, 1), (128, 128, 1), (128, 200, 73), (128, 300, 173), (16, 64, 49), (8, 64, 57), (128, 512, 385),
    (200, 2000, 1803)])
def test_as_many_steps_are_free_as_recorded_from_the_original(masked, steps, free):
    left, count = masked, 0
    for index in range(steps):
        asked = []

        class Counting:
            def unmask(self, k, confidence, asked=asked):
                asked.append(int(k))
                return Update(torch.zeros(1, 1), None)

        if left == 0:
            break
        tokens = torch.full((1, left), MASK)
        STRATEGIES["entropy"](Step(index, steps, 1e-3, tokens, tokens == MASK, tokens == MASK, MASK, None), Counting())
        count += not asked
        left -= sum(asked)
    assert count == free and left == 0


@pytest.mark.parametrize("alg, confidence", [
    ("maskgit_plus", "prob"), ("entropy", "entropy"), ("topk_margin", "margin")])
def test_the_share_of_the_schedule_is_committed_and_all_at_last(alg, confidence):
    canvas = [1, MASK, MASK, MASK, MASK, 2]
    table = Table([3, 4, 5, 6, 7, 8], [0.0, 0.1, 0.9, 0.5, 0.2, 0.0], torch.tensor([canvas]))
    # 1 - s/t is 0.24975 and then 0.333: trunc(4 * 0.24975) = 0
    first = STRATEGIES[alg](step(canvas, index=0), table)
    assert not table.asked and first.tokens.tolist() == [canvas] and first.confidence is None
    second = STRATEGIES[alg](step(canvas, index=1), table)
    assert table.asked == [([1], confidence)] and second.tokens.tolist() == [[1, MASK, 5, MASK, MASK, 2]]
    last = STRATEGIES[alg](step(canvas, index=3), table)
    assert table.asked[-1] == ([4], confidence) and last.tokens.tolist() == [[1, 4, 5, 6, 7, 2]]


def test_origin_scores_only_what_chance_chose():
    canvas = [1, MASK, MASK, MASK, MASK, 2]
    uniform = torch.full((1, L, 2), 0.5, dtype=torch.float64)
    uniform[0, [0, 2, 4], 1] = 0.1
    table = Table([3, 4, 5, 6, 7, 8], [0.5] * L, torch.tensor([canvas]))
    out = STRATEGIES["origin"](step(canvas, uniform=uniform), table)
    assert table.asked == [[2, 4]] and out.tokens.tolist() == [[1, MASK, 5, MASK, 7, 2]]
    uniform[..., 1] = 0.9
    assert STRATEGIES["origin"](step(canvas, uniform=uniform), table).confidence is None and len(table.asked) == 1
    assert STRATEGIES["origin"](step(canvas, index=3, uniform=uniform), table).tokens.tolist() == [[1, 4, 5, 6, 7, 2]]


def test_p2_masks_again_what_it_is_least_sure_of():
    canvas = [1, 5, MASK, MASK, 6, 2]  # 1 and 4 were revealed before
    editable = [False, True, True, True, True, False]
    table = Table([3, 7, 7, 7, 7, 8], [9.0, 0.1, 0.9, 0.2, 0.3, 9.0], torch.tensor([canvas]))
    out = STRATEGIES["p2"](step(canvas, index=1, total=4, editable=editable), table)  # floor(4 * 0.5) = 2 masked again
    assert table.asked == [[1, 2, 3, 4]]
    assert out.tokens.tolist() == [[1, MASK, 7, MASK, 6, 2]]  # 4 stays, with the token it had


def test_p2_counts_in_fp32_as_the_original_does():
    """100 tokens in 100 steps: steps 40 and 46 mask one fewer than exact arithmetic says."""
    tokens = torch.full((1, 100), MASK)
    table = Table([1] * 100, [0.5] * 100, tokens)
    left = [int((STRATEGIES["p2"](Step(i, 100, 1e-3, tokens, tokens == MASK, tokens == MASK, MASK, None), table).tokens
                 == MASK).sum()) for i in range(100)]
    assert [i for i in range(100) if left[i] != 99 - i] == [40, 46]
    assert left[40] == 58 and left[46] == 52
