"""GGUF files of the Llama and Qwen lines load as their folders do; what would be read wrongly is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dllm.cli import main
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.model.families import FAMILIES, ModelConfig
from dllm.model.gguf import as_folder
from dllm.model.rotary import Rotary
from dllm.model.tokenizer import load_tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf (extra gguf) is not installed")
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def make_model(family="llama", **changes) -> DiffusionLM:
    torch.manual_seed(0)
    return DiffusionLM(ModelConfig(**{
        "family": family, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
        "max_position_embeddings": 128, "initializer_range": 0.2, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        **FAMILIES[family].fixed, **changes})).eval()


def write(path, model, tokenizer, *, kind="F32", scaling=None, extra=(), mask=None, architecture=None, blocks=None):
    """A GGUF file as llama.cpp's converter writes it: renamed tensors, rows of Llama's q and k in its own order."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture or config.family)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(blocks or config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word if mask is not None else word.replace("<|mask|>", "<|file|>") for word, _ in words])
    writer.add_token_types([3 if number < 3 else 1 for _, number in words])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(
        tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(1)
    if mask is not None:
        writer.add_mask_token_id(mask)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.family.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if config.family == "llama" and part in name:
                data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        quantised = gguf.GGMLQuantizationType[kind if data.ndim == 2 else "F32"]
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), gguf.quantize(data, quantised),
                          raw_dtype=quantised)
    for name, data in extra:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_tokenizer(functions):
    return train_tokenizer(functions, 320)


