"""`ModelConfig`, and how it is read from and written to the config.json of a family in family_table.py.

Nothing here imports torch, until a model that is not among the families is found: Transformers reads its configuration
(borrowed_config.py).
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from dllm.config.fields import check, setting
from dllm.errors import UserError, did_you_mean, warn
from dllm.model.borrowed_config import language_part, read_borrowed, tell_differences, tell_window
from dllm.model.config_keys import CHANGING, DROPOUT, IGNORED, WINDOW, check_values, find_window, is_empty
from dllm.model.family_table import (
    BORROWED,
    FAMILIES,
    MODEL_TYPES,
    REFUSED,
    STABLE_DIFFCODER,
    TRANSFORMERS,
    WINDOWED,
    Family,
)
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
    rope_scaling: Mapping | None = None  # None, or {"rope_type": "linear", "llama3" or "yarn", "factor": ...}
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
    causal_context: bool = setting(False, "a token of a finished block sees nothing after itself; in its own block a "
                                   "masked one sees all")
    sub_block_length: int | None = setting(None, "tokens of the parts of a block, which are filled from left to right; "
                                           "a divisor of block_length", at_least=1, none="blocks have no parts")
    edit_heads: Literal["insert", "all"] | None = setting(
        None, "heads that insert tokens (Edit Flows, arXiv:2506.09018), or also delete and substitute them")
    canvas_length: int | None = setting(None, "tokens of a canvas that begins as random words, after what is before it "
                                        "(DiffusionGemma)", at_least=1, none="masked positions are filled")
    uniform_share: float | None = setting(
        None, "trained on noise of masks and uniform words, with this share of words (see diffusion/uniform.py); 1: no "
        "masks", at_least=0, at_most=1, none="masks alone")
    self_conditioning: bool = setting(False, "embeddings get what the step before has predicted (arXiv:2208.04202)")
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
        for name in ("causal_blocks", "causal_context"):
            if getattr(self, name) and not self.block_causal:
                raise UserError(f"model configuration: {name} is about the blocks of a block-causal model; add "
                                f"block_size, the tokens of a block, or remove {name}")
        if self.sub_block_length is not None and (self.block_length or 0) % self.sub_block_length:
            raise UserError(f"model configuration: sub_block_length {self.sub_block_length} must divide block_length "
                            f"{self.block_length}")
        if self.uniform_share is not None and self.uniform_share < 1 and self.mask_token_id is None:
            raise UserError(f"model configuration: uniform_share {self.uniform_share} mixes masks with uniform words, "
                            "and nothing names the mask token; add mask_token_id, or set uniform_share to 1")
        for name in ("uniform_share", "self_conditioning"):
            if self.block_causal and getattr(self, name) not in (None, False):
                raise UserError(f"model configuration: {name} needs a model without blocks; remove it, or block_size")
        if self.borrowed and not self.source:
            raise UserError(f"model configuration: family {self.family!r} is none of {', '.join(FAMILIES)}; a model of "
                            "Transformers is made from its config.json")
        for name in ("uniform_share", "edit_heads"):
            if getattr(self, name) is not None and self.logit_softcap is not None:
                raise UserError(f"model configuration: {name} needs a head without the soft cap {self.logit_softcap} "
                                f"of {self.family}; remove {name}, or take another model")
        if self.borrowed and self.self_conditioning:
            raise UserError("model configuration: self_conditioning adds to embeddings of our own layers, and those "
                            f"of {self.family} are Transformers'; leave it out")
        if self.logit_scale != 1 and not self.borrowed:
            raise UserError(f"model configuration: logit_scale {self.logit_scale} is not computed in {self.family}; "
                            "leave it out")
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
        return self.family not in FAMILIES and self.canvas_length is None

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer >= self.first_k_dense_replace


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
    if unknown := [key for key, value in flat.items() if not is_empty(value) and not DROPOUT.fullmatch(key)
                   and key not in {*family.known, *IGNORED, *CHANGING, *WINDOW}]:
        hint = did_you_mean(unknown[0], {*family.keys, *family.only}) if len(unknown) == 1 else ""
        warn(f"{where}: {config.family} has no configuration key {', '.join(map(repr, unknown))}, ignored{hint}")
    own_code = any(name.startswith("AutoModel") for name in raw.get("auto_map") or {})
    if own_code and config.family in TRANSFORMERS and not {"shift_logits", "block_size"} & raw.keys():
        warn(f"{where}: the folder brings code of its own for a model_type {raw['model_type']!r}, which is not run; "
             f"position i predicts token i + 1, as in {config.family}. If it predicts its own token, add "
             '"shift_logits": false, and if it decodes by blocks, "block_size"')
    if config.family == "stable_diffcoder" and not _names_diffcoder(raw):
        warn(f"{where}: read as Stable-DiffCoder by its {raw['vocab_size']} words and {raw['max_position_embeddings']} "
             'positions: blocks of 4, and position i predicts its own token; if it is another, add "shift_logits"')
    if config.family in WINDOWED and (window := find_window(config.family, flat)) is not None:
        tell_window(raw, where, window)
    for differing in filter(None, (differing_rope(raw), _differing_dtype(raw), _differing_class(raw, family))):
        warn(f"{where}: {differing}")
    return config


def _parse(raw: Mapping, where: str = "config.json") -> ModelConfig:
    """`read_config` without its warnings."""
    for key in ("rope_scaling", "rope_parameters", "auto_map"):
        if raw.get(key) not in (None, False) and not isinstance(raw[key], Mapping):
            raise UserError(f"{where}: {key} must be a dictionary or null, not {raw[key]!r}")
    name = _family_of(raw)
    for refused, reason in REFUSED.items():
        if any(refused in str(part).lower() for part in (name, *(raw.get("architectures") or ()))):
            raise UserError(f"{where}: {refused} is not supported, because it {reason}")
    check_ids(raw, where)
    if name not in FAMILIES:
        values = {target: raw[key] for key, target in BORROWED.items() if raw.get(key) is not None}
        return ModelConfig(family=name, source=dict(raw), **{
            **read_borrowed(raw, where, FAMILIES), "block_causal": "block_length" in values, **values})
    family = FAMILIES[name]
    raw_keys = flatten_rope(raw)
    if missing := [key for key in family.required if raw_keys.get(key) is None]:
        raise UserError(f"{where}: {name} needs the key{'s' * (len(missing) > 1)} {', '.join(missing)}")
    check_values(name, family.only, family.known, raw_keys, where)
    values = {target: raw_keys[key] for key, target in family.keys.items() if raw_keys.get(key) is not None}
    if family.longer_blocks and isinstance(values.get("block_length"), int):
        values["block_length"] += family.longer_blocks
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
    name = MODEL_TYPES.get(raw.get("model_type"), raw.get("model_type"))
    if name == "llada" and raw.get("num_experts"):
        return "llada_moe"
    if name == "sdar" and "use_regular_causal" in raw:
        return "idlm"
    shaped = all(raw.get(key) == value for key, value in STABLE_DIFFCODER.items())
    if name == "llama" and (_names_diffcoder(raw) or (shaped and raw.get("mask_token_id") in (None, 5)
                                                      and not {"shift_logits", "block_size"} & raw.keys())):
        return "stable_diffcoder"
    return name


def _names_diffcoder(raw: Mapping) -> bool:
    code = [*(raw.get("architectures") or []), *(raw.get("auto_map") or {}).values()]
    return any("diffcoder" in str(part).lower() for part in code)


def write_config(config: ModelConfig, dtype: str) -> dict:
    """The config.json dictionary of `config`; one that was read comes back as it was, changed fields apart."""
    raw = dict(config.source)
    if config.borrowed:
        family = Family(architecture="", keys=BORROWED, fixed={}, only={})
    else:
        family = FAMILIES[config.family]
    if not raw:
        raw = {"architectures": [family.architecture], "model_type": family.model_type or config.family, "dtype": dtype}
        raw |= {key: values[0] for key, values in family.only.items() if values[0] is not None}
        raw |= {key: value for key, target in family.keys.items()
                if (value := _written(config, family, target)) is not None}
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
    for key, target in family.keys.items():
        value = _written(config, family, target)
        if value != _written(before, family, target):
            if key in ("rope_theta", "rope_scaling") and raw.get("rope_parameters"):
                raise UserError(f"{key} of a loaded model cannot be changed; edit rope_parameters in its config.json")
            raw[key] = value
    if _family_of(raw) != config.family:  # it was told by what has changed since
        raw["architectures"] = [family.architecture]
    for key in ("dtype", "torch_dtype"):
        if key in raw:
            raw[key] = dtype
    return raw


def _written(config: ModelConfig, family: Family, target: str) -> object:
    """The value of a field as the family's key for it says it."""
    value = getattr(config, target)
    return value - family.longer_blocks if target == "block_length" and value is not None else value


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
    known = {other.architecture for name, other in FAMILIES.items()
             if (other.model_type or name) != raw["model_type"]} - {family.architecture}
    other = next((name for name in raw.get("architectures") or () if name in known), None)
    return f"architectures has {other}, model_type is {raw['model_type']!r}, which is taken" if other else ""
