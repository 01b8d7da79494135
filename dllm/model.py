"""DiffusionLM: the one Transformer behind every masked-diffusion family.

tokens [B, L] -> embedding [B, L, D] -> n x (RMSNorm, bidirectional grouped-query attention with RoPE, RMSNorm, SwiGLU)
-> RMSNorm -> hidden [B, L, D] -> head [V, D] -> logits [B, L, V]. What differs between families is in `ModelConfig`.
The loss is in loss.py, the denoising in sampler.py; both take `hidden_states` and `head_weight`, because the logits of
positions that are not masked are never needed.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from dllm.cache import KeyValueCache
from dllm.errors import UserError
from dllm.families import ModelConfig, check_parameters, mask_token_id_of, read_config, read_json, write_config
from dllm.published import to_ours, to_published
from dllm.together import Group, arrange
from dllm.ulysses import heads_to_positions, positions_to_heads
from dllm_kernels import bidirectional_attention, bidirectional_attention_varlen, block_diffusion_attention


@dataclass(frozen=True, slots=True)
class ModelOutput:
    logits: Tensor  # [B, L, V]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, the statistics in fp32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast a query is bf16 and the weight fp32; PyTorch's fused kernel wants one dtype.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


@dataclass(slots=True)
class Positions:
    """What attention needs to know of where the tokens are: the rotary tables, and who may see whom."""

    cos: Tensor  # [B, L, 1, numbers turned]
    sin: Tensor
    key_mask: Tensor | None = None  # [B, L] bool, True where a key may be attended
    cu_seqlens: Tensor | None = None  # [S + 1] int32, packed documents over the flattened positions
    max_seqlen: int = 0
    block_length: int | None = None
    queries: Tensor | None = None  # [B, Q] int64: the only positions the last layer answers for
    cache: KeyValueCache | None = None
    layer: int = 0
    groups: Sequence[Group] | None = None  # of several calls that are computed as one row
    sequence_group: ProcessGroup | None = None  # of processes that have the other positions of these rows
    two_copies: bool = False  # a noisy and a clean one, for training by block diffusion
    visible: Sequence[Tensor] | None = None  # [n, n] bool for each document of n tokens: which keys a query sees


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first numbers of each head of x [B, L, H, E], as many as cos and sin have, in the
    half-rotation layout (arXiv:2104.09864)."""
    turned, kept = x.tensor_split([cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


class Attention(nn.Module):
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

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        """x [B, L, D] -> [B, L, D], or [B, Q, D] for the positions `at.queries`."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), at.cos, at.sin)
        v = self.v_proj(x).view(heads)
        cos, sin = at.cos, at.sin
        if at.queries is not None:
            x = gather_positions(x, at.queries)
            cos, sin = (gather_positions(table.squeeze(2), at.queries).unsqueeze(2) for table in (cos, sin))
        q = rotate(self.q_norm(self.q_proj(x).view(*x.shape[:-1], -1, self.head_dim)), cos, sin)
        if at.groups is None:
            out = attend(q, k, v, at)
        else:
            out, last = torch.empty_like(q), at.queries is not None
            for group in at.groups:
                asked = group.queries if last else group.positions
                own = Positions(at.cos, at.sin, group.key_mask, layer=at.layer, cache=group.cache,
                                block_length=None if last else group.block_length)
                asked.put(out[0], attend(asked.take(q[0]), *(group.positions.take(x[0]) for x in (k, v)), own))
        return self.o_proj(out.reshape(*x.shape[:-1], -1))


def attend(q: Tensor, k: Tensor, v: Tensor, at: Positions) -> Tensor:
    """q [B, Q, H, E], k and v [B, L, Hkv, E] of the positions that are computed -> [B, Q, H, E]."""
    if at.visible is not None:
        return attend_visible(q, k, v, at)
    if at.two_copies:
        return block_diffusion_attention(q, k, v, at.block_length, cu_seqlens=at.cu_seqlens)
    if at.cache is not None:
        k, v = at.cache.put(at.layer, k, v)
    if at.sequence_group is not None:
        q, k, v = (positions_to_heads(x, at.sequence_group) for x in (q, k, v))
    if at.cu_seqlens is not None:
        out = bidirectional_attention_varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), at.cu_seqlens,
                                             at.max_seqlen, block_length=at.block_length)
        out = out.view(q.shape)
        return out if at.sequence_group is None else heads_to_positions(out, at.sequence_group)
    return bidirectional_attention(q, k, v, key_mask=at.key_mask, block_length=at.block_length,
                                   cache_rows=None if at.cache is None else at.cache.rows)


@torch.compiler.disable  # it would be compiled again for every list of lengths
def attend_visible(q: Tensor, k: Tensor, v: Tensor, at: Positions) -> Tensor:
    """`attend` in which each query sees the keys that `at.visible` says, one document after the other.

    PyTorch's attention with a mask: it has no fast kernel, and the masks take n * n bytes for a document of n tokens.
    """
    copies = q.shape[2] // k.shape[2]
    lengths = [len(mask) for mask in at.visible]
    q, k, v = (x.flatten(0, 1).transpose(0, 1).unsqueeze(0).split(lengths, dim=2)
               for x in (q, k.repeat_interleave(copies, dim=2), v.repeat_interleave(copies, dim=2)))
    out = [F.scaled_dot_product_attention(*parts, attn_mask=mask)
           for *parts, mask in zip(q, k, v, at.visible, strict=True)]
    return torch.cat(out, dim=2)[0].transpose(0, 1).reshape(*at.cos.shape[:2], -1, out[0].shape[-1])


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        D, M = config.hidden_size, width
        self.gate_proj = nn.Linear(D, M, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, M, bias=config.mlp_bias)
        self.down_proj = nn.Linear(M, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Which experts a token goes to, and their weights; all in fp32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        bias = torch.zeros(config.num_experts) if config.router_bias else None
        self.register_buffer("expert_bias", bias)  # set by balancing, not by gradients

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] -> weights [N, k] fp32 and experts [N, k] int64.

        softmax: the k largest probabilities, with the bias in them, are the weights (OLMoE's form). sigmoid: the bias
        takes part in choosing alone, groups of experts are chosen first by their two best (DeepSeek-V3's form).
        """
        config, bias = self.config, self.expert_bias
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        if config.router_score == "softmax":
            scores = logits.softmax(-1)
            scores = scores if bias is None else scores + bias
            choice = scores
        else:
            scores = logits.sigmoid()
            choice = scores if bias is None else scores + bias
        if config.n_group > 1:
            groups = choice.unflatten(-1, (config.n_group, -1))
            best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
            choice = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        experts = choice.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, experts


class Experts(nn.Module):
    """The SwiGLUs of all experts, each projection one tensor [experts, out, in]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        n, D, M = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj, self.up_proj = (nn.Parameter(torch.empty(n, M, D)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.empty(n, D, M))
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [rows, D] sorted by expert; ends [experts] int32, where each one's rows end."""
        gate, up, down = (weight.transpose(1, 2).to(x.dtype) for weight in
                          (self.gate_proj, self.up_proj, self.down_proj))
        inner = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
        return F.grouped_mm(inner, down, offs=ends)


class MixtureOfExperts(nn.Module):
    """Each token goes to a few experts (arXiv:1701.06538), and to those that all tokens share.

    The rows are sorted by expert, so that each projection of all experts is one grouped product.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = FeedForward(config, config.moe_intermediate_size * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, experts = self.gate(rows)
        order = experts.flatten().argsort(stable=True)
        ends = torch.bincount(experts.flatten(), minlength=len(self.gate.weight)).cumsum(0).int()
        outputs = self.experts(rows[order // experts.shape[1]], ends)[order.argsort()].unflatten(0, experts.shape)
        out = (outputs * weights.unsqueeze(-1).to(outputs.dtype)).sum(1).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.self_attn = Attention(config)
        experts = config.has_experts(index)
        self.mlp = MixtureOfExperts(config) if experts else FeedForward(config, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), at)
        x = (x if at.queries is None else gather_positions(x, at.queries)) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything but the head, under the name `model` that the published parameter names begin with."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DiffusionLM(nn.Module):
    """A masked diffusion language model: one bidirectional Transformer, driven by `ModelConfig`.

    `DiffusionLM(config)` is randomly initialised (normal, standard deviation `initializer_range`; biases zero, norms
    one) from torch's global generator; `from_pretrained` loads a published or a trained one.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mask_token_id = config.mask_token_id  # or, after from_pretrained, the one the folder's tokenizer names
        self.generation_defaults: dict | None = None  # generation_config.json, kept for saving
        self.checkpointing = False  # while training: compute activations inside layers again, instead of keeping them
        self.sequence_group: ProcessGroup | None = None  # see `Positions`; input_ids is then packed, position_ids given
        self.graphs = None  # of sampling with cuda_graphs (graphs.py)
        self._frequencies: Tensor | None = None  # of the rotary embedding, where the model is
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D], the matrix that turns hidden states into logits (the embedding itself where they are tied)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

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

        Args and errors: as `hidden_states`.
        """
        hidden = self.hidden_states(input_ids, attention_mask=attention_mask)
        return ModelOutput(F.linear(hidden, self.head_weight))

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None = None,
                      position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None,
                      max_seqlen: int | None = None, block_length: int | None = None,
                      queries: Tensor | None = None, cache: KeyValueCache | None = None,
                      levels: list[Tensor] | None = None, visible: Sequence[Tensor] | None = None,
                      clean_ids: Tensor | None = None) -> Tensor:
        """The hidden states after the final norm, [B, L, D].

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, L] bool or int, nonzero where there is a token; padding may be on either side, is never
                attended, and takes no position: a padded row gives what it gives alone.
            position_ids: [B, L] int64 for the rotary embedding; by default the tokens are numbered from 0.
            cu_seqlens: [S + 1] int32, the ends of packed documents in the B * L flattened positions, beginning with 0;
                no attention across documents, positions restart at 0 in each. Excludes attention_mask.
            max_seqlen: tokens of the longest document; must come with cu_seqlens (reading it there would stall a GPU).
            block_length: block-causal attention (see `bidirectional_attention`); 1 is causal.
            queries: [B, Q] int64, the positions whose hidden states are wanted; the others are not computed in the
                last layer, and the result is [B, Q, D]. Excludes cu_seqlens; with block_length they are of the last
                block.
            cache: holds the positions beside these, and gets these too; if it grows, whole blocks, with block_length.
                With it attention_mask is of all positions. Excludes cu_seqlens.
            levels: gets the embeddings, what each layer but the last gives, and the result, [B, L, D] each. Excludes
                queries.
            visible: for each document (each row, without cu_seqlens), which keys its queries see, [n, n] bool if it has
                n tokens. Slower than the other attentions, see `attend_visible`. Excludes attention_mask, block_length,
                queries and cache.
            clean_ids: [B, L] int64, the text whose noisy copy input_ids is, for training by block diffusion with blocks
                of block_length (`block_diffusion_attention`). With shifted logits, what is said about the first token
                of a block is that of the clean position before it, as in sampling. Excludes all but cu_seqlens.
        Raises: UserError if the input is longer than the model's positions; ValueError if arguments exclude each other.
        """
        if input_ids.ndim != 2:
            raise UserError(f"the model takes input_ids [B, L], not {list(input_ids.shape)}; add a batch dimension")
        before = 0 if cache is None else cache.start
        length = before + input_ids.shape[1] if cu_seqlens is None else max_seqlen
        if length is None:
            raise ValueError("hidden_states: cu_seqlens needs max_seqlen, the length of the longest document")
        if length > self.config.max_position_embeddings:
            raise UserError(f"the input has {length} positions, the model {self.config.max_position_embeddings}; "
                            "shorten it")
        if cu_seqlens is not None and (attention_mask is not None or queries is not None):
            raise ValueError("hidden_states: cu_seqlens excludes attention_mask and queries")
        if visible is not None and any(given is not None for given in (attention_mask, block_length, queries, cache)):
            raise ValueError("hidden_states: visible excludes attention_mask, block_length, queries and cache")
        if cache is not None and (cu_seqlens is not None or cache.grows != (block_length is not None)):
            raise ValueError("hidden_states: cache excludes cu_seqlens; if it grows, it needs block_length, else not")
        if clean_ids is not None and (block_length is None or any(
                given is not None for given in (attention_mask, position_ids, queries, cache, levels, visible))):
            raise ValueError("hidden_states: clean_ids needs block_length and excludes all but cu_seqlens")
        key_mask = None
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape and cache is None:
                raise UserError(f"attention_mask has shape {list(attention_mask.shape)}, input_ids "
                                f"{list(input_ids.shape)}; they must be the same")
            key_mask = attention_mask.bool()
        if position_ids is None:
            position_ids = before + number_tokens(input_ids, None if cache else key_mask, cu_seqlens)
        if clean_ids is not None:
            before_a_block = (position_ids + 1) % block_length == 0
            input_ids, position_ids = torch.cat((input_ids, clean_ids), 1), position_ids.repeat(1, 2)
        x = self.model.embed_tokens(input_ids)
        cos, sin = self._rotary(position_ids, x.dtype)
        at = Positions(cos, sin, key_mask, cu_seqlens, max_seqlen or 0, block_length, cache=cache,
                       sequence_group=self.sequence_group, visible=visible,
                       two_copies=clean_ids is not None)
        for at.layer, layer in enumerate(self.model.layers):
            if at.layer == len(self.model.layers) - 1 and queries is not None:
                at.queries, at.block_length = queries, None  # of the last block, they see all
            if levels is not None:
                levels.append(x)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, at, use_reentrant=False)
            else:
                x = layer(x, at)
        if clean_ids is not None:
            x, clean = x.chunk(2, dim=1)
            if self.config.shift_logits:
                x = torch.where(before_a_block.unsqueeze(-1), clean, x)
        x = self.model.norm(x)
        if levels is not None:
            levels.append(x)
        return x

    def hidden_states_together(self, calls: Sequence[dict]) -> list[Tensor]:
        """What `hidden_states(**call)` gives for each call, in one pass over the weights.

        Everything but attention is computed on the tokens of all calls, one after the other, and on no padding.

        calls: keyword arguments of `hidden_states`, each with position_ids and queries and without cu_seqlens.
        """
        arranged = arrange(calls)
        x = self.model.embed_tokens(arranged.tokens.unsqueeze(0))
        cos, sin = self._rotary(arranged.position_ids.unsqueeze(0), x.dtype)
        at = Positions(cos, sin, groups=arranged.groups)
        for at.layer, layer in enumerate(self.model.layers):
            if at.layer == len(self.model.layers) - 1:
                at.queries = arranged.queries.unsqueeze(0)
            x = layer(x, at)
        shapes = [call["queries"].shape for call in calls]
        parts = self.model.norm(x)[0].split([rows * count for rows, count in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, L, 1, rotary_dim] of the positions, computed in fp32."""
        if self._frequencies is None or self._frequencies.device != position_ids.device:
            self._frequencies = rotary_frequencies(self.config).to(position_ids.device)
        angles = position_ids.float().unsqueeze(-1) * self._frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def diffusion_generate(self, inputs: Tensor, attention_mask: Tensor | None = None, generation_config=None):
        """Append `max_new_tokens` masked positions to each prompt and denoise them; see `dllm.sampler.generate`."""
        from dllm.sampler import generate

        return generate(self, inputs, attention_mask, generation_config)

    def diffusion_steps(self, inputs: Tensor, attention_mask: Tensor | None = None, generation_config=None):
        """`diffusion_generate` one denoising step at a time: `for step in model.diffusion_steps(ids)`; see
        `dllm.sampler.start`."""
        from dllm.sampler import start

        return start(self, inputs, attention_mask, generation_config)

    def infill(self, prefix_ids: Tensor, suffix_ids: Tensor, *, length: int | str, generation_config=None):
        """Denoise `length` masked positions between a prefix and a suffix; see `dllm.sampler.infill`."""
        from dllm.sampler import infill

        return infill(self, prefix_ids, suffix_ids, length=length, generation_config=generation_config)

    def perplexity_bound(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings):
        """Bound the negative log-likelihood of sequences, with its standard error; see
        `dllm.evaluators.bound_likelihood`."""
        from dllm.evaluators import bound_likelihood

        return bound_likelihood(self, input_ids, attention_mask, **settings)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike, dtype: torch.dtype = torch.float32,
                        device: str | torch.device = "cpu") -> "DiffusionLM":
        """Load a Hugging Face model folder or hub repository of any family in `dllm.families`, in evaluation mode.

        Raises: UserError naming the file and the remedy: no such folder or repository, an unknown family or
            configuration key, missing or unknown parameters, wrong shapes, a truncated or corrupt file.
        """
        folder = find_model(path_or_hub_id)
        config = read_config(read_json(folder / "config.json"), where=str(folder / "config.json"))
        state = read_weights(folder)
        if config.family == "llada2_moe" and not any(name.endswith("query_layernorm.weight") for name in state):
            config = replace(config, qk_norm=False)
        with torch.device("meta"):
            model = cls(config)
        if model.lm_head is None:
            for name in ("lm_head.weight", "model.transformer.ff_out.weight"):
                state.pop(name, None)  # some writers store the tied matrix twice
        state = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
        expected = to_published(config, model.state_dict())
        check_parameters({name: tensor.shape for name, tensor in expected.items()},
                         {name: tensor.shape for name, tensor in state.items()}, where=str(folder))
        state = {name: tensor.to(device, torch.float32 if name.endswith("expert_bias") else dtype)
                 for name, tensor in to_ours(config, state).items()}
        model.load_state_dict(state, assign=True)
        if model.mask_token_id is None:
            model.mask_token_id = mask_token_id_of(folder)
        if (folder / "generation_config.json").exists():
            model.generation_defaults = read_json(folder / "generation_config.json")
        return model.requires_grad_(True).eval()

    def save_pretrained(self, folder: str | os.PathLike, state: Mapping[str, Tensor] | None = None) -> None:
        """Write config.json, model.safetensors (5 GB shards) and, if it was loaded, generation_config.json.

        Transformers and the original project load the folder. Each file is written beside its place and renamed into
        it; config.json comes last, so a folder with one is whole.

        Args:
            state: the weights by their names here, in the place of the model's own; an empty one writes none.
        Raises: Failure if the disk is full or the folder cannot be written.
        """
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save

        from dllm.checkpoint import write_atomically

        folder = Path(folder)
        config = _dump(write_config(self.config, str(self.dtype).removeprefix("torch.")))
        state = self.state_dict() if state is None else state
        state = to_published(self.config, state) if state else {}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        shards = split_torch_state_dict_into_shards(state, max_shard_size="5GB")
        for file, names in shards.filename_to_tensors.items():
            write_atomically(folder / file, save({name: state[name] for name in names}, metadata={"format": "pt"}))
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_atomically(folder / "model.safetensors.index.json", _dump(index))
        if self.generation_defaults is not None:
            write_atomically(folder / "generation_config.json", _dump(self.generation_defaults))
        write_atomically(folder / "config.json", config)


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, L, D] at positions [B, Q] -> [B, Q, D]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def number_tokens(input_ids: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Positions [B, L] counted from 0: along each row, skipping padding, or within each packed document."""
    if key_mask is not None:
        return (key_mask.long().cumsum(1) - 1).clamp_(min=0)
    places = torch.arange(input_ids.numel(), device=input_ids.device)
    if cu_seqlens is None:
        return places[: input_ids.shape[1]].expand(input_ids.shape)
    document = torch.searchsorted(cu_seqlens[1:].long(), places, right=True)
    return (places - cu_seqlens.long()[document]).view(input_ids.shape)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotary pair, fp32 [rotary_dim / 2]; long wavelengths rescaled as by Llama 3, if so
    configured."""
    exponents = torch.arange(0, config.rotary_dim, 2, device="cpu").float() / config.rotary_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Wavelengths above the first bound are stretched by `factor`, those below the second are kept, between: blended.
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    blend = blend.clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling["factor"])


