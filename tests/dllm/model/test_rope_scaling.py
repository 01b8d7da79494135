"""Scalings of the rotary embedding and of queries: those of Transformers, at lengths within and beyond the original."""

import json

import pytest
import torch
from transformers import LlamaConfig, Ministral3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from dllm.errors import UserError
from dllm.model.families import read_config, write_config
from dllm.model.rotary import Rotary

SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 262144}
LENGTHS = torch.tensor([[0, 1, 7, 63, 64, 999, 16383, 16384, 16385, 100001, 262143]])
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
    "yarn": YARN, "yarn of another kind of turns": {**YARN, "beta_fast": 4.0, "beta_slow": 2.0},
    "yarn without whole pairs": {**YARN, "truncate": False},
    "yarn with a length": {**YARN, "attention_factor": 1.5},
    "yarn of equal scales": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn of different scales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn that compresses": {**YARN, "factor": 0.25, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn of few positions": {**YARN, "original_max_position_embeddings": 8},
    "yarn without the original positions": {"rope_type": "yarn", "factor": 2.0},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
def test_tables_are_those_of_transformers(name, key, theta):
    nested = {**SCALINGS[name], "rope_theta": theta}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_parameters=nested))
    raw = {"model_type": "llama", **SHAPE, key: nested}
    config = read_config(raw)
    ours = Rotary(config)
    rounding = 3e-7 if name == "llama3" else 0  # the factors are multiplied in another order
    assert torch.allclose(ours.frequencies, theirs.inv_freq, rtol=rounding, atol=0)
    assert ours.length == theirs.attention_scaling
    turn = ours(LENGTHS, torch.float32)
    for mine, its in zip((turn.cos, turn.sin), theirs(torch.zeros(1), LENGTHS), strict=True):
        assert torch.allclose(mine.squeeze(2), its, atol=1e-6 + 300 * rounding)
    assert turn.query_scale is None
    again = read_config(json.loads(json.dumps(write_config(config, "float32"))))
    assert again.rope_scaling == config.rope_scaling and again.rope_theta == theta
    made = {**vars(config), "source": {}}
    assert read_config(json.loads(json.dumps(write_config(type(config)(**made), "float32")))) == config


@pytest.mark.parametrize("kind", ["yarn", "default", "dynamic"])
def test_queries_are_scaled_as_by_transformers(kind):
    nested = {**YARN, "rope_type": kind, "rope_theta": 1e6, "llama_4_scaling_beta": 0.1}
    theirs = Ministral3Config(**SHAPE, rope_parameters=nested).rope_parameters
    config = read_config({"model_type": "mistral", **SHAPE, "rope_parameters": nested})
    scale = Rotary(config)(LENGTHS, torch.float32).query_scale
    expected = get_llama_4_attn_scale(LENGTHS, theirs["llama_4_scaling_beta"],
                                      theirs["original_max_position_embeddings"])
    assert torch.allclose(scale.transpose(1, 2), expected, atol=1e-6)
    assert scale[0, 6, 0, 0] == 1 < scale[0, 7, 0, 0] < scale[0, -1, 0, 0]


@pytest.mark.parametrize("scaling, message", [
    ({"rope_type": "longrope", "factor": 2.0}, "'longrope'.* is not supported; null and rope_type .*'dynamic' are"),
    ({"rope_type": "yarn"}, "needs a positive number as factor"),
    ({**YARN, "factor": -1.0}, "needs a positive number as factor"),
    ({**YARN, "beta_fast": "many"}, "needs a positive number as beta_fast"),
    ({**YARN, "mscale": 0}, "needs a positive number as mscale"),
    ({"rope_type": "default", "llama_4_scaling_beta": 0.1}, "needs a positive number as original_max_position"),
    ({**YARN, "llama_4_scaling_beta": -0.1}, "needs a positive number as llama_4_scaling_beta")])
def test_a_scaling_that_is_not_computed_is_refused(scaling, message):
    with pytest.raises(UserError, match=message) as error:
        read_config({"model_type": "llama", **SHAPE, "rope_scaling": scaling})
    assert "\n" not in str(error.value)
