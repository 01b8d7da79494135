"""Discrete flow matching with a mask source: the recorded solver's steps, exact small chains, steps without cost."""

import json

import numpy as np
import pytest
import torch

from dllm.diffusion.corruption import SCHEDULES, Corruption
from dllm.diffusion.objectives import choose_targets, sum_losses
from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import denoise, generate
from dllm.generation.steps import Step, Update
from dllm.generation.strategies import choose_strategy, flow_chances
from tests.dllm.tiny_models import tiny_of

NAMES = {1: "linear", 2: "square", 3: "cube"}
MASK = 11
RULES = ("exact", "exponential", "euler")


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden" / "dfm"
    return {name: np.load(folder / f"{name}.npz") for name in ("path_and_loss", "solver", "bound")}


class Recorded:
    """A scorer that gives the tokens which the recorded solver drew."""

    def __init__(self, tokens):
        self.tokens, self.calls = tokens, 0

    def score(self, positions):
        self.calls += 1
        return Update(torch.where(positions, self.tokens, -1), torch.zeros(positions.shape))


@pytest.mark.parametrize("case, corrector", [
    ("mask_linear", None), ("mask_square_corrector", (10.0, 0.25, 0.25)), ("mask_cubic_corrector", (5.0, 0.25, 0.5))])
def test_every_step_equals_flow_matchings_solver_in_every_position(golden, case, corrector):
    z = {key.removeprefix(case + "_"): torch.as_tensor(value) for key, value in golden["solver"].items()
         if key.startswith(case + "_") and not key.startswith((case + "_grid", case + "_epsilon"))}
    config = MDMGenerationConfig(alg="flow", flow_schedule=NAMES[int(z["n"])], flow_rule="exponential",
                                 corrector=corrector)
    take, steps = choose_strategy(config, None, 16), len(z["x"])
    for i in range(steps):
        drawn = z["u_jump"][i].double().nan_to_num(0.5).clamp(max=0.999)  # the last step draws none
        uniform = torch.stack((drawn, drawn), -1)
        step = Step(i, steps, 1e-3, z["x"][i], z["x"][i] == MASK, torch.ones_like(z["x"][i], dtype=torch.bool), MASK,
                    uniform)
        scorer = Recorded(z["x1"][i])
        assert torch.equal(take(step, scorer).tokens, z["x_next"][i])
        asked = bool((step.masked & (z["x_next"][i] != MASK)).any())
        assert scorer.calls == asked  # a step that fills nothing costs nothing
    assert not (z["x_next"][-1] == MASK).any()


@pytest.mark.parametrize("n", NAMES)
def test_kept_share_and_weight_are_the_recorded_paths(golden, n):
    z = {key.removeprefix(f"mask_n{n}_"): torch.as_tensor(value) for key, value in golden["path_and_loss"].items()
         if key.startswith(f"mask_n{n}_")}
    alpha, weight, _ = SCHEDULES[NAMES[n]]
    time = 1 - z["t"].double()
    assert torch.allclose(alpha(time), z["kappa"].double(), atol=1e-6)
    assert torch.allclose(weight(time), (z["dkappa"] / (1 - z["kappa"])).double(), rtol=1e-5)
    assert torch.equal(torch.where(z["uniform"] < 1 - z["kappa"].unsqueeze(1), z["x0"], z["x1"]), z["xt"])


@pytest.mark.parametrize("n", NAMES)
def test_elbo_is_the_recorded_generalised_divergence_with_its_gradient(golden, n):
    """That of a denoiser that keeps visible tokens and never predicts the mask."""
    z = {key.removeprefix(f"mask_n{n}_"): torch.as_tensor(value) for key, value in golden["path_and_loss"].items()
         if key.startswith(f"mask_n{n}_")}
    words = z["logits"].shape[-1]
    tokens, noisy = z["x1"].flatten(), z["xt"].flatten()
    each = torch.ones(z["x1"].shape).double()
    corruption = Corruption(noisy, noisy == MASK, None, None,
                            (SCHEDULES[NAMES[n]].weight(1 - z["t"].double()).unsqueeze(1) * each).float().flatten())
    ends = torch.arange(4) * z["x1"].shape[1]
    targets = choose_targets(tokens, ends, corruption, objective="elbo", shift=False)
    logits = z["logits"].flatten(0, 1).double().clone()
    logits[:, MASK] = -1e6
    logits.requires_grad_()
    sums = sum_losses(logits, torch.eye(words, dtype=torch.float64), targets, backend="reference")
    assert torch.allclose(sums.loss.double(), z["subs_kl_sum"].double(), rtol=1e-5)
    sums.loss.backward()
    expected = z["subs_kl_sum_dlogits"].flatten(0, 1).double()
    assert torch.allclose(logits.grad, expected, rtol=1e-4, atol=1e-5)


def chain(schedule, rule, corrector, n):
    """The share committed after each of n steps, exactly: each position is a chain of two states."""
    shares = [torch.zeros(1, dtype=torch.float64)]
    for i in range(n):
        commit, again = flow_chances(Step(i, n, 1e-3, *[torch.zeros(1, 1)] * 3, 0, None), schedule=schedule, rule=rule,
                                     corrector=corrector)
        assert i == n - 1 or all(-1e-12 <= chance <= 1 + 1e-12 for chance in (commit, again))
        now = shares[-1]
        shares.append(now * (1 - again) + (1 - now) * commit if i < n - 1 else torch.ones(1, dtype=torch.float64))
    return torch.stack(shares).squeeze(1)


