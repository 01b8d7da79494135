"""Open a run: the checkpoint that it continues, its data, its tokenizer and its model.

Tokenizer and model are new, or come from the folder that the run starts from, or from its checkpoint.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from dllm.config.schema import Config, ModelGroup, TrainGroup
from dllm.data import Corpus, TrainingData, open_training_data, read_corpus
from dllm.data.conversations import find_answer_ends, set_chat_template
from dllm.data.tokens import describe_rules
from dllm.errors import UserError
from dllm.files import read_json, write_atomically
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.families import FAMILIES, ModelConfig, read_config
from dllm.model.families import write_config as as_config_json
from dllm.model.gemma_config import read_gemma_config
from dllm.model.growth import add_edit_heads, add_self_conditioning, describe_growth, grow, rows_needed
from dllm.model.loading import is_diffusion_gemma
from dllm.model.special_tokens import as_ids, unique
from dllm.model.tokenizer import anchor_token_id, check_separator, check_vocabulary, load_tokenizer, train_tokenizer
from dllm.model.transformer import Transformer
from dllm.model.weights import find_model, fit_config, read_weights
from dllm.training.checkpoint import Checkpoint, load_latest
from dllm.training.distributed import World
from dllm.training.lora import add_adapters


def find_run(config: Config, output: Path) -> Checkpoint | None:
    """The checkpoint to continue from, or None. Writes config.yaml."""
    resumed = load_latest(output / "checkpoints")
    if resumed is not None:
        check_resumable(config, resumed, output)
    write_config(output / "config.yaml", config)
    return resumed


def check_apart(config: Config) -> None:
    """Refuse to write into a folder of data, where the run would overwrite files, or train on what it writes."""
    written = {os.path.realpath(Path(config.train.output_dir) / name)
               for name in ("", "config.yaml", "metrics.jsonl", "evaluations.jsonl")}
    for path in config.data.path_list or ():
        if os.path.realpath(path) in written:
            raise UserError(f"train.output_dir {config.train.output_dir} holds the data {path}; name a folder of its "
                            "own, as in train.output_dir=runs/first")


def write_config(path: Path, config: Config) -> None:
    """Write the configuration, unless it is there already.

    Raises: UserError if there is another one that was written by hand.
    """
    if path.exists():
        try:
            there = yaml.safe_load(path.read_text(encoding="utf-8"))
            ours = path.read_text(encoding="utf-8") == yaml.safe_dump(there, sort_keys=False)
        except (UnicodeDecodeError, yaml.YAMLError):
            there, ours = None, False
        if there == config.to_dict():
            return
        if not ours:
            raise UserError(f"{path} was not written by a run, and this run would overwrite it; move it, or set "
                            "another train.output_dir")
    write_atomically(path, config.to_yaml().encode())


def open_run(config: Config, resumed: Checkpoint | None, world: World) -> tuple[Any, Transformer, TrainingData]:
    """(tokenizer, model, data). The main process reads first, so that the others find the tokens cached."""
    def open_data(tokenizer) -> TrainingData:
        return open_training_data(corpus, tokenizer, config.train.seed, config.train.rows_per_step,
                                  anchor=anchor_token_id(tokenizer), alone=config.train.objective == "canvas")

    read = cache(lambda: read_corpus(config.data))
    start = world.from_main(lambda: choose_model(config, read, resumed))  # first, because reading data takes longer
    corpus = read()
    if resumed is not None and resumed.state["data"] != corpus.fingerprint:
        where = config.data.train_path or "the standard library"
        raise UserError(f"{resumed.folder} continues a run on other documents than there are now in {where}; bring "
                        "them back, or set another train.output_dir")
    tokenizer, model = start.tokenizer, build_model(config, start, resumed, world)
    data = open_data(tokenizer) if world.main else None
    world.barrier()
    data = data or open_data(tokenizer)
    if config.data.data_type == "conversation":
        name_answer_ends(model, tokenizer)
    if config.train.objective == "edit":
        source = {"edit_source": config.train.edit_source, "edit_source_length": config.train.source_tokens} if \
            config.train.source_tokens else {}
        model.generation_defaults = {**(model.generation_defaults or {}), "alg": "edit", **source}
    if config.train.objective == "uniform":
        model.generation_defaults = {**(model.generation_defaults or {}), "alg": "ancestral", "temperature": 1.0}
    elif (model.generation_defaults or {}).get("alg") == "ancestral":  # of a model that learns masks from now on
        model.generation_defaults = {**model.generation_defaults, "alg": None}
    return tokenizer, model, data


def name_answer_ends(model: Transformer, tokenizer) -> None:
    """Name the tokens that end an answer in generation_config.json, so that sampling ends an answer there too."""
    ends, defaults = find_answer_ends(tokenizer), model.generation_defaults or {}
    model.generation_defaults = defaults | {"eos_token_id": unique([*as_ids(defaults.get("eos_token_id")), *ends])}
    model.end_token_ids = unique([*model.end_token_ids, *ends])


def check_resumable(config: Config, resumed: Checkpoint, output: Path) -> None:
    """Refuse to continue a run with settings that would change what it trains.

    Raises: UserError naming the first difference and the ways out.
    """
    if not config.train.auto_resume:
        raise UserError(f"{output} already holds checkpoints up to {resumed.folder.name}; set another "
                        "train.output_dir, or train.auto_resume=true to continue")
    fixed = ("objective", "path_term", "mask_at_least_one", "schedule", "optimizer", "seed", "lora_rank", "lora_alpha",
             "freeze_layers", "repr_align_wt", "anneal_attention_ratio", "block_length", "causal_blocks",
             "masked_share", "expand_token_id", "corrupt_prompt", "edit_source", "edit_source_length",
             "edit_propagation", "uniform_share", "loss_weighting", "self_conditioning")
    defaults = {field.name: field.default for field in fields(TrainGroup)}  # for runs older than a key

    def describe(groups: dict[str, dict]) -> dict:
        """Documents and chat template are compared themselves; a path may name them in another way."""
        train_group = groups["train"]
        return {**{f"model.{key}": resolve(value) for key, value in groups["model"].items()
                   if key != "trust_remote_code"},
                **{f"data.{key}": resolve(value) for key, value in groups["data"].items()
                   if key not in ("num_workers", "train_path", "chat_template")},
                **{f"train.{key}": train_group.get(key, defaults[key]) for key in fixed},
                "train.global_batch_size": train_group["global_batch_size"] or train_group["micro_batch_size"]}

    before, now = describe(resumed.state["config"]), describe(config.to_dict())
    for key in now:
        if before.get(key) != now[key]:
            raise UserError(f"{output} holds a run with {key} {before.get(key)!r}, not {now[key]!r}; set it back, or "
                            "another train.output_dir")


def resolve(value: Any) -> Any:
    """A text that is the path of something as its real path, so that ./x, ~ and links to it are equal."""
    return os.path.realpath(os.path.expanduser(value)) if isinstance(value, str) and os.path.exists(
        os.path.expanduser(value)) else value


def build_model(config: Config, start: "Start", resumed: Checkpoint | None, world: World) -> Transformer:
    """The model, in fp32: that of the checkpoint, of model_path, or a new one.

    The weights are the main process's; elsewhere they are on the meta device, and a checkpoint's are not loaded yet.
    """
    model_config, folder = start.model_config, start.folder
    kind = Transformer if model_config.canvas_length is None else DiffusionGemma
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if world.main else "meta"):
        torch.manual_seed(config.train.seed)
        model = kind(model_config)
        if world.main and config.model.model_path and not resumed:
            # Copied into the fresh model: products can differ in the last bit with the alignment of what came from a
            # file.
            loaded = grow(kind.from_pretrained(folder), model_config.vocab_size, config.train.seed)
            if model_config.edit_heads is not None:
                add_edit_heads(loaded, model_config.edit_heads)
            if model_config.self_conditioning:
                add_self_conditioning(loaded)
            model.load_state_dict(loaded.state_dict())
        freeze(model, config.train.frozen_names)
        if config.train.lora_rank:
            add_adapters(model, config.train.lora_rank, config.train.lora_alpha)
            for name, parameter in model.named_parameters():
                if name.startswith(("insert_head.", "rate_head.", "self_condition.")):  # an adapter would not do
                    parameter.requires_grad_(True)  # for new ones
    if config.train.objective == "uniform" and model.head_bias is not None:
        raise UserError(f"train.objective=uniform computes the loss of a head without bias, and {model_config.family} "
                        "has one; choose another objective, or another model")
    if folder is not None:
        model.adopt(folder, model_config.mask_token_id)
    if model_config.num_attention_heads % world.sequence_size:
        raise UserError(f"train.ulysses_parallel_size {world.sequence_size} must divide the model's "
                        f"{model_config.num_attention_heads} attention heads")
    return model


def build_teacher(config: Config, vocab_size: int, world: World) -> Transformer | None:
    """The starting weights, frozen, whole in every process, in the compute dtype; None without alignment."""
    if not config.train.repr_align_wt:
        return None
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    teacher = Transformer.from_pretrained(config.model.model_path, dtype, world.device,
                                          layers_backend=config.train.layers_backend)
    return grow(teacher, vocab_size, config.train.seed).requires_grad_(False)


def freeze(model: Transformer, names: Sequence[str]) -> None:
    """Train no parameter whose name contains one of `names`, in any case (Open-dLLM's freeze_layers).

    A tied head has the names of both head and embedding.
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


class Start(NamedTuple):
    """What a run starts from."""

    tokenizer: Any
    model_config: ModelConfig
    folder: Path | None  # of both and of the weights; None if they are new


def choose_model(config: Config, corpus: Callable[[], Corpus], resumed: Checkpoint | None) -> Start:
    """Read the tokenizer and the configuration, or make new ones; the corpus is read only to train a tokenizer.

    Raises: UserError if they do not fit each other or the settings, or have changed since the run began.
    """
    group = config.model
    path = group.model_path or group.config_path
    if resumed is not None:
        tokenizer, model_config = read_described(resumed.hf_folder)
        model_config = as_trained(model_config, tokenizer, config)
        if path and Path(path).exists():
            check_unchanged(tokenizer, model_config, config, resumed)
        check_template(tokenizer, config, resumed)
        return Start(tokenizer, model_config, resumed.hf_folder)
    folder = find_model(path) if path else None
    if folder is not None:
        tokenizer, model_config = read_described(folder, group)
        model_config = grow_config(config, tokenizer, model_config)
    else:
        tokenizer = open_tokenizer(group, group.tokenizer_path) if group.tokenizer_path else train_tokenizer(
            corpus().texts(), group.vocab_size or 4096)
        model_config = shape_model(group, len(tokenizer))
    check_vocabulary(tokenizer, model_config.vocab_size)
    check_separator(tokenizer)
    model_config = as_trained(model_config, tokenizer, config)
    check_settings(config, model_config)
    return Start(tokenizer, model_config, folder)


def grow_config(config: Config, tokenizer, model_config: ModelConfig) -> ModelConfig:
    """The configuration with the rows that the tokenizer needs, which it says.

    Raises: UserError if a new row's logit would have to be learnt and is not trained.
    """
    before, settings = model_config.vocab_size, config.train
    rows = rows_needed(tokenizer, before)
    if rows == before or model_config.canvas_length is not None:
        return model_config
    expand = settings.expand_token_id
    if expand is not None and before <= expand < rows and settings.lora_rank:
        raise UserError(f"train.expand_token_id {expand} is a new row of the vocabulary, which train.lora_rank "
                        f"{settings.lora_rank} does not train; take a reserved token below {before}, or lora_rank 0")
    print(describe_growth(tokenizer, before, rows), file=sys.stderr)
    return replace(model_config, vocab_size=rows)


def shape_model(group: ModelGroup, vocab_size: int) -> ModelConfig:
    """The configuration of a random model, with `vocab_size` rows where the group does not say. What the family fixes
    goes before the group.

    Raises: UserError for a mixture of experts, or if a config.json of the family cannot say it.
    """
    if "num_experts" in FAMILIES[check_family(group.family)].required:
        raise UserError(f"model.family {group.family} is a mixture of experts, which the keys of model do not "
                        "describe; name a folder by model.config_path, or choose another family")
    config = ModelConfig(**{
        "family": group.family, "vocab_size": group.vocab_size or vocab_size,
        "hidden_size": group.hidden_size, "intermediate_size": group.intermediate_size,
        "num_hidden_layers": group.num_hidden_layers, "num_attention_heads": group.num_attention_heads,
        "num_key_value_heads": group.num_key_value_heads, "head_dim": group.hidden_size // group.num_attention_heads,
        "tie_word_embeddings": group.tie_word_embeddings, "rope_theta": group.rope_theta,
        "initializer_range": group.initializer_range, "shift_logits": group.shift_logits,
        **FAMILIES[group.family].fixed})
    as_config_json(config, "float32")
    return config


def check_settings(config: Config, model_config: ModelConfig) -> None:
    """Raises: UserError naming a setting that the model does not allow."""
    group = config.model
    if config.train.repr_align_wt and not group.model_path:
        raise UserError(f"train.repr_align_wt {config.train.repr_align_wt} aligns with the weights of "
                        "model.model_path, which is not set; set it, or train.repr_align_wt=0")
    if config.train.repr_align_wt and not model_config.shift_logits:
        raise UserError(f"train.repr_align_wt {config.train.repr_align_wt} aligns positions that predict the next "
                        f"token; those of {group.model_path} predict their own: set it to 0")
    if config.data.max_seq_len > model_config.max_position_embeddings:
        raise UserError(f"data.max_seq_len {config.data.max_seq_len} is more than the model's "
                        f"{model_config.max_position_embeddings} positions; lower it")
    if config.train.objective == "expansion":
        check_expansion(config, model_config)
    if config.train.objective == "edit":
        check_edit(config, model_config)
    check_canvas(config, model_config)


def check_canvas(config: Config, model_config: ModelConfig) -> None:
    """Raises: UserError unless objective and model both have canvases, or neither has."""
    settings, length = config.train, model_config.canvas_length
    if length is None and settings.objective != "canvas":
        return
    if length is None:
        raise UserError(f"train.objective=canvas needs a model that writes in canvases, a DiffusionGemma; for "
                        f"{model_config.family} choose another objective, such as mdm")
    if settings.objective != "canvas":
        raise UserError(f"train.objective={settings.objective} is not for {model_config.family}, which writes in "
                        "canvases of random words: set train.objective=canvas")
    if (config.model.mask_token, config.model.mask_token_id) != (None, None):
        raise UserError(f"model.mask_token is not for {model_config.family}, which has no mask token: it replaces what "
                        "it is unsure of by random words; leave it out")
    if settings.layers_backend == "liger":
        raise UserError("train.layers_backend=liger does not compute a DiffusionGemma, whose layers are those of "
                        "Transformers; leave it out")
    if config.data.max_seq_len + length > model_config.max_position_embeddings:
        raise UserError(f"data.max_seq_len {config.data.max_seq_len} and the fill of a canvas of {length} tokens may "
                        f"need more than the model's {model_config.max_position_embeddings} positions; lower it")


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


def check_edit(config: Config, model_config: ModelConfig) -> None:
    if model_config.block_causal:
        raise UserError("train.objective=edit changes a text anywhere, and the model sees whole blocks in their order: "
                        "choose a model without blocks, or another objective")
    most = config.data.max_seq_len + config.train.source_tokens
    if most > model_config.max_position_embeddings:
        raise UserError(f"data.max_seq_len {config.data.max_seq_len} and {config.train.source_tokens} tokens of the "
                        f"source may need {most} positions, the model has {model_config.max_position_embeddings}; "
                        "lower one of them")


def read_described(folder: Path, group: ModelGroup | None = None) -> tuple[Any, ModelConfig]:
    """Tokenizer and configuration of a folder, with the mask token and the tokenizer that the settings give."""
    group = group or ModelGroup()
    read = read_gemma_config if is_diffusion_gemma(folder) else read_config
    model_config = read(read_json(folder / "config.json"), where=str(folder / "config.json"))
    if model_config.canvas_length is not None:
        return open_tokenizer(group, group.tokenizer_path or folder), model_config
    if group.model_path and (model_config.tie_word_embeddings or model_config.family == "llada2_moe"):
        model_config = fit_config(model_config, read_weights(folder), str(folder))
    tokenizer = open_tokenizer(group, group.tokenizer_path or folder)
    asked, named = (group.mask_token, group.mask_token_id) != (None, None), model_config.mask_token_id
    if group.tokenizer_path and not asked and named not in (None, tokenizer.mask_token_id):
        raise UserError(f"the model's mask token is {named}, that of the tokenizer {group.tokenizer_path} is "
                        f"{tokenizer.mask_token_id} ({tokenizer.mask_token}); give the model's own tokenizer, or set "
                        "model.mask_token")
    return tokenizer, model_config


def open_tokenizer(group: ModelGroup, path: str | Path):
    return load_tokenizer(path, group.mask_token_id, mask_token=group.mask_token,
                          trust_remote_code=group.trust_remote_code)


def as_trained(model_config: ModelConfig, tokenizer, config: Config) -> ModelConfig:
    """The configuration with the tokenizer's mask token, its end-of-text and padding tokens where the configuration has
    none, and the blocks, the edits or the noise by which the model learns to decode."""
    settings = config.train
    learns_to_condition = settings.objective != "canvas" and settings.self_conditioning_chance > 0
    for name, wanted in (("objective=uniform", settings.noise_share is not None),
                         (f"self_conditioning={settings.self_conditioning}", learns_to_condition)):
        if wanted and model_config.block_causal:
            raise UserError(f"train.{name} is about all tokens of a text at once, and the model sees whole blocks in "
                            "their order: choose a model without blocks, or leave it out")
    learnt = {"uniform_share": settings.noise_share}
    if settings.objective == "block_diffusion":
        learnt |= {"block_causal": True, "block_length": settings.block_length}
        if settings.causal_blocks is not None:
            learnt["causal_blocks"] = settings.causal_blocks
    if learns_to_condition:
        learnt["self_conditioning"] = True
    if settings.objective == "edit":
        replaces = settings.source_tokens or config.data.data_type == "edits" or model_config.edit_heads == "all"
        learnt["edit_heads"] = "all" if replaces else "insert"
    mask = tokenizer.mask_token_id if model_config.canvas_length is None else None
    return replace(model_config, mask_token_id=mask, eos_token_id=model_config.eos_token_id
                   if model_config.eos_token_id is not None else tokenizer.eos_token_id,
                   pad_token_id=model_config.pad_token_id if model_config.pad_token_id is not None
                   else tokenizer.pad_token_id, **learnt)


def check_unchanged(tokenizer, model_config: ModelConfig, config: Config, resumed: Checkpoint) -> None:
    """Raises: UserError naming what has changed in the model or tokenizer since the run began."""
    path = config.model.model_path or config.model.config_path
    now_tokenizer, now_config = read_described(find_model(path), config.model)
    now_config = replace(now_config, vocab_size=rows_needed(now_tokenizer, now_config.vocab_size))
    now_config = as_trained(now_config, now_tokenizer, config)
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


def check_template(tokenizer, config: Config, resumed: Checkpoint) -> None:
    """Refuse to go on with another chat template than that of the run, which its tokenizer has kept."""
    if config.data.data_type != "conversation":
        return
    before = tokenizer.chat_template
    set_chat_template(tokenizer, config.data.chat_template)
    if tokenizer.chat_template != before:
        raise UserError(f"{resumed.folder} continues a run with another chat template than there is now in "
                        f"{config.data.chat_template}; put it back, or set another train.output_dir")


def check_family(family: str) -> str:
    if family not in FAMILIES:
        raise UserError(f"model.family must be one of {', '.join(FAMILIES)}, not {family!r}")
    return family
