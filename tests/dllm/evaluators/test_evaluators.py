"""Evaluators: numbers worked out by hand or by enumeration, the same positions for all, errors, bad input."""

import itertools
import json
import math
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

from dllm.data import Document
from dllm.errors import UserError
from dllm.evaluators.baselines import baseline_accuracy, count_ngrams
from dllm.evaluators.estimates import wilson_interval
from dllm.evaluators.held_out import HeldOutSettings, Window, corrupt_share, cut_windows, decode, ratio_with_error
from dllm.evaluators.likelihood import bound_likelihood, masked_accuracy, perplexity_bound, score_positions
from dllm.evaluators.line_infilling import InfillingSettings, find_functions, hide_lines, line_infilling
from dllm.model.layouts import Padded, Visible
from tests.dllm.tiny_models import tiny_of

TEXT = "".join(f"def function_{i}(a, b):\n    '''Say é.'''\n    c = a * b + {i}\n    return c\n\n\n" for i in range(12))
DOCUMENTS = [Document(TEXT, "a.py"), Document(TEXT[40:900], "b.py"), Document("x = 1\n", "c.py")]


class KnownModel:
    """A model with given logits: [L, V] as a function of the noisy tokens [L]."""

    def __init__(self, logits, vocab_size, mask_token_id):
        self.logits, self.mask_token_id, self.device = logits, mask_token_id, torch.device("cpu")
        self.head_weight, self.head_bias = torch.eye(vocab_size), None
        shape = {"max_position_embeddings": 1024, "shift_logits": False, "vocab_size": vocab_size,
                 "canvas_length": None, "logit_softcap": None}
        self.config = type("Config", (), {"block_causal": False, "edit_heads": None, "uniform_share": None,
                                          "self_conditioning": False, **shape})

    def hidden_states(self, tokens, layout=None):
        return torch.stack([self.logits(row) for row in tokens])


def test_bound_of_a_model_that_knows_only_frequencies_is_their_cross_entropy(tokenizer):
    V = len(tokenizer)
    probability = torch.rand(V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    probability /= probability.sum()
    model = KnownModel(lambda row: probability.log().float().expand(len(row), V), V, tokenizer.mask_token_id)
    settings = HeldOutSettings(max_seq_len=50, windows=None, samples=40)
    result = perplexity_bound(model, tokenizer, DOCUMENTS, settings)
    windows = cut_windows(tokenizer, DOCUMENTS, settings)
    scored = torch.cat([window.tokens[1:] for window in windows])
    exact = -probability[scored].log().mean().item()
    assert result.tokens == len(scored)
    assert abs(result.nats_per_token - exact) < 5 * result.monte_carlo_stderr < 0.2
    assert result.bits_per_byte == pytest.approx(result.nats_per_token * result.tokens / result.bytes / math.log(2))


def test_a_uniform_model_has_the_logarithm_of_the_vocabulary_without_any_error(tokenizer):
    V = len(tokenizer)
    model = KnownModel(lambda row: torch.zeros(len(row), V), V, tokenizer.mask_token_id)
    result = perplexity_bound(model, tokenizer, DOCUMENTS, HeldOutSettings(max_seq_len=64))
    assert result.nats_per_token == pytest.approx(math.log(V), rel=1e-6)
    assert result.nats_per_token_stderr < 1e-6 and result.monte_carlo_stderr < 1e-6 < result.bits_per_byte_stderr
    assert result.perplexity_bound == pytest.approx(V, rel=1e-5)


@pytest.mark.slow
def test_bound_equals_the_enumeration_of_all_sets_of_corrupted_positions(tokenizer, monkeypatch):
    """The nll depends on the number and place of the masked tokens, so a wrong weight would show."""
    V, L, mask = 7, 5, 6
    tokens = torch.tensor([3, 1, 4, 0, 5, 2])

    def logits(row):
        masked = (row == mask).sum()
        return torch.sin(torch.arange(len(row))[:, None] * (1 + masked) + torch.arange(V)[None]) * 3

    def nll(chosen):
        noisy = tokens.clone()
        noisy[list(chosen)] = mask
        return sum(F.cross_entropy(logits(noisy)[i], tokens[i]).item() for i in chosen)

    exact = 0.0
    for n in range(1, L + 1):
        sets = list(itertools.combinations(range(1, L + 1), n))
        exact += sum(nll(chosen) for chosen in sets) / len(sets) / n
    monkeypatch.setattr("dllm.evaluators.likelihood.cut_windows", lambda *_: [Window(tokens, 0, 9)] * 4)
    result = perplexity_bound(KnownModel(logits, V, mask), None, [], HeldOutSettings(samples=3000))
    assert abs(result.nats_per_token - exact / L) < 4 * result.monte_carlo_stderr < 0.05
    assert result.nats_per_token_stderr is None  # one document tells nothing about others


def test_bound_of_an_answer_is_the_mean_over_all_sets_of_its_tokens(model):
    """Prompts of 3 and 1 tokens, answers of 3 and 4, padding on either side; alone or together the same numbers."""
    mask, rows = model.mask_token_id, [([11, 12, 13], [20, 21, 22]), ([14], [23, 24, 25, 26])]
    ids = torch.tensor([[9, 11, 12, 13, 20, 21, 22], [14, 23, 24, 25, 26, 9, 9]])
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    scored = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]])
    bound = model.perplexity_bound(ids, real, scored=scored, samples=600)
    assert bound.tokens.tolist() == [3, 4]
    for row, (prompt, answer) in enumerate(rows):
        n, shift = len(answer), int(model.config.shift_logits)
        exact = 0.0
        for count in range(1, n + 1):
            sets = list(itertools.combinations(range(n), count))
            for chosen in sets:
                noisy = torch.tensor([prompt + [mask if i in chosen else token for i, token in enumerate(answer)]])
                with torch.no_grad():
                    log_p = model(noisy).logits[0].log_softmax(-1)
                nll = -sum(float(log_p[len(prompt) + i - shift, answer[i]]) for i in chosen)
                exact += n / count * nll / len(sets) / n
        assert abs(float(bound.nats[row]) - exact) < 4 * float(bound.stderr[row]) < 0.05 * exact
    alone = model.perplexity_bound(ids[0, 1:], scored=scored[:1, 1:], samples=600)
    assert alone.nats[0] == pytest.approx(float(bound.nats[0]), rel=1e-6)
    assert torch.equal(bound.perplexity, (bound.nats / bound.tokens).exp())


