"""The bound of insertions: against the exact divergence and the exact integral of a small chain; errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dllm import UserError
from tests.dllm.tiny_models import tiny_of


def tiny(heads="insert"):
    model = tiny_of("a2d-qwen3", vocab_size=7, edit_heads=heads)
    with torch.no_grad():
        model.rate_head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return model.double()


@torch.no_grad()
def rates_of(model, given, text):
    """{(place, word): rate of inserting it there} after a given token."""
    hidden = model.hidden_states(torch.tensor([[*given, *text]]))[0, len(given) - 1:]
    rates = F.softplus(model.rate_head(hidden))[:, 2]
    words = (hidden @ model.insert_head.weight.T).softmax(-1)
    return rates.unsqueeze(1) * words


@pytest.mark.parametrize("given, text", [([1, 2], [3, 4, 5]), ([6], [3, 3, 4])])
def test_the_bound_is_its_integral_and_never_below_the_divergence(given, text):
    model, end, n = tiny(), -math.log(0.05), len(text)
    subsets = list(itertools.product((0, 1), repeat=n))
    shown = {s: tuple(token for token, there in zip(text, s, strict=True) if there) for s in subsets}
    table = {x: rates_of(model, given, x) for x in {*shown.values()}}

    def integrand(s):
        keep, total = 1 - math.exp(-s), 0.0
        for subset in subsets:
            rates = table[shown[subset]]
            value, place = rates.sum(), 0
            for token, there in zip(text, subset, strict=True):
                place += there
                if not there:
                    value -= 1 + rates[place, token].log()
            total += keep**sum(subset) * (1 - keep)**(n - sum(subset)) * float(value)
        return total

    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400 * end
    exact = sum(integrand(float(s)) for s in grid) * end / 400
    got = model.edit_bound(torch.tensor([[*given, *text]]), scored=[[0] * len(given) + [1] * n], samples=1000, cut=0.05)
    assert got.tokens.tolist() == [n] and abs(got.nats[0] - exact) < 4 * got.stderr[0] + 1e-6

    # p_s of the model over all texts that can still become this one; the others leave and never come back.
    states = sorted(table, key=len)
    leave = torch.zeros(len(states), len(states), dtype=torch.float64)
    for i, x in enumerate(states):
        leave[i, i] -= table[x].sum()
        for place in range(len(x) + 1):
            for word in range(7):
                y = (*x[:place], word, *x[place:])
                if y in table:
                    leave[i, states.index(y)] += table[x][place, word]
    p = torch.matrix_exp(leave * end)[states.index(())]
    keep = 1 - 0.05
    q = torch.zeros(len(states), dtype=torch.float64)
    for subset in subsets:
        q[states.index(shown[subset])] += keep**sum(subset) * (1 - keep)**(n - sum(subset))
    divergence = float((q * (q / p).log()).sum())
    assert exact >= divergence > 0


def test_rows_do_not_depend_on_each_other_or_on_padding():
    model = tiny()
    together = model.edit_bound(torch.tensor([[0, 0, 1, 2, 3], [1, 4, 5, 6, 2]]),
                                torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), samples=8)
    alone = model.edit_bound(torch.tensor([[1, 2, 3]]), samples=8)
    assert torch.allclose(together.nats[:1], alone.nats) and together.tokens.tolist() == [2, 4]


@pytest.mark.parametrize("ids, settings, message", [
    ([[1, 2]], {"cut": 0.0}, "cut must be above 0 and below 1, not 0.0"),
    ([[1, 2]], {"samples": 1}, "samples must be at least 2"),
    ([[1]], {}, "each text needs a token to write"),
    ([[1, 2]], {"scored": [[1, 1]]}, "a given one before it")])
def test_errors_name_the_remedy(ids, settings, message):
    with pytest.raises(UserError, match=message):
        tiny().edit_bound(torch.tensor(ids), **settings)


def test_bounds_of_masks_and_of_insertions_are_never_confused():
    with pytest.raises(UserError, match="needs a model that inserts alone"):
        tiny("all").edit_bound(torch.tensor([[1, 2]]))
    with pytest.raises(UserError, match="has no bound of masked diffusion"):
        tiny().perplexity_bound(torch.tensor([[1, 2, 3]]))
