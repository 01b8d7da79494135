"""A model without a row for the mask token can be adapted: its vocabulary grows, or takes a reserved token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.model.families import FAMILIES, ModelConfig
from dllm.model.growth import grow, rows_needed
from dllm.model.tokenizer import load_tokenizer, train_tokenizer
from dllm.training.build import choose_model, shape_model
from dllm.training.trainer import train

ROOT = Path(__file__).parents[3]


def make_tokenizer(functions, added=()):
    """300 tokens and some added ones, without a mask token, as autoregressive models have it."""
    from transformers import PreTrainedTokenizerFast

    trained = train_tokenizer(functions, 300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, eos_token="<|endoftext|>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


@pytest.fixture
def make_folder(functions, tmp_path):
    """Folders of autoregressive models whose vocabulary has exactly as many rows as the tokenizer has tokens."""
    def make(*, family="llama", tied=True, rows=300, added=(), rename=None) -> Path:
        torch.manual_seed(0)
        model = DiffusionLM(ModelConfig(
            family=family, vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=tied, eos_token_id=0,
            initializer_range=0.2, **FAMILIES[family].fixed))
        folder = tmp_path / f"start-{family}-{tied}-{rows}"
        model.save_pretrained(folder)
        make_tokenizer(functions, added).save_pretrained(folder)
        text = (folder / "tokenizer.json").read_text()
        assert rename is None or "<|mask|>" in text
        (folder / "tokenizer.json").write_text(text.replace("<|mask|>", rename or "<|reserved|>"))
        return folder
    return make


@pytest.fixture
def make_config(corpus, tmp_path):
    def make(folder: Path, *, model=None, **train_keys) -> Config:
        keys = {"output_dir": str(tmp_path / "run"), "lr": 1e-3, "micro_batch_size": 4, "max_steps": 4,
                "num_train_epochs": 100, "device": "cpu", "use_tensorboard": False, "precision": "fp32", **train_keys}
        return Config(model=ModelGroup(model_path=str(folder), **(model or {})), train=TrainGroup(**keys),
                      data=DataGroup(train_path=str(corpus), max_seq_len=48, validation_share=0.1))
    return make


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "Dream", "llada"])
def test_growth_keeps_old_logits_and_gives_new_rows_near_the_mean(make_folder, tmp_path, family, tied):
    before = DiffusionLM.from_pretrained(make_folder(family=family, tied=tied))
    after = grow(DiffusionLM.from_pretrained(make_folder(family=family, tied=tied)), 320, seed=3)
    again = grow(DiffusionLM.from_pretrained(make_folder(family=family, tied=tied)), 320, seed=3)
    ids = torch.randint(300, (2, 9))
    old, new = before(ids).logits, after(ids).logits
    assert new.shape == (2, 9, 320) and torch.equal(new[..., :300], old) and torch.equal(new, again(ids).logits)
    assert (after.lm_head is None) == tied and after.config.vocab_size == 320
    for matrix in {after.model.embed_tokens.weight, after.head_weight}:
        mean, spread = matrix[:300].mean(0), matrix[:300].std(0)
        assert ((matrix[300:] - mean).abs() < 0.2 * spread).all()
        assert len(matrix[300:].unique(dim=0)) == 20  # no two alike, or training could not tell them apart
    after.save_pretrained(tmp_path / "grown")
    loaded = DiffusionLM.from_pretrained(tmp_path / "grown")
    assert torch.equal(loaded(ids).logits, new) and loaded.config == after.config


def test_rows_are_needed_for_added_tokens_alone_and_in_multiples_of_64(functions):
    tokenizer = make_tokenizer(functions)
    assert rows_needed(tokenizer, 300) == 300 == rows_needed(tokenizer, 299 + 1)
    assert rows_needed(tokenizer, 512) == 512
    assert rows_needed(tokenizer, 290) == 290  # another model's tokenizer: not ours to repair
    assert rows_needed(make_tokenizer(functions, ["<|mask|>x"]), 300) == 320
    assert rows_needed(make_tokenizer(functions, [f"<|{n}|>" for n in range(21)]), 300) == 384
    assert rows_needed(make_tokenizer(functions, [f"<|{n}|>" for n in range(20)]), 300) == 320


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", [{}, {"lora_rank": 2}, {"optimizer": "muon", "objective": "elbo"},
                                  {"freeze_layers": "lm_head,embed_tokens"}], ids=str)
def test_a_model_without_a_spare_row_is_adapted_saved_and_loaded(make_folder, make_config, capsys, tied, keys):
    if "lora_rank" in keys:
        pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    result = train(make_config(make_folder(tied=tied, rename="<|file|>"), **keys))
    assert "grows from 300 to 320 rows, because the model has none for <|mask|>" in capsys.readouterr().err
    model, tokenizer = DiffusionLM.from_pretrained(result.checkpoint), load_tokenizer(result.checkpoint)
    raw = json.loads((result.checkpoint / "config.json").read_text())
    assert raw["vocab_size"] == 320 and raw["mask_token_id"] == 300 == tokenizer.mask_token_id == model.mask_token_id
    assert raw["tie_word_embeddings"] == tied == (model.lm_head is None) and tokenizer.mask_token == "<|mask|>"
    theirs = AutoModelForCausalLM.from_pretrained(result.checkpoint, dtype=torch.float32)
    assert theirs.get_input_embeddings().weight.shape == theirs.get_output_embeddings().weight.shape == (320, 32)
    assert torch.equal(theirs.get_output_embeddings().weight, model.head_weight)
    text = "def add_1(x, y):\n    return"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    out = model.diffusion_generate(ids, generation_config=MDMGenerationConfig(max_new_tokens=4, steps=4))
    assert tokenizer.decode(out.sequences[0]).startswith(text)


def test_a_reserved_token_masks_and_nothing_grows(make_folder, make_config, capsys):
    result = train(make_config(make_folder(rename="<|reserved|>"), model={"mask_token": "<|reserved|>"}))
    model, tokenizer = DiffusionLM.from_pretrained(result.checkpoint), load_tokenizer(result.checkpoint)
    assert "grows" not in capsys.readouterr().err
    assert model.config.vocab_size == 300 == len(tokenizer)
    assert tokenizer.mask_token == "<|reserved|>" and model.mask_token_id == 2


@pytest.mark.parametrize("token, message", [
    ("<|nothing|>", r"none of the tokenizer's 300 tokens; of its added tokens .*<\|reserved\|> can be chosen"),
    ("<|endoftext|>", "is the tokenizer's eos_token already")])
def test_a_mask_token_that_cannot_be_is_refused_before_data_is_read(make_folder, make_config, token, message):
    def read():
        raise AssertionError("the data is read")

    config = make_config(make_folder(rename="<|reserved|>"), model={"mask_token": token})
    with pytest.raises(UserError, match=message):
        choose_model(config, read, None)


def test_a_run_whose_vocabulary_grew_resumes_bit_for_bit(make_folder, make_config, tmp_path):
    folder = make_folder(rename="<|file|>")
    whole = train(make_config(folder, max_steps=6, output_dir=str(tmp_path / "whole")))
    train(make_config(folder, max_steps=3))
    resumed = train(make_config(folder, max_steps=6))
    assert [line["loss"] for line in resumed.history][-3:] == [line["loss"] for line in whole.history][-3:]
    first, second = (DiffusionLM.from_pretrained(result.checkpoint).state_dict() for result in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_expansion_learns_a_token_that_has_no_row_yet(make_folder, make_config):
    folder = make_folder(rename="<|file|>", added=["<|expand|>"])
    keys = {"objective": "expansion", "expand_token_id": 300}
    result = train(make_config(folder, **keys))
    assert DiffusionLM.from_pretrained(result.checkpoint).mask_token_id == 301
    with pytest.raises(UserError, match="expand_token_id 300 is a new row .* which train.lora_rank 2 does not"):
        choose_model(make_config(folder, lora_rank=2, **keys), lambda: None, None)


def test_alignment_has_a_teacher_of_the_same_vocabulary(make_folder, make_config):
    result = train(make_config(make_folder(rename="<|file|>"), repr_align_wt=1.0, max_steps=2))
    assert result.history[-1]["alignment"] > 0


@pytest.mark.slow
def test_two_processes_shard_a_vocabulary_that_grows(make_folder, make_config, tmp_path):
    folder = make_folder(rename="<|file|>")
    config = make_config(folder, data_parallel_mode="fsdp2", micro_batch_size=2, global_batch_size=4, max_steps=2)
    (tmp_path / "two.yaml").write_text(config.to_yaml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                           "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "dllm.train",
                           str(tmp_path / "two.yaml")], capture_output=True, text=True, env=environment, cwd=tmp_path,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    two = DiffusionLM.from_pretrained(tmp_path / "run" / "checkpoints" / "global_step_2" / "hf_ckpt").state_dict()
    alone = train(make_config(folder, micro_batch_size=2, global_batch_size=4, max_steps=2,
                              output_dir=str(tmp_path / "alone")))
    one = DiffusionLM.from_pretrained(alone.checkpoint).state_dict()
    assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)


@pytest.mark.parametrize("family", [name for name, its in FAMILIES.items() if "num_experts" not in its.required])
def test_every_family_without_experts_can_be_trained_from_scratch(family):
    config = shape_model(ModelGroup(family=family, tie_word_embeddings=False), 300)
    assert {name: getattr(config, name) for name in FAMILIES[family].fixed} == FAMILIES[family].fixed


@pytest.mark.parametrize("family, tied, message", [
    ("llada_moe", False, "is a mixture of experts"), ("editflow-llada", True, "cannot say tie_word_embeddings True")])
def test_a_family_that_cannot_be_said_is_refused(family, tied, message):
    with pytest.raises(UserError, match=message):
        shape_model(ModelGroup(family=family, tie_word_embeddings=tied), 300)
