"""dllm serve and dllm bench-serve."""

import argparse
import os
from pathlib import Path

from dllm.cli.flags import Parser, add_model, load_model, path, whole
from dllm.cli.generate import folder_defaults, settings_of_flags
from dllm.config.fields import add_fields, given
from dllm.errors import UserError
from dllm.files import check_outputs, write_json
from dllm.generation.config import MDMGenerationConfig
from dllm.server.limits import ServerLimits


def add_commands(commands) -> None:
    commands.add_parser(
        "serve", fill=add_serve, help="serve a model over HTTP: OpenAI's API, fill-in-the-middle, and a page",
        description="Serve a model: OpenAI's chat and completions, with suffix, fim and edit as Mercury has them, a\n"
                    "stream of the canvas being denoised, and a page at /. The flags about denoising are the defaults\n"
                    "of requests. SIGTERM ends it when all requests are answered.")
    commands.add_parser(
        "bench-serve", fill=add_bench, help="measure a server's latency and throughput",
        description="Send completions of random lengths to a server, some at the same time, and print a table.")


def add_serve(serve: Parser) -> None:
    add_model(serve)
    serve.add_argument("--name", metavar="NAME", help="that clients call the model; default: the folder's")
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; any other needs --api-key")
    serve.add_argument("--port", type=whole, default=8000, help="default: 8000")
    serve.add_argument("--api-key", metavar="KEY", help="that requests must send; default: DLLM_API_KEY, or none")
    add_fields(serve, ServerLimits, leave_out=("max_body",))
    add_fields(serve, MDMGenerationConfig, leave_out=("seed", "num_return_sequences", "mask_token_id"))
    serve.set_defaults(run=run_serve)


def add_bench(bench: Parser) -> None:
    bench.add_argument("url", metavar="URL", help="of the server, as http://127.0.0.1:8000")
    for flag, default, text in (("--requests", 64, "to send"), ("--concurrency", 16, "at a time"),
                                ("--max-tokens", 64, "of the longest answer"), ("--seed", 0, "of the lengths")):
        bench.add_argument(flag, type=whole, default=default, metavar="N", help=f"{text}; default: {default}")
    bench.add_argument("--prompt", default="def fibonacci(n):\n", metavar="TEXT", help="of every request")
    bench.add_argument("--stream", action="store_true", help="ask for the canvas of every step, and time the first one")
    bench.add_argument("--api-key", metavar="KEY", help="default: DLLM_API_KEY, or none")
    bench.add_argument("--output", type=path, metavar="FILE", help="write the numbers here, as JSON")
    bench.set_defaults(run=run_bench_serve)


def run_serve(args: argparse.Namespace) -> int:
    key = args.api_key or os.environ.get("DLLM_API_KEY") or None
    if args.host not in ("127.0.0.1", "::1", "localhost") and key is None:
        raise UserError(f"--host {args.host} is open to others, so --api-key (or DLLM_API_KEY) is needed")
    try:
        from dllm.server.app import make_app
        from dllm.server.listening import bind, serve
    except ImportError as error:
        raise UserError(f"dllm serve needs {error.name}: pip install 'dllm[serve]'") from None
    defaults = MDMGenerationConfig(**settings_of_flags(args))
    limits = ServerLimits(api_key=key, **given(args, ServerLimits))
    listening = bind(args.host, args.port)  # before the model is loaded, which can take minutes
    with listening:
        model, tokenizer = load_model(args)
        defaults = folder_defaults(defaults, args, model)
        name = args.name or Path(args.model).resolve().name
        serve(make_app(model, tokenizer, name, defaults, limits), listening)
    return 0


def run_bench_serve(args: argparse.Namespace) -> int:
    try:
        from dllm.server.bench import measure, table
    except ImportError as error:
        raise UserError(f"dllm bench-serve needs {error.name}: pip install 'dllm[serve]'") from None
    check_outputs({"--output": args.output}, [])
    record = measure(args.url, requests=args.requests, concurrency=args.concurrency, max_tokens=args.max_tokens,
                     prompt=args.prompt, stream=args.stream, seed=args.seed,
                     api_key=args.api_key or os.environ.get("DLLM_API_KEY"))
    print(table(record))
    if args.output is not None:
        write_json(args.output, record)
    return 0
