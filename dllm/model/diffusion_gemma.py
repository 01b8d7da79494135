"""DiffusionGemma (google/diffusiongemma-26B-A4B-it), its text alone: one stack of layers, run in two ways.

encoder: tokens, each of which sees those before it -> keys and values of each layer (and hidden states: an
    autoregressive model). Sliding layers see the last W tokens, their own included.
decoder: a canvas of C tokens, each of which sees the context's keys (sliding layers: the last W - 1) and the whole
    canvas -> hidden [B, C, D] -> head -> logits, soft cap * tanh(logits / soft cap).

Both use the same weights, apart from one scalar a layer. There is no mask token: the canvas begins as uniform noise,
and `generation/renoising.py` replaces what the decoder is unsure of by new noise. The parts of the layers are
Transformers' own; attention, positions, the context and the order of both passes are here. The vision tower is not
loaded.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import call
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dllm.errors import UserError, warn
from dllm.files import read_json
from dllm.model.borrowed import cap
from dllm.model.devices import find_device, find_dtype, own_dtype
from dllm.model.families import ModelConfig
from dllm.model.gemma_config import IMAGE_TOKENS, read_gemma_config, their_config
from dllm.model.layouts import Layout, Padded
from dllm.model.rotary import rotate
from dllm.model.special_tokens import as_ids, unique
from dllm.model.transformer import ModelOutput
from dllm.model.weights import check_parameters, find_model, read_weights, write_folder
from dllm_kernels import bidirectional_attention, masked_attention

PIECE = 1024  # tokens that the encoder takes at a time: bounds the masks of a long prompt

# What Transformers takes where a generation_config.json does not say it.
SAMPLING = {"max_new_tokens": 256, "max_denoising_steps": 48, "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1,
            "confidence_threshold": 0.005, "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig",
                                                              "entropy_bound": 0.1}}
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


class Context:
    """What a canvas sees of the tokens before it: rotated keys, and values [B, S, Hkv, E] of each layer.

    Rows of different lengths are padded on the left, so that a sliding layer's last keys are its last.

    Args:
        whole: let sliding layers keep the keys of all tokens too, for canvases in the middle of the tokens.
    """

    def __init__(self, whole: bool = False):
        self.whole = whole
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.mask: Tensor | None = None  # [B, length] bool, where there is a token; None: everywhere
        self.length = 0  # tokens, with padding

    def before(self, layer: int) -> tuple[Tensor, Tensor] | None:
        return self.layers[layer] if layer < len(self.layers) else None

    def keep(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> None:
        if window is not None and not self.whole:
            first = max(k.shape[1] - (window - 1), 0)
            k, v = k[:, first:], v[:, first:]
        self.layers[layer:layer + 1] = [(k, v)]

    def extend(self, rows: int, n: int, key_mask: Tensor | None, device: torch.device) -> None:
        """Note n more tokens in each row, of which key_mask [B, n] says which are any."""
        if key_mask is not None or self.mask is not None:
            old = torch.ones(rows, self.length, dtype=torch.bool, device=device) if self.mask is None else self.mask
            new = torch.ones(rows, n, dtype=torch.bool, device=device) if key_mask is None else key_mask.bool()
            self.mask = torch.cat((old, new), 1)
        self.length += n

    def take(self, rows: Tensor) -> "Context":
        """The context of some rows [R] int64, copied."""
        taken = Context(self.whole)
        taken.layers = [(k[rows], v[rows]) for k, v in self.layers]
        taken.mask, taken.length = None if self.mask is None else self.mask[rows], self.length
        return taken


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def see_before(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, window: int | None) -> Tensor:
    """Causal attention, at scale 1, of the last Lq of Lk tokens to at most `window` keys, their own included.

    key_mask: [B, Lk or more] bool, of the tokens up to the last.
    """
    n, seen = q.shape[1], k.shape[1]
    key_mask = None if key_mask is None else key_mask[:, -seen:]
    if window is None or seen <= window:
        return bidirectional_attention(q, k, v, key_mask=key_mask, block_length=1, scale=1.0)
    sees = torch.ones(1, n, seen, dtype=torch.bool, device=q.device).tril(seen - n).triu(seen - n - window + 1)
    return masked_attention(q, k, v, sees if key_mask is None else sees & key_mask.unsqueeze(1), scale=1.0)


def see_all(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, window: int | None) -> Tensor:
    """Attention, at scale 1, of a canvas of C tokens to itself, the last C keys, and to its context.

    key_mask: [B, Lk - C or more] bool, the tokens of the context up to the last. window: the canvas sees the last
        window - 1 of these.
    """
    canvas = q.shape[1]
    if key_mask is None:
        if window is not None:
            k, v = k[:, -(window - 1 + canvas):], v[:, -(window - 1 + canvas):]
        return bidirectional_attention(q, k, v, scale=1.0)
    key_mask = key_mask[:, key_mask.shape[1] - (k.shape[1] - canvas):]
    if window is not None:
        key_mask = key_mask & (key_mask.flip(1).cumsum(1).flip(1) < window)
    seen = torch.cat((key_mask, key_mask.new_ones(len(q), canvas)), 1)
    return bidirectional_attention(q, k, v, key_mask=seen, scale=1.0)


class GemmaLayer(nn.Module):
    """The parts of Transformers' layer, under its names, for both passes."""

    def __init__(self, config: Any, index: int):
        super().__init__()
        from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaDecoderTextLayer

        theirs = DiffusionGemmaDecoderTextLayer(config, index)
        for name, part in theirs.named_children():
            self.add_module(name, part)
        self.register_buffer("layer_scalar", theirs.layer_scalar)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor] | None, attend: Attend,
                scalar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, n, D] -> [B, n, D], and the keys and values [B, S + n, Hkv, E] with those from `before`."""
        attended, k, v = self._attend(self.input_layernorm(x), rotary, before, attend)
        x = x + self.post_attention_layernorm(attended)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        flat = x.flatten(0, 1)  # the router reads the residual itself, the experts its norm
        _, weights, chosen = self.router(flat)
        mixed = self.experts(self.pre_feedforward_layernorm_2(flat), chosen, weights).view_as(x)
        x = x + self.post_feedforward_layernorm(dense + self.post_feedforward_layernorm_2(mixed))
        return x * scalar.to(x.dtype), k, v  # fsdp2 does not cast buffers

    def _attend(self, x: Tensor, rotary: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor] | None,
                attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.self_attn
        heads = -1, parts.head_dim
        q = rotate(parts.q_norm(parts.q_proj(x).unflatten(-1, heads)), *rotary)
        k = parts.k_proj(x).unflatten(-1, heads)
        v = k if parts.v_proj is None else parts.v_proj(x).unflatten(-1, heads)
        k, v = rotate(parts.k_norm(k), *rotary), parts.v_norm(v)
        if before is not None:
            k, v = torch.cat((before[0], k), 1), torch.cat((before[1], v), 1)
        return parts.o_proj(attend(q, k, v).flatten(2)), k, v


class _Scalar(nn.Module):
    """What the encoder has to itself in a layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("layer_scalar", torch.ones(1))


