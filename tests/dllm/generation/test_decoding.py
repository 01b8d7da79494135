"""Decoding methods of the published families: token for token what the original implementations gave."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.generation.canvas import fill_after_end
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import Denoising, denoise, finish
from dllm.generation.scorers import CachedScorer
from dllm.generation.steps import Step, Update
from dllm.generation.strategies import (
    choose_strategy,
    commit_above,
    commit_by_factor,
    commit_evenly_or_above,
    commit_scheduled,
)
from dllm.model.cache import KeyValueCache
from dllm.model.layouts import Padded
from dllm_kernels import token_scores, topk_unmask
from tests.dllm.tiny_models import tiny_of

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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_edited_generations_equal_the_originals(shared):
    """LLaDA2.1's sampler."""
    model = DiffusionLM.from_pretrained(shared / "golden" / "families" / "llada2" / "checkpoint")
    for case, expected in read_cases(shared, "llada2", "generate_llada2", ("modelgen", "llada2_")):
        new, prompt = case["max_new_tokens"], torch.tensor([case["prompt"]])
        out = model.diffusion_generate(prompt, generation_config=MDMGenerationConfig(
            max_new_tokens=new, block_length=case["block_size"], remasking="low_confidence_dynamic",
            threshold=case["threshold"], editing_threshold=case["editing_threshold"],
            max_post_steps=case["max_post_steps"], mask_token_id=case["mask_id"]))
        assert out.sequences[0].tolist() == expected[0, :prompt.shape[1] + new].tolist(), case["name"]


@pytest.mark.parametrize("family", ["a2d_qwen2", "a2d_qwen3"])
def test_block_diffusion_generations_equal_the_originals(shared, family):
    """BD3-LM's sampler: blocks begin after the prompt; guidance and right shift with the exact cache too. The original
    takes every token that equals the padding token for padding, so what follows a generated one differs.
    """
    model = DiffusionLM.from_pretrained(shared / "golden" / "families" / family / "checkpoint")
    seen = 0
    for case, expected in read_cases(shared, family, "generate_a2d", ("mdlm",)):
        ids, mask = pad_left(case["prompts"])
        new, length = case["max_new_tokens"], case["block_size"]
        model.config = replace(model.config, shift_logits=case["right_shift_logits"])
        out = model.diffusion_generate(ids, mask, generation_config=MDMGenerationConfig(
            max_new_tokens=new, block_length=length, steps=case["steps_per_block"] * -(-new // length),
            block_causal=True, blocks_from="masked", remasking="low_confidence", schedule="linear",
            cfg_scale=case["cfg_scale"], mask_token_id=case["mask_id"]))
        for generated, recorded in zip(out.sequences[:, -new:].tolist(), expected[:, -new:].tolist(), strict=True):
            end = -(-(recorded.index(case["pad_id"]) + 1) // length) * length if case["pad_id"] in recorded else new
            assert generated[:end] == recorded[:end], case["name"]
            seen += end
    assert seen > 0.9 * 4 * 2 * 23


def test_infilled_generations_equal_the_originals(shared):
    model = DiffusionLM.from_pretrained(shared / "golden" / "families" / "llada" / "checkpoint")
    (case, expected), = read_cases(shared, "llada", "generate_dllm_mdlm", ("sample",))
    width = max(map(len, case["inputs"]))
    canvas = torch.tensor([row + [0] * (width - len(row)) for row in case["inputs"]])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in case["inputs"]])
    out = denoise(model, canvas, MDMGenerationConfig(block_length=case["block_size"], steps=case["steps"],
                                                     blocks_from="text", remasking="low_confidence",
                                                     schedule="linear"), mask)
    for row, generated, recorded in zip(case["inputs"], out.sequences, expected, strict=True):
        assert generated[:len(row)].tolist() == recorded[:len(row)].tolist()


def test_dreamon_generations_equal_the_originals(shared):
    """Gaps that grow and shrink."""
    model = DiffusionLM.from_pretrained(shared / "golden" / "families" / "dreamon" / "checkpoint")
    for case, expected in read_cases(shared, "dreamon", "generate_dreamon"):
        out = denoise(model, torch.tensor([case["prompt"]]), MDMGenerationConfig(
            alg=case["alg"], steps=case["steps"], expand_token_id=case["expand_id"],
            delete_eos_token=case["delete_eos_token"], pad_eos_to_right=case["pad_eos_to_right"],
            max_infill_length=case["max_gen_len"]))
        length = len(case["prompt"]) - case["min_gen_len"] + case["num_generation_tokens"]
        assert out.sequences[0].tolist() == expected[0, :length].tolist(), case["name"]


