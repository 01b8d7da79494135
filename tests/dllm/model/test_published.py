"""Folders as they are published: every key, file and contradiction that real ones have."""

import json
import re
import shutil
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dllm.diffusion_lm import DiffusionLM
from dllm.errors import Notice, UserError
from dllm.generation.config import MDMGenerationConfig, published_settings
from dllm.model.families import read_config
from dllm.model.loading import load_with_tokenizer
from dllm.model.tokenizer import check_separator, load_tokenizer
from tests.dllm.published import FOLDERS, TEXTS, change, publish, save_shards, write

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("published")
    return {name: publish(name, base / name) for name in FOLDERS}


@pytest.fixture
def copy(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


@contextmanager
def told(*messages: str):
    """Exactly these warnings, each matching its expression."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught if warning.category is Notice]
    assert len(texts) == len(messages), texts
    for text, message in zip(texts, messages, strict=True):
        assert re.search(message, text) and "\n" not in text, text


@torch.no_grad()
def logits(model):
    return model(torch.arange(9)[None]).logits


# Configurations


@pytest.mark.parametrize("name", FOLDERS)
def test_published_folders_load_in_silence_and_their_code_never_runs(folders, name, capfd, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with told(*["end a text are .*; each of them ends one"] * (name == "sdar")):
        model, tokenizer = load_with_tokenizer(folders[name], "cpu")
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == TEXTS[0]
    assert capfd.readouterr().out == "" and not (folders[name] / "RAN").exists()
    raw = json.loads((folders[name] / "config.json").read_text())
    assert model.end_token_ids == tokenizer.end_token_ids and raw["eos_token_id"] in model.end_token_ids
    assert tokenizer.convert_tokens_to_ids(tokenizer.mask_token) == tokenizer.mask_token_id
    if name != "qwen2.5":
        assert model.mask_token_id == tokenizer.mask_token_id
    assert logits(model).isfinite().all()


HARMLESS = {"use_mrope": False, "tokenizer_class": "Qwen2Tokenizer", "use_return_dict": True, "pruned_heads": {},
            "tie_encoder_decoder": False, "_commit_hash": "abc", "temperature": 1.0, "task_specific_params": None,
            "max_length": 20, "is_causal": False, "num_beams": 1, "hidden_dropout": 0.1, "embd_pdrop": 0.1,
            "quantization_config": None, "new_in_2027": False, "also_new": "", "and_this": [], "logits_scaling": 1.0,
            "transformers.js_config": {"dtype": "q4"}, "use_sliding_window": True, "final_logit_softcapping": None}


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_that_change_nothing_are_ignored(copy, key):
    folder = copy("qwen2.5")
    before = logits(DiffusionLM.from_pretrained(folder))
    change(folder / "config.json", **{key: HARMLESS[key]})
    with told():
        model = DiffusionLM.from_pretrained(folder)
    assert torch.equal(logits(model), before)
    model.save_pretrained(folder / "saved")
    assert json.loads((folder / "saved/config.json").read_text())[key] == HARMLESS[key]


def test_other_unknown_keys_are_named_in_one_warning(copy):
    folder = copy("llada")
    before = logits(DiffusionLM.from_pretrained(folder))
    change(folder / "config.json", d_modle=3)
    with told(r"config\.json: llada has no configuration key 'd_modle', ignored; did you mean d_model\?"):
        assert torch.equal(logits(DiffusionLM.from_pretrained(folder)), before)
    change(folder / "config.json", another={"a": 1})
    with told("llada has no configuration key 'd_modle', 'another', ignored$"):
        DiffusionLM.from_pretrained(folder).save_pretrained(folder / "saved")


@pytest.mark.parametrize("changes", [
    {"quantization_config": {"bits": 4}}, {"final_logit_softcapping": 30.0}, {"logits_scaling": 8.0},
    {"use_qk_norm": True}, {"partial_rotary_factor": 0.5}, {"rope_interleaved": True}, {"use_mrope": True},
    {"hidden_act": "gelu"}, {"residual_multiplier": 0.22}, {"layer_types": ["linear_attention", "full_attention"]},
    {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512},
    {"rope_scaling": {"type": "yarn", "factor": -4.0}}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4}}])
def test_keys_that_change_the_computation_are_refused_by_name(changes):
    with pytest.raises(UserError, match="sliding_window|" + "|".join(changes).replace("rope_parameters", "longrope")):
        read_config(LLAMA | changes)


REAL = {
    "qwen3": ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 16,
               "max_window_layers": 28, "sliding_window": None, "use_sliding_window": False, "rope_theta": 1000000},
              {"qk_norm": True, "head_dim": 16, "rope_theta": 1000000}),
    "qwen2.5 of transformers 5": ({"model_type": "qwen2", "dtype": "bfloat16", "layer_types": ["full_attention"] * 2,
                                   "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}},
                                  {"rope_theta": 1000000.0, "rope_scaling": None}),
    "llama 3.2": ({"bos_token_id": 1, "eos_token_id": [2, 3], "head_dim": 8, "mlp_bias": False, "pretraining_tp": 1,
                   "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                    "original_max_position_embeddings": 8192, "rope_type": "llama3"},
                   "rope_theta": 500000.0}, {"rope_theta": 500000.0, "eos_token_id": [2, 3]}),
    "llama 3.2 of transformers 5": (
        {"rope_parameters": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                             "original_max_position_embeddings": 8192, "rope_theta": 500000.0}},
        {"rope_theta": 500000.0, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                                  "original_max_position_embeddings": 8192, "rope_type": "llama3"}}),
    "smollm2": ({"attention_bias": False, "initializer_range": 0.041666, "is_llama_config": True, "mlp_bias": False,
                 "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
                 "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}, {"tie_word_embeddings": True}),
    "deepseek-coder": ({"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000},
                       {"rope_scaling": {"factor": 4.0, "rope_type": "linear"}}),
    "mistral 0.3": ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None,
                     "rope_theta": 1000000.0}, {"qkv_bias": False, "shift_logits": True}),
    "mistral 0.1, up to its window": ({"model_type": "mistral", "sliding_window": 4096,
                                       "max_position_embeddings": 4096}, {"max_position_embeddings": 4096}),
    "stable-diffcoder": ({"architectures": ["StableDiffcoderForCausalLM"], "eos_token_id": 2, "pad_token_id": 1,
                          "auto_map": {"AutoModelForCausalLM":
                                       "modeling_stable_diffcoder.StableDiffcoderForCausalLM"}},
                         {"shift_logits": False, "block_causal": True, "block_length": 4}),
    "lower case dream": ({"model_type": "dream", "max_window_layers": 28, "sliding_window": None},
                         {"qkv_bias": True, "shift_logits": True}),
    "llada-moe": ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "attention_bias": False,
                   "clip_qkv": None, "intermediate_size": None, "dense_intermediate_size": 48, "num_experts": 8,
                   "expert_intermediate_size": 16, "num_experts_per_tok": 2, "moe_layer_freq": [1, 1],
                   "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax",
                   "norm_topk_prob": None, "output_router_logits": False, "partial_rotary_factor": 1,
                   "qk_layernorm": True, "router_aux_loss_coef": 0.01, "router_num_group": None,
                   "router_topk_group": None, "routed_scaling_factor": 1, "rope_theta": 50000,
                   "shared_expert_intermediate_size": None, "use_cache": False},
                  {"num_experts": 8, "qk_norm": True, "shift_logits": False}),
}


@pytest.mark.parametrize("name", REAL)
def test_configurations_of_real_models_are_read_in_silence(name):
    raw, wanted = REAL[name]
    with told():
        config = read_config(LLAMA | raw)
    assert {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_dynamic_scaling_changes_nothing_within_the_models_positions(copy, key):
    folder = copy("qwen2.5")
    change(folder / "config.json", **{key: {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = DiffusionLM.from_pretrained(folder)
    assert torch.equal(ours.rotary.frequencies, theirs.model.rotary_emb.inv_freq)
    ours.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())[key]["rope_type"] == "dynamic"


def test_part_of_the_head_is_rotated_as_transformers_5_says_it(copy):
    folder = copy("llada2-mini")
    before = logits(DiffusionLM.from_pretrained(folder))
    change(folder / "config.json", partial_rotary_factor=..., rope_theta=..., rope_scaling=..., rope_parameters={
        "partial_rotary_factor": 0.5, "rope_theta": 600000, "rope_type": "default"})
    with told():
        assert torch.equal(logits(DiffusionLM.from_pretrained(folder)), before)


def test_a_windows_layers_are_told_by_what_really_slides():
    for harmless in ({"use_sliding_window": True, "sliding_window": 8192}, {"sliding_window": 64},
                     {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}):
        with told():
            read_config(LLAMA | {"model_type": "qwen2"} | harmless)
    for name, slides in (("mistral", {"sliding_window": 64}), ("qwen2", {
            "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1})):
        with told(f"{name} has layers that see 64 positions; here every layer sees the whole text, in both directions"):
            read_config(LLAMA | {"model_type": name} | slides)
    with pytest.raises(UserError, match="sliding_window 64 is not supported.*max_position_embeddings to at most"):
        read_config(LLAMA | {"model_type": "Dream", "sliding_window": 64, "use_sliding_window": True})


def test_code_of_another_model_under_a_known_model_type_is_told():
    with told('brings code of its own for a model_type \'llama\'.*add "shift_logits": false'):
        assert read_config(LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}).shift_logits
    with told():
        raw = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "shift_logits": False, "block_size": 8}
        assert read_config(LLAMA | raw).block_length == 8


# One fact in two places


@pytest.mark.parametrize("files, taken", [
    (("model.safetensors", "pytorch_model.bin"), "model.safetensors"),
    (("model.safetensors", "model.safetensors.index.json"), "model.safetensors"),
    (("model.safetensors.index.json", "pytorch_model.bin"), "model.safetensors.index.json"),
    (("pytorch_model.bin",), "pytorch_model.bin")])
def test_of_weights_in_several_files_transformers_choice_is_taken_and_told(copy, files, taken):
    folder = copy("qwen2.5")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file in files:
        marked = {**state, "model.norm.weight": torch.full((32,), 2.0 if file == taken else 1.0)}
        if file == "model.safetensors":
            save_file(marked, folder / file, metadata={"format": "pt"})
        elif file == "pytorch_model.bin":
            torch.save(marked, folder / file)
        else:
            save_shards(folder, marked)
    other = next((file for file in files if file != taken), "")
    with told(*[f"holds weights in {taken} and in {other}; those of {taken} are taken"] * (len(files) > 1)):
        model = DiffusionLM.from_pretrained(folder)
    assert (model.model.norm.weight == 2).all()


@pytest.mark.parametrize("name, key, head", [("qwen2.5", "tie_word_embeddings", "lm_head.weight"),
                                             ("llada", "weight_tying", "model.transformer.ff_out.weight")])
def test_a_trained_head_beside_tied_embeddings_is_taken_and_told(copy, tmp_path, name, key, head):
    folder = copy(name)
    change(folder / "config.json", **{key: True})
    state = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for file in folder.glob("*safetensors*"):
        file.unlink()
    embedding = "model.embed_tokens.weight" if name == "qwen2.5" else "model.transformer.wte.weight"
    trained = torch.randn_like(state[embedding])
    save_file({**state, head: trained}, folder / "model.safetensors")
    with told(f"ties the head to the embedding, but the weights hold another matrix as {head}, which is taken"):
        model = DiffusionLM.from_pretrained(folder, dtype="auto")
    assert torch.equal(model.head_weight, trained) and not torch.equal(model.model.embed_tokens.weight, trained)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())[key] is False
    with told():
        assert torch.equal(logits(DiffusionLM.from_pretrained(tmp_path / "saved", "auto")), logits(model))
    for tied in ({**state, head: state[embedding].clone()},  # twice the same; and the head alone
                 {key: tensor for key, tensor in state.items() if key not in (embedding, head)} | {head: trained}):
        save_file(tied, folder / "model.safetensors")
        with told():
            model = DiffusionLM.from_pretrained(folder, dtype="auto")
        assert model.lm_head is None and torch.equal(model.head_weight, tied[head])


def test_every_token_that_a_file_names_ends_a_text(copy):
    folder = copy("dream")
    words = load_tokenizer(folder).get_vocab()
    change(folder / "config.json", eos_token_id=words["<|im_start|>"])
    change(folder / "generation_config.json", eos_token_id=[words["<|im_end|>"]])
    expected = {words[token] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
    with told(rf"end a text are \[{words['<|im_end|>']}\] in generation_config\.json, "
              rf"\[{words['<|im_start|>']}\] in config\.json, \[{words['<|endoftext|>']}\] in the tokenizer; each"):
        model, tokenizer = load_with_tokenizer(folder, "cpu")
    assert {*model.end_token_ids} == {*tokenizer.end_token_ids} == expected


def test_of_two_mask_tokens_the_generation_configs_goes_first_and_the_tokenizers_last(copy):
    folder = copy("dream")
    words = load_tokenizer(folder).get_vocab()
    other, third = words["<|im_start|>"], words["<|im_end|>"]
    change(folder / "config.json", mask_token_id=other)
    with told(f"the mask token is {other} in config.json, {words['<|mask|>']} in the tokenizer; {other} is taken"):
        model, tokenizer = load_with_tokenizer(folder, "cpu")
    assert model.mask_token_id == tokenizer.mask_token_id == other
    change(folder / "generation_config.json", mask_token_id=third)
    with told(f"{third} in generation_config.json, .*; {third} is taken"):
        model, tokenizer = load_with_tokenizer(folder, "cpu")
    assert model.mask_token_id == tokenizer.mask_token_id == third
    for asked in ({"mask_token_id": other}, {"mask_token": "<|im_start|>"}):
        model, tokenizer = load_with_tokenizer(folder, "cpu", **asked)
        assert model.mask_token_id == tokenizer.mask_token_id == other
        model.save_pretrained(folder / "saved")
        assert DiffusionLM.from_pretrained(folder / "saved").mask_token_id == other


def test_the_older_special_tokens_map_goes_last_and_a_difference_is_told(copy):
    folder = copy("dream")
    words = load_tokenizer(folder).get_vocab()
    mask, end, other = (words[token] for token in ("<|mask|>", "<|endoftext|>", "<|im_end|>"))
    change(folder / "special_tokens_map.json", eos_token={"content": "<|im_end|>"}, mask_token="<|im_end|>")
    change(folder / "config.json", mask_token_id=...)
    with told(rf"{mask} in the tokenizer, {other} in special_tokens_map.json; {mask} is taken",
              rf"\[{end}\] in the tokenizer, \[{other}\] in special_tokens_map.json; each of them ends one"):
        model, tokenizer = load_with_tokenizer(folder, "cpu")
    assert model.mask_token_id == tokenizer.mask_token_id == mask
    assert {*model.end_token_ids} == {*tokenizer.end_token_ids} == {end, other}
    change(folder / "added_tokens.json", **{"<|mask|>": mask + 1})  # older than added_tokens_decoder
    change(folder / "special_tokens_map.json", eos_token=..., mask_token=...)
    assert load_tokenizer(folder).mask_token_id == mask == DiffusionLM.from_pretrained(folder).mask_token_id


def test_of_two_chat_templates_transformers_choice_is_taken_and_told(copy):
    folder = copy("qwen2.5")
    (folder / "chat_template.jinja").write_text("B{{ messages }}\n")
    for inside, warnings_ in (("B{{ messages }}", 0), ("A{{ messages }}", 1), (
            [{"name": "default", "template": "B{{ messages }}"}, {"name": "tool_use", "template": "T"}], 1)):
        change(folder / "tokenizer_config.json", chat_template=inside)
        with told(*["chat templates in tokenizer_config.json and chat_template.jinja differ; that in"] * warnings_):
            _, tokenizer = load_with_tokenizer(folder, "cpu")
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template == "B{{ messages }}\n"
    (folder / "chat_template.jinja").write_bytes(b"B\r\nC\r\n")
    change(folder / "tokenizer_config.json", chat_template="B\nC")
    with told():
        load_tokenizer(folder)


@pytest.mark.parametrize("twice, message", [
    ({"dtype": "float16", "torch_dtype": "torch.float32"}, "dtype is float16, torch_dtype float32; dtype is taken"),
    ({"architectures": ["DreamModel"]}, "architectures has DreamModel, model_type is 'qwen2', which is taken"),
    ({"dtype": "bfloat16", "torch_dtype": "torch.bfloat16", "architectures": ["Qwen2ForTokenClassification"]}, None)])
def test_a_dtype_or_a_family_that_is_named_twice_is_told(copy, twice, message):
    folder = copy("qwen2.5")
    change(folder / "config.json", **twice)
    with told(*filter(None, [message])):
        model = DiffusionLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    assert model.config.family == "qwen2"


@pytest.mark.parametrize("file, values, message", [
    ("config.json", {"rms_norm_eps": "1e-06"}, "rms_norm_eps must be a number, not '1e-06'"),
    ("config.json", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
    ("config.json", {"rope_theta": "1e6"}, "rope_theta must be a number"),
    ("config.json", {"eos_token_id": "<|endoftext|>"}, "config.json: eos_token_id must be a whole number or a list of"),
    ("generation_config.json", {"mask_token_id": [5]}, r"mask_token_id must be a whole number, not \[5\]")])
def test_a_value_of_another_kind_is_refused_in_one_line(copy, file, values, message):
    folder = copy("qwen2.5")
    change(folder / file, **values)
    with pytest.raises(UserError, match=message) as error:
        DiffusionLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_minus_one_names_no_token(copy):
    folder = copy("qwen2.5")
    expected = DiffusionLM.from_pretrained(folder).end_token_ids
    change(folder / "config.json", eos_token_id=-1, pad_token_id=-1)
    with told():
        assert DiffusionLM.from_pretrained(folder).end_token_ids == expected


@pytest.mark.parametrize("twice, taken, message", [
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, (1e6, None),
     "rope_theta is 10000.0, and 1000000.0 among the rotary settings, which is taken"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
     (10000.0, 2.0), "rope_scaling .* and rope_parameters .* differ; rope_scaling is taken")])
def test_of_two_rotary_settings_transformers_choice_is_taken_and_told(tmp_path, twice, taken, message):
    with told(message):
        config = read_config(LLAMA | twice)
    assert (config.rope_theta, (config.rope_scaling or {}).get("factor")) == taken
    write(tmp_path / "config.json", LLAMA | twice)
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (theirs["rope_theta"], theirs.get("factor")) == taken


# Tokenizers


def unnamed(folder, *names):
    change(folder / "tokenizer_config.json", **dict.fromkeys(names, ...))
    if (folder / "special_tokens_map.json").exists():
        change(folder / "special_tokens_map.json", **dict.fromkeys(names, ...))


def in_front(folder):
    """Added tokens before the vocabulary, as their own list says."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = list(settings["added_tokens_decoder"].values())
    words = json.loads((folder / "vocab.json").read_text())
    write(folder / "vocab.json", {word: index + len(added) for word, index in words.items()})
    change(folder / "tokenizer_config.json", added_tokens_decoder={str(i): token for i, token in enumerate(added)})
    (folder / "added_tokens.json").unlink()
    for file in ("config.json", "generation_config.json"):
        change(folder / file, **dict.fromkeys(("mask_token_id", "eos_token_id"), ...))


LAYOUTS = {
    "as published": lambda folder: None,
    "added_tokens.json alone": lambda folder: unnamed(folder, "added_tokens_decoder"),
    "without special_tokens_map.json": lambda folder: (folder / "special_tokens_map.json").unlink(),
    "a class that nobody has": lambda folder: change(folder / "tokenizer_config.json", tokenizer_class="XTokenizer"),
    "no class, no auto_map": lambda folder: unnamed(folder, "tokenizer_class", "auto_map"),
    "auto_map as a list": lambda folder: change(folder / "tokenizer_config.json", auto_map=["a.DreamTokenizer", None]),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "added tokens in front": in_front,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dreams_tokenizer_is_qwens_bpe_however_its_files_lie(folders, copy, tmp_path, layout):
    folder = copy("dream")
    LAYOUTS[layout](folder)
    reference = load_tokenizer(folders["qwen2.5"])
    tokenizer = load_tokenizer(folder)
    text = "<|im_start|>def add(x, y):\n    return x + 12345<|endoftext|>"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert pieces == reference.convert_ids_to_tokens(reference(text, add_special_tokens=False)["input_ids"])
    assert (tokenizer.mask_token, tokenizer.eos_token) == ("<|mask|>", "<|endoftext|>")
    words = json.loads((folder / "vocab.json").read_text())
    assert words.items() <= tokenizer.get_vocab().items() and len(set(tokenizer.get_vocab().values())) == 300
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab() and again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_gpt2s_tokenizer_cuts_text_as_gpt2(copy):
    folder = copy("dream")
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", auto_map=...)
    tokenizer = load_tokenizer(folder)
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
    assert tokenizer.decode(tokenizer("x = 12")["input_ids"]) == "x = 12"


def test_a_tokenizer_without_special_tokens_takes_those_that_other_files_name(copy):
    folder = copy("llada2-mini")
    unnamed(folder, "mask_token", "eos_token", "pad_token")
    words = load_tokenizer(folder).get_vocab()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.mask_token, tokenizer.eos_token) == ("<|mask|>", "<|endoftext|>")
    for file in ("config.json", "generation_config.json"):
        change(folder / file, eos_token_id=..., pad_token_id=...)
    model, tokenizer = load_with_tokenizer(folder, "cpu")
    assert tokenizer.eos_token_id is None and tokenizer.end_token_ids == model.end_token_ids == []
    assert model.mask_token_id == tokenizer.mask_token_id == words["<|mask|>"]
    with pytest.raises(UserError, match="names an end-of-text token, which separates documents; set eos_token"):
        check_separator(tokenizer)


def test_code_of_a_folder_makes_its_tokenizer_only_where_it_is_trusted(copy):
    folder = copy("dream")
    (folder / "tokenization_dream.py").write_text(
        "from transformers import Qwen2Tokenizer\n\n\nclass DreamTokenizer(Qwen2Tokenizer):\n    trusted = True\n")
    change(folder / "config.json", auto_map=...)
    assert not hasattr(load_tokenizer(folder), "trusted")
    assert load_tokenizer(folder, trust_remote_code=True).trusted
    assert load_with_tokenizer(folder, "cpu", trust_remote_code=True)[1].trusted


def test_a_sentencepiece_tokenizer_without_the_library_is_refused_by_its_name(copy, monkeypatch):
    folder = copy("llada")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="tokenizer.model alone, which needs sentencepiece: pip install"):
        load_tokenizer(folder)


