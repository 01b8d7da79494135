"""The keys of a training run's configuration, in the groups model, data and train; docs/training.md lists them.

Keys that Open-dLLM has too keep its name, meaning and default. Nothing here imports torch.
"""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field
from typing import Any, Literal

import yaml

from dllm.config.fields import check, expand_home, require, setting, settings_of
from dllm.config.names import LayersBackend, Schedules
from dllm.errors import UserError

_SHAPE = ("family", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "tie_word_embeddings", "rope_theta", "initializer_range", "shift_logits")
_WEIGHTED = re.compile(r"(?P<path>.+?)(\s*\*\s*(?P<weight>\d+(\.\d*)?|\.\d+))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelGroup:
    """Which model to train: published or trained weights, or a shape to initialise at random."""

    model_path: str | None = setting(None, "folder, hub repository or GGUF file of the weights to start from",
                                     none="random weights")
    config_path: str | None = setting(None, "folder or hub repository whose config.json to initialise at random")
    tokenizer_path: str | None = setting(None, "folder or hub repository of the tokenizer",
                                         none="model_path's or config_path's, else a BPE of the corpus")
    mask_token: str | None = setting(
        None, "the mask token, one that the tokenizer has",
        none="the one that the folder names, else a new one, for which the vocabulary grows if it must")
    mask_token_id: int | None = setting(None, "or its id", at_least=0, none="as mask_token")
    trust_remote_code: bool = setting(False, "let code of the folder make its tokenizer; none runs otherwise")
    # The shape of a random model that has no config_path:
    family: str = setting("qwen3", "the format it is saved in: qwen2, qwen3 or llama")
    vocab_size: int | None = setting(None, "tokens", at_least=1,
                                     none="4096 for a BPE trained here, else the tokenizer's size")
    hidden_size: int = setting(256, "width, divisible by twice num_attention_heads", at_least=1)
    intermediate_size: int = setting(768, "width of the SwiGLU feed-forward", at_least=1)
    num_hidden_layers: int = setting(4, "layers", at_least=1)
    num_attention_heads: int = setting(4, "query heads", at_least=1)
    num_key_value_heads: int = setting(4, "key and value heads, a divisor of num_attention_heads", at_least=1)
    tie_word_embeddings: bool = setting(True, "the head is the embedding")
    rope_theta: float = setting(10000.0, "base of the rotary embedding", above=0)
    initializer_range: float = setting(0.02, "standard deviation of the random weights", above=0)
    shift_logits: bool = setting(
        True, "position i predicts token i + 1, as in Open-dLLM; false: its own token, as in LLaDA")

    def __post_init__(self):
        check(self, "model.")
        expand_home(self, "model_path", "config_path", "tokenizer_path")
        path = self.model_path or self.config_path
        if self.model_path and self.config_path and self.model_path != self.config_path:
            raise UserError(f"model.model_path {self.model_path!r} brings its own configuration; remove "
                            f"model.config_path {self.config_path!r}, or model.model_path for random weights")
        for name in (_SHAPE if path else ()):
            if getattr(self, name) != settings_of(ModelGroup)[name].default:
                raise UserError(f"model.{name} {getattr(self, name)!r} has no effect beside {path!r}, which fixes the "
                                "shape; remove one of the two")
        require("model.hidden_size", self.hidden_size, self.hidden_size % (2 * self.num_attention_heads) == 0,
                f"divisible by twice num_attention_heads {self.num_attention_heads}")
        require("model.num_key_value_heads", self.num_key_value_heads,
                self.num_attention_heads % self.num_key_value_heads == 0,
                f"a divisor of num_attention_heads {self.num_attention_heads}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataGroup:
    """Which text to train on, and how it is cut."""

    train_path: str | None = setting(
        None, "folders, files and hub datasets (owner/name, owner/name:config, owner/name@split), separated by commas; "
        "a weight after each, as a*3,b*1, sets its share of the rows", none="the running Python's standard library")
    data_type: Literal["plaintext", "conversation", "edits"] = setting(
        "plaintext", "documents; lists of messages of which the answers are learnt; or pairs of texts before and after "
        "an edit")
    datasets_type: Literal["mapping", "iterable"] = setting(
        "mapping", "tokenise before training and keep the tokens, or while reading")
    text_keys: str | None = setting(None, "column; of several, separated by commas, the first present; edits: both",
                                    none="text; messages, conversations; or before,after")
    chat_template: str = setting("default", "template of conversations: the tokenizer's own, or a Jinja file")
    num_workers: int = setting(2, "threads that tokenise text, processes for what Python itself must do; 0: as 1",
                               at_least=0)
    train_size: int | None = setting(None, "tokens that make an epoch", at_least=1, none="the corpus")
    max_seq_len: int = setting(2048, "tokens of a row; longer documents are cut into consecutive chunks", at_least=2)
    validation_share: float = setting(0.05, "share of the documents held out, chosen by a hash of their names",
                                      at_least=0, below=1)

    def __post_init__(self):
        check(self, "data.")
        expand_home(self, "chat_template")
        require("data.text_keys", self.text_keys, any(self.key_list), "a column name")
        if self.data_type == "edits":
            require("data.text_keys", self.text_keys, len(set(self.key_list)) == len(self.key_list) == 2,
                    "two columns with data.data_type=edits, the text before and the one after, as before,after")
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
        usual = {"plaintext": "text", "conversation": "messages,conversations", "edits": "before,after"}
        return split_commas(usual[self.data_type] if self.text_keys is None else self.text_keys)

    @property
    def sources(self) -> list[tuple[list[str] | None, float]]:
        """(paths, weight): each path that has a weight, or all of them together."""
        weighted = [([path], weight) for path, weight in self._entries if weight is not None]
        return weighted or [(self.path_list, 1.0)]

    @property
    def _entries(self) -> list[tuple[str, float | None]]:
        """(path, weight or None)"""
        entries = [_WEIGHTED.fullmatch(entry) for entry in split_commas(self.train_path or "")]
        return [(os.path.expanduser(entry["path"]), entry["weight"] and float(entry["weight"])) for entry in entries]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainGroup:
    """How to train."""

    output_dir: str = setting(MISSING, "folder that gets checkpoints/, metrics.jsonl, config.yaml")
    # Objective
    objective: Literal["mdm", "elbo", "block_diffusion", "cart", "expansion", "edit", "uniform", "canvas",
                       "ar"] = setting(
        "mdm", "equal weights; the bound, 1/t; the bound of blocks (BD3-LM); weights by visible neighbours (Dream); "
        "gaps of unknown length (DreamOn); insertions, deletions and substitutions (Edit Flows); uniform words in the "
        "place of masks or beside them (UDLM, GIDD); canvases of random words (DiffusionGemma); next token, causal")
    block_length: int | None = setting(None, "block_diffusion: tokens of a block", above=0)
    causal_blocks: bool | None = setting(
        None, "block_diffusion: a token sees nothing after itself in its block either, so that an autoregressive model "
        "keeps what it knows", none="as the model was trained")
    masked_share: float | None = setting(
        None, "block_diffusion: the share of masked tokens in every block; 1 masks whole blocks, which teaches to "
        "draft (I-DLM)", above=0, at_most=1, none="drawn for each block")
    expand_token_id: int | None = setting(
        None, "expansion: the token that becomes two masked ones; end-of-text deletes one")
    edit_source: Literal["empty", "masks", "uniform"] | None = setting(
        None, "edit: what a text is made of: nothing, so that tokens are inserted alone; masks; or uniform words",
        none="empty")
    edit_source_length: int | None = setting(None, "edit: tokens of the source masks or uniform", above=0, none="64")
    edit_propagation: float = setting(
        0.0, "edit: rate at which a change spreads to its neighbours (localized Edit Flows)", at_least=0)
    uniform_share: float | None = setting(
        None, "uniform: share of words in the noise, the rest are masks (GIDD); 1: no masks (UDLM)", at_least=0,
        at_most=1, none="1")
    loss_weighting: Literal["clip", "dynamic"] | None = setting(
        None, "uniform: GIDD's weights, in the place of those of the bound, which are large near t = 0 and 1",
        none="the bound")
    self_conditioning: float | None = setting(
        None, "chance of a step (canvas: of an example) to predict twice, the second time from the text and the first "
        "prediction, of which sampling then shows the model the last step's; 0.5 is usual", at_least=0, at_most=1,
        none="0.5 for canvas, else 0, a model without it")
    path_term: bool = setting(False, "mdm: add Open-dLLM's planner term (P2)")
    mask_at_least_one: bool = setting(False, "mdm: mask a token of every document, whatever its time")
    corrupt_prompt: bool = setting(False, "mdm: mask also the prompts of conversations, as Open-dLLM does")
    schedule: Schedules = setting("linear", "corruption over time")
    repr_align_wt: float = setting(
        0.0, "weight of aligning hidden states with those of model.model_path, causal and frozen", at_least=0)
    anneal_attention_ratio: float = setting(
        0.0, "share of the steps in which causal attention opens to both directions", at_least=0, at_most=1)
    freeze_layers: str | None = setting(
        None, "parameters that are not trained: names or parts of names, separated by commas")
    # Optimisation
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "AdamW; or Muon for the matrices of the layers and AdamW for the rest")
    lr: float = setting(5e-5, "peak learning rate; Muon's updates are scaled so that AdamW's value suits it", above=0)
    muon_lr: float | None = setting(None, "peak for Muon's matrices, on the same schedule", above=0, none="lr")
    lr_min: float = setting(1e-7, "end of the cosine schedule", at_least=0)
    lr_start: float = setting(0.0, "beginning of the warm-up", at_least=0)
    lr_warmup_ratio: float = setting(0.0, "warm-up, as a share of the steps", at_least=0, at_most=1)
    lr_decay_style: Literal["constant", "linear", "cosine"] = setting("constant", "learning rate after the warm-up")
    lr_decay_ratio: float = setting(1.0, "share of the steps after which cosine reaches lr_min", above=0, at_most=1)
    weight_decay: float = setting(0.0, "decay of matrices; biases and norms are never decayed", at_least=0)
    max_grad_norm: float = setting(1.0, "gradients of a larger norm are scaled down to it; 0: never", at_least=0)
    micro_batch_size: int = setting(1, "rows of max_seq_len tokens in one forward pass", above=0)
    global_batch_size: int | None = setting(None, "rows per step, a multiple of micro_batch_size", above=0,
                                            none="micro_batch_size")
    num_train_epochs: int = setting(1, "epochs", above=0)
    max_steps: int | None = setting(None, "upper bound on the steps", above=0)
    max_minutes: float | None = setting(
        None, "upper bound on the minutes, restarts included; the schedule follows the clock", above=0)
    seed: int = setting(42, "seed of weights, data order and corruption", at_least=0)
    max_bad_steps: int = setting(10, "steps in a row that may be skipped because a gradient is not finite", above=0)
    # Machine
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: the GPU if there is one")
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "bf16: bf16 arithmetic on fp32 weights; auto: bf16 on a GPU, and on a CPU with units for it (AMX, "
        "AVX512-BF16) where a probe of a second shows that it is faster")
    data_parallel_mode: Literal["ddp", "fsdp2"] = setting(
        "ddp", "each of several processes has the whole model (ddp) or a part of it (fsdp2)")
    enable_full_shard: bool = setting(
        True, "fsdp2: free a layer's weights after its forward pass too, and gather them again")
    ulysses_parallel_size: int = setting(1, "processes that share the positions of a row, for long documents", above=0)
    enable_gradient_checkpointing: bool = setting(
        False, "keep no activations inside layers, compute them again")
    lora_rank: int = setting(0, "train only low-rank adapters (LoRA) of this rank; 0: all weights", at_least=0)
    lora_alpha: float = setting(16.0, "the adapters' products are scaled by lora_alpha / lora_rank", above=0)
    enable_compile: bool = setting(False, "torch.compile the layers: faster steps, minutes before the first one")
    layers_backend: LayersBackend = setting(
        "auto", "norms, rotary embedding and SwiGLU by PyTorch, or by Liger-Kernel (extra liger) on CUDA; auto: the "
        "latter where it is installed and enable_compile is false")
    # Saving and measuring
    auto_resume: bool = setting(True, "continue from the newest whole checkpoint in output_dir")
    save_steps: int = setting(0, "steps between checkpoints; 0: only at the end, and on a signal to stop", at_least=0)
    save_time_interval_minutes: float = setting(0.0, "minutes between checkpoints at most; 0: no limit", at_least=0)
    keep_last: int | None = setting(None, "checkpoints kept", above=0, none="all")
    save_async: bool = setting(
        False, "write a checkpoint while the next steps go on, from a copy in the CPU's memory")
    save_hf_weights: bool = setting(
        True, "every checkpoint has a Hugging Face folder; false: only the last one")
    eval_every: int = setting(0, "steps between measurements of the validation loss; 0: only at the end", at_least=0)
    eval_tokens: int = setting(65536, "held-out tokens in a measurement, the same ones each time", above=0)
    eval_tasks: str | None = setting(
        None, "tasks of dllm eval for every checkpoint, as 'humaneval --limit 20; perplexity'")
    log_steps: int = setting(1, "steps between lines of metrics.jsonl", above=0)
    use_tensorboard: bool = setting(True, "write events to output_dir/tensorboard, if tensorboard is installed")
    use_wandb: bool = setting(False, "send metrics to Weights & Biases")
    wandb_project: str = setting("dllm", "the project there")
    wandb_name: str | None = setting(None, "the run there", none="the name of output_dir")
    enable_profiling: bool = setting(False, "torch.profiler around steps [profile_start_step, profile_end_step)")
    profile_start_step: int = setting(1, "first step profiled", at_least=0)
    profile_end_step: int = setting(2, "the step after the last one profiled")
    profile_trace_dir: str = setting("./trace", "gets a trace of the main process, for chrome://tracing or Perfetto")

    def __post_init__(self):
        check(self, "train.")
        expand_home(self, "output_dir", "profile_trace_dir")
        require("train.output_dir", self.output_dir, bool(self.output_dir), "a folder")
        require("train.lr_min", self.lr_min, self.lr_decay_style != "cosine" or self.lr_min <= self.lr,
                f"at most lr {self.lr}")
        require("train.profile_end_step", self.profile_end_step, self.profile_end_step > self.profile_start_step,
                f"above profile_start_step {self.profile_start_step}")
        require("train.global_batch_size", self.rows_per_step, self.rows_per_step % self.micro_batch_size == 0,
                f"a multiple of micro_batch_size {self.micro_batch_size}")
        split_tasks(self.eval_tasks)
        self._check_objective()
        for name in ("repr_align_wt", "anneal_attention_ratio"):
            value = getattr(self, name)
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

    def _check_objective(self) -> None:
        """Refuse keys that the objective has no use for, or that it lacks."""
        for objective, name, example in (("expansion", "expand_token_id", "a token of the model"),
                                         ("block_diffusion", "block_length", "as in train.block_length=32")):
            if (self.objective == objective) != (getattr(self, name) is not None):
                raise UserError(f"train.objective={objective} and train.{name}, {example}, need each other; the "
                                f"objective is {self.objective}")
        for name, objectives, why in (
                ("path_term", ("mdm",), ""),
                ("causal_blocks", ("block_diffusion",), ""),
                ("masked_share", ("block_diffusion",), " (it would bias the bound)"),
                ("mask_at_least_one", ("mdm",), " (it would bias the bound)"),
                ("corrupt_prompt", ("mdm",), " (the others model answers to a prompt that is visible)"),
                *((name, ("edit",), "") for name in ("edit_source", "edit_source_length", "edit_propagation")),
                ("loss_weighting", ("uniform",), ""),
                ("self_conditioning", ("mdm", "elbo", "cart", "uniform", "canvas"), ""),
                ("repr_align_wt", ("mdm", "elbo"), ""),
                ("anneal_attention_ratio", ("mdm", "elbo"), "")):
            if getattr(self, name) and self.objective not in objectives:
                raise UserError(f"train.{name} {getattr(self, name)} needs train.objective={' or '.join(objectives)}, "
                                f"not {self.objective!r}{why}; remove one of them")
        if self.uniform_share is not None and self.objective != "uniform":
            raise UserError(f"train.uniform_share {self.uniform_share} needs train.objective=uniform, not "
                            f"{self.objective!r}; remove one of them")
        if self.objective == "uniform":
            self._check_uniform()
        if self.self_conditioning and self.ulysses_parallel_size > 1:
            raise UserError("train.self_conditioning predicts whole rows in one process: set "
                            "train.ulysses_parallel_size to 1")
        if self.objective == "block_diffusion" and self.ulysses_parallel_size > 1:
            raise UserError("train.objective=block_diffusion has two copies of each row in one process: set "
                            "train.ulysses_parallel_size to 1")
        if self.objective == "edit" and self.ulysses_parallel_size > 1:
            raise UserError("train.objective=edit learns from edits anywhere in a row: set train.ulysses_parallel_size "
                            "to 1")
        if self.objective == "canvas" and (self.ulysses_parallel_size > 1 or self.enable_compile):
            name = "enable_compile" if self.enable_compile else "ulysses_parallel_size"
            raise UserError(f"train.objective=canvas has two passes over whole rows, and no train.{name}; leave it out")
        if self.edit_source_length and self.edit_source not in ("masks", "uniform"):
            raise UserError(f"train.edit_source_length {self.edit_source_length} needs train.edit_source=masks or "
                            "uniform, for the empty source has no tokens; remove one of them")
        if self.objective == "expansion" and self.schedule != "linear":
            raise UserError("train.objective=expansion masks a gap at the rate that is drawn: set train.schedule to "
                            f"linear, not {self.schedule}")

    def _check_uniform(self) -> None:
        if self.noise_share < 1 and self.schedule != "linear":
            raise UserError(f"train.uniform_share {self.uniform_share} has GIDD's own schedule: set train.schedule to "
                            f"linear, not {self.schedule}, or train.uniform_share to 1")
        if self.noise_share == 1 and self.loss_weighting == "dynamic":
            raise UserError("train.loss_weighting=dynamic weighs masks against words, and train.uniform_share 1 has no "
                            "masks; set clip, or a lower share")

    @property
    def noise_share(self) -> float | None:
        """The share of uniform words in the noise; None: masks alone, of another objective."""
        if self.objective != "uniform":
            return None
        return 1.0 if self.uniform_share is None else self.uniform_share

    @property
    def bounds_likelihood(self) -> bool:
        """Whether the loss bounds the negative log-likelihood."""
        return self.objective in ("elbo", "block_diffusion", "uniform") and self.loss_weighting is None

    @property
    def source_tokens(self) -> int:
        """Tokens of the source that a text is edited out of."""
        return (self.edit_source_length or 64) if self.edit_source in ("masks", "uniform") else 0

    @property
    def self_conditioning_chance(self) -> float:
        usual = 0.5 if self.objective == "canvas" else 0.0
        return usual if self.self_conditioning is None else self.self_conditioning

    @property
    def rows_per_step(self) -> int:
        return self.global_batch_size or self.micro_batch_size

    @property
    def eval_task_list(self) -> list[list[str]]:
        """The words of each task."""
        return split_tasks(self.eval_tasks)

    @property
    def frozen_names(self) -> list[str]:
        return split_commas(self.freeze_layers or "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    train: TrainGroup
    model: ModelGroup = field(default_factory=ModelGroup)
    data: DataGroup = field(default_factory=DataGroup)

    def __post_init__(self):
        if self.data.data_type == "edits" and self.train.objective != "edit":
            raise UserError(f"data.data_type=edits is learnt by train.objective=edit alone, not "
                            f"{self.train.objective!r}; set it, or another data.data_type")
        if self.data.data_type == "edits" and self.train.edit_source:
            raise UserError(f"train.edit_source {self.train.edit_source!r} has no effect with data.data_type=edits, "
                            "where the text before is the source; remove one of them")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {name: asdict(getattr(self, name)) for name in GROUPS}

    def to_yaml(self) -> str:
        """YAML that `load_config` reads back as an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


GROUPS: Mapping[str, type] = {"model": ModelGroup, "data": DataGroup, "train": TrainGroup}


def split_tasks(value: str | None) -> list[list[str]]:
    try:
        return [shlex.split(task) for task in (value or "").split(";") if task.strip()]
    except ValueError as error:  # an open quotation
        raise UserError(f"train.eval_tasks {value!r} cannot be read ({str(error).lower()}); write tasks as "
                        "'humaneval --limit 20; perplexity'") from None


def split_commas(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]
