"""The configuration of a training run: YAML groups model, data and train, each key overridable by a dotted flag.

Keys that Open-dLLM has too keep its name, meaning and default. Its other keys are accepted where they ask for nothing
that would change the result here (one line says so), and refused by name otherwise. Nothing here imports torch.
"""

import difflib
import re
import shlex
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dllm.errors import UserError


def _check(name: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise UserError(f"{name} must be {wanted}, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelGroup:
    """Which model to train: published or trained weights, or a shape to initialise at random."""

    model_path: str | None = None  # folder or hub repository of the weights to start from; None: random weights
    config_path: str | None = None  # folder or hub repository whose config.json to initialise at random
    tokenizer_path: str | None = None  # None: that of model_path or config_path; without one, a BPE of the corpus
    # The shape of a random model that has no config_path:
    family: str = "qwen3"  # qwen2, qwen3 or llama: the format it is saved in
    vocab_size: int | None = None  # tokens; None: 4096 for a BPE trained here, else the tokenizer's size
    hidden_size: int = 256
    intermediate_size: int = 768  # width of the SwiGLU feed-forward
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4  # divides num_attention_heads
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    initializer_range: float = 0.02  # standard deviation of the random weights
    shift_logits: bool = True  # position i predicts token i + 1, as Open-dLLM; false: its own token, as LLaDA

    def __post_init__(self):
        path = self.model_path or self.config_path
        if self.model_path and self.config_path and self.model_path != self.config_path:
            raise UserError(f"model.model_path {self.model_path!r} brings its own configuration; remove "
                            f"model.config_path {self.config_path!r}, or model.model_path for random weights")
        for name in (_SHAPE if path else ()):
            if getattr(self, name) != _default(type(self), name):
                raise UserError(f"model.{name} {getattr(self, name)!r} has no effect beside {path!r}, which fixes the "
                                "shape; remove one of the two")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads"):
            value = getattr(self, name)
            _check(f"model.{name}", value, value is None or value >= 1, "at least 1")
        for name in ("rope_theta", "initializer_range"):
            _check(f"model.{name}", getattr(self, name), getattr(self, name) > 0, "above 0")
        _check("model.hidden_size", self.hidden_size, self.hidden_size % (2 * self.num_attention_heads) == 0,
               f"divisible by twice num_attention_heads {self.num_attention_heads}")
        _check("model.num_key_value_heads", self.num_key_value_heads,
               self.num_attention_heads % self.num_key_value_heads == 0,
               f"a divisor of num_attention_heads {self.num_attention_heads}")


_SHAPE = ("family", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "tie_word_embeddings", "rope_theta", "initializer_range", "shift_logits")


_WEIGHTED = re.compile(r"(?P<path>.+?)(\s*\*\s*(?P<weight>\d+(\.\d*)?|\.\d+))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataGroup:
    """Which text to train on, and how it is cut."""

    # Folders, files and datasets of the hub (owner/name, owner/name:config, owner/name@split), separated by commas; a
    # weight after each, as a*3,b*1, makes a share of the rows of it; None: the running Python's standard library
    train_path: str | None = None
    data_type: str = "plaintext"  # plaintext, or conversation: lists of messages, of which the answers are learnt
    datasets_type: str = "mapping"  # mapping: tokenised before training, and kept; iterable: while it is read
    text_keys: str | None = None  # column; of several, separated by commas, the first present; None: text, or messages
    chat_template: str = "default"  # of conversations: the tokenizer's own, or a Jinja file
    num_workers: int = 2  # threads that tokenise text, processes for what Python itself must do; 0: as 1
    train_size: int | None = None  # tokens that make an epoch; None: the corpus
    max_seq_len: int = 2048  # tokens of a row; longer documents are cut into consecutive chunks
    validation_share: float = 0.05  # of the documents, held out by a hash of their names; 0: none

    def __post_init__(self):
        _check("data.train_size", self.train_size, self.train_size is None or self.train_size >= 1, "at least 1 token")
        _check("data.max_seq_len", self.max_seq_len, self.max_seq_len >= 2, "at least 2 tokens")
        _check("data.validation_share", self.validation_share, 0 <= self.validation_share < 1, "at least 0 and below 1")
        _check("data.text_keys", self.text_keys, any(self.key_list), "a column name")
        for name, choices in (("data_type", ("plaintext", "conversation")), ("datasets_type", ("mapping", "iterable"))):
            value = getattr(self, name)
            _check(f"data.{name}", value, value in choices, " or ".join(choices))
        _check("data.num_workers", self.num_workers, self.num_workers >= 0, "at least 0")
        weights = {weight for _, weight in self._entries}
        if 0 in weights or None in weights and len(weights) > 1:
            raise UserError(f"data.train_path {self.train_path!r} must give every entry a weight above 0, as a*3,b*1, "
                            "or none at all")

    @property
    def path_list(self) -> list[str] | None:
        """Every path, without its weight."""
        return None if self.train_path is None else [path for path, _ in self._entries]

    @property
    def key_list(self) -> list[str]:
        keys = self.text_keys
        usual = {"plaintext": "text", "conversation": "messages"}
        return _split_commas(usual[self.data_type] if keys is None else keys)

    @property
    def sources(self) -> list[tuple[list[str] | None, float]]:
        """(paths, weight): each path that has a weight, or all of them together."""
        weighted = [([path], weight) for path, weight in self._entries if weight is not None]
        return weighted or [(self.path_list, 1.0)]

    @property
    def _entries(self) -> list[tuple[str, float | None]]:
        """(path, weight or None)"""
        entries = [_WEIGHTED.fullmatch(entry) for entry in _split_commas(self.train_path or "")]
        return [(entry["path"], entry["weight"] and float(entry["weight"])) for entry in entries]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainGroup:
    """How to train."""

    output_dir: str  # gets checkpoints/, metrics.jsonl, config.yaml
    # Objective
    # mdm: equal weights; elbo: the likelihood bound, 1/t; block_diffusion: that of blocks, given the clean ones before
    # them (BD3-LM); cart: more weight near visible tokens (Dream); expansion: gaps whose length the model finds out
    # (DreamOn); ar: next token, causal
    objective: str = "mdm"
    block_length: int | None = None  # block_diffusion: tokens of a block
    expand_token_id: int | None = None  # expansion: the token that becomes two masked ones; end-of-text deletes one
    path_term: bool = False  # add Open-dLLM's planner term (P2); with mdm only
    mask_at_least_one: bool = False  # token of every document, whatever its time; with mdm only
    corrupt_prompt: bool = False  # mask also what is not learnt of a conversation, as Open-dLLM does; with mdm only
    schedule: str = "linear"  # of corruption over time: linear, cosine or polynomial
    repr_align_wt: float = 0.0  # weight of aligning hidden states with those of model.model_path, causal and frozen
    anneal_attention_ratio: float = 0.0  # share of the steps in which causal attention opens to both directions
    freeze_layers: str | None = None  # not trained: parameters with one of these in their names, separated by commas
    # Optimisation
    optimizer: str = "adamw"  # adamw, or muon: Muon for the matrices of the layers and AdamW for the rest
    lr: float = 5e-5  # peak; Muon's updates are scaled so that AdamW's value suits it
    muon_lr: float | None = None  # peak for Muon's matrices, follows the same schedule; None: lr
    lr_min: float = 1e-7  # end of the cosine schedule
    lr_start: float = 0.0  # beginning of the warm-up
    lr_warmup_ratio: float = 0.0  # share of the steps
    lr_decay_style: str = "constant"  # constant, linear or cosine
    lr_decay_ratio: float = 1.0  # share of the steps after which cosine reaches lr_min
    weight_decay: float = 0.0  # of matrices; biases and norms are never decayed
    max_grad_norm: float = 1.0  # gradients of a larger norm are scaled down to it; 0: never
    micro_batch_size: int = 1  # rows of max_seq_len tokens in one forward pass
    global_batch_size: int | None = None  # rows per step, a multiple of micro_batch_size; None: micro_batch_size
    num_train_epochs: int = 1
    max_steps: int | None = None  # upper bound on the steps
    max_minutes: float | None = None  # upper bound on the time, restarts included; the schedule follows the clock
    seed: int = 42
    max_bad_steps: int = 10  # steps in a row that may be skipped because a gradient is not finite
    # Machine
    device: str = "auto"  # auto: the GPU if there is one; cpu, cuda
    precision: str = "auto"  # fp32, or bf16: bf16 arithmetic on fp32 weights; auto: bf16 on a GPU, fp32 on a CPU
    data_parallel_mode: str = "ddp"  # of several processes: ddp, all with the whole model; fsdp2, all with a part of it
    enable_full_shard: bool = True  # fsdp2: free a layer's weights after its forward pass too, and gather them again
    ulysses_parallel_size: int = 1  # processes that share the positions of a row, for long documents
    enable_gradient_checkpointing: bool = False  # keep no activations inside layers, compute them again
    lora_rank: int = 0  # train only low-rank adapters (LoRA) of this rank on the layers' matrices; 0: all weights
    lora_alpha: float = 16.0  # the adapters' products are scaled by lora_alpha / lora_rank
    enable_compile: bool = False  # torch.compile the layers: faster steps, minutes before the first one
    # Saving and measuring
    auto_resume: bool = True  # continue from the newest whole checkpoint in output_dir
    save_steps: int = 0  # steps between checkpoints; 0: only at the end, and on SIGTERM
    save_time_interval_minutes: float = 0.0  # and at least so often; 0: no
    keep_last: int | None = None  # checkpoints kept; None: all
    save_async: bool = False  # write a checkpoint while the next steps go on, from a copy in the CPU's memory
    save_hf_weights: bool = True  # every checkpoint has a Hugging Face folder; false: only the last one
    eval_every: int = 0  # steps between measurements of the validation loss; 0: only at the end
    eval_tokens: int = 65536  # held-out tokens in such a measurement, the same ones each time
    eval_tasks: str | None = None  # "humaneval --limit 20; perplexity": measured by dllm eval at every checkpoint
    log_steps: int = 1  # steps between lines of metrics.jsonl
    use_tensorboard: bool = True  # write events to output_dir/tensorboard, if tensorboard is installed
    use_wandb: bool = False  # send metrics to Weights & Biases
    wandb_project: str = "dllm"
    wandb_name: str | None = None  # of the run there; None: the name of output_dir
    enable_profiling: bool = False  # torch.profiler around steps [profile_start_step, profile_end_step)
    profile_start_step: int = 1
    profile_end_step: int = 2
    profile_trace_dir: str = "./trace"  # gets a trace of the main process, for chrome://tracing or Perfetto

    def __post_init__(self):
        for name, choices in (("objective", ("mdm", "elbo", "block_diffusion", "cart", "expansion", "ar")),
                              ("schedule", ("linear", "cosine", "polynomial")),
                              ("optimizer", ("adamw", "muon")), ("lr_decay_style", ("constant", "linear", "cosine")),
                              ("device", ("auto", "cpu", "cuda")), ("precision", ("auto", "fp32", "bf16")),
                              ("data_parallel_mode", ("ddp", "fsdp2"))):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"train.{name} must be one of {', '.join(choices)}, not {value!r}")
        for name in ("lr", "muon_lr", "lora_alpha", "max_minutes", "micro_batch_size", "global_batch_size",
                     "num_train_epochs", "max_steps", "max_bad_steps", "ulysses_parallel_size", "block_length",
                     "keep_last", "eval_tokens", "log_steps"):
            value = getattr(self, name)
            _check(f"train.{name}", value, value is None or value > 0, "above 0")
        for name in ("lr_min", "lr_start", "weight_decay", "max_grad_norm", "save_steps", "save_time_interval_minutes",
                     "eval_every", "seed", "profile_start_step", "lora_rank", "repr_align_wt"):
            _check(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, "at least 0")
        _check("train.lr_min", self.lr_min, self.lr_decay_style != "cosine" or self.lr_min <= self.lr,
               f"at most lr {self.lr}")
        _check("train.lr_warmup_ratio", self.lr_warmup_ratio, 0 <= self.lr_warmup_ratio <= 1, "between 0 and 1")
        _check("train.lr_decay_ratio", self.lr_decay_ratio, 0 < self.lr_decay_ratio <= 1, "above 0 and at most 1")
        _check("train.profile_end_step", self.profile_end_step, self.profile_end_step > self.profile_start_step,
               f"above profile_start_step {self.profile_start_step}")
        _check("train.output_dir", self.output_dir, bool(self.output_dir), "a folder")
        _check("train.global_batch_size", self.rows_per_step, self.rows_per_step % self.micro_batch_size == 0,
               f"a multiple of micro_batch_size {self.micro_batch_size}")
        if self.objective == "block_diffusion" and self.ulysses_parallel_size > 1:
            raise UserError("train.objective=block_diffusion has two copies of each row in one process: set "
                            "train.ulysses_parallel_size to 1")
        for objective, name, what in (("expansion", "expand_token_id", "a token of the model"),
                                      ("block_diffusion", "block_length", "as in train.block_length=32")):
            if (self.objective == objective) != (getattr(self, name) is not None):
                raise UserError(f"train.objective={objective} and train.{name}, {what}, need each other; the objective "
                                f"is {self.objective}")
        _split_tasks(self.eval_tasks)
        if self.objective == "expansion" and self.schedule != "linear":
            raise UserError("train.objective=expansion masks a gap at the rate that is drawn: set train.schedule to "
                            f"linear, not {self.schedule}")
        if self.corrupt_prompt and self.objective != "mdm":
            raise UserError(f"train.corrupt_prompt needs train.objective=mdm, not {self.objective!r}, which is about "
                            "answers to a prompt that is read; remove one of them")
        if self.path_term and self.objective != "mdm":
            raise UserError(f"train.path_term needs train.objective=mdm, not {self.objective!r}; remove one of them")
        if self.mask_at_least_one and self.objective != "mdm":
            raise UserError(f"train.mask_at_least_one needs train.objective=mdm, not {self.objective!r}: it would bias "
                            "the bound, and without corruption it means nothing; remove one of them")
        _check("train.anneal_attention_ratio", self.anneal_attention_ratio, 0 <= self.anneal_attention_ratio <= 1,
               "between 0 and 1")
        for name in ("repr_align_wt", "anneal_attention_ratio"):
            value = getattr(self, name)
            if value and self.objective not in ("mdm", "elbo"):
                raise UserError(f"train.{name} {value} needs train.objective mdm or elbo, not {self.objective!r}; "
                                "remove one of them")
            if value and self.ulysses_parallel_size > 1:
                raise UserError(f"train.{name} {value} needs train.ulysses_parallel_size 1, not "
                                f"{self.ulysses_parallel_size}: it works on whole rows; remove one of them")
        if self.anneal_attention_ratio and self.max_minutes:
            raise UserError(f"train.anneal_attention_ratio {self.anneal_attention_ratio} counts steps, and "
                            f"train.max_minutes {self.max_minutes} leaves their number open; set train.max_steps "
                            "instead")
        if self.freeze_layers and self.lora_rank:
            raise UserError(f"train.freeze_layers {self.freeze_layers!r} has no effect with train.lora_rank, which "
                            "freezes every weight; remove one of them")

    @property
    def rows_per_step(self) -> int:
        return self.global_batch_size or self.micro_batch_size

    @property
    def eval_task_list(self) -> list[list[str]]:
        """The words of each task."""
        return _split_tasks(self.eval_tasks)

    @property
    def frozen_names(self) -> list[str]:
        return _split_commas(self.freeze_layers or "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    train: TrainGroup
    model: ModelGroup = field(default_factory=ModelGroup)
    data: DataGroup = field(default_factory=DataGroup)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {name: asdict(getattr(self, name)) for name in GROUPS}

    def to_yaml(self) -> str:
        """YAML that `load_config` reads back as an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


GROUPS: Mapping[str, type] = {"model": ModelGroup, "data": DataGroup, "train": TrainGroup}


class Foreign(NamedTuple):
    """A key of Open-dLLM that has no counterpart here."""

    accepted: tuple | None  # values that ask for nothing we lack; None: any, for it cannot change the result here
    advice: str


_ALWAYS_PACKED = Foreign(None, "documents are always packed")
FOREIGN: Mapping[str, Foreign] = {
    "model.attn_implementation": Foreign(None, "the fastest attention that runs here is taken"),
    "model.moe_implementation": Foreign((None,), "mixture-of-experts models are not supported"),
    "model.encoders": Foreign((None, {}), "only text models are supported"),
    "model.decoders": Foreign((None, {}), "only text models are supported"),
    "model.basic_modules": Foreign((None, []), "whole layers are sharded: remove it"),
    "data.dataloader_type": Foreign(None, "there is one loader"),
    "data.data_name": Foreign((None,), "name the files in data.train_path"),
    "data.data_tag": Foreign(("default",), "name the files in data.train_path"),
    "data.prefetch_factor": Foreign(None, "data.num_workers says how many tokenise"),
    "data.drop_last": Foreign(None, "no data is dropped"),
    "data.pin_memory": Foreign(None, "batches are pinned where there is a GPU"),
    "train.rmpad": _ALWAYS_PACKED,
    "train.rmpad_with_pos_ids": _ALWAYS_PACKED,
    "train.dyn_bsz": _ALWAYS_PACKED,
    "train.dyn_bsz_margin": Foreign((0,), "a micro-batch is micro_batch_size rows: lower train.micro_batch_size"),
    "train.dyn_bsz_buffer_size": _ALWAYS_PACKED,
    "train.bsz_warmup_ratio": Foreign((0,), "the batch size is constant: set it to 0 and use train.lr_warmup_ratio"),
    "train.bsz_warmup_init_mbtoken": Foreign(None, "the batch size is constant"),
    "train.enable_mixed_precision": Foreign(None, "weights are kept in fp32; train.precision chooses the arithmetic"),
    "train.enable_reentrant": Foreign(None, "checkpointing is never reentrant"),
    "train.record_shapes": Foreign(None, "the profiler records shapes"),
    "train.profile_memory": Foreign(None, "the profiler records memory"),
    "train.with_stack": Foreign(None, "the profiler records no stacks"),
    "train.use_doptim": Foreign((False,), "fsdp2 shards the optimizer's state: set it to false"),
    "train.enable_manual_eager": Foreign((False,), "set it to false"),
    "train.enable_forward_prefetch": Foreign(None, "FSDP2 prefetches by itself"),
    "train.enable_fsdp_offload": Foreign((False,), "nothing is offloaded: lower train.micro_batch_size"),
    "train.enable_activation_offload": Foreign((False,), "nothing is offloaded: lower train.micro_batch_size"),
    "train.activation_gpu_limit": Foreign((0,), "nothing is offloaded: lower train.micro_batch_size"),
    "train.init_device": Foreign(None, "train.device chooses the device"),
    **{f"train.{kind}_parallel_size": Foreign((1,), "set it to 1; train.data_parallel_mode=fsdp2 shards the model, "
                                                    "train.ulysses_parallel_size the positions")
       for kind in ("tensor", "expert", "pipeline", "context")},
    "train.enable_full_determinism": Foreign(None, "on a CPU, runs repeat bit for bit as they are"),
    "train.empty_cache_steps": Foreign(None, "the memory cache is not emptied"),
    "train.ckpt_manager": Foreign(None, "checkpoints are PyTorch's distributed ones (dcp)"),
    "train.load_checkpoint_path": Foreign((None, ""), "a run continues from train.output_dir by itself; for "
                                                      "other weights to start from set model.model_path"),
    "train.save_epochs": Foreign(None, "train.save_steps says when to save"),
    "train.wandb_entity": Foreign((None, ""), "set WANDB_ENTITY in the environment"),
}


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (None: the defaults) and apply flags like `--train.lr=1e-3`, which win.

    Raises: UserError if the file cannot be read, a key is unknown (the nearest valid one is named) or not supported, or
        a value is of the wrong type or out of range.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    ignored = []
    for key, value in [*_read_yaml(path), *_read_flags(overrides)]:
        group, name = key.split(".", 1)
        if key == "train.enable_masking":
            masking = _convert(key, value, bool)
            if not masking or values[group].get("objective", "ar") == "ar":
                values[group] |= {"objective": "mdm" if masking else "ar", "path_term": masking}
        elif key in FOREIGN:
            accepted, advice = FOREIGN[key]
            value = _parse(value)
            if accepted is None:
                ignored.append(f"{key} ({advice})")
            elif value not in accepted:
                raise UserError(f"{key} {value!r} of Open-dLLM is not supported here: {advice}")
        else:
            values[group][name] = _convert(key, value, _field_types(GROUPS[group])[name])
    if "output_dir" not in values["train"]:
        raise UserError("train.output_dir is missing: the folder for checkpoints and metrics, as in "
                        "--train.output_dir=runs/first")
    if ignored:
        print(f"note: {path or 'the flags'}: without effect here: {'; '.join(dict.fromkeys(ignored))}", file=sys.stderr)
    return Config(**{name: group(**values[name]) for name, group in GROUPS.items()})


def _read_yaml(path: str | Path | None) -> list[tuple[str, Any]]:
    if path is None:
        return []
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the configuration {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    pairs = []
    for group, keys in (content or {}).items() if isinstance(content or {}, dict) else [(content, None)]:
        if group not in GROUPS:
            raise UserError(f"{path}: {group!r} is not a group; the groups are {', '.join(GROUPS)}"
                            + _nearest(str(group), GROUPS))
        if not isinstance(keys or {}, dict):
            raise UserError(f"{path}: group {group} holds {keys!r}; write one 'key: value' per line below it")
        pairs += [(_known(f"{group}.{name}"), value) for name, value in (keys or {}).items()]
    return pairs


def _read_flags(flags: Sequence[str]) -> list[tuple[str, str]]:
    """Both `--group.key=value` and `--group.key value`."""
    pairs, rest = [], list(flags)
    while rest:
        flag = rest.pop(0)
        key, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or "." not in key:
            raise UserError(f"flags look like --train.lr=1e-3, not {flag!r}")
        _known(key)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"the flag {flag} needs a value: {flag}=...")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def _known(key: str) -> str:
    valid = [f"{group}.{f.name}" for group, cls in GROUPS.items() for f in fields(cls)] + ["train.enable_masking"]
    if key in valid or key in FOREIGN:
        return key
    group, _, name = key.partition(".")
    elsewhere = [other for other in valid if other.split(".")[1] == name]
    hint = f"; did you mean {elsewhere[0]}?" if elsewhere else _nearest(key, valid)
    raise UserError(f"there is no configuration key {key}{hint or f'; the groups are {chr(44).join(GROUPS)}'}")


def _nearest(word: str, valid) -> str:
    near = difflib.get_close_matches(word, list(valid), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _default(cls: type, name: str) -> Any:
    return next(f.default for f in fields(cls) if f.name == name)


def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _split_tasks(value: str | None) -> list[list[str]]:
    try:
        return [shlex.split(task) for task in (value or "").split(";") if task.strip()]
    except ValueError as error:  # an open quotation
        raise UserError(f"train.eval_tasks {value!r} cannot be read ({str(error).lower()}); write tasks as "
                        "'humaneval --limit 20; perplexity'") from None


def _split_commas(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _parse(value: Any) -> Any:
    """What YAML makes of a flag's text; values from a file already are what they are."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as the type of the field: `int`, `float`, `bool` or `str`, or None where the field may be None."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    wanted = next(kind for kind in kinds if kind is not type(None))
    parsed = _parse(value)
    if type(None) in kinds and (parsed is None or parsed == ""):
        return None
    if wanted is str and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    if wanted is str and not isinstance(value, dict | list) and value is not None:
        return str(value)
    if wanted is bool and isinstance(parsed, bool):
        return parsed
    if wanted in (int, float) and not isinstance(parsed, bool):
        try:
            number = float(parsed)  # YAML reads 1e-3 as text
            if wanted is float and number == number:
                return number
            if number == int(number):
                return parsed if isinstance(parsed, int) else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise UserError(f"{key} must be {names[wanted]}, not {value!r}")
