"""Drop-in use in Hugging Face Transformers: an attention implementation, and patches of model classes or instances.

    dllm_kernels.register_attention()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="dllm")   # bidirectional attention

    undo = dllm_kernels.apply_dllm_kernels_to_qwen2(model=model)                       # and the loss without logits
    undo()

Transformers is imported when one of these functions is called.
"""

import functools
import importlib
import inspect
import sys
import types
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import bidirectional_attention
from .masked_cross_entropy import linear_masked_cross_entropy

__all__ = ["apply_dllm_kernels_to_dream", "apply_dllm_kernels_to_llada", "apply_dllm_kernels_to_llama",
           "apply_dllm_kernels_to_qwen2", "apply_dllm_kernels_to_qwen3", "register_attention"]

Undo = Callable[[], None]


def register_attention() -> None:
    """Register "dllm" with Transformers, so that ``attn_implementation="dllm"`` gives bidirectional attention.

    No query sees a key whose attention_mask is 0; a query that sees no key gives zeros. Repeated calls do no harm.

    Raises: ImportError without Transformers 5. When the model is called, ValueError for what this attention does not
        have: dropout, sliding windows, soft capping, sinks, packed position_ids, 4-D masks.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("dllm", _attention_forward)
    AttentionMaskInterface.register("dllm", _key_mask)


def apply_dllm_kernels_to_qwen2(*, attention: bool = True, fused_linear_cross_entropy: bool = True,
                                model: nn.Module | None = None) -> Undo:
    """Patch Qwen2: bidirectional attention, and a loss that never stores the logits.

    Args:
        attention: set the attention implementation to "dllm" (see `register_attention`).
        fused_linear_cross_entropy: in training mode, ``model(..., labels=labels).loss`` comes from
            `linear_masked_cross_entropy` of the positions whose label is not ignore_index, and ``.logits`` is None. The
            value is that of Transformers: labels are shifted (position i predicts label i + 1) unless they come as
            `shift_labels`. A model that predicts the masked position itself needs its labels as both.
        model: patch this model alone; None patches the classes, for models made afterwards.
    Returns: a function that undoes the patch, also on models made meanwhile.
    Raises: ValueError if `model` is not such a model; ImportError without Transformers.
    """
    return _apply("qwen2", "Qwen2", attention, fused_linear_cross_entropy, model)


def apply_dllm_kernels_to_qwen3(*, attention: bool = True, fused_linear_cross_entropy: bool = True,
                                model: nn.Module | None = None) -> Undo:
    """Patch Qwen3; arguments, result and errors as `apply_dllm_kernels_to_qwen2`."""
    return _apply("qwen3", "Qwen3", attention, fused_linear_cross_entropy, model)


def apply_dllm_kernels_to_llama(*, attention: bool = True, fused_linear_cross_entropy: bool = True,
                                model: nn.Module | None = None) -> Undo:
    """Patch Llama; arguments, result and errors as `apply_dllm_kernels_to_qwen2`."""
    return _apply("llama", "Llama", attention, fused_linear_cross_entropy, model)


def apply_dllm_kernels_to_llada(*, model: nn.Module) -> Undo:
    """Patch the attention of a LLaDA model, whose code comes with its checkpoint (trust_remote_code).

    Calls with a mask or dropout, and causal ones, are left to the model's own code. The loss of LLaDA is computed
    outside of the model: take its hidden states and `linear_masked_cross_entropy` there.

    Returns: a function that undoes the patch.
    Raises: ValueError if no layer of `model` has the attention method of LLaDA's published code.
    """
    name, wanted = "_scaled_dot_product_attention", ["q", "k", "v", "attn_mask", "dropout_p", "is_causal"]
    layers = [layer for layer in _modules("llada", model)
              if hasattr(layer, name) and list(inspect.signature(getattr(layer, name)).parameters) == wanted]
    if not layers:
        raise ValueError(f"apply_dllm_kernels_to_llada: no layer of {type(model).__name__} has a method "
                         f"{name}({', '.join(wanted)}); give a model of LLaDA's published code")

    def patched(original, layer, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        if attn_mask is not None or dropout_p or is_causal:
            return original(layer, q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)
        return bidirectional_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return _replace([(layer, name, patched) for layer in layers])


def apply_dllm_kernels_to_dream(*, model: nn.Module) -> Undo:
    """Patch the attention of a Dream model, whose code comes with its checkpoint (trust_remote_code).

    Calls with a mask, a cache or dropout, and those that ask for the attention weights, are left to the model's own
    code.

    Returns: a function that undoes the patch.
    Raises: ValueError if no layer of `model` is a DreamSdpaAttention of Dream's published code.
    """
    layers = [layer for layer in _modules("dream", model) if type(layer).__name__ == "DreamSdpaAttention"]
    if not layers:
        raise ValueError(f"apply_dllm_kernels_to_dream: {type(model).__name__} has no layer DreamSdpaAttention; give a "
                         f"model of Dream's published code, loaded with attn_implementation='sdpa'")

    rotate = sys.modules[type(layers[0]).__module__].apply_rotary_pos_emb

    def patched(original, layer, hidden_states, attention_mask=None, *args, position_embeddings=None, **others):
        known = {name: value for name, value in others.items() if name not in ("position_ids", "cache_position")}
        if (args or isinstance(attention_mask, Tensor) or position_embeddings is None
                or any(value is not None and value is not False for value in known.values())
                or (layer.training and layer.attention_dropout)):
            return original(layer, hidden_states, attention_mask, *args, position_embeddings=position_embeddings,
                            **others)
        heads = (*hidden_states.shape[:2], -1, layer.head_dim)
        q, k, v = (project(hidden_states).view(heads) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        out = bidirectional_attention(q.transpose(1, 2), k.transpose(1, 2), v)
        return layer.o_proj(out.flatten(2)), None, None

    return _replace([(layer, "forward", patched) for layer in layers])


def _attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                       attention_mask: Tensor | None = None, scaling: float | None = None, dropout: float = 0.0,
                       **others) -> tuple[Tensor, None]:
    """Transformers' attention interface: q [B, Hq, Lq, E], k and v [B, Hkv, Lk, E] -> [B, Lq, Hq, E]."""
    if dropout:
        raise ValueError(f"attn_implementation 'dllm' has no dropout, and the model asks for {dropout}; "
                         f"set attention_dropout to 0 in its config")
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"attn_implementation 'dllm' does not have the {name} that {type(module).__name__} asks "
                             f"for; load the model with 'sdpa' or 'eager'")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attn_implementation 'dllm' takes an attention_mask [B, L], not "
                         f"{list(attention_mask.shape)}: every query sees every key that is not padding")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    key_mask = None if attention_mask is None else attention_mask[:, :k.shape[1]].bool()
    return bidirectional_attention(q, k, v, key_mask=key_mask, scale=scaling), None


