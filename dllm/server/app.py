"""The HTTP surface: OpenAI's endpoints, Mercury's fim and edit, and a page to watch."""

import asyncio
import time
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import generate_latest

from dllm.generation.checks import find_mask_token
from dllm.generation.config import MDMGenerationConfig
from dllm.model.transformer import Transformer
from dllm.pages.base import fill
from dllm.server.answers import ChatForm, EditForm, Exchange, Form, TextForm, stream, whole
from dllm.server.guard import Guard, Metrics, RequestError, answer_errors
from dllm.server.limits import ServerLimits
from dllm.server.requests import (
    ChatRequest,
    Common,
    CompletionRequest,
    EditRequest,
    Prompt,
    make_plan,
    read_chat,
    read_completion,
    read_edit,
)
from dllm.server.scheduler import Scheduler
from dllm.server.texts import Texts

# The page loads nothing from elsewhere and talks to this server alone.
CONTENT_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
                  "img-src data:; base-uri 'none'; form-action 'none'")


def make_app(model: Transformer, tokenizer, name: str, defaults: MDMGenerationConfig | None = None,
             limits: ServerLimits | None = None) -> FastAPI:
    """The server of one model. `app.state.scheduler` denoises from its start-up to its shutdown.

    Raises: UserError if nothing names the model's mask token.
    """
    limits, defaults = limits or ServerLimits(), defaults or MDMGenerationConfig()
    find_mask_token(model, defaults)
    scheduler = Scheduler(model, limits.max_batch, limits.max_queue)
    endpoints = Endpoints(name, Texts(model, tokenizer, defaults), scheduler, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.drain)

    app = FastAPI(title="dllm", description="Masked diffusion language models behind OpenAI's API.", lifespan=lifespan,
                  docs_url=None, redoc_url=None)
    app.state.scheduler = scheduler
    app.add_middleware(Guard, limits=limits, metrics=endpoints.metrics)
    if limits.cors is not None:  # outside the guard: a browser asks first, without the key
        app.add_middleware(CORSMiddleware, allow_origins=[origin.strip() for origin in limits.cors.split(",")],
                           allow_methods=["GET", "POST"], allow_headers=["*"])
    answer_errors(app)
    endpoints.add_to(app)
    return app


class Endpoints:
    def __init__(self, name: str, texts: Texts, scheduler: Scheduler, limits: ServerLimits):
        self.name, self.texts, self.scheduler, self.limits = name, texts, scheduler, limits
        self.metrics = Metrics(scheduler)
        self.model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "dllm"}

    def add_to(self, app: FastAPI) -> None:
        app.get("/", response_class=HTMLResponse, include_in_schema=False)(self.page)
        app.get("/health")(self.health)
        app.get("/metrics", response_class=PlainTextResponse)(self.show_metrics)
        app.get("/v1/models")(self.list_models)
        for endpoint in ("chat", "fim", "edit"):
            app.get(f"/v1/{endpoint}/completions/models", include_in_schema=False)(self.list_models)
        app.get("/v1/models/{model_id:path}")(self.one_model)
        app.post("/v1/completions")(self.completions)
        app.post("/v1/fim/completions", name="fim")(self.completions)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/v1/edit/completions")(self.edit)

    async def page(self):
        return HTMLResponse(fill("server.html"), headers={"Content-Security-Policy": CONTENT_POLICY})

    async def health(self):
        if not self.scheduler.alive:
            raise RequestError(503, "the denoising thread has ended; start the server again", "server_error")
        return {"status": "ok", "model": self.name, "denoising": self.scheduler.rows,
                "waiting": len(self.scheduler.waiting)}

    async def show_metrics(self):
        return PlainTextResponse(generate_latest(self.metrics.registry))

    async def list_models(self):
        return {"object": "list", "data": [self.model]}

    async def one_model(self, model_id: str):
        self._check_model(model_id)
        return self.model if model_id else await self.list_models()  # /v1/models/

    async def completions(self, http: Request, body: CompletionRequest):
        return await self._answer(http, body, read_completion(body, self.texts), TextForm)

    async def chat(self, http: Request, body: ChatRequest):
        return await self._answer(http, body, read_chat(body, self.texts), ChatForm)

    async def edit(self, http: Request, body: EditRequest):
        return await self._answer(http, body, read_edit(body, self.texts), EditForm)

    async def _answer(self, http: Request, body: Common, prompt: Prompt, form_of: type[Form]):
        deadline = time.monotonic() + self.limits.max_seconds
        self._check_model(body.model)
        plan = await make_plan(body, prompt, self.texts, self.limits)
        exchange = Exchange(plan, self.texts, self.scheduler, deadline)
        form = form_of(self.name, plan, exchange.answers)
        exchange.submit()
        if not body.stream:
            return JSONResponse(await whole(exchange, form, self.metrics, http))
        return StreamingResponse(stream(exchange, form, self.metrics), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    def _check_model(self, asked: str) -> None:
        if asked not in ("", self.name):
            raise RequestError(404, f"there is no model {asked[:80]!r} here, only {self.name!r}", param="model",
                               code="model_not_found")