@pytest.mark.parametrize("change, message", [
    ({"samples": 1}, "samples must be at least 2, for a standard error, not 1"),
    ({"scored": torch.tensor([[0, 0, 0]])}, "sequence 0 has no token to score"),
    ({"scored": torch.tensor([[1, 1, 1]])}, "a model with shifted logits cannot predict the first token"),
])
def test_a_bound_that_cannot_be_is_refused(model, monkeypatch, change, message):
    monkeypatch.setattr(model, "config", replace(model.config, shift_logits=True))
    with pytest.raises(UserError, match=message):
        model.perplexity_bound(torch.tensor([5, 6, 7]), **change)


@pytest.mark.parametrize("shift", [False, True])
def test_scores_are_those_of_the_logits_whatever_the_batch(model, tokenizer, shift):
    object.__setattr__(model.config, "shift_logits", shift)
    windows = cut_windows(tokenizer, DOCUMENTS, HeldOutSettings(max_seq_len=37))
    corrupted = corrupt_share(windows, 0.4, 0)
    assert len({len(window.tokens) for window in windows}) > 1  # so that there is padding
    results = score_positions(model, windows, corrupted, 150, predict=True)
    for window, where, (nats, predicted) in zip(windows, corrupted, results, strict=True):
        logits = model(window.tokens.masked_fill(where, model.mask_token_id).unsqueeze(0)).logits[0].double()
        rows = logits[where.nonzero().squeeze(1) - int(shift)]
        expected = F.cross_entropy(rows, window.tokens[where], reduction="none")
        torch.testing.assert_close(nats, expected, atol=1e-4, rtol=0)
        assert torch.equal(predicted, rows.argmax(1))


def block_causal(model, shift: bool, length: int):
    """The same weights under a block-causal configuration."""
    other = deepcopy(model)
    other.config = replace(model.config, shift_logits=shift, block_causal=True, block_length=length)
    return other


@pytest.mark.parametrize("shift", [False, True])
def test_a_block_of_the_whole_window_is_bounded_as_by_attention_in_both_directions(model, tokenizer, shift):
    model.config = replace(model.config, shift_logits=shift)
    settings = HeldOutSettings(max_seq_len=37, samples=2)
    ours = perplexity_bound(block_causal(model, shift, 40), tokenizer, DOCUMENTS, settings)
    assert ours.nats_per_token == pytest.approx(perplexity_bound(model, tokenizer, DOCUMENTS, settings).nats_per_token,
                                                rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [False, True])
