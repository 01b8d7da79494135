"""The denoising loop: recorded generations to the token, independence of the batch, cost of a step, bad requests."""

import itertools
import json
import traceback
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import Gap, fill, fits
from dllm.generation.sampler import Denoising, denoise, generate, start
from dllm.generation.scorers import previous_token
from tests.dllm.tiny_models import MASKED_ALGS, tiny

MASK = 60


# Here top-p leaves one token at five positions, so their margins are all exactly 1; torch.topk, in the original, broke
# the tie in no stated order, our contract takes the lowest position.
EXACT_TIE = "tied_a.topk_margin_topp.27"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied_a", "untied_a", "tied_b", "untied_b"])
def test_sequences_and_histories_equal_the_originals(shared, name):
    folder = shared / "golden/open_dllm"
    model = DiffusionLM.from_pretrained(folder / f"ckpt_{name}")
    tensors, checked = load_file(folder / "generate.safetensors"), 0
    for case in json.loads((folder / "generate.json").read_text()):
        if case["ckpt"] != f"ckpt_{name}":
            continue
        fields = ("steps", "temperature", "top_p", "top_k", "alg", "alg_temp", "eps", "mask_token_id",
                  "num_return_sequences")
        config = MDMGenerationConfig(output_history=True, **{field: case[field] for field in fields})
        x = tensors[f"{case['id']}.x"].long()
        history = tensors[f"{case['id']}.history"].long()
        if case["id"] == EXACT_TIE:
            assert_differs_by_a_tie(model, x, replace(config, max_new_tokens=case["max_new_tokens"]), history)
            continue
        if case["mode"] == "infill":
            out = denoise(model, x, config)
        else:
            config = replace(config, max_new_tokens=case["max_new_tokens"])
            out = model.diffusion_generate(inputs=x, generation_config=config)
        assert torch.equal(out.sequences, tensors[f"{case['id']}.sequences"].long()), case["id"]
        assert torch.equal(torch.stack(out.history), history), case["id"]
        assert out.steps == case["steps_run"]
        checked += 1
    assert checked == 36 - (name == "tied_a")


def assert_differs_by_a_tie(model, prompt, config, history):
    """The first step that differs commits as many other positions of exactly the same confidence."""
    steps = []
    generate(model, prompt, config=config, on_step=lambda step: steps.append((step.tokens, step.confidence)))
    for (tokens, confidence), recorded in zip(steps, history, strict=True):
        different = tokens != recorded
        if different.any():
            assert (confidence[different] == 1).all() and different.any(1).sum() == 1
            assert (tokens == config.mask_token_id).sum() == (recorded == config.mask_token_id).sum()
            return
    raise AssertionError("the recorded history is equal to ours: no tie to explain")


RANDOM = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "alg_temp": 0.3, "steps": 6, "max_new_tokens": 8,
          "mask_token_id": MASK}
NEEDS = {"confidence_threshold": {"threshold": 0.1}}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("alg", MASKED_ALGS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_prompt_gives_the_same_tokens_alone_and_in_any_batch(alg, temperature, side):
    model = tiny()
    config = MDMGenerationConfig(**{**RANDOM, "alg": alg, "temperature": temperature, "seed": 7, **NEEDS.get(alg, {})})
    prompts = [torch.randint(1, MASK, (n,)) for n in (5, 2, 9, 1)]
    padded, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        place = slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt))
        padded[row, place], mask[row, place] = prompt, True
    together = model.diffusion_generate(padded, mask, config).sequences[:, -8:]
    for row, prompt in enumerate(prompts):
        alone = model.diffusion_generate(prompt, generation_config=config).sequences[0, -8:]
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("alg", MASKED_ALGS)
def test_a_seed_repeats_and_another_differs(alg):
    model, prompt = tiny(), torch.randint(1, MASK, (1, 5))

    def sample(**changes):
        return model.diffusion_generate(prompt, generation_config=MDMGenerationConfig(
            **{**RANDOM, "alg": alg, "num_return_sequences": 3, **NEEDS.get(alg, {}), **changes})).sequences

    first = sample(seed=1)
    assert torch.equal(first, sample(seed=1))
    assert not torch.equal(first, sample(seed=2))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert torch.equal(first[:1], sample(seed=1, num_return_sequences=1))
    torch.manual_seed(3)
    unseeded = sample()
    torch.manual_seed(3)
    assert torch.equal(unseeded, sample())


