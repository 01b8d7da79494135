"""The tokenizer and the model that a run trains: new ones, those it starts from, or those of its checkpoint."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from dllm.checkpoint import Checkpoint
from dllm.config import Config, TrainGroup
from dllm.data import Corpus
from dllm.data.tokens import describe_rules
from dllm.distributed import World, use_bf16
from dllm.errors import UserError
from dllm.families import FAMILIES, ModelConfig, read_config, read_json
from dllm.lora import add_adapters
from dllm.model import DiffusionLM, find_model
from dllm.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer


def build_model(config: Config, corpus: Corpus, resumed: Checkpoint | None, world: World) -> tuple[Any, DiffusionLM]:
    """The tokenizer and the model, in fp32: those of the checkpoint, of model_path, or new ones.

    The weights are the main process's; elsewhere they are on the meta device, and a checkpoint's are not loaded yet.
    """
    tokenizer, model_config, folder = world.from_main(lambda: describe_model(config, corpus, resumed))
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if world.main else "meta"):
        torch.manual_seed(config.train.seed)
        model = DiffusionLM(model_config)
        if world.main and config.model.model_path and not resumed:
            # Copied into the fresh model: products can differ in the last bit with the alignment of what came from a
            # file.
            model.load_state_dict(DiffusionLM.from_pretrained(folder).state_dict())
        freeze(model, config.train.frozen_names)
        if config.train.lora_rank:
            add_adapters(model, config.train.lora_rank, config.train.lora_alpha)
    if folder is not None and (folder / "generation_config.json").exists():
        model.generation_defaults = read_json(folder / "generation_config.json")
    if config.train.objective == "expansion":
        check_expansion(config, model_config)
    if model_config.num_attention_heads % world.sequence_size:
        raise UserError(f"train.ulysses_parallel_size {world.sequence_size} must divide the model's "
                        f"{model_config.num_attention_heads} attention heads")
    return tokenizer, model


def check_expansion(config: Config, model_config: ModelConfig) -> None:
    expand, end = config.train.expand_token_id, model_config.eos_token_id
    if config.data.data_type != "plaintext":
        raise UserError("train.objective=expansion makes gaps anywhere in a text: set data.data_type=plaintext")
    if not isinstance(end, int):
        raise UserError(f"train.objective=expansion deletes by the model's eos_token_id, which must be one token, not "
                        f"{end}; choose another objective")
    if not 0 <= expand < model_config.vocab_size or expand in (end, model_config.mask_token_id):
        raise UserError(f"train.expand_token_id {expand} must be one of the model's {model_config.vocab_size} tokens, "
                        "and neither end-of-text nor the mask; choose another")


def build_teacher(config: Config, world: World) -> DiffusionLM | None:
    """The weights that the run starts from, whole in every process, frozen, in the arithmetic's precision; None if no
    alignment is asked for."""
    if not config.train.repr_align_wt:
        return None
    dtype = torch.bfloat16 if use_bf16(config.train, world.device) else torch.float32
    return DiffusionLM.from_pretrained(config.model.model_path, dtype, world.device).requires_grad_(False)


def freeze(model: DiffusionLM, names: Sequence[str]) -> None:
    """Train no parameter whose name contains one of `names`, in any case (Open-dLLM's freeze_layers).

    A head that is tied to the embedding goes by the name of either.
    Raises: UserError for a name that no parameter has, or if none is left to train.
    """
    parameters = [*model.named_parameters(), ("lm_head.weight", model.head_weight)]
    for name in names:
        found = [parameter for known, parameter in parameters if name.lower() in known.lower()]
        if not found:
            raise UserError(f"train.freeze_layers: no parameter has {name!r} in its name; names look like "
                            f"{parameters[0][0]} and model.layers.0.mlp.up_proj.weight")
        for parameter in found:
            parameter.requires_grad_(False)
    if not model.count_parameters(trainable=True):
        raise UserError(f"train.freeze_layers {','.join(names)} leaves no parameter to train; name fewer")


def describe_model(config: Config, corpus: Corpus,
                   resumed: Checkpoint | None) -> tuple[Any, ModelConfig, Path | None]:
    """The tokenizer, the configuration, and the folder that they and the weights are from, if from any.

    Raises: UserError if they do not fit each other, or are no longer those of the run that is to be continued.
    """
    group = config.model
    path = group.model_path or group.config_path
    if resumed is not None:
        tokenizer, model_config = read_described(resumed.hf_folder, None)
        model_config = as_trained(model_config, tokenizer, config.train)
        if path and Path(path).is_dir():
            check_unchanged(tokenizer, model_config, config, resumed)
        return tokenizer, model_config, resumed.hf_folder
    folder = find_model(path) if path else None
    if folder is not None:
        tokenizer, model_config = read_described(folder, group.tokenizer_path)
    else:
        tokenizer = load_tokenizer(group.tokenizer_path, None) if group.tokenizer_path else train_tokenizer(
            corpus.texts(), group.vocab_size or 4096)
        model_config = ModelConfig(
            family=check_family(group.family), vocab_size=group.vocab_size or len(tokenizer),
            hidden_size=group.hidden_size, intermediate_size=group.intermediate_size,
            num_hidden_layers=group.num_hidden_layers,
            num_attention_heads=group.num_attention_heads, num_key_value_heads=group.num_key_value_heads,
            head_dim=group.hidden_size // group.num_attention_heads, tie_word_embeddings=group.tie_word_embeddings,
            rope_theta=group.rope_theta, initializer_range=group.initializer_range, shift_logits=group.shift_logits,
            **FAMILIES[group.family].fixed)
    check_vocabulary(tokenizer, model_config.vocab_size)
    if config.train.repr_align_wt and not group.model_path:
        raise UserError(f"train.repr_align_wt {config.train.repr_align_wt} aligns with the weights of "
                        "model.model_path, which is not set; set it, or train.repr_align_wt=0")
    if config.train.repr_align_wt and not model_config.shift_logits:
        raise UserError(f"train.repr_align_wt {config.train.repr_align_wt} aligns positions that predict the next "
                        f"token; those of {path} predict their own: set it to 0")
    if config.data.max_seq_len > model_config.max_position_embeddings:
        raise UserError(f"data.max_seq_len {config.data.max_seq_len} is more than the model's "
                        f"{model_config.max_position_embeddings} positions; lower it")
    return tokenizer, as_trained(model_config, tokenizer, config.train), folder


def read_described(folder: Path, tokenizer_path: str | None) -> tuple[Any, ModelConfig]:
    model_config = read_config(read_json(folder / "config.json"), where=str(folder / "config.json"))
    return load_tokenizer(tokenizer_path or folder, model_config.mask_token_id), model_config


def as_trained(model_config: ModelConfig, tokenizer, settings: TrainGroup) -> ModelConfig:
    """With the tokenizer's mask token, its end-of-text and padding tokens where there are none, and the blocks that
    the model learns to decode by."""
    blocks = {}
    if settings.objective == "block_diffusion":
        blocks = {"block_causal": True, "block_length": settings.block_length}
    return replace(model_config, mask_token_id=tokenizer.mask_token_id, eos_token_id=model_config.eos_token_id
                   if model_config.eos_token_id is not None else tokenizer.eos_token_id,
                   pad_token_id=model_config.pad_token_id if model_config.pad_token_id is not None
                   else tokenizer.pad_token_id, **blocks)


def check_unchanged(tokenizer, model_config: ModelConfig, config: Config, resumed: Checkpoint) -> None:
    """Raises: UserError naming what of a model or tokenizer has changed since the run began."""
    path = config.model.model_path or config.model.config_path
    now_tokenizer, now_config = read_described(Path(path), config.model.tokenizer_path)
    now_config = as_trained(now_config, now_tokenizer, config.train)
    change = next((f"{field.name} was {before!r} and is {now!r}" for field in fields(ModelConfig) if field.compare
                   and (before := getattr(model_config, field.name)) != (now := getattr(now_config, field.name))), None)
    if change is None and tokenizer.get_vocab() != now_tokenizer.get_vocab():
        words = set(tokenizer.get_vocab().items()) ^ set(now_tokenizer.get_vocab().items())
        change = f"the tokenizer differs in {len(words)} entries, such as {min(words)[0]!r}"
    elif change is None and describe_rules(tokenizer) != describe_rules(now_tokenizer):
        change = "the tokenizer has the same words, but other rules to cut a text into them"
    if change is not None:
        raise UserError(f"{resumed.folder} continues a model that is no longer in {path}: {change}; put it back, or "
                        "set another train.output_dir")


def check_family(family: str) -> str:
    if family not in FAMILIES:
        raise UserError(f"model.family must be one of {', '.join(FAMILIES)}, not {family!r}")
    return family
