"""Constrained decoding: every committed token is part of a text that matches, in any order, by any method."""

import functools
import itertools
import json
import random
import re
import unicodedata

import numpy as np
import pytest
import torch

from dllm.constraints import AllowedTokens, Regex, json_schema, token_bytes
from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.generation.infilling import Gap, choose_length
from dllm.generation.sampler import denoise
from dllm.model.tokenizer import train_tokenizer
from dllm_kernels.topk_unmask.allowed import unpack
from tests.dllm.tiny_models import tiny_of


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(['{"name": "ab", "age": 12}', "2024-01-31 1999-12-24", "Grüße, naïve"] * 3, 300)


def random_model(tokenizer, **changes):
    torch.manual_seed(0)
    return tiny_of("qwen2", vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, eos_token_id=0, **changes)


def masked(tokenizer, rows, length, prompt=(5, 6)):
    canvas = torch.full((rows, len(prompt) + length), tokenizer.mask_token_id)
    canvas[:, :len(prompt)] = torch.tensor(prompt)
    return canvas


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"alg": "maskgit_plus", "steps": 3}, {"alg": "entropy", "steps": 24, "temperature": 1.5}, {"alg": "origin"},
    {"alg": "maskgit_plus", "threshold": 0.0}, {"remasking": "low_confidence", "block_length": 8, "steps": 6},
    {"remasking": "low_confidence_dynamic", "threshold": 0.0, "block_causal": True, "block_length": 4, "steps": 28},
    {"alg": "maskgit_plus", "threshold": 0.1, "cache": "dual", "block_length": 8},
    {"alg": "p2", "temperature": 1.0}, {"alg": "remdm", "remask_rate": 0.3, "temperature": 1.0},
    {"remasking": "low_confidence_dynamic", "threshold": 0.01, "editing_threshold": 0.005, "block_causal": True,
     "block_length": 4}])
def test_texts_match_the_expression(tokenizer, settings):
    model = random_model(tokenizer, shift_logits=False)
    pattern = r"([0-9]{4}-[0-9]{2}-[0-9]{2} ?)+(Gr[üu]+(ß|ss)e)?"
    canvas = masked(tokenizer, 3, 24)
    config = MDMGenerationConfig(seed=3, **{"steps": 4, **settings},
                                 constraint=Regex(pattern, tokenizer, len(tokenizer)))
    out = denoise(model, canvas, config)
    for row in out.sequences[:, 2:]:
        assert re.fullmatch(pattern, text_of(tokenizer, row)), text_of(tokenizer, row)
    assert torch.equal(denoise(model, canvas[:1], config).sequences[0], out.sequences[0])


def test_texts_are_json_of_the_schema(tokenizer):
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
              "required": ["name", "age"]}
    config = MDMGenerationConfig(alg="maskgit_plus", steps=40, temperature=1.0, seed=0,
                                 constraint=json_schema(schema, tokenizer, len(tokenizer)))
    out = denoise(random_model(tokenizer), masked(tokenizer, 4, 40), config)
    for row in out.sequences[:, 2:]:
        record = json.loads(text_of(tokenizer, row))
        assert {*record} == {"name", "age"} and isinstance(record["age"], int)


def test_what_is_allowed_is_exactly_what_some_matching_text_has(tokenizer):
    """Against all texts of four tokens written out."""
    words = [token for token, text in token_bytes(tokenizer).items() if text in (b"a", b"b", b"ab", b"1", b"2", b"12")]
    constraint = Regex("(ab)+1?2?", tokenizer, len(tokenizer))
    mask, end = tokenizer.mask_token_id, tokenizer.eos_token_id
    spelt = token_bytes(tokenizer)
    texts = [ids for ids in itertools.product([*words, end], repeat=4)
             if re.fullmatch(b"(ab)+1?2?", b"".join(spelt.get(token, b"") for token in ids))
             and not any(a == end and b != end for a, b in itertools.pairwise(ids))]
    assert len(texts) > 10
    for known in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(4)):
        ids = [texts[7][place] if place in known else mask for place in range(4)]
        tokens = torch.tensor([ids])
        allowed = unpack(constraint.allowed(tokens, torch.ones_like(tokens, dtype=torch.bool), mask), len(tokenizer))
        fitting = [text for text in texts if all(a in (mask, b) for a, b in zip(ids, text, strict=True))]
        for place in range(4):
            if ids[place] == mask:
                have = set(allowed[0, place].nonzero().flatten().tolist())
                assert have == {text[place] for text in fitting}


