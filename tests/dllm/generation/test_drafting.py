"""Self-speculation: the text that the model writes from left to right, in fewer forward passes."""

from dataclasses import replace

import pytest
import torch

from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import Denoising, denoise, finish
from dllm.generation.steps import Step, Update
from dllm.generation.strategies import accept_draft
from dllm.model.layouts import Padded
from dllm_kernels import linear_token_scores, philox_uniform
from tests.dllm.tiny_models import tiny_of

MASK = 60
CONFIG = MDMGenerationConfig(alg="self_speculation", mask_token_id=MASK, seed=3)


def writer(**changes):
    """A model whose masks guess well now and then: its embeddings are large, so a token tells what follows."""
    return tiny_of("a2d-qwen3", **{"block_causal": True, "block_length": 4, "causal_blocks": True, "vocab_size": 61,
                                   "shift_logits": True, **changes})


def write(model, row, temperature=0.0, seed=0, sequence=0, **sampling):
    """One token after the other, everything computed anew."""
    tokens, words = torch.tensor([row]), torch.ones(1, 61, dtype=torch.bool)
    words[0, MASK] = False
    uniform = philox_uniform(seed, torch.tensor([[sequence]]), 0, torch.arange(len(row)).unsqueeze(0))[0]
    for place in [i for i, token in enumerate(row) if token == MASK]:
        with torch.no_grad():
            hidden = model.hidden_states(tokens[:, :place], Padded(block_length=1))
        tokens[0, place] = linear_token_scores(hidden, model.head_weight, torch.tensor([place - 1]), allowed=words,
                                               temperature=temperature, generator=uniform[place:place + 1],
                                               **sampling).token
    return tokens[0].tolist()


def lay_out(rows, left):
    width = max(map(len, rows))
    padding = [[0] * (width - len(row)) for row in rows]
    return tuple(torch.tensor([some + row if left else row + some for row, some in zip(parts, padding, strict=True)])
                 for parts in (rows, [[1] * len(row) for row in rows]))


