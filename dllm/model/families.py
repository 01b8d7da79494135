"""Families: how the config.json and the parameter names of each published model map to ours, and back.

A family is data: which configuration keys shape the model, which may be ignored, which are only supported at one value,
and what its parameters are called where that is not the Llama line's `model.layers.0.self_attn.q_proj.weight`, as ours
are. What has to be done to the tensors is in published.py. Nothing here imports torch, until a model that is not among
the families is found: Transformers reads its configuration (borrowed_config.py).
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Literal

from dllm.config.fields import check, setting
from dllm.errors import UserError, did_you_mean, warn
from dllm.model.borrowed_config import language_part, opened_window, read_borrowed, tell_differences
from dllm.model.rope_settings import check_rope, differing_rope, flatten_rope
from dllm.model.special_tokens import check_ids


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a `DiffusionLM`. Field names are those of Transformers' configurations where one exists."""

    family: str = "qwen3"  # a key of FAMILIES, or a model_type of Transformers; decides the names in config.json
    vocab_size: int = setting(MISSING, "tokens", at_least=1)
    hidden_size: int = setting(MISSING, "width", at_least=1)
    intermediate_size: int = setting(MISSING, "width of the SwiGLU feed-forward", at_least=1)
    num_hidden_layers: int = setting(MISSING, "layers", at_least=1)
    num_attention_heads: int = setting(MISSING, "query heads", at_least=1)
    num_key_value_heads: int = setting(MISSING, "key and value heads, a divisor of num_attention_heads", at_least=1)
    head_dim: int = setting(MISSING, "numbers of a head, even", at_least=1)
    max_position_embeddings: int = setting(32768, "positions; a longer input is refused", at_least=1)
    rope_theta: float = setting(10000.0, "base of the rotary embedding", above=0)
    partial_rotary_factor: float = setting(1.0, "share of each head, from its first number on, that is rotated")
    rope_scaling: Mapping | None = None  # None, or {"rope_type": "llama3" or "linear", "factor": ...}
    rms_norm_eps: float = setting(1e-6, "added to the mean square", at_least=0)
    qkv_bias: bool = setting(False, "of the attention's query, key and value projections")
    output_bias: bool = setting(False, "of the attention's output projection")
    mlp_bias: bool = setting(False, "of the feed-forward's projections")
    qk_norm: bool = setting(False, "RMSNorm of every query and key head, before the rotary embedding")
    tie_word_embeddings: bool = setting(False, "the head is the embedding")
    num_experts: int = setting(0, "of a mixture in the place of the feed-forward (arXiv:1701.06538); 0: none")
    num_experts_per_tok: int = setting(1, "experts of a token")
    moe_intermediate_size: int = setting(0, "width of each expert's SwiGLU")
    num_shared_experts: int = setting(0, "so many times that width, for every token")
    first_k_dense_replace: int = setting(0, "layers with a feed-forward before those with experts")
    router_score: str = "softmax"  # or "sigmoid", each of the router's logits
    router_bias: bool = setting(False, "added to the scores to balance the experts")
    n_group: int = setting(1, "the experts are in so many groups, of which")
    topk_group: int = setting(1, "the best so many are chosen from")
    norm_topk_prob: bool = setting(False, "the weights of the chosen experts sum to 1")
    routed_scaling_factor: float = setting(1.0, "times this")
    block_causal: bool = False  # trained to see whole blocks up to one's own, so decoded block by block
    block_length: int | None = setting(None, "tokens of a block", at_least=1, none="the checkpoint does not say")
    causal_blocks: bool = setting(False, "a token sees nothing after itself in its block either, so a finished text is "
                                  "seen as an autoregressive model sees it")
    edit_heads: Literal["insert", "all"] | None = setting(
        None, "heads that insert tokens (Edit Flows, arXiv:2506.09018), or also delete and substitute them")
    canvas_length: int | None = setting(None, "tokens of a canvas that begins as random words, after what is before it "
                                        "(DiffusionGemma)", at_least=1, none="masked positions are filled")
    logit_softcap: float | None = setting(None, "logits are this * tanh(logits / this)", above=0, none="as they are")
    initializer_range: float = setting(0.02, "standard deviation of a random initialisation", at_least=0)
    logit_scale: float = setting(1.0, "times the product of hidden states and head", above=0)
    logit_softcap: float | None = setting(None, "c: a logit z becomes c * tanh(z / c)", above=0, none="no cap")
    shift_logits: bool = setting(True, "the logits at position i are about token i + 1, as in autoregressive models")
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    source: Mapping = field(default_factory=dict, repr=False, compare=False)  # the config.json it was read from

    def __post_init__(self):
        check(self, "model configuration: ")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"model configuration: num_key_value_heads {self.num_key_value_heads} must divide "
                            f"num_attention_heads {self.num_attention_heads}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(f"model configuration: the rotary embedding turns {self.rotary_dim} numbers of each head "
                            f"(head_dim {self.head_dim}); it must be an even number, at most all")
        self._check_experts()
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(f"model configuration: mask_token_id {self.mask_token_id} is outside the vocabulary of "
                            f"{self.vocab_size}; enlarge vocab_size or choose an id below it")
        if self.causal_blocks and not self.block_causal:
            raise UserError("model configuration: causal_blocks is about the blocks of a block-causal model; add "
                            "block_size, the tokens of a block, or remove causal_blocks")
        check_rope(self.rope_scaling)

    def _check_experts(self):
        n, k, groups = self.num_experts, self.num_experts_per_tok, self.n_group
        if n == 0:
            return
        if self.router_score not in ("softmax", "sigmoid"):
            raise UserError(f"model configuration: router_score must be softmax or sigmoid, not {self.router_score!r}")
        if self.moe_intermediate_size < 1 or not 1 <= k <= n:
            raise UserError(f"model configuration: {n} experts need a moe_intermediate_size of 1 or more, not "
                            f"{self.moe_intermediate_size}, and between 1 and {n} num_experts_per_tok, not {k}")
        if groups < 1 or n % groups or not 1 <= self.topk_group <= groups or k > n // groups * self.topk_group:
            raise UserError(f"model configuration: {n} experts in n_group {groups} groups, of which topk_group "
                            f"{self.topk_group} are kept, cannot give num_experts_per_tok {k}")

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that the rotary embedding turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def borrowed(self) -> bool:
        """Whether Transformers' own model computes the hidden states (borrowed.py)."""
        return self.family not in FAMILIES

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer >= self.first_k_dense_replace


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model_type is read and written."""

    architecture: str  # the class name that Transformers looks up
    keys: Mapping[str, str]  # config.json key -> ModelConfig field
    fixed: Mapping[str, object]  # ModelConfig fields that this model_type implies
    only: Mapping[str, tuple]  # config.json keys supported at these values alone
    ignored: frozenset[str] = frozenset()  # further keys that do not change what a forward pass computes
    model_type: str = ""  # in config.json, where it is not the family's own name
    parameters: Mapping[str, str] = field(default_factory=dict)  # published name -> ours, {i} for the layer
    required: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads")


# Keys that do not change what a forward pass computes: serialised by Transformers 4 and 5, by training tools and hubs.
# Dropouts are among them, because they act in training alone.
IGNORED = frozenset("""
    architectures model_type torch_dtype dtype transformers_version use_cache auto_map name_or_path _name_or_path
    _commit_hash layer_types max_window_layers sliding_window pretraining_tp _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled use_flash_attention use_flash_attn
    _experts_implementation return_dict use_return_dict output_attentions output_hidden_states is_encoder_decoder
    gradient_checkpointing id2label label2id num_labels problem_type chunk_size_feed_forward torchscript use_bfloat16
    unsloth_version unsloth_fixed cross_attention_hidden_size add_cross_attention is_decoder is_causal
    tie_encoder_decoder pruned_heads finetuning_task task_specific_params tf_legacy_loss tokenizer_class prefix
    sep_token_id decoder_start_token_id max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty cache_implementation is_llama_config transformers.js_config
    model_max_length seq_length max_seq_len max_sequence_length initializer_factor router_aux_loss_coef
    output_router_logits fuse_cross_entropy ep_size debug micro_forward skip_checkpoint base_model_name_or_path
