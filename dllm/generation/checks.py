"""What a model needs before it denoises: settings that go together, its mask token and its ends of text."""

from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise

import torch
from torch import Tensor

from dllm.config.fields import settings_of
from dllm.constraints import Constraint
from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.model.diffusion_gemma import DiffusionGemma
from dllm.model.transformer import Transformer

NO_MASK = -1  # stands where a model that renoises has not written yet; no token has it
# The settings that bear on a model that renoises.
RENOISING = ("max_new_tokens", "steps", "alg", "entropy_bound", "t_min", "t_max", "stability_threshold",
             "confidence_threshold", "block_length", "num_return_sequences", "seed", "output_history", "eos_token_id",
             "stop_at_eos", "infill_lengths", "max_infill_length")
_NEUTRAL = {"top_p": 1, "top_k": 0}  # keep all words
_CALLED = {"constraint": "a constraint (response_format, --regex, --json-schema)"}


def check_settings(model: Transformer, config: MDMGenerationConfig, causal: bool) -> None:
    """Refuse settings that do not go with each other or with the model; causal: whether it is decoded by blocks."""
    if config.cache != "none" and (causal or config.cfg_scale > 0 or config.block_length is None):
        raise UserError(f"cache {config.cache!r} needs a block_length, and neither a block-causal model (which "
                        "keeps its finished blocks anyway) nor cfg_scale")
    check_blocks(config, causal)
    if config.window_blocks > 1 and model.config.causal_context:
        raise UserError("window_blocks lets blocks see unfinished ones before them, and this model sees what is before "
                        "its block as an autoregressive model does; leave it out")
    if config.method == "soft_parallel" and (not causal or config.cuda_graphs
                                             or find_mask_token(model, config) != model.mask_token_id):
        raise UserError("alg soft_parallel needs a block-causal model (DMax) with the mask token that its folder "
                        "names, and no cuda_graphs; choose another alg")
    if config.cuda_graphs and model.device.type != "cuda":
        raise UserError(f"cuda_graphs needs a model on a GPU, this one is on {model.device}; leave it out")
    if config.cuda_graphs and model.borrowed:
        raise UserError(f"cuda_graphs records our own layers, and those of {model.config.family} are Transformers'; "
                        "leave it out")
    if config.cfg_scale > 0 and model.config.logit_softcap is not None:
        raise UserError(f"cfg_scale combines logits by their hidden states, and those of {model.config.family} have a "
                        "soft cap; leave it out")
    if model.config.self_conditioning:
        check_conditioned(config, causal)
    if config.method == "ancestral":
        check_ancestral(model, config, causal)
    elif model.config.uniform_share == 1:
        raise UserError(f"{config.method} fills masks, and this model is trained on uniform words without masks; set "
                        "alg to ancestral")
    if config.edits:
        check_edits(model, config, causal)
    elif model.config.edit_heads == "insert":
        raise UserError(f"this model writes by insertions and predicts no masks, which {config.method} fills; set alg "
                        "to edit")
    if config.expand_token_id is not None:
        if config.block_length is not None or config.constraint is not None or causal:
            raise UserError("expand_token_id moves positions, and blocks and constraints need them to stay; leave "
                            "out block_length, constraint and block-causal models")
    for name in ("t_min", "t_max", "stability_threshold", "confidence_threshold"):
        if getattr(config, name) != settings_of(MDMGenerationConfig)[name].default:
            raise UserError(f"{name} is of models that renoise (DiffusionGemma), and this one fills masks; leave it "
                            "out")
    check_ends(model, config)


def check_ends(model: Transformer, config: MDMGenerationConfig) -> None:
    words = model.config.vocab_size
    named = [("eos_token_id", token) for token in config.eos_token_id or ()]
    for name, token in [("expand_token_id", config.expand_token_id or 0), *named]:
        if token >= words:
            raise UserError(f"{name} {token} is outside the model's vocabulary of {words}")


def check_blocks(config: MDMGenerationConfig, causal: bool) -> None:
    """Refuse parts and windows of blocks where there can be none."""
    used = {"sub_block_length": config.sub_block_length is not None, "window_blocks": config.window_blocks > 1}
    if all(used.values()):
        raise UserError("sub_block_length and window_blocks exclude each other: one denoises a part of a block at a "
                        "time, the other several blocks")
    for name in (name for name in used if used[name]):
        if not causal:
            raise UserError(f"{name} needs a block-causal model, which this one is not; leave it out")
        if not config.adaptive:
            raise UserError(f"{name} needs confidences that decide how many positions a step commits, {config.method} "
                            "here does not; set threshold, and alg maskgit_plus, entropy or topk_margin")
    if used["window_blocks"] and config.threshold is None:
        raise UserError("window_blocks needs a threshold (0.9, say), and neither factor nor alg entropy_bound")
    if used["sub_block_length"] and config.block_length % config.sub_block_length:
        raise UserError(f"sub_block_length {config.sub_block_length} does not divide the block_length "
                        f"{config.block_length}; choose one that does")


def refuse(given: Mapping[str, object], why: str) -> None:
    """Refuse the first setting that is given (is true), because it does not go with `why`."""
    if name := next(filter(given.get, given), None):
        raise UserError(f"{name} does not go with {why}; leave it out")


def check_conditioned(config: MDMGenerationConfig, causal: bool) -> None:
    refuse({"cache": config.cache != "none", "cuda_graphs": config.cuda_graphs, "block_causal": causal,
            "expand_token_id": config.expand_token_id is not None},
           "self-conditioning, by which this model sees what the step before predicted at every position")


