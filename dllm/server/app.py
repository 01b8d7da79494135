"""The HTTP surface: OpenAI's endpoints, Mercury's fim and edit, and a page to watch.

Drafts: with `diffusing` every streamed chunk carries the whole text as it is now, and replaces what came before it;
masked positions read as MASK_GLYPH. `diffusion.tokens` of the chunk has it token by token, with confidences.
"""

import asyncio
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from dllm.errors import Failure, UserError
from dllm.model import DiffusionLM
from dllm.sampler import MDMGenerationConfig
from dllm.server.scheduler import Busy, Job, Scheduler, TooLate
from dllm.server.texts import ANY_JSON, Answer, Texts
from dllm.visualize import MASK_GLYPH


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    api_key: str | None = None
    max_tokens: int = 1024  # of an answer
    max_body: int = 1 << 20  # bytes of a request
    max_seconds: float = 120.0  # of a request
    max_rows: int = 32  # texts denoised together
    max_waiting: int = 128  # requests that wait for that


class Common(BaseModel):
    """What all requests share. Fields of OpenAI's that ask for nothing we lack are accepted and ignored."""

    model: str = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-2**63, lt=2**63)] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    diffusing: bool = False
    diffusion: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class Message(BaseModel):
    role: Annotated[str, Field(max_length=32)]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Any] | None = None
    logprobs: bool | None = None


class CompletionRequest(Common):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None


class EditRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)]


