"""Heads for edits: published checkpoints, folders that come back, heads for a model that has none."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dllm import DiffusionLM
from dllm.model.growth import add_edit_heads, grow
from dllm.model.layouts import Padded
from tests.dllm.tiny_models import tiny_of

FAMILIES = ["qwen2", "qwen3", "dream", "llada"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rates_and_logits_of_published_checkpoints_are_the_recorded_ones(shared, family):
    golden = shared / "golden" / "editflow"
    model = DiffusionLM.from_pretrained(golden / f"model_{family}")
    z = {key.removeprefix(family + "_"): torch.as_tensor(value) for key, value in np.load(golden / "heads.npz").items()
         if key.startswith(family)}
    seen = z["attention_mask"].bool()
    hidden = model.hidden_states(z["input_ids"], Padded(seen))
    rates, insert, substitute = (F.softplus(model.rate_head(hidden)), F.linear(hidden, model.insert_head.weight),
                                 F.linear(hidden, model.head_weight))
    if family == "dream":  # read at the token before; the first place has none
        substitute, rates[..., :2] = substitute.roll(1, 1), rates[..., :2].roll(1, 1)
        substitute[:, 0] = rates[:, 0, :2] = 0
    for got, name in ((rates[..., 0], "sub_rate_hat"), (rates[..., 1], "del_rate_hat"), (rates[..., 2], "ins_rate_hat"),
                      (insert, "ins_logits"), (substitute, "sub_logits")):
        assert (got - z[name])[seen].abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_published_folders_come_back_bit_for_bit(shared, family, tmp_path):
    before = shared / "golden" / "editflow" / f"model_{family}"
    DiffusionLM.from_pretrained(before).save_pretrained(tmp_path)
    saved, given = load_file(tmp_path / "model.safetensors"), load_file(before / "model.safetensors")
    assert saved.keys() == given.keys() and all(torch.equal(saved[name], given[name]) for name in given)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((before / "config.json").read_text())


@pytest.mark.parametrize("family, unused", [("qwen2", "lm_head.weight"), ("llada", "model.transformer.ff_out.weight")])
def test_the_head_of_the_model_that_it_came_from_is_left_out(shared, family, unused, tmp_path):
    folder = shared / "golden" / "editflow" / f"model_{family}"
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, unused: torch.ones(64, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["weight_tying" if family == "llada" else "tie_word_embeddings"] = True  # the base's, which the edits are not
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = DiffusionLM.from_pretrained(tmp_path)
    assert torch.equal(model.head_weight, weights["sub_logits.weight"]) and model.lm_head is not None


@pytest.mark.parametrize("family", ["qwen2", "llada"])
def test_any_model_can_be_given_heads_which_its_folder_keeps(family, tmp_path):
    model = tiny_of(family, vocab_size=50, head_dim=6)
    tied = model.lm_head is None
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    add_edit_heads(model, "all")
    assert torch.equal(model(ids).logits, before) and torch.equal(model.insert_head.weight, model.head_weight)
    assert model.insert_head.weight is not model.head_weight
    grow(model, 64, seed=0)
    assert model.insert_head.weight.shape == (64, model.config.hidden_size)
    model.save_pretrained(tmp_path)
    again = DiffusionLM.from_pretrained(tmp_path)
    assert again.config.edit_heads == "all" and (again.lm_head is None) == tied
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_wrong_kind_of_heads_is_refused():
    with pytest.raises(ValueError, match="edit_heads must be none or one of insert, all, not 'delete'"):
        tiny_of("qwen3", edit_heads="delete")
