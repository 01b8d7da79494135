"""Edit flows in sampling: recorded steps and trajectories, exact small chains, lengths, prompts, free steps, errors."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dllm import DiffusionLM, MDMGenerationConfig, UserError
from dllm.generation.editing import EditedText
from dllm.generation.sampler import Denoising, denoise
from dllm.generation.scorers import EditScorer
from dllm.generation.steps import Step, Update
from dllm.generation.strategies import flow_rates, take_edits
from dllm.model.layouts import Padded
from tests.dllm.tiny_models import tiny_of

MASK = 60


def tiny(heads="all", seed=0, rates=0.5, family="a2d-qwen3"):
    """A random model with heads for edits, which inserts more than it deletes; rates: how much they vary."""
    model = tiny_of(family, vocab_size=61, edit_heads=heads, mask_token_id=MASK)
    with torch.no_grad():
        model.rate_head.weight.normal_(std=rates, generator=torch.Generator().manual_seed(seed))
        model.rate_head.bias.copy_(torch.tensor([-1.0, -1.0, 1.0]))
    return model


class Table:
    """A scorer that answers from given rates and tokens."""

    def __init__(self, rates, substitute, insert):
        self.given, self.tokens = rates, {"substitute": substitute, "insert": insert}

    def rates(self):
        return self.given

    def draw(self, positions, head):
        return Update(torch.where(positions, self.tokens[head], -1), torch.zeros(positions.shape))


def take(text, scorer, uniform, index, total, **settings):
    """One step on an EditedText. uniform: [B, L] each of fire, choose and insert."""
    fire, choose, insert = (torch.as_tensor(u).double() for u in uniform)
    drawn = torch.stack((fire, choose, insert, *[torch.full_like(fire, 0.5)] * 5), -1)
    step = Step(index, total, 1e-3, text.tokens, text.editable & (text.tokens == 22), text.editable, 22, drawn,
                working=torch.ones(len(fire), dtype=torch.bool), open=text.open, room=text.room)
    update = take_edits(step, scorer, corrector=None, **settings)
    if update.inserted is not None:
        text.apply(update, ())
    return text


@pytest.mark.parametrize("index", range(6))
def test_a_step_equals_the_recorded_one(shared, index):
    folder = shared / "golden" / "editflow"
    case, z = json.loads((folder / "step_cases.json").read_text())[index], np.load(folder / "step.npz")
    z = {key.removeprefix(f"s{index}_"): torch.as_tensor(value).unsqueeze(0) for key, value in z.items()
         if key.startswith(f"s{index}_")}
    length, prompt = z["x"].shape[1], case["prompt_len"]
    editable = torch.arange(length).unsqueeze(0) >= prompt
    text = EditedText(z["x"], torch.ones_like(editable), editable, torch.tensor([1000]))
    if case["edit_prompt"]:
        text.editable = text.open = torch.ones_like(editable)
    drawn = iter(token for _, token in case["categorical"])

    class Recorded(Table):
        def draw(self, positions, head):
            tokens = z[head[:3] + "_logits"].argmax(-1)
            if case["temperature"]:
                tokens = torch.full_like(tokens, -1)
                for place in positions[0].nonzero().squeeze(1).tolist():
                    tokens[0, place] = next(drawn)
            return Update(torch.where(positions, tokens, -1), torch.zeros(positions.shape))

    steps = round(1 / case["tau"])
    take(text, Recorded(F.softplus(z["raw_rates"]), None, None), (z["u_fire"], z["u_choose"], z["u_insert"]),
         round(case["t"] * steps), max(steps, round(case["t"] * steps) + 2), schedule="linear", rule="euler")
    assert torch.equal(text.tokens, z["x_next"])


@pytest.mark.parametrize("index", range(3))
def test_a_batched_padded_step_equals_the_recorded_one(shared, index):
    z = np.load(shared / "golden" / "editflow" / "step_demo.npz")
    z = {key.removeprefix(f"s{index}_"): torch.as_tensor(value) for key, value in z.items()
         if key.startswith(f"s{index}_")}
    text = EditedText(z["x"], ~z["pad"], torch.ones_like(z["pad"]).cumsum(1) > 1, torch.tensor([1000] * 3))
    text.editable = text.open = ~z["pad"]
    rates = torch.stack((z["rate_sub"], z["rate_del"], z["rate_ins"]), -1).double()
    step = Step(0, 10, 1e-3, *[torch.zeros(1, 1)] * 3, 0, None)
    once, _ = flow_rates(step, schedule="linear", rule="exponential", corrector=None)
    scorer = Table(rates * (z["adaptive_h"].double() / once).unsqueeze(-1), z["sub_tokens"], z["ins_tokens"])
    take(text, scorer, (z["u_delsub"], z["u_del"], z["u_ins"]), 0, 10, schedule="linear", rule="exponential")
    assert torch.equal(torch.where(text.visible, text.tokens, 129), z["x_next"])


@pytest.mark.parametrize("index", range(5))
def test_trajectories_of_published_models_equal_the_recorded_ones(shared, index, monkeypatch):
    """All steps but the last, which leaves no mask here; forward passes only after steps that changed something."""
    folder = shared / "golden" / "editflow"
    case = json.loads((folder / "trajectories.json").read_text())[index]
    model = DiffusionLM.from_pretrained(folder / f"model_{case['family']}")
    drawn = iter(case["categorical"])

    def uniforms(self, draw):
        rows = [torch.tensor(case[name][draw]).double() for name in ("u_fire", "u_choose", "u_insert")]
        return torch.stack((*rows, *[torch.full_like(rows[0], 0.5)] * 5), -1).unsqueeze(0)

    def draw(self, positions, head):
        hidden = self.hidden[0]
        if head == "substitute" and model.config.shift_logits:
            hidden = hidden.take_along_dim(self.source.unsqueeze(-1), dim=1)
        logits = hidden @ (model.head_weight if head == "substitute" else model.insert_head.weight).T
        tokens = torch.full_like(positions, -1, dtype=torch.long)
        for place in positions[0].nonzero().squeeze(1).tolist():
            if case["temperature"]:
                u, token = next(drawn)
                below = (logits[0, place].double() / case["temperature"]).softmax(0).cumsum(0)
                assert abs(int((below <= u).sum()) - token) == 0
                tokens[0, place] = token
            else:
                tokens[0, place] = logits[0, place].argmax()
        return Update(tokens, torch.zeros(positions.shape))

    monkeypatch.setattr(Denoising, "_uniform", uniforms)
    monkeypatch.setattr(EditScorer, "draw", draw)
    masks = case["mask_length"]
    config = MDMGenerationConfig(alg="edit", flow_schedule="linear", flow_rule="euler", steps=case["steps"],
                                 max_new_tokens=100, output_history=True, mask_token_id=62,
                                 **({"edit_source": "masks", "edit_source_length": masks} if masks else {}))
    out = model.diffusion_generate(torch.tensor([case["prompt"]]), generation_config=config)
    got = [step[0].tolist() for step in out.history]
    assert got[:-1] == case["histories"][1:-1] and 62 not in got[-1]
    if 62 not in case["histories"][-1]:
        assert got[-1] == case["histories"][-1]
    assert out.forwards == case["forwards"]


def test_insertions_and_corrector_deletions_balance_on_every_state_of_a_small_chain():
    """Texts of four tokens: the states are the subsets that are there. Forward rates from the exact model, backward
    ones from the schedule; beta (forward + backward) leaves p_t as it is, to 1e-9, and forward alone is its slope."""
    n = 4
    states = list(itertools.product((0, 1), repeat=n))
    for schedule in ("linear", "square", "cube"):
        for i, total in ((200, 1000), (500, 1000), (900, 1000)):
            step = Step(i, total, 1e-3, *[torch.zeros(1, 1)] * 3, 0, None)
            once, _ = flow_rates(step, schedule=schedule, rule="euler", corrector=None)
            both, back = flow_rates(step, schedule=schedule, rule="euler", corrector=(1.0, 0.0, 0.0))
            power = {"linear": 1, "square": 2, "cube": 3}[schedule]
            t = i / total
            kappa, slope = t**power, power * t**(power - 1)
            p = {s: kappa**sum(s) * (1 - kappa)**(n - sum(s)) for s in states}
            change, extra = dict.fromkeys(states, 0.0), dict.fromkeys(states, 0.0)
            for s in states:
                for place in range(n):
                    other = (*s[:place], 1 - s[place], *s[place + 1:])
                    forward = float(once) * total if not s[place] else 0.0
                    moved = float(both - once) * total if not s[place] else float(back) * total
                    for flow, rate in ((change, forward), (extra, moved)):
                        flow[s] -= p[s] * rate
                        flow[other] += p[s] * rate
            assert max(map(abs, extra.values())) < 1e-9
            for s in states:
                k = sum(s)
                exact = slope * (k * kappa**(k - 1) * (1 - kappa)**(n - k) if k else 0.0) - slope * (
                    (n - k) * kappa**k * (1 - kappa)**(n - k - 1) if k < n else 0.0)
                assert abs(change[s] - exact) < 1e-9


class Oracle:
    """Knows that the text is 1 2 3 ... n after a given 0: how many tokens are missing after each, and which."""

    def __init__(self, n):
        self.n = n

    def at(self, step):
        self.step = step
        return self

    def _missing(self):
        tokens = self.step.tokens
        following = F.pad(tokens[:, 1:], (0, 1), value=0)
        end = torch.where(following > 0, following, self.n + 1)
        return torch.where(self.step.open, end - tokens - 1, 0)

    def rates(self):
        missing = self._missing()
        return torch.stack((torch.zeros_like(missing), torch.zeros_like(missing), missing), -1).float()

    def draw(self, positions, head):
        missing = self._missing()
        tokens = self.step.tokens + 1 + (self.step.uniform[..., 6] * missing).long()
        return Update(torch.where(positions & (head == "insert"), tokens, -1), torch.zeros(positions.shape))


@pytest.mark.parametrize("corrector", [None, (5.0, 0.25, 0.5)])
@pytest.mark.parametrize("schedule", ["linear", "cube"])
def test_with_an_exact_model_the_share_of_a_text_follows_the_schedule(schedule, corrector):
    n, rows, steps = 5, 3000, 60
    text = EditedText(torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1, dtype=torch.bool),
                      torch.zeros(rows, 1, dtype=torch.bool), torch.full((rows,), n))
    text.open = torch.ones(rows, 1, dtype=torch.bool)
    generator, scorer, power = torch.Generator().manual_seed(0), Oracle(n), {"linear": 1, "cube": 3}[schedule]
    for i in range(steps):
        uniform = torch.rand(*text.tokens.shape, 8, generator=generator, dtype=torch.float64)
        step = Step(i, steps, 1e-3, text.tokens, torch.zeros_like(text.editable), text.editable, 99, uniform,
                    open=text.open & text.visible, room=text.room)
        update = take_edits(step, scorer.at(step), schedule=schedule, rule="exact", corrector=corrector)
        if update.inserted is not None:
            text.apply(update, ())
        share, kappa = text.editable.sum() / (n * rows), ((i + 1) / steps)**power
        slow = 0.03 if i < steps - 1 else 0.02  # a gap takes one token a step, which a few steps more make good
        assert abs(share - kappa) < slow, (i, share, kappa)
        there = text.tokens[text.editable]
        assert ((there >= 1) & (there <= n)).all()


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 1.0}, {"temperature": 0.7, "cfg_scale": 0.5},
    {"edit_source": "masks", "edit_source_length": 4},
    {"edit_source": "uniform", "edit_source_length": 4, "temperature": 1.0}, {"flow_rule": "exponential"},
    {"temperature": 1.0, "corrector": (5.0, 0.25, 0.5), "heads": "insert"}])
@pytest.mark.parametrize("family", ["a2d-qwen3", "qwen3"])
def test_rows_get_the_same_text_alone_and_in_a_padded_batch_and_prompts_stay(family, settings):
    settings = dict(settings)
    model = tiny(settings.pop("heads", "all"), family=family)
    config = MDMGenerationConfig(alg="edit", steps=12, seed=1, mask_token_id=MASK, **settings)
    prompts = [[5, 6, 7, 8, 9], [4], [10, 11]]
    width = max(map(len, prompts))
    canvas = torch.tensor([[0] * (width - len(p)) + p + [MASK] * 9 + [20, 21] for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + 11) for p in prompts])
    together = denoise(model, canvas, config, mask)
    lengths = set()
    for row, prompt in enumerate(prompts):
        alone = denoise(model, canvas[row:row + 1, width - len(prompt):], config)
        got = together.sequences[row][together.attention_mask[row]]
        assert torch.equal(got, alone.sequences[0])
        assert got[:len(prompt)].tolist() == prompt and got[-2:].tolist() == [20, 21] and MASK not in got
        assert len(got) <= len(prompt) + 9 + 2  # the gap's positions are its cap
        lengths.add(len(got) - len(prompt))
    assert len(lengths) > 1  # the rows' texts have come to differ in length


def test_a_step_on_an_unchanged_canvas_runs_no_forward_pass_and_rows_that_stay_are_not_computed_again():
    model = tiny(rates=1e-9)
    with torch.no_grad():
        model.rate_head.bias.fill_(-30.0)
    out = denoise(model, torch.tensor([[5, MASK, MASK]]), MDMGenerationConfig(alg="edit", steps=40, seed=0))
    assert out.forwards == 1 and out.steps == 40 and out.sequences.tolist() == [[5]]
    with torch.no_grad():
        model.rate_head.bias[2] = math.log(math.e - 1)  # one insertion expected after each token
    config = MDMGenerationConfig(alg="edit", steps=200, seed=0)
    canvas = torch.tensor([[5, *[MASK] * 40], [6, *[MASK] * 40]])
    changes = [0, 0]
    before = [[5], [6]]
    denoising = Denoising(model, canvas, config)
    for step in denoising:
        now = [row[seen].tolist() for row, seen in zip(step.tokens, step.visible, strict=True)]
        changes = [count + (a != b) for count, a, b in zip(changes, before, now, strict=True)]
        before = now
    final = [now != b for now, b in zip(now, before, strict=True)]
    assert denoising.scorer.row_forwards <= sum(changes) + 2 and not any(final)


def test_the_scorer_keeps_what_a_fresh_one_computes():
    model = tiny()
    seen = []
    config = MDMGenerationConfig(alg="edit", steps=30, seed=2, temperature=1.0, edit_source="masks",
                                 edit_source_length=5)
    denoising = Denoising(model, torch.tensor([[5, *[MASK] * 12], [7, *[MASK] * 12]]), config)
    for _ in denoising:
        scorer = denoising.scorer
        known = scorer.known
        if known.any():
            fresh = model.hidden_states(denoising.tokens, Padded(denoising.key_mask))
            kept = scorer.hidden[0]
            real = denoising.key_mask & known.unsqueeze(1)
            seen.append((fresh - kept)[real].abs().max().item())
    assert seen and max(seen) < 1e-5


def test_a_row_at_its_cap_keeps_the_insertions_of_the_least_uniform_numbers():
    text = EditedText(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool),
                      torch.tensor([[False, True, True]]), torch.tensor([3]))
    scorer = Table(torch.tensor([[[0.0, 0, 9.0]] * 3]), None, torch.tensor([[7, 8, 9]]))
    scorer.tokens["substitute"] = torch.full((1, 3), -1)
    take(text, scorer, ([[1.0] * 3], [[1.0] * 3], [[0.3, 0.1, 0.2]]), 0, 2, schedule="linear", rule="exact")
    assert text.tokens.tolist() == [[1, 2, 8, 3]]


def test_infilling_of_length_auto_inserts_between_its_two_sides():
    model = tiny()
    out = model.infill([[5, 6]], [[7, 8, 9]], length="auto", alg="edit", steps=20, seed=1, temperature=1.0,
                       max_infill_length=6)
    got = out.sequences[0].tolist()
    assert got[:2] == [5, 6] and got[-3:] == [7, 8, 9] and 5 <= len(got) <= 11


def test_guidance_of_zero_strength_is_none_and_large_guidance_changes_the_text():
    model = tiny(seed=1)
    canvas = torch.tensor([[3, 4, 5, *[MASK] * 12]])
    plain, same, strong = (denoise(model, canvas, MDMGenerationConfig(
        alg="edit", steps=12, seed=1, temperature=1.0, cfg_scale=scale)).sequences.tolist()
        for scale in (0.0, 1e-9, 3.0))
    assert plain == same and strong != plain


def test_the_text_without_its_prompt_keeps_the_token_before_the_gap():
    """What guidance compares with is the text alone after its last given token, at positions from 0."""
    model = tiny()
    config = MDMGenerationConfig(alg="edit", steps=1, seed=1, cfg_scale=1.0, edit_source="masks", edit_source_length=2)
    denoising = Denoising(model, torch.tensor([[3, 4, 5, *[MASK] * 3]]), config)
    next(iter(denoising))
    before = Denoising(model, torch.tensor([[3, 4, 5, *[MASK] * 3]]), config)
    uniform = before._uniform(0)
    step = Step(0, 1, 1e-3, before.tokens, before.editable, before.editable, MASK, uniform, open=before.text.open,
                room=before.text.room)
    before.scorer.at(step).rates()
    alone = model.hidden_states(torch.tensor([[5, MASK, MASK]]))
    assert torch.allclose(before.scorer.hidden[1, 0, 2:], alone[0], atol=1e-5)


@pytest.mark.parametrize("heads, settings, message", [
    (None, {}, "alg edit needs a model with heads for edits; train one by dllm train train.objective=edit"),
    ("all", {"block_length": 4}, "block_length does not go with alg edit"),
    ("all", {"stop_at_eos": True}, "stop_at_eos does not go with alg edit"),
    ("all", {"cache": "prefix"}, "needs a block_length"),
    ("insert", {"edit_source": "masks"}, "edit_source masks needs a model that substitutes and deletes"),
    ("all", {"corrector": (1, 1, 1)}, "corrector with alg edit undoes insertions from an empty source"),
    ("all", {"edit_source": "masks", "edit_source_length": 50}, "edit_source_length 50 is more than the 3 tokens")])
def test_what_does_not_go_together_is_refused_with_the_remedy(heads, settings, message):
    model = tiny(heads) if heads else tiny_of("a2d-qwen3", vocab_size=61)
    with pytest.raises(UserError, match=message):
        denoise(model, torch.tensor([[5, MASK, MASK, MASK]]), MDMGenerationConfig(alg="edit", mask_token_id=MASK,
                                                                                  **settings))


def test_a_model_that_only_inserts_fills_no_masks():
    with pytest.raises(UserError, match="predicts no masks, which entropy fills; set alg to edit"):
        denoise(tiny("insert"), torch.tensor([[5, MASK]]), MDMGenerationConfig(mask_token_id=MASK))


@pytest.mark.parametrize("settings", [{"threshold": 0.9}, {"remasking": "random"}, {"expand_token_id": 3}])
def test_settings_of_other_methods_are_refused(settings):
    with pytest.raises(UserError):
        MDMGenerationConfig(alg="edit", edit_source="masks", **settings)


def test_a_gap_without_a_token_before_it_is_refused():
    with pytest.raises(UserError, match="edits need a token before what they fill"):
        denoise(tiny(), torch.tensor([[MASK, MASK, 4]]), MDMGenerationConfig(alg="edit"))


def test_copies_of_a_prompt_get_texts_of_their_own_and_a_seed_repeats_them():
    model, config = tiny(), MDMGenerationConfig(alg="edit", steps=12, seed=1, temperature=1.0, max_new_tokens=12)
    several = model.diffusion_generate([[5, 6]], generation_config=config.changed({"num_return_sequences": 3})).rows()
    batch = model.diffusion_generate([[5, 6], [7, 8], [5, 6], [5, 6]], generation_config=config).rows()
    assert len({tuple(row.tolist()) for row in several}) == 3
    assert all(torch.equal(row, batch[k]) for row, k in zip(several, (0, 2, 3), strict=True))


@pytest.mark.parametrize("name", ["rate_head", "insert_head", "lm_head"])
def test_a_head_that_gives_no_numbers_is_an_error_and_no_text(name):
    model = tiny()
    with torch.no_grad():
        getattr(model, name).weight[2] = torch.nan
    with pytest.raises(UserError, match="positions are NaN or infinite: its weights"):
        denoise(model, torch.tensor([[5, *[MASK] * 12]]), MDMGenerationConfig(
            alg="edit", steps=12, seed=1, edit_source="masks", edit_source_length=8))


def test_nothing_to_edit_gives_back_the_canvas():
    out = denoise(tiny(), torch.tensor([[4, 5, 6]]), MDMGenerationConfig(alg="edit"))
    assert out.sequences.tolist() == [[4, 5, 6]] and out.forwards == 0


def test_a_model_that_inserts_alone_neither_deletes_nor_substitutes_whatever_its_other_rates():
    model = tiny("insert")  # whose other rates are not zero, because nothing trains them
    ids = torch.arange(20).unsqueeze(0)
    for cfg_scale in (0.0, 0.5):
        out = model.edit(ids, steps=20, seed=1, cfg_scale=cfg_scale, max_new_tokens=30).sequences[0].tolist()
        left = iter(out)
        assert all(token in left for token in ids[0].tolist()) and len(out) > 20


def test_a_text_of_more_tokens_than_the_model_has_positions_is_refused():
    model = tiny_of("a2d-qwen3", vocab_size=61, edit_heads="all", mask_token_id=MASK, max_position_embeddings=16)
    assert len(model.edit([[5] * 16], steps=4, seed=1).rows()[0]) <= 16
    with pytest.raises(UserError, match="a text of 17 tokens is more than the 16 positions of the model"):
        model.edit([[5] * 17], steps=4)
