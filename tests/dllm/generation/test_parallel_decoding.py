"""Methods that commit several tokens a pass: token for token, and pass for pass, what the published loops give.

The loops are written out here for one text, and compute all of it anew in every pass.
"""

import pytest
import torch

from dllm.constraints import AllowedTokens
from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.sampler import Denoising, denoise
from dllm.generation.strategies import accept_within_entropy
from dllm.generation.windows import Window
from dllm.model.layouts import Padded
from tests.dllm.tiny_models import tiny, tiny_of

MASK = 60
PROMPTS = (5, 1, 8)


def block_causal(**changes):
    """A model that never takes the mask token for the most likely one."""
    model = tiny_of("a2d-qwen3", block_causal=True, mask_token_id=MASK, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.head_weight[MASK] = 0
    return model


def probabilities(model, tokens, block_length=None, shifted=None):
    """fp64 [L, V] for the tokens of one text."""
    with torch.no_grad():
        hidden = model.hidden_states(torch.tensor([tokens]), Padded(block_length=block_length))[0]
        p = (hidden.double() @ model.head_weight.double().T).softmax(-1)
    shifted = model.config.shift_logits if shifted is None else shifted
    return torch.cat((p[:1], p[:-1])) if shifted else p


def canvas_of(prompts, new):
    """Prompts of these lengths, padded on the left, and `new` masked positions; the attention mask."""
    width = max(prompts)
    rows = [[0] * (width - n) + [*range(1, n + 1), *[MASK] * new] for n in prompts]
    return torch.tensor(rows), torch.tensor([[0] * (width - n) + [1] * (n + new) for n in prompts])


def assert_equal_to(loop, model, config, new=11):
    """Each row of a batch has the tokens of the loop, in as many passes of it."""
    canvas, mask = canvas_of(PROMPTS, new)
    out = denoise(model, canvas, config, mask)
    expected = [loop([*range(1, n + 1)], n + new) for n in PROMPTS]
    for row, n, (tokens, _) in zip(out.sequences.tolist(), PROMPTS, expected, strict=True):
        assert row[-n - new:] == tokens[:n + new]
    filled = sum(len(tokens) - n for n, (tokens, _) in zip(PROMPTS, expected, strict=True))
    assert out.tokens_per_forward == pytest.approx(filled / sum(passes for _, passes in expected))
    return out


@pytest.mark.parametrize("rows, length", [(1, 1), (3, 7), (5, 40)])
@pytest.mark.parametrize("bound", [1e-6, 0.5, 3.0, 1e6])
def test_the_largest_set_within_the_bound_is_accepted(rows, length, bound):
    g = torch.Generator().manual_seed(length)
    entropy = torch.rand(rows, length, generator=g).mul(4).round(decimals=1) / 2  # many are equal
    eligible = torch.rand(rows, length, generator=g) < 0.7
    eligible[0] = length > 1
    for among in (None, eligible):
        accepted = accept_within_entropy(entropy, bound, among)
        for row in range(rows):
            places = [place for place in range(length) if among is None or among[row, place]]
            expected, total = set(), 0.0
            for place in sorted(places, key=lambda place: (float(entropy[row, place]), place)):
                if total > bound + 1e-5:
                    break
                expected.add(place)
                total += float(entropy[row, place])
            assert set(accepted[row].nonzero().flatten().tolist()) == expected


def entropy_bounded(model, tokens, length, bound):
    """EB-Sampler (arXiv:2505.24857), by the entropies themselves."""
    tokens, passes = tokens + [MASK] * (length - len(tokens)), 0
    while MASK in tokens:
        p, passes, total = probabilities(model, tokens), passes + 1, 0.0
        entropy = -(p * p.log()).sum(-1)
        for place in sorted((i for i, token in enumerate(tokens) if token == MASK), key=lambda i: float(entropy[i])):
            if total > bound:
                break
            tokens[place] = int(p[place].argmax())
            total += float(entropy[place])
    return tokens, passes


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("bound", [0.01, 4.0, 12.0])
def test_entropy_bounded_unmasking_is_that_of_the_paper(shift, bound):
    model = tiny_of("qwen2", shift_logits=shift)
    with torch.no_grad():
        model.head_weight[MASK] = 0
    config = MDMGenerationConfig(alg="entropy_bound", entropy_bound=bound, mask_token_id=MASK)
    out = assert_equal_to(lambda tokens, length: entropy_bounded(model, tokens, length, bound), model, config)
    assert (out.tokens_per_forward == 1) == (bound == 0.01)


def in_sub_blocks(model, tokens, length, block, sub, threshold):
    """Fast-dLLM v2 (arXiv:2509.26328): the pass that finishes a block gives the first token of the next one."""
    tokens, passes = [*tokens], 0
    while len(tokens) < length:
        if len(tokens) % block == 0 and model.config.shift_logits:
            passes += 1
            tokens.append(int(probabilities(model, tokens, block, shifted=False)[-1].argmax()))
        start = len(tokens) // block * block
        tokens += [MASK] * (start + block - len(tokens))
        for first in range(start, start + block, sub):
            part = range(first, first + sub)
            while MASK in tokens[first:first + sub]:
                surest, words = probabilities(model, tokens, block).max(-1)
                passes += 1
                masked = [place for place in part if tokens[place] == MASK]
                sure = [i for i in masked if surest[i] > threshold]
                for place in {max(masked, key=lambda i: float(surest[i])), *sure}:
                    tokens[place] = int(words[place])
    return tokens, passes


@pytest.mark.parametrize("shift, block, sub, threshold", [
    (True, 8, 2, 0.25), (False, 8, 2, 0.25), (True, 4, 4, 0.25), (True, 6, 3, 2.0), (False, 4, 1, 0.25)])
def test_sub_blocks_are_those_of_fast_dllm_v2(shift, block, sub, threshold):
    model = block_causal(shift_logits=shift)
    config = MDMGenerationConfig(alg="maskgit_plus", threshold=threshold, block_length=block, sub_block_length=sub,
                                 mask_token_id=MASK)
    assert_equal_to(lambda tokens, length: in_sub_blocks(model, tokens, length, block, sub, threshold), model, config)


def in_a_window(model, tokens, length, config, causal=False):
    """D2F (arXiv:2508.09192) with at most so many unfinished blocks: one joins in a pass, the first is always full."""
    size, tokens, passes = config.block_length, [*tokens], 0
    given, whole = len(tokens), -(-length // size) * size
    ends = [given // size * size + size]  # of the blocks that have joined
    tokens += [MASK] * (ends[0] - given)

    def share(end):
        there = range(max(end - size, given), end)
        return sum(tokens[i] != MASK for i in there) / len(there)

    while MASK in tokens or ends[-1] < whole:
        unfinished = min((end for end in ends if share(end) < 1), default=whole)
        if ends[-1] < whole and share(ends[-1]) >= config.enter_share and (
                ends[-1] + size - unfinished < config.window_blocks * size):
            ends.append(ends[-1] + size)
            tokens += [MASK] * size
        surest, words = probabilities(model, tokens, 1 if causal else size).max(-1)
        passes += 1
        full = [end for end in ends if end == ends[0] or share(end - size) >= config.full_share]
        chosen = []
        for end in ends:
            masked = [i for i in range(max(end - size, given), end) if tokens[i] == MASK]
            sure = [i for i in masked if surest[i] >= config.threshold]
            chosen += sure or ([max(masked, key=lambda i: float(surest[i]))] if masked and end in full else [])
        for place in chosen:
            tokens[place] = int(words[place])
    return tokens, passes


@pytest.mark.parametrize("shift, causal", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("blocks, enter, full", [(2, 0.1, 0.95), (3, 0.5, 0.5), (9, 0.01, 0.0), (4, 0.3, 1.0)])
def test_a_window_of_blocks_is_that_of_d2f(shift, causal, blocks, enter, full):
    model = block_causal(shift_logits=shift, causal_blocks=causal)
    config = MDMGenerationConfig(alg="maskgit_plus", threshold=0.2, block_length=4, window_blocks=blocks,
                                 enter_share=enter, full_share=full, mask_token_id=MASK)
    assert_equal_to(lambda tokens, length: in_a_window(model, tokens, length, config, causal), model, config, new=18)


@pytest.mark.parametrize("shift", [False, True])
def test_a_window_whose_blocks_wait_for_one_another_is_none(shift):
    model, (canvas, mask) = block_causal(shift_logits=shift), canvas_of(PROMPTS, 14)
    settings = {"alg": "entropy", "threshold": -3.0, "block_length": 4, "mask_token_id": MASK, "temperature": 0.0}
    plain = denoise(model, canvas, MDMGenerationConfig(**settings), mask)
    window = denoise(model, canvas, MDMGenerationConfig(**settings, window_blocks=3, enter_share=1.0), mask)
    assert torch.equal(plain.sequences, window.sequences)
    assert plain.tokens_per_forward == pytest.approx(window.tokens_per_forward)


def test_blocks_join_and_must_commit_by_the_share_of_the_one_before():
    editable = torch.ones(4, 11, dtype=torch.bool)
    editable[3, :5] = False  # given: the first block, and one position of the second
    masked = editable.clone()
    masked[1, 0] = False  # a quarter of the first block
    masked[2, :4] = masked[2, 4] = False  # all of the first, and a quarter of the second
    masked[3, 5] = False  # a third of the second
    joined, must = Window(4, 2, 0.25, 0.3).open(masked, editable)
    assert joined.tolist() == [[True, False, False], [True, True, False], [True, True, True], [True, True, True]]
    assert must.tolist() == [[True, False, False], [True, False, False], [True, True, False], [True, True, True]]


def softly(model, tokens, length, block, threshold):
    """DMax (arXiv:2604.08302): what a block holds is embedded between its token and the mask, and revised."""
    tokens, passes, embed = [*tokens], 0, model.model.embed_tokens
    while len(tokens) < length:
        start, given = len(tokens) // block * block, len(tokens)
        tokens += [MASK] * (start + block - given)
        active, sure = range(given, start + block), {}
        for _ in range(block):
            weight = embed.weight.detach().double()
            x = weight[tokens]
            for i, p in sure.items():
                mixed = p * x[i] + (1 - p) * weight[MASK]
                x[i] = mixed / mixed.norm() * (p * x[i].norm() + (1 - p) * weight[MASK].norm())
            hook = embed.register_forward_hook(lambda *_, x=x: x.float().unsqueeze(0))
            surest, words = probabilities(model, tokens, block).max(-1)
            hook.remove()
            passes, before = passes + 1, [*tokens]
            masked = [i for i in active if tokens[i] == MASK]
            until = next((i for i in masked if surest[i] < threshold), start + block)
            for i in active:
                if before[i] != MASK or i < until or i == masked[0]:
                    tokens[i] = int(words[i])
            if all(surest[i] >= 0.9 for i in active) or tokens == before:
                break
            sure = {i: float(surest[i]) for i in active if tokens[i] != MASK}
    return tokens, passes


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("threshold, block", [(0.0, 4), (0.2, 6), (0.5, 8)])
def test_soft_embeddings_are_those_of_dmax(shift, threshold, block):
    model = block_causal(shift_logits=shift)
    config = MDMGenerationConfig(alg="soft_parallel", threshold=threshold, block_length=block)
    assert_equal_to(lambda tokens, length: softly(model, tokens, length, block, threshold), model, config)


METHODS = [{"alg": "entropy_bound", "entropy_bound": 5.0},
           {"alg": "entropy_bound", "entropy_bound": 5.0, "cfg_scale": 0.5},
           {"sub_block_length": 2, "threshold": 0.2},
           {"sub_block_length": 2, "alg": "entropy_bound", "entropy_bound": 4.0},
           {"window_blocks": 3, "threshold": 0.2},
           {"window_blocks": 2, "remasking": "low_confidence", "threshold": 0.2},
           {"window_blocks": 3, "threshold": 0.2, "cfg_scale": 0.5, "blocks_from": "masked"},
           {"alg": "soft_parallel", "threshold": 0.2},
           {"alg": "soft_parallel", "threshold": 0.0, "cfg_scale": 0.5},
           {"sub_block_length": 2, "factor": 1.0, "cfg_scale": 0.5}]


@pytest.mark.parametrize("shift, method", [(place % 2 == 0, method) for place, method in enumerate(METHODS)])
def test_a_row_gets_the_same_tokens_alone_and_in_a_batch(method, shift):
    model, (canvas, mask) = block_causal(shift_logits=shift), canvas_of(PROMPTS, 13)
    config = MDMGenerationConfig(**{"alg": "maskgit_plus", "block_length": 4, "mask_token_id": MASK, "seed": 1,
                                    "temperature": 0.7, **method})
    together, filled, passes = denoise(model, canvas, config, mask), 0, 0
    assert not (together.sequences == MASK).any()
    for row, prompt in enumerate(PROMPTS):
        alone = denoise(model, canvas[row:row + 1, -prompt - 13:], config)
        assert torch.equal(alone.sequences[0], together.sequences[row, -prompt - 13:])
        filled, passes = filled + alone.tokens_per_forward * alone.forwards, passes + alone.forwards
    assert together.tokens_per_forward == pytest.approx(filled / passes)


@pytest.mark.parametrize("method", [*METHODS[:6], METHODS[7]])
def test_constraints_and_ends_of_text_hold(method):
    model, (canvas, mask) = block_causal(shift_logits=True), canvas_of(PROMPTS, 13)
    words = AllowedTokens([3, 4, 5, 9], 61)
    config = MDMGenerationConfig(**{"alg": "maskgit_plus", "block_length": 4, "mask_token_id": MASK, "seed": 1,
                                    "temperature": 1.0, "stop_at_eos": True, "eos_token_id": 9, "constraint": words,
                                    **method})
    ended = 0
    for step in Denoising(model, canvas, config, mask):
        for row in step.tokens[:, -13:].tolist():
            if 9 in row and MASK not in row[:row.index(9)]:
                assert MASK not in row
                ended += 1
    assert ended and set(step.tokens[:, -13:].flatten().tolist()) == {3, 4, 5, 9}


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_entropy_bounds_go_with_caches_that_change_with_blocks(cache):
    model, (canvas, mask) = tiny(shift_logits=True), canvas_of(PROMPTS, 12)
    config = MDMGenerationConfig(alg="entropy_bound", entropy_bound=8.0, block_length=4, cache=cache,
                                 mask_token_id=MASK)
    together = denoise(model, canvas, config, mask)
    assert together.tokens_per_forward > 1
    for row, prompt in enumerate(PROMPTS):
        alone = denoise(model, canvas[row:row + 1, -prompt - 12:], config)
        assert torch.equal(alone.sequences[0], together.sequences[row, -prompt - 12:])


def test_the_pass_that_keeps_finished_blocks_denoises_the_next_one():
    """Under shifted logits too: as many passes as steps."""
    model, (canvas, mask) = block_causal(shift_logits=True), canvas_of(PROMPTS, 13)
    out = denoise(model, canvas, MDMGenerationConfig(alg="maskgit_plus", threshold=0.2, block_length=4,
                                                     mask_token_id=MASK), mask)
    assert out.forwards == out.steps


@pytest.mark.parametrize("settings, message", [
    ({"entropy_bound": 0.5}, "entropy_bound needs alg entropy_bound, and no remasking; the method is entropy"),
    ({"alg": "entropy_bound", "entropy_bound": -0.1}, "entropy_bound must be above 0, not -0.1"),
    ({"alg": "entropy_bound", "threshold": 0.9}, "and so does alg entropy_bound; choose one of them"),
    ({"alg": "entropy_bound", "expand_token_id": 5}, "expand_token_id commits one position a step"),
    ({"sub_block_length": 2, "threshold": 0.9, "block_causal": False}, "sub_block_length needs a block-causal model"),
    ({"sub_block_length": 2}, "sub_block_length needs confidences that decide how many .*, entropy here does not; set"),
    ({"sub_block_length": 3, "threshold": 0.9}, "sub_block_length 3 does not divide the block_length 4; choose one"),
    ({"sub_block_length": 2, "window_blocks": 2, "threshold": 0.9}, "exclude each other"),
    ({"window_blocks": 2, "threshold": 0.9, "block_causal": False}, "window_blocks needs a block-causal model"),
    ({"window_blocks": 2, "remasking": "low_confidence_dynamic", "threshold": 0.9}, "low_confidence_dynamic here does"),
    ({"window_blocks": 2, "factor": 1.0}, "window_blocks needs a threshold .*, and neither factor nor alg entropy_b"),
    ({"alg": "soft_parallel"}, "soft_parallel needs a threshold"),
    ({"alg": "soft_parallel", "threshold": 0.5, "block_causal": False}, "soft_parallel needs a block-causal model"),
    ({"alg": "soft_parallel", "threshold": 0.5, "mask_token_id": 7}, "the mask token that its folder names"),
    ({"window_blocks": 0}, "window_blocks must be at least 1, not 0"),
    ({"enter_share": 1.5}, "enter_share must be at least 0 and at most 1, not 1.5"),
])
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        denoise(block_causal(), canvas_of((3,), 8)[0], MDMGenerationConfig(
            **{"mask_token_id": MASK, "block_length": 4, **settings}))