def _key_mask(batch_size: int, *, kv_length: int, kv_offset: int = 0, mask_function: Callable | None = None,
              attention_mask: Tensor | None = None, **others) -> Tensor | None:
    """Transformers' mask interface: [B, Lk] bool, True = may be attended; None where there is no padding."""
    plain = ("causal_mask_function", "bidirectional_mask_function")
    if mask_function is not None and getattr(mask_function, "__name__", "") not in plain:
        raise ValueError(
            "attn_implementation 'dllm' has neither sliding windows nor packed position_ids nor other masks: every "
            "query sees every key of its row that is not padding. Under torch.compile give an attention_mask, because "
            "without one Transformers takes all position_ids for packed; else load the model with 'sdpa' or 'eager'")
    if attention_mask is None:
        # No query may see the keys that a static cache has not been given yet; Transformers 5.0 has cache_position.
        where = others.get("cache_position")
        seen = others["q_offset"] + others["q_length"] if where is None else where[-1] + 1
        if isinstance(seen, int) and seen >= kv_length + kv_offset:
            return None
        device = where.device if where is not None else others.get("device")
        return (torch.arange(kv_offset, kv_offset + kv_length, device=device) < seen).expand(batch_size, -1)
    mask = F.pad(attention_mask.bool(), (0, max(0, kv_offset + kv_length - attention_mask.shape[1])))
    mask = mask[:, kv_offset:kv_offset + kv_length]
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _apply(module: str, prefix: str, attention: bool, loss: bool, model: nn.Module | None) -> Undo:
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    base, causal = getattr(modeling, f"{prefix}PreTrainedModel"), getattr(modeling, f"{prefix}ForCausalLM")
    if model is not None and not isinstance(model, base):
        raise ValueError(f"apply_dllm_kernels_to_{module} takes a {prefix} model of Transformers, "
                         f"not {type(model).__name__}")
    if model is not None and loss and not isinstance(model, causal):
        raise ValueError(f"apply_dllm_kernels_to_{module}: {type(model).__name__} has no language modelling head; "
                         f"set fused_linear_cross_entropy=False or give a {causal.__name__}")
    changed: list[tuple[Callable, str]] = []  # configurations reached, and the attention implementation they had

    def use_dllm(config):
        if config._attn_implementation != "dllm":
            reference = weakref.ref(config)
            changed.append((reference, config._attn_implementation))
            config._attn_implementation = "dllm"

    replacements = []
    if attention:
        register_attention()
        if model is not None:
            use_dllm(model.config)
        else:
            def init(original, self, *args, **kwargs):
                original(self, *args, **kwargs)
                use_dllm(self.config)

            replacements.append((base, "__init__", init))
    if loss:
        replacements.append((causal if model is None else model, "forward", _forward_with_loss))
    restore = _replace(replacements)

    def undo() -> None:
        restore()
        for reference, before in changed:
            if (config := reference()) is not None:
                config._attn_implementation = before
        changed.clear()

    return undo


