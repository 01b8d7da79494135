"""The one Transformer behind every masked-diffusion family.

tokens [B, L] -> embedding [B, L, D] -> n x (RMSNorm, bidirectional grouped-query attention with RoPE, RMSNorm, SwiGLU)
-> RMSNorm -> hidden [B, L, D] -> head [V, D] -> logits [B, L, V]. What differs between families is in `ModelConfig`.
The loss is in diffusion/objectives.py, the denoising in generation/sampler.py; both take `hidden_states` and
`head_weight`, because the logits of positions that are not masked are never needed.
"""

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dllm.errors import UserError
from dllm.files import read_json
from dllm.model import borrowed, liger, quantised
from dllm.model.devices import find_device, find_dtype, own_dtype
from dllm.model.experts import FeedForward, MixtureOfExperts
from dllm.model.families import ModelConfig, own_code, read_config, write_config
from dllm.model.layouts import Layout, Padded, toward_mask
from dllm.model.liger import LigerLayer
from dllm.model.rotary import Rotary, Turn, rotate
from dllm.model.special_tokens import as_ids, read_special_tokens
from dllm.model.tokenizer import load_tokenizer
from dllm.model.weights import (
    check_parameters,
    find_model,
    fit_config,
    read_weights,
    to_ours,
    to_published,
    write_folder,
)
from dllm_kernels import slices_of_rows


@dataclass(frozen=True, slots=True)
class ModelOutput:
    logits: Tensor  # [B, L, V]


class RMSNorm(LigerLayer):
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, the statistics in fp32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.by_liger(x):
            return liger.rms_norm(x, self.weight, self.eps)
        # Under autocast a query is bf16 and the weight fp32; PyTorch's fused kernel wants one dtype.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(LigerLayer):
    """Grouped-query attention in both directions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        self.head_dim = E
        self.q_proj = nn.Linear(D, config.num_attention_heads * E, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * E, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * E, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * E, D, bias=config.output_bias)
        self.q_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, turn: Turn, layout: Layout, layer: int) -> Tensor:
        """x [B, L, D] -> [B, L, D], or [B, Q, D] for the layout's queries."""
        heads = -1, self.head_dim
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))
        v = self.v_proj(x).unflatten(-1, heads)
        q = self.q_norm(self.q_proj(layout.wanted(x)).unflatten(-1, heads))
        if layout.queries is None and self.by_liger(q):  # Liger's q and k have the same positions
            q, k = liger.rotate(q, k, turn.cos, turn.sin)
        else:
            q = rotate(q, layout.wanted(turn.cos), layout.wanted(turn.sin))
            k = rotate(k, turn.cos, turn.sin)
        if turn.query_scale is not None:
            q = q * layout.wanted(turn.query_scale)
        return self.o_proj(layout.attend(q, k, v, layer).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.self_attn = Attention(config)
        experts = config.has_experts(index)
        self.mlp = MixtureOfExperts(config) if experts else FeedForward(config, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, turn: Turn, layout: Layout, layer: int) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), turn, layout, layer)
        x = layout.wanted(x) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything but the head, under the name `model` that the published parameter names begin with."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def get_input_embeddings(self) -> nn.Embedding:  # as Transformers calls it
        return self.embed_tokens