def test_return_sequences_stand_beside_each_other():
    model, prompts = tiny(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    config = MDMGenerationConfig(**RANDOM, num_return_sequences=2)
    out = model.diffusion_generate(prompts, generation_config=config)
    assert torch.equal(out.sequences[:, :3], prompts.repeat_interleave(2, 0))


def test_steps_that_commit_nothing_cost_no_forward_pass():
    model, prompt = tiny(), torch.randint(1, MASK, (1, 4))
    calls = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    config = MDMGenerationConfig(max_new_tokens=8, steps=64, mask_token_id=MASK, output_history=True)
    out = model.diffusion_generate(prompt, generation_config=config)
    handle.remove()
    assert out.steps == len(out.history) == 64
    assert len(calls) == out.forwards == 64 - 57  # 57 as recorded from the original
    assert out.tokens_per_forward == pytest.approx(8 / 7)


def test_rows_that_are_finished_leave_the_forward_pass():
    model = tiny()
    canvas = torch.randint(1, MASK, (2, 12))
    canvas[0, 3], canvas[1, 2:10] = MASK, MASK
    rows = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    denoise(model, canvas, MDMGenerationConfig(steps=8, mask_token_id=MASK))
    handle.remove()
    assert rows[-1] >= 1 and sum(rows) < 2 * len(rows)


def test_the_head_is_multiplied_only_at_masked_positions(monkeypatch):
    import dllm.generation.scorers as scorers

    model, seen = tiny(), []

    def counting(hidden, weight, tokens, mask_token_id, k, **keywords):
        seen.append((int((tokens == mask_token_id).sum()), hidden.shape[1]))
        return operation(hidden, weight, tokens, mask_token_id, k, **keywords)

    operation = scorers.linear_topk_unmask
    monkeypatch.setattr(scorers, "linear_topk_unmask", counting)
    model.diffusion_generate(torch.ones(1, 20, dtype=torch.long), generation_config=MDMGenerationConfig(
        max_new_tokens=4, steps=4, mask_token_id=MASK))
    assert all(masked == width <= 4 for masked, width in seen) and seen


def test_infill_fills_between_prefix_and_suffix():
    model, prefix, suffix = tiny(), torch.tensor([1, 2, 3]), torch.tensor([4, 5])
    out = model.infill(prefix, suffix, length=4, generation_config=MDMGenerationConfig(mask_token_id=MASK, steps=4))
    assert out.sequences.shape == (1, 9)
    assert out.sequences[0, :3].tolist() == [1, 2, 3] and out.sequences[0, 7:].tolist() == [4, 5]
    canvas = torch.tensor([[1, 2, 3, MASK, MASK, MASK, MASK, 4, 5]])
    denoised = denoise(model, canvas, MDMGenerationConfig(mask_token_id=MASK, steps=4))
    assert torch.equal(out.sequences, denoised.sequences)


@pytest.mark.parametrize("alg", ["maskgit_plus", "entropy", "entropy_bound"])
def test_the_length_of_a_gap_is_that_of_the_surest_infilling(alg):
    model, prefixes, suffixes = tiny(), torch.tensor([[1, 2, 3], [9, 8, 7]]), torch.tensor([[4, 5], [6, 6]])
    config = MDMGenerationConfig(mask_token_id=MASK, steps=64, alg=alg, infill_lengths=(8, 5, 3, 1))
    out = model.infill(prefixes, suffixes, length="auto", generation_config=config)
    for row in range(2):
        tried = {n: model.infill(prefixes[row], suffixes[row], length=n, generation_config=config)
                 for n in config.infill_lengths}
        sure = {n: one.confidence[0, 3:3 + n] for n, one in tried.items()}
        score = {n: float((its.log() if alg == "maskgit_plus" else its).mean()) for n, its in sure.items()}
        best = tried[max(score, key=score.get)].sequences[0]
        visible = slice(None) if out.attention_mask is None else out.attention_mask[row]
        assert torch.equal(out.sequences[row][visible], best)


@pytest.mark.parametrize("settings, fitting", [
    ({}, {2, 4, 6, 8, 12, 16, 24}), ({"block_length": 4, "steps": 4}, {4, 8, 16}),
    ({"block_length": 4}, {4, 8, 12, 16, 24}), ({"block_causal": True, "block_length": 4, "steps": 3}, {2, 4, 6}),
    ({"block_causal": True, "block_length": 4, "blocks_from": "masked", "steps": 3}, {2, 4, 6, 8, 12})])
def test_length_auto_leaves_out_what_does_not_fit(settings, fitting):
    model = tiny(max_position_embeddings=256)
    config = MDMGenerationConfig(mask_token_id=MASK, **settings)
    tried = {n for n in config.infill_lengths if fits(model, Gap(torch.ones(226), torch.ones(4), n), config)}
    assert tried == fitting
    out = model.infill([1] * 226, [2] * 4, length="auto", mask_token_id=MASK, **settings)
    assert out.sequences.shape[1] - 230 in fitting
    with pytest.raises(UserError, match="none of infill_lengths .* can be filled as the model's 256 positions"):
        model.infill([1] * 252, [2] * 4, length="auto", mask_token_id=MASK)


def test_a_gap_grows_no_further_than_the_models_positions():
    model = tiny(max_position_embeddings=16, vocab_size=61, eos_token_id=7)
    with torch.no_grad():
        model.head_weight[8] *= 9  # always expands
    out = model.infill([1] * 8, [2], length="auto", mask_token_id=MASK, expand_token_id=8, alg="maskgit_plus")
    assert out.sequences.shape[1] <= 16 and not (out.sequences == MASK).any()


def test_a_gap_that_expands_begins_short():
    model = tiny(vocab_size=61)
    config = MDMGenerationConfig(mask_token_id=MASK, expand_token_id=8, alg="maskgit_plus", infill_lengths=(4, 2),
                                 delete_eos_token=False, max_infill_length=2)
    out = model.infill(torch.tensor([1, 2]), torch.tensor([3]), length="auto", generation_config=config)
    assert out.sequences.shape == (1, 5) and 8 not in out.sequences[0]


@pytest.mark.parametrize("settings", [{}, {"cache": "dual", "block_length": 4}, {"temperature": 0.8}])
def test_gaps_of_different_sides_and_lengths_are_filled_together_as_each_alone(settings):
    """A cache wants all gaps in the same columns."""
    model = tiny()
    config = MDMGenerationConfig(mask_token_id=MASK, steps=8, alg="maskgit_plus", seed=3, **settings)
    gaps = [Gap(torch.arange(1, 1 + before), torch.arange(9, 9 + after), length)
            for before, after, length in ((5, 0, 4), (2, 7, 8), (9, 3, 4), (1, 1, 8))]
    together = fill(model, gaps, config)
    for gap, answer in zip(gaps, together.answers, strict=True):
        alone = fill(model, [gap], config)
        assert alone.answers[0].tolist() == answer.tolist() and len(answer) == gap.length
        assert alone.output.attention_mask is None
        whole = torch.cat((gap.prefix, answer, gap.suffix))
        assert torch.equal(alone.output.sequences[0], whole)


def test_copies_of_gaps_stand_next_to_each_other():
    model = tiny()
    config = MDMGenerationConfig(mask_token_id=MASK, steps=4, alg="maskgit_plus", temperature=1.0, seed=1,
                                 num_return_sequences=2)
    gaps = [Gap(torch.tensor([1, 2]), torch.tensor([3]), 4), Gap(torch.tensor([4]), torch.tensor([]).long(), 6)]
    answers = fill(model, gaps, config).answers
    assert [len(answer) for answer in answers] == [4, 4, 6, 6] and answers[0].tolist() != answers[1].tolist()
    assert answers[2].tolist() == fill(model, gaps[1:], config).answers[0].tolist()


def test_on_step_sees_every_step():
    model, seen = tiny(), []
    config = MDMGenerationConfig(max_new_tokens=4, steps=6, mask_token_id=MASK)
    out = generate(model, torch.tensor([[1, 2]]), config=config, on_step=seen.append)
    assert [step.index for step in seen] == list(range(6))
    assert torch.equal(seen[-1].tokens, out.sequences)
    scored = [step.confidence for step in seen if step.confidence is not None]
    assert len(scored) == out.forwards and all(confidence[:, :2].eq(-torch.inf).all() for confidence in scored)


@pytest.mark.parametrize("settings", [{"alg": "maskgit_plus"}, {"alg": "p2"}, {"alg": "entropy", "temperature": 0.7},
                                      {"alg": "remdm", "remask_rate": 0.5}])
def test_every_committed_token_has_the_confidence_it_was_committed_with(settings):
    model, seen = tiny(), []
    config = MDMGenerationConfig(max_new_tokens=6, steps=6, mask_token_id=MASK, seed=0, **settings)
    out = generate(model, torch.tensor([[1, 2]]), config=config, on_step=seen.append)
    expected, before = torch.full((1, 8), -torch.inf), torch.tensor([[1, 2, *[MASK] * 6]])
    for _, tokens, confidence, *_ in seen:
        if confidence is not None:
            expected = torch.where(tokens == before, expected, confidence)
        expected[tokens == MASK], before = -torch.inf, tokens
    assert torch.equal(out.confidence, expected)
    assert (out.confidence[:, :2] == -torch.inf).all() and out.confidence[out.sequences != MASK][2:].isfinite().all()


class OnGpu(torch.Tensor):
    """A tensor that notes, with every tensor computed from it, each operation for which the host would wait for a GPU:
    reading a value, or a shape that depends on values. Tests of the kernels cover their own."""

    waits: list[str] = []
    READS = {"__bool__", "__float__", "__index__", "__int__", "cpu", "equal", "item", "masked_select", "nonzero",
             "numpy", "tolist", "unique"}

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        by_mask = function.__name__ in ("__getitem__", "__setitem__") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for x in (args[1] if isinstance(args[1], tuple) else (args[1],)))
        callers = itertools.islice(traceback.walk_stack(None), 8)
        if (function.__name__ in cls.READS or by_mask) and not any(
                "dllm_kernels" in frame.f_code.co_filename for frame, _ in callers):
            cls.waits.append(function.__name__)
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if function.__name__ == "cpu" else result


