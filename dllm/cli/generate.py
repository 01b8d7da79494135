"""dllm sample, dllm infill and dllm edit."""

import argparse
import shlex
import sys
import time
from collections.abc import Container
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from dllm.cli.flags import Parser, add_model, load_model, path, read_text, utf8, whole
from dllm.config.fields import add_fields, given, settings_of
from dllm.errors import UserError, warn
from dllm.files import check_outputs, decode_text, write_atomically, write_json
from dllm.generation.config import EDIT_SETTINGS, OF_ALGS, MDMGenerationConfig, published_settings

DRAWN = {"seed": "drawn anew, and printed"}


def add_commands(commands) -> None:
    commands.add_parser(
        "sample", fill=add_sample, help="continue a prompt",
        description="Continue a prompt. The text goes to stdout, a line about the run to stderr.")
    commands.add_parser("infill", fill=add_infill, help="fill in a gap in a text",
                        description="Fill in a gap of --length tokens. The whole text goes to stdout.")
    commands.add_parser(
        "edit", fill=add_edit, help="insert, delete and substitute tokens of a text",
        description="Edit a text by a model with heads for edits (Edit Flows). The edited text goes to stdout.\n"
                    "A model that was trained to insert alone deletes and substitutes nothing.")


def add_sample(sample: Parser) -> None:
    add_model(sample)
    source = sample.add_mutually_exclusive_group()
    source.add_argument("--prompt", type=utf8, metavar="TEXT", help="default: standard input, or nothing on a "
                        "terminal; the mask token's text in it is filled too")
    source.add_argument("--prompt-file", type=path, metavar="FILE")
    add_generation(sample)
    sample.set_defaults(run=run_sample)


def add_infill(infill: Parser) -> None:
    add_model(infill)
    infill.add_argument("--prefix", type=utf8, metavar="TEXT", help="the text before the gap")
    infill.add_argument("--suffix", type=utf8, metavar="TEXT", help="the text after the gap")
    infill.add_argument("--file", type=path, metavar="FILE", help="or: a text that has the marker at the gap")
    infill.add_argument("--marker", type=utf8, default="<FILL>", metavar="TEXT", help="default: <FILL>")
    infill.add_argument("--length", type=length, default="auto", metavar="N",
                        help="tokens to fill in; auto, the default, tries several and takes the most confident")
    add_generation(infill, "max_new_tokens")
    infill.set_defaults(run=run_infill)


def add_edit(edit: Parser) -> None:
    add_model(edit)
    source = edit.add_mutually_exclusive_group()
    source.add_argument("--file", type=path, metavar="FILE", help="the text to edit; default: standard input. The file "
                        "stays as it is")
    source.add_argument("--text", type=utf8, metavar="TEXT", help="or the text itself")
    edit.add_argument("--max-new-tokens", type=whole, default=argparse.SUPPRESS, metavar="N",
                      help="tokens that the text may grow by; default: 128")
    others = (name for name in settings_of(MDMGenerationConfig) if name not in EDIT_SETTINGS)
    add_fields(edit, MDMGenerationConfig, leave_out=("mask_token_id", "max_new_tokens", *others), defaults=DRAWN)
    add_outputs(edit)
    edit.set_defaults(run=run_edit, alg="edit", regex=None, json_schema=None)


def add_generation(parser: Parser, *leave_out: str) -> None:
    """Flags for every setting, and for constraints, display and output files."""
    add_fields(parser, MDMGenerationConfig, leave_out=("mask_token_id", *leave_out), defaults=DRAWN)
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument("--regex", type=utf8, metavar="PATTERN",
                            help="the new text must match this regular expression")
    constraint.add_argument("--json-schema", type=path, metavar="FILE", help="it must be JSON that this schema accepts")
    add_outputs(parser)


def add_outputs(parser: Parser) -> None:
    parser.add_argument("--watch", action="store_true", help="show the text as it changes, coloured by confidence")
    parser.add_argument("--save-html", type=path, metavar="FILE", help="write a page here that shows it step by step")
    parser.add_argument("--output", type=path, metavar="FILE",
                        help="write the texts, the settings and the counts here, as JSON")


def length(text: str) -> int | str:
    return text if text == "auto" else whole(text)


