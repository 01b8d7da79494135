"""What a training run would be, without running it: dllm train CONFIG --dry-run."""

import os

import torch

from dllm.accounting import estimate_memory
from dllm.building import describe_model, freeze
from dllm.config import Config
from dllm.data import open_training_data, read_corpus
from dllm.distributed import choose_device, use_bf16
from dllm.lora import add_adapters
from dllm.model import DiffusionLM
from dllm.optimizer import count_states
from dllm.trainer import count_steps


def plan(config: Config) -> str:
    """The resolved configuration as YAML, then as comments what follows from it.

    Raises: UserError for all that would keep the run from beginning.
    """
    settings, processes = config.train, int(os.environ.get("WORLD_SIZE", 1))
    corpus = read_corpus(config.data)
    tokenizer, model_config, _ = describe_model(config, corpus, None)
    with torch.device("meta"):
        model = DiffusionLM(model_config)
        freeze(model, settings.frozen_names)
        if settings.lora_rank:
            add_adapters(model, settings.lora_rank, settings.lora_alpha)
    parameters, trainable = model.count_parameters(), model.count_parameters(trainable=True)
    data = open_training_data(corpus, tokenizer, settings.seed, settings.rows_per_step)
    bf16 = use_bf16(settings, choose_device(settings))
    memory = estimate_memory(model_config, parameters, trainable, count_states(model, settings), settings,
                             settings.micro_batch_size * config.data.max_seq_len, processes, bf16)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if size)
    rows, trained = settings.rows_per_step, f", {trainable:,} of them trained" if trainable < parameters else ""
    micro_batches = rows * settings.ulysses_parallel_size // (settings.micro_batch_size * processes)
    return "\n# ".join((
        config.to_yaml() + f"# parameters: {parameters:,}{trained}",
        f"memory of each of {processes} processes, estimated: {sum(memory.values()) / 2**30:.2f} GiB ({parts})",
        f"a step: {rows} rows, at most {rows * config.data.max_seq_len:,} tokens; micro-batches of each process: "
        f"{micro_batches}",
        f"steps: {count_steps(config, data):,}; {data.describe()}"))