@pytest.mark.parametrize("kind", ["nocache", "prefix", "dual"])
def test_fast_dllm_generations_of_dream_equal_the_originals(shared, kind):
    model = DiffusionLM.from_pretrained(shared / "golden" / "families" / "dream" / "checkpoint")
    others = [other for other in ("nocache", "prefix", "dual") if other != kind]
    for case, expected in read_cases(shared, "dream", "generate_fastdllm", others):
        out = model.diffusion_generate(torch.tensor([case["prompt"]]), generation_config=MDMGenerationConfig(
            max_new_tokens=case["max_new_tokens"], steps=case["steps"], alg=case.get("alg", "confidence_threshold"),
            threshold=case["threshold"], block_length=case.get("block_length"),
            cache="none" if kind == "nocache" else kind))
        assert out.sequences[0].tolist() == expected[0].tolist(), case["name"]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cached_generations_equal_the_originals(shared, cache):
    """Fast-dLLM runs one more forward pass, which commits nothing, if a block is full after its first step."""
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
    model = tiny_of("qwen2", shift_logits=shift)
    canvas, mask = pad_left([[*range(1, n + 1), *[MASK] * 12] for n in (5, 1, 8)])
    config = MDMGenerationConfig(alg="maskgit_plus", steps=30, block_length=4, cache=cache, mask_token_id=MASK, seed=0,
                                 temperature=0.6)
    together = denoise(model, canvas, config, mask)
    for row, prompt in enumerate((5, 1, 8)):
        alone = denoise(model, canvas[row:row + 1, -prompt - 12:], config)
        assert torch.equal(alone.sequences[0], together.sequences[row, -prompt - 12:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("settings", [{"remasking": "low_confidence_dynamic", "threshold": 0.1}, {"threshold": 0.1},
                                      {"remasking": "low_confidence"}, {"alg": "p2"}, {"alg": "origin"}])
def test_blocks_kept_in_the_cache_change_no_token(settings, causal, monkeypatch):
    """Against the whole canvas computed anew in every step; prompts of 5, 1 and 8 tokens, blocks of 4."""
    model = tiny_of("a2d-qwen3", block_causal=True, vocab_size=61, causal_blocks=causal)
    canvas, mask = pad_left([[*range(1, n + 1), *[MASK] * 11] for n in (5, 1, 8)])
    config = MDMGenerationConfig(**{"alg": "maskgit_plus", "steps": 60, "block_length": 4, "mask_token_id": MASK,
                                    "seed": 3, "temperature": 0.6, **settings})
    cached = denoise(model, canvas, config, mask)
    assert torch.equal(cached.sequences[mask == 0], canvas[mask == 0])
    assert not (cached.sequences == MASK).any()
    computed = []
    original = DiffusionLM.hidden_states

    def compute_anew(self, input_ids, layout):
        canvas = cached_scorer[-1].step.tokens
        rows = layout.rows if layout.rows is not None else torch.arange(len(canvas))
        computed.append(len(rows))
        whole = original(self, canvas[rows], Padded(block_length=1 if causal else 4))
        return Padded(queries=layout.queries + layout.start).wanted(whole)

    cached_scorer = []
    at = CachedScorer.at
    monkeypatch.setattr(CachedScorer, "at", lambda self, step: cached_scorer.append(at(self, step)) or self)
    monkeypatch.setattr(DiffusionLM, "hidden_states", compute_anew)
    anew = denoise(model, canvas, config, mask)
    assert torch.equal(anew.sequences, cached.sequences) and len(computed) == cached.forwards


def test_causal_blocks_of_one_position_a_step_are_written_as_an_autoregressive_model_writes():
    """Where a strategy commits the positions from left to right: the masks after them change nothing."""
    model = tiny_of("a2d-qwen3", block_causal=True, block_length=4, causal_blocks=True, vocab_size=61,
                    shift_logits=True)
    with torch.no_grad():
        model.head_weight[MASK] = 0  # never the most likely
    prompt = [3, 9, 4, 11, 5, 2]
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(9):
            hidden = model.hidden_states(tokens, Padded(block_length=1))[:, -1]
            tokens = torch.cat((tokens, (hidden @ model.head_weight.T).argmax(-1, keepdim=True)), 1)

    def from_left_to_right(step, scorer):
        first = step.masked & (step.masked.cumsum(1) == 1)
        return Update(torch.where(first, scorer.score(first).tokens, step.tokens), None)

    denoising = Denoising(model, torch.tensor([prompt + 9 * [MASK]]), MDMGenerationConfig(steps=60, mask_token_id=MASK))
    denoising.strategy = from_left_to_right
    assert torch.equal(finish(denoising).sequences, tokens)


def test_a_block_causal_row_gets_the_same_tokens_alone_and_in_a_batch():
    model = tiny_of("a2d-qwen3", block_causal=True, block_length=4)
    canvas, mask = pad_left([[*range(1, n + 1), *[MASK] * 11] for n in (5, 1, 8)])
    config = MDMGenerationConfig(alg="maskgit_plus", threshold=0.1, mask_token_id=MASK, seed=0, temperature=0.6)
    together = denoise(model, canvas, config, mask)
    for row, prompt in enumerate((5, 1, 8)):
        alone = denoise(model, canvas[row:row + 1, -prompt - 11:], config)
        assert torch.equal(alone.sequences[0], together.sequences[row, -prompt - 11:])


def test_blocks_of_the_text_share_any_number_of_steps_alike():
    """Their number depends on the prompt: here 3, and the first has one position to fill."""
    config = MDMGenerationConfig(block_length=4, block_causal=True, mask_token_id=MASK)
    canvas = canvas_of(1, 12)
    expected = denoise(tiny_of("llada", head_dim=6), canvas, replace(config, steps=6))
    for steps in (7, 8):
        out = denoise(tiny_of("llada", head_dim=6), canvas, replace(config, steps=steps))
        assert torch.equal(out.sequences, expected.sequences) and out.steps == expected.steps == 6


def test_history_and_steps_of_a_block_causal_model_are_of_the_canvas_given():
    model = tiny_of("a2d-qwen3", block_causal=True)
    canvas, mask = pad_left([[1, 2, 3, *[MASK] * 6], [4, *[MASK] * 6]])
    seen = []
    out = denoise(model, canvas, MDMGenerationConfig(steps=6, block_length=4, alg="maskgit_plus", mask_token_id=MASK,
                                                     output_history=True), mask, seen.append)
    assert torch.equal(out.history[-1], out.sequences) and len(seen) == len(out.history)
    for tokens, (_, canvas_seen, confidence, *_) in zip(out.history, seen, strict=True):
        assert tokens.shape == canvas.shape and torch.equal(tokens, canvas_seen)
        assert torch.equal(tokens[canvas != MASK], canvas[canvas != MASK])
        assert confidence is None or (confidence[mask == 0] == -torch.inf).all()


@pytest.mark.parametrize("shift, scale, causal", [*product((False, True), (0.0, 1.5), (False,)), (True, 1.5, True)])
def test_blocks_after_the_prompt_are_those_of_the_whole_canvas_computed_anew(shift, scale, causal):
    """Prompts of 5, 1 and 8 tokens, blocks of 4 from the first masked position on, the last one shorter."""
    model = tiny_of("a2d-qwen3", block_causal=True, vocab_size=61, shift_logits=shift, causal_blocks=causal)
    with torch.no_grad():
        model.head_weight[MASK] = 0  # never the most likely
    canvas, mask = pad_left([[*range(1, n + 1), *[MASK] * 10] for n in (5, 1, 8)])
    config = MDMGenerationConfig(remasking="low_confidence", threshold=2.0, block_length=4, blocks_from="masked",
                                 mask_token_id=MASK, cfg_scale=scale)
    together = denoise(model, canvas, config, mask).sequences
    for row, n in enumerate((5, 1, 8)):
        tokens = canvas[row:row + 1, -n - 10:].clone()
        assert torch.equal(denoise(model, tokens, config).sequences[0], together[row, -n - 10:])
        padded = torch.nn.functional.pad(tokens, (-n % 4, 0), value=1)
        real, prompt = torch.arange(padded.shape[1]) >= -n % 4, -n % 4 + n
        for first in range(prompt, padded.shape[1], 4):
            block = slice(first, min(first + 4, padded.shape[1]))
            while (padded[0, block] == MASK).any():
                logits = []
                for known in (padded, padded.clone().index_fill_(1, torch.arange(prompt), MASK)):
                    with torch.no_grad():
                        hidden = model.hidden_states(known[:, :block.stop],
                                                     Padded(real[None, :block.stop], 1 if causal else 4))
                    logits.append(hidden[0, [i - shift for i in range(block.start, block.stop)]] @ model.head_weight.T)
                guided = logits[1] + (scale + 1) * (logits[0] - logits[1])
                best = guided.softmax(-1).max(-1)
                place = best.values.masked_fill(padded[0, block] != MASK, -1).argmax()
                padded[0, first + place] = best.indices[place]
        assert torch.equal(padded[0, -n - 10:], together[row, -n - 10:])


def test_rows_whose_gaps_grow_and_shrink_get_the_same_tokens_alone_and_in_a_batch():
    model = tiny_of("qwen2", vocab_size=61, eos_token_id=7)
    with torch.no_grad():
        model.head_weight[[7, 8]] *= 3  # 7 deletes, 8 expands
    canvas, mask = pad_left([[*range(10, 10 + n), *[MASK] * 3, 30, 31] for n in (5, 1, 8)])
    config = MDMGenerationConfig(alg="maskgit_plus", steps=40, expand_token_id=8, max_infill_length=9, seed=1,
                                 mask_token_id=MASK, temperature=1.0)
    seen = []
    together = denoise(model, canvas, config, mask, lambda step: seen.append(step.tokens.shape[1]))
    assert len({*seen}) > 2  # both happened
    for row, n in enumerate((5, 1, 8)):
        alone = denoise(model, canvas[row:row + 1, -n - 5:], config).sequences[0]
        got = together.sequences[row][together.attention_mask[row]]
        assert torch.equal(got, alone) and not (got == MASK).any()
        assert got[:n].tolist() == list(range(10, 10 + n)) and got[-2:].tolist() == [30, 31]
        assert 8 not in got[n:-2] or len(got) == n + 2 + 9
        assert together.confidence[row][together.attention_mask[row]].isfinite().sum() == len(got) - n - 2


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_remasking_at_random_leaves_as_many_masked_as_without(rate):
    """ReMDM keeps the marginals: at each time a position is masked with probability t, whatever the rate."""
    model, masked = tiny_of("llada", head_dim=6, vocab_size=61), []
    config = MDMGenerationConfig(alg="remdm", remask_rate=rate, steps=8, mask_token_id=MASK, seed=0,
                                 num_return_sequences=400)
    denoise(model, torch.full((1, 8), MASK), config,
            on_step=lambda step: masked.append(step.tokens == MASK))
    shares, times = torch.stack(masked).float().mean((1, 2)), torch.linspace(1, 1e-3, 9)[1:]
    times[-1] = 0
    assert (shares - times).abs().max() < 4 * (0.25 / 3200) ** 0.5
    assert (rate > 0) == any(bool((after & ~before).any()) for before, after in zip(masked, masked[1:], strict=False))


class Counting:
    """A scorer that is most confident on the left, and notes the number of positions that are asked for."""

    def __init__(self, step):
        self.step, self.k = step, torch.zeros(len(step.tokens), dtype=torch.long)

    def unmask(self, k, confidence, *, raw=True, threshold=None):
        self.k = k
        left = self.step.masked & (self.step.masked.cumsum(1) > k.unsqueeze(1))
        return Update(torch.where(left, MASK, 0), None)


def test_counts_of_a_schedule_are_the_originals(shared):
    recorded = np.load(shared / "golden/families/functions/transfer_schedules.npz")
    editable = torch.from_numpy(recorded["mask_index"])[1:].bool()
    for name in (name for name in recorded.files if name.startswith("dllm_")):
        _, schedule, steps = name.split("_")
        total, counts, masked = int(steps.removeprefix("steps")), [], editable
        for index in range(total):
            step = Step(index, total, 1e-3, torch.where(masked, MASK, 0), masked, editable, MASK, None)
            scorer = Counting(step)
            masked = commit_scheduled(step, scorer, schedule=schedule).tokens == MASK
            counts.append(scorer.k)
        for row, expected in zip(torch.stack(counts, 1).tolist(), recorded[name].tolist(), strict=True):
            assert [n for n in row if n] == [n for n in expected if n], name  # theirs skip empty steps


def canvas_of(rows, length):
    canvas = torch.randint(1, MASK, (rows, length), generator=torch.Generator().manual_seed(0))
    canvas[:, 3:] = MASK
    return canvas


def test_blocks_are_filled_from_left_to_right():
    model, canvas = tiny_of("llada", head_dim=6), canvas_of(2, 15)
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
    model, canvas = tiny_of("llada", head_dim=6), canvas_of(3, 11)
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
    model = tiny_of("llada", head_dim=6, eos_token_id=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all words are equally likely, so it is always word 0
    canvas = canvas_of(2, 15)
    config = MDMGenerationConfig(steps=12, block_length=4, remasking="low_confidence", mask_token_id=MASK)
    stopped = denoise(model, canvas, replace(config, stop_at_eos=True))
    assert stopped.forwards == 1 and (stopped.sequences[:, 3:] == 0).all()
    assert denoise(model, canvas, config).forwards == 12
    with pytest.raises(UserError, match="names no end-of-text token"):
        denoise(tiny_of("llada", head_dim=6), canvas, replace(config, stop_at_eos=True))


def test_thresholds_take_as_many_steps_as_they_need():
    model, canvas = tiny_of("llada", head_dim=6), canvas_of(1, 19)

    def forwards(**settings):
        config = MDMGenerationConfig(steps=1, alg="maskgit_plus", mask_token_id=MASK, **settings)
        return denoise(model, canvas, config).forwards

    assert forwards(threshold=2.0) == 16  # no confidence is that high: one position each
    assert forwards(threshold=0.0) == 1
    assert forwards(factor=1e-9) == 16 and forwards(factor=100.0) == 1


def test_guidance_of_zero_is_none_and_moves_away_from_the_unconditional():
    model, canvas = tiny_of("llada", head_dim=6, vocab_size=61), canvas_of(1, 6)
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
    ({"block_length": 4, "steps": 2, "block_causal": True}, "steps must be at least 3, one for each"),
    ({"block_length": 0}, "block_length must be at least 1, not 0"),
    ({"remasking": "high"}, "remasking must be none or one of low_confidence, random, .*, not 'high'"),
    ({"cfg_scale": -1.0}, "cfg_scale must be at least 0"),
    ({"factor": 0.0}, "factor must be above 0, not 0.0"),
    ({"cache": "full"}, "cache must be one of none, prefix, dual, not 'full'"),
    ({"cache": "dual"}, "cache 'dual' needs a block_length"),
    ({"cache": "dual", "block_length": 4, "cfg_scale": 1.0}, "nor cfg_scale"),
    ({"cache": "dual", "block_length": 4, "block_causal": True}, "neither a block-causal model"),
    ({"remasking": "low_confidence_dynamic"}, "low_confidence_dynamic needs a threshold"),
    ({"alg": "confidence_threshold"}, "confidence_threshold needs a threshold"),
    ({"editing_threshold": 0.9}, "editing_threshold needs remasking low_confidence_dynamic"),
    ({"schedule": "linear"}, "schedule linear needs remasking low_confidence without"),
    ({"schedule": "steep"}, "schedule must be one of even, linear, cosine, polynomial, square, cube, not 'steep'"),
    ({"cuda_graphs": True}, "cuda_graphs needs a model on a GPU, this one is on cpu"),
    ({"blocks_from": "end"}, "blocks_from must be none or one of text, masked, not 'end'"),
    ({"remask_rate": 1.5}, "remask_rate must be at least 0 and at most 1, not 1.5"),
    ({"expand_token_id": 5, "alg": "p2"}, "commits one position a step, by an alg that has confidences"),
    ({"expand_token_id": 5, "block_length": 4}, "expand_token_id moves positions, and blocks and"),
    ({"expand_token_id": 5000}, "expand_token_id 5000 is outside the model's vocabulary"),
    ({"factor": 1.0, "threshold": 0.9}, "threshold and factor exclude each other"),
    ({"alg": "p2", "threshold": 0.9}, "need confidences, p2 has none; choose maskgit_plus, entropy"),
])
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        denoise(tiny_of("llada", head_dim=6), canvas_of(1, 11),
                MDMGenerationConfig(**{"mask_token_id": MASK, **settings}))


def test_the_strategy_of_a_config():
    def keywords(**settings):
        return choose_strategy(MDMGenerationConfig(**settings), None, 1).keywords

    assert keywords(alg="entropy") == {"confidence": "entropy"}
    assert keywords(remasking="random") == {"confidence": "random"}
    assert keywords(alg="topk_margin", threshold=0.9)["raw"] is False


def test_a_cache_gives_views_of_all_rows_and_names_those_computed_now():
    config = tiny_of("llada").config
    cache = KeyValueCache(config, 4, 12, torch.zeros(0))
    cache.content.zero_()
    rows = torch.tensor([2, 0])
    new = [torch.randn(2, 5, config.num_key_value_heads, config.head_dim) for _ in range(2)]
    for kept, put in zip(cache.put(1, *new, 3, rows), new, strict=True):
        assert kept.shape[:2] == (4, 12) and kept.untyped_storage().data_ptr() == cache.content.data_ptr()
        assert torch.equal(kept[rows, 3:8], put) and not kept[1].any() and not kept[:, :3].any()


class FromLogits:
    """A scorer that has the logits [B, L, V] already."""

    def __init__(self, logits, step):
        self.logits, self.step = logits, step

    def unmask(self, k, confidence, *, raw, threshold=None):
        result = topk_unmask(self.logits, self.step.tokens, self.step.mask_token_id, k,
                             confidence=confidence, threshold=threshold)
        return Update(result.tokens, result.confidence)

    def score(self, positions, *, raw):
        scores = token_scores(self.logits[positions])
        return Update(torch.full_like(self.step.tokens, -1).masked_scatter(positions, scores.token),
                      torch.full(positions.shape, -torch.inf).masked_scatter(positions, scores.confidence))


def test_selections_are_those_of_fast_dllm(shared):
    """By threshold, by count and by factor; the last as in Tiny-A2D's package (dInfer's takes the last position too
    where only that one is not sure enough)."""
    recorded = {name: torch.from_numpy(array) for name, array in np.load(
        shared / "golden/families/functions/fastdllm_selection.npz").items()}
    masked, mask = recorded["mask_index"], 40  # a word that is never the most likely
    step = Step(0, 4, 1e-3, torch.where(masked, mask, 0), masked, masked, mask, None)
    scorer = FromLogits(recorded["logits"], step)
    for bound in (0.3, 0.7, 0.95):
        update = commit_above(step, scorer, confidence="prob", raw=True, threshold=bound)
        chosen = recorded[f"thr{bound}_sel"] & masked
        assert torch.equal(update.tokens != step.tokens, chosen)
        assert torch.equal(update.tokens[chosen], recorded[f"thr{bound}_x0"][chosen])
    update = scorer.unmask(recorded["quota"], "prob", raw=True)
    assert torch.equal(update.tokens != step.tokens, recorded["quota_sel"] & masked)
    for factor in (0.3, 1.0, 2.0):
        chosen = commit_by_factor(step, scorer, raw=True, factor=factor).tokens != step.tokens
        theirs = recorded[f"dllm_factor{factor}_sel"] & masked
        assert torch.equal(chosen, theirs)


def test_tokens_and_confidences_are_those_of_dream(shared):
    recorded = {name: torch.from_numpy(array) for name, array in np.load(
        shared / "golden/families/functions/dream_sample_tokens.npz").items()}
    for name, settings in {"maskgit": {}, "margin": {"confidence": "margin"}, "entropy": {"confidence": "entropy"},
                           "topp09": {"top_p": 0.9}, "topk5": {"top_k": 5},
                           "topp095_entropy": {"top_p": 0.95, "confidence": "entropy"}}.items():
        scores = token_scores(recorded["logits"], **settings)
        assert torch.equal(scores.token, recorded[f"{name}_x0"])
        assert torch.allclose(scores.confidence, recorded[f"{name}_conf"], atol=1e-6), name


def test_counts_of_llada2_are_the_originals(shared):
    for name, expected in np.load(shared / "golden/families/functions/llada2_even_schedule.npz").items():
        length, steps = (int(part[1:]) for part in name.split("_"))
        counts = []
        for index in range(steps):
            masked = torch.ones(1, length, dtype=torch.bool)
            step = Step(index, steps, 1e-3, torch.full((1, length), MASK), masked, masked, MASK, None)
            scorer = Counting(step)
            commit_evenly_or_above(step, scorer, block_length=length, threshold=2.0)
            counts.append(int(scorer.k))
        assert counts == expected.tolist()