@pytest.mark.parametrize("settings", [
    {"alg": "entropy"}, {"alg": "maskgit_plus", "temperature": 0.7}, {"remasking": "low_confidence", "block_length": 4},
    {"remasking": "random", "cfg_scale": 1.0}, {"remasking": "low_confidence", "schedule": "cosine"},
    {"remasking": "low_confidence", "block_length": 4, "cache": "dual"},
    {"remasking": "low_confidence", "block_length": 4, "cache": "prefix"},
    {"remasking": "low_confidence", "block_length": 4, "block_causal": True, "steps": 12}])
def test_steps_that_commit_by_count_never_wait_for_a_gpu(settings):
    """Except one at the end of each block; the tokens equal those of steps that count the masked positions."""
    model = tiny(shift_logits=False)
    with torch.no_grad():
        model.head_weight[MASK] = 0  # never predicted
    canvas = torch.randint(1, MASK, (2, 13))
    canvas[:, 5:] = MASK
    config = MDMGenerationConfig(**{"steps": 8, "mask_token_id": MASK, "seed": 0, **settings})
    denoising = Denoising(model, canvas.as_subclass(OnGpu), config)
    denoising.recount = False  # as on a GPU
    steps = iter(denoising)
    next(steps)
    OnGpu.waits.clear()
    next(steps)
    assert not OnGpu.waits
    for _ in steps:
        pass
    assert OnGpu.waits.count("cpu") <= 2 * len(denoising.blocks)
    counted = denoise(model, canvas, config).sequences
    assert torch.equal(denoising.result().sequences.as_subclass(torch.Tensor), counted)
    OnGpu.waits.clear()
    list(Denoising(model, canvas.as_subclass(OnGpu), config))
    assert OnGpu.waits.count("cpu") > 2 * len(denoising.blocks)  # the test would have seen it