class RequestError(Exception):
    """What a client is told: OpenAI's envelope."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)

    def body(self) -> dict:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UserError):
        return RequestError(400, str(error))
    if isinstance(error, Busy):
        return RequestError(429, str(error), "rate_limit_error", code="queue_full")
    if isinstance(error, TooLate):
        return RequestError(504, str(error), "timeout_error", code="timeout")
    if isinstance(error, Failure):
        return RequestError(503, str(error), "server_error")
    return RequestError(500, "the server failed; its log says why", "server_error")


def make_app(model: DiffusionLM, tokenizer, name: str, defaults: MDMGenerationConfig | None = None,
             limits: Limits | None = None) -> FastAPI:
    """The server of one model. `app.state.scheduler` denoises from its start-up to its shutdown."""
    limits = limits or Limits()
    texts = Texts(model, tokenizer, defaults or MDMGenerationConfig())
    scheduler = Scheduler(model, limits.max_rows, limits.max_waiting)
    metrics = Metrics(scheduler)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.drain)

    app = FastAPI(title="dllm", description="Masked diffusion language models behind OpenAI's API.", lifespan=lifespan,
                  docs_url=None, redoc_url=None)
    app.state.scheduler, app.state.limits = scheduler, limits
    app.add_middleware(Guard, limits=limits, metrics=metrics)
    created = int(time.time())
    models = {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "dllm"}]}

    @app.exception_handler(RequestError)
    async def known(request: Request, error: RequestError):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return RequestError(400, f"{place or 'the body'}: {first['msg']}", param=place or None).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException):
        return RequestError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception):
        return as_request_error(error).response()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page():
        text = resources.files("dllm.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                                       "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"})

    @app.get("/health")
    async def health():
        if not scheduler.alive:
            raise RequestError(503, "the denoising thread has ended; start the server again", "server_error")
        return {"status": "ok", "model": name, "denoising": scheduler.rows, "waiting": len(scheduler.waiting)}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics():
        return PlainTextResponse(generate_latest(metrics.registry))

    @app.get("/v1/models")
    @app.get("/v1/chat/completions/models", include_in_schema=False)
    @app.get("/v1/fim/completions/models", include_in_schema=False)
    @app.get("/v1/edit/completions/models", include_in_schema=False)
    async def list_models():
        return models

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str):
        check_model(model_id)
        return models["data"][0]

    def check_model(asked: str) -> None:
        if asked not in ("", name):
            raise RequestError(404, f"there is no model {asked[:80]!r} here, only {name!r}", param="model",
                               code="model_not_found")

    async def answer(http: Request, body: Common, form: "Form", prefixes: list[torch.Tensor], suffix: torch.Tensor,
                     *, fills: bool, length: int | str | None, max_tokens: int | None, echo: list[str]):
        began = time.monotonic()
        check_model(body.model)
        refuse_what_is_missing(body)
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise RequestError(400, f"max_tokens is {max_tokens}, at most {limits.max_tokens} are allowed",
                               param="max_tokens")
        choices = dict(body.diffusion or {})
        length = choices.pop("length", length)
        seed = choices.pop("seed", body.seed)
        if length not in ("auto", None) and (isinstance(length, bool) or not isinstance(length, int)
                                             or not 1 <= length <= limits.max_tokens):
            raise RequestError(400, f"diffusion.length must be auto or from 1 to {limits.max_tokens}",
                               param="diffusion.length")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -2**63 <= seed < 2**63):
            raise RequestError(400, "diffusion.seed must be a whole number of 64 bits", param="diffusion.seed")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stops) > 16 or not all(0 < len(stop) <= 256 for stop in stops):
            raise RequestError(400, "stop takes up to 16 texts of 1 to 256 characters", param="stop")
        try:
            pattern = read_pattern(body.response_format)
            given = {"max_tokens": max_tokens, "temperature": body.temperature, "top_p": body.top_p, "seed": seed,
                     "copies": body.n, "pattern": pattern, "choices": choices}
            if pattern is None:
                config = texts.config(**given)
            else:  # to compile it may take seconds
                config = await asyncio.to_thread(texts.config, **given)
        except UserError as error:
            raise as_request_error(error) from None
        gap = texts.gap(config) if length is None else None if length == "auto" else length
        most = model.config.max_position_embeddings
        longest = max(map(len, prefixes)) + len(suffix) + (max(config.infill_lengths) if gap is None else gap)
        if longest > most:
            raise RequestError(400, f"the request needs {longest} positions, the model has {most}; shorten the prompt "
                                    "or lower max_tokens", code="context_length_exceeded")
        limit = config.max_new_tokens if gap is None or length is None else gap
        answers = [Answer(texts, prefix, stops, limit, fills, config.rewrites)
                   for prefix in prefixes for _ in range(body.n)]
        queue: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()
        jobs = []
        for number, prefix in enumerate(prefixes):
            def notify(copy: int | None, event, first=number * body.n):
                if not loop.is_closed():
                    loop.call_soon_threadsafe(queue.put_nowait, (None if copy is None else first + copy, event))

            mine = answers[number * body.n]
            jobs.append(Job(prefix, suffix, gap, config, notify, every_step=body.stream,
                            deadline=began + limits.max_seconds, stops=mine.complete if stops else None))
        try:
            for job in jobs:
                scheduler.submit(job)
        except (UserError, Failure) as error:
            for job in jobs:
                scheduler.cancel(job)
            raise as_request_error(error) from None
        form.begin(name, answers, echo, sum(map(len, prefixes)) + len(suffix), body, config)
        if body.stream:
            return StreamingResponse(stream(jobs, queue, answers, form, metrics), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        watch = asyncio.create_task(until_disconnected(http))
        try:
            left = len(answers)
            while left:
                turn = asyncio.create_task(queue.get())
                await asyncio.wait({turn, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not turn.done():
                    turn.cancel()
                    raise RequestError(499, "the client has gone")
                number, event = turn.result()
                if number is None:
                    raise as_request_error(event)
                answers[number].update(event)
                left -= event.done
        finally:
            watch.cancel()
            for job in jobs:
                scheduler.cancel(job)
        metrics.count(answers)
        return JSONResponse(form.whole())

    @app.post("/v1/completions")
    async def completions(http: Request, body: CompletionRequest):
        if body.logprobs is not None or body.best_of not in (None, 1):
            raise RequestError(400, "logprobs and best_of are not supported; with diffusing, chunks have confidences",
                               param="logprobs")
        one = isinstance(body.prompt, str) or body.prompt and isinstance(body.prompt[0], int)
        prompts = [body.prompt] if one else body.prompt
        if not 1 <= len(prompts) <= 64:
            raise RequestError(400, "prompt takes 1 to 64 texts", param="prompt")
        numbers = [token for ids in prompts if not isinstance(ids, str) for token in ids]
        if not all(0 <= token < model.config.vocab_size for token in numbers):
            raise RequestError(400, f"prompt has tokens outside the vocabulary of {model.config.vocab_size}",
                               param="prompt")
        prefixes = [texts.encode(ids) if isinstance(ids, str) else torch.tensor(ids, dtype=torch.long)
                    for ids in prompts]
        prompts = [text if isinstance(text, str) else texts.decode(prefix[:0], text)
                   for text, prefix in zip(prompts, prefixes, strict=True)]
        check_no_mask([*prefixes])
        suffix = texts.encode(body.suffix or "")
        check_no_mask([suffix])
        fills = bool(body.suffix)
        return await answer(http, body, TextForm("text_completion"), prefixes, suffix, fills=fills,
                            length="auto" if fills else None, max_tokens=body.max_tokens,
                            echo=[prompt if body.echo else "" for prompt in prompts for _ in range(body.n)])

    @app.post("/v1/fim/completions")
    async def fim(http: Request, body: CompletionRequest):
        return await completions(http, body)

    @app.post("/v1/chat/completions")
    async def chat(http: Request, body: ChatRequest):
        if body.tools or body.logprobs:
            raise RequestError(400, "tools and logprobs are not supported; response_format is",
                               param="tools" if body.tools else "logprobs")
        try:
            prefix = texts.render([{"role": message.role, "content": plain(message)} for message in body.messages])
        except UserError as error:
            raise as_request_error(error) from None
        return await answer(http, body, ChatForm(), [prefix], prefix[:0], fills=False, length=None,
                            max_tokens=body.max_completion_tokens or body.max_tokens, echo=[""] * body.n)

    @app.post("/v1/edit/completions")
    async def edit(http: Request, body: EditRequest):
        before, old, after = read_edit(plain(body.messages[0]))
        prefix, suffix, region = texts.encode(before), texts.encode(after), texts.encode(old)
        check_no_mask([prefix, suffix])
        return await answer(http, body, ChatForm("edit.completion"), [prefix], suffix, fills=True,
                            length=max(len(region), 1), max_tokens=body.max_tokens, echo=[""] * body.n)

    def check_no_mask(parts: list[torch.Tensor]) -> None:
        if any((part == texts.mask_token_id).any() for part in parts):
            raise RequestError(400, "the text contains the mask token; take it out, and say what to fill in by suffix")

    return app


def refuse_what_is_missing(body: Common) -> None:
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        if getattr(body, name):
            raise RequestError(400, f"{name} is not supported; leave it out", param=name)
    if body.repetition_penalty not in (None, 1):
        raise RequestError(400, "repetition_penalty is not supported; leave it out", param="repetition_penalty")


def read_pattern(wanted: dict[str, Any] | None) -> tuple[str, str] | None:
    """What `response_format` says that the text must be: a kind of pattern and its text."""
    kind = (wanted or {}).get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return "schema", json.dumps(ANY_JSON)
    if kind == "json_schema":
        schema = wanted.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise UserError("response_format of type json_schema needs json_schema.schema, an object")
        return "schema", json.dumps(schema["schema"])
    if kind == "regex" and isinstance(wanted.get("regex"), str):
        return "regex", wanted["regex"]
    raise UserError("response_format.type is text, json_object, json_schema, or regex with the field regex")


def plain(message: Message) -> str:
    if isinstance(message.content, list):
        parts = [part.get("text") if part.get("type") == "text" else None for part in message.content]
        if not all(isinstance(part, str) for part in parts):
            raise RequestError(400, "messages hold text alone here", param="messages")
        return "".join(parts)
    return message.content or ""


def read_edit(text: str) -> tuple[str, str, str]:
    """Of Mercury's edit prompt what is before the code to edit, the code, and what is after it in the file."""
    found = re.search(r"<\|code_to_edit\|>\n?(.*?)\n?<\|/code_to_edit\|>", text, re.DOTALL)
    if found is None:
        raise RequestError(400, "the message needs <|code_to_edit|> and <|/code_to_edit|> around the code to edit",
                           param="messages")
    file = re.search(r"<\|current_file_content\|>\n?(.*?)(?:<\|/current_file_content\|>|$)", text, re.DOTALL)
    inside = file is not None and file.start(1) <= found.start() and found.end() <= file.end(1)
    before, after = text[:found.start()], text[found.end():file.end(1)] if inside else text[found.end():]
    history = text[file.end():] if inside else ""
    if inside:  # the rest comes first, so that the file stands on both sides of the gap
        before = text[:file.start()] + history + text[file.start(1):found.start()]
    before = re.sub(r"<\|/?[a-z_]+\|>\n?", "", before)
    return before, found.group(1).replace("<|cursor|>", ""), re.sub(r"<\|/?[a-z_]+\|>", "", after)


