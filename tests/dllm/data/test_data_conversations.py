"""Conversations: the model learns the assistant's answers and their ends, and nothing else."""

import json
from dataclasses import replace

import datasets
import pytest
import torch

from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.data import open_training_data, read_corpus
from dllm.data.conversations import encode_conversation, find_answer_ends, set_chat_template
from dllm.data.finding import find_shards
from dllm.data.sources import Reader
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.files import read_json
from dllm.generation.config import MDMGenerationConfig
from dllm.model.tokenizer import load_tokenizer
from dllm.training.batches import make_batches
from dllm.training.trainer import train

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# A template that ends answers with eos, adds no other special tokens, and trims:
INST = ("{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
        "{% else %}[INST] {{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}")
PLAIN = "{% for m in messages %}{{ m['role'] | title }}: {{ m['content'] }}\n{% endfor %}" \
        "{% if add_generation_prompt %}Assistant: {% endif %}"
MARKED = ("{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] }}{{ eos_token }}"
          "{% endgeneration %}{% else %}Q: {{ m['content'] }}\n{% endif %}{% endfor %}")
# A template like Qwen3's: only the last answer shows its thoughts, so that a conversation does not begin as its
# first messages do.
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
    (CHATML, ["It is 2.\n<|im_end|>", "Yes.<|im_end|>\n<|endoftext|>"]),
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