# generation_config.json


@pytest.mark.parametrize("raw, settings", [
    (None, {}), ({}, {}), ({"transformers_version": "5.0", "eos_token_id": 3, "repetition_penalty": 1.1}, {}),
    ({"steps": 7, "alg": "p2", "alg_temp": 0.5, "max_new_tokens": 9}, {
        "steps": 7, "alg": "p2", "alg_temp": 0.5, "max_new_tokens": 9}),
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}, {
        "temperature": 0.7, "top_p": 0.8, "top_k": 20}),
    ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, {}), ({"do_sample": True}, {"temperature": 1.0}),
    ({"temperature": 0.2, "top_p": None}, {"temperature": 0.2}), ({"top_k": -1}, {"top_k": 0})])
def test_the_settings_of_a_generation_config(raw, settings):
    assert published_settings(raw) == settings


@pytest.mark.parametrize("raw, message", [({"alg": "magic"}, "generation_config.json: alg must be one of origin"),
                                          ({"top_p": 1.5}, "generation_config.json: top_p must be above 0 and at most"),
                                          ({"steps": "many"}, "generation_config.json: steps must be a whole number")])
def test_a_generation_config_that_cannot_be_followed_is_refused(raw, message):
    with pytest.raises(UserError, match=re.escape(message)):
        published_settings(raw)