async def until_disconnected(http: Request) -> None:
    while not await http.is_disconnected():
        await asyncio.sleep(0.1)


async def stream(jobs: list[Job], queue: asyncio.Queue, answers: list[Answer], form: "Form",
                 metrics: "Metrics") -> AsyncIterator[str]:
    try:
        left = len(answers)
        for chunk in form.opening():
            yield event_line(chunk)
        while left:
            number, event = await queue.get()
            if number is None:
                yield event_line(as_request_error(event).body())
                return
            new = answers[number].update(event)
            if form.body.diffusing or new:
                yield event_line(form.draft(number) if form.body.diffusing else form.delta(number, new))
            if event.done:
                left -= 1
                yield event_line(form.end(number))
        metrics.count(answers)
        if (form.body.stream_options or {}).get("include_usage"):
            yield event_line(form.usage_chunk())
        yield "data: [DONE]\n\n"
    finally:
        for job in jobs:
            job.cancelled = True


def event_line(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class Form:
    """The shape of an endpoint's answers."""

    object_name: str
    prefix: str

    def begin(self, model: str, answers: list[Answer], echo: list[str], prompt_tokens: int, body: Common,
              config: MDMGenerationConfig) -> None:
        self.answers, self.echo, self.prompt_tokens, self.body, self.config = answers, echo, prompt_tokens, body, config
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def usage(self) -> dict:
        new = sum(answer.tokens for answer in self.answers)
        steps = [answer.progress.steps for answer in self.answers]
        forwards = sum(answer.progress.forwards for answer in self.answers)
        filled = sum(len(answer.progress.tokens) for answer in self.answers)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new,
                "total_tokens": self.prompt_tokens + new, "denoising_steps": max(steps),
                "tokens_per_forward": round(filled / max(forwards, 1), 3)}

    def diffusion(self) -> dict:
        return {"seed": self.config.seed, "method": self.config.remasking or self.config.alg,
                "cache": self.config.cache, "threshold": self.config.threshold,
                "length": len(self.answers[0].progress.tokens)}

    def chunk(self, choice: dict, **more) -> dict:
        return {**self.head, "object": self.stream_name, "choices": [choice], **more}

    def usage_chunk(self) -> dict:
        return {**self.head, "object": self.stream_name, "choices": [], "usage": self.usage()}

    def draft(self, number: int) -> dict:
        slots, progress = self.answers[number].draft(), self.answers[number].progress
        text = "".join(MASK_GLYPH if slot is None else slot for slot, _ in slots)
        if progress.done:
            text = self.answers[number].text
        return self.chunk(self.new(number, text), diffusion={
            "replace": True, "step": progress.steps, "done": progress.done, "tokens": slots})

    def delta(self, number: int, text: str) -> dict:
        return self.chunk(self.new(number, text))