def check_ancestral(model: Transformer, config: MDMGenerationConfig, causal: bool) -> None:
    share = model.config.uniform_share
    if share is None:
        raise UserError("alg ancestral needs a model that is trained on uniform words; train one by dllm train "
                        "train.objective=uniform, or choose another alg")
    refuse({"block_causal": causal, "block_length": config.block_length, "constraint": config.constraint,
            "stop_at_eos": config.stop_at_eos}, "alg ancestral, which may change any token in any step")
    if config.cfg_scale > 0 and share == 1:
        raise UserError("cfg_scale masks the prompt, and this model is trained on uniform words without masks; leave "
                        "it out")


def check_edits(model: Transformer, config: MDMGenerationConfig, causal: bool) -> None:
    heads = model.config.edit_heads
    if heads is None:
        raise UserError("alg edit needs a model with heads for edits; train one by dllm train "
                        "train.objective=edit, or choose another alg")
    refuse({name: getattr(config, name) for name in ("block_length", "constraint", "stop_at_eos", "cuda_graphs")},
           "alg edit, whose tokens move")
    if causal:
        raise UserError("alg edit changes a text anywhere, and this model sees whole blocks in their order; choose "
                        "a model without blocks")
    if heads == "insert" and config.edit_source != "empty":
        raise UserError(f"edit_source {config.edit_source} needs a model that substitutes and deletes, and this "
                        "one inserts alone; leave edit_source out")
    if heads != "insert" and config.corrector is not None:
        raise UserError("corrector with alg edit undoes insertions from an empty source, and this model also "
                        "substitutes and deletes; leave it out")


def check_constraint(model: Transformer, constraint: Constraint, wanted: Tensor, key_mask: Tensor | None) -> None:
    """Refuse a constraint that the positions `wanted` [B, L] to fill cannot hold."""
    if constraint.vocab_size != (words := model.config.vocab_size):
        raise UserError(f"the constraint is for a vocabulary of {constraint.vocab_size}, the model has {words}; "
                        "make it with model.config.vocab_size")
    for length in wanted.sum(1).unique().tolist():
        if length:
            constraint.check(length)
    if not constraint.final:
        return
    real = torch.ones_like(wanted) if key_mask is None else key_mask
    for row, seen in zip(wanted, real, strict=True):
        if sum(here > before for before, here in pairwise([False, *row[seen].tolist()])) > 1:
            raise UserError("a constraint holds a text in one piece; take the masks out of the prompt, or leave "
                            "the constraint out")


def check_renoising(model: DiffusionGemma, config: MDMGenerationConfig) -> None:
    """Refuse settings that do not bear on a model that renoises."""
    if config.method != "entropy_bound":
        raise UserError("this model (DiffusionGemma) replaces what it is unsure of by random words, and "
                        f"{config.method} fills masks; set alg to entropy_bound, or leave out the generation_config")
    for field in fields(config):
        name = field.name
        if name not in RENOISING and getattr(config, name) not in (field.default, _NEUTRAL.get(name, field.default)):
            remedy = "set t_min and t_max, or leave it out" if name == "temperature" else "leave it out"
            raise UserError(f"{_CALLED.get(name, name)} does not go with this model (DiffusionGemma), which renoises; "
                            f"{remedy}")
    if config.block_length is not None and config.block_length > (most := model.config.canvas_length):
        raise UserError(f"block_length {config.block_length} is a longer canvas than the {most} tokens that the model "
                        f"was trained on; set at most {most}, or leave it out")
    check_ends(model, config)


def check_prompts(model: DiffusionGemma, canvas: Tensor, real: Tensor) -> None:
    """Refuse images, and text after positions to fill, in a canvas [B, L] of `Renoising`."""
    images = torch.isin(canvas, torch.tensor(model.image_token_ids, device=canvas.device)) & real
    if images.any():
        raise UserError(f"the prompt has the image token {int(canvas[images][0])}, and this model is loaded without "
                        "its vision tower; take images out of the prompt")
    if ((canvas != NO_MASK) & real & (((canvas == NO_MASK) & real).cumsum(1) > 0)).any():
        raise UserError("this model (DiffusionGemma) continues texts, and cannot fill a gap that text follows; leave "
                        "the suffix out, or take a masked diffusion model")


def find_mask_token(model: Transformer, config: MDMGenerationConfig) -> int:
    """The mask token of the config, the checkpoint or its tokenizer, in this order; of models that renoise, `NO_MASK`,
    which is no token."""
    if model.config.canvas_length is not None:
        if config.mask_token_id is not None:
            raise UserError("this model (DiffusionGemma) has no mask token: it begins with random words, and its "
                            "vocabulary's <mask> is never used; leave mask_token_id out")
        return NO_MASK
    token_id = model.mask_token_id if config.mask_token_id is None else config.mask_token_id
    if token_id is None:
        raise UserError("nothing names the model's mask token: neither a setting, nor generation_config.json, "
                        "config.json or the tokenizer. An autoregressive model has none until it is adapted, as by "
                        "dllm train --model.model_path=MODEL; for another one set mask_token_id, or --mask-token")
    if not 0 <= token_id < model.config.vocab_size:
        raise UserError(f"mask_token_id {token_id} is outside the model's vocabulary of {model.config.vocab_size}")
    return token_id


def find_ends(model: Transformer) -> list[int]:
    """The end-of-text tokens that the checkpoint names."""
    if not model.end_token_ids:
        raise UserError("the checkpoint names no end-of-text token, which stop_at_eos and growing gaps need; set "
                        "eos_token_id")
    return model.end_token_ids