""".split())
_DROPOUT = re.compile(r".*(dropout|dropout_rate|_pdrop|dropout_prob|drop_path)")

# Keys by which other models compute something else, and the values at which they do not (beside null, false and empty).
CHANGING: Mapping[str, tuple] = {name: () for name in """
    quantization_config quantization compression_config attention_multiplier query_pre_attn_scalar attn_scale
    final_logit_softcapping attn_logit_softcapping logits_soft_cap clip_qkv alibi use_alibi attention_chunk_size
    no_rope_layers no_rope_layer_interval rope_interleaved rope_local_base_freq use_mrope qk_norm use_qk_norm
    qk_layernorm attn_output_gate add_swa_attention_sink_bias parallel_attn use_parallel_residual use_post_norm
    altup_num_inputs q_lora_rank kv_lora_rank cross_attention_layers nope_layer_interval scale_logits
""".split()} | {name: (1,) for name in """
    partial_rotary_factor rotary_pct logit_scale logits_scaling embedding_multiplier embedding_scale scale_emb
    residual_multiplier residual_scale scale_depth lm_head_multiplier
""".split()}

# A block_size, as SDAR calls it, says that the model is block-causal; causal_blocks is a key of ours.
_COMMON = {"block_size": "block_length", **{name: name for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings",
    "initializer_range", "shift_logits", "causal_blocks", "edit_heads", "mask_token_id", "pad_token_id", "bos_token_id",
    "eos_token_id")}}
_ONLY = {"hidden_act": ("silu",)}
# Those of them that a model borrowed from Transformers takes; it reads the rest of its config.json itself.
_BORROWED = {key: _COMMON[key] for key in (
    "vocab_size", "tie_word_embeddings", "shift_logits", "block_size", "causal_blocks", "edit_heads", "mask_token_id",
    "pad_token_id", "bos_token_id", "eos_token_id")}

_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers")
_TRANSFORMERS = ("qwen2", "qwen3", "llama", "mistral")  # families of autoregressive models that it has itself
_WINDOWED = ("qwen2", "qwen3", "mistral")  # of these, those with sliding windows, which adapting them opens

# Other names that checkpoints give the same architecture.
_MODEL_TYPES = {"lladamoe": "llada_moe", "llada21_moe": "llada2_moe", "llada2_moe_veomni": "llada2_moe",
                "dream": "Dream"}

_BASES: Mapping[str, Family] = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", keys=_COMMON, fixed={"qkv_bias": True}, only=_ONLY),
    "qwen3": Family(architecture="Qwen3ForCausalLM", keys=_COMMON, fixed={"qk_norm": True},
                    only={**_ONLY, "attention_bias": (False,)}),
    "llama": Family(architecture="LlamaForCausalLM", fixed={}, only=_ONLY,
                    keys={**_COMMON, "mlp_bias": "mlp_bias", "attention_bias": "qkv_bias"}),
    "mistral": Family(architecture="MistralForCausalLM", keys=_COMMON, fixed={}, only=_ONLY),
    # Stable-DiffCoder, which calls itself llama
    "stable_diffcoder": Family(architecture="StableDiffcoderForCausalLM", model_type="llama", only=_ONLY,
                               keys={**_COMMON, "mlp_bias": "mlp_bias", "attention_bias": "qkv_bias"},
                               fixed={"shift_logits": False, "block_causal": True, "block_length": 4}),
    # Dream, Dream-Coder, DiffuCoder, DreamOn (arXiv:2508.15487)
    "Dream": Family(architecture="DreamModel", keys=_COMMON, fixed={"qkv_bias": True}, only=_ONLY),
    # Autoregressive models trained on as diffusion models, without the shift
    "a2d-qwen2": Family(architecture="A2DQwen2LMHeadModel", keys=_COMMON, only=_ONLY,
                        fixed={"qkv_bias": True, "shift_logits": False}),
    "a2d-qwen3": Family(architecture="A2DQwen3LMHeadModel", keys=_COMMON, only={**_ONLY, "attention_bias": (False,)},
                        fixed={"qk_norm": True, "shift_logits": False}),
    # SDAR (arXiv:2510.06303)
    "sdar": Family(architecture="SDARForCausalLM", keys=_COMMON, only={**_ONLY, "attention_bias": (False,)},
                   fixed={"qk_norm": True, "shift_logits": False, "block_causal": True, "block_length": 4}),
    # LLaDA, LLaDA 1.5 (arXiv:2502.09992)
    "llada": Family(
        architecture="LLaDAModelLM", fixed={"shift_logits": False},
        keys={"vocab_size": "vocab_size", "embedding_size": "vocab_size", "d_model": "hidden_size",
              "mlp_hidden_size": "intermediate_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
              "n_kv_heads": "num_key_value_heads", "max_sequence_length": "max_position_embeddings",
              "rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps", "weight_tying": "tie_word_embeddings",
              "include_qkv_bias": "qkv_bias", "init_std": "initializer_range", "block_size": "block_length",
              "edit_heads": "edit_heads", "mask_token_id": "mask_token_id",
              "pad_token_id": "pad_token_id", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"},
        required=("vocab_size", "d_model", "mlp_hidden_size", "n_layers", "n_heads"),
        only={"block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,),
              "include_bias": (False,), "scale_logits": (False,), "input_emb_norm": (False,), "alibi": (False,),
              "attention_layer_norm": (False,), "layer_norm_with_affine": (True,), "block_group_size": (1,),
              "bias_for_layer_norm": (False, None), "multi_query_attention": (False, None)},
        ignored=frozenset("""
            alibi_bias_max attention_layer_norm_with_affine flash_attention init_cutoff_factor init_device init_fn
            mlp_ratio precision rope_full_precision""".split()),
        parameters={
            "model.transformer.wte": "model.embed_tokens", "model.transformer.ln_f": "model.norm",
            "model.transformer.ff_out": "lm_head",
            **{f"model.transformer.blocks.{{i}}.{theirs}": f"model.layers.{{i}}.{ours}" for theirs, ours in {
                "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
                "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
                "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}.items()}}),
    # LLaDA-MoE, which calls itself llada too
    "llada_moe": Family(
        architecture="LLaDAMoEModelLM", model_type="llada", fixed={"shift_logits": False, "qk_norm": True},
        keys={**{key: value for key, value in _COMMON.items() if key != "intermediate_size"},
              "dense_intermediate_size": "intermediate_size", "expert_intermediate_size": "moe_intermediate_size",
              "num_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok",
              "qk_layernorm": "qk_norm", "moe_router_enable_expert_bias": "router_bias",
              "moe_layer_freq": "first_k_dense_replace"},
        required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts",
                  "num_experts_per_tok", "expert_intermediate_size"),
        only={**_ONLY, "attention_bias": (False,), "clip_qkv": (None,), "partial_rotary_factor": (1, None),
              "moe_router_score_function": ("softmax",), "router_num_group": (None,), "router_topk_group": (None,),
              "shared_expert_intermediate_size": (None, 0), "routed_scaling_factor": (1, None)},
        ignored=frozenset({"norm_topk_prob"}),
        parameters={"model.layers.{i}.mlp.expert_bias": "model.layers.{i}.mlp.gate.expert_bias"}),
    # LLaDA 2 and 2.1
    "llada2_moe": Family(
        architecture="LLaDA2MoeModelLM",
        fixed={"shift_logits": False, "qk_norm": True, "block_causal": True, "router_score": "sigmoid",
               "norm_topk_prob": True},
        keys={**_COMMON, **{name: name for name in (
            "num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "n_group",
            "topk_group", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob", "partial_rotary_factor")},
            "use_qkv_bias": "qkv_bias", "moe_router_enable_expert_bias": "router_bias"},
        required=("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        only={**_ONLY, "score_function": ("sigmoid",), "use_bias": (False,), "use_rmsnorm": (True,),
              "norm_head": (False,), "norm_softmax": (False,), "using_split_qkv_in_self_attention": (False,)},
        # The published configurations contradict each other on use_qk_norm: whether the norms are there decides.
        ignored=frozenset({"rotary_dim", "router_dtype", "use_qk_norm", "moe_shared_expert_intermediate_size"}),
        parameters={
            "model.word_embeddings": "model.embed_tokens",
            **{f"model.layers.{{i}}.attention.{theirs}": f"model.layers.{{i}}.self_attn.{ours}" for theirs, ours in {
                "query_key_value": "qkv_proj", "dense": "o_proj", "query_layernorm": "q_norm",
                "key_layernorm": "k_norm"}.items()}}),
}


def _with_edit_heads(family: Family, architecture: str) -> Family:
    """The published Edit Flow of a family: the substitution head is our head, and never tied; the base's own head is
    not there or not used."""
    tied = {"tie_word_embeddings", "weight_tying"}
    names = {theirs: ours for theirs, ours in family.parameters.items() if ours != "lm_head"}
    return replace(family, architecture=architecture, model_type="",
                   keys={key: value for key, value in family.keys.items() if key not in tied},
                   fixed={**family.fixed, "edit_heads": "all"}, ignored=family.ignored | tied,
                   parameters={**names, "sub_logits": "lm_head", "ins_logits": "insert_head",
                               "rate_heads.0": "rate_head"})


EDIT_FAMILIES: Mapping[str, Family] = {
    f"editflow-{name}": _with_edit_heads(_BASES[base], f"EditFlow{called}Model") for name, base, called in (
        ("qwen2", "a2d-qwen2", "Qwen2"), ("qwen3", "a2d-qwen3", "Qwen3"), ("dream", "Dream", "Dream"),
        ("llada", "llada", "LLaDA"))}
FAMILIES: Mapping[str, Family] = {**_BASES, **EDIT_FAMILIES}


def read_config(raw: Mapping, where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a Hugging Face config.json, given as a dictionary.

    Keys that change nothing are ignored, and so is any that is null, false or empty. Other unknown keys are named in
    one warning, because they might change what the original computes.

    Raises: UserError if the family is unknown, a required key is missing, or a value unsupported; the message names
        `where`, the key and what is accepted.
    """
    if raw.get("model_type") not in FAMILIES:
        raw = language_part(raw, where)
    config = _parse(raw, where)
    if config.borrowed:
        tell_differences(raw, where)
        return config
    family, flat = FAMILIES[config.family], flatten_rope(raw)
    if unknown := [key for key, value in flat.items() if not is_empty(value) and not _DROPOUT.fullmatch(key)
                   and key not in {*family.keys, *family.only, *family.ignored, *IGNORED, *CHANGING, *_WINDOW}]:
        hint = did_you_mean(unknown[0], {*family.keys, *family.only}) if len(unknown) == 1 else ""
        warn(f"{where}: {config.family} has no configuration key {', '.join(map(repr, unknown))}, ignored{hint}")
    own_code = any(name.startswith("AutoModel") for name in raw.get("auto_map") or {})
    if own_code and config.family in _TRANSFORMERS and not {"shift_logits", "block_size"} & raw.keys():
        warn(f"{where}: the folder brings code of its own for a model_type {raw['model_type']!r}, which is not run; "
             f"position i predicts token i + 1, as in {config.family}. If it predicts its own token, add "
             '"shift_logits": false, and if it decodes by blocks, "block_size"')
    if config.family in _WINDOWED and (window := _window(config.family, flat)) is not None:
        warn(opened_window(where, config.family, window))
    for differing in filter(None, (differing_rope(raw), _differing_dtype(raw), _differing_class(raw, family))):
        warn(f"{where}: {differing}")
    return config


