"""dllm sample and dllm infill."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace

from dllm.cli.flags import Parser, add_model, load_model, path, read_text, utf8, whole
from dllm.config.fields import add_fields, given
from dllm.errors import UserError
from dllm.files import check_outputs, decode_text, write_atomically, write_json
from dllm.generation.config import MDMGenerationConfig, published_settings


def add_commands(commands) -> None:
    commands.add_parser(
        "sample", fill=add_sample, help="continue a prompt",
        description="Continue a prompt. The text goes to stdout, a line about the run to stderr.")
    commands.add_parser("infill", fill=add_infill, help="fill in a gap in a text",
                        description="Fill in a gap of --length tokens. The whole text goes to stdout.")


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


def add_generation(parser: Parser, *leave_out: str) -> None:
    """Flags for every setting, and for constraints, display and output files."""
    add_fields(parser, MDMGenerationConfig, leave_out=("mask_token_id", *leave_out),
               defaults={"seed": "drawn anew, and printed"})
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument("--regex", type=utf8, metavar="PATTERN",
                            help="the new text must match this regular expression")
    constraint.add_argument("--json-schema", type=path, metavar="FILE", help="it must be JSON that this schema accepts")
    parser.add_argument("--watch", action="store_true", help="show the text being unmasked, coloured by confidence")
    parser.add_argument("--save-html", type=path, metavar="FILE", help="write a page here that shows it step by step")
    parser.add_argument("--output", type=path, metavar="FILE",
                        help="write the texts, the settings and the counts here, as JSON")


def length(text: str) -> int | str:
    return text if text == "auto" else whole(text)


def run_sample(args: argparse.Namespace) -> int:
    from dllm.generation.canvas import fit_folder_settings
    from dllm.generation.infilling import Gap
    from dllm.generation.sampler import generate
    from dllm.model.tokenizer import cut_at_end, decode_after, encode_with_masks, fill_masks

    check_outputs({"--output": args.output, "--save-html": args.save_html},
                  [args.prompt_file, args.json_schema, args.model])
    prompt = read_prompt(args)
    config = generation_config(args)
    model, tokenizer = load_model(args)
    ids = encode_with_masks(tokenizer, prompt)
    config = folder_defaults(config, args, model, constraint=read_constraint(args, tokenizer, model))
    config = fit_folder_settings(model, config, vars(args), len(ids))
    out, seconds, traces = denoise_shown(args, config, model, tokenizer, Gap(ids, ids[:0], config.max_new_tokens),
                                         lambda on_step: generate(model, ids.unsqueeze(0), None, config, on_step))
    rows = list(out.sequences.cpu())
    if out.attention_mask is not None:
        rows = [row[seen] for row, seen in zip(rows, out.attention_mask.cpu(), strict=True)]
    prompts = [fill_masks(tokenizer, prompt, row[:len(ids)]) for row in rows]
    texts = [decode_after(tokenizer, row[:len(ids)], cut_at_end(tokenizer, row[len(ids):])) for row in rows]
    if not args.watch:
        print_texts([before + text for before, text in zip(prompts, texts, strict=True)])
    filled = {} if {prompt} == {*prompts} else {"filled_prompts": prompts}
    finish(args, config, out, seconds, {"prompt": prompt, **filled, "texts": texts}, tokenizer, traces)
    return 0


def run_infill(args: argparse.Namespace) -> int:
    from dllm.generation.infilling import Gap, fill, settle_length
    from dllm.model.tokenizer import decode_after, encode

    check_outputs({"--output": args.output, "--save-html": args.save_html}, [args.file, args.json_schema, args.model])
    before, after = read_gap(args)
    config = generation_config(args)
    model, tokenizer = load_model(args)
    config = folder_defaults(config, args, model, constraint=read_constraint(args, tokenizer, model))
    gap = Gap(encode(tokenizer, before), encode(tokenizer, after, after=True), args.length)
    gap = settle_length(model, gap, config)
    filled, seconds, traces = denoise_shown(args, config, model, tokenizer, gap,
                                            lambda on_step: fill(model, [gap], config, on_step=on_step))
    out = filled.output
    texts = [decode_after(tokenizer, gap.prefix, answer) for answer in filled.answers]
    if not args.watch:
        print_texts([before + text + after for text in texts])
    finish(args, config, out, seconds, {"prefix": before, "suffix": after, "texts": texts}, tokenizer, traces)
    return 0


def generation_config(args: argparse.Namespace) -> MDMGenerationConfig:
    """The settings that the flags give, with a seed drawn if they give none."""
    import secrets  # slow to import, and --help needs none

    return MDMGenerationConfig(**{"seed": secrets.randbelow(2**31), **given(args, MDMGenerationConfig)})


def folder_defaults(config: MDMGenerationConfig, args: argparse.Namespace, model, **more) -> MDMGenerationConfig:
    """The settings with those of the model's generation_config.json, where no flag gives another."""
    published = published_settings(model.generation_defaults)
    return replace(config, **{name: value for name, value in published.items() if not hasattr(args, name)}, **more)


def read_constraint(args: argparse.Namespace, tokenizer, model):
    from dllm.constraints import Regex, json_schema

    if args.regex is not None:
        return Regex(args.regex, tokenizer, model.config.vocab_size)
    if args.json_schema is not None:
        return json_schema(read_text(args.json_schema), tokenizer, model.config.vocab_size)
    return None


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        return read_text(args.prompt_file)
    try:
        return "" if sys.stdin.isatty() else decode_text(sys.stdin.buffer.read())
    except UnicodeDecodeError:
        raise UserError("the prompt on standard input is not UTF-8 text; convert it") from None


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


def denoise_shown(args: argparse.Namespace, config, model, tokenizer, gap, run: Callable):
    """Call run(on_step), and draw each step with --watch.

    Returns: (its output, seconds, a trace of each text for --save-html).
    """
    from dllm.generation.infilling import lay_out
    from dllm.generation.sampler import find_mask_token

    shown, traces = nullcontext(), []
    if args.watch or args.save_html is not None:
        from dllm.pages.denoising import Trace, watch

        mask_token_id = find_mask_token(model, config)
        canvas, _ = lay_out([gap] * config.num_return_sequences, mask_token_id)
        kind = config.method
        if args.watch:
            shown = watch(tokenizer, canvas, mask_token_id, kind)
        if args.save_html is not None:
            traces = [Trace(row, mask_token_id, kind, index) for index, row in enumerate(canvas)]
    start = time.perf_counter()
    with shown as draw:
        def on_step(step) -> None:
            for note in (*traces, *([draw] if args.watch else [])):
                note(step)

        out = run(on_step)
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
