"""Edit flows learn: a model of a few minutes repairs lines, and fills gaps of unknown length better than masks do."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm import DiffusionLM, MDMGenerationConfig
from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.generation.infilling import Gap, fill
from dllm.training.trainer import train

pytestmark = pytest.mark.slow
LINES = ("for i in range(n):", "return x + y", "import numpy as np", "if x is none:", "print(total)", "while true:",
         "x = sorted(items)", "def main(args):")
LETTERS = "abcdefghijklmnopqrstuvwxyz ():+=."
SPECIAL = ("[MASK]", "[BEGIN]", "[END]")
BEGIN, END = 1, 2


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """A tokenizer of single characters."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *LETTERS))}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    folder = tmp_path_factory.mktemp("letters")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=SPECIAL[0], bos_token=SPECIAL[1],
                            eos_token=SPECIAL[2], pad_token=SPECIAL[2]).save_pretrained(folder)
    return folder


def ids_of(text: str) -> list[int]:
    return [len(SPECIAL) + LETTERS.index(letter) for letter in text]


def learn(folder: Path, letters: Path, path: Path, width: int, steps: int, *, data: dict, **keys) -> DiffusionLM:
    result = train(Config(
        model=ModelGroup(tokenizer_path=str(letters), hidden_size=width, intermediate_size=2 * width,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
                         shift_logits=False, initializer_range=0.06),
        data=DataGroup(train_path=str(path), validation_share=0.0, **data),
        train=TrainGroup(output_dir=str(folder), optimizer="muon", lr=0.01, muon_lr=0.0177, lr_decay_style="linear",
                         lr_warmup_ratio=0.03, max_steps=steps, num_train_epochs=10_000, device="cpu",
                         precision="fp32", use_tensorboard=False, save_hf_weights=False, **keys)))
    return DiffusionLM.from_pretrained(result.checkpoint)


def damage(draw: random.Random, line: str, chance: float) -> str:
    """Each character is missing, wrong, or has another before it, with this chance each."""
    text = ""
    for letter in line:
        text += draw.choice(LETTERS) if draw.random() < chance else ""
        u = draw.random()
        text += "" if u < chance else draw.choice(LETTERS) if u < 2 * chance else letter
    return text


def test_lines_with_inserted_missing_and_wrong_characters_are_repaired(letters, tmp_path):
    draw = random.Random(0)
    pairs = [(damage(draw, line, 0.2 * draw.random()), line) for _ in range(4000) for line in LINES]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"before": a, "after": b}) + "\n" for a, b in pairs))
    model = learn(tmp_path / "run", letters, tmp_path / "pairs.jsonl", 96, 1400, objective="edit",
                  micro_batch_size=32, data={"data_type": "edits", "max_seq_len": 32})
    draw = random.Random(1)
    wanted = [draw.choice(LINES) for _ in range(200)]
    broken = [damage(draw, line, 0.04) for line in wanted]
    texts = [[BEGIN, *ids_of(line), END] for line in broken]
    longest = max(map(len, texts))
    ids, there, editable = (torch.tensor([row + [0] * (longest - len(row)) for row in rows]) for rows in (
        texts, [[1] * len(text) for text in texts], [[0, *[1] * (len(text) - 2), 0] for text in texts]))
    out = model.edit(ids, there, editable=editable, steps=100, seed=0, flow_schedule="linear").rows()
    right = sum(row.tolist() == [BEGIN, *ids_of(line), END] for row, line in zip(out, wanted, strict=True))
    assert sum(a == b for a, b in zip(broken, wanted, strict=True)) < 60  # most were damaged
    assert right >= 190, f"{right} of 200 lines"  # 95%


def test_insertions_fill_gaps_of_unknown_length_better_than_masks_of_the_surest_length(letters, tmp_path):
    """The same lines, shape and tokens of the canvas: 290,000 of each. A canvas of insertions has fewer in a step."""
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES for _ in range(40)))
    draw, gaps, answers = random.Random(5), [], []
    for _ in range(120):
        line = draw.choice(LINES)
        start = draw.randint(1, len(line) - 1)
        end = draw.randint(start + 1, min(len(line), start + 8))
        gaps.append(Gap(torch.tensor(ids_of(line[:start])), torch.tensor([*ids_of(line[end:]), END]), "auto"))
        answers.append(ids_of(line[start:end]))
    right = {}
    for objective, steps, config in (
            ("edit", 1000, {"alg": "edit", "flow_schedule": "linear", "steps": 100, "max_infill_length": 16}),
            ("mdm", 640, {"alg": "maskgit_plus", "steps": 16, "infill_lengths": tuple(range(1, 13))})):
        model = learn(tmp_path / objective, letters, data, 64, steps, objective=objective, micro_batch_size=16,
                      data={"max_seq_len": 32})
        filled = fill(model, gaps, MDMGenerationConfig(seed=0, **config)).answers
        right[objective] = sum(got.tolist() == answer for got, answer in zip(filled, answers, strict=True))
    assert right["edit"] >= 108 and right["edit"] > right["mdm"], right  # of 120