def _parse(raw: Mapping, where: str = "config.json") -> ModelConfig:
    """`read_config` without its warnings."""
    for key in ("rope_scaling", "rope_parameters", "auto_map"):
        if raw.get(key) is not None and not isinstance(raw[key], Mapping):
            raise UserError(f"{where}: {key} must be a dictionary or null, not {raw[key]!r}")
    name = _family_of(raw)
    check_ids(raw, where)
    if name not in FAMILIES:
        values = {target: raw[key] for key, target in _BORROWED.items() if raw.get(key) is not None}
        return ModelConfig(family=name, source=dict(raw), **{
            **read_borrowed(raw, where, FAMILIES), "block_causal": "block_length" in values, **values})
    family = FAMILIES[name]
    raw_keys = flatten_rope(raw)
    if missing := [key for key in family.required if raw_keys.get(key) is None]:
        raise UserError(f"{where}: {name} needs the key{'s' * (len(missing) > 1)} {', '.join(missing)}")
    _check_values(name, raw_keys, where)
    values = {target: raw_keys[key] for key, target in family.keys.items() if raw_keys.get(key) is not None}
    values = {"block_causal": "block_length" in values, **family.fixed, **values}
    if (layers := values.get("first_k_dense_replace")) is not None and not isinstance(layers, int):
        values["first_k_dense_replace"] = _dense_layers(layers, where)
    values.setdefault("intermediate_size", values.get("moe_intermediate_size"))  # where no layer has a feed-forward
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if "attention_bias" in family.keys:  # one key for all four projections of a Llama
        values["output_bias"] = values.get("qkv_bias", False)
    return ModelConfig(family=name, source=dict(raw), **values)