def test_tokens_that_only_fit_apart_are_not_committed_together(tokenizer):
    """The most likely letters at each place alone would make "ad", which is neither "ab" nor "cd"."""
    spelt = {text: token for token, text in token_bytes(tokenizer).items()}
    a, b, d, mask = spelt[b"a"], spelt[b"b"], spelt[b"d"], tokenizer.mask_token_id
    constraint = Regex("ab|cd", tokenizer, len(tokenizer))
    before, after = torch.tensor([[mask, mask]] * 2), torch.tensor([[a, d], [a, b]])
    everywhere = torch.ones(2, 2, dtype=torch.bool)
    kept = constraint.keep(before, after, torch.tensor([[0.4, 0.6], [0.4, 0.6]]), everywhere, mask)
    assert kept.tolist() == [[mask, d], [a, b]]


def test_a_set_of_tokens_holds_for_every_method(tokenizer):
    model, words = random_model(tokenizer), [7, 11, 200]
    for settings in ({"alg": "p2"}, {"alg": "origin"}, {"alg": "entropy", "temperature": 2.0}):
        config = MDMGenerationConfig(steps=6, seed=0, constraint=AllowedTokens(words, len(tokenizer)), **settings)
        out = denoise(model, masked(tokenizer, 2, 9), config).sequences[:, 2:]
        assert {*out.flatten().tolist()} <= {*words}
    for kind in (torch.tensor, np.array, set, dict.fromkeys):  # as callers have them
        assert torch.equal(AllowedTokens(kind(words), len(tokenizer)).bits, config.constraint.bits)


def test_tokens_are_spelt_as_they_decode(tokenizer):
    spelt = token_bytes(tokenizer)
    for text in ("Grüße, naïve 12", '{"name": "ab"}'):
        ids = tokenizer(text)["input_ids"]
        assert b"".join(spelt[token] for token in ids).decode() == text
    assert tokenizer.eos_token_id not in spelt and tokenizer.mask_token_id not in spelt


