"""Corruption: the original's collator bit for bit, schedules against their derivatives, the statistics of masking."""

import json

import pytest
import torch

from dllm.diffusion.corruption import SCHEDULES, T_MIN, corrupt


def test_equals_open_dllms_masking_collator(shared):
    for case in json.loads((shared / "golden/open_dllm/collator.json").read_text()):
        torch.manual_seed(case["torch_manual_seed"])
        lengths = torch.tensor([0, *(len(f["input_ids"]) for f in case["features"])])
        tokens = torch.tensor([i for f in case["features"] for i in f["input_ids"]])
        got = corrupt(tokens, lengths.cumsum(0), case["mask_token_id"])
        assert got.noisy.tolist() == case["batch"]["input_ids"][0]
        assert torch.equal(got.ratio, torch.tensor(case["batch"]["mask_ratio"][0]))
        assert torch.equal(got.t, got.ratio) and torch.allclose(got.weight, 1 / got.t)
        assert torch.equal(got.corrupted, got.noisy == case["mask_token_id"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_from_everything_kept_to_nothing_and_their_weight_is_the_bounds(name):
    alpha, weight, when = SCHEDULES[name]
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    ends = alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(ends, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12)
    slope, = torch.autograd.grad(alpha(t).sum(), t)
    assert (slope < 0).all() and torch.allclose(weight(t), -slope / (1 - alpha(t)))
    assert torch.allclose(when(alpha(t)), t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_of_a_constant_loss_does_not_depend_on_the_schedule(name):
    """E[weight * corrupted] = integral of -alpha'(t) = 1 for every token."""
    times = (torch.arange(20000) + 0.5) / 20000
    got = corrupt(torch.zeros(20000, dtype=torch.long), torch.arange(20001), 9, schedule=name, times=times,
                  generator=torch.Generator().manual_seed(0))
    assert abs((got.weight * got.corrupted).mean() - 1) < 0.05


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_document_is_masked_at_its_own_rate(name):
    times = torch.tensor([0.1, 0.5, 0.9])
    got = corrupt(torch.zeros(30000, dtype=torch.long), torch.tensor([0, 10000, 20000, 30000]), 9, schedule=name,
                  times=times, generator=torch.Generator().manual_seed(0))
    rates = got.corrupted.view(3, -1).float().mean(1)
    assert torch.allclose(rates, 1 - SCHEDULES[name].alpha(times), atol=0.015)
    assert torch.equal(got.t.view(3, -1)[:, 0], times)


def test_what_is_not_maskable_stays():
    maskable = torch.tensor([False, True] * 50)
    got = corrupt(torch.zeros(100, dtype=torch.long), torch.tensor([0, 100]), 9, times=torch.tensor([0.99]),
                  maskable=maskable, generator=torch.Generator().manual_seed(0))
    assert not got.corrupted[~maskable].any() and got.corrupted[maskable].sum() > 40
    assert (got.noisy == 9).equal(got.corrupted)


def test_every_document_gets_a_masked_token_when_asked_and_only_then():
    cu_seqlens, tokens = torch.tensor([0, 5, 6, 10, 14]), torch.zeros(14, dtype=torch.long)
    uniform = torch.tensor([.9, .5, .2, .7, .2, .9, .9, .8, .8, .9, .01, .9, .9, .4])
    allowed = torch.ones(14, dtype=torch.bool)
    allowed[[0, 5, 6, 10]] = False  # the first token of each, which shifted logits never score
    keys = {"times": torch.tensor([.1, .1, .1, .1]), "uniform": uniform}
    assert corrupt(tokens, cu_seqlens, 9, **keys).corrupted.nonzero().flatten().tolist() == [10]
    got = corrupt(tokens, cu_seqlens, 9, at_least_one_of=allowed, **keys)
    assert got.corrupted.nonzero().flatten().tolist() == [2, 7, 10, 13]  # the first of equals; document 1 has none
    assert (got.noisy == 9).equal(got.corrupted)
    likely = {"times": torch.full((4,), .95), "uniform": uniform}
    assert torch.equal(corrupt(tokens, cu_seqlens, 9, at_least_one_of=allowed, **likely).corrupted,
                       corrupt(tokens, cu_seqlens, 9, **likely).corrupted)


def test_drawn_times_bound_the_weights():
    generator = torch.Generator().manual_seed(0)
    got = corrupt(torch.zeros(5000, dtype=torch.long), torch.arange(5001), 9, generator=generator)
    assert got.t.min() >= T_MIN and got.t.max() <= 1 - T_MIN and got.weight.max() <= 500.1