def _family_of(raw: Mapping) -> str | None:
    name = _MODEL_TYPES.get(raw.get("model_type"), raw.get("model_type"))
    if name == "llada" and raw.get("num_experts"):
        return "llada_moe"
    code = [*(raw.get("architectures") or []), *(raw.get("auto_map") or {}).values()]
    if name == "llama" and any("diffcoder" in str(part).lower() for part in code):
        return "stable_diffcoder"
    return name


def _check_values(name: str, raw: Mapping, where: str) -> None:
    """Refuse what would change the computation and is not computed here."""
    family = FAMILIES[name]
    for key, value in raw.items():
        if key in family.only and value is not None and value not in family.only[key]:
            raise UserError(f"{where}: {key} {value!r} is not supported for {name}; "
                            f"supported: {', '.join(map(repr, family.only[key]))}")
        if (key in CHANGING and key not in {*family.keys, *family.only, *family.ignored}
                and not is_empty(value) and value not in CHANGING[key]):
            accepted = ", ".join(map(repr, (None, *CHANGING[key])))
            raise UserError(f"{where}: {key} {value!r} is not supported for {name}; supported: {accepted}")
    kinds = raw.get("layer_types") or []
    if other := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise UserError(f"{where}: layer_types {other[0]!r} is not supported; supported: 'full_attention'")
    if name not in _WINDOWED and (window := _window(name, raw)) is not None:
        raise UserError(f"{where}: sliding_window {window} is not supported, because every position sees every other "
                        "here; set max_position_embeddings to at most the window, and it changes nothing")