class Transformer(nn.Module):
    """A masked diffusion language model: one bidirectional Transformer, driven by `ModelConfig`.

    `Transformer(config)` is randomly initialised (normal, standard deviation `initializer_range`; biases zero, norms
    one) from torch's global generator; `from_pretrained` loads a published or a trained one.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.borrowed = config, config.borrowed  # whether the backbone is Transformers'
        self.lm_head = None
        if self.borrowed:
            self.model, self.lm_head = borrowed.build(config)
        else:
            self.model = Backbone(config)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.insert_head = self.rate_head = None  # of edits; the head substitutes
        if config.edit_heads is not None:
            self.insert_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.rate_head = nn.Linear(config.hidden_size, 3)  # to substitute, delete, insert
        self.self_condition = None
        if config.self_conditioning:
            self.self_condition = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mask_token_id = config.mask_token_id  # or, after from_pretrained, another that the folder names
        self.end_token_ids = as_ids(config.eos_token_id)  # each ends a text; after from_pretrained, all that it names
        self.generation_defaults: dict | None = None  # generation_config.json
        self.code: dict[str, bytes] = {}  # the Python files of the folder, which are never run, kept for saving
        self.checkpointing = False  # while training: compute activations inside layers again, instead of keeping them
        self.quantised = False  # whether the linear maps inside the layers are int8 (quantised.py)
        self.graphs = None  # of sampling with cuda_graphs (graphs.py)
        self.rotary = None if self.borrowed else Rotary(config)
        for module in (self.insert_head, self.rate_head) if self.borrowed else self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if self.self_condition is not None:
            nn.init.zeros_(self.self_condition.weight)

    @property
    def layers_backend(self) -> str:
        """What computes RMSNorm, rotary embedding and SwiGLU: "torch", "liger" (Liger-Kernel, on CUDA), or "auto":
        Liger-Kernel on CUDA where it is installed. To set a name that cannot be is a UserError."""
        return "torch" if self.borrowed else self.model.norm.layers_backend

    @layers_backend.setter
    def layers_backend(self, name: str) -> None:
        liger.check_backend(name)
        if self.borrowed and name == "liger":
            raise UserError(f"layers_backend liger replaces our own layers, and those of {self.config.family} are "
                            "Transformers'; leave it out")
        for module in self.modules():
            if isinstance(module, LigerLayer):
                module.layers_backend = name

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D], the matrix that turns hidden states into logits (the embedding itself where they are tied)."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    @property
    def head_bias(self) -> nn.Parameter | None:
        """[V], of some heads that are borrowed."""
        return None if self.lm_head is None else self.lm_head.bias

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def layers(self) -> nn.ModuleList:
        return borrowed.find_layers(self.model, self.config) if self.borrowed else self.model.layers

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D], as `hidden_states` gives them -> [..., V]."""
        return borrowed.cap(F.linear(hidden, self.head_weight, self.head_bias), self.config.logit_softcap)

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def count_parameters(self, trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        """Logits [B, L, V] as the checkpoint's head gives them: not shifted, whatever `config.shift_logits` says.

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, L] bool or int, nonzero where there is a token; see `Padded`.
        Raises: UserError if the input is longer than the model's positions, or the shapes differ.
        """
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise UserError(f"attention_mask has shape {list(attention_mask.shape)}, input_ids "
                            f"{list(input_ids.shape)}; they must be the same")
        layout = Padded(None if attention_mask is None else attention_mask.bool())
        return ModelOutput(self.logits(self.hidden_states(input_ids, layout)))

    def hidden_states(self, input_ids: Tensor, layout: Layout | None = None, *,
                      levels: list[Tensor] | None = None, predicted: Tensor | None = None) -> Tensor:
        """The hidden states after the final norm, [B, L, D]; with queries [B, Q, D], the last layer computes no others.

        Args:
            input_ids: [B, L] int64.
            layout: how they lie and which keys a query sees, see layouts.py; None: rows without padding.
            levels: gets the embeddings, what each layer but the last gives, and the result.
            predicted: [B, L, D], of a model with self-conditioning, what it has predicted of each token before, as
                `embed_softly` gives it; zeros where it has not. None: nowhere.
        Raises: UserError if the input is longer than the model's positions.
        """
        layout = Padded() if layout is None else layout
        if input_ids.ndim != 2:
            raise UserError(f"the model takes input_ids [B, L], not {list(input_ids.shape)}; add a batch dimension")
        if (length := layout.length(input_ids)) > self.config.max_position_embeddings:
            raise UserError(f"the input has {length} positions, the model {self.config.max_position_embeddings}; "
                            "shorten it")
        if self.borrowed:
            return borrowed.hidden_states(self.model, self.config, input_ids, layout, levels,
                                          self.checkpointing and torch.is_grad_enabled())
        x = self.model.embed_tokens(layout.tokens(input_ids))
        if layout.certainty is not None:
            x = toward_mask(x, layout.certainty, self.model.embed_tokens.weight[self.mask_token_id])
        if self.self_condition is not None:  # also without predictions, because DDP wants a gradient in every step
            x = x + self.self_condition(torch.zeros_like(x) if predicted is None else predicted.to(x.dtype))
        turn = self.rotary(layout.number(input_ids), x.dtype)
        inner, last, run = layout.inner, len(self.model.layers) - 1, operator.call
        final = inner if layout.uneven else layout
        if self.checkpointing and torch.is_grad_enabled():
            run = partial(checkpoint, use_reentrant=False)
        for index, layer in enumerate(self.model.layers):
            if levels is not None:
                levels.append(x)
            x = run(layer, x, turn, final if index == last else inner, index)
        if layout.uneven:
            x = layout.wanted(x)
        x = self.model.norm(layout.result(x, self.config.shift_logits))
        if levels is not None:
            levels.append(x)
        return x

    def embed_softly(self, hidden: Tensor) -> Tensor:
        """The mean embedding of the words that hidden states [N, D] predict, [N, D]; [N, V] logits never exist."""
        embedding = self.model.embed_tokens.weight.to(hidden.dtype)
        return torch.cat([F.linear(hidden[part], self.head_weight).float().softmax(-1).to(hidden.dtype) @ embedding
                          for part in slices_of_rows(len(hidden), self.config.vocab_size, hidden.device)])

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, dtype: torch.dtype | str | None = None,
                        device: str | int | torch.device = "cpu", *, torch_dtype: torch.dtype | str | None = None,
                        mask_token_id: int | None = None, mask_token: str | None = None,
                        trust_remote_code: bool = False, layers_backend: str = "auto", **unknown) -> Self:
        """Load a model in evaluation mode: a Hugging Face folder or hub repository of any family in families.py, or of
        any other causal language model of Transformers (borrowed.py), or a GGUF file of a Llama or Qwen.

        Args:
            dtype: of the weights, by name too; "auto" is the checkpoint's own, None float32. `torch_dtype` is the same.
            mask_token_id, mask_token: the mask token, where the folder does not name it or names another.
            trust_remote_code: let the folder's code make the tokenizer, where one is needed; the model's is never run.
            layers_backend: see the property.
        Raises: UserError naming the file and the remedy: no such folder or repository, an unknown family, a
            configuration that is not computed here, missing or unknown parameters, wrong shapes, a truncated or corrupt
            file; no such device or dtype, or an argument that there is not.
        """
        if unknown:
            raise UserError(f"from_pretrained has no argument {next(iter(unknown))}; it takes dtype, device, "
                            "mask_token_id, mask_token, trust_remote_code and layers_backend")
        device, dtype = find_device(device), find_dtype(torch_dtype if dtype is None else dtype)
        folder = find_model(path_or_hub_id)
        raw = read_json(folder / "config.json")
        of_ints = quantised.is_quantised(raw)
        raw = {key: value for key, value in raw.items() if not (of_ints and key == "quantization_config")}
        config = read_config(raw, where=str(folder / "config.json"))
        state = read_weights(folder)
        dtype = own_dtype(raw, state) if dtype is None else dtype
        config = fit_config(config, state, str(folder))
        with torch.device("meta"):
            model = cls(config)
        model.layers_backend, model.quantised = layers_backend, of_ints
        if model.borrowed:
            model.load_borrowed(state, dtype, str(folder))
            model.to(device)
        else:
            model.load_published(state, device, dtype, str(folder))
        if mask_token is not None:
            mask_token_id = load_tokenizer(folder, mask_token_id, mask_token=mask_token,
                                           trust_remote_code=trust_remote_code).mask_token_id
        model.adopt(folder, mask_token_id)
        return model.requires_grad_(not model.quantised).eval()

    def load_published(self, state: dict[str, Tensor], device: torch.device, dtype: torch.dtype, where: str) -> None:
        """Take the weights of a published checkpoint. Raises: UserError naming those that do not fit."""
        state, scales = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}, {}
        if self.quantised:
            quantised.check_dtype(dtype)
            scales = to_ours(self.config, quantised.take_scales(state, where))
        expected = to_published(self.config, self.state_dict())
        check_parameters({name: tensor.shape for name, tensor in expected.items()},
                         {name: tensor.shape for name, tensor in state.items()}, where=where)
        state = {name: quantised.join(tensor.to(device), scales[name].to(device), dtype) if name in scales
                 else tensor.to(device, torch.float32 if name.endswith("expert_bias") else dtype)
                 for name, tensor in to_ours(self.config, state).items()}
        self.load_state_dict(state, assign=True)

    def load_borrowed(self, state: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
        """`load_published` for a backbone of Transformers, which also puts it where the weights are."""
        own = {name: state.pop(name).to(dtype) for name in self.state_dict()
               if name.startswith(("insert_head.", "rate_head.")) and name in state}
        self.model, self.lm_head = borrowed.load(self.config, state, dtype, where)
        self.load_state_dict(own, strict=False, assign=True)

    def adopt(self, folder: Path, mask_token_id: int | None = None) -> None:
        """Take what a folder says beside configuration and weights: special tokens, generation defaults, its code.

        Args:
            mask_token_id: the mask token that goes before those which the folder names.
        """
        tokens = read_special_tokens(folder, mask_is_given=mask_token_id is not None)
        self.mask_token_id = tokens.mask
        if mask_token_id is not None:
            self.config, self.mask_token_id = replace(self.config, mask_token_id=mask_token_id), mask_token_id
        self.end_token_ids = [*tokens.ends]
        if (folder / "generation_config.json").exists():
            self.generation_defaults = read_json(folder / "generation_config.json")
        self.code = {file.name: file.read_bytes() for file in folder.glob("*.py")}

    def save_pretrained(self, folder: str | os.PathLike, state: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json, model.safetensors (5 GB shards) and, if they were loaded, generation_config.json and the
        code that config.json names.

        Transformers and the original project load the folder. Each file is written beside its place and renamed into
        it; config.json comes last, so a folder with one is whole.

        Args:
            state: the weights by their names here, in the place of the model's own; an empty one writes none.
        Raises: Failure if the disk is full or the folder cannot be written.
        """
        config = write_config(self.config, str(self.dtype).removeprefix("torch."))
        code = self.code if own_code(config) else {}
        if not own_code(config) <= code.keys():
            del config["auto_map"]  # of a folder that came without its code
            code = {}
        state, scales = self.state_dict() if state is None else state, {}
        if self.quantised:
            config["quantization_config"] = quantised.WRITTEN
            state, scales = quantised.split(state)
        publish = borrowed.to_published if self.borrowed else to_published
        defaults = self.generation_defaults
        if defaults is not None and defaults.get("mask_token_id") is not None:
            defaults = {**defaults, "mask_token_id": self.mask_token_id}
        published = publish(self.config, state) if state else {}
        if scales:
            published |= quantised.write_scales(publish(self.config, scales))
        write_folder(Path(folder), config, published, code, defaults)