def test_a_call_without_settings_has_those_of_the_folder(copy):
    folder = copy("dream")
    change(folder / "generation_config.json", max_new_tokens=6, steps=3)
    model = DiffusionLM.from_pretrained(folder)
    prompt = torch.tensor([[5, 6]])
    out = model.diffusion_generate(prompt)
    assert out.sequences.shape == (1, 8) and out.steps == 3
    assert model.diffusion_generate(prompt, generation_config=MDMGenerationConfig(
        max_new_tokens=2, steps=2)).sequences.shape == (1, 4)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters", "auto_map"])
def test_a_key_that_should_hold_others_is_refused_by_name(key, copy):
    folder = copy("dream")
    change(folder / "config.json", **{key: "linear"})
    with pytest.raises(UserError, match=f"config.json: {key} must be a dictionary or null, not 'linear'"):
        DiffusionLM.from_pretrained(folder)


@pytest.mark.parametrize("folder_says, asked, new, steps", [
    (dict(max_new_tokens=4096), {}, "room", None),
    (dict(max_new_tokens=4096, block_length=4, remasking="low_confidence", steps=7), {}, "room in blocks", "multiple"),
    (dict(max_new_tokens=4096), dict(max_new_tokens=3), 3, None),
    (dict(block_length=4, remasking="low_confidence", steps=4), dict(max_new_tokens=12), 12, "multiple"),
    (dict(block_length=4, steps=2), dict(max_new_tokens=12), 12, "multiple")])