def _forward_with_loss(original, self, *inputs, labels=None, logits_to_keep=0, return_dict=None, **kwargs):
    """The forward of a causal model; in training with labels, the loss comes without the logits."""
    head = self.lm_head
    if (labels is None or not self.training or return_dict is False or type(head) is not nn.Linear
            or not isinstance(logits_to_keep, int) or logits_to_keep):
        return original(self, *inputs, labels=labels, logits_to_keep=logits_to_keep, return_dict=return_dict, **kwargs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    names = ("shift_labels", "num_items_in_batch", "ignore_index")
    of_loss = {name: kwargs.pop(name) for name in names if name in kwargs}
    outputs = self.model(*inputs, **kwargs)
    loss = _shifted_loss(outputs.last_hidden_state, head, labels, **of_loss)
    return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values,
                                  hidden_states=outputs.hidden_states, attentions=outputs.attentions)


def _shifted_loss(hidden: Tensor, head: nn.Linear, labels: Tensor, shift_labels: Tensor | None = None,
                  num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100) -> Tensor:
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden.device).view(hidden.shape[:-1])
    loss = linear_masked_cross_entropy(hidden, head.weight, shift_labels, shift_labels != ignore_index, bias=head.bias,
                                       reduction="mean" if num_items_in_batch is None else "sum")
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _replace(replacements: list[tuple[object, str, Callable]]) -> Undo:
    """Set method `name` of each class or instance to `patched(original, self, ...)`; returns what restores them.

    An instance gets a bound method, and neither it nor `original` holds on to the instance, so that copies of a patched
    model (copy.deepcopy, AveragedModel) compute with their own weights. torch.save keeps weights, not this patch.
    """
    restores = []

    def replace(owner, name, patched):
        before = vars(owner).get(name)
        original = getattr(owner, name)
        if isinstance(original, types.MethodType) and original.__self__ is owner:
            original = original.__func__
        elif not isinstance(owner, type):  # something callable was set on the instance
            original = functools.partial(_call_without_self, original)

        @functools.wraps(getattr(owner, name))  # Transformers' Trainer reads the signature: which columns does it take?
        def method(self, *args, **kwargs):
            return patched(original, self, *args, **kwargs)

        restores.append((owner, name, before))
        setattr(owner, name, method if isinstance(owner, type) else types.MethodType(method, owner))

    for replacement in replacements:
        replace(*replacement)

    def undo() -> None:
        while restores:
            owner, name, before = restores.pop()
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    return undo


def _call_without_self(function: Callable, self, *args, **kwargs):
    return function(*args, **kwargs)


def _modules(family: str, model: nn.Module):
    if not isinstance(model, nn.Module):
        raise ValueError(f"apply_dllm_kernels_to_{family} takes model=, a loaded model, not {type(model).__name__}; "
                         "its code comes with its checkpoint, so there is no class to patch beforehand")
    return model.modules()
