"""Configurations of Transformers' causal language models whose family is not ours, for `families.read_config`.

Transformers is imported when one is read, because that takes seconds.
"""

from collections.abc import Collection, Mapping
from typing import Any

from dllm.errors import UserError, first_line, warn

# What multiplies the product of hidden states and head, by the key that says so.
_SCALES = {"logit_scale": lambda value: value, "logits_scaling": lambda value: 1 / value}
_OUTSIDE = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "dtype", "torch_dtype",
            "quantization_config")  # of a language model, but written beside it, and there goes first
_LOCAL = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def language_part(raw: Mapping, where: str) -> Mapping:
    """The config.json of the language model inside one that also sees or hears, which one notice says."""
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping) or not inner.get("model_type"):
        return raw
    warn(f"{where}: of {raw.get('model_type')} the language model is taken alone, {inner['model_type']}, which neither "
         "sees nor hears")
    tied = {key: raw[key] for key in ("tie_word_embeddings",) if key in raw}
    return {**tied, **inner, **{key: raw[key] for key in _OUTSIDE if raw.get(key) is not None}}


def transformers_config(raw: Mapping, where: str, **changes):
    """Transformers' own configuration of a config.json, with some keys changed.

    Raises: UserError if Transformers refuses the keys, or the model is not a language model alone.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = raw["model_type"]
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantization_config is not supported for {name}; take the weights in 16 or 32 bits")
    try:
        found = CONFIG_MAPPING[name].from_dict({key: value for key, value in {**raw, **changes}.items()
                                                if key != "auto_map"})
        alone = found.get_text_config() is found and not found.is_encoder_decoder
    except Exception as error:  # its checks raise many types; each means: not a configuration of this model
        raise UserError(f"{where}: Transformers cannot read it as {name} ({first_line(error)}); correct the file, or "
                        "fetch it again") from error
    if getattr(found, "attn_temperature_tuning", False):
        raise UserError(f"{where}: attn_temperature_tuning of {name} counts places in a batch, and packed texts need "
                        "their own; set it to false, which changes texts of more than floor_scale tokens alone")
    if not alone:
        raise UserError(f"{where}: {name} is more than a language model, it has an encoder too; take a causal language "
                        "model")
    return found


def read_borrowed(raw: Mapping, where: str, families: Collection[str]) -> dict[str, Any]:
    """Fields of the `ModelConfig` of a model_type that is none of `families`, the ones of this version.

    Raises: UserError if Transformers has no such causal language model either, or its configuration has no shape.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = raw.get("model_type")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{where}: model_type {name!r} is not a family this version loads; it loads "
                        f"{', '.join(families)}, and the causal language models of Transformers "
                        f"{transformers.__version__}, of which a newer one may have it: pip install -U transformers")
    found = transformers_config(raw, where)
    heads, width = _read(found, "num_attention_heads"), _read(found, "hidden_size")
    values = {"vocab_size": _read(found, "vocab_size"), "hidden_size": width, "num_attention_heads": heads,
              "num_hidden_layers": _read(found, "num_hidden_layers")}
    if missing := [key for key, value in values.items() if not value]:
        raise UserError(f"{where}: the configuration of {name} has no {', '.join(missing)}, which a model that is "
                        "adapted here needs; take another model")
    values |= {"intermediate_size": _read(found, "intermediate_size", "ffn_dim", "n_inner") or 4 * width,
               "num_key_value_heads": _read(found, "num_key_value_heads") or heads,
               "head_dim": _read(found, "head_dim") or width // heads,
               "max_position_embeddings": count_positions(found),
               "initializer_range": _read(found, "initializer_range"),
               "logit_softcap": _read(found, "final_logit_softcapping"),
               "logit_scale": next((scale(value) for key, scale in _SCALES.items() if (value := _read(found, key))), 1),
               "tie_word_embeddings": bool(_read(found, "tie_word_embeddings"))}
    if (plain := _read(found, "qk_nope_head_dim")) is not None:  # multi-head latent attention
        values |= {"head_dim": plain + found.qk_rope_head_dim, "num_key_value_heads": heads}
    values |= {key: getattr(found, key, None) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {key: value for key, value in values.items() if value is not None}


def count_positions(found) -> int | None:
    """Positions for which a text's rotary embedding is the same whatever other texts are in the batch."""
    positions = _read(found, "max_position_embeddings")
    rope = getattr(found, "rope_parameters", None) or {}
    for kind in [part for part in rope.values() if isinstance(part, Mapping)] or [rope]:
        if kind.get("rope_type") == "longrope":  # beyond its first length, all texts of a batch turn otherwise
            first = kind.get("original_max_position_embeddings") or _read(found, "original_max_position_embeddings")
            positions = min(positions, first or positions)
    return positions


def tell_differences(raw: Mapping, where: str) -> None:
    """One notice of each thing that an adapted model does otherwise than the original."""
    found, name = transformers_config(raw, where), raw["model_type"]
    positions, all_positions = count_positions(found), _read(found, "max_position_embeddings")
    if positions != all_positions:
        warn(f"{where}: the rotary embedding of {name} (longrope) changes in texts of more than {positions} positions; "
             f"here it does not, and no text may be longer, though config.json says {all_positions}")
    kinds = getattr(found, "layer_types", None) or ["sliding_attention"]
    windows = [value for kind, key in _LOCAL.items() if kind in kinds and (value := _read(found, key))]
    if windows and (positions is None or min(windows) < positions):
        tell_window(raw, where, min(windows))


def tell_window(raw: Mapping, where: str, window: int) -> None:
    """Say that a window is opened, of a model that is not adapted yet."""
    if raw.get("mask_token_id") is None:
        warn(f"{where}: {raw['model_type']} has layers that see {window} positions; here every layer sees the whole "
             "text, in both directions, so train it on texts as long as those it shall write")


def _read(found, *names: str) -> Any:
    """The first of the attributes that there is; of one for each layer the largest."""
    for name in names:
        try:
            value = getattr(found, name, None)
        except RuntimeError:  # one that differs between layers, as Transformers says
            continue
        if value is not None:
            return max(value) if isinstance(value, list | tuple) else value
    return None
