"""The config.json of DiffusionGemma: one dictionary for the text within another. Nothing here imports torch."""

from collections.abc import Mapping

from dllm.errors import UserError, first_line, warn
from dllm.model.config_keys import CHANGING, IGNORED, is_empty
from dllm.model.families import ModelConfig

# Keys of text_config -> fields of `ModelConfig`.
_KEYS = {name: name for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range", "moe_intermediate_size", "num_experts",
    "pad_token_id", "bos_token_id")} | {"top_k_experts": "num_experts_per_tok",
                                        "final_logit_softcapping": "logit_softcap"}
_ONLY = {"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": ("vision",),
         "attention_bias": (), "enable_moe_block": (True,), "attention_k_eq_v": (True,),
         "tie_word_embeddings": (True,), "hidden_size_per_layer_input": (0,), "num_kv_shared_layers": (0,)}
_SHAPING = {"rope_parameters", "layer_types", "sliding_window", "global_head_dim", "num_global_key_value_heads",
            "per_layer_config", "eos_token_id", "attention_dropout"}
IMAGE_TOKENS = ("boi_token_id", "eoi_token_id", "image_token_id")


def read_gemma_config(raw: Mapping, where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a DiffusionGemma's config.json, in Google's layout or in that of Transformers (with
    `per_layer_config`).

    Raises: UserError naming `where` and the key, if a key is missing or its value is not computed here.
    """
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError(f"{where}: diffusion_gemma needs text_config, a dictionary, not {text!r}")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_experts", "top_k_experts", "moe_intermediate_size")
    if missing := [key for key in required if text.get(key) is None]:
        raise UserError(f"{where}: text_config needs the key{'s' * (len(missing) > 1)} {', '.join(missing)}")
    accepted = {key: values for key, values in {**CHANGING, **_ONLY}.items() if key not in _KEYS}
    for key, value in {**text, **raw}.items():
        if key in accepted and not is_empty(value) and value not in accepted[key]:
            raise UserError(f"{where}: {key} {value!r} is not supported for diffusion_gemma; supported: "
                            f"{', '.join(map(repr, (None, *accepted[key])))}")
        if key in ("tie_word_embeddings", "enable_moe_block") and value is False:
            raise UserError(f"{where}: {key} false is not supported for diffusion_gemma; supported: true")
    if unknown := [key for key, value in text.items() if not is_empty(value)
                   and key not in {*_KEYS, *_ONLY, *_SHAPING, *IGNORED}]:
        warn(f"{where}: diffusion_gemma has no configuration key {', '.join(map(repr, unknown))}, ignored")
    theirs = their_config(raw, where)
    for kind, rope in theirs.rope_parameters.items():
        if rope.get("rope_type") not in ("default", "proportional"):
            raise UserError(f"{where}: rope_type {rope.get('rope_type')!r} of {kind} is not supported for "
                            "diffusion_gemma; supported: 'default', 'proportional'")
    values = {ours: value for key, ours in _KEYS.items()
              if (value := text.get(key, getattr(type(theirs), key))) is not None}
    return ModelConfig(family="diffusion_gemma", source=dict(raw), shift_logits=False, tie_word_embeddings=True,
                       canvas_length=raw.get("canvas_length", 256), eos_token_id=raw.get("eos_token_id"), **values)


def their_config(raw: Mapping, where: str = "config.json"):
    """Transformers' configuration of the text model, from a whole config.json."""
    try:
        from transformers import DiffusionGemmaTextConfig
    except ImportError:
        raise UserError("DiffusionGemma needs transformers 5.12 or newer; upgrade it") from None
    try:
        return DiffusionGemmaTextConfig(**raw["text_config"], experts_implementation="grouped_mm")
    except Exception as error:  # huggingface_hub's validation has kinds of its own
        raise UserError(f"{where}: text_config is none of DiffusionGemma ({first_line(error)})") from None