def test_what_a_folder_chose_is_fitted_to_the_prompt(folder_says, asked, new, steps, copy):
    folder = copy("dream")
    change(folder / "generation_config.json", **folder_says)
    change(folder / "config.json", max_position_embeddings=32)
    model = DiffusionLM.from_pretrained(folder)
    out = model.diffusion_generate({"input_ids": [[5, 6, 7]]}, **asked)
    new = {"room": 29, "room in blocks": 28}.get(new, new)
    assert out.sequences.shape == (1, 3 + new)
    if steps == "multiple":
        assert out.steps % (new // 4) == 0


def test_what_an_argument_chose_is_not_fitted(copy):
    folder = copy("dream")
    change(folder / "generation_config.json", max_new_tokens=4096)
    change(folder / "config.json", max_position_embeddings=32)
    model, prompt = DiffusionLM.from_pretrained(folder), torch.tensor([[5, 6, 7]])
    with pytest.raises(UserError, match="need 33 positions, the model has 32"):
        model.diffusion_generate(prompt, max_new_tokens=30)
    with pytest.raises(UserError, match="need 4099 positions"):
        model.diffusion_generate(prompt, generation_config=MDMGenerationConfig(max_new_tokens=4096))
    with pytest.raises(UserError, match="need 33 positions"):  # not one token fits
        model.diffusion_generate(torch.arange(5, 37))


# Saving


def test_a_saved_folder_has_auto_map_with_its_code_or_neither(copy, tmp_path):
    folder = copy("dream")
    (folder / "configuration_dream.py").write_text(
        "from transformers import Qwen2Config\n\n\nclass DreamConfig(Qwen2Config):\n    model_type = 'Dream'\n")
    DiffusionLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert type(AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)).__name__ == "DreamConfig"
    assert (tmp_path / "saved/modeling_dream.py").read_bytes() == (folder / "modeling_dream.py").read_bytes()
    (folder / "modeling_dream.py").unlink()
    DiffusionLM.from_pretrained(folder).save_pretrained(tmp_path / "without")
    assert not any((tmp_path / "without").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "without/config.json").read_text())
    elsewhere = {"AutoConfig": "Dream-org/Dream-v0-Base-7B--configuration_dream.DreamConfig"}
    change(folder / "config.json", auto_map=elsewhere)
    DiffusionLM.from_pretrained(folder).save_pretrained(tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere/config.json").read_text())["auto_map"] == elsewhere


# Devices, dtypes and paths


@pytest.mark.parametrize("given, wanted", [
    ({}, "float32"), ({"dtype": None}, "float32"), ({"dtype": "auto"}, "bfloat16"), ({"dtype": "bfloat16"}, "bfloat16"),
    ({"dtype": "torch.float16"}, "float16"), ({"torch_dtype": torch.bfloat16}, "bfloat16"),
    ({"torch_dtype": "auto"}, "bfloat16"), ({"dtype": torch.float64, "device": torch.device("cpu")}, "float64"),
    ({"dtype": "float32", "device": "auto", "trust_remote_code": True}, "float32")])
def test_dtypes_and_devices_by_name(folders, given, wanted):
    model = DiffusionLM.from_pretrained(folders["qwen2.5"], **given)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, wanted)}


