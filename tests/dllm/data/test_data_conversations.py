"""Conversations: the model is to learn the assistant's answers and what ends them, and nothing else."""

import json
from dataclasses import replace

import pytest
import torch

from dllm.batches import make_batches
from dllm.config import DataGroup, TrainGroup
from dllm.data import open_training_data, read_corpus
from dllm.data.conversations import encode_conversation
from dllm.errors import UserError

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Ends answers with eos, turns nothing into special tokens else, and trims:
INST = ("{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
        "{% else %}[INST] {{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}")
PLAIN = "{% for m in messages %}{{ m['role'] | title }}: {{ m['content'] }}\n{% endfor %}" \
        "{% if add_generation_prompt %}Assistant: {% endif %}"
MARKED = ("{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] }}{{ eos_token }}"
          "{% endgeneration %}{% else %}Q: {{ m['content'] }}\n{% endif %}{% endfor %}")
# As Qwen3's: only the last answer shows its thoughts, so a prefix is no prefix.
FORGETFUL = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
             "<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "It is 2.\n"}, {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def chat(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.mark.parametrize("template, learnt", [
    (CHATML, ["It is 2.\n<|im_end|>", "Yes.<|im_end|>", "<|endoftext|>"]),
    (INST, [" It is 2.<|endoftext|>", " Yes.<|endoftext|>"]),
    (PLAIN, ["It is 2.\n\n", "Yes.\n<|endoftext|>"]),
    (MARKED, ["It is 2.\n<|endoftext|>", "Yes.<|endoftext|>"])], ids=["chatml", "inst", "plain", "marked"])
def test_the_answers_and_their_ends_are_learnt(template, learnt, chat):
    chat.chat_template = template
    ids, marks = encode_conversation(chat, TALK)
    runs, previous = [], False
    for token, mark in zip(ids, marks, strict=True):
        if mark:
            runs = [*runs, []] if not previous else runs
            runs[-1].append(token)
        previous = mark
    assert [chat.decode(run) for run in runs] == learnt
    whole = chat.apply_chat_template(TALK, tokenize=False)
    assert chat.decode(ids) == (whole if whole.endswith(chat.eos_token) else whole + chat.eos_token)


def test_a_prompt_is_what_the_model_will_meet_when_it_generates(chat):
    chat.chat_template = CHATML
    ids, marks = encode_conversation(chat, TALK[:3])
    prompt = chat.apply_chat_template(TALK[:2], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids[:marks.index(True)] == prompt


def test_a_conversation_without_an_answer_teaches_nothing_and_one_that_ends_with_a_question_not_its_end(chat):
    chat.chat_template = CHATML
    assert not any(encode_conversation(chat, TALK[:2])[1])
    ids, marks = encode_conversation(chat, TALK[:4])
    assert ids[-1] == chat.eos_token_id and not marks[-1] and any(marks)


def test_a_template_that_changes_what_it_rendered_is_refused_with_the_way_out(chat):
    chat.chat_template = FORGETFUL
    with pytest.raises(UserError, match=r"up to message 3 of 5 differently once it goes on.*{% generation %}"):
        encode_conversation(chat, TALK)
    ids, marks = encode_conversation(chat, TALK[:3])  # one answer, the last, can be told
    assert chat.decode([i for i, mark in zip(ids, marks, strict=True) if mark][:-1]) \
        == "<think></think>It is 2.\n<|im_end|>"


def test_a_template_that_refuses_is_one_line(chat):
    chat.chat_template = "{{ raise_exception('no system please') }}"
    with pytest.raises(UserError, match="refuses a conversation with the roles system, user.*no system please"):
        encode_conversation(chat, TALK)


def write(folder, records):
    (folder / "talk.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "chat.jinja").write_text(CHATML)
    return DataGroup(train_path=str(folder / "talk.jsonl"), data_type="conversation", max_seq_len=24,
                     chat_template=str(folder / "chat.jinja"), validation_share=0.0)


@pytest.mark.parametrize("datasets_type", ["mapping", "iterable"])
def test_long_conversations_are_cut_and_keep_what_is_learnt_and_those_with_nothing_are_dropped(
        datasets_type, tmp_path, chat, capsys):
    records = [{"messages": TALK}, {"messages": TALK[:2]}, {"messages": "no list"}, {"messages": 5}, {"messages": None},
               {"prompt": "Go on?", "response": "No."},
               {"prompt": TALK[:2], "completion": TALK[2:3]},
               {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "end"}]}]
    group = replace(write(tmp_path, records), datasets_type=datasets_type)
    data = open_training_data(read_corpus(group), chat, 0)
    packed = data.rows.read(range(data.rows_per_epoch or 40))
    pieces = torch.tensor_split(packed.tokens, packed.cu_seqlens[1:-1].long())
    marks = torch.tensor_split(packed.trainable, packed.cu_seqlens[1:-1].long())
    assert packed.trainable.shape == packed.tokens.shape and packed.trainable.dtype == torch.bool
    assert all(mark.any() for mark in marks) and max(map(len, pieces)) <= 24
    learnt = "".join(sorted({chat.decode(piece[mark]) for piece, mark in zip(pieces, marks, strict=True)}))
    for answer in ("It is 2.", "Yes.<|im_end|>", "No", "end<|im_end|>"):
        assert answer in learnt
    assert "word" not in learnt and "What" not in learnt
    if datasets_type == "mapping":
        assert data.documents == 4 and data.tokens == len(packed.tokens)
        error = capsys.readouterr().err
        assert "skipped 2 " in error
        assert "line 3 (not a list of messages with role and content)" in error and "line 4 (" in error
        assert "dropped 1 conversations that have no answer to learn" in error
        again = open_training_data(read_corpus(group), chat, 0).rows.read(range(data.rows_per_epoch))
        assert torch.equal(again.trainable, packed.trainable)  # from the cache


def test_only_answers_are_masked_and_scored(tmp_path, chat, model):
    data = open_training_data(read_corpus(write(tmp_path, [{"messages": TALK}] * 10)), chat, 0)
    rows = data.rows_per_epoch
    for objective in ("mdm", "elbo", "ar"):
        settings = TrainGroup(output_dir="out", objective=objective, micro_batch_size=rows)
        packed = data.rows.read(range(rows))
        batch = make_batches(data.rows, 0, range(rows), rows, settings, 0, model)[0]
        changed = batch.input_ids.flatten() != packed.tokens
        assert not (changed & ~packed.trainable).any() and changed.any() == (objective != "ar")
        learnt = packed.tokens[packed.trainable].unique()
        assert torch.isin(batch.targets.tokens[batch.targets.scored], learnt).all() and batch.scored > 0
        assert batch.scored <= packed.trainable.sum()


def test_what_cannot_be_a_conversation_is_refused(tmp_path, tokenizer):
    group = write(tmp_path, [{"text": "hello"}])
    with pytest.raises(UserError, match="has no column 'messages'; it has text"):
        read_corpus(group)
    corpus = read_corpus(write(tmp_path, [{"messages": TALK[:2]}]))
    with pytest.raises(UserError, match="no answers of an assistant to learn"):
        open_training_data(corpus, tokenizer, 0)
    tokenizer.chat_template = None
    for template, message in (("default", "has no chat template"), ("nowhere.jinja", "cannot read the chat template")):
        corpus.group = DataGroup(data_type="conversation", chat_template=template)
        with pytest.raises(UserError, match=message):
            open_training_data(corpus, tokenizer, 0)
