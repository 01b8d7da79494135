"""Tokenizers: byte-level BPE, mask tokens, vocabularies that do not fit."""

import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm.data.conversations import encode_conversation
from dllm.errors import UserError
from dllm.model.tokenizer import (
    check_vocabulary,
    encode,
    encode_rendered,
    encode_with_masks,
    fill_masks,
    load_tokenizer,
    protect,
    train_tokenizer,
)

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


def test_a_mask_token_that_is_asked_for_goes_before_the_folders(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, mask_token_id=7).mask_token_id == 7
    assert load_tokenizer(tmp_path, mask_token=tokenizer.convert_ids_to_tokens(250)).mask_token_id == 250
    assert load_tokenizer(tmp_path, 2, mask_token="<|mask|>").mask_token_id == 2
    for asked, message in (({"mask_token_id": 300}, "mask token is 300, the tokenizer has 300 tokens; give"),
                           ({"mask_token": "<gap>"}, "mask_token '<gap>' is none of the tokenizer's"),
                           ({"mask_token": "<|pad|>"}, "'<|pad|>' is the tokenizer's pad_token already; choose"),
                           ({"mask_token_id": 0}, "'<|endoftext|>' is the tokenizer's eos_token already; choose"),
                           ({"mask_token_id": -1}, "mask token is -1, the tokenizer has 300 tokens; give"),
                           ({"mask_token": "<|mask|>", "mask_token_id": 1}, "has the id 2, not 1; give one")):
        with pytest.raises(UserError, match=re.escape(message)):
            load_tokenizer(tmp_path, **asked)


def test_of_many_tokens_that_could_mask_five_are_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    more = load_tokenizer(tmp_path)
    more.add_special_tokens({"additional_special_tokens": [f"<|reserved_{i}|>" for i in range(256)]})
    more.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"added tokens (<\|\w+\|>, ){4}<\|\w+\|> and 252 more can be chosen$"):
        load_tokenizer(tmp_path, mask_token="<gap>")


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


def test_special_tokens_that_a_text_spells_stay_text(tokenizer):
    for text in ("a<|mask|>b", "<|endoftext|>", "<|pad|><|mask|>"):
        ids = encode(tokenizer, text)
        assert not {0, 1, 2} & set(ids.tolist()) and tokenizer.decode(ids) == text
    with pytest.raises(UserError, match="half of a surrogate pair at character 1"):
        encode(tokenizer, "x\ud800")


def test_masks_that_a_text_spells_are_filled_in_it(tokenizer):
    text = "a<|mask|><|mask|> b <|mask|><|pad|>"
    ids = encode_with_masks(tokenizer, text)
    assert (ids == 2).sum() == 3 and not (ids == 1).any()
    ids[ids == 2] = encode(tokenizer, "xyz")
    assert fill_masks(tokenizer, text, ids) == "axy b z<|pad|>"
    assert encode_with_masks(tokenizer, "plain").equal(encode(tokenizer, "plain"))


@pytest.mark.parametrize("text", ["plain", "<|mask|>", "\ufdd0", "a\ufdd0<|mask|>\ufdd0\ufdd0b", "<|ma<|mask|>sk|>"])
def test_a_chat_template_writes_special_tokens_and_its_messages_do_not(tokenizer, text):
    message, = protect(tokenizer, [{"role": "user", "content": [{"text": text}], "number": 3}])
    assert message["number"] == 3
    ids = encode_rendered(tokenizer, f"<|pad|>{message['content'][0]['text']}<|endoftext|>")
    assert ids[0] == 1 and ids[-1] == 0 and ids[1:-1].equal(encode(tokenizer, text))


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_text_after_another_gets_no_blank_of_its_own(scheme):
    """SentencePiece tokenizers put a blank before every text that they encode."""
    words = ["<|mask|>", "<unk>", "\u2581", "\u2581d", *"abcdef():\n"]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [("\u2581", "d")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", mask_token="<|mask|>")
    for before, text in (("def a(", "d): b"), ("a", "\nb"), ("a", " b"), ("", "d"), ("a", "")):
        ids = [*encode(tokenizer, before).tolist(), *encode(tokenizer, text, after=True).tolist()]
        assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "\u2581" * bool(before) + (before + text).replace(
            " ", "\u2581")
    text = "<|mask|>d a<|mask|><|mask|>d"
    ids = encode_with_masks(tokenizer, text)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == text.replace(" ", "\u2581")
    assert fill_masks(tokenizer, text, ids.masked_fill(ids == 0, words.index("c"))) == "cd accd"


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_special_tokens_take_their_blanks_whatever_a_message_mentions(side):
    tokenizer = train_tokenizer(["user assistant hello"] * 9, 290)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False, **{side: True})
                          for text in ("<|user|>", "<|assistant|>", "<|end|>")], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }} <|end|>\n{% endfor %}" \
                              "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"

    def render(content):
        messages = [{"role": "user", "content": content}]
        return encode_rendered(tokenizer, tokenizer.apply_chat_template(protect(tokenizer, messages), tokenize=False))

    def train(content):
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": content}]
        return encode_conversation(tokenizer, messages)[0]

    for encoded in (render, train):
        plain, mentioned = (tokenizer.convert_ids_to_tokens(encoded(text)) for text in ("QQ", "Q<|end|>Q"))
        before, after = plain.index("Q"), plain[::-1].index("Q")
        assert mentioned[:before + 1] == plain[:before + 1] and mentioned[-after - 1:] == plain[-after - 1:]
