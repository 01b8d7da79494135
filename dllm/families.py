"""Families: how the config.json and the parameter names of each published model map to ours, and back.

A family is data: which configuration keys shape the model, which may be ignored, and which are only supported at one
value. Our parameter names are those of the Llama line (`model.layers.0.self_attn.q_proj.weight`), so the families of
this file need no renaming. Nothing here imports torch.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
    rope_scaling: Mapping | None = None  # None, or Llama 3's {"rope_type": "llama3", "factor": ...}
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head, before the rotary embedding
    tie_word_embeddings: bool = False
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
        if self.head_dim % 2:
            raise UserError(f"model configuration: head_dim {self.head_dim} must be even, for the rotary embedding")
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise UserError(f"model configuration: mask_token_id {self.mask_token_id} is outside the vocabulary of "
                            f"{self.vocab_size}; enlarge vocab_size or choose an id below it")
        if self.rope_scaling is not None and self.rope_scaling.get("rope_type") != "llama3":
            raise UserError(f"model configuration: rope_scaling {dict(self.rope_scaling)} is not supported; "
                            "null and rope_type 'llama3' are")


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model_type is read and written."""

    architecture: str  # the class name that Transformers looks up
    keys: Mapping[str, str]  # config.json key -> ModelConfig field
    fixed: Mapping[str, object]  # ModelConfig fields that this model_type implies
    only: Mapping[str, tuple]  # config.json keys supported at these values alone


# Keys of every Transformers configuration that do not change what a forward pass computes.
IGNORED = frozenset("""
    architectures model_type torch_dtype dtype transformers_version use_cache auto_map name_or_path _name_or_path
    layer_types max_window_layers sliding_window attention_dropout pretraining_tp _attn_implementation
    _attn_implementation_autoset return_dict output_attentions output_hidden_states is_encoder_decoder
    gradient_checkpointing id2label label2id problem_type chunk_size_feed_forward torchscript use_bfloat16
    unsloth_version unsloth_fixed cross_attention_hidden_size add_cross_attention is_decoder finetuning_task
""".split())

_COMMON = {name: name for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings",
    "initializer_range", "shift_logits", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")}
_ONLY = {"hidden_act": ("silu",), "use_sliding_window": (False,)}

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", keys=_COMMON, fixed={"qkv_bias": True}, only=_ONLY),
    "qwen3": Family(architecture="Qwen3ForCausalLM", keys=_COMMON, fixed={"qk_norm": True},
                    only={**_ONLY, "attention_bias": (False,)}),
    "llama": Family(architecture="LlamaForCausalLM", fixed={}, only=_ONLY,
                    keys={**_COMMON, "mlp_bias": "mlp_bias", "attention_bias": "qkv_bias"}),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_config(raw: Mapping, where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a Hugging Face config.json, given as a dictionary.

    Raises: UserError if the family is unknown, a required key is missing, a key is unknown, or a value unsupported;
        the message names `where`, the key and what is accepted.
    """
    name = raw.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not a family this version loads; "
                        f"it loads {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    raw_keys = _flatten_rope(raw)
    if missing := [key for key in _REQUIRED if raw_keys.get(key) is None]:
        raise UserError(f"{where}: {name} needs the key{'s' * (len(missing) > 1)} {', '.join(missing)}")
    known = {*family.keys, *family.only}
    for key, value in raw_keys.items():
        if key in family.only and value not in family.only[key]:
            raise UserError(f"{where}: {key} {value!r} is not supported for {name}; "
                            f"supported: {', '.join(map(repr, family.only[key]))}")
        if key not in known and key not in IGNORED:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it if the model does not depend on it"
            raise UserError(f"{where}: {name} has no configuration key {key!r}; {hint}")
    if sliding := [kind for kind in raw_keys.get("layer_types") or [] if kind != "full_attention"]:
        raise UserError(f"{where}: layer_types {sliding[0]!r} is not supported; supported: 'full_attention'")
    values = {target: raw_keys[key] for key, target in family.keys.items() if raw_keys.get(key) is not None}
    values = {**family.fixed, **values}
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
        raw = {"architectures": [family.architecture], "model_type": config.family, "hidden_act": "silu",
               "dtype": dtype}
        raw |= {key: value for key, target in family.keys.items() if (value := getattr(config, target)) is not None}
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


def check_parameter_names(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Refuse a checkpoint whose parameters are not exactly those of the model, naming them."""
    expected, found = set(expected), set(found)
    for problem, names in (("lacks", expected - found), ("has unknown", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UserError(f"{where} {problem} parameter{'s' * (len(names) > 1)} {shown}; "
                            "is config.json of the same model?")


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
