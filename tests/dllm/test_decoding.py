"""Decoding methods of the published families: token for token what the original implementations gave."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_families import tiny

from dllm.cache import KeyValueCache
from dllm.errors import UserError
from dllm.model import DiffusionLM
from dllm.sampler import CachedScorer, MDMGenerationConfig, denoise, fill_after_end
from dllm.strategies import choose_strategy

MASK = 60


def read_cases(shared, family, name, leave_out=()):
    folder = shared / "golden" / "families" / family
    outputs = np.load(folder / f"{name}.npz")
    for case in json.loads((folder / f"{name}.json").read_text()):
        if not any(part in case["name"] for part in leave_out):
            yield case, torch.from_numpy(outputs[case["name"]])


def pad_left(prompts):
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


@pytest.mark.parametrize("family, file, leave_out, alg", [
    ("llada", "generate_llada", (), None),
    ("llada", "generate_fastdllm", ("prefix", "dual"), None),  # no cache; with thresholds and factors
    ("llada", "generate_dllm_mdlm", ("infill",), None),
    ("llada_moe", "generate_mdlm", (), None),
    ("dream", "generate_dream", (), "alg"),
    ("a2d_qwen2", "generate_a2d", ("bd3lm",), None),
    ("a2d_qwen3", "generate_a2d", ("bd3lm",), None),
])
def test_generations_equal_the_originals(shared, family, file, leave_out, alg):
    model = DiffusionLM.from_pretrained(shared / "golden" / "families" / family / "checkpoint")
    seen = 0
    for case, expected in read_cases(shared, family, file, leave_out):
        if "attention_mask" in case:
            ids, mask = torch.tensor(case["prompt"]), torch.tensor(case["attention_mask"])
        else:
            ids, mask = pad_left(case.get("prompts") or [case["prompt"]])
        new = case.get("gen_length") or case["max_new_tokens"]
        method = {"alg": case["alg"]} if alg else {"remasking": case.get("remasking", "low_confidence")}
        if not alg:
            method["block_length"] = case.get("block_length") or case.get("block_size")
        model.config = replace(model.config, shift_logits=case.get("right_shift_logits", model.config.shift_logits))
        out = model.diffusion_generate(ids, mask, generation_config=MDMGenerationConfig(
            max_new_tokens=new, steps=case.get("steps") or new, cfg_scale=case.get("cfg_scale") or 0.0,
            threshold=case.get("threshold"), factor=case.get("factor"), mask_token_id=318, **method))
        prompts = case.get("prompts") or [None] * len(ids)
        for row, prompt, generated in zip(expected, prompts, out.sequences, strict=True):
            start = len(prompt) if prompt else len(row) - new  # the recorded rows are padded on the right, or not
            assert generated[-new:].tolist() == row[start:start + new].tolist(), case["name"]
        assert "nfe" not in case or out.forwards == case["nfe"], case["name"]
        seen += 1
    assert seen


def test_llada2_generations_equal_the_originals(shared):
    model = DiffusionLM.from_pretrained(shared / "golden" / "families" / "llada2" / "checkpoint")
    for case, expected in read_cases(shared, "llada2", "generate_llada2", ("llada21",)):
        new, length = case.get("gen_length") or case["max_new_tokens"], case.get("block_length") or case["block_size"]
        prompt = torch.tensor([case["prompt"]])
        blocks = -(-(prompt.shape[1] + new) // length) - prompt.shape[1] // length
        out = model.diffusion_generate(prompt, generation_config=MDMGenerationConfig(
            max_new_tokens=new, steps=blocks * (case.get("steps") or case["steps_per_block"]), block_length=length,
            remasking="low_confidence_dynamic", threshold=case["threshold"], mask_token_id=case["mask_id"]))
        start = 0 if "modelgen" in case["name"] else prompt.shape[1]
        assert out.sequences[0, -new:].tolist() == expected[0, start:start + new].tolist(), case["name"]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_generations_equal_the_originals(shared, cache):
    """Where a block is full after its first step, Fast-dLLM runs one forward pass more, which commits nothing."""
    model = DiffusionLM.from_pretrained(shared / "golden" / "families" / "llada" / "checkpoint")
    other = {"prefix": "dual", "dual": "prefix"}[cache]
    for case, expected in read_cases(shared, "llada", "generate_fastdllm", ("fast_generate_th", "None", other)):
        new, length = case.get("gen_length") or case["max_new_tokens"], case.get("block_length") or case["block_size"]
        out = model.diffusion_generate(torch.tensor([case["prompt"]]), generation_config=MDMGenerationConfig(
            max_new_tokens=new, steps=case.get("steps") or new, block_length=length, cache=cache,
            remasking="low_confidence", threshold=case.get("threshold"), factor=case.get("factor")))
        assert out.sequences[0].tolist() == expected[0].tolist(), case["name"]
        assert out.forwards <= case.get("nfe", out.forwards), case["name"]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
def test_a_cached_row_gets_the_same_tokens_alone_and_in_a_batch(cache, shift):
    model = tiny("qwen2", shift_logits=shift)
    canvas, mask = pad_left([[*range(1, n + 1), *[MASK] * 12] for n in (5, 1, 8)])
    config = MDMGenerationConfig(alg="maskgit_plus", steps=30, block_length=4, cache=cache, mask_token_id=MASK, seed=0,
                                 temperature=0.6)
    together = denoise(model, canvas, config, mask)
    for row, prompt in enumerate((5, 1, 8)):
        alone = denoise(model, canvas[row:row + 1, -prompt - 12:], config)
        assert torch.equal(alone.sequences[0], together.sequences[row, -prompt - 12:])


@pytest.mark.parametrize("settings", [{"remasking": "low_confidence_dynamic", "threshold": 0.1}, {"threshold": 0.1},
                                      {"remasking": "low_confidence"}, {"alg": "p2"}, {"alg": "origin"}])
def test_blocks_kept_in_the_cache_change_no_token(settings, monkeypatch):
    """Against the whole canvas computed anew in every step; prompts of 5, 1 and 8 tokens, blocks of 4."""
    model = tiny("a2d-qwen3", block_causal=True, vocab_size=61)
    canvas, mask = pad_left([[*range(1, n + 1), *[MASK] * 11] for n in (5, 1, 8)])
    config = MDMGenerationConfig(**{"alg": "maskgit_plus", "steps": 60, "block_length": 4, "mask_token_id": MASK,
                                    "seed": 0, "temperature": 0.6, **settings})
    cached = denoise(model, canvas, config, mask)
    assert torch.equal(cached.sequences[mask == 0], canvas[mask == 0])
    assert not (cached.sequences == MASK).any()
    computed = []
    original = DiffusionLM.hidden_states

    def compute_anew(self, input_ids, *, cache, block_length, queries):
        canvas = cached_scorer[-1].step.tokens
        rows = cache.rows if cache.rows is not None else torch.arange(len(canvas))
        computed.append(len(rows))
        whole = original(self, canvas[rows], block_length=block_length)
        return whole.gather(1, (queries + cache.start).unsqueeze(-1).expand(-1, -1, whole.shape[-1]))

    cached_scorer = []
    at = CachedScorer.at
    monkeypatch.setattr(CachedScorer, "at", lambda self, step: cached_scorer.append(at(self, step)) or self)
    monkeypatch.setattr(DiffusionLM, "hidden_states", compute_anew)
    anew = denoise(model, canvas, config, mask)
    assert torch.equal(anew.sequences, cached.sequences) and len(computed) == cached.forwards


def test_a_block_causal_row_gets_the_same_tokens_alone_and_in_a_batch():
    model = tiny("a2d-qwen3", block_causal=True, block_length=4)
    canvas, mask = pad_left([[*range(1, n + 1), *[MASK] * 11] for n in (5, 1, 8)])
    config = MDMGenerationConfig(alg="maskgit_plus", threshold=0.1, mask_token_id=MASK, seed=0, temperature=0.6)
    together = denoise(model, canvas, config, mask)
    for row, prompt in enumerate((5, 1, 8)):
        alone = denoise(model, canvas[row:row + 1, -prompt - 11:], config)
        assert torch.equal(alone.sequences[0], together.sequences[row, -prompt - 11:])


def test_history_and_steps_of_a_block_causal_model_are_of_the_canvas_given():
    model = tiny("a2d-qwen3", block_causal=True)
    canvas, mask = pad_left([[1, 2, 3, *[MASK] * 6], [4, *[MASK] * 6]])
    seen = []
    out = denoise(model, canvas, MDMGenerationConfig(steps=6, block_length=4, alg="maskgit_plus", mask_token_id=MASK,
                                                     output_history=True), mask, lambda *step: seen.append(step))
    assert torch.equal(out.history[-1], out.sequences) and len(seen) == len(out.history)
    for tokens, (_, canvas_seen, confidence) in zip(out.history, seen, strict=True):
        assert tokens.shape == canvas.shape and torch.equal(tokens, canvas_seen)
        assert torch.equal(tokens[canvas != MASK], canvas[canvas != MASK])
        assert confidence is None or (confidence[mask == 0] == -torch.inf).all()


def canvas_of(rows, length):
    canvas = torch.randint(1, MASK, (rows, length), generator=torch.Generator().manual_seed(0))
    canvas[:, 3:] = MASK
    return canvas


def test_blocks_are_filled_from_left_to_right():
    model, canvas = tiny("llada", head_dim=6), canvas_of(2, 15)
    out = denoise(model, canvas, MDMGenerationConfig(steps=12, block_length=4, remasking="low_confidence",
                                                     mask_token_id=MASK, output_history=True))
    assert out.forwards == 12
    for step, tokens in enumerate(out.history):
        done = 3 + 4 * ((step + 1) // 4)
        assert not (tokens[:, :done] == MASK).any() and (tokens[:, done + 4:] == MASK).all()


@pytest.mark.parametrize("settings", [{"threshold": 0.2}, {"factor": 0.9}, {"remasking": "random", "steps": 4},
                                      {"remasking": "low_confidence", "cfg_scale": 1.5, "steps": 8},
                                      {"threshold": 0.05, "alg": "topk_margin", "block_length": 4}])
def test_a_row_gets_the_same_tokens_alone_and_in_a_batch(settings):
    model, canvas = tiny("llada", head_dim=6), canvas_of(3, 11)
    mask = torch.ones_like(canvas)
    mask[1, :2] = 0
    config = MDMGenerationConfig(**{"alg": "maskgit_plus", "mask_token_id": MASK, "seed": 1, "temperature": 0.7,
                                    **settings})
    together = denoise(model, canvas, config, mask).sequences
    for row in range(3):
        assert torch.equal(denoise(model, canvas[row:row + 1], config, mask[row:row + 1]).sequences[0], together[row])


def test_what_follows_the_end_of_text_is_filled_once_nothing_before_it_is_masked():
    end, editable = 9, torch.arange(8).expand(3, 8) >= 2
    tokens = torch.tensor([[9, 1, 5, 9, MASK, 6, MASK, MASK], [9, 1, MASK, 9, MASK, 6, MASK, MASK],
                           [9, 1, 5, 10, MASK, 9, MASK, MASK]])
    filled = fill_after_end(tokens, editable, MASK, [end, 10])
    assert filled.tolist() == [[9, 1, 5, 9, 9, 6, 9, 9], tokens[1].tolist(), [9, 1, 5, 10, 9, 9, 9, 9]]


def test_a_row_that_has_ended_leaves_the_forward_passes():
    model = tiny("llada", head_dim=6, eos_token_id=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every word is as likely, so it is always word 0
    canvas = canvas_of(2, 15)
    config = MDMGenerationConfig(steps=12, block_length=4, remasking="low_confidence", mask_token_id=MASK)
    stopped = denoise(model, canvas, replace(config, stop_at_eos=True))
    assert stopped.forwards == 1 and (stopped.sequences[:, 3:] == 0).all()
    assert denoise(model, canvas, config).forwards == 12
    with pytest.raises(UserError, match="names no eos_token_id"):
        denoise(tiny("llada", head_dim=6), canvas, replace(config, stop_at_eos=True))


def test_thresholds_take_as_many_steps_as_they_need():
    model, canvas = tiny("llada", head_dim=6), canvas_of(1, 19)

    def forwards(**settings):
        config = MDMGenerationConfig(steps=1, alg="maskgit_plus", mask_token_id=MASK, **settings)
        return denoise(model, canvas, config).forwards

    assert forwards(threshold=2.0) == 16  # nothing is so sure: one position each
    assert forwards(threshold=0.0) == 1
    assert forwards(factor=1e-9) == 16 and forwards(factor=100.0) == 1


def test_guidance_of_zero_is_none_and_moves_away_from_the_unconditional():
    model, canvas = tiny("llada", head_dim=6, vocab_size=61), canvas_of(1, 6)
    config = MDMGenerationConfig(steps=3, remasking="low_confidence", mask_token_id=MASK)
    plain, guided = (denoise(model, canvas, replace(config, cfg_scale=scale)) for scale in (0.0, 3.0))
    assert plain.forwards == guided.forwards == 3
    empty = torch.where(canvas == MASK, canvas, MASK)
    with torch.no_grad():
        with_prompt, without = model(canvas).logits[:, 3:], model(empty).logits[:, 3:]
    first = denoise(model, canvas, replace(config, steps=1, cfg_scale=3.0)).sequences[:, 3:]
    assert torch.equal(first, (without + 4 * (with_prompt - without)).argmax(-1))


@pytest.mark.parametrize("settings, message", [
    ({"block_length": 5}, "block_length 5 does not divide the 8 positions to fill; choose one that does"),
    ({"block_length": 4, "steps": 3}, "steps must be a multiple of the 2 blocks of 4 positions, not 3; 4 would be"),
    ({"block_length": 0}, "block_length must be at least 1, not 0"),
    ({"remasking": "high"}, "remasking must be none or one of low_confidence, random, .*, not 'high'"),
    ({"cfg_scale": -1.0}, "cfg_scale must be 0 or more, not -1.0"),
    ({"factor": 0.0}, "factor must be above 0, not 0.0"),
    ({"cache": "full"}, "cache must be none, prefix or dual, not 'full'"),
    ({"cache": "dual"}, "cache 'dual' needs a block_length"),
    ({"cache": "dual", "block_length": 4, "cfg_scale": 1.0}, "nor cfg_scale"),
    ({"cache": "dual", "block_length": 4, "block_causal": True}, "neither a block-causal model"),
    ({"remasking": "low_confidence_dynamic"}, "low_confidence_dynamic needs a threshold"),
    ({"block_causal": True, "cfg_scale": 1.0, "block_length": 4}, "neither models with shifted logits nor cfg_scale"),
    ({"factor": 1.0, "threshold": 0.9}, "threshold and factor exclude each other"),
    ({"alg": "p2", "threshold": 0.9}, "need confidences, which p2 has not; choose maskgit_plus, entropy"),
])
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        denoise(tiny("llada", head_dim=6), canvas_of(1, 11), MDMGenerationConfig(**{"mask_token_id": MASK, **settings}))


def test_the_strategy_of_a_config():
    assert choose_strategy("entropy", None, None, None, None).keywords == {"confidence": "entropy"}
    assert choose_strategy("entropy", "random", None, None, None).keywords == {"confidence": "random"}
    assert choose_strategy("topk_margin", None, 0.9, None, None).keywords["raw"] is False


def test_a_cache_gives_views_of_all_rows_and_names_those_computed_now():
    config = tiny("llada").config
    cache = KeyValueCache(config, 4, 12, torch.zeros(0), grows=False)
    cache.content.zero_()
    cache.start, cache.rows = 3, torch.tensor([2, 0])
    new = [torch.randn(2, 5, config.num_key_value_heads, config.head_dim) for _ in range(2)]
    for kept, put in zip(cache.put(1, *new), new, strict=True):
        assert kept.shape[:2] == (4, 12) and kept.untyped_storage().data_ptr() == cache.content.data_ptr()
        assert torch.equal(kept[cache.rows, 3:8], put) and not kept[1].any() and not kept[:, :3].any()
