"""Backbones borrowed from Transformers: its causal language models whose family is not ours (families.py).

Transformers' modules compute everything but attention, which they hand through its attention interface to the layout
(layouts.py): so the same layouts hold as in our own layers, and no causal mask is ever made. The model is taken apart:
the backbone is what Transformers calls the base model, the head a linear map, or none where it is tied to the
embedding. Neither dropout nor routers' noise act, and the code of a folder is never run.
"""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dllm.errors import UserError, first_line
from dllm.model.borrowed_config import transformers_config
from dllm.model.families import ModelConfig
from dllm.model.layouts import Layout, Padded

ATTENTION = "dllm_layout"  # the name under which Transformers knows `attend`
_RANDOM = re.compile(r".*(dropout|dropout_rate|_pdrop|dropout_prob|drop_path|layerdrop|jitter_noise)|moe_jitter_eps")
_layout: ContextVar[Layout] = ContextVar("layout")  # of the forward pass, for `attend`


@contextmanager
def lay_out(layout: Layout) -> Iterator[None]:
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


@torch.compiler.disable  # a compiled layer leaves its graph here: what the layout computes depends on the batch
def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
           scaling: float | None = None, **others) -> tuple[Tensor, None]:
    """Transformers' attention interface: q [B, Hq, L, E], k [B, Hkv, L, E], v [B, Hkv, L, Ev] -> [B, L, Hq, Ev].

    Raises: UserError for what the layouts do not have: masks of the model's own, sinks, biases, soft caps.
    """
    name = type(module).__name__
    if others.get("softcap") is not None:
        raise UserError(f"{name} caps the scores of its attention softly, which is not computed here; set "
                        "attn_logit_softcapping to null in config.json, and adapt the model without the cap")
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        raise UserError(f"{name} chooses itself which keys its queries see, so it cannot attend in both directions; "
                        "take another model")
    if extra := next((key for key in ("s_aux", "position_bias", "indices") if others.get(key) is not None), None):
        raise UserError(f"the attention of {name} has {extra} beside queries, keys and values, which is not computed "
                        "here; take another model")
    size, width = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    scale = math.sqrt(size) * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # the layouts' is size ** -0.5
    if not math.isclose(scale, 1, rel_tol=1e-12):
        query = query * scale
    q, k, v = (F.pad(x, (0, size - x.shape[-1])).transpose(1, 2) for x in (query, key, value))
    return _layout.get().attend(q, k, v, module.layer_idx)[..., :width], None


def hidden_states(backbone: nn.Module, config: ModelConfig, input_ids: Tensor, layout: Layout,
                  levels: list[Tensor] | None, checkpointing: bool) -> Tensor:
    """As `Transformer.hidden_states`; the last layer computes every position, because its module knows no queries."""
    inner = layout.inner
    if checkpointing != getattr(backbone, "_checkpoints", False):
        _set_checkpointing(backbone, checkpointing)
    with lay_out(inner):
        out = backbone(input_ids=inner.tokens(input_ids), position_ids=inner.number(input_ids).contiguous(),
                       use_cache=False, output_hidden_states=levels is not None, return_dict=True)
    hidden = layout.wanted(layout.result(out.last_hidden_state, config.shift_logits))
    if config.logit_scale != 1:  # the head is linear
        hidden = hidden * config.logit_scale
    if levels is not None:
        levels += [*out.hidden_states[:-1], hidden]
    return hidden


def _set_checkpointing(backbone: nn.Module, on: bool) -> None:
    """Whether activations inside layers are computed again in the backward pass, in the layout that they had."""
    def contexts():
        return nullcontext(), lay_out(_layout.get())

    if not backbone.supports_gradient_checkpointing:
        raise UserError(f"{type(backbone).__name__} cannot compute activations again; set "
                        "train.enable_gradient_checkpointing=false")
    backbone._set_gradient_checkpointing(on, partial(checkpoint, use_reentrant=False, context_fn=contexts))
    backbone._checkpoints = on


def build(config: ModelConfig) -> tuple[nn.Module, nn.Module | None]:
    """(backbone, head), with the random weights that Transformers draws, on the current device."""
    with _quiet():
        return _take_apart(_make(config, "config.json"), config, "config.json")


def load(config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype, where: str
         ) -> tuple[nn.Module, nn.Module | None]:
    """(backbone, head) with the weights of a published checkpoint.

    Raises: UserError naming missing, unknown or misshapen parameters, or what keeps the model from being adapted.
    """
    causal = _class_of(config, where)
    with _quiet():
        model, told = causal.from_pretrained(
            None, config=_configure(config, where), state_dict=dict(state), dtype=dtype, attn_implementation=ATTENTION,
            ignore_mismatched_sizes=True, output_loading_info=True)
    misshapen = [f"{name} {list(found)}, not {list(wanted)}" for name, found, wanted in sorted(told["mismatched_keys"])]
    problems = [f"{problem}: {', '.join(sorted(map(str, names)))}" for problem, names in (
        ("missing", told["missing_keys"]), ("unknown", told["unexpected_keys"]), ("of another shape", misshapen),
        ("broken", told["error_msgs"])) if names]
    if problems:
        raise UserError(f"{where}: the parameters are not those of config.json. {'; '.join(problems)}")
    parts = _take_apart(model, config, where)
    check(model, parts, config, where)
    return parts


def find_layers(backbone: nn.Module, config: ModelConfig) -> nn.ModuleList | None:
    return next((module for module in backbone.modules()
                 if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers), None)


