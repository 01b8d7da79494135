"""The guard of every endpoint: API key, size of bodies, counts, and errors as OpenAI's error objects."""

import asyncio
import hmac
import json
import time

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException

from dllm.errors import Failure, UserError, first_line
from dllm.server.limits import ServerLimits
from dllm.server.scheduler import Busy, Scheduler, TooLate

PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/fim/completions",
         "/v1/edit/completions")  # counted by name; all others count as "other"


class RequestError(Exception):
    """An error that a client receives, as OpenAI's error object."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, allow: str | None = None):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.allow = allow  # the methods of the path, for a 405

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.allow is not None:
            headers["Allow"] = self.allow
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
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return RequestError(400, f"{place or 'the body'}: {first['msg']}", param=place or None)
    if isinstance(error, HTTPException):
        return RequestError(error.status_code, str(error.detail))
    return RequestError(500, "the server failed; its log says why", "server_error")


def answer_errors(app: FastAPI) -> None:
    """Make the app answer every exception with OpenAI's error object."""
    async def answer(request: Request, error: Exception) -> JSONResponse:
        status = getattr(error, "status_code", None)
        if status == 404:
            error = RequestError(404, f"there is no {request.url.path[:80]} here, but {', '.join(PATHS)}")
        elif status == 405:
            allow = (error.headers or {}).get("Allow", "")
            error = RequestError(405, f"{request.url.path} takes {allow}, not {request.method}", allow=allow)
        return as_request_error(error).response()

    for kind in (RequestError, UserError, Failure, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def check_text(body: bytes) -> None:
    """Refuse a body that is JSON of invalid text, or nests too deeply: what no endpoint could read or answer."""
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode("utf-8")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, f"the body is not JSON in UTF-8: {first_line(error)}") from None
    except UnicodeEncodeError:
        raise RequestError(400, "the body has half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body cannot be read: {first_line(error)}") from None


class Metrics:
    """Prometheus metrics of one server, in a registry of their own."""

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


class Guard:
    """Checks the key and reads the body before every endpoint, and counts the answer. Pure ASGI, so streams pass."""

    OPEN = ("/", "/health")

    def __init__(self, app, limits: ServerLimits, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 500
        if scope["method"] == "HEAD":  # as GET; the server sends no body
            scope = {**scope, "method": "GET"}

        async def note(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            try:
                self._check_key(scope)
                body = await self._read(scope, receive)
            except RequestError as refused:
                await refused.response()(scope, receive, note)
            else:
                await self.app(scope, body, note)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)

    def _check_key(self, scope) -> None:
        if self.limits.api_key is None or scope["path"] in self.OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if not (scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.limits.api_key.encode())):
            raise RequestError(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                               "authentication_error", code="invalid_api_key")

    async def _read(self, scope, receive):
        """Read the whole body. Returns a `receive` that gives it out again."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        try:
            async with asyncio.timeout(self.limits.max_seconds):
                body = await self._join(receive)
        except TimeoutError:
            raise RequestError(408, f"the body took more than {self.limits.max_seconds:g} seconds to come",
                               "timeout_error") from None
        if body is not None:
            check_text(body)
            kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json" and not kind.endswith(b"+json"):  # which pages of other origins cannot send
                raise RequestError(400, "the body must be sent as Content-Type: application/json, not "
                                        f"{kind.decode('latin-1') or 'without a type'}")
        messages = [] if body is None else [{"type": "http.request", "body": body, "more_body": False}]

        async def again():
            return messages.pop() if messages else await receive()

        return again

    async def _join(self, receive) -> bytes | None:
        """The body; None if the client disconnects before its end."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.limits.max_body:
                raise RequestError(413, f"the body is larger than {self.limits.max_body} bytes")
        return b"".join(parts)