ROWS = [[3, 9, 4, 11, 5, *[MASK] * 13], [7, *[MASK] * 6], [8, 2, MASK, MASK, 6, 6, MASK, MASK, MASK, 1], [9, MASK],
        [5, 4, 3]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("length, left", [(0, True), (1, False), (3, True), (9, False)])
def test_the_text_is_that_of_one_token_after_the_other(length, temperature, left):
    """Rows of several gaps, with tokens after them, padded on either side; token for token at any temperature."""
    model, (canvas, mask) = writer(), lay_out(ROWS, left)
    config = replace(CONFIG, draft_length=length, temperature=temperature, top_p=0.9 if temperature else None)
    sequence = torch.arange(5)
    out = denoise(model, canvas, config, mask, sequence=sequence)
    for number, row in enumerate(ROWS):
        expected = write(model, row, temperature, 3, number, top_p=config.top_p)
        assert out.sequences[number][mask[number] == 1].tolist() == expected
    assert torch.equal(out.sequences[mask == 0], canvas[mask == 0])
    filled = sum(row.count(MASK) for row in ROWS)
    assert (out.tokens_per_forward == 1) == (length == 0) and out.steps == out.forwards
    if length == 0:
        assert out.forwards == 13
    alone = [denoise(model, torch.tensor([row]), config, sequence=sequence[i:i + 1]) for i, row in enumerate(ROWS)]
    passes = sum(one.forwards for one in alone)
    assert out.tokens_per_forward == pytest.approx(filled / passes)


def test_a_model_that_repeats_itself_is_drafted_whole():
    """Where every draft is right, a pass commits draft_length + 1 tokens, after the first pass, which has no draft."""
    model = writer()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # always word 0
    out = denoise(model, torch.tensor([[5, *[MASK] * 16]]), replace(CONFIG, draft_length=4))
    assert out.forwards == 4 and out.sequences.tolist() == [[5, *[0] * 16]] and out.tokens_per_forward == 4
    assert torch.equal(out.confidence[0].isfinite(), torch.arange(17) > 0)
    assert denoise(model, torch.tensor([[5, *[MASK] * 16]]), CONFIG).forwards == 4  # drafts of a block, which is 4
    assert denoise(model, torch.tensor([[5, *[MASK] * 16]]), replace(CONFIG, block_length=8)).forwards == 3


def test_a_text_ends_where_one_token_after_the_other_ends_it():
    """In the midst of a draft of which every token is right, because all words are alike and drawn by one number."""
    model, (canvas, mask) = writer(), lay_out(ROWS[:2], True)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    config = replace(CONFIG, temperature=1.0)
    end = int(denoise(model, canvas, config, mask).sequences[0, 8])
    config = replace(config, stop_at_eos=True, eos_token_id=end)
    plain, drafted = (denoise(model, canvas, replace(config, draft_length=length), mask) for length in (0, 4))
    assert plain.sequences[0, 8:].tolist() == [end] * 10 and end not in plain.sequences[0, 5:8]
    assert torch.equal(plain.sequences, drafted.sequences) and (plain.forwards, drafted.forwards) == (6, 2)


def test_copies_differ_and_steps_are_shown():
    model = writer()
    out = model.diffusion_generate([[3, 9], [4, 4]], generation_config=replace(
        CONFIG, max_new_tokens=9, num_return_sequences=3, temperature=1.0, output_history=True))
    assert len({tuple(row) for row in out.sequences.tolist()}) == 6 and torch.equal(out.history[-1], out.sequences)
    steps = list(model.diffusion_steps([[3, 9]], generation_config=replace(CONFIG, max_new_tokens=9)))
    left = [int((step.tokens == MASK).sum()) for step in steps]
    assert left[-1] == 0 and all(before > after for before, after in zip([9, *left], left, strict=False))
    filled = model.infill([3, 9], [7, 7, 7], length=6, generation_config=CONFIG).sequences[0].tolist()
    assert filled == write(model, [3, 9, *[MASK] * 6, 7, 7, 7])


def test_a_draft_is_accepted_up_to_its_first_wrong_token():
    """Rows: wrong at the second place; right where asked; wrong at once; not asked."""
    written = torch.tensor([[-1, 5, 6, 7], [-1, 5, 6, -1], [5, 6, -1, -1], [-1, -1, -1, -1]])
    draft = torch.tensor([[-1, 5, 9, 7], [-1, 5, 6, 7], [1, 6, 7, -1], [-1, -1, -1, -1]])
    taken = []

    class Table:
        def verify(self):
            return Update(written, torch.zeros(4, 4)), draft

        def draft(self, counts):
            taken.extend(counts.tolist())

    tokens = torch.full((4, 4), MASK)
    out = accept_draft(Step(0, 4, 1e-3, tokens, tokens == MASK, tokens == MASK, MASK, None), Table())
    assert out.tokens.tolist() == [[MASK, 5, 6, MASK], [MASK, 5, 6, MASK], [5, MASK, MASK, MASK], [MASK] * 4]
    assert taken == [2, 2, 1, 0]


def test_the_mask_token_is_never_written():
    model = writer()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[MASK] = 1.0
        model.model.norm.weight.fill_(1.0)
    out = denoise(model, torch.tensor([[5, *[MASK] * 7]]), CONFIG)
    assert not (out.sequences == MASK).any()


@pytest.mark.parametrize("model, settings, message", [
    ({"causal_blocks": False}, {}, "self_speculation needs a model whose tokens see nothing after themselves"),
    ({"shift_logits": False}, {}, "self_speculation needs a model whose tokens see nothing after themselves"),
    ({}, {"block_causal": False}, "self_speculation needs a model whose tokens see nothing after themselves"),
    ({}, {"cfg_scale": 1.0}, "cfg_scale does not go with alg self_speculation"),
    ({}, {"cuda_graphs": True}, "cuda_graphs does not go with alg self_speculation"),
    ({}, {"cache": "dual", "block_length": 4}, "cache does not go with alg self_speculation"),
    ({}, {"window_blocks": 2}, "window_blocks does not go with alg self_speculation"),
])
def test_what_does_not_go_with_it_is_refused(model, settings, message):
    with pytest.raises(UserError, match=message):
        Denoising(writer(**model), torch.tensor([[5, MASK]]), replace(CONFIG, **settings))


def test_settings_and_texts_that_do_not_go_with_it_are_refused():
    with pytest.raises(UserError, match="draft_length needs alg self_speculation, and no remasking; the method is ent"):
        MDMGenerationConfig(draft_length=4)
    for bound in ("threshold", "factor"):
        with pytest.raises(UserError, match="threshold and factor need confidences, self_speculation has none"):
            MDMGenerationConfig(alg="self_speculation", **{bound: 0.9})
    with pytest.raises(UserError, match="draft_length must be at least 0"):
        replace(CONFIG, draft_length=-1)
    for canvas, mask in ((torch.tensor([[5, MASK], [MASK, 5]]), None),
                         (torch.tensor([[5, 5, MASK], [0, MASK, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1]]))):
        with pytest.raises(UserError, match="there is none before the masks of row 1; give a prompt"):
            Denoising(writer(), canvas, CONFIG, mask)


def test_nothing_to_fill_costs_nothing():
    assert finish(Denoising(writer(), torch.tensor([[5, 6]]), CONFIG)).forwards == 0