def test_blocks_of_one_token_give_the_likelihood_from_left_to_right(model, tokenizer, shift):
    causal = block_causal(model, shift, 1)
    windows = cut_windows(tokenizer, DOCUMENTS, HeldOutSettings(max_seq_len=20))
    expected = []
    for window in windows:
        tokens = window.tokens
        for i in range(1, len(tokens)):
            seen = tokens[:i] if shift else torch.cat((tokens[:i], torch.tensor([model.mask_token_id])))
            hidden = causal.hidden_states(seen.unsqueeze(0), Padded(block_length=1))[0, -1]
            expected.append(-F.linear(hidden, causal.head_weight).log_softmax(-1)[tokens[i]].item())
    result = perplexity_bound(causal, tokenizer, DOCUMENTS, HeldOutSettings(max_seq_len=20, samples=2))
    assert result.nats_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.monte_carlo_stderr == pytest.approx(0, abs=1e-6)
    first = causal.perplexity_bound(windows[0].tokens, scored=torch.arange(len(windows[0].tokens)) >= 5, samples=2)
    assert first.nats.item() == pytest.approx(sum(expected[4:len(windows[0].tokens) - 1]), rel=1e-5)


def test_how_many_tokens_are_corrupted_is_even_in_each_block():
    """A model is less confident the more of a block is masked; its bound is the mean over these numbers."""
    V, length, block, tokens = 20, 8, 3, torch.arange(8)
    model = KnownModel(None, V, V - 1)
    blocks = {"block_causal": True, "block_length": block, "causal_blocks": False, "causal_context": False}
    model.config = type("Config", (model.config,), blocks)

    def hidden_states(noisy, layout):
        masked = (noisy == V - 1).view(-1, length)
        many = torch.cat([part.sum(1, keepdim=True).expand_as(part) for part in masked.split(block, 1)], 1)
        return F.one_hot(layout.clean_ids, V) * (9.0 / many.clamp(min=1)).view(*noisy.shape, 1)

    model.hidden_states = hidden_states
    expected = 0.0
    for size in (2, 3, 2):  # the first token is given
        for n in range(1, size + 1):
            expected += math.log1p((V - 1) * math.exp(-9 / n))  # size / n tokens of n, each with a chance of 1 / size
    scored = torch.arange(length).unsqueeze(0) > 0
    ours = bound_likelihood(model, tokens, scored=scored, samples=600)
    assert ours.nats.item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("causal", [False, True, "context"])
def test_a_corrupted_block_sees_what_it_sees_in_sampling(causal):
    """The blocks before it uncorrupted and, with causal blocks, nothing after each of its own tokens; with a causal
    context, nothing after each token of the blocks before it."""
    model = tiny_of("a2d-qwen3", block_causal=True, block_length=4, causal_blocks=causal is True, shift_logits=True,
                    causal_context=causal == "context", mask_token_id=60, vocab_size=61)
    tokens, corrupted = torch.arange(10, 20), torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 1, 1]).bool()
    (nats, _), = score_positions(model, [Window(tokens, 0, 0)], [corrupted], 64)
    expected = []
    for first in range(0, 10, 4):
        block = slice(first, min(first + 4, 10))
        seen = torch.cat((tokens[:first], tokens[block].masked_fill(corrupted[block], 60)))
        layout, place = Padded(block_length=1 if causal else 4), torch.arange(block.stop)
        if causal == "context":
            layout = Visible([(place <= place[:, None]) | (place[:, None] >= first)])
        with torch.no_grad():
            hidden = model.hidden_states(seen[None], layout)[0]
        for place in range(10)[block]:
            if corrupted[place]:
                expected.append(-(hidden[place - 1] @ model.head_weight.T).log_softmax(-1)[tokens[place]].item())
    assert nats.tolist() == pytest.approx(expected, rel=1e-4)