def matrix_names(config: ModelConfig, where: str) -> tuple[str, str]:
    """What a checkpoint calls the matrices of embedding and head."""
    with torch.device("meta"), _quiet():
        model = _make(config, where)
    _take_apart(model, config, where)  # refuses what has no such matrices
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(f"{names[id(part)]}.weight" for part in (model.get_input_embeddings(), model.get_output_embeddings()))


def to_published(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `Transformer`, under the names that Transformers gives a checkpoint; edit heads keep theirs."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"), _quiet():
        model = _make(config, "config.json")
    names = {id(module): name for name, module in model.named_modules()}
    base, head = names[id(_base(model))], names[id(model.get_output_embeddings())]
    theirs, own = {}, {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part in ("model", "lm_head"):
            theirs[f"{base if part == 'model' else head}.{rest}"] = tensor
        else:
            own[name] = tensor
    return revert_weight_conversion(model, theirs) | own


def _class_of(config: ModelConfig, where: str) -> type:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(transformers_config(config.source, where))]


def _configure(config: ModelConfig, where: str):
    """Transformers' configuration, without what is drawn at random in training."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    found = transformers_config(config.source, where, vocab_size=config.vocab_size,
                                tie_word_embeddings=config.tie_word_embeddings)
    for key, value in found.to_dict().items():
        if _RANDOM.fullmatch(key) and isinstance(value, int | float) and not (
                config.family == "phimoe" and key == "router_jitter_noise"):  # which is no noise there
            setattr(found, key, 0.0)
    return found


def _make(config: ModelConfig, where: str) -> nn.Module:
    try:
        return _class_of(config, where)._from_config(_configure(config, where), dtype=torch.float32,
                                                     attn_implementation=ATTENTION)
    except UserError:
        raise
    except KeyError as error:
        if error.args == (ATTENTION,):  # a table of its own attention classes
            raise _causal_for_good(where, config.family) from None
        raise _not_built(where, config, error) from error
    except Exception as error:  # of the shapes, the rotary embedding, and whatever else a model's constructor checks
        raise _not_built(where, config, error) from error


def _not_built(where: str, config: ModelConfig, error: Exception) -> UserError:
    return UserError(f"{where}: Transformers cannot build this {config.family} ({type(error).__name__}: "
                     f"{first_line(error)}); correct the file, or update Transformers")


def _causal_for_good(where: str, name: str) -> UserError:
    return UserError(f"{where}: {name} has layers that mix positions otherwise than by Transformers' attention "
                     "interface (recurrent, convolutional or linear ones, or attention of its own), and those know one "
                     "direction alone; take another model")


def _base(model: nn.Module) -> nn.Module:
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def _take_apart(model: nn.Module, config: ModelConfig, where: str) -> tuple[nn.Module, nn.Module | None]:
    backbone, head = _base(model), model.get_output_embeddings()
    if backbone is model or type(head) is not nn.Linear:
        raise UserError(f"{where}: {type(model).__name__} has no output embedding, a linear map from hidden states to "
                        "logits; take a causal language model")
    if find_layers(backbone, config) is None:
        raise UserError(f"{where}: {type(backbone).__name__} has no list of its {config.num_hidden_layers} layers, by "
                        "which they are sharded and adapted; take another model")
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise UserError(f"{where}: {type(backbone).__name__} takes no position_ids, which packed texts need; take "
                        "another model")
    if not config.tie_word_embeddings:
        return backbone, head
    if head.bias is not None:
        raise UserError(f"{where}: the head of {type(model).__name__} is the embedding and a bias; untie them "
                        "(tie_word_embeddings false, and the matrix stored twice)")
    return backbone, None


@dataclass(frozen=True, slots=True)
class _Alone(Layout):
    """Each position sees itself alone."""

    calls: list[int] = field(default_factory=list)  # the layers that attended

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        self.calls.append(layer)
        return v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)


@torch.no_grad()
def check(model: nn.Module, parts: tuple[nn.Module, nn.Module | None], config: ModelConfig, where: str) -> None:
    """Refuse a model that does more than attention between positions, or more than a product at its end.

    Such are recurrent and convolutional layers, and attention that does not go through the interface.
    """
    name, (backbone, head) = type(model).__name__, parts
    places = torch.arange(4).unsqueeze(0)
    ids, alone = places % config.vocab_size, _Alone()
    other = ids.index_fill(1, torch.tensor([1]), config.vocab_size - 1)
    try:
        with lay_out(alone):
            before, after, moved = (
                backbone(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state.float()
                for tokens, positions in ((ids, places), (other, places), (ids.roll(2, 1), places.roll(2, 1))))
        with lay_out(Padded()):
            logits = model(input_ids=ids, position_ids=places, use_cache=False).logits.float()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:
        raise UserError(f"{where}: {name} cannot be computed without its own attention ({type(error).__name__}: "
                        f"{first_line(error)}); take another model") from error
    changed = (before - after).abs().amax(-1)[0]
    if not alone.calls or changed[[0, 2, 3]].max() > 1e-2 * changed[1]:
        raise _causal_for_good(where, name)
    if (moved.roll(2, 1) - before).abs().max() > 1e-2 * changed[1]:
        raise UserError(f"{where}: {name} numbers the tokens of a batch itself, not by position_ids, and packed texts "
                        "need them; take another model")
    matrix = backbone.get_input_embeddings() if head is None else head
    ours = hidden_states(backbone, config, ids, Padded(), None, False).to(matrix.weight.dtype)
    ours = cap(F.linear(ours, matrix.weight, getattr(matrix, "bias", None)).float(), config.logit_softcap)
    if not (ours - logits).abs().max() <= 2e-2 * logits.abs().max():
        raise UserError(f"{where}: the logits of {name} are more than a product of hidden states and a matrix, a scale "
                        "and a soft cap; take another model")


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' bars and reports: what matters in them is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
