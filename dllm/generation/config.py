"""MDMGenerationConfig: how to denoise. Flags, request fields, lm-eval's arguments and docs/sampling.md derive from it.

Nothing here imports torch. The names are those of the tables in strategies.py and diffusion/corruption.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from math import isfinite
from operator import index
from typing import Any, Literal

from dllm.config.fields import check, check_kind, require, setting, settings_of
from dllm.config.names import Schedules
from dllm.errors import UserError, did_you_mean

# The score that an algorithm ranks positions by, as dllm_kernels names it. The others have none.
CONFIDENCES = {"maskgit_plus": "prob", "entropy": "entropy", "topk_margin": "margin", "confidence_threshold": "prob",
               "low_confidence": "prob"}

ENTROPIES = ("entropy", "entropy_bound")  # algs whose confidences are minus entropies, in nats
NEED_THRESHOLD = ("low_confidence_dynamic", "confidence_threshold", "soft_parallel")

DEFAULT_STEPS = 512  # Open-dLLM's
# What edits of a given text are told. The other settings are about gaps, or of other methods.
EDIT_SETTINGS = ("max_new_tokens", "steps", "temperature", "top_p", "top_k", "mask_token_id", "num_return_sequences",
                 "seed", "flow_schedule", "flow_rule")
# Settings that only these algs take.
OF_ALGS = {"flow_schedule": ("flow", "edit"), "flow_rule": ("flow", "edit"), "corrector": ("flow", "edit"),
           "edit_source": ("edit",), "edit_source_length": ("edit",), "entropy_bound": ("entropy_bound",),
           "t_min": ("entropy_bound",), "t_max": ("entropy_bound",), "stability_threshold": ("entropy_bound",),
           "confidence_threshold": ("entropy_bound",), "draft_length": ("self_speculation",),
           "greedy_end": ("ancestral",), "correction_steps": ("ancestral",)}
UNUSED = ("pad_token_id", "bos_token_id", "do_sample", "return_dict_in_generate")


@dataclass(frozen=True, kw_only=True, slots=True)
class MDMGenerationConfig:
    """How to denoise. The fields up to output_history and their meanings are Open-dLLM's, the others ours."""

    max_new_tokens: int = setting(128, "masked positions appended to the prompt", at_least=1)
    steps: int = setting(DEFAULT_STEPS, "denoising steps at most; those that commit nothing cost nothing; 512 is "
                         "rounded up to what the blocks divide", at_least=1, per_request=True)
    temperature: float = setting(0.0, "divides the logits; 0 takes the most likely token", at_least=0)
    top_p: float | None = setting(None, "keep the most likely tokens until their probability passes this", above=0,
                                  at_most=1, none="all tokens")
    top_k: int | None = setting(None, "then keep the k most likely tokens; 0: all", at_least=0, none="all tokens",
                                per_request=True)
    alg: Literal["origin", "maskgit_plus", "entropy", "topk_margin", "p2", "remdm", "flow", "edit", "ancestral",
                 "confidence_threshold", "entropy_bound", "soft_parallel", "self_speculation"] = setting(
        "entropy", "how a step chooses the positions it commits", per_request=True)
    alg_temp: float = setting(0.0, "Gumbel noise on the confidences, in their units; without effect on p2, origin, "
                              "entropy_bound, soft_parallel, self_speculation and windows of blocks", at_least=0,
                              per_request=True)
    eps: float = setting(1e-3, "diffusion time after the last step", above=0, below=1)
    mask_token_id: int | None = setting(None, "the mask token", at_least=0, none="the checkpoint's or tokenizer's")
    num_return_sequences: int = setting(1, "texts for each prompt, next to each other in the output", at_least=1)
    output_history: bool = False  # in Python only: keep the canvas after each step
    seed: int | None = setting(None, "seed of the random numbers", none="drawn anew")
    block_length: int | None = setting(None, "block size in masked positions; blocks are denoised left to right",
                                       at_least=1, none="one block", per_request=True)
    blocks_from: Literal["text", "masked"] | None = setting(
        None, "count blocks from the first token (text), or from the first masked position",
        none="text for block-causal models that see finished blocks whole, else masked")
    sub_block_length: int | None = setting(
        None, "of block-causal models: parts of a block, denoised left to right; each sees the whole block",
        at_least=1, none="as the model was trained, or the whole block", per_request=True)
    window_blocks: int = setting(
        1, "of block-causal models, with threshold: blocks that are denoised together at most", at_least=1,
        per_request=True)
    enter_share: float = setting(
        0.1, "with window_blocks: a block joins once this share of the one before it is filled", at_least=0, at_most=1,
        per_request=True)
    full_share: float = setting(
        0.95, "with window_blocks: a block commits at least one position a step once this share of the one before it "
        "is filled; till then, only what the threshold commits", at_least=0, at_most=1, per_request=True)
    remasking: Literal["low_confidence", "random", "low_confidence_dynamic"] | None = setting(
        None, "LLaDA's samplers, instead of alg", none="alg", per_request=True)
    schedule: Literal["even", Schedules] = setting(
        "even", "with remasking low_confidence: commit the same number each step, or follow a corruption schedule",
        per_request=True)
    threshold: float | None = setting(None, "commit every position at least this sure, and at least one", none="off",
                                      per_request=True)
    factor: float | None = setting(
        None, "like threshold, with a bound that rises with the number of positions committed together", above=0,
        none="off", per_request=True)
    entropy_bound: float = setting(
        0.1, "entropy_bound: commit the positions of the least entropies that sum, without the last one, to at most "
        "this, in nats", above=0, per_request=True)
    t_min: float = setting(0.4, "DiffusionGemma: the temperature falls from t_max towards this over the steps of a "
                           "canvas", at_least=0, per_request=True)
    t_max: float = setting(0.8, "DiffusionGemma: the temperature of a canvas' first step", above=0, per_request=True)
    stability_threshold: int = setting(
        1, "DiffusionGemma: a canvas is done once its likeliest tokens are those of so many steps before, and",
        at_least=0, per_request=True)
    confidence_threshold: float = setting(
        0.005, "DiffusionGemma: the mean entropy of its positions, in nats, is below this", above=0, per_request=True)
    editing_threshold: float | None = setting(
        None, "with threshold: replace committed tokens when this sure of another (LLaDA2.1)", none="off",
        per_request=True)
    max_post_steps: int = setting(
        16, "with editing_threshold: most steps that edit a block after its last mask is gone", at_least=0,
        per_request=True)
    remask_rate: float = setting(0.02, "remdm: the largest probability that a step masks a committed token again",
                                 at_least=0, at_most=1, per_request=True)
    flow_schedule: Schedules = setting("cube", "flow, edit: the share done over time", per_request=True)
    flow_rule: Literal["exact", "exponential", "euler"] = setting(
        "exact", "flow, edit: the probability of a change in a step of length h at rate r: that of the schedule; "
        "1 - exp(-h r), as in flow_matching; or min(1, h r), as in Gat et al.", per_request=True)
    corrector: tuple[float, ...] | None = setting(
        None, "flow, edit: A, a, b. At flow time t, from 0 to 1, tokens are masked again (edit: deleted) at "
        "A t^a (1-t)^b times the rate of the path backwards, and committed the more for it", at_least=0, none="off",
        per_request=True)
    edit_source: Literal["empty", "masks", "uniform"] = setting(
        "empty", "edit: what a gap holds at first: nothing, masks, or uniform words; as the model was trained",
        per_request=True)
    edit_source_length: int = setting(64, "edit: so many masks or words", at_least=1, per_request=True)
    draft_length: int | None = setting(
        None, "self_speculation: tokens drafted in a forward pass, which has (draft_length + 1)**2 positions; 0: one "
        "token a pass, from left to right", at_least=0, none="block_length, or the model's", per_request=True)
    greedy_end: bool = setting(
        False, "ancestral: the last step takes the most likely words (Duo), instead of going to time 0 by chance",
        per_request=True)
    correction_steps: int = setting(
        0, "ancestral: most steps after the last, each of which replaces one token by one the model is surer of (GIDD)",
        at_least=0, per_request=True)
    cfg_scale: float = setting(
        0.0, "classifier-free guidance: logits + cfg_scale * (logits - those without the prompt)", at_least=0,
        below=float("inf"), per_request=True)
    cache: Literal["none", "prefix", "dual"] = setting(
        "none", "reuse keys and values before the block (prefix), or on both sides (dual), from the block's first step",
        per_request=True)
    stop_at_eos: bool = setting(False, "end a text at its first end-of-text token that has no mask before it")
    expand_token_id: int | None = setting(
        None, "token that becomes two masked positions, so that gaps grow (DreamOn); steps commit one position each",
        at_least=0, none="gaps keep their length", per_request=True)
    delete_eos_token: bool = setting(True, "where gaps grow: remove end-of-text tokens from them")
    pad_eos_to_right: bool = setting(False, "where gaps grow: turn masks after an end-of-text token into end-of-text")
    max_infill_length: int = setting(64, "where gaps grow: longest gap, in positions", at_least=1)
    infill_lengths: tuple[int, ...] = setting((2, 4, 6, 8, 12, 16, 24, 32, 48, 64),
                                              "lengths that infilling with length auto chooses from", at_least=1)
    eos_token_id: int | Sequence[int] | None = None  # in Python only: tokens that end a text; None: the checkpoint's
    constraint: Any = None  # in Python only: a `dllm.constraints.Constraint` on the new text
    cuda_graphs: bool = setting(False, "on a GPU: replay recorded forward passes, which saves launching each kernel")
    block_causal: bool | None = setting(None, "blocks see no later block; they count from the first token",
                                        none="as the model was trained")
    # Open-dLLM's and Dream's scripts give these; they change nothing here.
    pad_token_id: InitVar[int | None] = None
    bos_token_id: InitVar[int | None] = None
    do_sample: InitVar[bool | None] = None  # temperature says it
    return_dict_in_generate: InitVar[bool | None] = None  # there is no other output

    def __post_init__(self, pad_token_id, bos_token_id, do_sample, return_dict_in_generate):
        for name in ("temperature", "alg_temp"):  # Dream allows None
            if getattr(self, name) is None:
                object.__setattr__(self, name, 0.0)
        if do_sample is False and self.temperature != 0:
            raise UserError(f"do_sample=False contradicts temperature {self.temperature}; leave do_sample out, or set "
                            "the temperature to 0")
        if return_dict_in_generate is False:
            raise UserError("return_dict_in_generate=False is not supported; leave it out, and take .sequences of the "
                            "output")
        if self.eos_token_id is not None:
            object.__setattr__(self, "eos_token_id", _as_tokens("eos_token_id", self.eos_token_id))
        if self.constraint is not None and not hasattr(self.constraint, "allowed"):
            raise UserError(f"constraint must be one of dllm.constraints, not {type(self.constraint).__name__}; make "
                            "it by Regex, json_schema or AllowedTokens")
        for name in ("infill_lengths", "corrector"):
            if isinstance(getattr(self, name), list):  # read from JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check(self)
        for name, its in settings_of(MDMGenerationConfig).items():
            values = getattr(self, name) if its.many else (getattr(self, name),)
            if its.kind is float and not all(isfinite(value or 0) for value in values or ()):
                raise UserError(f"{name} must be finite, not {getattr(self, name)}")
        name, bounded = self.method, (self.threshold, self.factor) != (None, None)
        if name in NEED_THRESHOLD and (self.threshold is None or self.factor):
            raise UserError(f"{name} needs a threshold (0.9, say), and no factor")
        if self.threshold is not None and self.factor is not None:
            raise UserError("threshold and factor exclude each other: each says how many positions a step commits")
        if bounded and name == "entropy_bound":
            raise UserError("threshold and factor say how many positions a step commits, and so does alg "
                            "entropy_bound; choose one of them")
        if bounded and name not in (*CONFIDENCES, *NEED_THRESHOLD):
            raise UserError(f"threshold and factor need confidences, {name} has none; choose {', '.join(CONFIDENCES)}")
        if self.editing_threshold is not None and name != "low_confidence_dynamic":
            raise UserError("editing_threshold needs remasking low_confidence_dynamic (LLaDA2.1)")
        if self.schedule != "even" and (name != "low_confidence" or bounded):
            raise UserError(f"schedule {self.schedule} needs remasking low_confidence without threshold and factor")
        for setting_name, algs in OF_ALGS.items():
            its = settings_of(MDMGenerationConfig)[setting_name]
            if getattr(self, setting_name) != its.default and name not in algs:
                raise UserError(f"{setting_name} needs alg {' or '.join(algs)}, and no remasking; the method is {name}")
        if self.t_min >= self.t_max:
            raise UserError(f"t_min {self.t_min} must be below t_max {self.t_max}, from which the temperature falls "
                            "towards it")
        if self.corrector is not None and len(self.corrector) != 3:
            raise UserError(f"corrector must be the three numbers A, a, b, as in 5,0.25,0.5, not {self.corrector}")
        if self.expand_token_id is not None and (name not in CONFIDENCES or self.remasking or bounded):
            raise UserError("expand_token_id commits one position a step, by an alg that has confidences: "
                            "maskgit_plus, entropy or topk_margin, without remasking, threshold and factor")

    def changed(self, settings: Mapping[str, Any]) -> "MDMGenerationConfig":
        """The config with some settings replaced.

        Raises: TypeError naming a setting that there is not; UserError as the constructor.
        """
        names = [field.name for field in fields(self)] + list(UNUSED)
        for name in settings:
            if name not in names:
                raise TypeError(f"there is no setting {name!r}{did_you_mean(name, names)}")
        return replace(self, **settings)

    @property
    def method(self) -> str:
        """The name of the strategy: `remasking`, where it is given, else `alg`."""
        return self.remasking or self.alg

    def for_edits(self) -> "MDMGenerationConfig":
        """The config for edits of a given text, without the settings that do not bear on them."""
        return MDMGenerationConfig(alg="edit", **{name: getattr(self, name) for name in EDIT_SETTINGS})

    @property
    def adaptive(self) -> bool:
        """Whether the model alone decides how many positions a step commits, at least one."""
        bounded = (self.threshold, self.factor) != (None, None)
        return self.method in ("entropy_bound", "self_speculation") or (bounded and self.method in CONFIDENCES)

    @property
    def edits(self) -> bool:
        """Whether tokens are inserted and deleted, so that texts change their lengths."""
        return self.method == "edit"

    @property
    def speculates(self) -> bool:
        """Whether texts are written from left to right, after drafts."""
        return self.method == "self_speculation"

    @property
    def remasks_at_random(self) -> bool:
        """Whether any step may mask or change committed tokens again, so that a row is at work until its last step."""
        return self.method in ("remdm", "ancestral") or self.corrector is not None

    @property
    def revises(self) -> bool:
        """Whether steps may replace committed tokens, also after a block's last mask is gone."""
        return self.method == "soft_parallel" or self.editing_threshold is not None

    @property
    def rewrites(self) -> bool:
        """Whether a committed token may still change."""
        return self.method in ("p2", "edit") or self.remasks_at_random or self.revises