def test_windows_hold_every_token_once_and_their_bytes_add_up(tokenizer):
    whole = cut_windows(tokenizer, DOCUMENTS[:1], HeldOutSettings(max_seq_len=10_000, windows=None))
    parts = cut_windows(tokenizer, DOCUMENTS[:1], HeldOutSettings(max_seq_len=14, windows=None))
    assert torch.equal(torch.cat([window.tokens for window in parts]), whole[0].tokens)
    assert whole[0].tokens[-1] == tokenizer.eos_token_id
    first = len(decode(tokenizer, whole[0].tokens[:1]).encode())
    assert whole[0].bytes == len(TEXT.encode()) - first
    given = sum(len(decode(tokenizer, window.tokens[:1]).encode()) for window in parts)
    assert sum(window.bytes for window in parts) == pytest.approx(len(TEXT.encode()) - given, abs=24)  # é: 2 bytes


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(model, tokenizer):
    def measure(seed):
        settings = HeldOutSettings(max_seq_len=32, windows=20, samples=2, seed=seed)
        return (perplexity_bound(model, tokenizer, DOCUMENTS, settings),
                masked_accuracy(model, tokenizer, DOCUMENTS, settings),
                line_infilling(model, tokenizer, DOCUMENTS, InfillingSettings(lines=4, max_seq_len=96, seed=seed)))
    first, again, other = measure(0), measure(0), measure(1)
    assert first == again
    assert first[0] != other[0] and first[1] != other[1] and first[2] != other[2]


def test_results_are_json(model, tokenizer):
    settings = HeldOutSettings(max_seq_len=64, samples=1)
    results = [perplexity_bound(model, tokenizer, DOCUMENTS, settings),
               *masked_accuracy(model, tokenizer, DOCUMENTS, settings),
               line_infilling(model, tokenizer, DOCUMENTS, InfillingSettings(lines=2, max_seq_len=96))]
    for result in results:
        assert json.loads(json.dumps(asdict(result)))


def test_standard_error_is_that_of_the_mean_for_documents_of_one_size():
    """Windows that repeat each other within a document add no certainty."""
    values = torch.randn(50, dtype=torch.float64)
    once = ratio_with_error(values.tolist(), [1] * 50, range(50))
    four_times = ratio_with_error(values.repeat(4).tolist(), [1] * 200, list(range(50)) * 4)
    assert once[0] == pytest.approx(values.mean().item())
    assert once[1] == pytest.approx(values.std().item() / math.sqrt(50))
    assert four_times == pytest.approx(once)


def test_baselines_by_hand():
    counts = count_ngrams([torch.tensor([0, 1, 0, 1, 0, 2])], 4)
    torch.testing.assert_close(counts.unigram, torch.tensor([3.5, 2.5, 1.5, 0.5], dtype=torch.float64) / 8)
    # Too few counts for three discounts: 0.2 for bigrams (n1 = 1, n2 = 2), 0.9 for endings (n1 = 3, n2 = 0).
    seen, unseen = 0.1 / 3 + 0.9 / 4, 0.9 / 4
    torch.testing.assert_close(counts.continuation, torch.tensor([seen, seen, seen, unseen], dtype=torch.float64))
    left, word = torch.tensor([0, 0, 0, 2]), torch.tensor([1, 2, 3, 0])
    by_hand = [1.8 / 3 + 0.4 / 3 * seen, 0.8 / 3 + 0.4 / 3 * seen, 0.4 / 3 * unseen, seen]
    torch.testing.assert_close(counts.bigram_probability(left, word), torch.tensor(by_hand, dtype=torch.float64))
    assert counts.favourite[:2].tolist() == [1, 0]


