"""Families: how the config.json and the parameter names of each published model map to ours, and back.

A family is data: which configuration keys shape the model, which may be ignored, which are only supported at one value,
and what its parameters are called where that is not the Llama line's `model.layers.0.self_attn.q_proj.weight`, as ours
are. What has to be done to the tensors is in published.py. Nothing here imports torch.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from dllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a `DiffusionLM`. Field names are those of Transformers' configurations where one exists."""

    family: str = "qwen3"  # a key of FAMILIES; decides the names written to config.json
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of the SwiGLU feed-forward
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # divides num_attention_heads (grouped-query attention)
    head_dim: int  # even, for the rotary embedding
    max_position_embeddings: int = 32768  # positions; a longer input is refused
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # the share of each head, from its first number on, that is rotated
    rope_scaling: Mapping | None = None  # None, or Llama 3's {"rope_type": "llama3", "factor": ...}
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head, before the rotary embedding
    tie_word_embeddings: bool = False
    num_experts: int = 0  # of a mixture in the place of the feed-forward (arXiv:1701.06538); 0: none
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0  # width of each expert's SwiGLU
    num_shared_experts: int = 0  # so many times that width, for every token
    first_k_dense_replace: int = 0  # layers with a feed-forward before those with experts
    router_score: str = "softmax"  # or "sigmoid", each of the router's logits
    router_bias: bool = False  # added to the scores to balance the experts
    n_group: int = 1  # the experts are in so many groups, of which
    topk_group: int = 1  # the best so many are chosen from
    norm_topk_prob: bool = False  # the weights of the chosen experts sum to 1
    routed_scaling_factor: float = 1.0  # times this
    block_causal: bool = False  # trained to see whole blocks up to one's own, so decoded block by block
    block_length: int | None = None  # of these, where the checkpoint names it
    initializer_range: float = 0.02  # standard deviation of a random initialisation
    shift_logits: bool = True  # the logits at position i are about token i + 1, as in autoregressive models
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    source: Mapping = field(default_factory=dict, repr=False, compare=False)  # the config.json it was read from

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model configuration: {name} must be a positive whole number, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"model configuration: num_key_value_heads {self.num_key_value_heads} must divide "
                            f"num_attention_heads {self.num_attention_heads}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(f"model configuration: the rotary embedding turns {self.rotary_dim} numbers of each head "
                            f"(head_dim {self.head_dim}); it must be an even number, at most all")
        self._check_experts()
        if self.block_length is not None and (not isinstance(self.block_length, int) or self.block_length < 1):
            raise UserError(f"model configuration: block_length must be a positive whole number, not "
                            f"{self.block_length!r}")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(f"model configuration: mask_token_id {self.mask_token_id} is outside the vocabulary of "
                            f"{self.vocab_size}; enlarge vocab_size or choose an id below it")
        if self.rope_scaling is not None and self.rope_scaling.get("rope_type") != "llama3":
            raise UserError(f"model configuration: rope_scaling {dict(self.rope_scaling)} is not supported; "
                            "null and rope_type 'llama3' are")

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


# Keys of every Transformers configuration that do not change what a forward pass computes.
IGNORED = frozenset("""
    architectures model_type torch_dtype dtype transformers_version use_cache auto_map name_or_path _name_or_path
    layer_types max_window_layers sliding_window attention_dropout pretraining_tp _attn_implementation
    _attn_implementation_autoset return_dict output_attentions output_hidden_states is_encoder_decoder
    gradient_checkpointing id2label label2id problem_type chunk_size_feed_forward torchscript use_bfloat16
    unsloth_version unsloth_fixed cross_attention_hidden_size add_cross_attention is_decoder finetuning_task
""".split())