def test_auto_is_the_weights_dtype_where_the_configuration_names_none(copy):
    folder = copy("qwen2.5")
    change(folder / "config.json", torch_dtype=...)
    assert DiffusionLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("given, message", [
    ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16, float16 or float64, not 'int8'"),
    ({"dtype": torch.int64}, "not torch.int64"), ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N"),
    ({"device": "cuda:99"}, "device is cuda:99, but this torch sees"),
    ({"mask_token_id": 9999}, "mask_token_id 9999 is"), ({"mask_token": "<gap>"}, "mask_token '<gap>' is none of"),
    ({"device_map": "auto"}, "has no argument device_map; it takes")])
def test_what_there_is_not_is_refused_in_one_sentence(folders, given, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        DiffusionLM.from_pretrained(folders["qwen2.5"], **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(folders, default):
    expected = logits(DiffusionLM.from_pretrained(folders["llada2-mini"]))
    torch.set_default_dtype(default)
    try:
        model = DiffusionLM.from_pretrained(folders["llada2-mini"])
        assert model.dtype == torch.float32 and torch.equal(logits(model), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_path_may_begin_with_a_tilde_and_end_with_a_slash(copy, monkeypatch):
    folder = copy("llada")
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in ("~/llada", "~/llada/", folder, f"{folder}/."):
        model, tokenizer = load_with_tokenizer(path, "cpu")
        assert model.mask_token_id == tokenizer.mask_token_id
    with pytest.raises(UserError, match="config.json is a file; give its folder"):
        DiffusionLM.from_pretrained(folder / "config.json")


# Weights and folders that are not what they seem


def test_weights_of_torchs_older_format_load(copy):
    folder = copy("qwen2.5")
    expected = logits(DiffusionLM.from_pretrained(folder))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(logits(DiffusionLM.from_pretrained(folder)), expected)
    for other in ({"state_dict": state}, [1, 2], {"epoch": 3, **state}):
        torch.save(other, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="bin does not hold weights alone, by their names; save what"):
            DiffusionLM.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin is truncated or corrupt"):
        DiffusionLM.from_pretrained(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 5}}])