@pytest.mark.parametrize("corrector", [None, (5.0, 0.25, 0.5), (60.0, 1.5, 0.5)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_exact_rule_keeps_the_paths_marginals_at_any_number_of_steps(schedule, corrector):
    for n in (1, 2, 7, 50):
        kappa = SCHEDULES[schedule].alpha(1 - torch.arange(n + 1, dtype=torch.float64) / n)
        assert (chain(schedule, "exact", corrector, n) - kappa).abs().max() < 1e-9


@pytest.mark.parametrize("rule", ["exponential", "euler"])
def test_the_published_rules_come_near_the_path_as_steps_shrink(rule):
    errors = []
    for n in (50, 100, 200):
        kappa = SCHEDULES["cube"].alpha(1 - torch.arange(n + 1, dtype=torch.float64) / n)
        errors.append((chain("cube", rule, (5.0, 0.25, 0.5), n)[:-1] - kappa[:-1]).abs().max())
    assert errors[2] < errors[1] < errors[0] < 0.1 and errors[2] < 0.6 * errors[1]


def test_at_a_fixed_time_committing_and_masking_again_leave_the_share_as_it_is():
    """The corrector's two rates balance: (1 - kappa) kappa' / (1 - kappa) = kappa kappa' / kappa, to first order and,
    with the exact rule, to rounding once the way forward is taken out."""
    for schedule in SCHEDULES:
        n = 1000
        for i in (100, 500, 900):
            step = Step(i, n, 1e-3, *[torch.zeros(1, 1)] * 3, 0, None)
            plain, _ = flow_chances(step, schedule=schedule, rule="exact", corrector=None)
            commit, again = flow_chances(step, schedule=schedule, rule="exact", corrector=(2.0, 0.25, 0.5))
            kappa = SCHEDULES[schedule].alpha(torch.tensor([1 - i / n], dtype=torch.float64))
            assert abs((1 - kappa) * (commit - plain) - kappa * again) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_the_sampler_fills_every_mask_keeps_prompts_and_charges_no_step_in_which_nothing_jumps(rule):
    model = tiny_of("llada", head_dim=6, vocab_size=61)
    config = MDMGenerationConfig(alg="flow", flow_rule=rule, steps=64, max_new_tokens=6, mask_token_id=60, seed=3,
                                 temperature=0.8, top_k=2)
    out = generate(model, torch.tensor([[5, 6, 7]]), config=config)
    assert out.sequences[0, :3].tolist() == [5, 6, 7] and not (out.sequences == 60).any()
    assert 1 <= out.forwards <= 6  # at most one for each position


def test_the_corrector_masks_tokens_again_and_still_fills_everything_with_any_rows_alone_and_together():
    model = tiny_of("llada", head_dim=6, vocab_size=61)
    config = MDMGenerationConfig(alg="flow", corrector=(20.0, 0.25, 0.5), steps=32, mask_token_id=60, seed=3,
                                 temperature=1.0)
    canvas = torch.tensor([[5, 6, 60, 60, 60, 60, 9], [7, 60, 60, 60, 60, 60, 60]])
    masked = []
    together = denoise(model, canvas, config, on_step=lambda step: masked.append(step.tokens == 60))
    assert any(bool((after & ~before).any()) for before, after in zip(masked, masked[1:], strict=False))
    assert not (together.sequences == 60).any() and together.sequences[0, [0, 1, 6]].tolist() == [5, 6, 9]
    for row in range(2):
        alone = denoise(model, canvas[row:row + 1], config).sequences[0]
        assert torch.equal(alone, together.sequences[row])


@pytest.mark.parametrize("settings, message", [
    ({"corrector": (5, 0.25, 0.5)}, "corrector needs alg flow"),
    ({"flow_rule": "euler"}, "flow_rule needs alg flow or edit, and no remasking; the method is entropy"),
    ({"alg": "flow", "flow_schedule": "square", "remasking": "random"}, "flow_schedule needs alg flow"),
    ({"alg": "flow", "corrector": (5, 0.25)}, "corrector must be the three numbers A, a, b"),
    ({"alg": "flow", "corrector": (5, -1, 0)}, "corrector must be numbers at least 0"),
    ({"alg": "flow", "corrector": 5}, "corrector must be numbers, not 5"),
    ({"alg": "flow", "corrector": (float("inf"), 1, 0)}, "corrector must be finite"),
    ({"alg": "flow", "threshold": 0.9}, "threshold and factor need confidences, flow has none")])
def test_settings_that_do_not_go_together_are_refused_with_the_remedy(settings, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        MDMGenerationConfig(**settings)


def test_a_corrector_read_from_json_is_the_same():
    settings = json.loads('{"alg": "flow", "corrector": [5, 0.25, 0.5]}')
    assert MDMGenerationConfig(**settings) == MDMGenerationConfig(alg="flow", corrector=(5, 0.25, 0.5))