@pytest.mark.slow
@pytest.mark.parametrize("kind, error", [("F32", 1e-5), ("F16", 1e-2), ("BF16", 5e-2), ("Q8_0", 1e-1)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_file_gives_the_logits_of_the_model_it_was_written_from(tmp_path, tiny_tokenizer, family, tied, kind, error):
    model = make_model(family, tie_word_embeddings=tied)
    file = write(tmp_path / "model.gguf", model, tiny_tokenizer, kind=kind)
    loaded = DiffusionLM.from_pretrained(file)
    assert loaded.config.family == family and (loaded.lm_head is None) == tied and loaded.config.eos_token_id == 0
    ids = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    assert (loaded(ids).logits - expected).abs().max() <= error * expected.abs().max()


def test_the_tokenizer_comes_with_the_file_and_the_folder_of_a_file_is_the_file(tmp_path, tiny_tokenizer, functions):
    file = write(tmp_path / "some model.gguf", make_model(), tiny_tokenizer, mask=2)
    tokenizer = load_tokenizer(str(file))
    assert [tokenizer(text)["input_ids"] for text in functions] == [tiny_tokenizer(text)["input_ids"]
                                                                   for text in functions]
    assert tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == 1
    assert DiffusionLM.from_pretrained(file).mask_token_id == 2  # llama.cpp has a key for it
    assert as_folder(tmp_path) == as_folder(file) != file
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as repositories of GGUF files have it
    assert as_folder(tmp_path) == as_folder(file)
    (tmp_path / "model.safetensors").touch()
    assert as_folder(tmp_path) == tmp_path
    (tmp_path / "model.safetensors").unlink()
    shutil.copy(file, tmp_path / "other.gguf")
    with pytest.raises(UserError, match="2 GGUF files; name one: other.gguf, some model.gguf"):
        DiffusionLM.from_pretrained(tmp_path)


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path, tiny_tokenizer, capsys):
    file = write(tmp_path / "model.gguf", make_model(), tiny_tokenizer)
    first, again = as_folder(file), as_folder(file)
    assert first == again and capsys.readouterr().err.count("reading model.gguf, this once") == 1
    write(file, make_model(rms_norm_eps=1e-5), tiny_tokenizer)
    assert as_folder(file) != first
    assert DiffusionLM.from_pretrained(file).config.rms_norm_eps == pytest.approx(1e-5)


def test_the_rotary_scaling_of_llama_3_is_read_from_its_tensor(tmp_path, tiny_tokenizer):
    model = make_model(rope_scaling=LLAMA3, rope_theta=500000.0, max_position_embeddings=2048)
    plain = Rotary(replace(model.config, rope_scaling=None)).frequencies
    divisors = (plain / Rotary(model.config).frequencies).numpy()
    assert divisors.max() == 32
    file = write(tmp_path / "model.gguf", model, tiny_tokenizer, extra=[("rope_freqs.weight", divisors)])
    loaded = DiffusionLM.from_pretrained(file)
    ids = torch.randint(320, (1, 2000), generator=torch.Generator().manual_seed(1))
    assert dict(loaded.config.rope_scaling) == LLAMA3
    assert (loaded(ids).logits - model(ids).logits).abs().max() < 1e-3


@pytest.mark.parametrize("changes, message", [
    ({"scaling": "yarn"}, r"scales its rotary embedding in a way \(yarn\).*supported: that of Llama 3"),
    ({"scaling": "linear"}, r"in a way \(linear\)"),
    ({"extra": [("rope_freqs.weight", np.full(8, 3.0, np.float32))]}, r"in a way \(rope_freqs.weight\)"),
    ({"extra": [("blk.0.attn_q.bias", np.ones(64, np.float32))]}, "holds 21 tensors, of which .* makes a model of 20"),
    ({"blocks": 3}, "without model.layers.2.input_layernorm.weight"),
    ({"architecture": "mamba3"}, "cannot be read as a GGUF model .*mamba3.*Llama or Qwen line")], ids=str)
def test_what_would_be_read_wrongly_is_refused(tmp_path, tiny_tokenizer, changes, message):
    file = write(tmp_path / "model.gguf", make_model(), tiny_tokenizer, **changes)
    with pytest.raises(UserError, match=message) as error:
        DiffusionLM.from_pretrained(file)
    assert "\n" not in str(error.value)


def test_a_damaged_file_and_a_part_of_a_file_are_refused_in_one_line(tmp_path, tiny_tokenizer):
    file = write(tmp_path / "model.gguf", make_model(), tiny_tokenizer)
    whole = file.read_bytes()
    for damaged in (whole[:40], whole[:len(whole) // 2], b"", b"GGUF", b"not a model"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as a GGUF model") as error:
            load_tokenizer(file)
        assert "\n" not in str(error.value)
    part = tmp_path / "model-00001-of-00002.gguf"
    part.write_bytes(whole)
    with pytest.raises(UserError, match="part of a GGUF file; join the parts with llama-gguf-split --merge"):
        DiffusionLM.from_pretrained(part)
    with pytest.raises(UserError, match="none.gguf does not exist; give the path of a GGUF file"):
        DiffusionLM.from_pretrained(tmp_path / "none.gguf")


@pytest.mark.slow
def test_without_the_package_the_extra_is_named(tmp_path, tiny_tokenizer):
    file = write(tmp_path / "model.gguf", make_model(), tiny_tokenizer)
    code = ("import sys; sys.modules['gguf'] = None\n"
            "from dllm import load_tokenizer, UserError\n"
            f"try: load_tokenizer({str(file)!r})\n"
            "except UserError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'dllm[gguf]'" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_file_is_a_start_for_train_and_a_model_for_sample_and_eval(tmp_path, tiny_tokenizer, corpus, capsys):
    file = write(tmp_path / "model.gguf", make_model(), tiny_tokenizer)
    flags = ["--train.max_steps=2", "--train.device=cpu", "--data.max_seq_len=64", f"--data.train_path={corpus}"]
    command = ["train", f"--model.model_path={file}", f"--train.output_dir={tmp_path / 'run'}", *flags]
    assert main(command) == 0 and main(command) == 0  # the second finds the run finished
    adapted = tmp_path / "run" / "checkpoints" / "global_step_2" / "hf_ckpt"
    assert json.loads((adapted / "config.json").read_text())["vocab_size"] == 384
    assert main(["sample", str(adapted), "--prompt", "def", "--max-new-tokens", "4", "--steps", "4"]) == 0
    assert main(["export", str(tmp_path / "run"), "--output-dir", str(tmp_path / "exported")]) == 0
    masked = write(tmp_path / "masked.gguf", make_model(), tiny_tokenizer, mask=2)
    capsys.readouterr()
    assert main(["sample", str(masked), "--prompt", "def", "--max-new-tokens", "4", "--steps", "4"]) == 0
    assert "def" in capsys.readouterr().out
    assert main(["eval", "perplexity", str(masked), "--data", str(corpus), "--max-seq-len", "64",
                 "--windows", "4"]) == 0
