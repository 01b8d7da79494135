"""Canvases of random words against the recorded generations, to the token; batches, ends, and what is refused."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from dllm.diffusion_lm import DiffusionLM
from dllm.errors import Notice, UserError
from dllm.generation.checks import NO_MASK
from dllm.generation.config import MDMGenerationConfig, published_settings
from dllm.generation.renoising import Renoising
from dllm.generation.sampler import finish, start
from dllm.generation.strategies import accept_within_entropy
from tests.dllm.tiny_models import tiny

DEFAULTS = MDMGenerationConfig(alg="entropy_bound", steps=8, entropy_bound=0.5, max_new_tokens=36, seed=3)


@pytest.fixture(scope="module")
def goldens(shared):
    return shared / "golden" / "diffusion_gemma"


@pytest.fixture(scope="module")
def model(goldens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        return DiffusionLM.from_pretrained(goldens / "model_trained")


@pytest.fixture(scope="module")
def prompts(goldens):
    return torch.from_numpy(np.load(goldens / "trajectory_default.npz")["input_ids"]).long()


class Recorded:
    """A recorded generation."""

    def __init__(self, folder, name):
        facts = json.loads((folder / "trajectories.json").read_text())[name]["settings"]
        arrays = np.load(folder / f"trajectory_{name}.npz")
        self.golden = {key: torch.from_numpy(value) for key, value in arrays.items()}
        self.first_step = {int(number): int((self.golden["canvas_of_step"] == number).int().argmax())
                           for number in self.golden["canvas_of_step"].unique()}
        own = {ours: facts[theirs] for ours, theirs in (("steps", "max_denoising_steps"), *(
            (name, name) for name in ("entropy_bound", "t_min", "t_max", "stability_threshold",
                                      "confidence_threshold")))}
        whole = len(self.golden["u_init"]) * self.golden["u_init"].shape[-1]
        self.config = MDMGenerationConfig(alg="entropy_bound", max_new_tokens=whole, **own)

    def __call__(self, number, step):
        """The uniforms of a step, as `Renoising.draws`."""
        if step == 0:
            return torch.stack([self.golden["u_init"][number]] * 2, -1)
        self.now = self.first_step[number] + step - 1  # in what was recorded
        return torch.stack((self.golden["u_token"][self.now], self.golden["u_renoise"][self.now]), -1)


@pytest.mark.parametrize("name", ["default", "padded", "hasty"])
def test_generations_are_the_recorded_ones_to_the_token(model, goldens, name):
    recorded = Recorded(goldens, name)
    golden, config = recorded.golden, recorded.config
    ids, mask = golden["input_ids"].long(), golden["attention_mask"].bool()
    new = torch.full((len(ids), config.max_new_tokens), NO_MASK)
    renoising = Renoising(model, torch.cat((ids, new), 1), config, torch.cat((mask, new == NO_MASK), 1),
                          draws=recorded)
    passes, steps = torch.zeros(len(ids)), 0
    for step in renoising:
        now = {key: golden[key][recorded.now] for key in ("entropy", "next", "argmax", "finished", "cur_step")}
        number = int(golden["canvas_of_step"][recorded.now])
        here = slice(ids.shape[1] + number * 12, ids.shape[1] + (number + 1) * 12)
        before = golden["finished"][recorded.now - 1] & (recorded.now > recorded.first_step[number])
        active = ~golden["ended_before_canvas"][number] & ~before
        assert torch.equal(step.confidence[:, here].isfinite().all(1), active)
        assert ((-step.confidence[:, here] - now["entropy"])[active].abs() < 1e-4).all()
        working = active & ~now["finished"] & (now["cur_step"] > 1)
        assert renoising.working.tolist() == working.nonzero().flatten().tolist()
        assert torch.equal(renoising.noisy, now["next"][working].long())
        assert torch.equal(step.tokens[:, here][working], now["argmax"][working].long())
        passes, steps = passes + active, steps + 1
    out = renoising.result()
    assert steps == out.steps == out.forwards  # the recorded ones go on with rows that have ended
    wanted = golden["sequences"].long()
    assert torch.equal(out.sequences, wanted)
    tokens = (wanted[:, ids.shape[1]:] != 0).sum(1)
    assert torch.allclose(tokens / passes, golden["tokens_per_forward"])
    assert out.tokens_per_forward == pytest.approx(float(tokens.sum() / passes.sum()))
    assert renoising.settled.all() and (out.confidence[:, :ids.shape[1]] == -torch.inf).all()


def test_acceptance_and_stopping_are_the_recorded_ones(model, goldens):
    golden = {key: torch.from_numpy(value) for key, value in np.load(goldens / "sampler.npz").items()}
    for key in (key for key in golden if key.startswith("accepted.")):
        bound = key.removeprefix("accepted.")
        accepted = accept_within_entropy(golden["entropy"], float(bound))
        assert torch.equal(accepted, golden[key])
        assert torch.equal(torch.where(accepted, golden["denoiser"], golden["current"]), golden[f"canvas.{bound}"])
    for key in (key for key in golden if key.startswith("stop.stability")):
        stability, confidence = key.removeprefix("stop.stability").split(".confidence")
        config = replace(DEFAULTS, stability_threshold=int(stability), confidence_threshold=float(confidence))
        one = Renoising(model, torch.full((3, 13), NO_MASK), config)
        one.working, one.argmaxes = torch.arange(3), []
        for argmax, mean, wanted in zip(golden["stop.argmax"], golden["stop.mean_entropy"], golden[key], strict=True):
            assert torch.equal(one._stopped(argmax, mean.unsqueeze(1).expand(-1, 12)), wanted)


def test_acceptance_breaks_ties_by_position_and_takes_one_at_least():
    entropy = torch.tensor([[3.0, 2.0, 2.0], [0.0, 9.0, 0.0]])
    assert accept_within_entropy(entropy, 1e-9).tolist() == [[False, True, False], [True, True, True]]
    assert accept_within_entropy(entropy, 2.0).tolist() == [[False, True, True], [True, True, True]]
    some = torch.tensor([[True, False, False], [False, False, False]])
    assert accept_within_entropy(entropy, 2.0, some).tolist() == some.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_what_it_is_alone_in_any_batch_and_padding(model, prompts, side):
    alone = {row: finish(start(model, prompts[row, :length], None, DEFAULTS)).sequences[0, length:]
             for row, length in enumerate((7, 5))}
    mask = torch.arange(9) < torch.tensor([[7], [5], [7]])
    ids = torch.cat((prompts, torch.zeros(3, 2, dtype=torch.long)), 1)
    if side == "left":
        ids[1] = ids[1].roll(4)
        ids[::2], mask = ids[::2].roll(2, 1), mask.flip(1)
    out = finish(start(model, ids, mask, DEFAULTS)).sequences[:, 9:]
    assert torch.equal(out[0], alone[0]) and torch.equal(out[1], alone[1]) and not torch.equal(out[2], out[0])


def test_copies_differ_and_the_first_is_the_prompt_alone(model, prompts):
    config = replace(DEFAULTS, entropy_bound=2.0, t_min=1.0, t_max=4.0, steps=2, max_new_tokens=24)
    alone = finish(start(model, prompts[:2], None, config)).sequences
    copies = finish(start(model, prompts[:2], None, replace(config, num_return_sequences=2))).sequences
    assert torch.equal(copies[::2], alone) and not torch.equal(copies[1::2], alone)
    other = finish(start(model, prompts[:2], None, replace(config, seed=4))).sequences
    assert not torch.equal(other, alone)


def test_the_last_canvas_is_cut(model, prompts):
    whole = finish(start(model, prompts, None, DEFAULTS)).sequences
    cut = start(model, prompts, None, replace(DEFAULTS, max_new_tokens=25))
    tokens = finish(cut).sequences
    assert tokens.shape == (3, 32) and torch.equal(tokens, whole[:, :32]) and cut.settled.all()


def test_steps_show_words_that_change_until_they_are_settled(model, prompts):
    config = replace(DEFAULTS, output_history=True)
    renoising = start(model, prompts, None, config)
    settled, tokens = renoising.settled, renoising.result().sequences
    for step in renoising:
        now = renoising.settled
        assert (step.tokens[now] >= 0).all()
        assert (now | ~settled).all() and torch.equal(step.tokens[settled], tokens[settled])
        settled, tokens = now, step.tokens
    out = renoising.result()
    assert len(out.history) == out.steps and torch.equal(out.history[-1], out.sequences)
    assert (out.history[0][:, -12:] == NO_MASK).all() and (out.sequences >= 0).all()
    ends = torch.isin(out.sequences[:, 7:], torch.tensor(model.end_token_ids))
    assert (out.sequences[:, 7:][ends.cumsum(1) - ends.long() > 0] == 0).all()  # what follows an end is padding


def test_a_dropped_row_costs_nothing_more(model, prompts):
    whole = finish(start(model, prompts, None, DEFAULTS)).sequences
    renoising, rows = start(model, prompts, None, DEFAULTS), []
    for step in renoising:
        rows.append(int(step.confidence.isfinite().any(1).sum()))
        if step.index == 0:
            renoising.drop(1)
    assert rows[:2] == [3, 2]
    assert torch.equal(renoising.result().sequences[[0, 2]], whole[[0, 2]])


def test_the_folder_gives_the_settings(model, goldens, prompts):
    settings = published_settings(model.generation_defaults)
    assert settings == {"max_new_tokens": 256, "steps": 48, "alg": "entropy_bound", "entropy_bound": 0.1, "t_min": 0.4,
                        "t_max": 0.8, "stability_threshold": 1, "confidence_threshold": 0.005}
    out = model.diffusion_generate(prompts[:1], max_new_tokens=36, seed=3)
    assert torch.equal(out.sequences, finish(start(model, prompts[:1], None, DEFAULTS)).sequences)
    with pytest.raises(UserError, match="the sampler MaskedSampler is not supported"):
        published_settings({"sampler_config": {"_cls_name": "MaskedSampler"}})


@pytest.mark.parametrize("settings, message", [
    ({"alg": "entropy"}, "entropy fills masks; set alg to entropy_bound"),
    ({"mask_token_id": 4}, "has no mask token"),
    ({"temperature": 0.7}, "temperature does not go with .*; set t_min and t_max"),
    ({"block_length": 13}, "block_length 13 is a longer canvas than the 12 tokens"),
    ({"remasking": "low_confidence"}, "low_confidence fills masks|needs alg entropy_bound"),
    ({"cfg_scale": 1.0}, "cfg_scale does not go"), ({"cache": "dual"}, "cache does not go"),
    ({"entropy_bound": 0.0}, "entropy_bound must be above 0"),
    ({"entropy_bound": -1.0}, "entropy_bound must be above 0"),
    ({"t_min": 0.8}, "t_min 0.8 must be below t_max 0.8"), ({"steps": 0}, "steps must be at least 1"),
    ({"stability_threshold": -1}, "stability_threshold must be at least 0"),
    ({"confidence_threshold": 0.0}, "confidence_threshold must be above 0"),
    ({"eos_token_id": 400}, "eos_token_id 400 is outside"), ({"max_new_tokens": 506}, "513 positions|have|need"),
])
def test_what_does_not_go_is_refused_in_one_line(model, prompts, settings, message):
    with pytest.raises(UserError, match=message) as told:
        model.diffusion_generate(prompts, **{"max_new_tokens": 12, **settings})
    assert "\n" not in str(told.value)


def test_images_and_gaps_are_refused(model, prompts):
    with pytest.raises(UserError, match="the prompt has the image token 5"):
        model.diffusion_generate(torch.tensor([[2, 5, 9]]), max_new_tokens=12)
    with pytest.raises(UserError, match="cannot fill a gap that text follows"):
        model.infill(prompts[:1], prompts[:1], length=3)
    with pytest.raises(UserError, match="no length of a gap to choose"):
        model.infill(prompts[:1], prompts[:1, :0], length="auto")
    with pytest.raises(UserError, match="alg edit"):
        model.edit(prompts)


def test_settings_of_renoising_are_refused_by_models_of_masks():
    for name, value in (("t_max", 1.0), ("stability_threshold", 2)):
        with pytest.raises(UserError, match=f"{name} is of models that renoise|{name} needs alg entropy_bound"):
            tiny().diffusion_generate([[1, 2]], max_new_tokens=4, alg="entropy_bound", **{name: value})


def test_damaged_weights_are_told_of(model, prompts):
    import copy

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinite"):
        broken.diffusion_generate(prompts, max_new_tokens=12)