def test_bigram_probabilities_sum_to_one_and_the_favourite_is_the_most_likely():
    V, generator = 40, torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, V - 1)  # the last two words never occur
    sequences = [weights.multinomial(n, replacement=True, generator=generator) for n in (900, 1, 400, 2500)]
    counts = count_ngrams(sequences, V)
    left, word = torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij")
    table = counts.bigram_probability(left, word)
    torch.testing.assert_close(table.sum(1), torch.ones(V, dtype=torch.float64))
    assert (table > 0).all()
    best = table.gather(1, counts.favourite.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(best, table.max(1).values, rtol=1e-12, atol=0)


def test_bigram_uses_the_left_neighbour_only_where_it_is_visible(tokenizer):
    """In a text that repeats two tokens, a visible neighbour decides a token, and a corrupted one tells nothing."""
    document = Document("ab" * 400, "ab")
    plain = tokenizer("ab" * 400, add_special_tokens=False)["input_ids"]
    counts = count_ngrams([torch.tensor(plain)], len(tokenizer))
    settings = HeldOutSettings(max_seq_len=40, windows=None, shares=(0.05, 1.0))
    few, all_hidden = baseline_accuracy(counts, tokenizer, [document, Document(document.text, "again")], settings)
    assert few.bigram.nats < few.unigram.nats
    assert all_hidden.bigram.accuracy == pytest.approx(all_hidden.unigram.accuracy, abs=0.05)  # the first is visible


def test_model_and_baselines_are_scored_on_the_same_number_of_positions(model, tokenizer):
    settings = HeldOutSettings(max_seq_len=32)
    counts = count_ngrams([torch.tensor(tokenizer(TEXT)["input_ids"])], len(tokenizer))
    ours = masked_accuracy(model, tokenizer, DOCUMENTS, settings)
    theirs = baseline_accuracy(counts, tokenizer, DOCUMENTS, settings)
    for result, baseline in zip(ours, theirs, strict=True):
        assert result.positions == baseline.unigram.positions == baseline.bigram.positions
        assert result.share == baseline.bigram.share


def test_a_hidden_line_is_a_whole_one_and_the_window_is_undisturbed_text(tokenizer):
    settings = InfillingSettings(lines=30, max_seq_len=80, max_line_tokens=40)
    drawn = hide_lines(tokenizer, DOCUMENTS, settings)
    lines = {line.strip() for line in TEXT.splitlines()} | {"x = 1"}
    for gap in drawn:
        middle = decode(tokenizer, gap.truth)
        assert middle.strip() in lines
        assert len(gap.tokens) <= 80 and decode(tokenizer, gap.tokens) in "".join(d.text for d in DOCUMENTS)
        assert (gap.prefix + middle + gap.suffix).replace("…", "") in TEXT + "x = 1\n"
    assert any(gap.source == "a.py" for gap in drawn)
    assert not any("'''" in decode(tokenizer, gap.truth) for gap in drawn if gap.source == "a.py")


def test_functions_are_found_with_their_decorators_and_statements():
    text = "import os\n\n@cache\ndef f(x):\n    'doc'\n    # why\n    if x:\n        return (1,\n                2)\n"
    (function,) = find_functions(text, 5)
    assert text[function.start:function.end] == text[text.index("@"):].rstrip()
    assert [text[a:b] for a, b in function.lines] == ["if x:", "return (1,"]
    (prose,) = find_functions("Not Python, \n\n  but two lines.", 0)
    assert len(prose.lines) == 2
    assert find_functions("x = 1\n", 0) == []


def test_a_model_that_knows_the_text_infills_every_line(tokenizer):
    """Every token follows from its position, so the exact match is 1, and the examples are the truth."""
    document = Document(TEXT[:200], "known.py")
    truth = torch.tensor(tokenizer(document.text, add_special_tokens=False)["input_ids"])

    class Knows(KnownModel):
        def hidden_states(self, tokens, layout=None):
            hidden = F.one_hot(truth[:tokens.shape[1]], len(tokenizer)).float().expand(len(tokens), -1, -1) * 50
            return layout.wanted(hidden)

    known = Knows(None, len(tokenizer), tokenizer.mask_token_id)
    settings = InfillingSettings(lines=3, max_seq_len=len(truth), max_line_tokens=40)
    result = line_infilling(known, tokenizer, [document], settings)
    assert result.exact_match == 1 and result.high == 1 and 0 < result.low < 1
    assert all(example.infilled == example.truth and example.exact for example in result.examples)


def test_wilson_interval_by_hand():
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_wilson_interval_holds_the_share_where_all_hit_or_none():
    for trials in range(1, 500):
        assert wilson_interval(0, trials)[0] == 0 and wilson_interval(trials, trials)[1] == 1


@pytest.mark.parametrize("call, says", [
    (lambda m, t: perplexity_bound(m, t, []), "nothing to evaluate"),
    (lambda m, t: perplexity_bound(m, t, [Document("a", "a")]), "none has text after its first token; give more data"),
    (lambda m, t: perplexity_bound(m, t, [Document(TEXT, "a")], HeldOutSettings(max_seq_len=300)), "256 positions"),
    (lambda m, t: line_infilling(m, t, [Document("", "a")]), "nothing to infill"),
    (lambda m, t: HeldOutSettings(shares=(0.5, 1.5)), "shares must be"),
    (lambda m, t: HeldOutSettings(samples=0), "samples must be at least 1, not 0"),
    (lambda m, t: InfillingSettings(max_seq_len=10, max_line_tokens=10), "to leave room around a line"),
])
def test_what_cannot_be_measured_is_refused_with_the_reason(model, tokenizer, call, says):
    with pytest.raises(UserError, match=says):
        call(model, tokenizer)