# A block_size, as SDAR calls it, says that the model is block-causal.
_COMMON = {"block_size": "block_length", **{name: name for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings",
    "initializer_range", "shift_logits", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")}}
_ONLY = {"hidden_act": ("silu",), "use_sliding_window": (False,)}

# Other names that checkpoints give the same architecture.
_MODEL_TYPES = {"lladamoe": "llada_moe", "llada21_moe": "llada2_moe", "llada2_moe_veomni": "llada2_moe",
                "dream": "Dream"}

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", keys=_COMMON, fixed={"qkv_bias": True}, only=_ONLY),
    "qwen3": Family(architecture="Qwen3ForCausalLM", keys=_COMMON, fixed={"qk_norm": True},
                    only={**_ONLY, "attention_bias": (False,)}),
    "llama": Family(architecture="LlamaForCausalLM", fixed={}, only=_ONLY,
                    keys={**_COMMON, "mlp_bias": "mlp_bias", "attention_bias": "qkv_bias"}),
    # Dream, Dream-Coder, DiffuCoder, DreamOn (arXiv:2508.15487)
    "Dream": Family(architecture="DreamModel", keys=_COMMON, fixed={"qkv_bias": True}, only=_ONLY),
    # Autoregressive models trained on as diffusion models, without the shift
    "a2d-qwen2": Family(architecture="A2DQwen2LMHeadModel", keys=_COMMON, only=_ONLY,
                        fixed={"qkv_bias": True, "shift_logits": False}),
    "a2d-qwen3": Family(architecture="A2DQwen3LMHeadModel", keys=_COMMON, only={**_ONLY, "attention_bias": (False,)},
                        fixed={"qk_norm": True, "shift_logits": False}),
    # SDAR (arXiv:2510.06303)
    "sdar": Family(architecture="SDARForCausalLM", keys=_COMMON,
                   only={**_ONLY, "attention_bias": (False,)}, ignored=frozenset({"fuse_cross_entropy"}),
                   fixed={"qk_norm": True, "shift_logits": False, "block_causal": True, "block_length": 4}),
    # LLaDA, LLaDA 1.5 (arXiv:2502.09992)
    "llada": Family(
        architecture="LLaDAModelLM", fixed={"shift_logits": False},
        keys={"vocab_size": "vocab_size", "embedding_size": "vocab_size", "d_model": "hidden_size",
              "mlp_hidden_size": "intermediate_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
              "n_kv_heads": "num_key_value_heads", "max_sequence_length": "max_position_embeddings",
              "rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps", "weight_tying": "tie_word_embeddings",
              "include_qkv_bias": "qkv_bias", "init_std": "initializer_range", "block_size": "block_length",
              "mask_token_id": "mask_token_id",
              "pad_token_id": "pad_token_id", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"},
        required=("vocab_size", "d_model", "mlp_hidden_size", "n_layers", "n_heads"),
        only={"block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,),
              "include_bias": (False,), "scale_logits": (False,), "input_emb_norm": (False,), "alibi": (False,),
              "attention_layer_norm": (False,), "layer_norm_with_affine": (True,), "block_group_size": (1,),
              "bias_for_layer_norm": (False, None), "multi_query_attention": (False, None)},
        ignored=frozenset("""
            alibi_bias_max attention_layer_norm_with_affine embedding_dropout flash_attention init_cutoff_factor
            init_device init_fn mlp_ratio precision residual_dropout rope_full_precision""".split()),
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
        ignored=frozenset({"norm_topk_prob", "output_router_logits", "router_aux_loss_coef"}),
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
        ignored=frozenset({"embedding_dropout", "output_dropout", "output_router_logits", "rotary_dim", "router_dtype",
                           "use_qk_norm"}),
        parameters={
            "model.word_embeddings": "model.embed_tokens",
            **{f"model.layers.{{i}}.attention.{theirs}": f"model.layers.{{i}}.self_attn.{ours}" for theirs, ours in {
                "query_key_value": "qkv_proj", "dense": "o_proj", "query_layernorm": "q_norm",
                "key_layernorm": "k_norm"}.items()}}),
}


def read_config(raw: Mapping, where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a Hugging Face config.json, given as a dictionary.

    Raises: UserError if the family is unknown, a required key is missing, a key is unknown, or a value unsupported;
        the message names `where`, the key and what is accepted.
    """
    name = _MODEL_TYPES.get(raw.get("model_type"), raw.get("model_type"))
    if name == "llada" and "num_experts" in raw:
        name = "llada_moe"
    if name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not a family this version loads; "
                        f"it loads {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    raw_keys = _flatten_rope(raw)
    if missing := [key for key in family.required if raw_keys.get(key) is None]:
        raise UserError(f"{where}: {name} needs the key{'s' * (len(missing) > 1)} {', '.join(missing)}")
    known = {*family.keys, *family.only}
    for key, value in raw_keys.items():
        if key in family.only and value not in family.only[key]:
            raise UserError(f"{where}: {key} {value!r} is not supported for {name}; "
                            f"supported: {', '.join(map(repr, family.only[key]))}")
        if key not in known and key not in IGNORED and key not in family.ignored:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it if the model does not depend on it"
            raise UserError(f"{where}: {name} has no configuration key {key!r}; {hint}")
    if sliding := [kind for kind in raw_keys.get("layer_types") or [] if kind != "full_attention"]:
        raise UserError(f"{where}: layer_types {sliding[0]!r} is not supported; supported: 'full_attention'")
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


def write_config(config: ModelConfig, dtype: str) -> dict:
    """The config.json dictionary of `config`; one that was read comes back as it was, changed fields apart."""
    family = FAMILIES[config.family]
    raw = dict(config.source)
    if not raw:
        raw = {"architectures": [family.architecture], "model_type": family.model_type or config.family, "dtype": dtype}
        raw |= {key: values[0] for key, values in family.only.items() if values[0] is not None}
        raw |= {key: value for key, target in family.keys.items() if (value := getattr(config, target)) is not None}
        if "moe_layer_freq" in raw:
            dense = config.first_k_dense_replace
            raw["moe_layer_freq"] = [0] * dense + [1] * (config.num_hidden_layers - dense)
        again = read_config(raw)
        for name in (f.name for f in fields(ModelConfig) if f.compare):
            if getattr(again, name) != getattr(config, name):
                raise UserError(f"config.json of {config.family} cannot say {name} {getattr(config, name)}; it would "
                                f"be read as {getattr(again, name)}")
        return raw
    before = read_config(raw)
    for key, target in family.keys.items():
        value = getattr(config, target)
        if value != getattr(before, target):
            if key in ("rope_theta", "rope_scaling") and raw.get("rope_parameters"):
                raise UserError(f"{key} of a loaded model cannot be changed; edit rope_parameters in its config.json")
            raw[key] = value
    for key in ("dtype", "torch_dtype"):
        if key in raw:
            raw[key] = dtype
    return raw


def _dense_layers(moe_layer_freq: list, where: str) -> int:
    """How many layers come before those with experts, of one 0 or 1 per layer."""
    dense = moe_layer_freq.index(1) if 1 in moe_layer_freq else len(moe_layer_freq)
    if moe_layer_freq != [0] * dense + [1] * (len(moe_layer_freq) - dense):
        raise UserError(f"{where}: moe_layer_freq {moe_layer_freq} is not supported; supported: zeros, then ones")
    return dense


def _flatten_rope(raw: Mapping) -> dict:
    """Transformers 5 nests the rotary settings under rope_parameters; before, they were rope_theta and rope_scaling."""
    flat = dict(raw)
    nested = flat.pop("rope_parameters", None) or {}
    scaling = {key: value for key, value in nested.items() if key != "rope_theta"}
    if "rope_theta" in nested:
        flat["rope_theta"] = nested["rope_theta"]
    if scaling and scaling.get("rope_type", "default") != "default":
        flat["rope_scaling"] = scaling
    if (old := flat.get("rope_scaling")) is not None:
        old = {("rope_type" if key == "type" else key): value for key, value in old.items()}
        flat["rope_scaling"] = None if old.get("rope_type") == "default" else old
    return flat


def check_parameters(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str) -> None:
    """Refuse a checkpoint whose parameters, by name and shape, are not exactly those of the model; name them all."""
    misshapen = [f"{name} {list(shape)}, not {list(expected[name])}" for name, shape in sorted(found.items())
                 if name in expected and [*shape] != [*expected[name]]]
    problems = [f"{problem}: {', '.join(names)}" for problem, names in (
        ("missing", sorted(expected.keys() - found.keys())), ("unknown", sorted(found.keys() - expected.keys())),
        ("of another shape", misshapen)) if names]
    if problems:
        raise UserError(f"{where}: the parameters are not those of config.json. {'; '.join(problems)}")


def mask_token_id_of(folder: Path) -> int | None:
    """The id of the mask token that the tokenizer files in `folder` name, or None."""
    named = None
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        named = named or read_json(folder / file, missing={}).get("mask_token")
    if named is None:
        return None
    text = named["content"] if isinstance(named, dict) else named
    settings = read_json(folder / "tokenizer_config.json", missing={})
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        if token["content"] == text:
            return int(token_id)
    tokenizer = read_json(folder / "tokenizer.json", missing={})
    for token in tokenizer.get("added_tokens", []):
        if token["content"] == text:
            return token["id"]
    vocabulary = read_json(folder / "added_tokens.json", missing={}) | (read_json(folder / "vocab.json", missing={}))
    return vocabulary.get(text)


def read_json(path: Path, missing: dict | None = None) -> dict:
    """The JSON object in `path`; `missing`, if given, stands for a file that is not there.

    Raises: UserError naming the file, if it cannot be read or is not a JSON object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is None:
            raise UserError(f"{path} does not exist; a model folder holds config.json and model.safetensors") from None
        return missing
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a readable JSON file ({error}); restore it from its source") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a JSON {type(raw).__name__}, not an object; restore it from its source")
    return raw