class DiffusionGemma(nn.Module):
    """Parameters have their published names. `DiffusionGemma(config)` is randomly initialised: matrices normal, with
    standard deviation `initializer_range`, norms and scalars one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.source:
            raise UserError("a DiffusionGemma is made from a config.json: read_gemma_config reads one")
        from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling

        self.config, theirs = config, their_config(config.source)
        self.model = nn.Module()
        self.model.decoder = decoder = nn.Module()
        decoder.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        decoder.layers = nn.ModuleList(GemmaLayer(theirs, index) for index in range(config.num_hidden_layers))
        decoder.norm = modeling.DiffusionGemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        decoder.self_conditioning = modeling.DiffusionGemmaSelfConditioning(theirs)
        self.model.encoder = nn.Module()
        self.model.encoder.language_model = nn.Module()
        self.model.encoder.language_model.layers = nn.ModuleList(_Scalar() for _ in decoder.layers)
        self.windows = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
        self.rotated = [(kind, layer.self_attn.head_dim)
                        for kind, layer in zip(theirs.layer_types, decoder.layers, strict=True)]
        self.frequencies = {(kind, size): _frequencies(theirs.rope_parameters[kind], size)
                            for kind, size in self.rotated}
        self.mask_token_id = None  # the vocabulary's <mask> is never used
        self.image_token_ids = as_ids([config.source.get(name) for name in IMAGE_TOKENS])
        self.end_token_ids = as_ids(config.eos_token_id)  # after from_pretrained, generation_config.json's
        self.generation_defaults: dict = dict(SAMPLING)  # with generation_config.json
        self.checkpointing = False  # while training: compute activations inside layers again, instead of keeping them
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range)

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D], the embedding, which is the head too."""
        return self.model.decoder.embed_tokens.weight

    @property
    def head_bias(self) -> None:
        return None

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.decoder.layers

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    def count_parameters(self, trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        """Logits [B, L, V], fp32, of the encoder: an autoregressive model, whose position i is about token i + 1."""
        layout = Padded(None if attention_mask is None else attention_mask.bool(), block_length=1)
        logits = F.linear(self.hidden_states(input_ids, layout), self.head_weight).float()
        return ModelOutput(cap(logits, self.config.logit_softcap))

    def hidden_states(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """The encoder's hidden states after the final norm [B, L, D], or [B, Q, D] of the layout's queries.

        Raises: UserError for a layout other than causal rows, `Padded(block_length=1)`.
        """
        if not (isinstance(layout, Padded) and layout.block_length == 1):
            raise UserError(f"DiffusionGemma's encoder sees what is before each token, in padded rows, so it cannot "
                            f"take {layout if isinstance(layout, Padded) else type(layout).__name__}; use "
                            "diffusion_generate to denoise canvases, and perplexity_bound for likelihoods")
        return layout.wanted(self.encode(input_ids, Context(), layout.key_mask))

    def encode(self, ids: Tensor, context: Context, key_mask: Tensor | None = None) -> Tensor:
        """Append tokens to a context.

        Args:
            ids: [B, n] int64. key_mask: [B, n] bool, False where there is padding, which takes no position: on the
                left if more follows, so that the tokens of a row are next to each other.
            context: those before; it gets the keys and values of these.
        Returns: hidden states after the final norm, [B, n, D].
        Raises: UserError if the context grows longer than the model's positions.
        """
        if context.length + ids.shape[1] > (most := self.config.max_position_embeddings):
            raise UserError(f"the input has {context.length + ids.shape[1]} positions, the model {most}; shorten it")
        # In training one piece: processes that gather the layers' weights (fsdp2) run the layers equally often.
        size = ids.shape[1] if context.whole else PIECE
        masks = [None] * -(-ids.shape[1] // size) if key_mask is None else key_mask.split(size, 1)
        hidden = [self._encode_piece(piece, context, mask)
                  for piece, mask in zip(ids.split(size, 1), masks, strict=True)]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden, 1)

    def _encode_piece(self, ids: Tensor, context: Context, key_mask: Tensor | None) -> Tensor:
        start = context.length
        context.extend(*ids.shape, key_mask, ids.device)
        if context.mask is None:
            positions = torch.arange(start, context.length, device=ids.device).expand(ids.shape)
        else:
            positions = (context.mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        attend = {window: partial(see_before, key_mask=context.mask, window=window) for window in {*self.windows}}
        scalars = [layer.layer_scalar for layer in self.model.encoder.language_model.layers]
        return self._run(self._embed(ids), positions, context, attend, scalars, keep=True)

    def decode(self, canvas: Tensor, context: Context, soft: Tensor | None = None,
               key_mask: Tensor | None = None) -> Tensor:
        """Hidden states [B, C, D] of a canvas, after the final norm; the context stays as it is.

        Args:
            canvas: [B, C] int64, words and noise.
            soft: [B, C, D], the mean of the embedding's rows under the words' probabilities of the step before
                (`dllm_kernels.soft_embedding`); None, or zeros: self-conditioning has nothing to go by.
            key_mask: [B, context.length] bool, the tokens before the canvas; None: all. A whole context also has
                later ones.
        """
        mask = context.mask if key_mask is None else key_mask
        start = context.length if mask is None else mask.sum(1, keepdim=True)
        positions = (start + torch.arange(canvas.shape[1], device=canvas.device)).expand(canvas.shape)
        attend = {window: partial(see_all, key_mask=mask, window=window) for window in {*self.windows}}
        x = self._embed(canvas)
        soft = torch.zeros_like(x) if soft is None else soft.to(x.dtype) * self._embedding_scale(x.dtype)
        x = self.model.decoder.self_conditioning(x, soft)
        return self._run(x, positions, context, attend, [layer.layer_scalar for layer in self.model.decoder.layers])

    def _embedding_scale(self, dtype: torch.dtype) -> float:
        return float(torch.tensor(self.config.hidden_size**0.5, dtype=dtype, device="cpu"))  # bf16: 53.0, for 53.07

    def _embed(self, ids: Tensor) -> Tensor:
        x = self.model.decoder.embed_tokens(ids)
        return x * self._embedding_scale(x.dtype)

    def _run(self, x: Tensor, positions: Tensor, context: Context, attend: Mapping[int | None, Attend],
             scalars: Sequence[Tensor], keep: bool = False) -> Tensor:
        rotary = {kind: self._rotary(kind, positions, x.dtype) for kind in self.frequencies}
        run = partial(checkpoint, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else call
        for index, layer in enumerate(self.model.decoder.layers):
            window = self.windows[index]
            x, k, v = run(layer, x, rotary[self.rotated[index]], context.before(index), attend[window], scalars[index])
            if keep:
                context.keep(index, k, v, window)
        return self.model.decoder.norm(x)

    def _rotary(self, kind: tuple[str, int], positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, n, 1, E] of positions [B, n], computed in fp32. kind: of layers, and the size E of a head."""
        self.frequencies[kind] = self.frequencies[kind].to(positions.device)
        angles = positions.float().unsqueeze(-1) * self.frequencies[kind]
        angles = torch.cat((angles, angles), -1).unsqueeze(2)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, dtype: torch.dtype | str | None = None,
                        device: str | int | torch.device = "cpu", *, torch_dtype: torch.dtype | str | None = None,
                        mask_token_id: int | None = None, mask_token: str | None = None,
                        trust_remote_code: bool = False, layers_backend: str = "auto", **unknown) -> Self:
        """Load a folder or a hub repository in evaluation mode; arguments and errors: as `Transformer.from_pretrained`.

        One notice names the weights of images, which are left out. trust_remote_code changes nothing.
        Raises: UserError also for a mask token, which there is not, and for copies of tied weights that differ.
        """
        if unknown:
            raise UserError(f"from_pretrained has no argument {next(iter(unknown))}; it takes dtype, device, "
                            "mask_token_id, mask_token, trust_remote_code and layers_backend")
        if mask_token_id is not None or mask_token is not None:
            raise UserError("DiffusionGemma has no mask token: it replaces what it is unsure of by random words, and "
                            "its vocabulary's <mask> is never used; leave the mask token out")
        if layers_backend not in ("auto", "torch"):
            raise UserError(f"layers_backend {layers_backend} is not there for DiffusionGemma, whose layers are those "
                            "of Transformers; leave it out")
        device, dtype = find_device(device), find_dtype(torch_dtype if dtype is None else dtype)
        folder = find_model(path_or_hub_id)
        raw = read_json(folder / "config.json")
        config = read_gemma_config(raw, where=str(folder / "config.json"))
        state = _text_weights(read_weights(folder), str(folder))
        dtype = own_dtype(raw, state) if dtype is None else dtype
        with torch.device("meta"):
            model = cls(config)
        if dtype == torch.float64:  # which PyTorch's grouped product does not take
            model.model.decoder.layers[0].experts.config._experts_implementation = "eager"
        check_parameters({name: tensor.shape for name, tensor in model.state_dict().items()},
                         {name: tensor.shape for name, tensor in state.items()}, where=str(folder))
        for name in sorted(state):  # one by one, so that little more than the model is in memory
            state[name] = state[name].to(device, dtype)
        model.load_state_dict(state, assign=True)
        model.adopt(folder)
        return model.requires_grad_(True).eval()

    def adopt(self, folder: Path, mask_token_id: None = None) -> None:
        """Take what a folder says beside configuration and weights: generation defaults, tokens that end a text."""
        self.generation_defaults |= read_json(folder / "generation_config.json", missing={})
        ends = as_ids(self.generation_defaults.get("eos_token_id"))
        self.end_token_ids = unique([*ends, *self.end_token_ids])

    def save_pretrained(self, folder: str | os.PathLike, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder that Transformers and we load, without a vision tower; see `weights.write_folder`.

        Args:
            state: the weights by their names here, in the place of the model's own; an empty one writes none.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        config = {**self.config.source, "dtype": dtype,
                  "text_config": {**self.config.source["text_config"], "dtype": dtype}}
        write_folder(Path(folder), config, self.state_dict() if state is None else state,
                     defaults=self.generation_defaults)


def _frequencies(rope: Mapping, head_dim: int) -> Tensor:
    """[E / 2] fp32, the angle per position of each pair; "proportional" turns the first pairs alone."""
    pairs = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    frequencies = 1.0 / rope["rope_theta"] ** pairs
    if rope["rope_type"] == "proportional":
        frequencies[int(rope.get("partial_rotary_factor", 1.0) * head_dim / 2):] = 0
    return frequencies


def _text_weights(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights of the text model, each once."""
    images = [name for name in state if name.startswith(_VISION)]
    if images:
        warn(f"{where}: the {len(images)} tensors of the vision tower (vision_tower, embed_vision) are left out; the "
             "model reads and writes text alone")
    if quantised := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise UserError(f"{where}: {quantised[0]} is quantised ({state[quantised[0]].dtype}), which is not supported; "
                        "give a checkpoint in bfloat16 or float32")
    text: dict[str, Tensor] = {}
    for name in sorted(state.keys() - {*images}, key=lambda name: (not name.startswith("model.decoder."), name)):
        own = name.replace("model.encoder.language_model.", "model.decoder.")
        if name == "lm_head.weight":
            own = "model.decoder.embed_tokens.weight"
        elif name.endswith("layer_scalar"):
            own = name
        if own in text and not torch.equal(text[own], state[name]):
            raise UserError(f"{where}: {name} differs from {own}, and DiffusionGemma ties them; save the model again "
                            "with tied weights")
        text.setdefault(own, state[name])
    return text
