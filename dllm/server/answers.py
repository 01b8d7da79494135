"""HTTP answers made of denoising steps: whole or streamed, in the shape of each endpoint.

Drafts: with `diffusing` every streamed chunk carries the whole text as it is now, and replaces what came before it;
masked positions read as MASK_GLYPH. `diffusion.tokens` of the chunk has it token by token, with confidences.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial

from fastapi import Request

from dllm.generation.infilling import Gap
from dllm.generation.rows import number_equal
from dllm.pages.denoising import MASK_GLYPH
from dllm.server.guard import Metrics, RequestError, as_request_error
from dllm.server.requests import Plan
from dllm.server.scheduler import Job, Scheduler
from dllm.server.texts import Answer, Texts


class Exchange:
    """A request between the scheduler's thread, which denoises it, and the event loop, which answers it.

    deadline: on time.monotonic()'s clock.
    """

    def __init__(self, plan: Plan, texts: Texts, scheduler: Scheduler, deadline: float):
        self.scheduler, self.loop = scheduler, asyncio.get_running_loop()
        self.queue: asyncio.Queue = asyncio.Queue()
        self.answers: list[Answer] = []
        self.jobs: list[Job] = []
        whole = plan.prompt.fills or plan.config.constraint is not None
        numbers = number_equal([prefix.numpy().tobytes() for prefix in plan.prompt.prefixes])
        for prefix, number in zip(plan.prompt.prefixes, numbers.tolist(), strict=True):
            first = len(self.answers)
            self.answers += [Answer(texts, prefix, plan.stops, plan.limit, whole, plan.config.rewrites)
                             for _ in range(plan.config.num_return_sequences)]
            gap = Gap(prefix, plan.prompt.suffix, plan.gap, plan.prompt.text)
            self.jobs.append(Job(gap, plan.config, partial(self._notify, first), every_step=plan.body.stream,
                                 deadline=deadline, first=number * plan.config.num_return_sequences,
                                 stops=self.answers[first].complete if plan.stops else None))

    def _notify(self, first: int, copy: int | None, event) -> None:
        """Called from the scheduler's thread."""
        if not self.loop.is_closed():
            number = None if copy is None else first + copy
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (number, event))

    def submit(self) -> None:
        """Raises: UserError or Failure if the scheduler refuses a job; then none is denoised."""
        try:
            for job in self.jobs:
                self.scheduler.submit(job)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        for job in self.jobs:
            self.scheduler.cancel(job)

    async def steps(self) -> AsyncIterator[tuple[int, str, bool]]:
        """Each denoising step of each answer: its number, the text that is certain since, and whether it is done.

        Raises: RequestError if the request fails.
        """
        left = len(self.answers)
        while left:
            number, event = await self.queue.get()
            if number is None:
                raise as_request_error(event)
            new = self.answers[number].update(event)
            left -= event.done
            yield number, new, event.done


class Form:
    """The shape of an endpoint's answers.

    Subclasses make the choices: those that open a stream (`opening`), one that adds text (`delta`), the last one of an
    answer (`end`), and that of an answer that is not streamed (`final`).
    """

    object_name: str
    stream_name: str
    prefix: str  # begins the id of an answer

    def __init__(self, model: str, plan: Plan, answers: list[Answer]):
        self.plan, self.answers = plan, answers
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def usage(self) -> dict:
        given = self.plan.prompt
        prompt = sum(map(len, given.prefixes)) + len(given.suffix) + (0 if given.text is None else len(given.text))
        new = sum(answer.tokens for answer in self.answers)
        steps = [answer.progress.steps for answer in self.answers]
        forwards = sum(answer.progress.forwards for answer in self.answers)
        filled = sum(len(answer.progress.tokens) for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
                "denoising_steps": max(steps), "tokens_per_forward": round(filled / max(forwards, 1), 3)}

    def chunk(self, *choices: dict, **more) -> dict:
        return {**self.head, "object": self.stream_name, "choices": [*choices], **more}

    def draft(self, number: int) -> dict:
        answer = self.answers[number]
        slots, progress = answer.draft(), answer.progress
        text = "".join(MASK_GLYPH if slot is None else slot for slot, _ in slots)
        return self.chunk(self.delta(number, answer.text if progress.done else text), diffusion={
            "replace": True, "step": progress.steps, "done": progress.done, "tokens": slots})

    def whole(self) -> dict:
        config = self.plan.config
        diffusion = {"seed": config.seed, "method": config.method, "cache": config.cache,
                     "threshold": config.threshold, "length": len(self.answers[0].progress.tokens)}
        return {**self.head, "object": self.object_name, "choices": list(map(self.final, range(len(self.answers)))),
                "usage": self.usage(), "diffusion": diffusion}


