"""What a request may hold: damaged text, numbers of any size, null, special tokens, lengths, blocks, other origins."""

import copy
import json
import re

import pytest
import torch

pytest.importorskip("fastapi"), pytest.importorskip("greenlet"), pytest.importorskip("httpx")
from fastapi.testclient import TestClient  # noqa: E402

from dllm.diffusion_lm import DiffusionLM  # noqa: E402
from dllm.errors import UserError  # noqa: E402
from dllm.generation.config import MDMGenerationConfig  # noqa: E402
from dllm.model.tokenizer import encode, load_tokenizer, train_tokenizer  # noqa: E402
from dllm.server.app import make_app  # noqa: E402
from dllm.server.guard import RequestError  # noqa: E402
from dllm.server.limits import ServerLimits  # noqa: E402
from dllm.server.requests import ChatRequest, read_chat  # noqa: E402
from dllm.server.scheduler import Progress  # noqa: E402
from dllm.server.texts import Answer, Texts  # noqa: E402
from tests.dllm.tiny_models import tiny_of  # noqa: E402

CHAT = {"messages": [{"role": "user", "content": "x"}]}
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["def add(x, y): return x + y"] * 9, 290)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_of("llada", head_dim=6, vocab_size=len(tokenizer), mask_token_id=2, eos_token_id=0,
                    max_position_embeddings=256)
    with torch.no_grad():
        model.head_weight[[0, 2]] = 0  # texts neither end nor stay masked
    return model


