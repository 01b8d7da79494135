"""dllm data, dllm export and dllm quantize."""

import argparse
import json
import os

from dllm.cli.flags import Parser, add_tokenizer, given_tokenizer, path, whole
from dllm.config.fields import add_fields, given
from dllm.errors import UserError
from dllm.files import check_new_folder

_INSPECTED = 256  # tokens of a row that `data inspect` shows, unless a flag says otherwise
# Settings that dllm data does not use.
_TRAINING = ("train_path", "datasets_type", "num_workers", "train_size", "validation_share")


def add_commands(commands) -> None:
    commands.add_parser(
        "export", fill=add_export, help="write a trained model as a folder to publish, or upload it to the hub",
        description="Write the newest checkpoint of a run as a folder: weights, configuration, tokenizer, generation\n"
                    "defaults, a model card, and dllm_run.json, which says what made it.")
    commands.add_parser(
        "quantize", fill=add_quantize, help="write a model with int8 weights, to sample, evaluate and serve",
        description="Write a model as a new folder, the linear maps inside its layers as int8 with one scale a row.\n"
                    "sample, infill, eval and serve load it as any other; it cannot be trained.")
    commands.add_parser("data", fill=add_actions, help="download, count or look at training data",
                        description="Download, count or look at training data.")


def add_export(export: Parser) -> None:
    export.add_argument("source", type=os.path.expanduser, metavar="RUN",
                        help="train.output_dir of a run, or one of its folders global_step_N")
    export.add_argument("--output-dir", type=path, required=True, metavar="DIR", help="a new folder")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
                        help="of the weights; default: float32")
    add_tokenizer(export)
    export.add_argument("--push", metavar="OWNER/NAME", help="then upload it as this repository of the hub")
    export.add_argument("--private", action="store_true", help="with --push: a private repository, if it is new")
    export.set_defaults(run=run_export)


def add_quantize(quantize: Parser) -> None:
    quantize.add_argument("model", type=os.path.expanduser, metavar="MODEL",
                          help="folder, hub repository as owner/name, or GGUF file")
    quantize.add_argument("--bits", type=whole, default=8, metavar="N", help="of a weight; default, and supported: 8")
    quantize.add_argument("--output", type=path, required=True, metavar="DIR", help="a new folder")
    add_tokenizer(quantize)
    quantize.set_defaults(run=run_quantize)


def add_actions(data: Parser) -> None:
    from dllm.config.schema import DataGroup

    actions = data.add_subparsers(metavar="ACTION", required=True)

    download = actions.add_parser(
        "download", help="fetch a dataset of the Hugging Face hub",
        description="Fetch a dataset of the hub: then data.train_path may name it without a network, or with\n"
                    "--output-dir the folder of Parquet files.")
    download.add_argument("dataset", metavar="DATASET", help="owner/name, owner/name:config or owner/name@split")
    download.add_argument("--output-dir", type=path, metavar="DIR", help="write it here as Parquet files")
    download.set_defaults(run=run_data_download)

    for name, text, run in (
            ("count", "documents, bytes, tokens and rows, as JSON", run_data_count),
            ("inspect", "some rows as text, what of it is learnt, and a corrupted copy", run_data_inspect)):
        action = actions.add_parser(name, help=text, description=f"Show {text}.")
        action.add_argument("paths", metavar="PATHS", help="what data.train_path takes: folders, files and datasets of "
                                                           "the hub, separated by commas, each with or without *weight")
        action.add_argument("--tokenizer", type=os.path.expanduser, required=True, metavar="TOKENIZER",
                            help="folder, or hub repository as owner/name")
        add_tokenizer(action)
        add_fields(action, DataGroup, leave_out=_TRAINING,
                   defaults={"max_seq_len": str(_INSPECTED)} if name == "inspect" else None)
        if name == "inspect":
            action.add_argument("--rows", type=whole, default=2, metavar="N", help="to show; default: 2")
            action.add_argument("--seed", type=whole, default=0, metavar="N", help="of the order; default: 0")
        action.set_defaults(run=run)


def run_export(args: argparse.Namespace) -> int:
    import torch

    from dllm.training.export import export, push

    if args.private and not args.push:
        raise UserError("--private goes with --push")
    print(export(args.source, args.output_dir, getattr(torch, args.dtype), **given_tokenizer(args)))
    if args.push:
        print(push(args.output_dir, args.push, args.private))
    return 0


def run_quantize(args: argparse.Namespace) -> int:
    from dllm.model.loading import is_diffusion_gemma
    from dllm.model.quantised import quantise
    from dllm.model.tokenizer import load_tokenizer
    from dllm.model.transformer import Transformer
    from dllm.model.weights import find_model

    check_new_folder(args.output)
    folder = find_model(args.model)
    if is_diffusion_gemma(folder):
        raise UserError(f"{args.model} is a DiffusionGemma, which cannot be quantised here; use it as it is")
    model = Transformer.from_pretrained(folder, "auto", **given_tokenizer(args))
    quantise(model, args.bits)
    tokenizer = load_tokenizer(folder, model.mask_token_id, trust_remote_code=args.trust_remote_code)
    tokenizer.save_pretrained(args.output)  # first, because the model's config.json makes the folder whole
    model.save_pretrained(args.output)
    print(args.output)
    return 0


def run_data_download(args: argparse.Namespace) -> int:
    from dllm.data.finding import find_shards, write_parquet

    shards = find_shards([args.dataset])
    if not shards or shards[0].table is None:
        raise UserError(f"{args.dataset} is a local path, there is nothing to download; give a dataset of the hub, as "
                        "owner/name")
    records = len(shards[0].table)
    if args.output_dir is not None:
        write_parquet(shards[0].table, args.output_dir)
    print(f"{records:,} records of {args.dataset}; train with --data.train_path={args.output_dir or args.dataset}")
    return 0


def open_data(args: argparse.Namespace, seed: int = 0, **defaults):
    """(corpus, tokenizer, training data) that the flags name, with nothing held out."""
    from dllm.config.schema import DataGroup
    from dllm.data import open_training_data, read_corpus
    from dllm.model.tokenizer import anchor_token_id, check_separator, load_tokenizer

    group = DataGroup(train_path=args.paths, validation_share=0.0, **defaults | given(args, DataGroup))
    corpus, tokenizer = read_corpus(group), load_tokenizer(args.tokenizer, **given_tokenizer(args))
    check_separator(tokenizer)
    return corpus, tokenizer, open_training_data(corpus, tokenizer, seed, anchor=anchor_token_id(tokenizer))


def run_data_count(args: argparse.Namespace) -> int:
    corpus, _, data = open_data(args)
    length, rows = corpus.group.max_seq_len, data.rows_per_epoch
    print(json.dumps({"documents": data.documents, "bytes": corpus.num_bytes, "tokens": data.tokens,
                      "bytes_per_token": round(corpus.num_bytes / data.tokens, 3), "max_seq_len": length, "rows": rows,
                      "packing": round(data.tokens / (rows * length), 4)}, indent=2))
    return 0


def run_data_inspect(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dllm.training.showing import show_rows

    _, tokenizer, data = open_data(args, args.seed, max_seq_len=_INSPECTED)
    show_rows(data.rows.read(range(max(1, args.rows))), tokenizer, args.seed, Console(highlight=False))
    return 0
