"""Tokenizers: byte-level BPE, mask tokens, vocabularies that do not fit."""

import pytest

from dllm.errors import UserError
from dllm.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n\n" * 20, "for i in range(10):\n\tprint(i)  # naïve café ☃\n" * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize("text", ["", "  \n\t\r\n x  ", "naïve ☃ 𝔘", "\x00\x7f", TEXTS[0]])
def test_any_text_survives_the_trained_tokenizer_unchanged(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_saved_tokenizer_loads_the_same_with_its_special_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab() and len(loaded) == 300
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.mask_token_id) == (0, 1, 2)


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    assert train_tokenizer(TEXTS, 300).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_special_tokens_never_come_from_ordinary_text_of_other_spelling(tokenizer):
    ids = tokenizer("<mask> <|mask |>", add_special_tokens=False)["input_ids"]
    assert not {0, 1, 2} & set(ids)


@pytest.fixture
def maskless(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    plain.save_pretrained(tmp_path)
    return tmp_path


def test_a_tokenizer_without_mask_token_gets_one(tokenizer, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<e>").save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.mask_token, loaded.mask_token_id, len(loaded)) == ("<|mask|>", 3, 4)


def test_the_models_mask_token_is_taken_where_the_tokenizer_names_none(maskless):
    assert load_tokenizer(maskless, mask_token_id=5).mask_token_id == 5


def test_another_mask_token_than_the_models_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"mask token is 7, that of the tokenizer .* is 2"):
        load_tokenizer(tmp_path, mask_token_id=7)


def test_a_folder_without_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot load a tokenizer from") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and "tokenizer.json" in str(error.value)


def test_a_vocabulary_that_does_not_fit_is_refused_naming_both_sizes(tokenizer):
    check_vocabulary(tokenizer, 300)
    with pytest.raises(UserError, match=r"has 300 tokens, the model's vocabulary is 299.*at least 300"):
        check_vocabulary(tokenizer, 299)
    with pytest.raises(UserError, match=r"mask token <\|mask\|> has id 2, outside .* vocabulary of 2.*at least 3"):
        check_vocabulary(tokenizer, 2)


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match="at least 259.*not 258"):
        train_tokenizer(TEXTS, 258)
    assert len(train_tokenizer(TEXTS, 259)) == 259