def load_with_tokenizer(path_or_hub_id: str | os.PathLike, device: str = "auto", dtype: str = "auto"):
    """A model for use, and its tokenizer.

    Args:
        device: cpu, cuda, cuda:N, or auto: the GPU if there is one.
        dtype: float32, bfloat16, float16, or auto: bfloat16 on a GPU, else float32.
    Raises: UserError if they cannot be loaded, do not fit each other, or there is no such device.
    """
    from dllm.tokenizer import check_vocabulary, load_tokenizer

    if device != "auto" and device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, not {device!r}")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be auto, float32, bfloat16 or float16, not {dtype!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device is {device}, but this torch sees no GPU; leave it out, or install a CUDA build of "
                        "torch")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    model = DiffusionLM.from_pretrained(path_or_hub_id, dtype=getattr(torch, dtype), device=device)
    tokenizer = load_tokenizer(path_or_hub_id, model.mask_token_id)
    check_vocabulary(tokenizer, model.config.vocab_size)
    return model, tokenizer


def find_model(path_or_hub_id: str | os.PathLike) -> Path:
    """The local folder of a model, downloaded from the hub if it is not one already.

    Raises: UserError if there is no such folder and no such repository can be reached.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is not a folder; give a model folder, or a hub repository as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the hub client raises a dozen kinds; each means: not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} is neither a folder here nor a hub repository that can be reached "
                        f"({reason})") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = ["model.safetensors"]
    if not (folder / files[0]).exists():
        index = read_json(folder / "model.safetensors.index.json", missing={})
        files = sorted(set(index.get("weight_map", {}).values())) or files
    state = {}
    for file in files:
        try:
            state |= load_file(folder / file)
        except FileNotFoundError:
            raise UserError(f"{folder / file} does not exist; a model folder holds config.json and "
                            "model.safetensors") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file} is truncated or corrupt ({error}); fetch or save it again") from None
    return state


def _dump(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
