"""The rotary embedding's settings in a config.json, in any of the forms that Transformers has written. No torch."""

from collections.abc import Mapping

from dllm.errors import UserError

# Of Llama 4, which Ministral 3 has too: beside the rotary settings it gives beta, by which queries are scaled.
QUERY_SCALING = "llama_4_scaling_beta"

# Scalings of the rotary embedding that are computed, and the numbers that each needs. "dynamic" acts on inputs beyond
# max_position_embeddings alone, which are refused, so it is read as "default".
ROPE_TYPES = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
              "yarn": ("factor", "original_max_position_embeddings")}
# Numbers that may be given, and with which rope_type; None: with any.
OPTIONAL = {"beta_fast": "yarn", "beta_slow": "yarn", "attention_factor": "yarn", "mscale": "yarn",
            "mscale_all_dim": "yarn", QUERY_SCALING: None}


def check_rope(scaling: Mapping | None) -> None:
    """Refuse a scaling of the rotary embedding that is not computed here, or that lacks a number."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in ROPE_TYPES:
        raise UserError(f"model configuration: rope_scaling {dict(scaling)} is not supported; null and rope_type "
                        f"{', '.join(map(repr, ROPE_TYPES))} and 'dynamic' are: choose a model with one of them")
    needed = {*ROPE_TYPES[kind], *({"original_max_position_embeddings"} if QUERY_SCALING in scaling else ())}
    given = {name for name, its in OPTIONAL.items() if its in (None, kind) and scaling.get(name) is not None}
    for name in sorted(needed | given):
        if isinstance(value := scaling.get(name), bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"model configuration: rope_scaling {dict(scaling)} needs a positive number as {name}")


def read_rope(raw: Mapping) -> dict:
    """The rotary settings: Transformers 5 nests them under rope_parameters, of each kind of layers where these differ;
    before, they were rope_theta and rope_scaling. As there, a nested value goes before a plain one."""
    nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if isinstance(nested.get("full_attention"), Mapping):
        nested = nested["full_attention"]
    return {("rope_type" if key == "type" else key): value for key, value in nested.items() if value is not None}


def flatten_rope(raw: Mapping) -> dict:
    """A configuration whose rotary settings are rope_theta, partial_rotary_factor and rope_scaling."""
    flat, scaling = dict(raw), read_rope(raw)
    flat.pop("rope_parameters", None)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            flat[name] = scaling.pop(name)
    if scaling.get("rope_type") in ("llama3", "yarn") and flat.get("max_position_embeddings") is not None:
        scaling.setdefault("original_max_position_embeddings", flat["max_position_embeddings"])
    if "rope_scaling" in raw or scaling:
        plain = scaling.get("rope_type", "default") in ("default", "dynamic")
        if plain and QUERY_SCALING in scaling:
            scaling["rope_type"] = "default"
        flat["rope_scaling"] = None if plain and QUERY_SCALING not in scaling else scaling
    return flat


def differing_rope(raw: Mapping) -> str:
    """What config.json says twice about the rotary embedding, and differently."""
    nested = read_rope(raw)
    for name in ("rope_theta", "partial_rotary_factor"):
        if None not in (raw.get(name), nested.get(name)) and raw[name] != nested[name]:
            return f"{name} is {raw[name]}, and {nested[name]} among the rotary settings, which is taken"
    both = raw.get("rope_scaling"), raw.get("rope_parameters")
    if all(both) and nested != read_rope({"rope_parameters": both[1]}):
        return f"rope_scaling {both[0]} and rope_parameters {both[1]} differ; rope_scaling is taken"
    return ""
