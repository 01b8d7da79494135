"""The server, driven as its users do: OpenAI's client, a browser, many at once, and by signals."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import torch

httpx, openai, _, _, _ = map(pytest.importorskip, ("httpx", "openai", "uvicorn", "greenlet", "fastapi"))

from dllm import cli  # noqa: E402
from dllm.diffusion_lm import DiffusionLM  # noqa: E402
from dllm.generation.config import MDMGenerationConfig  # noqa: E402
from dllm.generation.infilling import infill  # noqa: E402
from dllm.generation.sampler import generate  # noqa: E402
from dllm.model.tokenizer import load_tokenizer  # noqa: E402
from dllm.server import listening  # noqa: E402
from dllm.server.app import make_app  # noqa: E402
from dllm.server.bench import measure, table  # noqa: E402
from dllm.server.limits import ServerLimits  # noqa: E402
from dllm.server.listening import bind, make_server  # noqa: E402
from dllm.server.requests import split_edit  # noqa: E402
from dllm.server.scheduler import Progress  # noqa: E402
from dllm.server.texts import Answer, Texts  # noqa: E402
from tests.processes import end, start, wait_until  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
DEFAULTS = MDMGenerationConfig(max_new_tokens=12, steps=16, alg="maskgit_plus")


@contextmanager
def running(folder, limits=None, template=TEMPLATE, defaults=DEFAULTS):
    """A server on its own port: its address and its app.

    In float64, because computing together rounds differently, which in fp32 decides a draw in a few of 10,000 texts.
    """
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    app = make_app(DiffusionLM.from_pretrained(folder, dtype=torch.float64), tokenizer, "tiny", defaults, limits)
    listening = bind("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def model(model_folder):
    return DiffusionLM.from_pretrained(model_folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def served(model_folder):
    with running(model_folder) as (url, app):
        yield url, app


@pytest.fixture(scope="module")
def url(served):
    return served[0]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def offline(model, tokenizer, prompt: str, **settings) -> str:
    """The text of the sampler for a prompt, up to its end-of-text token."""
    ids = torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=torch.long)
    config = MDMGenerationConfig(**{"max_new_tokens": 12, "steps": 16, "alg": "maskgit_plus", "stop_at_eos": True,
                                    **settings})
    new = generate(model, ids, config=config).sequences[0, len(ids):].tolist()
    new = new[:new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
    context = ids[-4:].tolist()
    return tokenizer.decode([*context, *new], skip_special_tokens=True)[len(tokenizer.decode(
        context, skip_special_tokens=True)):]


def test_openais_client_gets_the_samplers_text(client, model, tokenizer):
    answer = client.completions.create(model="tiny", prompt="import os\n", max_tokens=12, temperature=0.7, seed=5)
    assert answer.choices[0].text == offline(model, tokenizer, "import os\n", temperature=0.7, seed=5)
    assert answer.object == "text_completion" and answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.denoising_steps >= 1 and answer.usage.tokens_per_forward >= 1
    assert answer.diffusion["seed"] == 5 and answer.diffusion["method"] == "maskgit_plus"


def test_a_conversation_is_rendered_by_the_chat_template(client, model, tokenizer):
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}], seed=1)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == offline(model, tokenizer, "user: hello\nassistant:", seed=1)


@pytest.mark.parametrize("settings", [
    {}, {"stop": ["e", "zz"]}, {"temperature": 1.0}, {"extra_body": {"diffusion": {"alg": "p2"}}}])
def test_a_stream_adds_up_to_the_whole_answer(client, settings):
    asked = {"model": "tiny", "prompt": "def f(", "max_tokens": 24, "seed": 3, **settings}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert ends == [whole.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 3, "max_tokens": 24, **settings}
    content = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**chat, stream=True)]
    assert "".join(filter(None, content)) == client.chat.completions.create(**chat).choices[0].message.content


def test_a_text_stops_before_a_stop_string(client):
    asked = {"model": "tiny", "prompt": "def f(", "max_tokens": 24, "seed": 3}
    text = client.completions.create(**asked).choices[0].text
    stop = text[len(text) // 2:][:2]
    cut = client.completions.create(**asked, stop=stop).choices[0]
    assert cut.text == text[:text.index(stop)] and cut.finish_reason == "stop"


def test_a_stop_string_may_name_a_special_token(model, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    texts = Texts(model, tokenizer, MDMGenerationConfig())
    answer = Answer(texts, torch.empty(0, dtype=torch.long), ["<|im_end|>"], 10, fills=False, rewrites=False)
    ids = tokenizer("a b")["input_ids"]
    assert answer.complete([*ids, end]) and not answer.complete(ids)
    answer.update(Progress([*ids, end, *ids], [0.0] * (2 * len(ids) + 1), 1, 1, True))
    assert answer.text == "a b" and answer.finish_reason == "stop"


def test_the_stream_of_a_diffusing_request_is_the_canvas_of_each_step(url):
    body = {"prompt": "x = ", "max_tokens": 12, "seed": 0, "stream": True, "diffusing": True}
    lines = httpx.post(f"{url}/v1/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    drafts = [chunk for chunk in chunks if "diffusion" in chunk]
    masked = [sum(text is None for text, _ in draft["diffusion"]["tokens"]) for draft in drafts]
    assert len(drafts) > 3 and masked == sorted(masked, reverse=True) and masked[0] > 0 == masked[-1]
    assert all(draft["diffusion"]["replace"] for draft in drafts)
    assert drafts[0]["choices"][0]["text"].count("▒") == masked[0]
    assert drafts[-1]["choices"][0]["text"] == httpx.post(
        f"{url}/v1/completions", json={**body, "stream": False}).json()["choices"][0]["text"]
    assert all(0 <= confidence <= 1 for text, confidence in drafts[-1]["diffusion"]["tokens"])


def test_a_suffix_makes_a_gap(client, url, model, tokenizer):
    prefix, suffix = (torch.tensor(tokenizer(text)["input_ids"]) for text in ("def f(a):\n", "\n    return a\n"))
    config = MDMGenerationConfig(steps=16, alg="maskgit_plus", seed=2, stop_at_eos=True)
    for length, asked in ((6, {"length": 6}), ("auto", {})):
        out = infill(model, prefix, suffix, length=length, generation_config=config).sequences[0]
        new = out[len(prefix):-len(suffix)].tolist()
        answer = client.completions.create(model="tiny", prompt="def f(a):\n", suffix="\n    return a\n", seed=2,
                                           max_tokens=128, extra_body={"diffusion": asked})
        assert answer.diffusion["length"] == len(new)
        if tokenizer.eos_token_id not in new:
            assert answer.choices[0].text == tokenizer.decode(new) and answer.choices[0].finish_reason == "stop"
        fim = httpx.post(f"{url}/v1/fim/completions", json={
            "prompt": "def f(a):\n", "suffix": "\n    return a\n", "seed": 2, "max_tokens": 128, "diffusion": asked})
        assert fim.json()["choices"] == answer.model_dump()["choices"]


def test_several_prompts_and_several_texts_of_each(client, model, tokenizer):
    answer = client.completions.create(model="tiny", prompt=["a = ", "b = 1\nc"], n=2, temperature=1, seed=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4
    assert answer.choices[2].text == offline(model, tokenizer, "b = 1\nc", temperature=1, seed=4)
    echoed = client.completions.create(model="tiny", prompt="a = ", echo=True, seed=4).choices[0].text
    assert echoed == "a = " + offline(model, tokenizer, "a = ", seed=4)
    ids = tokenizer("a = ")["input_ids"]
    assert client.completions.create(model="tiny", prompt=ids, seed=4).choices[0].text == echoed[4:]


@pytest.mark.slow
def test_the_text_is_what_the_response_format_wants(client):
    message = [{"role": "user", "content": "x"}]
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"],
              "additionalProperties": False}

    def ask(form: dict) -> str:
        answer = client.chat.completions.create(model="tiny", messages=message, seed=0, max_tokens=20,
                                                response_format=form)
        return answer.choices[0].message.content

    assert set(json.loads(ask({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}))) == {"n"}
    assert re.fullmatch("(yes|no), [0-9]{3}", ask({"type": "regex", "regex": "(yes|no), [0-9]{3}"}))
    assert isinstance(json.loads(ask({"type": "json_object"})), dict)


def test_an_edit_fills_the_marked_code_anew(url):
    prompt = ("<|recently_viewed_code_snippets|>\nuse x\n<|/recently_viewed_code_snippets|>\n"
              "<|current_file_content|>\nbefore = 1\n"
              "<|code_to_edit|>\nold = <|cursor|>2\n<|/code_to_edit|>\nafter = 3\n"
              "<|/current_file_content|>\n<|edit_diff_history|>\n-a\n+b\n<|/edit_diff_history|>")
    before, old, after = split_edit(prompt)
    assert (before.index("use x") < before.index("+b") < before.index("before = 1") and old == "old = 2"
            and after == "\nafter = 3\n" and "<|" not in before + after)
    answer = httpx.post(f"{url}/v1/edit/completions", json={"messages": [{"role": "user", "content": prompt}]}).json()
    assert answer["object"] == "edit.completion" and answer["choices"][0]["message"]["role"] == "assistant"
    wrong = httpx.post(f"{url}/v1/edit/completions", json={"messages": [{"role": "user", "content": "no marks"}]})
    assert wrong.status_code == 400 and "<|code_to_edit|>" in wrong.json()["error"]["message"]


BAD = [
    ({"model": "other"}, 404, "there is no model 'other' here, only 'tiny'"),
    ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": 5000}, 400, "max_tokens is 5000, at most 1024 are allowed"),
    ({"max_tokens": 300}, 400, "the request needs 30[0-9] positions, the model has 256; shorten the prompt"),
    ({"temperature": "hot"}, 400, "temperature: "),
    ({"frequency_penalty": 1.0}, 400, "frequency_penalty is not supported"),
    ({"logprobs": 2}, 400, "logprobs and best_of are not supported"),
    ({"n": 64}, 400, "64 texts at a time, at most 32"),
    ({"stop": [""]}, 400, "stop takes up to 16 texts"),
    ({"diffusion": {"stepz": 3}}, 400, "diffusion has no field stepz; there are steps"),
    ({"diffusion": {"steps": "many"}}, 400, "diffusion.steps must be a whole number, not 'many'"),
    ({"diffusion": {"steps": 2.5}}, 400, "diffusion.steps must be a whole number"),
    ({"diffusion": {"steps": 0}}, 400, "steps must be at least 1, not 0"),
    ({"diffusion": {"alg": "best"}}, 400, "alg must be one of"),
    ({"diffusion": {"length": 0}}, 400, "diffusion.length must be auto or from 1 to 1024"),
    ({"diffusion": {"block_length": 5, "steps": 7}}, 400, "steps must be a multiple of the 3 blocks"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type is text, json_object"),
    ({"response_format": {"type": "regex", "regex": "("}}, 400, "cannot be used"),
    ({"response_format": {"type": "regex", "regex": "((a{50}){50}){50}"}}, 400, "more than 30000 states"),
    ({"response_format": {"type": "regex", "regex": "a{40}"}, "max_tokens": 8}, 400, "at least [0-9]+ tokens are"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array", "uniqueItems": True}}}},
     400, "the keyword 'uniqueItems' is not supported for type array"),
    ({"prompt": [500]}, 400, "outside the vocabulary of 400"),
    ({"prompt": [2]}, 400, "contains the mask token"),
]


@pytest.mark.parametrize("fields, status, message", BAD)
def test_a_bad_request_is_told_what_is_wrong(url, fields, status, message):
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", **fields})
    error = answer.json()["error"]
    assert answer.status_code == status and re.search(message, error["message"]), error
    assert set(error) == {"message", "type", "param", "code"}


def test_openais_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="tools and logprobs"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}],
                                       tools=[{"type": "function", "function": {"name": "f"}}])


def test_broken_bodies_are_refused_in_openais_form(url):
    for content, status in ((b"{", 400), (b"[]", 400), (b"\xff\xfe", 400), (b"", 400), (b" " * (2 << 20), 413)):
        answer = httpx.post(f"{url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"].startswith("there is no /v1/nothing here, but /, ")


def test_a_model_without_a_chat_template_says_what_to_use(model_folder):
    with running(model_folder, template=None) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert answer.status_code == 400 and "use /v1/completions" in answer.json()["error"]["message"]


def test_health_models_and_metrics(url, client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{url}/health").json() | {"denoising": 0, "waiting": 0} == {
        "status": "ok", "model": "tiny", "denoising": 0, "waiting": 0}
    client.completions.create(model="tiny", prompt="x")
    text = httpx.get(f"{url}/metrics").text
    assert re.search(r'dllm_requests_total\{path="/v1/completions",status="200"\} [1-9]', text)
    assert re.search(r"dllm_tokens_total [1-9]", text) and "dllm_request_seconds_bucket" in text


def test_a_key_is_wanted_everywhere_but_for_the_page_and_health(model_folder):
    with running(model_folder, ServerLimits(api_key="sécret")) as (url, _):
        for key, status in ((None, 401), ("wrong", 401), ("sécret", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
            assert httpx.get(f"{url}/metrics", headers=headers).status_code == status
        for scheme, status in (("bearer", 200), ("BEARER ", 200), ("Basic", 401)):
            headers = {"Authorization": f"{scheme} sécret".encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
        assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/openapi.json").status_code == 401


def test_the_page_may_load_nothing_from_elsewhere(url):
    page = httpx.get(f"{url}/")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.text)
    assert httpx.get(f"{url}/v1/models", headers={"Origin": "http://evil"}).headers.get(
        "Access-Control-Allow-Origin") is None


def test_a_body_that_does_not_come_is_given_up(model_folder):
    with running(model_folder, ServerLimits(max_seconds=0.2)) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            answer = b""
            while b"}}" not in answer and (part := client.recv(4096)):  # the headers may come first
                answer += part
    assert answer.startswith(b"HTTP/1.1 408") and b"the body took more than 0.2 seconds" in answer


def test_a_full_queue_is_429_and_a_request_that_takes_too_long_504(model_folder):
    with running(model_folder, ServerLimits(max_batch=1, max_queue=1, max_seconds=0.5)) as (url, _):
        slow = {"prompt": "x", "max_tokens": 200, "diffusion": {"steps": 200_000, "alg": "origin"}}

        async def ask_all():
            async with httpx.AsyncClient(timeout=60) as client:
                return await asyncio.gather(*(client.post(f"{url}/v1/completions", json=slow) for _ in range(5)))

        answers = asyncio.run(ask_all())
        by_status = {answer.status_code: answer for answer in answers}
        assert set(by_status) == {429, 504} and by_status[429].headers["Retry-After"] == "1"
        assert "try again later" in by_status[429].json()["error"]["message"]
        assert "ask for fewer tokens or steps" in by_status[504].json()["error"]["message"]


def test_who_goes_away_is_no_longer_computed_for(served):
    url, app = served
    body = {"prompt": "x", "max_tokens": 200, "diffusion": {"steps": 200, "alg": "p2"}}
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout), httpx.stream(
                "POST", f"{url}/v1/completions", json={**body, "stream": stream}, timeout=0.05) as answer:
            for _ in answer.iter_lines():
                raise httpx.ReadTimeout("enough")
        until = time.monotonic() + 10
        while app.state.scheduler.rows:
            assert time.monotonic() < until, "a request whose client has gone is still computed"
            time.sleep(0.02)


def soak(url: str, seconds: float, clients: int, expected) -> dict:
    """Send random requests, a tenth dropped and a twentieth malformed. Returns the counts, and the wrong answers."""
    counts = {"answered": 0, "dropped": 0, "malformed": 0, "busy": 0}
    wrong = []

    async def one(client, draw):
        kind = draw.random()
        prompt = draw.choice(["a", "def f(x):", "import os\nimport"])
        tokens, seed = draw.randint(2, 24), draw.randint(0, 3)
        body = {"prompt": prompt, "max_tokens": tokens, "seed": seed, "temperature": 0.5,
                "stream": draw.random() < 0.3, "diffusion": {"alg": draw.choice(["entropy", "maskgit_plus", "p2"])}}
        if kind < 0.05:
            answer = await client.post(f"{url}/v1/completions", content=json.dumps(body)[:-draw.randint(1, 30)])
            counts["malformed"] += 1
            assert answer.status_code in (400, 422), answer.text
        elif kind < 0.15:
            try:
                await client.post(f"{url}/v1/completions", json=body, timeout=draw.random() * 0.02)
            except httpx.TimeoutException:
                pass
            counts["dropped"] += 1
        else:
            answer = await client.post(f"{url}/v1/completions", json=body)
            if answer.status_code == 429:
                counts["busy"] += 1
                await asyncio.sleep(0.05)
                return
            if body["stream"]:
                chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
                text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            else:
                text = answer.json()["choices"][0]["text"]
            counts["answered"] += 1
            if text != expected(prompt, tokens, seed, body["diffusion"]["alg"]):
                wrong.append((body, text, expected(prompt, tokens, seed, body["diffusion"]["alg"])))

    async def work(number):
        draw, until = random.Random(number), time.monotonic() + seconds
        async with httpx.AsyncClient(timeout=60) as client:
            while time.monotonic() < until:
                await one(client, draw)

    async def everyone():
        await asyncio.gather(*(work(number) for number in range(clients)))

    asyncio.run(everyone())
    return counts | {"wrong": wrong}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.exhaustive)])
def test_many_clients_at_once_get_what_each_would_get_alone(served, model, tokenizer, seconds):
    url, app = served
    known = {}

    def expected(prompt, tokens, seed, alg):
        key = prompt, tokens, seed, alg
        if key not in known:
            known[key] = offline(model, tokenizer, prompt, max_new_tokens=tokens, seed=seed, temperature=0.5, alg=alg)
        return known[key]

    soak(url, 2, 64, expected)
    before = resident_megabytes()
    counts = soak(url, seconds, 64, expected)
    assert counts["answered"] > 20 and counts["dropped"] and counts["malformed"]
    assert not counts["wrong"], counts["wrong"][:3]
    assert resident_megabytes() < before + 60
    until = time.monotonic() + 10
    while app.state.scheduler.rows or app.state.scheduler.waiting:
        assert time.monotonic() < until, "a request is left over"
        time.sleep(0.02)


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_whatever_the_openapi_document_allows_is_answered_as_it_says(served):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{served[0]}/openapi.json")
    for operation in schema.get_all_operations():
        operation = operation.ok()

        @settings(max_examples=25, deadline=None, derandomize=True, database=None,
                  suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case):
            body = {} if isinstance(case.body, type(schemathesis.core.NOT_SET)) else {"json": case.body}
            answer = httpx.request(case.method, served[0] + case.formatted_path, timeout=60, **body)
            assert answer.status_code < 500, (case.body, answer.text)
            assert answer.status_code < 400 or set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert "Traceback" not in answer.text and ".py" not in answer.text
        check()


def test_the_load_generator_measures(url):
    record = measure(url, requests=6, concurrency=3, max_tokens=8, prompt="x", stream=True)
    assert record["answered"] == 6 and not record["errors"] and record["tokens"] > 0
    assert record["first_canvas"]["p50"] <= record["latency"]["p50"] <= record["latency"]["max"]
    assert "6 of 6 requests answered, 3 at a time" in table(record) and "tokens/s" in table(record)
    refused = measure(url, requests=2, concurrency=1, max_tokens=8, prompt="x", extra={"model": "other"})
    assert refused["errors"] == {"404": 2} and refused["latency"] is None and "2 x 404" in table(refused)


def test_lm_evals_client_of_completions_works(url, model, tokenizer):
    models = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    remote = models.LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="tiny", tokenizer_backend=None,
                                        tokenized_requests=False, num_concurrent=1, max_retries=1)
    prompts = ["a = ", "import os\n"]
    asked = [Instance("generate_until", {}, (prompt, {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0}), 0)
             for prompt in prompts]
    wanted = [offline(model, tokenizer, prompt, seed=0).split("\n\n")[0] for prompt in prompts]
    assert remote.generate_until(asked, disable_tqdm=True) == wanted


@pytest.mark.slow
def test_sigterm_ends_the_server_when_all_is_answered(model_folder, tmp_path):
    told = tmp_path / "told"
    process = start(cli.main, ["serve", model_folder, "--port", "0", "--steps", "400", "--alg", "p2"], told)
    wait_until(lambda: told.read_text().endswith("\n"), process)
    url = re.search(r"http://\S+", told.read_text()).group()
    answers = []
    asking = [threading.Thread(target=lambda: answers.append(httpx.post(
        f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 200}, timeout=60))) for _ in range(4)]
    for thread in asking:
        thread.start()
    while httpx.get(f"{url}/health").json()["denoising"] < 4:
        time.sleep(0.01)
    process.terminate()
    for thread in asking:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert end(process) == 0 and told.read_text().count("\n") == 1
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_sigterm_before_the_server_answers_ends_it(monkeypatch, capsys):
    before, server = signal.getsignal(signal.SIGTERM), type("Server", (), {"started": False})()
    monkeypatch.setattr(listening, "make_server", lambda app: server)
    server.run = lambda sockets: os.kill(os.getpid(), signal.SIGTERM)
    try:
        with bind("127.0.0.1", 0) as sockets, pytest.raises(SystemExit) as ended:
            listening.serve(None, sockets)
        assert ended.value.code == 0 and capsys.readouterr().err.startswith("serving on http://127.0.0.1:")
        server.started = True  # uvicorn raises the signal again when all is answered
        with bind("127.0.0.1", 0) as sockets:
            listening.serve(None, sockets)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_keeps_a_server_from_starting_is_one_line(model_folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, wanted in (
                ((str(model_folder), "--port", port), f"cannot listen on 127.0.0.1, port {port}: address already"),
                ((str(model_folder), "--port", "99999999"), "choose another --port"),
                (("no/such/folder", "--port", "0"), "no/such/folder is not a folder; give a model folder"),
                ((str(model_folder), "--host", "0.0.0.0"), "--api-key (or DLLM_API_KEY) is needed"),
                ((str(model_folder), "--steps", "0"), "steps must be at least 1")):
            assert cli.main(["serve", *arguments]) == 2
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and wanted in lines[0], lines


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    import shutil

    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if path is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
def test_the_page_generates_stops_and_shows_errors(served, browser):
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 420, "height": 900})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(served[0])
    page.fill("#prompt", "<img src=x onerror=alert(1)>")
    page.fill("#tokens", "24")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("done: ", timeout=30_000)
    assert page.locator("#canvas img").count() == 0 and "<img src=x" in page.locator("#canvas").inner_text()
    assert page.locator("#canvas .masked").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    page.fill("#suffix", "\nreturn x")
    page.fill("#tokens", "200")
    page.fill("#steps", "200")
    page.select_option("#alg", "p2")
    page.evaluate("""() => new MutationObserver((_, observer) => {  // a click from Python could arrive after the end
        if (!document.querySelector("#canvas .masked")) return;
        observer.disconnect();
        document.querySelector("#stop").click();
    }).observe(document.querySelector("#canvas"), {childList: true, subtree: true})""")
    page.click("#go")
    expect(page.locator("#status")).to_have_text("stopped", timeout=30_000)
    assert page.is_enabled("#go") and page.is_disabled("#stop") and not problems, problems

    page.fill("#tokens", "3000")
    page.click("#go")
    page.wait_for_selector("#status.error")
    assert "max_tokens is 3000, at most 1024" in page.inner_text("#status")
    page.close()