def test_an_index_that_names_no_files_is_refused(copy, index):
    folder = copy("dream")
    write(folder / "model.safetensors.index.json", index)
    with pytest.raises(UserError, match="model.safetensors.index.json has no weight_map, which names the file of"):
        DiffusionLM.from_pretrained(folder)


def test_a_parameter_in_two_shards_is_told(copy):
    folder = copy("dream")
    name, last = "model.norm.weight", folder / "model-00002-of-00002.safetensors"
    for file in folder.glob("*.safetensors"):
        value = 2.0 if file == last else 1.0
        save_file({**load_file(file), name: torch.full((32,), value)}, file, metadata={"format": "pt"})
    with told(f"{name} is in {last.name} and in an earlier file; that in {last.name} is taken, as in Transformers"):
        model = DiffusionLM.from_pretrained(folder)
    assert (model.model.norm.weight == 2).all()


def test_an_adapter_or_a_run_is_told_what_to_give(copy, tmp_path):
    adapter, run = tmp_path / "adapter", tmp_path / "run"
    adapter.mkdir()
    write(adapter / "adapter_config.json", {"base_model_name_or_path": "owner/base"})
    shutil.copy(copy("llada") / "tokenizer.json", adapter)
    with pytest.raises(UserError, match="adapter is an adapter of owner/base, not a model; merge them with PEFT's"):
        DiffusionLM.from_pretrained(adapter)
    assert len(load_tokenizer(adapter)) > 256  # trainers save it there
    for step in (9, 10):
        (run / f"checkpoints/global_step_{step}/hf_ckpt").mkdir(parents=True)
    newest = run / "checkpoints/global_step_10/hf_ckpt"
    for given in (run, run / "checkpoints", newest.parent):
        for load in (DiffusionLM.from_pretrained, load_tokenizer):
            with pytest.raises(UserError, match=f"{given} belongs to a training run, whose model is in {newest}; give"):
                load(given)


@pytest.mark.parametrize("path", [None, 5, b"folder"])
def test_what_is_no_path_is_refused_in_one_sentence(path):
    for load in (DiffusionLM.from_pretrained, load_tokenizer):
        with pytest.raises(UserError, match="a model is a folder, a hub repository as owner/name, or a GGUF file, not"):
            load(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_tokenizer_is_named(copy, name):
    file = copy("llada") / name
    content = file.read_bytes()
    for damaged in (b"\xef\xbb\xbf" + content, content[:-9]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(str(file))) as error:
            load_tokenizer(file.parent)
        assert "\n" not in str(error.value)
