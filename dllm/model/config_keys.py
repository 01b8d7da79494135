"""Keys of a config.json that change nothing in the computation, and keys that ask for what is not computed here."""

import re
from collections.abc import Collection, Mapping

from dllm.errors import UserError
from dllm.model.family_table import WINDOWED

# Keys that do not change what a forward pass computes: serialised by Transformers 4 and 5, by training tools and hubs.
# Dropouts are among them, because they act in training alone.
IGNORED = frozenset("""
    architectures model_type torch_dtype dtype transformers_version use_cache auto_map name_or_path _name_or_path
    _commit_hash layer_types max_window_layers sliding_window pretraining_tp _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled use_flash_attention use_flash_attn
    _experts_implementation return_dict use_return_dict output_attentions output_hidden_states is_encoder_decoder
    gradient_checkpointing id2label label2id num_labels problem_type chunk_size_feed_forward torchscript use_bfloat16
    unsloth_version unsloth_fixed cross_attention_hidden_size add_cross_attention is_decoder is_causal
    tie_encoder_decoder pruned_heads finetuning_task task_specific_params tf_legacy_loss tokenizer_class prefix
    sep_token_id decoder_start_token_id max_length min_length max_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty cache_implementation is_llama_config transformers.js_config
    model_max_length seq_length max_seq_len max_sequence_length initializer_factor router_aux_loss_coef
    output_router_logits fuse_cross_entropy ep_size debug micro_forward skip_checkpoint base_model_name_or_path
""".split())
DROPOUT = re.compile(r".*(dropout|dropout_rate|_pdrop|dropout_prob|drop_path)")

# Keys by which other models compute something else, and the values at which they do not (beside null, false and empty).
CHANGING: Mapping[str, tuple] = {name: () for name in """
    quantization_config quantization compression_config attention_multiplier query_pre_attn_scalar attn_scale
    final_logit_softcapping attn_logit_softcapping logits_soft_cap clip_qkv alibi use_alibi attention_chunk_size
    no_rope_layers no_rope_layer_interval rope_interleaved rope_local_base_freq use_mrope qk_norm use_qk_norm
    qk_layernorm attn_output_gate add_swa_attention_sink_bias parallel_attn use_parallel_residual use_post_norm
    altup_num_inputs q_lora_rank kv_lora_rank cross_attention_layers nope_layer_interval scale_logits use_relay
""".split()} | {name: (1,) for name in """
    partial_rotary_factor rotary_pct logit_scale logits_scaling embedding_multiplier embedding_scale scale_emb
    residual_multiplier residual_scale scale_depth lm_head_multiplier
""".split()}

# What to do about some of them.
_REMEDIES = {
    **dict.fromkeys(("quantization_config", "quantization", "compression_config"),
                    "take the checkpoint that it was quantised from"),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"),
                    "multi-head latent attention (MLA) is not computed here, so choose another model"),
}

# Of sliding windows; `find_window` reads them.
WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers")


def check_values(name: str, only: Mapping[str, tuple], known: Collection[str], raw: Mapping, where: str) -> None:
    """Refuse what would change the computation and is not computed here.

    Args:
        name: of the family. only: its keys that are supported at some values alone. known: all keys that it knows.
        raw: config.json, with flat rotary settings.
    Raises: UserError naming `where`, the key and what is supported, or what to do.
    """
    for key, value in raw.items():
        if key in only and value is not None and value not in only[key]:
            raise UserError(f"{where}: {key} {value!r} is not supported for {name}; "
                            f"supported: {', '.join(map(repr, only[key]))}")
        if key in CHANGING and key not in known and not is_empty(value) and value not in CHANGING[key]:
            accepted = ", ".join(map(repr, (None, *CHANGING[key])))
            raise UserError(f"{where}: {key} {value!r} is not supported for {name}; "
                            f"{_REMEDIES.get(key, f'supported: {accepted}')}")
    kinds = raw.get("layer_types") or []
    if other := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise UserError(f"{where}: layer_types {other[0]!r} is not supported; supported: 'full_attention'")
    if name not in WINDOWED and (window := find_window(name, raw)) is not None:
        raise UserError(f"{where}: sliding_window {window} is not supported, because every position sees every other "
                        "here; set max_position_embeddings to at most the window, and it changes nothing")


def find_window(name: str, raw: Mapping) -> int | None:
    """The sliding window of some layers of a model of the family `name`, where a text can be longer."""
    kinds = raw.get("layer_types") or []
    window, positions = raw.get("sliding_window"), raw.get("max_position_embeddings")
    if kinds:
        slides = "sliding_attention" in kinds
    elif name in ("mistral", "nemotron_labs_diffusion"):
        slides = not is_empty(window)
    else:
        slides = bool(raw.get("use_sliding_window")) and (raw.get("max_window_layers") or 0) < raw["num_hidden_layers"]
    return window if slides and window is not None and (positions is None or positions > window) else None


def is_empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)