class TextForm(Form):
    prefix = "cmpl"

    def __init__(self, object_name: str):
        self.object_name = self.stream_name = object_name

    def opening(self) -> list[dict]:
        return [self.chunk(self.new(number, text)) for number, text in enumerate(self.echo) if text]

    def new(self, number: int, text: str) -> dict:
        return {"index": number, "text": text, "finish_reason": None, "logprobs": None}

    def end(self, number: int) -> dict:
        return self.chunk({"index": number, "text": "", "finish_reason": self.answers[number].finish_reason,
                           "logprobs": None})

    def whole(self) -> dict:
        both = zip(self.echo, self.answers, strict=True)
        choices = [{"index": number, "text": echo + answer.text, "finish_reason": answer.finish_reason,
                    "logprobs": None} for number, (echo, answer) in enumerate(both)]
        return {**self.head, "object": self.object_name, "choices": choices, "usage": self.usage(),
                "diffusion": self.diffusion()}


class ChatForm(Form):
    def __init__(self, object_name: str = "chat.completion"):
        self.object_name, self.stream_name = object_name, object_name + ".chunk"
        self.prefix = "chatcmpl" if object_name == "chat.completion" else "edit"

    def opening(self) -> list[dict]:
        return [self.chunk({"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
                for number in range(len(self.answers))]

    def new(self, number: int, text: str) -> dict:
        return {"index": number, "delta": {"content": text}, "finish_reason": None}

    def end(self, number: int) -> dict:
        return self.chunk({"index": number, "delta": {}, "finish_reason": self.answers[number].finish_reason})

    def whole(self) -> dict:
        choices = [{"index": number, "message": {"role": "assistant", "content": answer.text},
                    "finish_reason": answer.finish_reason, "logprobs": None}
                   for number, answer in enumerate(self.answers)]
        return {**self.head, "object": self.object_name, "choices": choices, "usage": self.usage(),
                "diffusion": self.diffusion()}


class Metrics:
    def __init__(self, scheduler: Scheduler):
        self.registry = CollectorRegistry()

        def make(kind, name: str, text: str, labels=()):
            return kind(f"dllm_{name}", text, labels, registry=self.registry)

        self.requests = make(Counter, "requests", "Requests by path and status.", ("path", "status"))
        self.seconds = make(Histogram, "request_seconds", "Seconds until a request was answered.", ("path",))
        self.tokens = make(Counter, "tokens", "Tokens of answers.")
        for name, text, read in (
                ("denoising", "Texts being denoised.", lambda: scheduler.rows),
                ("waiting", "Requests that wait.", lambda: len(scheduler.waiting)),
                ("forward_passes", "Forward passes of the model so far.", lambda: scheduler.forwards)):
            make(Gauge, name, text).set_function(read)

    def count(self, answers: list[Answer]) -> None:
        self.tokens.inc(sum(answer.tokens for answer in answers))


class Guard:
    """Before every endpoint: the key and the size of the body; after it, the counts. Pure ASGI, so streams pass."""

    OPEN = ("/", "/health")

    def __init__(self, app, limits: Limits, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, path = time.perf_counter(), 500, scope["path"]

        async def note(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            refused = self._refuse(scope)
            if refused is None:
                try:
                    async with asyncio.timeout(self.limits.max_seconds):
                        body = await self._read(scope, receive)
                except TimeoutError:
                    body = RequestError(408, f"the body took more than {self.limits.max_seconds:g} seconds to come",
                                        "timeout_error")
                if isinstance(body, RequestError):
                    refused = body
            if refused is not None:
                await refused.response()(scope, receive, note)
            else:
                await self.app(scope, body, note)
        finally:
            known = path if path in KNOWN else "other"
            self.metrics.requests.labels(known, str(status)).inc()
            self.metrics.seconds.labels(known).observe(time.perf_counter() - began)

    def _refuse(self, scope) -> RequestError | None:
        if self.limits.api_key is None or scope["path"] in self.OPEN:
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, b"Bearer " + self.limits.api_key.encode()):
            return None
        return RequestError(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                            "authentication_error", code="invalid_api_key")

    async def _read(self, scope, receive):
        """The body, whole; a `receive` that gives it out again."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return receive
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.limits.max_body:
                return RequestError(413, f"the body is larger than {self.limits.max_body} bytes")
        given = False

        async def again():
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": b"".join(parts), "more_body": False}
            return await receive()
        return again


KNOWN = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/fim/completions",
         "/v1/edit/completions")
