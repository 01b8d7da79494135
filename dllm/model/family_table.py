"""The families of published models, as data: how the config.json and the parameter names of each map to ours, and back.

Which configuration keys shape the model, which may be ignored, which are only supported at one value, and what the
parameters are called where that is not the Llama line's `model.layers.0.self_attn.q_proj.weight`, as ours are. What has
to be done to the tensors is in weights.py. Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model_type is read and written."""

    architecture: str  # the class name that Transformers looks up
    keys: Mapping[str, str]  # config.json key -> ModelConfig field
    fixed: Mapping[str, object]  # ModelConfig fields that this model_type implies
    only: Mapping[str, tuple]  # config.json keys supported at these values alone
    ignored: frozenset[str] = frozenset()  # further keys that do not change what a forward pass computes
    model_type: str = ""  # in config.json, where it is not the family's own name
    parameters: Mapping[str, str] = field(default_factory=dict)  # published name -> ours, {i} for the layer
    longer_blocks: int = 0  # tokens that block_length counts and the file's own key for it does not
    required: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads")

    @property
    def known(self) -> set[str]:
        """Keys of config.json that are read, or known to change nothing."""
        return {*self.keys, *self.only, *self.ignored}


# A block_size, as SDAR calls it, says that the model is block-causal; causal_blocks is a key of ours.
_COMMON = {"block_size": "block_length", **{name: name for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings",
    "initializer_range", "shift_logits", "causal_blocks", "edit_heads", "uniform_share", "self_conditioning",
    "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")}}
_ONLY = {"hidden_act": ("silu",)}
# Those of them that a model borrowed from Transformers takes; it reads the rest of its config.json itself.
BORROWED = {key: _COMMON[key] for key in (
    "vocab_size", "tie_word_embeddings", "shift_logits", "block_size", "causal_blocks", "edit_heads", "uniform_share",
    "self_conditioning", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")}
# The mixture of Qwen3-MoE, in every layer: softmax over all experts, then the k largest, whose weights sum to 1.
_QWEN3_MOE = Family(
    architecture="", fixed={"qk_norm": True},
    keys={**_COMMON, **{name: name for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size",
                                                "norm_topk_prob")}},
    required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts",
              "num_experts_per_tok", "moe_intermediate_size"),
    only={**_ONLY, "attention_bias": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)})

TRANSFORMERS = ("qwen2", "qwen3", "llama", "mistral")  # families of autoregressive models that it has itself
WINDOWED = ("qwen2", "qwen3", "mistral")  # of these, those with sliding windows, which adapting them opens

# Other names that checkpoints give the same architecture.
MODEL_TYPES = {"lladamoe": "llada_moe", "llada21_moe": "llada2_moe", "llada2_moe_veomni": "llada2_moe",
               "dream": "Dream", "FastdLLMV2": "Fast_dLLM_Qwen"}

# Models that are told apart from those above by their names alone, and why they are not loaded.
REFUSED = {
    "wedlm": "moves known tokens in front of the masks before its causal attention, which is not computed here; use "
             "WeDLM's own engine, or a model of SDAR",
    "gfusion": "has multi-head latent attention (MLA), which is not computed here; choose another model, such as "
               "LLaDA2's mixtures"}

# Stable-DiffCoder's shape, where config.json names no class of its own. Seed-Coder's, the autoregressive model that it
# comes from, differs in its 32,768 and 65,536 positions.
STABLE_DIFFCODER = {"model_type": "llama", "vocab_size": 155136, "hidden_size": 4096, "num_hidden_layers": 32,
                    "max_position_embeddings": 8192}