def test_of_a_conversation_that_begins_with_an_answer_the_opening_is_not_learnt(chat):
    greeting = [{"role": "assistant", "content": "Hello."}, *TALK[1:3]]
    system = CHATML.replace("{% for", "<|im_start|>system\nBe kind.<|im_end|>\n{% for", 1)
    for template, opening in ((system, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n"),
                              (CHATML, "<|im_start|>assistant\n"), (PLAIN, "Assistant: "), (INST, "")):
        chat.chat_template = template
        ids, marks = encode_conversation(chat, greeting)
        first = marks.index(True)
        assert chat.decode(ids[:first]) == opening and chat.decode(ids[first:]).lstrip().startswith("Hello.")


def test_an_answers_end_need_not_be_a_special_token(tokenizer):
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    ids, marks = encode_conversation(tokenizer, TALK)
    assert tokenizer.convert_ids_to_tokens(find_answer_ends(tokenizer)) == ["<|im_end|>", "<|endoftext|>"]
    start = marks.index(True)
    assert tokenizer.decode(ids[start:marks.index(False, start)]) == "It is 2.\n<|im_end|>" and all(marks[-3:])


def test_of_templates_by_name_that_for_tools_is_taken_where_there_are_tools(chat):
    chat.chat_template = {"default": CHATML, "tool_use": TOOLS}
    set_chat_template(chat, "default")
    for template, values in ((CHATML, {}), (TOOLS, {"tools": [TOOL]})):
        ids, marks = encode_conversation(chat, TALK, **values)
        whole = chat.apply_chat_template(TALK, chat_template=template, tokenize=False, **values)
        assert chat.decode(ids) == whole + chat.eos_token
        assert chat.decode([i for i, mark in zip(ids, marks, strict=True) if mark]).startswith("It is 2.")
    assert chat.convert_ids_to_tokens(find_answer_ends(chat)) == ["<|im_end|>", "<|endoftext|>"]


def test_a_template_that_changes_what_it_rendered_is_refused_with_the_way_out(chat):
    chat.chat_template = FORGETFUL
    with pytest.raises(UserError, match=r"up to message 3 of 5 differently once it goes on.*{% generation %}"):
        encode_conversation(chat, TALK)
    ids, marks = encode_conversation(chat, TALK[:3])  # only the last answer can be found
    assert chat.decode([i for i, mark in zip(ids, marks, strict=True) if mark]) \
        == "<think></think>It is 2.\n<|im_end|>\n<|endoftext|>"


def test_a_template_that_writes_the_mask_token_is_refused(chat):
    chat.chat_template, chat.mask_token = CHATML, "<|im_start|>"
    with pytest.raises(UserError, match=r"template writes the mask token <\|im_start\|>, .*; set model.mask_token to"):
        set_chat_template(chat, "default")


def test_a_template_that_refuses_is_one_line(chat):
    chat.chat_template = "{{ raise_exception('no system please') }}"
    with pytest.raises(UserError, match="refuses a conversation with the roles system, user.*no system please"):
        encode_conversation(chat, TALK)


SPOKEN = [{"role": "user", "content": "Write <|im_end|> or <|mask|>."},
          {"role": "assistant", "content": "<|im_end|> and <|endoftext|>!"}]


@pytest.mark.parametrize("template", [CHATML, INST, PLAIN, MARKED], ids=["chatml", "inst", "plain", "marked"])
def test_a_message_that_mentions_a_special_token_stays_text(template, chat):
    chat.chat_template = template
    ids, marks = encode_conversation(chat, SPOKEN)
    other, _ = encode_conversation(chat, [{**message, "content": "x"} for message in SPOKEN])
    special = {chat.mask_token_id, chat.eos_token_id, chat.convert_tokens_to_ids("<|im_end|>")}
    assert [token for token in ids if token in special] == [token for token in other if token in special]
    whole = chat.apply_chat_template(SPOKEN, tokenize=False)
    assert chat.decode(ids) == (whole if whole.endswith(chat.eos_token) else whole + chat.eos_token)
    assert chat.decode([i for i, mark in zip(ids, marks, strict=True) if mark]).lstrip().startswith(
        "<|im_end|> and <|endoftext|>!")


@pytest.mark.parametrize("template, ends", [
    (CHATML, ["<|im_end|>", "<|endoftext|>"]), (INST, ["<|endoftext|>"]), (PLAIN, ["<|endoftext|>"]),
    (MARKED, ["<|endoftext|>"]), (CHATML.replace("<|im_end|>", " <|im_end|>"), ["<|im_end|>", "<|endoftext|>"])])
def test_the_tokens_that_end_an_answer_are_those_of_the_template_and_end_of_text(template, ends, chat):
    chat.chat_template = template
    assert chat.convert_ids_to_tokens(find_answer_ends(chat)) == ends


# As Qwen2.5's: tools in the system's turn, calls in the assistant's, results as the user's.
TOOLS = ("{% if shout %}!{% endif %}{% if tools %}"
         "<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
         "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\\n' }}"
         "{% if m.content %}{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}<tool_call>"
         "{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALLED = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
          {"role": "tool", "name": "add", "content": "2"}, {"role": "assistant", "content": "2", "tool_calls": None}]


def test_tools_calls_null_contents_and_other_fields_are_rendered_as_transformers_renders_them(chat, tmp_path, capsys):
    chat.chat_template = TOOLS
    records = [{"messages": CALLED, "tools": [TOOL]}, {"messages": CALLED, "tools": json.dumps([TOOL])},
               {"messages": CALLED}, {"messages": CALLED, "chat_template_kwargs": {"shout": True}},
               {"messages": CALLED[:1], "completion": CALLED[1:], "tools": [TOOL]},
               {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    reader = Reader(["messages"], "conversation")
    documents = [document for shard in find_shards([tmp_path]) for _, document in reader.read(shard)]
    rendered = [chat.decode(encode_conversation(chat, **json.loads(document.messages))[0]) for document in documents]
    expected = [chat.apply_chat_template(CALLED, **values, tokenize=False) + chat.eos_token for values in (
        {"tools": [TOOL]}, {"tools": [TOOL]}, {}, {"shout": True})]
    assert rendered[:4] == expected and len(rendered) == 5
    assert "<tool_call>" in rendered[2] and "assistant add" not in rendered[2] and "tool add" in rendered[2]
    reader.skipped.tell()
    assert "skipped 1 that could not be read as text: a.jsonl line 6 (not a list of messages with role and" \
        in capsys.readouterr().err


def test_tool_calls_are_learnt_and_counted_and_survive_a_table(chat, tmp_path):
    chat.chat_template = TOOLS
    datasets.Dataset.from_list([{"messages": CALLED}] * 2).to_parquet(tmp_path / "a.parquet")
    reader = Reader(["messages"], "conversation")
    (_, document), _ = reader.read(find_shards([tmp_path])[0])
    ids, marks = encode_conversation(chat, **json.loads(document.messages))
    learnt = chat.decode([i for i, mark in zip(ids, marks, strict=True) if mark])
    assert learnt.startswith('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>')
    assert "add" in document.text  # as bytes of what there is to learn


def test_a_template_that_fails_on_a_content_is_one_line(chat):
    chat.chat_template = "{% for m in messages %}{{ m['content'] + 'x' }}{% endfor %}"
    with pytest.raises(UserError, match="refuses a conversation with the roles user, assistant: can only concatenate"):
        encode_conversation(chat, [{"role": "user", "content": [{"type": "text", "text": "x"}]},
                                   {"role": "assistant", "content": "y"}])


def test_ends_of_text_follow_an_answer_in_a_number_that_changes_and_keeps_to_the_row(tmp_path, chat):
    talks = [TALK[1:3], TALK, TALK[:2] + TALK[2:4]]
    group = replace(write(tmp_path, [{"messages": talk} for talk in talks]), max_seq_len=160)
    data = open_training_data(read_corpus(group), chat, 0)
    tails = {}
    for place in range(200):
        packed = data.rows.read(range(place, place + 1))
        assert len(packed.tokens) <= 160 and torch.equal(packed.tokens, data.rows.read(range(place, place + 1)).tokens)
        for start, end in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
            tokens, learnt = packed.tokens[start:end], packed.trainable[start:end]
            own = int((tokens != chat.eos_token_id).nonzero()[-1]) + 2
            assert (learnt[own:] == learnt[own - 1]).all()  # the tail is learnt as the end that it repeats
            tails.setdefault(tuple(tokens[:own].tolist()), []).append(end - start - own)
    lengths = sorted(tails.items())
    assert len(lengths) == 3
    for tokens, found in lengths:
        ends_with_an_answer = chat.decode(list(tokens)).endswith(("Yes.<|im_end|>\n<|endoftext|>",
                                                                  "It is 2.\n<|im_end|>\n<|endoftext|>"))
        assert (len(set(found)) > 10 and 0 in found and max(found) > 30) if ends_with_an_answer else set(found) == {0}


@pytest.mark.slow
def test_conversations_learnt_by_heart_are_answered_on_canvases_of_any_length(tmp_path, chat):
    pairs = [("What is one and one?", "two"), ("Who wrote Faust?", "Goethe"), ("Capital of France?", "Paris"),
             ("Color of the sky?", "blue"), ("Best bird?", "the owl")]
    group = write(tmp_path, [{"prompt": question, "completion": answer} for question, answer in pairs])
    chat.save_pretrained(tmp_path / "tokenizer")
    shape = ModelGroup(tokenizer_path=str(tmp_path / "tokenizer"), hidden_size=64, intermediate_size=128,
                       num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    result = train(Config(model=shape, data=replace(group, max_seq_len=128), train=TrainGroup(
        output_dir=str(tmp_path / "run"), lr=3e-3, lr_decay_style="cosine", micro_batch_size=4, max_steps=600,
        num_train_epochs=10_000, use_tensorboard=False, log_steps=100)))
    model, tokenizer = DiffusionLM.from_pretrained(result.checkpoint), load_tokenizer(result.checkpoint)
    ends = read_json(result.checkpoint / "generation_config.json")["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    for length in (8, 32, 64):
        settings = MDMGenerationConfig(max_new_tokens=length, steps=length, temperature=0.0, seed=0)
        for question, answer in pairs:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                                   return_tensors="pt", return_dict=False)
            new = model.diffusion_generate(prompt, generation_config=settings).sequences[0, prompt.shape[1]:]
            assert tokenizer.decode(new[:int(torch.isin(new, torch.tensor(ends)).nonzero()[0])]) == answer, length


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
    group = replace(write(tmp_path, records), datasets_type=datasets_type, max_seq_len=128)  # TALK fits, not the last
    data = open_training_data(read_corpus(group), chat, 0)
    packed = data.rows.read(range(data.rows_per_epoch or 40))
    pieces = torch.tensor_split(packed.tokens, packed.cu_seqlens[1:-1].long())
    marks = torch.tensor_split(packed.trainable, packed.cu_seqlens[1:-1].long())
    assert packed.trainable.shape == packed.tokens.shape and packed.trainable.dtype == torch.bool
    assert all(mark.any() for mark in marks) and max(map(len, pieces)) <= 128
    learnt = "".join(sorted({chat.decode(piece[mark]) for piece, mark in zip(pieces, marks, strict=True)}))
    for answer in ("It is 2.", "Yes.<|im_end|>", "No", "end<|im_end|>"):
        assert answer in learnt
    assert "word" not in learnt and "What" not in learnt
    if datasets_type == "mapping":
        ends = [len(piece) - int((piece != chat.eos_token_id).nonzero()[-1]) - 2 for piece in pieces]
        assert data.documents == 4 and data.tokens == len(packed.tokens) - sum(ends) and sum(ends) > 0
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
    with pytest.raises(UserError, match="has no column 'messages' or 'conversations'; it has text"):
        read_corpus(group)
    corpus = read_corpus(write(tmp_path, [{"messages": TALK[:2]}]))
    with pytest.raises(UserError, match="no answers of an assistant to learn"):
        open_training_data(corpus, tokenizer, 0)
    tokenizer.chat_template = None
    for template, message in (("default", "has no chat template"), ("nowhere.jinja", "cannot read the chat template")):
        corpus.group = DataGroup(data_type="conversation", chat_template=template)
        with pytest.raises(UserError, match=message):
            open_training_data(corpus, tokenizer, 0)


def conversations(path):
    reader = Reader(DataGroup(data_type="conversation").key_list, "conversation")
    found = [json.loads(document.messages)["messages"] for shard in find_shards([path], skipped=reader.skipped)
             for _, document in reader.read(shard)]
    return found, reader.skipped


ASKED = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize("record, expected", [
    ({"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}, ASKED),
    ({"conversations": ASKED}, ASKED), ({"messages": None, "conversations": ASKED}, ASKED),
    ({"messages": json.dumps(ASKED)}, ASKED),
    ({"instruction": "1 + 1?", "input": "", "output": "2"}, ASKED),
    *(({"instruction": "Add.", about: "1, 1", answer: "2"}, [{"role": "user", "content": "Add.\n1, 1"}, ASKED[1]])
      for about, answer in (("input", "output"), ("context", "response"))),
    ({"system_prompt": "Be brief.", "question": "1 + 1?", "response": "2"}, [TALK[0], *ASKED]),
    ({"system": "Be brief.", "messages": ASKED}, [TALK[0], *ASKED]),
    ({"system": "Other.", "messages": [TALK[0], *ASKED]}, [TALK[0], *ASKED]),
    ({"system": "", "prompt": "1 + 1?", "completion": "2"}, ASKED)])
def test_conversations_are_read_in_every_usual_form(record, expected, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    datasets.Dataset.from_list([record]).to_parquet(tmp_path / "b.parquet")
    found, skipped = conversations(tmp_path)
    assert found == [expected, expected] and not skipped


def test_records_without_messages_or_with_others_roles_are_skipped_and_named(tmp_path):
    records = [{"messages": []}, {"messages": "no JSON"}, {"messages": "5"}, {"messages": ASKED},
               {"conversations": [{"from": "martian", "value": "x"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found, skipped = conversations(tmp_path)
    wanted = "not a list of messages with role and content"
    assert found == [ASKED] and [*skipped.names] == [
        "a.jsonl line 1 (no messages)", f"a.jsonl line 2 ({wanted})", f"a.jsonl line 3 ({wanted})",
        "a.jsonl line 5 (a message from 'martian', none of human, user, gpt, chatgpt, assistant, system, tool, "
        "observation)"]


def test_a_conversation_that_the_template_refuses_is_named(tmp_path, chat):
    group = write(tmp_path, [{"messages": ASKED}, {"messages": ASKED}, {"messages": [*ASKED, *ASKED]}])
    template = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}" + CHATML
    (tmp_path / "other.jinja").write_text(template)
    corpus = read_corpus(replace(group, chat_template=str(tmp_path / "other.jinja")))
    with pytest.raises(UserError, match=r"jsonl:3: the chat template refuses .*: too many; set another"):
        open_training_data(corpus, chat, 0)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_read_as_documents_are_told_their_type(column, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({column: ASKED}) + "\n")
    with pytest.raises(UserError, match=f"has no column 'text'; it has {column}; set data.data_type=conversation"):
        read_corpus(DataGroup(train_path=str(tmp_path)))