def test_tokens_of_a_tokenizer_with_byte_fallback_are_spelt_as_they_decode():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, "▁a": 2, "b": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    spelt = token_bytes(PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>"))
    assert spelt == {2: b" a", 3: b"b", **{4 + byte: bytes([byte]) for byte in range(256)}}


@pytest.mark.parametrize("make, message", [
    (lambda t: Regex("a(", t, 300), r"the regular expression 'a\(' cannot be used: missing \)"),
    (lambda t: Regex("a(?=b)", t, 300), "cannot be used: look-around cannot be held"),
    (lambda t: Regex(r"(a)\1", t, 300), "cannot be used: references to groups cannot be held"),
    (lambda t: Regex(r"a\b", t, 300), r"cannot be used: \\b and \\B cannot be held"),
    (lambda t: Regex("a++", t, 300), "cannot be used: possessive repetitions and atomic groups"),
    (lambda t: Regex("(a|b)*a(a|b){20}", t, 300), "more than 30000 states; write a smaller one"),
    (lambda t: Regex("((a{99}){99}){99}", t, 300), "more than 30000 states; write a smaller one"),
    (lambda t: Regex("a$b", t, 300), "cannot be used: no text matches it"),
    (lambda t: Regex("(" * 5000 + ")" * 5000, t, 300), "cannot be used: it is nested too deeply"),
    (lambda t: json_schema("{", t, 300), "the JSON schema cannot be used: Expecting property name"),
    (lambda t: json_schema({"type": "colour"}, t, 300), "the JSON schema cannot be used: type is one of object, array"),
    (lambda t: json_schema({"enum": {1, 2}}, t, 300), "must be JSON, or a dict of it"),
    (lambda t: json_schema(dict, t, 300), "must be JSON, or a dict of it"),
    (lambda t: Regex(re.compile("a"), t, 300), "a regular expression is text, not Pattern"),
    (lambda t: AllowedTokens([0.5], 300), r"must be one or more numbers in \[0, 300\), not '\[0.5\]'"),
    (lambda t: AllowedTokens(5, 300), r"in \[0, 300\), not '5'"),
    (lambda t: AllowedTokens([], 300), r"must be one or more numbers in \[0, 300\), not '\[\]'"),
    (lambda t: AllowedTokens([300], 300), r"in \[0, 300\), not '\[300\]'"),
])
def test_constraints_that_cannot_be_are_refused(tokenizer, make, message):
    with pytest.raises(UserError, match=message):
        make(tokenizer)


def test_lengths_that_fit_are_known_beforehand(tokenizer):
    constraint = Regex("a{3}b?", tokenizer, len(tokenizer))
    assert [constraint.fits(n) for n in range(6)] == [False, False, False, True, True, True]  # no token is "aa"
    assert AllowedTokens([7], len(tokenizer)).fits(5)
    with pytest.raises(UserError, match=r"none of infill_lengths \[1, 2\] can be filled as .* constraint want"):
        choose_length(random_model(tokenizer), Gap(torch.tensor([5]), torch.tensor([6]), "auto"),
                      MDMGenerationConfig(infill_lengths=[1, 2], constraint=constraint))


def test_settings_and_lengths_that_cannot_match_are_refused(tokenizer):
    model, constraint = random_model(tokenizer), Regex("[0-9]{9}", tokenizer, len(tokenizer))
    needed = next(n for n in range(10) if constraint.fits(n))
    assert needed > 2
    with pytest.raises(UserError, match=r"no text of 2 tokens matches the constraint '\[0-9\]\{9\}', end-of-text .* "
                                        f"the length does not suffice, at least {needed} tokens are needed"):
        denoise(model, masked(tokenizer, 1, 2), MDMGenerationConfig(constraint=constraint, alg="maskgit_plus"))
    out = denoise(model, masked(tokenizer, 1, needed), MDMGenerationConfig(constraint=constraint))
    assert re.fullmatch("[0-9]{9}", text_of(tokenizer, out.sequences[0, 2:]))
    with pytest.raises(UserError, match="expand_token_id moves positions, and blocks and constraints need them to"):
        denoise(model, masked(tokenizer, 1, 9), MDMGenerationConfig(constraint=constraint, expand_token_id=5))


@pytest.mark.parametrize("pattern", [
    '"[^"]*"', "a.*b", "[^,]+,[0-9]", "^[a-c]+$", r"\A\d*\Z", "(?s:.){3}", "", "(?i:ß|ab)", r"\w+\W\s?", "[à-ÿ]{2}é",
    "(?:ab|a)(?:bc|c)?", "a??b+?", "x{0,40}", "日本?"])
def test_what_matches_is_what_python_matches(tokenizer, pattern):
    """Every text that is committed, and every text of the tokens that a row is made of."""
    constraint = Regex(pattern, tokenizer, len(tokenizer))
    model, spelt = random_model(tokenizer), token_bytes(tokenizer)
    config = MDMGenerationConfig(steps=5, temperature=1.5, alg="maskgit_plus", seed=1, constraint=constraint)
    for row in denoise(model, masked(tokenizer, 6, 12), config).sequences[:, 2:]:
        assert re.fullmatch(pattern, text_of(tokenizer, row))
    numbers = {text: token for token, text in spelt.items()}
    letters = random.Random(0)
    for _ in range(300):
        text = "".join(letters.choices('ab"cx,0 \nÄéßS日本\u0301', k=letters.randrange(6)))
        ids = torch.tensor([[numbers[bytes([byte])] for byte in text.encode()] + [tokenizer.mask_token_id]])
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        if re.fullmatch(pattern, text) is None:  # some longer text may match; this one does not, so it cannot end here
            continue
        allowed = unpack(constraint.allowed(ids, everywhere, tokenizer.mask_token_id), len(tokenizer))
        assert allowed[0, -1, tokenizer.eos_token_id], text


@pytest.mark.slow
def test_categories_of_unicode_are_classes(tokenizer):
    constraint = Regex(r"\p{Lu}[\p{Ll}1]{3}\P{L}[^\pL\p{N}]", tokenizer, len(tokenizer))
    config = MDMGenerationConfig(steps=5, temperature=1.5, alg="maskgit_plus", seed=1, constraint=constraint)
    for row in denoise(random_model(tokenizer), masked(tokenizer, 20, 20), config).sequences[:, 2:]:
        kinds = [unicodedata.category(character) for character in text_of(tokenizer, row)]
        assert kinds[0] == "Lu" and {*kinds[1:4]} <= {"Ll", "Nd"} and kinds[4][0] != "L" and kinds[5][0] not in "LN"
    with pytest.raises(UserError, match=r"\\p takes a general category of Unicode, such as L, Lu or Nd, not 'Greek'"):
        Regex(r"\p{Greek}", tokenizer, len(tokenizer))


def test_steps_that_commit_nothing_ask_no_constraint(tokenizer, monkeypatch):
    constraint, asked = Regex('"[^"]*"', tokenizer, len(tokenizer)), []
    monkeypatch.setattr(constraint.matcher, "allowed", functools.partial(_noted, asked, constraint.matcher.allowed))
    config = MDMGenerationConfig(steps=512, constraint=constraint)
    out = denoise(random_model(tokenizer), masked(tokenizer, 1, 8), config)
    assert len(asked) == out.forwards <= 9 and out.steps > 400


def _noted(calls, function, *given):
    calls.append(given)
    return function(*given)


def test_a_row_is_the_same_alone_and_beside_others_when_steps_are_repeated(tokenizer):
    constraint = Regex("(ab|cd|[0-9]{2})+", tokenizer, len(tokenizer))
    for settings in ({"alg": "origin"}, {"alg": "maskgit_plus", "block_length": 4, "threshold": 0.1}, {"alg": "p2"}):
        config = MDMGenerationConfig(steps=4, temperature=1.0, seed=5, constraint=constraint, **settings)
        canvas = masked(tokenizer, 3, 12)
        canvas[1, 6:] = 9  # four positions to fill
        canvas[2, 0] = 7  # equal rows draw independently
        model = random_model(tokenizer)
        together = denoise(model, canvas, config).sequences
        for row in range(3):
            assert torch.equal(denoise(model, canvas[row:row + 1], config).sequences[0], together[row])


def test_no_mask_special_token_or_word_beyond_the_tokenizer_is_committed(tokenizer):
    """A vocabulary that is padded, a word of the vocabulary as the mask token, and several tokens that end a text."""
    spelt = token_bytes(tokenizer)
    mask = next(token for token, text in spelt.items() if text == b"a")
    size = len(tokenizer) + 29
    model = tiny_of("qwen2", vocab_size=size, mask_token_id=mask, eos_token_id=[1, 0])
    for pattern in (".*", "[a-z]{3,}"):
        constraint = Regex(pattern, tokenizer, size, ends=[1, 0])
        canvas = torch.full((4, 16), mask)
        config = MDMGenerationConfig(steps=3, temperature=1.0, seed=0, constraint=constraint, stop_at_eos=True,
                                     alg="p2")
        for row in denoise(model, canvas, config).sequences.tolist():
            end = next((place for place, token in enumerate(row) if token in (0, 1)), len(row))
            assert all(token in spelt and token != mask for token in row[:end]) and {*row[end:]} <= {0, 1}
            assert re.fullmatch(pattern, b"".join(spelt[token] for token in row[:end]).decode())
    with pytest.raises(UserError, match="the tokens can spell no text that matches it"):
        Regex("a", tokenizer, size).allowed(canvas, canvas > 0, mask)


def test_without_a_token_that_ends_texts_they_have_exactly_the_length(tokenizer):
    class Endless:
        def __init__(self):
            self.__dict__.update(eos_token_id=None, all_special_ids=[0, 1, 2])

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return len(tokenizer)

    constraint = Regex("x{2,3}", Endless(), len(tokenizer))
    assert [constraint.fits(n) for n in range(5)] == [False, False, True, True, False]
    with pytest.raises(UserError, match="no text of 4 tokens .* no token ends a text before that"):
        constraint.check(4)


def test_a_tokenizer_that_does_not_say_what_its_tokens_add_is_refused():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="need a tokenizer that is byte-level or marks spaces .* decodes by WordPiece"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))


@pytest.mark.parametrize("settings", [{}, {"block_causal": True, "block_length": 4}])
def test_a_text_in_pieces_is_refused_instead_of_matching_across_them(tokenizer, settings):
    model, mask = random_model(tokenizer), tokenizer.mask_token_id
    config = MDMGenerationConfig(steps=6, seed=0, constraint=Regex("yes|no", tokenizer, len(tokenizer)), **settings)
    with pytest.raises(UserError, match="a text in one piece; take the masks out of the prompt"):
        denoise(model, torch.tensor([[7, mask, 8, mask, mask, mask]]), config)
    padded = torch.tensor([[7, 9, 8, mask, 0, mask, mask]])  # padding within is no gap
    rows = denoise(model, padded, config, padded != 0).sequences
    assert tokenizer.decode(rows[0, [3, 5, 6]], skip_special_tokens=True) in ("yes", "no")