def run_sample(args: argparse.Namespace) -> int:
    from dllm.generation.canvas import fit_folder_settings
    from dllm.generation.sampler import start
    from dllm.model.tokenizer import anchor, begin_text, cut_at_end, decode_after, encode_with_masks, fill_masks

    check_outputs({"--output": args.output, "--save-html": args.save_html},
                  [args.prompt_file, args.json_schema, args.model])
    prompt = read_source(args.prompt, args.prompt_file, "the prompt")
    config = generation_config(args)
    model, tokenizer = load_model(args)
    ids = begin_text(tokenizer, encode_with_masks(tokenizer, prompt))
    config = folder_defaults(config, args, model, constraint=read_constraint(args, tokenizer, model))
    config = fit_folder_settings(model, config, vars(args), len(ids))
    if config.edits:
        ids = anchor(tokenizer, ids)
        if (ids == tokenizer.mask_token_id).any():
            raise UserError("alg edit fills one gap, after the prompt; take the mask token out, or use dllm infill")
    out, seconds, traces = denoise_shown(args, tokenizer, start(model, ids.unsqueeze(0), None, config))
    rows = out.rows()
    prompts = [fill_masks(tokenizer, prompt, row[:len(ids)]) for row in rows]
    texts = [decode_after(tokenizer, row[:len(ids)], cut_at_end(tokenizer, row[len(ids):])) for row in rows]
    if not args.watch:
        print_texts([before + text for before, text in zip(prompts, texts, strict=True)])
    filled = {} if {prompt} == {*prompts} else {"filled_prompts": prompts}
    finish(args, config, out, seconds, {"prompt": prompt, **filled, "texts": texts}, tokenizer, traces)
    return 0


def run_infill(args: argparse.Namespace) -> int:
    from dllm.generation.infilling import Gap, begin, settle_length
    from dllm.model.tokenizer import anchor, decode_after, encode

    check_outputs({"--output": args.output, "--save-html": args.save_html}, [args.file, args.json_schema, args.model])
    before, after = read_gap(args)
    config = generation_config(args)
    model, tokenizer = load_model(args)
    config = folder_defaults(config, args, model, constraint=read_constraint(args, tokenizer, model))
    prefix, suffix = encode(tokenizer, before), encode(tokenizer, after, after=True)
    prefix = anchor(tokenizer, prefix) if config.edits else prefix
    gap = settle_length(model, Gap(prefix, suffix, args.length), config)
    out, seconds, traces = denoise_shown(args, tokenizer, begin(model, [gap], config)[0])
    texts = [decode_after(tokenizer, gap.prefix, gap.inside(row)) for row in out.rows()]
    if not args.watch:
        print_texts([before + text + after for text in texts])
    finish(args, config, out, seconds, {"prefix": before, "suffix": after, "texts": texts}, tokenizer, traces)
    return 0


def run_edit(args: argparse.Namespace) -> int:
    from dllm.generation.infilling import Gap, begin
    from dllm.model.tokenizer import decode_after, encode, frame

    check_outputs({"--output": args.output, "--save-html": args.save_html}, [args.file, args.model])
    text = read_source(args.text, args.file, "the text")
    if not text:
        raise UserError("the text to edit is empty; give one by --file or --text, or write one by dllm sample")
    config = generation_config(args)
    model, tokenizer = load_model(args)
    config = folder_defaults(config, args, model, EDIT_SETTINGS)
    if model.config.edit_heads == "insert":
        warn("this model only inserts: it deletes and substitutes nothing")
    ids = encode(tokenizer, text)
    gap = Gap(*frame(tokenizer, ids[:0], ids[:0]), len(ids), ids)
    out, seconds, traces = denoise_shown(args, tokenizer, begin(model, [gap], config)[0])
    texts = [decode_after(tokenizer, gap.prefix, gap.inside(row)) for row in out.rows()]
    if not args.watch:
        print_texts([text.removesuffix("\n") for text in texts])
    finish(args, config, out, seconds, {"text": text, "texts": texts}, tokenizer, traces)
    return 0


def generation_config(args: argparse.Namespace) -> MDMGenerationConfig:
    """The settings that the flags give, with a seed drawn if they give none."""
    import secrets  # slow to import, and --help needs none

    return MDMGenerationConfig(**{"seed": secrets.randbelow(2**31), **settings_of_flags(args)})


def settings_of_flags(args: argparse.Namespace) -> dict:
    """What the flags give, without what only some algs take where the folder may name the alg (see
    `folder_defaults`)."""
    return {name: value for name, value in given(args, MDMGenerationConfig).items()
            if name not in OF_ALGS or hasattr(args, "alg")}