class TextForm(Form):
    object_name = stream_name = "text_completion"
    prefix = "cmpl"

    def _echo(self, number: int) -> str:
        echo = self.plan.prompt.echo
        return echo[number // self.plan.config.num_return_sequences] if echo else ""

    def opening(self) -> list[dict]:
        return [self.delta(number, self._echo(number)) for number in range(len(self.answers)) if self._echo(number)]

    def delta(self, number: int, text: str, finish_reason: str | None = None) -> dict:
        return {"index": number, "text": text, "finish_reason": finish_reason, "logprobs": None}

    def end(self, number: int) -> dict:
        return self.delta(number, "", self.answers[number].finish_reason)

    def final(self, number: int) -> dict:
        answer = self.answers[number]
        return self.delta(number, self._echo(number) + answer.text, answer.finish_reason)


class ChatForm(Form):
    object_name, stream_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict]:
        return [{"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                for number in range(len(self.answers))]

    def delta(self, number: int, text: str) -> dict:
        return {"index": number, "delta": {"content": text}, "finish_reason": None}

    def end(self, number: int) -> dict:
        return {"index": number, "delta": {}, "finish_reason": self.answers[number].finish_reason}

    def final(self, number: int) -> dict:
        answer = self.answers[number]
        return {"index": number, "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason, "logprobs": None}


class EditForm(ChatForm):
    object_name, stream_name, prefix = "edit.completion", "edit.completion.chunk", "edit"


async def whole(exchange: Exchange, form: Form, metrics: Metrics, http: Request) -> dict:
    """Wait for the answers, or until the client disconnects, which cancels them."""
    async def finish() -> None:
        async for _ in exchange.steps():
            pass

    finishing, watch = asyncio.create_task(finish()), asyncio.create_task(until_disconnected(http))
    try:
        await asyncio.wait({finishing, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not finishing.done():
            raise RequestError(499, "the client has gone")
        finishing.result()
    finally:
        finishing.cancel()
        watch.cancel()
        exchange.cancel()
    metrics.tokens.inc(sum(answer.tokens for answer in exchange.answers))
    return form.whole()


async def until_disconnected(http: Request) -> None:
    while not await http.is_disconnected():
        await asyncio.sleep(0.1)


async def stream(exchange: Exchange, form: Form, metrics: Metrics) -> AsyncIterator[str]:
    """The lines of a stream of server-sent events. Its end, or the client's, cancels what is not denoised."""
    body = form.plan.body
    try:
        for choice in form.opening():
            yield event_line(form.chunk(choice))
        async for number, new, done in exchange.steps():
            if body.diffusing:
                yield event_line(form.draft(number))
            elif new:
                yield event_line(form.chunk(form.delta(number, new)))
            if done:
                yield event_line(form.chunk(form.end(number)))
        metrics.tokens.inc(sum(answer.tokens for answer in exchange.answers))
        if (body.stream_options or {}).get("include_usage"):
            yield event_line(form.chunk(usage=form.usage()))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield event_line(error.body())
    finally:
        exchange.cancel()


def event_line(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
