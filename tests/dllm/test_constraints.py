"""Constrained decoding: every committed token is part of a text that matches, whatever the order and the method."""

import itertools
import json
import re

import pytest
import torch
from test_families import tiny

from dllm.constraints import AllowedTokens, Regex, json_schema, token_bytes
from dllm.errors import UserError
from dllm.lengths import choose_lengths
from dllm.sampler import MDMGenerationConfig, denoise
from dllm.tokenizer import train_tokenizer
from dllm_kernels.topk_unmask.allowed import unpack

outlines = pytest.importorskip("outlines_core", reason="outlines-core is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(['{"name": "ab", "age": 12}', "2024-01-31 1999-12-24", "Grüße, naïve"] * 3, 300)


def random_model(tokenizer, **changes):
    torch.manual_seed(0)
    return tiny("qwen2", vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, eos_token_id=0, **changes)


def masked(tokenizer, rows, length, prompt=(5, 6)):
    canvas = torch.full((rows, len(prompt) + length), tokenizer.mask_token_id)
    canvas[:, :len(prompt)] = torch.tensor(prompt)
    return canvas


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("settings", [
    {"alg": "maskgit_plus", "steps": 3}, {"alg": "entropy", "steps": 24, "temperature": 1.5}, {"alg": "origin"},
    {"alg": "maskgit_plus", "threshold": 0.0}, {"remasking": "low_confidence", "block_length": 8, "steps": 6},
    {"remasking": "low_confidence_dynamic", "threshold": 0.0, "block_causal": True, "block_length": 4, "steps": 28},
    {"alg": "maskgit_plus", "threshold": 0.1, "cache": "dual", "block_length": 8}])
def test_texts_match_the_expression(tokenizer, settings):
    model = random_model(tokenizer, shift_logits=False)
    pattern = r"([0-9]{4}-[0-9]{2}-[0-9]{2} ?)+(Gr[üu]+(ß|ss)e)?"
    canvas = masked(tokenizer, 3, 24)
    config = MDMGenerationConfig(seed=3, **{"steps": 4, **settings},
                                 constraint=Regex(pattern, tokenizer, len(tokenizer)))
    out = denoise(model, canvas, config)
    for row in out.sequences[:, 2:]:
        assert re.fullmatch(pattern, text_of(tokenizer, row)), text_of(tokenizer, row)
    assert torch.equal(denoise(model, canvas[1:2], config).sequences[0], out.sequences[1])


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
    """Of "ab" and "cd" two letters, each the surest at its place, would make "ad"."""
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
    (lambda t: Regex("a(", t, 300), "the regular expression 'a\\(' cannot be used: Failed to build DFA"),
    (lambda t: json_schema("{", t, 300), "the JSON schema cannot be used: Expecting property name"),
    (lambda t: json_schema({"type": "colour"}, t, 300), "the JSON schema cannot be used: "),
    (lambda t: AllowedTokens([], 300), r"must be one or more numbers in \[0, 300\), not \[\]"),
    (lambda t: AllowedTokens([300], 300), r"in \[0, 300\), not \[300\]"),
])
def test_constraints_that_cannot_be_are_refused(tokenizer, make, message):
    with pytest.raises(UserError, match=message):
        make(tokenizer)


def test_lengths_that_fit_are_known_beforehand(tokenizer):
    constraint = Regex("a{3}b?", tokenizer, len(tokenizer))
    assert [constraint.fits(n) for n in range(6)] == [False, False, False, True, True, True]  # no token is "aa"
    assert AllowedTokens([7], len(tokenizer)).fits(5)
    with pytest.raises(UserError, match=r"none of infill_lengths \[1, 2\] can be filled as block_length and"):
        choose_lengths(random_model(tokenizer), torch.tensor([[5]]), torch.tensor([[6]]),
                       MDMGenerationConfig(infill_lengths=[1, 2], constraint=constraint))


def test_settings_and_lengths_that_cannot_match_are_refused(tokenizer):
    model, constraint = random_model(tokenizer), Regex("[0-9]{9}", tokenizer, len(tokenizer))
    with pytest.raises(UserError, match=r"no text of 2 tokens matches the constraint '\[0-9\]\{9\}', end-of-text"):
        denoise(model, masked(tokenizer, 1, 2), MDMGenerationConfig(constraint=constraint, alg="maskgit_plus"))
    with pytest.raises(UserError, match="goes with neither p2, remdm nor editing_threshold"):
        denoise(model, masked(tokenizer, 1, 9), MDMGenerationConfig(constraint=constraint, alg="p2"))
