"""A load generator: sends completions of random lengths, some at a time, and measures latency and throughput."""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator

import httpx
from rich.console import Console
from rich.table import Table

from dllm.errors import UserError


def measure(url: str, *, requests: int, concurrency: int, max_tokens: int, prompt: str, stream: bool = False,
            seed: int = 0, api_key: str | None = None, extra: dict | None = None) -> dict:
    """Send `requests` completions of max_tokens // 4 to max_tokens tokens, `concurrency` at a time.

    extra: further fields of each request.
    Returns: the settings, seconds, tokens and requests a second, errors by status, and percentiles of the latency and,
        with `stream`, of the time to the first canvas, in seconds.
    Raises: UserError if no server answers, or numbers are out of range.
    """
    if min(requests, concurrency, max_tokens) < 1:
        raise UserError("requests, concurrency and max_tokens must be at least 1")
    return asyncio.run(_measure(url.rstrip("/"), requests, concurrency, max_tokens, prompt, stream, seed, api_key,
                                extra or {}))


async def _measure(url, requests, concurrency, max_tokens, prompt, stream, seed, api_key, extra) -> dict:
    draw = random.Random(seed)
    bodies = [{"prompt": prompt, "max_tokens": draw.randint(max(max_tokens // 4, 1), max_tokens), "seed": number,
               "stream": stream, "diffusing": stream, "stream_options": {"include_usage": True}, **extra}
              for number in range(requests)]
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    latencies, firsts, tokens, steps, errors = [], [], 0, 0, Counter()
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=600) as client:
        try:
            await client.get(f"{url}/health")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"no server answers at {url} ({error or type(error).__name__}); start one with "
                            "dllm serve") from None

        async def work(bodies: Iterator[dict]) -> None:
            nonlocal tokens, steps
            for body in bodies:
                began = time.perf_counter()
                try:
                    usage, first = await send(client, url, body)
                except httpx.HTTPStatusError as error:
                    errors[str(error.response.status_code)] += 1
                except httpx.HTTPError as error:
                    errors[type(error).__name__] += 1
                else:
                    latencies.append(time.perf_counter() - began)
                    if first is not None:
                        firsts.append(first - began)
                    tokens += usage["completion_tokens"]
                    steps += usage["denoising_steps"]

        waiting = iter(bodies)
        began = time.perf_counter()
        await asyncio.gather(*(work(waiting) for _ in range(concurrency)))
        seconds = time.perf_counter() - began
    return {
        "url": url, "requests": requests, "concurrency": concurrency, "max_tokens": max_tokens, "stream": stream,
        "seed": seed, "seconds": seconds, "answered": len(latencies), "errors": errors, "tokens": tokens,
        "tokens_per_second": tokens / seconds, "requests_per_second": len(latencies) / seconds,
        "denoising_steps": steps, "latency": percentiles(latencies), "first_canvas": percentiles(firsts)}


async def send(client: httpx.AsyncClient, url: str, body: dict) -> tuple[dict, float | None]:
    """(usage that the server reports, time at which the first canvas came; None without a stream)"""
    if not body["stream"]:
        response = await client.post(f"{url}/v1/completions", json=body)
        response.raise_for_status()
        return response.json()["usage"], None
    first, usage = None, None
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
                usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
    if usage is None:
        raise httpx.RemoteProtocolError("the stream ended before its usage")
    return usage, first


def percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    cuts = statistics.quantiles(values if len(values) > 1 else 2 * values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(values)}


def table(record: dict) -> str:
    rows = Table("", "p50", "p90", "p99", "max", title=f"{record['answered']} of {record['requests']} requests "
                 f"answered, {record['concurrency']} at a time, in {record['seconds']:.2f} s")
    for name, values in (("latency, ms", record["latency"]), ("first canvas, ms", record["first_canvas"])):
        if values is not None:
            rows.add_row(name, *(f"{1000 * value:.1f}" for value in values.values()))
    console = Console(width=80, file=None)
    with console.capture() as captured:
        console.print(rows)
    errors = ", ".join(f"{count} x {name}" for name, count in sorted(record["errors"].items())) or "none"
    return (f"{captured.get()}{record['tokens_per_second']:,.1f} tokens/s, {record['requests_per_second']:.2f} "
            f"requests/s; errors: {errors}")