def _window(name: str, raw: Mapping) -> int | None:
    """The sliding window of some layers, where a text can be longer."""
    kinds = raw.get("layer_types") or []
    window, positions = raw.get("sliding_window"), raw.get("max_position_embeddings")
    if kinds:
        slides = "sliding_attention" in kinds
    elif name == "mistral":
        slides = window is not None
    else:
        slides = bool(raw.get("use_sliding_window")) and (raw.get("max_window_layers") or 0) < raw["num_hidden_layers"]
    return window if slides and window is not None and (positions is None or positions > window) else None


def is_empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def write_config(config: ModelConfig, dtype: str) -> dict:
    """The config.json dictionary of `config`; one that was read comes back as it was, changed fields apart."""
    keys = _BORROWED if config.borrowed else FAMILIES[config.family].keys
    raw = dict(config.source)
    if not raw:
        family = FAMILIES[config.family]
        raw = {"architectures": [family.architecture], "model_type": family.model_type or config.family, "dtype": dtype}
        raw |= {key: values[0] for key, values in family.only.items() if values[0] is not None}
        raw |= {key: value for key, target in family.keys.items() if (value := getattr(config, target)) is not None}
        if "moe_layer_freq" in raw:
            dense = config.first_k_dense_replace
            raw["moe_layer_freq"] = [0] * dense + [1] * (config.num_hidden_layers - dense)
        again = _parse(raw)
        for name in (f.name for f in fields(ModelConfig) if f.compare):
            if getattr(again, name) != getattr(config, name):
                raise UserError(f"config.json of {config.family} cannot say {name} {getattr(config, name)}; it would "
                                f"be read as {getattr(again, name)}")
        return raw
    before = _parse(raw)
    for key, target in keys.items():
        value = getattr(config, target)
        if value != getattr(before, target):
            if key in ("rope_theta", "rope_scaling") and raw.get("rope_parameters"):
                raise UserError(f"{key} of a loaded model cannot be changed; edit rope_parameters in its config.json")
            raw[key] = value
    for key in ("dtype", "torch_dtype"):
        if key in raw:
            raw[key] = dtype
    return raw