def client(model, tokenizer, limits=None, **defaults):
    defaults = MDMGenerationConfig(**{"max_new_tokens": 8, **defaults})
    return TestClient(make_app(model, tokenizer, "tiny", defaults, limits), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def http(model, tokenizer):
    with client(model, tokenizer, ServerLimits(cors="https://a.site, https://b.site", api_key="k")) as http:
        http.headers["Authorization"] = "Bearer k"
        yield http


def ask(http, body, path="completions"):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    return answer.status_code, answer.json()


@pytest.mark.parametrize("body, message", [
    (rb'{"prompt": "x\ud800"}', "surrogate"), (rb'{"prompt": "x", "\udfff": 1}', "surrogate"),
    (rb'{"prompt": "x", "model": "\ud800"}', "surrogate"), (rb'{"prompt": "x", "stop": ["\ud800"]}', "surrogate"),
    (rb'{"prompt": "x", "diffusion": {"\ud800": 1}}', "surrogate"), (b'{"prompt": "\xed\xa0\x80"}', "surrogate"),
    (rb'{"prompt": "x", "response_format": {"type": "regex", "regex": "\ud800"}}', "surrogate"),
    (b'{"prompt": "\xff"}', "UTF-8"), (b"{prompt: 1}", "not JSON in UTF-8: Expecting property name"),
    (b"[" * 100_000, "cannot be read"), (b"null", "body"), (b"1e999", "body"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "4300 digits"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 4000 + b"}", "max_tokens is 999"),
    ({"prompt": "x", "seed": 2**64}, "seed: Input should be less than"),
    ({"prompt": "x", "diffusion": {"seed": 2**64}}, "diffusion.seed must be a whole number of 64 bits"),
    ({"prompt": "x", "diffusion": {"steps": 10**400}}, "steps must be a whole number, not one beyond 64 bits"),
    ({"prompt": "x", "diffusion": {"steps": 10**9}}, "diffusion.steps must be at most 1000000"),
    ({"prompt": "x", "diffusion": {"alg_temp": 10**400}}, "alg_temp must be a number, not one beyond 64 bits"),
    (b'{"prompt": "x", "diffusion": {"threshold": NaN}}', "threshold must be finite, not nan"),
    (b'{"prompt": "x", "diffusion": {"threshold": Infinity}}', "threshold must be finite"),
    (b'{"prompt": "x", "temperature": NaN}', "temperature: "),
    ({"prompt": [2, 5]}, "the prompt contains the mask token"),
])
def test_what_cannot_be_read_or_answered_is_refused_with_400(http, body, message):
    status, answer = ask(http, body)
    assert status == 400 and message in answer["error"]["message"]


@pytest.mark.parametrize("content", ["a\ud800", [{"type": "text", "text": "\udfff"}]])
def test_a_chat_of_damaged_text_is_refused_with_400(http, content):
    status, answer = ask(http, {"messages": [{"role": "user", "content": content}]}, "chat/completions")
    assert status == 400 and "surrogate" in answer["error"]["message"]
    whole = {"messages": [{"role": "user", "content": "\U0001f600"}]}  # sent as two halves
    assert ask(http, whole, "chat/completions")[0] == 200


@pytest.mark.parametrize("field, value, message", [
    *((name, 1, f"{name} is not supported; leave it out") for name in (
        "functions", "top_logprobs", "min_p", "min_tokens", "ignore_eos", "stop_token_ids", "audio", "chat_template",
        "continue_final_message", "include_stop_str_in_output", "truncate_prompt_tokens")),
    *((name, value, f"{name} is not supported; leave it out") for name, value in (
        ("add_generation_prompt", False), ("skip_special_tokens", False), ("repetition_penalty", 1.1))),
    ("frequency_penalty", -1, "frequency_penalty is not supported"),
    ("top_k", 5, "top_k is not read here; say it by diffusion.top_k"),
    *((name, "a+", "say it by response_format")
      for name in ("guided_regex", "structured_outputs", "regex", "grammar"))])
def test_a_field_that_asks_for_what_there_is_not_is_named(http, field, value, message):
    """vLLM's and others' fields, dropped in silence, would give a text that is not what was asked for."""
    for path, prompt in (("completions", {"prompt": "x"}), ("chat/completions", CHAT)):
        status, answer = ask(http, {**prompt, field: value}, path)
        assert status == 400 and message in answer["error"]["message"] and answer["error"]["param"] == field


@pytest.mark.parametrize("path, body, message", [
    ("completions", CHAT, "messages is not read here; say it by prompt, or ask /v1/chat/completions"),
    ("chat/completions", {**CHAT, "prompt": "x"}, "prompt is not read here; say it by messages"),
    ("completions", {"prompt": "x", "response_format": {"regex": "a"}}, "response_format.type is text, json_object"),
    ("completions", {"prompt": "x", "response_format": {}}, "response_format.type is text, json_object"),
    ("completions", {"prompt": "x", "response_format": {"type": "json_object", "schema": {"type": "object"}}},
     "json_object takes no schema")])
def test_what_is_said_in_the_wrong_place_is_told_the_right_one(http, path, body, message):
    status, answer = ask(http, body, path)
    assert status == 400 and message in answer["error"]["message"]


def test_both_names_of_the_tokens_at_most_hold_everywhere(http):
    edit = {"messages": [{"role": "user", "content": "<|code_to_edit|>abcdefgh<|/code_to_edit|>"}]}
    for path, body in (("completions", {"prompt": "x"}), ("fim/completions", {"prompt": "x", "suffix": "y"}),
                       ("chat/completions", CHAT), ("edit/completions", edit)):
        for more in ({"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_completion_tokens": 2, "max_tokens": 4}):
            status, answer = ask(http, {**body, **more}, path)
            assert status == 200 and answer["usage"]["completion_tokens"] <= 2


def test_fields_that_ask_for_nothing_are_ignored(http):
    nothing = {"user": "u", "store": True, "metadata": {"a": "b"}, "tool_choice": "none", "top_k": -1, "min_p": 0,
               "guided_json": None, "ignore_eos": False, "parallel_tool_calls": True, "add_generation_prompt": True,
               "skip_special_tokens": True, "repetition_penalty": 1.0}
    expected = ask(http, {**CHAT, "seed": 1}, "chat/completions")[1]["choices"]
    assert ask(http, {**CHAT, **nothing, "seed": 1}, "chat/completions")[1]["choices"] == expected


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/tiny"])
def test_head_is_answered_as_get_is(http, path):
    assert http.head(path).status_code == http.get(path).status_code == 200
    assert http.head("/v1/completions").status_code == 405


def test_a_model_without_a_mask_token_is_not_served(tokenizer):
    model = tiny_of("llada", head_dim=6, vocab_size=len(tokenizer), mask_token_id=None)
    with pytest.raises(UserError, match="nothing names the model's mask token: .* An autoregressive model has none"):
        make_app(model, tokenizer, "tiny")


def test_a_path_that_is_not_there_is_told_those_that_are(http):
    for path in ("/chat/completions", "/v1/responses", "/v1/completion"):
        answer = http.post(path, json=CHAT)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"].startswith(f"there is no {path} here, but /, /health, ")
    for method, path, allowed in (("GET", "/v1/chat/completions", "POST"), ("POST", "/health", "GET")):
        answer = http.request(method, path, json={})
        assert answer.status_code == 405 and answer.headers["Allow"] == allowed
        assert answer.json()["error"]["message"] == f"{path} takes {allowed}, not {method}"
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()


def test_best_of_as_many_as_are_wanted_asks_for_nothing(http):
    for best_of, status in ((1, 200), (2, 200), (3, 400)):
        assert ask(http, {"prompt": "x", "n": 2, "best_of": best_of, "max_tokens": 1})[0] == status


def test_variables_and_documents_come_to_the_template(model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE + "{{ enable_thinking }}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    texts = Texts(model, tokenizer, MDMGenerationConfig())

    def render(**more):
        return tokenizer.decode(read_chat(ChatRequest(**CHAT, **more), texts).prefixes[0])

    plain = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert render() == plain
    assert render(chat_template_kwargs={"enable_thinking": False}) == plain + "False"
    prompt = read_chat(ChatRequest(**CHAT, documents=[{"text": "<|mask|>"}]), texts).prefixes[0]
    assert tokenizer.decode(prompt) == plain + "<|mask|>" and 2 not in prompt
    for name, value in (("chat_template", "x"), ("tokenize", True), ("tools", []), ("add_generation_prompt", False)):
        with pytest.raises(UserError, match=f"sets variables of the template, and {name} is none"):
            render(chat_template_kwargs={name: value})


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_told_the_type(http, kind):
    answer = http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
    assert answer.status_code == 400 and "Content-Type: application/json, not" in answer.json()["error"]["message"]
    assert http.post("/v1/completions", content=b'{"prompt": "x"}',
                     headers={"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_messages_come_to_the_template_with_all_their_fields(model, tokenizer):
    """As training renders them; of a call, OpenAI writes the arguments as text, and templates read an object."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.name }} {{ m.content }}{% for call in m.tool_calls %}"
        "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}\n{% endfor %}")
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": "<|mask|>"}'}}
    messages = [{"role": "user", "name": "Bo", "content": "hi"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "3"}]}]
    prompt = read_chat(ChatRequest(messages=messages), Texts(model, tokenizer, MDMGenerationConfig()))
    assert tokenizer.decode(prompt.prefixes[0]) == (
        'user Bo hi\nassistant  add {"x": "<|mask|>"}\ntool  3c1\n') and 2 not in prompt.prefixes[0]
    call["function"]["arguments"] = "{"
    with pytest.raises(RequestError, match="the arguments of a tool call are no JSON"):
        read_chat(ChatRequest(messages=messages), Texts(model, tokenizer, MDMGenerationConfig()))


@pytest.mark.parametrize("settings", [{}, {"block_length": 4}, {"block_length": 4, "block_causal": True}])
def test_a_constrained_text_is_whole_whatever_its_length(model, tokenizer, settings):
    """Clients take 'length' for a text that was cut; blocks that are cut to max_tokens would leave one that is."""
    with client(model, tokenizer, **settings) as http:
        for most in (5, 6, 8):
            pattern = {"type": "regex", "regex": f"[0-9]{{{most}}}"}  # one token a digit
            status, answer = ask(http, {"prompt": "x", "max_tokens": most, "response_format": pattern})
            assert status == 200 and re.fullmatch(pattern["regex"], answer["choices"][0]["text"]), answer
            assert answer["choices"][0]["finish_reason"] == "stop"
        pattern = {"type": "regex", "regex": "[0-9]{8}"}
        status, answer = ask(http, {"prompt": "x", "max_tokens": 6, "response_format": pattern})
        assert status == 400 and "at least 8 tokens are needed" in answer["error"]["message"]


NULLS = ["model", "max_tokens", "temperature", "top_p", "n", "stream", "stop", "seed", "logit_bias", "user",
         "presence_penalty", "frequency_penalty", "stream_options", "response_format", "diffusion", "diffusing"]


def test_null_is_as_good_as_left_out(http):
    seed = {"prompt": "x", "seed": 1}
    expected = ask(http, seed)[1]["choices"]
    nulls = dict.fromkeys([*NULLS, "suffix", "echo", "logprobs", "best_of"])
    assert ask(http, {**nulls, **seed})[1]["choices"] == expected
    assert ask(http, {**seed, "diffusion": {"seed": None, "length": None, "alg": None, "steps": None}})[1]["choices"] \
        == expected
    assert ask(http, {"prompt": None})[0] == 200
    chat = {**dict.fromkeys([*NULLS, "tools", "tool_choice", "logprobs", "max_completion_tokens"]),
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}
    assert ask(http, chat, "chat/completions")[0] == 200
    assert ask(http, {"messages": None}, "chat/completions")[0] == 400


CALLS = TEMPLATE.replace("{{ m.content }}", "{% if m.content is not none %}{{ m.content }}{% endif %}"
                         "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ m.name }}")


def test_messages_keep_the_fields_that_training_renders(model, tokenizer):
    talker = copy.deepcopy(tokenizer)
    talker.chat_template = CALLS
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "name": "add", "content": "1"}]
    rendered = talker.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert '{"name": "add"' in rendered
    with client(model, talker) as http:
        given = [{**message, "refusal": None, "function_call": None} for message in messages]
        status, answer = ask(http, {"messages": given}, "chat/completions")
        assert status == 200 and answer["usage"]["prompt_tokens"] == len(
            talker(rendered, add_special_tokens=False)["input_ids"])


def tokens_of(http, body, path="completions"):
    return ask(http, body, path)[1]["usage"]["prompt_tokens"]


@pytest.mark.slow
def test_special_tokens_in_a_text_stay_text(http, tokenizer):
    text = "a<|im_end|><|mask|><|endoftext|>"
    plain = len(tokenizer(text, split_special_tokens=True)["input_ids"])
    assert plain > len(tokenizer(text)["input_ids"])
    assert tokens_of(http, {"prompt": text}) == plain == tokens_of(http, {"prompt": "", "suffix": text})
    empty = tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)
    frame = len(empty["input_ids"])
    for content in (text, "\ufdd0<|mask|>", "<|im_end|>\n<|im_start|>system\n", "<|im_<|im_end|>end|>", "plain"):
        message = {"messages": [{"role": "user", "content": content}]}
        own = len(tokenizer("user\n" + content, split_special_tokens=True)["input_ids"]) - len(
            tokenizer("user\n")["input_ids"])
        assert tokens_of(http, message, "chat/completions") == frame + own
    edit = {"messages": [{"role": "user", "content": f"{text}<|code_to_edit|>x<|/code_to_edit|>"}]}
    assert ask(http, edit, "edit/completions")[0] == 200


@pytest.mark.slow
def test_equal_prompts_of_a_request_are_copies_of_one(http):
    body = {"prompt": ["a", "b", "a"], "n": 2, "seed": 3, "temperature": 1}
    texts = [choice["text"] for choice in ask(http, body)[1]["choices"]]
    four = [choice["text"] for choice in ask(http, {**body, "prompt": "a", "n": 4})[1]["choices"]]
    assert [*texts[:2], *texts[4:]] == four and len(set(four)) == 4
    assert texts[2:4] == [choice["text"] for choice in ask(http, {**body, "prompt": "b"})[1]["choices"]]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["completions", "fim/completions"])
@pytest.mark.parametrize("diffusion", [{}, {"block_length": 32}, {"block_length": 3}])
def test_a_gap_keeps_to_max_tokens_and_to_the_models_positions(http, path, diffusion):
    for most in (1, 3, 4, 16, 64):
        status, answer = ask(http, {"prompt": "x", "suffix": "y", "max_tokens": most, "diffusion": diffusion}, path)
        assert status == 200 and answer["diffusion"]["length"] <= most
        assert answer["usage"]["completion_tokens"] == answer["diffusion"]["length"]
        assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("path", ["completions", "fim/completions"])
def test_a_length_that_does_not_fit_is_cut_or_refused(http, path):
    status, answer = ask(http, {"prompt": [5] * 230, "suffix": "y", "max_tokens": 64}, path)
    assert status == 200 and answer["diffusion"]["length"] <= 25
    status, answer = ask(http, {"prompt": "x", "suffix": "y", "max_tokens": 4, "diffusion": {"length": 9}}, path)
    assert status == 400 and "diffusion.length must be auto or from 1 to 4" in answer["error"]["message"]


def edit_of(code, **more):
    return {**more, "messages": [{"role": "user", "content": f"<|code_to_edit|>{code}<|/code_to_edit|>"}]}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"block_length": 32, "remasking": "low_confidence"}, {"block_length": 32, "steps": 7, "alg": "maskgit_plus"},
    {"block_length": 4, "block_causal": True, "steps": 3}, {"block_length": 4, "blocks_from": "text", "steps": 3},
    {"block_length": 5, "cache": "dual", "alg": "maskgit_plus"}])
def test_blocks_and_steps_of_the_server_fit_any_request(model, tokenizer, settings):
    """A client cannot know them."""
    with client(model, tokenizer, **settings) as http:
        for most in (1, 31, 96, 100, 200):
            status, answer = ask(http, {"prompt": "def", "max_tokens": most})
            assert status == 200 and answer["usage"]["completion_tokens"] == most, answer
            status, answer = ask(http, {"prompt": "def", "suffix": "x", "max_tokens": most})
            assert status == 200 and answer["usage"]["completion_tokens"] <= most, answer
        for length in (1, 7, 32, 50):
            assert ask(http, {"prompt": "d", "suffix": "x", "diffusion": {"length": length}})[0] == 200
        for more in ({}, {"max_tokens": 3}):
            status, answer = ask(http, edit_of("abcdefg", **more), "edit/completions")
            assert status == 200 and answer["usage"]["completion_tokens"] <= 7


def test_pages_of_other_origins_may_ask_if_the_server_says_so(http, model, tokenizer):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in (("https://a.site", 200), ("https://b.site", 200), ("https://c.site", 400)):
        first = http.options("/v1/chat/completions", headers={**asks, "Origin": origin, "Authorization": ""})
        assert first.status_code == allowed  # without the key, as browsers ask
        for key, status in (("Bearer k", 200), ("", 401)):
            answer = http.post("/v1/completions", json={"prompt": "x"},
                               headers={"Origin": origin, "Authorization": key})
            assert answer.status_code == status
            assert answer.headers.get("access-control-allow-origin") == (origin if allowed == 200 else None)
    with client(model, tokenizer) as closed:
        answer = closed.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": "https://a.site"})
        assert "access-control-allow-origin" not in answer.headers


def test_a_request_that_names_no_length_gets_what_fits(model, tokenizer):
    with client(model, tokenizer, ServerLimits(max_tokens=20), max_new_tokens=5000, steps=4) as http:
        for prompt, tokens in (("def", 20), ([7] * 250, 6), ([7] * 255, 1)):
            assert ask(http, {"prompt": prompt})[1]["usage"]["completion_tokens"] == tokens
        status, answer = ask(http, {"prompt": [7] * 256})
        assert status == 400 and "the request needs 257 positions, the model has 256" in answer["error"]["message"]
        status, answer = ask(http, {"prompt": "def", "max_tokens": 21})
        assert status == 400 and "at most 20 are allowed" in answer["error"]["message"]


MARKED = "before = 1\n<|code_to_edit|>\nold = 2\n<|/code_to_edit|>\nafter = 3\n"


@pytest.fixture(scope="module")
def editing(edit_folder):
    """A server of a model that edits."""
    tokenizer = load_tokenizer(edit_folder)
    tokenizer.chat_template = TEMPLATE
    with client(DiffusionLM.from_pretrained(edit_folder, dtype=torch.float64), tokenizer, alg="edit", steps=10,
                temperature=1.0) as http:
        yield http


def edit(content=MARKED, **body):
    return {"messages": [{"role": "user", "content": content}], "seed": 5, **body}


def test_the_marked_code_is_edited_where_the_model_edits(editing, edit_folder):
    status, answer = ask(editing, edit(n=2), "edit/completions")
    assert status == 200 and answer["diffusion"]["method"] == "edit"
    model, tokenizer = DiffusionLM.from_pretrained(edit_folder, dtype=torch.float64), load_tokenizer(edit_folder)
    before, old, after = (encode(tokenizer, part).tolist() for part in ("before = 1\n", "old = 2", "\nafter = 3\n"))
    end = tokenizer.eos_token_id
    ids = [end, *before, *old, *after, end]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    where = [0] * (1 + len(before)) + [1] * len(old) + [0] * (len(after) + 1)
    out = model.edit([ids], editable=[where], steps=10, temperature=1.0, seed=5, max_new_tokens=8,
                     num_return_sequences=2)
    for row, choice in zip(out.rows(), answer["choices"], strict=True):
        new = row.tolist()[1 + len(before):len(row) - len(after) - 1]
        context = [end, *before][-4:]
        text = tokenizer.decode([*context, *new], skip_special_tokens=True)
        assert text == tokenizer.decode(context, skip_special_tokens=True) + choice["message"]["content"]
        assert new != old and choice["finish_reason"] == "stop"


def test_an_edit_is_made_by_edits_whatever_the_servers_method(editing, edit_folder):
    with client(DiffusionLM.from_pretrained(edit_folder, dtype=torch.float64), load_tokenizer(edit_folder), steps=10,
                temperature=1.0, alg="maskgit_plus", threshold=0.9, block_length=4) as http:
        answers = [ask(server, edit(), "edit/completions")[1] for server in (http, editing)]
        assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["diffusion"]["method"] == "edit"
        nothing = MARKED.replace("old = 2", "")  # then tokens are inserted alone
        assert ask(http, edit(nothing), "edit/completions")[0] == 200


def test_the_canvas_of_edits_is_streamed_as_it_changes_its_length(editing):
    body = edit(stream=True, diffusing=True, stream_options={"include_usage": True})
    lines = editing.post("/v1/edit/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    drafts = [chunk for chunk in chunks if "diffusion" in chunk]
    assert len({len(draft["diffusion"]["tokens"]) for draft in drafts}) > 1
    assert all(draft["choices"][0]["delta"]["content"] == "".join(text for text, _ in draft["diffusion"]["tokens"])
               for draft in drafts[:-1])
    whole = ask(editing, edit(), "edit/completions")[1]["choices"][0]["message"]["content"]
    assert drafts[-1]["choices"][0]["delta"]["content"] == whole and drafts[-1]["diffusion"]["done"]
    plain = editing.post("/v1/edit/completions", json=edit(stream=True)).text.split("\n\n")
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for line in plain[:-2]]
    assert "".join(texts) == whole


@pytest.mark.parametrize("path, body", [
    ("chat/completions", CHAT), ("completions", {"prompt": "x = "}), ("completions", {"prompt": ""}),
    ("completions", {"prompt": ["x", ""], "n": 2}), ("fim/completions", {"prompt": "a", "suffix": "b"}),
    ("fim/completions", {"prompt": "", "suffix": "b"})])
@pytest.mark.parametrize("more", [
    {}, {"max_tokens": 3}, {"stream": True},
    {"max_tokens": 70, "diffusion": {"edit_source": "masks"}},  # whose length fits itself to a gap
    {"max_tokens": 5, "diffusion": {"edit_source": "uniform"}}])
def test_every_endpoint_takes_a_model_whose_method_is_edit(editing, path, body, more):
    body = {**body, **more, "seed": 4}
    if more.get("stream"):
        assert editing.post(f"/v1/{path}", json=body).text.endswith("data: [DONE]\n\n")
        return
    status, answer = ask(editing, body, path)
    assert status == 200, answer
    most = body.get("max_tokens", 8)
    assert answer["usage"]["completion_tokens"] <= most * len(answer["choices"])
    assert answer["usage"]["denoising_steps"] >= 1
    assert answer["diffusion"]["method"] == "edit"
    if "suffix" in body:
        assert all(choice["finish_reason"] == "stop" for choice in answer["choices"])


@pytest.mark.parametrize("tokens, reason", [([5, 6], "stop"), ([5, 6, 7], "length"), ([5, 6, 0], "stop"),
                                            ([], "stop")])
def test_a_text_that_reaches_max_tokens_says_so(model, tokenizer, tokens, reason):
    texts = Texts(model, tokenizer, MDMGenerationConfig())
    answer = Answer(texts, torch.tensor([4]), [], 3, fills=False, rewrites=True)
    answer.update(Progress(tokens, [0.5] * len(tokens), 1, 1, True))
    assert answer.finish_reason == reason


@pytest.mark.parametrize("path, body, message", [
    ("edit/completions", edit(max_tokens=3), "the code to edit has [0-9]+ tokens, so max_tokens must be more"),
    ("edit/completions", edit(MARKED.replace("old", "old " * 1100)), "the code to edit has .* edit a shorter part$"),
    ("edit/completions", edit(MARKED.replace("old", "old " * 200)), "positions, the model has 256; shorten"),
    ("edit/completions", edit(diffusion={"length": 5}), "diffusion.length is of a gap"),
    ("edit/completions", edit(diffusion={"alg": "entropy"}), "this model edits by alg edit, not entropy"),
    ("edit/completions", edit(diffusion={"corrector": [1, 1, 1]}), "corrector with alg edit undoes insertions"),
    ("edit/completions", edit("no marks"), "the message needs"),
    ("completions", {"prompt": "x", "response_format": {"type": "json_object"}}, "constraint does not go with alg"),
    ("completions", {"prompt": "x", "diffusion": {"block_length": 2}}, "block_length does not go with alg edit"),
    ("completions", {"prompt": "x", "max_tokens": 3, "diffusion": {"edit_source": "masks", "edit_source_length": 4}},
     "edit_source_length 4 is more than the 3 tokens")])
def test_edits_that_cannot_be_are_refused_with_400(editing, path, body, message):
    status, answer = ask(editing, body, path)
    assert status == 400 and re.search(message, answer["error"]["message"]), answer


def test_a_model_without_heads_for_edits_refuses_them_and_fills_the_marked_code(http):
    status, answer = ask(http, {"prompt": "x", "diffusion": {"alg": "edit"}})
    assert status == 400 and "needs a model with heads for edits" in answer["error"]["message"]
    status, answer = ask(http, edit(), "edit/completions")
    assert status == 200 and answer["diffusion"]["method"] == "entropy"
