"""Tiny models in folders laid out as the published ones are: their file names, and the keys of their JSON files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dllm.diffusion_lm import DiffusionLM
from dllm.model.families import read_config
from dllm.model.tokenizer import train_tokenizer
from dllm.model.weights import to_published

TEXTS = ["def add(x, y):\n    return x + y\n\nfor i in range(10):\n    print(i)  # it's 1234\n" * 9]
RAN = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\nraise RuntimeError('code of the folder ran')\n"

_LLAMA_LINE = {"hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
               "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "torch_dtype": "bfloat16",
               "attention_dropout": 0.0}
_QWEN = {**_LLAMA_LINE, "max_window_layers": 28, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
         "use_sliding_window": False}
_END = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False}

# name -> (config.json, where strings such as "<|mask|>" stand for the ids of these tokens; generation_config.json;
#          tokenizer_config.json; special tokens; the tokenizer's files; Python files)
FOLDERS = {
    "qwen2.5": (
        {**_QWEN, "architectures": ["Qwen2ForCausalLM"], "bos_token_id": "<|endoftext|>",
         "eos_token_id": "<|endoftext|>", "max_position_embeddings": 32768, "max_window_layers": 24,
         "model_type": "qwen2", "sliding_window": 32768, "tie_word_embeddings": True,
         "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False},
        {"bos_token_id": "<|endoftext|>", "do_sample": False, "eos_token_id": "<|endoftext|>", "max_new_tokens": 20,
         "transformers_version": "4.37.0"},
        {**_END, "add_prefix_space": False, "bos_token": None, "errors": "replace", "model_max_length": 32768,
         "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("tokenizer.json", "vocab.json", "merges.txt"), ()),
    "dream": (
        {**_QWEN, "architectures": ["DreamModel"], "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
         "bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>", "mask_token_id": "<|mask|>",
         "max_position_embeddings": 131072, "model_type": "Dream", "pad_token_id": "<|endoftext|>",
         "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": False, "transformers_version": "4.46.2",
         "use_cache": True},
        {"_from_model_config": True, "bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>",
         "pad_token_id": "<|endoftext|>", "transformers_version": "4.46.2"},
        {**_END, "add_bos_token": False, "add_prefix_space": False, "bos_token": "<|beginoftext|>",
         "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}, "errors": "replace",
         "mask_token": "<|mask|>", "model_max_length": 131072, "split_special_tokens": False,
         "tokenizer_class": "DreamTokenizer", "unk_token": None},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
        ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
        ("configuration_dream.py", "generation_utils.py", "modeling_dream.py", "tokenization_dream.py")),
    "llada": (
        {"activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
         "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
         "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM",
                      "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
         "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
         "embedding_dropout": 0.0, "embedding_size": ..., "eos_token_id": "<|endoftext|>", "flash_attention": False,
         "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
         "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
         "layer_norm_with_affine": True, "mask_token_id": "<|mdm_mask|>", "max_sequence_length": 4096,
         "mlp_hidden_size": 48, "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 4,
         "n_kv_heads": 4, "n_layers": 2, "pad_token_id": "<|endoftext|>", "precision": "amp_bf16",
         "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True,
         "rope_theta": 500000.0, "scale_logits": False, "transformers_version": "4.46.3", "use_cache": False,
         "weight_tying": False},
        {"_from_model_config": True, "eos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>",
         "transformers_version": "4.46.3"},
        {**_END, "add_bos_token": False, "add_eos_token": False, "bos_token": "<|startoftext|>", "cls_token": "[CLS]",
         "fast_tokenizer": True, "gmask_token": "[gMASK]", "merges_file": None, "trust_remote_code": True,
         "model_max_length": 1000000000000000019884624838656, "tokenizer_class": "PreTrainedTokenizerFast"},
        ("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>", "<|eot_id|>"),
        ("tokenizer.json", "special_tokens_map.json"), ("configuration_llada.py", "modeling_llada.py")),
    "sdar": (
        {**_QWEN, "architectures": ["SDARForCausalLM"], "attention_bias": False, "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
         "bos_token_id": "<|endoftext|>", "debug": False, "eos_token_id": "<|im_end|>", "ep_size": 1,
         "fuse_cross_entropy": True, "head_dim": 16, "max_position_embeddings": 32768, "micro_forward": False,
         "model_type": "sdar", "rope_scaling": None, "skip_checkpoint": False, "sliding_window": None,
         "tie_word_embeddings": False, "transformers_version": "4.52.4", "use_cache": True},
        {"bos_token_id": "<|endoftext|>", "do_sample": True, "eos_token_id": ["<|im_end|>", "<|endoftext|>"],
         "pad_token_id": "<|endoftext|>", "temperature": 0.6, "top_k": 20, "top_p": 0.95,
         "transformers_version": "4.52.4"},
        {**_END, "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>",
         "auto_map": {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]}, "errors": "replace",
         "mask_token": "<|MASK|>", "model_max_length": 131072, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"),
        ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
        ("configuration_sdar.py", "modeling_sdar.py", "tokenization_qwen2.py")),
    "llada2-mini": (
        {**_LLAMA_LINE, "architectures": ["LLaDA2MoeModelLM"], "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
         "embedding_dropout": 0.0, "eos_token_id": "<|endoftext|>", "first_k_dense_replace": 1, "head_dim": 16,
         "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "llada2_moe",
         "moe_intermediate_size": 16, "moe_router_enable_expert_bias": True, "n_group": 2, "norm_head": False,
         "norm_softmax": False, "norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 2,
         "num_shared_experts": 1, "output_dropout": 0.0, "output_router_logits": False,
         "pad_token_id": "<|endoftext|>", "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "rope_scaling": None,
         "rope_theta": 600000, "rotary_dim": 8, "routed_scaling_factor": 2.5, "router_dtype": "fp32",
         "score_function": "sigmoid", "sliding_window": 4096, "tie_word_embeddings": False, "topk_group": 1,
         "transformers_version": "4.52.3", "use_bias": False, "use_cache": False, "use_qk_norm": True,
         "use_qkv_bias": False, "use_rmsnorm": True, "use_sliding_window": False,
         "using_split_qkv_in_self_attention": False},
        {"_from_model_config": True, "eos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>",
         "transformers_version": "4.52.3"},
        {**_END, "add_bos_token": False, "add_eos_token": False, "bos_token": "<|startoftext|>", "cls_token": "[CLS]",
         "fast_tokenizer": True, "gmask_token": "[gMASK]", "mask_token": "<|mask|>", "merges_file": None,
         "model_max_length": 1000000000000000019884624838656, "tokenizer_class": "PreTrainedTokenizerFast"},
        ("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mask|>", "<role>", "</role>"),
        ("tokenizer.json", "special_tokens_map.json"), ("configuration_llada2_moe.py", "modeling_llada2_moe.py")),
}

_QWEN_TOKENIZER = {**_END, "add_bos_token": False, "add_prefix_space": False, "bos_token": None,
                   "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 131072,
                   "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
_QWEN_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
_QWEN_IDS = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SEED_TOKENIZER = {"bos_token": "<[begin▁of▁sentence]>", "eos_token": "<[end▁of▁sentence]>",
                   "pad_token": "<[PAD▁TOKEN]>", "mask_token": "<[MASK_TOKEN]>", "clean_up_tokenization_spaces": False,
                   "model_max_length": 8192, "tokenizer_class": "PreTrainedTokenizerFast"}
_SEED_SPECIAL = ("<[begin▁of▁sentence]>", "<[PAD▁TOKEN]>", "<[end▁of▁sentence]>", "<[MASK_TOKEN]>")
_SEED_IDS = {"bos_token_id": _SEED_SPECIAL[0], "eos_token_id": _SEED_SPECIAL[2], "pad_token_id": _SEED_SPECIAL[1]}
_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 24, "norm_topk_prob": True,
            "num_experts": 8, "num_experts_per_tok": 3, "output_router_logits": False, "router_aux_loss_coef": 0.001}


def _code_of(name: str, config: str, model: str, causal: bool = True) -> dict:
    return {"AutoConfig": f"configuration_{name}.{config}", "AutoModel": f"modeling_{name}.{model}",
            **({"AutoModelForCausalLM": f"modeling_{name}.{model}"} if causal else {})}


# As FOLDERS, for the families of family_table.py whose comments say where these facts come from. Keys that any model of
# Transformers has are left out here.
NEWER = {
    "sdar-30b-a3b": (
        {**_QWEN, **_EXPERTS, **_QWEN_IDS, "architectures": ["SDARMoeForCausalLM"], "attention_bias": False,
         "auto_map": _code_of("sdar_moe", "SDARMoeConfig", "SDARMoeForCausalLM"), "block_size": 4, "debug": False,
         "ep_size": 1, "fuse_cross_entropy": True, "head_dim": 16, "mask_token_id": "<|MASK|>",
         "max_position_embeddings": 32768, "micro_forward": False, "model_type": "sdar_moe", "rope_scaling": None,
         "skip_checkpoint": False, "sliding_window": None, "tie_word_embeddings": False, "use_deepep": False},
        {"eos_token_id": ["<|im_end|>", "<|endoftext|>"], "pad_token_id": "<|endoftext|>", "do_sample": False},
        {**_QWEN_TOKENIZER, "mask_token": "<|MASK|>"}, (*_CHAT, "<|MASK|>"), _QWEN_FILES,
        ("configuration_sdar_moe.py", "modeling_sdar_moe.py")),
    "i-dlm": (
        {**_QWEN, **_QWEN_IDS, "architectures": ["SDARForCausalLM"], "attention_bias": False,
         "attn_implementation": "flex_attention", "auto_map": _code_of("sdar", "SDARConfig", "SDARForCausalLM"),
         "block_size": 3, "fuse_cross_entropy": True, "head_dim": 16, "mask_token_id": "<|MASK|>",
         "max_position_embeddings": 40960, "model_type": "sdar", "rope_scaling": None, "sliding_window": None,
         "tie_word_embeddings": False, "use_cache": False, "use_regular_causal": True},
        {"eos_token_id": ["<|im_end|>", "<|endoftext|>"], "pad_token_id": "<|endoftext|>", "do_sample": False},
        {**_QWEN_TOKENIZER, "mask_token": "<|MASK|>"}, (*_CHAT, "<|MASK|>"), _QWEN_FILES,
        ("configuration_sdar.py", "modeling_sdar.py")),
    "fast-dllm-v2": (
        {**_QWEN, **_QWEN_IDS, "architectures": ["Fast_dLLM_QwenForCausalLM"], "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig", "AutoModel": "modeling.Fast_dLLM_QwenForCausalLM",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM"},
         "bd_size": 32, "layer_types": ["full_attention"] * 2, "max_position_embeddings": 32768,
         "model_type": "Fast_dLLM_Qwen", "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": True},
        {"eos_token_id": ["<|im_end|>", "<|endoftext|>"], "pad_token_id": "<|endoftext|>", "do_sample": False},
        _QWEN_TOKENIZER, (*_CHAT, "|<MASK>|"), _QWEN_FILES, ("configuration.py", "modeling.py")),
    "rnd1": (
        {**_QWEN, **_EXPERTS, **_QWEN_IDS, "architectures": ["RND1LM"], "attention_bias": False, "auto_map": {
            "AutoConfig": "configuration_rnd.RND1Config", "AutoModel": "modeling_rnd.RND1Model",
            "AutoModelForMaskedLM": "modeling_rnd.RND1LM"},
         "head_dim": 16, "is_causal": False, "mask_token_id": "<|mask|>", "max_position_embeddings": 40960,
         "model_type": "rnd1", "moe_backend": "hf", "num_diffusion_steps": 256, "pad_token_id": "<|endoftext|>",
         "rope_scaling": False, "sliding_window": False, "tie_word_embeddings": False, "use_cache": False},
        {"eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"},
        {**_QWEN_TOKENIZER, "mask_token": "<|mask|>"}, (*_CHAT, "<|mask|>"), _QWEN_FILES,
        ("configuration_rnd.py", "modeling_rnd.py")),
    "nemotron": (
        {**_LLAMA_LINE, "ar_loss_weight": 1.0, "architectures": ["NemotronLabsDiffusionModel"], "attention_bias": False,
         "attn_implementation": "sdpa", "auto_map": _code_of("nemotron_labs_diffusion", "NemotronLabsDiffusionConfig",
                                                             "NemotronLabsDiffusionModel", causal=False),
         "block_size": 32, "bos_token_id": "<s>", "dlm_loss_weight": None, "dlm_paradigm": "bidirectional",
         "dp_varying_mask_ratio": False, "eos_token_id": "</s>", "head_dim": 16, "mask_token_id": "<SPECIAL_100>",
         "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "nemotron_labs_diffusion",
         "rms_norm_eps": 1e-05, "rope_parameters": {
             "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
             "mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "rope_theta": 1000000.0,
             "rope_type": "yarn"},
         "sliding_window": None, "tie_word_embeddings": False, "use_cache": False},
        {"bos_token_id": "<s>", "eos_token_id": "</s>", "use_cache": False},
        {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False,
         "tokenizer_class": "PreTrainedTokenizerFast"},
        ("<s>", "</s>", "<SPECIAL_100>"), ("tokenizer.json", "special_tokens_map.json"),
        ("configuration_nemotron_labs_diffusion.py", "modeling_nemotron_labs_diffusion.py", "modeling_ministral.py")),
    "illada": (
        {**{key: value for key, value in FOLDERS["llada"][0].items() if key != "mask_token_id"}, **_SEED_IDS,
         "max_sequence_length": 8192, "n_kv_heads": 2, "weight_tying": True},
        _SEED_IDS, _SEED_TOKENIZER, _SEED_SPECIAL, ("tokenizer.json", "special_tokens_map.json"),
        ("configuration_llada.py", "modeling_llada.py")),
    "stable-diffcoder": (
        {**_LLAMA_LINE, **_SEED_IDS, "architectures": ["StableDiffcoderForCausalLM"], "attention_bias": False,
         "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
         "head_dim": 8, "layer_norm_eps": None, "max_position_embeddings": 8192, "mlp_bias": False,
         "model_type": "llama", "resid_pdrop": 0.1, "rms_norm_eps": 1e-06, "rope_scaling": None,
         "rope_theta": 500000.0, "tie_word_embeddings": False, "use_cache": True},
        _SEED_IDS, _SEED_TOKENIZER, _SEED_SPECIAL, ("tokenizer.json", "special_tokens_map.json"),
        ("modeling_stable_diffcoder.py",)),
}


def publish(name: str, folder: Path) -> Path:
    """Write the tiny stand-in of a published model into `folder`, with random weights."""
    config, generation, settings, special, files, code = (FOLDERS | NEWER)[name]
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, settings, special, files)
    size = (len(ids) + 47) // 32 * 32  # the published ones are padded too
    config = {key: size if value is ... else value for key, value in {**config, "vocab_size": size}.items()}
    config, generation = (with_ids(raw, ids) for raw in (config, generation))
    write(folder / "generation_config.json", generation)
    for file in code:
        (folder / file).write_text(RAN)
    torch.manual_seed(0)
    model = DiffusionLM(read_config(config))
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.ndim > 1 else 1)
    state = {key: tensor.bfloat16() for key, tensor in to_published(model.config, model.state_dict()).items()}
    if name == "qwen2.5":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        save_shards(folder, state)
    write(folder / "config.json", config)
    return folder


def with_ids(raw: dict, ids: dict[str, int]) -> dict:
    def replaced(value):
        return [ids[item] for item in value] if isinstance(value, list) else ids[value]

    return {key: replaced(value) if key.endswith("_token_id") and value is not None else value
            for key, value in raw.items()}


def write(file: Path, raw: dict) -> None:
    file.write_text(json.dumps(raw, indent=2))


def change(file: Path, **values) -> None:
    """Set keys of a JSON file; `...` removes one."""
    raw = {**(json.loads(file.read_text()) if file.exists() else {}), **values}
    write(file, {key: value for key, value in raw.items() if value is not ...})


def save_shards(folder: Path, state: dict[str, torch.Tensor], suffix: str = "") -> None:
    names = sorted(state)
    shards = {f"model{suffix}-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, kept in shards.items():
        save_file({key: state[key].contiguous() for key in kept}, folder / file, metadata={"format": "pt"})
    write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {
        key: file for file, kept in shards.items() for key in kept}})


def write_tokenizer(folder: Path, settings: dict, special: tuple[str, ...], files: tuple[str, ...]) -> dict[str, int]:
    """The files of a byte-level BPE with added tokens behind its vocabulary; returns the ids of all words."""
    trained = json.loads(train_tokenizer(TEXTS, 300).backend_tokenizer.to_str())["model"]
    words = {word: index for index, word in enumerate(list(trained["vocab"])[3:])}  # without its special tokens
    merges = [tuple(pair) for pair in trained["merges"]]
    added = {token: len(words) + index for index, token in enumerate(special)}
    write(folder / "tokenizer_config.json", {**settings, "added_tokens_decoder": {
        str(index): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                     "special": True} for token, index in added.items()}})
    backend = Tokenizer(models.BPE(words, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    named = {key: value for key, value in settings.items()
             if key in ("bos_token", "eos_token", "pad_token", "mask_token") and value is not None}
    content = {"tokenizer.json": backend.to_str(), "vocab.json": json.dumps(words),
               "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
               "added_tokens.json": json.dumps(added), "special_tokens_map.json": json.dumps(named)}
    for file in files:
        (folder / file).write_text(content[file])
    return {**words, **added}