_BASES: Mapping[str, Family] = {
    "qwen2": Family(architecture="Qwen2ForCausalLM", keys=_COMMON, fixed={"qkv_bias": True}, only=_ONLY),
    "qwen3": Family(architecture="Qwen3ForCausalLM", keys=_COMMON, fixed={"qk_norm": True},
                    only={**_ONLY, "attention_bias": (False,)}),
    "llama": Family(architecture="LlamaForCausalLM", fixed={}, only=_ONLY,
                    keys={**_COMMON, "mlp_bias": "mlp_bias", "attention_bias": "qkv_bias"}),
    "mistral": Family(architecture="MistralForCausalLM", keys=_COMMON, fixed={}, only=_ONLY),
    # Stable-DiffCoder, which calls itself llama: blocks of 4 without a shift, and a tokenizer that names the mask, 5.
    # Facts: Diffulex, model/config/stable_diffcoder; its generation's arguments.
    "stable_diffcoder": Family(architecture="StableDiffcoderForCausalLM", model_type="llama", only=_ONLY,
                               keys={**_COMMON, "mlp_bias": "mlp_bias", "attention_bias": "qkv_bias"},
                               fixed={"shift_logits": False, "block_causal": True, "block_length": 4}),
    # Dream, Dream-Coder, DiffuCoder, DreamOn (arXiv:2508.15487)
    "Dream": Family(architecture="DreamModel", keys=_COMMON, fixed={"qkv_bias": True}, only=_ONLY),
    # Autoregressive models trained on as diffusion models, without the shift
    "a2d-qwen2": Family(architecture="A2DQwen2LMHeadModel", keys=_COMMON, only=_ONLY,
                        fixed={"qkv_bias": True, "shift_logits": False}),
    "a2d-qwen3": Family(architecture="A2DQwen3LMHeadModel", keys=_COMMON, only={**_ONLY, "attention_bias": (False,)},
                        fixed={"qk_norm": True, "shift_logits": False}),
    # SDAR (arXiv:2510.06303), and TraDo (arXiv:2509.06949), which is trained from it
    "sdar": Family(architecture="SDARForCausalLM", keys=_COMMON, only={**_ONLY, "attention_bias": (False,)},
                   fixed={"qk_norm": True, "shift_logits": False, "block_causal": True, "block_length": 4}),
    # SDAR's mixtures of experts, in Qwen3-MoE's layout. Facts: SGLang, models/sdar_moe.py.
    "sdar_moe": replace(_QWEN3_MOE, architecture="SDARMoeForCausalLM", fixed={
        "qk_norm": True, "shift_logits": False, "block_causal": True, "block_length": 4}),
    # I-DLM (arXiv:2604.11035), which calls itself sdar too: use_regular_causal, a key of its configuration class, tells
    # them apart. Strictly causal and shifted. block_size counts masks, and one token more is decoded with them, the
    # first, from the last known token. Facts: its training/README.md; NeMo Automodel, docs/guides/dllm/finetune.mdx.
    "idlm": Family(architecture="SDARForCausalLM", model_type="sdar", keys=_COMMON, longer_blocks=1,
                   only={"use_regular_causal": (True,), **_ONLY, "attention_bias": (False,)},
                   fixed={"qk_norm": True, "block_causal": True, "causal_blocks": True, "block_length": 4}),
    # Fast-dLLM v2 (arXiv:2509.26328): Qwen2.5 in blocks of 32 (bd_size), shifted, each filled in parts of 8, which is
    # an argument of its generation and not in config.json. Facts: its modeling.py, and the 1.5B model's configuration.
    "Fast_dLLM_Qwen": Family(
        architecture="Fast_dLLM_QwenForCausalLM", only=_ONLY,
        keys={**{key: target for key, target in _COMMON.items() if target != "block_length"},
              "bd_size": "block_length", "small_block_size": "sub_block_length"},
        fixed={"qkv_bias": True, "block_causal": True, "block_length": 32, "sub_block_length": 8}),
    # RND1 (Qwen3-30B-A3B trained on): full attention, shifted, as sampling.py of RadicalNumerics/RND1 has it
    "rnd1": replace(_QWEN3_MOE, architecture="RND1LM", ignored=frozenset({"moe_backend", "num_diffusion_steps"})),
    # Nemotron-Labs-Diffusion: Ministral 3's layers with YaRN and Llama 4's scaling of queries. The block being filled
    # sees all of itself, and the text before it as an autoregressive model reads that. Not shifted. Facts: its
    # modeling_nemotron_labs_diffusion.py, and mlx-vlm, models/nemotron_labs_diffusion.
    "nemotron_labs_diffusion": Family(
        architecture="NemotronLabsDiffusionModel", keys=_COMMON,
        only={**_ONLY, "attention_bias": (False,), "mlp_bias": (False,),
              "dlm_paradigm": ("bidirectional", "block_diff")},
        ignored=frozenset({"dlm_loss_weight", "ar_loss_weight", "dp_varying_mask_ratio"}),
        fixed={"shift_logits": False, "block_causal": True, "causal_context": True, "block_length": 32},
        parameters={"encoder": "model", "diffusion_head": "lm_head"}),
    # LLaDA, LLaDA 1.5 (arXiv:2502.09992), and iLLaDA (arXiv:2606.25331), with fewer key heads, one matrix for embedding
    # and head, and the mask 5, which its tokenizer names
    "llada": Family(
        architecture="LLaDAModelLM", fixed={"shift_logits": False},
        keys={"vocab_size": "vocab_size", "embedding_size": "vocab_size", "d_model": "hidden_size",
              "mlp_hidden_size": "intermediate_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
              "n_kv_heads": "num_key_value_heads", "max_sequence_length": "max_position_embeddings",
              "rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps", "weight_tying": "tie_word_embeddings",
              "include_qkv_bias": "qkv_bias", "init_std": "initializer_range", "block_size": "block_length",
              "edit_heads": "edit_heads", "uniform_share": "uniform_share", "self_conditioning": "self_conditioning",
              "mask_token_id": "mask_token_id",
              "pad_token_id": "pad_token_id", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"},
        required=("vocab_size", "d_model", "mlp_hidden_size", "n_layers", "n_heads"),
        only={"block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,),
              "include_bias": (False,), "scale_logits": (False,), "input_emb_norm": (False,), "alibi": (False,),
              "attention_layer_norm": (False,), "layer_norm_with_affine": (True,), "block_group_size": (1,),
              "bias_for_layer_norm": (False, None), "multi_query_attention": (False, None)},
        ignored=frozenset("""
            alibi_bias_max attention_layer_norm_with_affine flash_attention init_cutoff_factor init_device init_fn
            mlp_ratio precision rope_full_precision""".split()),
        parameters={
            "model.transformer.wte": "model.embed_tokens", "model.transformer.ln_f": "model.norm",
            "model.transformer.ff_out": "lm_head",
            **{f"model.transformer.blocks.{{i}}.{theirs}": f"model.layers.{{i}}.{ours}" for theirs, ours in {
                "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
                "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
                "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}.items()}}),
    # LLaDA-MoE, which calls itself llada too
    "llada_moe": Family(
        architecture="LLaDAMoEModelLM", model_type="llada", fixed={"shift_logits": False, "qk_norm": True},
        keys={**{key: value for key, value in _COMMON.items() if key != "intermediate_size"},
              "dense_intermediate_size": "intermediate_size", "expert_intermediate_size": "moe_intermediate_size",
              "num_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok",
              "qk_layernorm": "qk_norm", "moe_router_enable_expert_bias": "router_bias",
              "moe_layer_freq": "first_k_dense_replace", "partial_rotary_factor": "partial_rotary_factor"},
        required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts",
                  "num_experts_per_tok", "expert_intermediate_size"),
        only={**_ONLY, "attention_bias": (False,), "clip_qkv": (None,),
              "moe_router_score_function": ("softmax",), "router_num_group": (None,), "router_topk_group": (None,),
              "shared_expert_intermediate_size": (None, 0), "routed_scaling_factor": (1, None)},
        ignored=frozenset({"norm_topk_prob"}),
        parameters={"model.layers.{i}.mlp.expert_bias": "model.layers.{i}.mlp.gate.expert_bias"}),
    # LLaDA 2 and 2.1
    "llada2_moe": Family(
        architecture="LLaDA2MoeModelLM",
        fixed={"shift_logits": False, "qk_norm": True, "block_causal": True, "router_score": "sigmoid",
               "norm_topk_prob": True},
        keys={**_COMMON, **{name: name for name in (
            "num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "n_group",
            "topk_group", "first_k_dense_replace", "routed_scaling_factor", "norm_topk_prob", "partial_rotary_factor")},
            "use_qkv_bias": "qkv_bias", "moe_router_enable_expert_bias": "router_bias"},
        required=("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        only={**_ONLY, "score_function": ("sigmoid",), "use_bias": (False,), "use_rmsnorm": (True,),
              "norm_head": (False,), "norm_softmax": (False,), "using_split_qkv_in_self_attention": (False,)},
        # The published configurations contradict each other on use_qk_norm: whether the norms are there decides.
        ignored=frozenset({"rotary_dim", "router_dtype", "use_qk_norm", "moe_shared_expert_intermediate_size"}),
        parameters={
            "model.word_embeddings": "model.embed_tokens",
            **{f"model.layers.{{i}}.attention.{theirs}": f"model.layers.{{i}}.self_attn.{ours}" for theirs, ours in {
                "query_key_value": "qkv_proj", "dense": "o_proj", "query_layernorm": "q_norm",
                "key_layernorm": "k_norm"}.items()}}),
}


def _with_edit_heads(family: Family, architecture: str) -> Family:
    """The published Edit Flow of a family: the substitution head is our head, and never tied; the base's own head is
    not there or not used."""
    tied = {"tie_word_embeddings", "weight_tying"}
    names = {theirs: ours for theirs, ours in family.parameters.items() if ours != "lm_head"}
    return replace(family, architecture=architecture, model_type="",
                   keys={key: value for key, value in family.keys.items() if key not in tied},
                   fixed={**family.fixed, "edit_heads": "all"}, ignored=family.ignored | tied,
                   parameters={**names, "sub_logits": "lm_head", "ins_logits": "insert_head",
                               "rate_heads.0": "rate_head"})


EDIT_FAMILIES: Mapping[str, Family] = {
    f"editflow-{name}": _with_edit_heads(_BASES[base], f"EditFlow{called}Model") for name, base, called in (
        ("qwen2", "a2d-qwen2", "Qwen2"), ("qwen3", "a2d-qwen3", "Qwen3"), ("dream", "Dream", "Dream"),
        ("llada", "llada", "LLaDA"))}
FAMILIES: Mapping[str, Family] = {**_BASES, **EDIT_FAMILIES}