def own_code(raw: Mapping) -> set[str]:
    """The Python files of its own folder that a config.json names under auto_map."""
    named = [part for value in (raw.get("auto_map") or {}).values()
             for part in (value if isinstance(value, list) else [value])]
    return {f"{part.partition('.')[0]}.py" for part in named if part and "--" not in part}


def _dense_layers(moe_layer_freq: list, where: str) -> int:
    """How many layers come before those with experts, of one 0 or 1 per layer."""
    dense = moe_layer_freq.index(1) if 1 in moe_layer_freq else len(moe_layer_freq)
    if moe_layer_freq != [0] * dense + [1] * (len(moe_layer_freq) - dense):
        raise UserError(f"{where}: moe_layer_freq {moe_layer_freq} is not supported; supported: zeros, then ones")
    return dense


def _differing_dtype(raw: Mapping) -> str:
    named = [str(raw[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if raw.get(key)]
    return f"dtype is {named[0]}, torch_dtype {named[1]}; dtype is taken" if len(set(named)) > 1 else ""


def _differing_class(raw: Mapping, family: Family) -> str:
    """A class of another family under architectures, such as Dream's beside the model_type qwen2."""
    known = {other.architecture for other in FAMILIES.values()} - {family.architecture}
    other = next((name for name in raw.get("architectures") or () if name in known), None)
    return f"architectures has {other}, model_type is {raw['model_type']!r}, which is taken" if other else ""