def test_steps_can_be_taken_one_at_a_time():
    model, config = tiny(), MDMGenerationConfig(max_new_tokens=4, steps=6, mask_token_id=MASK)
    denoising = start(model, torch.tensor([[1, 2]]), config=config)
    seen = []
    for step in denoising:
        assert step.index == len(seen) and torch.equal(step.tokens, denoising.result().sequences)
        seen.append(step.tokens)
    whole = generate(model, torch.tensor([[1, 2]]), config=config)
    assert torch.equal(seen[-1], whole.sequences) and len(seen) == whole.steps == denoising.result().steps


def test_the_token_before_skips_padding():
    mask = torch.tensor([[False, False, True, True], [True, True, False, True]])
    places = torch.arange(4).expand(2, 4)
    assert previous_token(places, mask)[mask].tolist() == [2, 2, 0, 0, 1]
    assert previous_token(places, None).tolist() == [[0, 0, 1, 2]] * 2


@pytest.mark.parametrize("field, value, message", [
    ("steps", 0, "steps must be at least 1, not 0"),
    ("alg", "greedy", "alg must be one of origin, maskgit_plus, entropy, .*, not 'greedy'"),
    ("temperature", -1.0, "temperature must be at least 0, not -1.0"),
    ("top_p", 0.0, "top_p must be above 0 and at most 1, not 0.0"),
    ("max_new_tokens", 0, "max_new_tokens must be at least 1"),
    ("infill_lengths", (), r"infill_lengths must be numbers at least 1, not \(\)"),
    ("eps", 1.0, "eps must be above 0 and below 1, not 1.0"),
])
def test_a_request_that_cannot_work_is_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        MDMGenerationConfig(**{field: value})


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(TypeError, match="max_tokens"):
        MDMGenerationConfig(max_tokens=3)


def test_a_model_without_mask_token_says_what_to_set():
    with pytest.raises(UserError, match="set mask_token_id"):
        tiny(mask_token_id=None).diffusion_generate(torch.tensor([[1]]))


def test_a_prompt_longer_than_the_model_is_refused():
    model = tiny(max_position_embeddings=8)
    with pytest.raises(UserError, match="a prompt of 6 tokens and 4 new ones need 10 positions, the model has 8"):
        model.diffusion_generate(torch.ones(1, 6, dtype=torch.long),
                                 generation_config=MDMGenerationConfig(max_new_tokens=4))


@pytest.mark.parametrize("alg", MASKED_ALGS)
def test_logits_that_are_not_numbers_are_an_error_and_no_text(alg):
    model = tiny()
    with torch.no_grad():
        model.head_weight[3] = torch.nan
    with pytest.raises(UserError, match="step .: the model's logits at . positions are NaN or infinite: its weights"):
        model.diffusion_generate(torch.tensor([[5, 6]]), generation_config=MDMGenerationConfig(
            max_new_tokens=4, steps=4, alg=alg, seed=0, mask_token_id=MASK, **NEEDS.get(alg, {})))