def folder_defaults(config: MDMGenerationConfig, args: argparse.Namespace, model, names: Container[str] | None = None,
                    **more) -> MDMGenerationConfig:
    """The settings with those of the model's generation_config.json, where no flag gives another. names: None: all."""
    published = {name: value for name, value in published_settings(model.generation_defaults).items()
                 if not hasattr(args, name) and (names is None or name in names)}
    waiting = {name: getattr(args, name) for name in OF_ALGS if hasattr(args, name)}
    return replace(config, **published, **waiting, **more)


def read_constraint(args: argparse.Namespace, tokenizer, model):
    from dllm.constraints import Regex, json_schema

    if args.regex is not None:
        return Regex(args.regex, tokenizer, model.config.vocab_size)
    if args.json_schema is not None:
        return json_schema(read_text(args.json_schema), tokenizer, model.config.vocab_size)
    return None


def read_source(text: str | None, file: Path | None, name: str) -> str:
    """The text of a flag, of a file or of standard input; an empty one if that is a terminal."""
    if text is not None:
        return text
    if file is not None:
        return read_text(file)
    try:
        return "" if sys.stdin.isatty() else decode_text(sys.stdin.buffer.read())
    except UnicodeDecodeError:
        raise UserError(f"{name} on standard input is not UTF-8 text; convert it") from None


def read_gap(args: argparse.Namespace) -> tuple[str, str]:
    if args.file is None:
        if args.prefix is None and args.suffix is None:
            raise UserError(f"give --prefix and --suffix, or --file FILE with {args.marker} at the gap")
        return args.prefix or "", args.suffix or ""
    if args.prefix is not None or args.suffix is not None:
        raise UserError("--file already has what comes before and after the gap; leave out --prefix and --suffix")
    parts = read_text(args.file).split(args.marker) if args.marker else []
    if len(parts) != 2:
        raise UserError(f"{args.file} must have the marker {args.marker!r} once, not {max(len(parts) - 1, 0)} times; "
                        "put it at the gap, or name another with --marker")
    return parts[0], parts[1]


def denoise_shown(args: argparse.Namespace, tokenizer, denoising):
    """Take all steps, and draw each with --watch.

    Returns: (the output, seconds, a trace of each text for --save-html).
    """
    from dllm.generation import sampler

    shown, traces = nullcontext(), []
    if args.watch or args.save_html is not None:
        from dllm.pages.denoising import trace_rows, watch

        traces = trace_rows(denoising)
        if args.watch:
            shown = watch(tokenizer, traces)
    start = time.perf_counter()
    with shown as draw:
        def on_step(step) -> None:
            if draw is not None:
                draw(step)
            else:
                for trace in traces:
                    trace(step)

        out = sampler.finish(denoising, on_step)
    return out, time.perf_counter() - start, traces


def print_texts(texts: list[str]) -> None:
    for index, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"--- {index} of {len(texts)} ---")
        print(text)


def finish(args: argparse.Namespace, config, out, seconds: float, texts: dict, tokenizer, traces: list) -> None:
    """Print a line about the run on stderr; write its record to --output and its page to --save-html."""
    counts = (f"{out.steps} steps, {out.forwards} forward passes, {out.tokens_per_forward:.2f} tokens in each, "
              f"{seconds:.2f} s, seed {config.seed}")
    print(counts, file=sys.stderr)
    constraint = args.regex if args.json_schema is None else str(args.json_schema)
    if args.output is not None:
        settings = {**asdict(replace(config, constraint=None)), "constraint": constraint}
        write_json(args.output, {"model": args.model, **texts, "settings": settings, "steps": out.steps,
                                 "forwards": out.forwards, "tokens_per_forward": out.tokens_per_forward,
                                 "seconds": round(seconds, 3)})
    if args.save_html is not None:
        from dllm.pages.demo import write_sample
        from dllm.pages.denoising import animation

        facts = {"Model": args.model, "Method": config.method, "Denoising steps": str(out.steps),
                 "Forward passes": str(out.forwards), "Tokens per forward pass": f"{out.tokens_per_forward:.2f}",
                 "Seconds": f"{seconds:.2f}", "Seed": str(config.seed)}
        page = write_sample([animation(trace, tokenizer) for trace in traces], facts, shlex.join(["dllm", *args.given]))
        write_atomically(args.save_html, page.encode("utf-8", "replace"))
