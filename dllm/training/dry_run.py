"""The plan of a training run, without running it: dllm train CONFIG --dry-run."""

import os
from functools import cache

import torch

from dllm.config.schema import Config
from dllm.data import open_training_data, read_corpus
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.tokenizer import anchor_token_id
from dllm.model.transformer import Transformer
from dllm.training.build import check_apart, choose_model, freeze
from dllm.training.cost import estimate_memory
from dllm.training.distributed import World, choose_device
from dllm.training.lora import add_adapters
from dllm.training.optimizer import count_states
from dllm.training.precision import settle_precision
from dllm.training.trainer import count_steps


def plan(config: Config) -> str:
    """The resolved configuration as YAML, followed by its consequences as comments.

    Raises: UserError for anything that would keep the run from starting.
    """
    settings, processes = config.train, int(os.environ.get("WORLD_SIZE", 1))
    check_apart(config)
    read = cache(lambda: read_corpus(config.data))
    tokenizer, model_config, _ = choose_model(config, read, None)
    corpus = read()
    with torch.device("meta"):
        model = (Transformer if model_config.canvas_length is None else DiffusionGemma)(model_config)
        freeze(model, settings.frozen_names)
        if settings.lora_rank:
            add_adapters(model, settings.lora_rank, settings.lora_alpha)
    parameters, trainable = model.count_parameters(), model.count_parameters(trainable=True)
    data = open_training_data(corpus, tokenizer, settings.seed, settings.rows_per_step,
                              anchor=anchor_token_id(tokenizer), alone=settings.objective == "canvas")
    settled, found = settle_precision(config, model_config, None, World(0, 1, choose_device(settings)))
    bf16 = settled.train.precision == "bf16"
    length = config.data.max_seq_len + (model_config.canvas_length or 0)
    memory = estimate_memory(model_config, parameters, trainable, count_states(model, settings), settings,
                             settings.micro_batch_size * length, processes, bf16)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if size)
    rows, trained = settings.rows_per_step, f", {trainable:,} of them trained" if trainable < parameters else ""
    micro_batches = rows * settings.ulysses_parallel_size // (settings.micro_batch_size * processes)
    return "\n# ".join((
        config.to_yaml() + f"# parameters: {parameters:,}{trained}",
        f"arithmetic: {settled.train.precision}{f' ({found.describe()})' if found else ''}",
        f"memory of each of {processes} processes, estimated: {sum(memory.values()) / 2**30:.2f} GiB ({parts})",
        f"a step: {rows} rows, at most {rows * config.data.max_seq_len:,} tokens; micro-batches of each process: "
        f"{micro_batches}",
        f"steps: {count_steps(config, data):,}; {data.describe()}"))