def _as_tokens(name: str, value: Any) -> tuple[int, ...]:
    """The tokens that a number, or any collection of numbers, names."""
    try:
        tokens = (index(value),) if hasattr(value, "__index__") and not getattr(value, "ndim", 0) else tuple(
            map(index, value))
    except TypeError:  # a text, say
        tokens = ()
    require(name, value, len(tokens) > 0 and min(tokens) >= 0, "a token id or several, each at least 0")
    return tokens


# Settings that a generation_config.json may give. The mask token and the tokens that end a text are the model's.
_PUBLISHED = ("max_new_tokens", "steps", "temperature", "top_p", "top_k", "alg", "alg_temp", "eps", "block_length",
              "threshold", "remasking", "edit_source", "edit_source_length", "entropy_bound", "t_min", "t_max",
              "stability_threshold", "confidence_threshold")


def published_settings(raw: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that a folder's generation_config.json, read as `raw`, gives: defaults that arguments go before.

    As in Transformers, temperature, top_p and top_k are without effect where it says `"do_sample": false`. A top_k of
    -1 is vLLM's word for all tokens.
    Raises: UserError for a value that does not fit.
    """
    raw = _of_renoising(raw or {})
    settings = {name: raw[name] for name in _PUBLISHED if raw.get(name) is not None}
    if raw.get("do_sample") is False:
        settings = {name: value for name, value in settings.items() if name not in ("temperature", "top_p", "top_k")}
    elif raw.get("do_sample"):
        settings.setdefault("temperature", 1.0)
    if settings.get("top_k") == -1:
        settings["top_k"] = 0
    for name, value in settings.items():
        its = settings_of(MDMGenerationConfig)[name]
        check_kind(f"generation_config.json: {name}", value, its)
        require(f"generation_config.json: {name}", value, its.holds(value), its.wanted)
    return settings


def _of_renoising(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The generation_config.json of DiffusionGemma in the names of these settings; any other as it is.

    Its temperatures are t_min and t_max alone.
    """
    sampler = raw.get("sampler_config")
    if not isinstance(sampler, Mapping):
        return raw
    if (name := sampler.get("_cls_name", "EntropyBoundSamplerConfig")) != "EntropyBoundSamplerConfig":
        raise UserError(f"generation_config.json: the sampler {name} is not supported; supported: "
                        "EntropyBoundSamplerConfig")
    left = {name: value for name, value in raw.items() if name not in ("do_sample", "temperature", "top_p", "top_k")}
    return {**left, "alg": "entropy_bound", "steps": raw.get("max_denoising_steps"),
            "entropy_bound": sampler.get("entropy_bound")}
