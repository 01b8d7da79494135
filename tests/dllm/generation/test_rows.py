"""A row's result is its own: its random numbers, its blocks and its steps do not depend on the other rows."""

import pytest
import torch

from dllm.errors import UserError
from dllm.evaluators.likelihood import bound_likelihood
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import Gap, fill
from tests.dllm.tiny_models import MASKED_ALGS, tiny, tiny_of

MASK = 60
NEEDS = {"confidence_threshold": {"threshold": 0.5}}


def padded(*rows: list[int]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {"input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])}


@pytest.mark.parametrize("alg", MASKED_ALGS)
def test_equal_prompts_draw_different_texts(alg):
    settings = {"max_new_tokens": 16, "steps": 16, "temperature": 1.0, "alg": alg, **NEEDS.get(alg, {})}
    out = tiny().diffusion_generate(torch.tensor([[5, 6, 7]]).repeat(8, 1), **settings)
    assert len(out.sequences.unique(dim=0)) == 8


@pytest.mark.parametrize("alg", MASKED_ALGS)
def test_the_kth_copy_of_a_prompt_is_the_kth_return_sequence_whatever_stands_between(alg):
    settings = {"max_new_tokens": 8, "steps": 8, "temperature": 1.0, "alg": alg, "seed": 3, **NEEDS.get(alg, {})}
    model, first, second = tiny(), [5, 6, 7], [9]
    new = model.diffusion_generate(**padded(first, second, first, [8, 8], second, first), **settings).sequences[:, -8:]
    for prompt, rows in ((first, [0, 2, 5]), (second, [1, 4])):
        asked = model.diffusion_generate(prompt, num_return_sequences=3, **settings).sequences[:, -8:]
        assert torch.equal(new[rows], asked[:len(rows)])
        assert torch.equal(model.diffusion_generate(prompt, **settings).sequences[0, -8:], new[rows[0]])


def test_copies_of_repeated_prompts_are_numbered_on():
    settings = {"max_new_tokens": 8, "steps": 8, "temperature": 1.0, "seed": 3}
    model, prompt = tiny(), torch.tensor([[5, 6, 7]])
    together = model.diffusion_generate(prompt.repeat(2, 1), num_return_sequences=2, **settings).sequences
    assert torch.equal(together, model.diffusion_generate(prompt, num_return_sequences=4, **settings).sequences)


def test_different_prompts_draw_independently():
    """A model that knows nothing: what it draws depends on the random numbers alone."""
    model = tiny(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    out = model.diffusion_generate(torch.arange(1, 33).unsqueeze(1), max_new_tokens=8, steps=8, temperature=1.0, seed=1)
    assert len(out.sequences[:, 1:].unique(dim=0)) == 32


MODELS = {"sdar": {"block_length": 4}, "a2d-qwen3": {"block_causal": True, "block_length": 4}, "llada": {"head_dim": 6}}


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[5], [61], [6, 7, 8], [41, 77, 113, 149]])
@pytest.mark.parametrize("family, settings", [
    ("sdar", {"steps": 32}), ("sdar", {"steps": 9}), ("a2d-qwen3", {"steps": 30, "alg": "p2"}),
    ("a2d-qwen3", {"steps": 30, "alg": "remdm"}), ("a2d-qwen3", {"steps": 30, "alg": "origin"}),
    ("sdar", {"steps": 20, "remasking": "low_confidence_dynamic", "threshold": 0.3}), ("sdar", {}),
    ("llada", {"steps": 20, "block_length": 4, "blocks_from": "text"}),
    ("llada", {"steps": 20, "block_length": 4, "blocks_from": "text", "cache": "dual", "remasking": None}),
])
def test_steps_are_divided_by_a_rows_own_blocks(family, settings, lengths):
    model = tiny_of(family, vocab_size=61, mask_token_id=MASK, **MODELS[family])
    config = MDMGenerationConfig(**{"max_new_tokens": 32, "seed": 1, "temperature": 0.5,
                                    "remasking": None if "alg" in settings else "low_confidence", **settings})
    short = list(range(10, 15))
    alone = model.diffusion_generate(short, generation_config=config).sequences[0, -32:]
    others = [torch.randint(1, MASK, (n,)).tolist() for n in lengths]
    together = model.diffusion_generate(padded(short, *others), generation_config=config).sequences[0, -32:]
    assert torch.equal(together, alone)


def test_gaps_of_several_lengths_get_steps_by_their_own_blocks():
    model, gaps = tiny(), [Gap(torch.tensor([1, 2]), torch.tensor([3]), length) for length in (8, 24, 16)]
    config = MDMGenerationConfig(steps=48, block_length=8, alg="maskgit_plus", temperature=0.8, seed=0)
    together = fill(model, gaps, config).answers
    for gap, answer in zip(gaps, together, strict=True):
        assert torch.equal(fill(model, [gap], config).answers[0], answer)


@pytest.mark.parametrize("family", ["sdar", "a2d-qwen3"])  # each token predicts itself, or the next one
def test_forward_passes_are_counted_as_if_a_row_were_alone(family):
    model = tiny_of(family, vocab_size=61, mask_token_id=MASK, **MODELS[family])
    gaps = [Gap(torch.arange(1, n), torch.arange(2, 9), 3) for n in (3, 7, 15, 23)]  # whole blocks
    config = MDMGenerationConfig(steps=48, seed=0)
    alone = [fill(model, [gap], config).output.tokens_per_forward for gap in gaps]
    together = fill(model, gaps, config).output.tokens_per_forward
    assert together == pytest.approx(sum(3 for _ in gaps) / sum(3 / each for each in alone))


@pytest.mark.slow
@pytest.mark.parametrize("new, block, settings", [
    *((new, block, settings) for new, block in ((96, 32), (160, 32), (200, 40), (7, 1), (36, 12))
      for settings in ({"remasking": "low_confidence"}, {"alg": "maskgit_plus"}, {"blocks_from": "text"},
                       {"block_causal": True})),
    (600, 1, {"remasking": "low_confidence"}), (600, 1, {"alg": "maskgit_plus"})])  # more blocks than the default's 512
def test_the_default_of_steps_fits_any_blocks(new, block, settings):
    with torch.no_grad():
        model = tiny(max_position_embeddings=1024)
        model.head_weight[MASK] = 0  # never the most likely
    out = model.diffusion_generate([1, 2, 3], max_new_tokens=new, block_length=block, **settings)
    assert not (out.sequences == MASK).any()
    with pytest.raises(UserError, match="steps must be"):
        model.diffusion_generate([1, 2, 3], max_new_tokens=20, block_length=2, **{**settings, "steps": 9})


def test_low_confidence_dynamic_needs_no_blocks():
    out = tiny().diffusion_generate([1, 2, 3], max_new_tokens=8, remasking="low_confidence_dynamic", threshold=0.9)
    assert out.sequences.shape == (1, 11)


@pytest.mark.parametrize("block_causal", [False, True])
def test_the_bound_of_a_text_does_not_depend_on_the_others(block_causal):
    model = tiny(block_causal=block_causal, block_length=4 if block_causal else None)
    rows = padded([5, 6, 7, 8, 9, 10], [11, 12, 13])
    together = bound_likelihood(model, *rows.values(), samples=8)
    for row in range(2):
        alone = bound_likelihood(model, rows["input_ids"][row][rows["attention_mask"][row] > 0], samples=8)
        assert together.nats[row].item() == pytest.approx(alone.nats.item(), rel=1e-5)
