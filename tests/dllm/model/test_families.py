"""Every published family: recorded logits, folders that come back bit for bit, and folders that are broken."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.model.experts import MixtureOfExperts, Router
from dllm.model.families import FAMILIES, ModelConfig, read_config, write_config
from dllm.model.layouts import Padded, TwoCopies
from dllm.model.weights import to_ours, to_published
from tests.dllm.tiny_models import tiny_of

GOLDENS = ["dream", "dreamon", "llada", "llada_moe", "llada2", "a2d_qwen2", "a2d_qwen3"]


@pytest.fixture
def checkpoint(shared):
    return lambda name: shared / "golden" / "families" / name / "checkpoint"


@pytest.fixture
def broken(checkpoint, tmp_path):
    return lambda name: shutil.copytree(checkpoint(name), tmp_path / "broken")


def edit(file, **changes):
    raw = json.loads(file.read_text())
    for key, value in changes.items():
        raw.pop(key, None) if value is ... else raw.__setitem__(key, value)
    file.write_text(json.dumps(raw))


EXPERTS = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 16}


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != "dreamon"])
@torch.no_grad()
def test_logits_equal_the_originals(shared, checkpoint, name):
    model = DiffusionLM.from_pretrained(checkpoint(name))
    golden = {key: torch.from_numpy(value) for key, value
              in np.load(shared / "golden" / "families" / name / "forward.npz").items()}
    ids = golden["input_ids"]
    if name == "llada2":
        hidden = model.hidden_states(ids, Padded(block_length=int(golden["block_length"])))
        assert (F.linear(hidden, model.head_weight) - golden["logits_block_causal"]).abs().max() < 1e-4
        assert (model(ids).logits - golden["logits_full_attention"]).abs().max() < 1e-4
        return
    assert (model(ids).logits - golden["logits"]).abs().max() < 1e-4
    padded = model(golden["masked_input_ids"], golden["attention_mask"]).logits
    tokens = golden.get("valid_rows", golden["attention_mask"]).bool()
    assert (padded - golden["masked_logits"])[tokens].abs().max() < 1e-4


@pytest.mark.parametrize("name", ["a2d_qwen2", "a2d_qwen3"])
@torch.no_grad()
def test_logits_of_a_noisy_copy_beside_the_clean_one_equal_the_originals(shared, checkpoint, name):
    model = DiffusionLM.from_pretrained(checkpoint(name))
    golden = {key: torch.from_numpy(value) for key, value
              in np.load(shared / "golden" / "families" / name / "forward.npz").items() if key.startswith("bd_")}
    noisy, clean = golden["bd_input_ids"].chunk(2, dim=1)
    block_length = int(golden["bd_mask"][0, 0, 0].sum())  # the first noisy position sees its block alone
    assert 1 < block_length < noisy.shape[1]
    hidden = model.hidden_states(noisy, TwoCopies(clean, block_length))
    expected = golden["bd_logits"].chunk(2, dim=1)[0]
    assert (F.linear(hidden, model.head_weight) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", GOLDENS)
def test_a_folder_comes_back(checkpoint, tmp_path, name):
    source = checkpoint(name)
    DiffusionLM.from_pretrained(source).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in source.iterdir()}
    assert (tmp_path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    for file in source.glob("*.json"):
        assert json.loads((tmp_path / file.name).read_text()) == json.loads(file.read_text())


@pytest.mark.parametrize("family, changes", [
    ("Dream", {}), ("a2d-qwen2", {}), ("a2d-qwen3", {}), ("sdar", {"block_length": 8}),
    ("llama", {"block_causal": True, "block_length": 4, "causal_blocks": True}),
    ("llada", {"head_dim": 6}),
    ("llada_moe", {**EXPERTS, "first_k_dense_replace": 1, "router_bias": True}),
    ("llada2_moe", {**EXPERTS, "num_shared_experts": 2, "n_group": 4, "topk_group": 2, "router_bias": True,
                    "partial_rotary_factor": 0.5, "first_k_dense_replace": 1})])
def test_a_model_of_any_family_made_here_comes_back(family, changes, tmp_path):
    model = tiny_of(family, **changes)
    model.save_pretrained(tmp_path)
    again = DiffusionLM.from_pretrained(tmp_path)
    for name in ("family", "hidden_size", "num_experts", "num_shared_experts", "first_k_dense_replace", "block_length",
                 "block_causal", "causal_blocks", "shift_logits", "partial_rotary_factor", "router_bias"):
        assert getattr(again.config, name) == getattr(model.config, name), name
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == to_published(model.config, model.state_dict()).keys()
    assert write_config(again.config, "float32") == json.loads((tmp_path / "config.json").read_text())


def test_a_shape_that_the_family_cannot_express_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="config.json of llada cannot say head_dim 8; it would be read as 6"):
        tiny_of("llada").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="config.json of Dream cannot say num_experts 12"):
        tiny_of("Dream", **EXPERTS).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_published_names_of_llada(checkpoint):
    model = DiffusionLM.from_pretrained(checkpoint("llada"))
    published = load_file(checkpoint("llada") / "model.safetensors")
    assert torch.equal(model.lm_head.weight, published["model.transformer.ff_out.weight"])
    layer = model.model.layers[1]
    assert torch.equal(layer.mlp.down_proj.weight, published["model.transformer.blocks.1.ff_out.weight"])
    assert torch.equal(layer.mlp.gate_proj.weight, published["model.transformer.blocks.1.ff_proj.weight"])
    back = to_published(model.config, to_ours(model.config, published))
    assert back.keys() == published.keys() and all(torch.equal(back[name], published[name]) for name in back)


def experts_one_by_one(mixture: MixtureOfExperts, x):
    """float64, token by token."""
    out = torch.zeros_like(x, dtype=torch.float64)
    weights, chosen = mixture.gate(x)
    experts = mixture.experts.double()
    for n in range(len(x)):
        for weight, expert in zip(weights[n].double(), chosen[n], strict=True):
            inner = F.silu(experts.gate_proj[expert] @ x[n].double()) * (experts.up_proj[expert] @ x[n].double())
            out[n] += weight * (experts.down_proj[expert] @ inner)
    return out


@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_a_mixture_is_its_experts_one_by_one_and_its_gradient_exact(tokens):
    mixture = tiny_of("llada_moe", **EXPERTS).model.layers[0].mlp
    x = torch.randn(tokens, 24, requires_grad=True)
    out = mixture(x)
    upstream = torch.randn_like(out)
    parameters = list(mixture.parameters())
    gradients = torch.autograd.grad(out, [x, *parameters], upstream)
    exact = experts_one_by_one(mixture, x)
    assert (out - exact).abs().max() < 1e-5
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, [x, *mixture.parameters()], upstream.double()),
                            strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())


def test_routers_choose_as_published():
    x = torch.eye(4)
    config = ModelConfig(family="llada2_moe", vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, head_dim=4, num_experts=4, num_experts_per_tok=2,
                         moe_intermediate_size=8, router_score="sigmoid", router_bias=True, n_group=2, topk_group=1,
                         norm_topk_prob=True, routed_scaling_factor=2.5)
    router = Router(config)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[3.0, 0, 0, 0], [-3, 0, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0]]))
        weights, experts = router(x)
        assert sorted(experts[0].tolist()) == [2, 3]  # two best of their group: 0.88 + 0.73; other group: 0.95 + 0.05
        best = torch.tensor([2.0, 1.0]).sigmoid()
        assert torch.allclose(weights[0].sort(descending=True).values, 2.5 * best / best.sum())
        router.expert_bias.copy_(torch.tensor([1.0, 1, 0, 0]))
        weights, experts = router(x)
        assert sorted(experts[0].tolist()) == [0, 1]  # the bias chooses, but weighs nothing
        best = torch.tensor([3.0, -3.0]).sigmoid()
        assert torch.allclose(weights[0].sort(descending=True).values, 2.5 * best / best.sum())


@pytest.mark.parametrize("name, changes, message", [
    ("llada", {"d_model": ...}, "llada needs the key d_model"),
    ("llada", {"block_type": "sequential"}, "block_type 'sequential' is not supported for llada; supported: 'llama'"),
    ("llada", {"model_type": "lama"}, "model_type 'lama' is not a family this version loads; it loads qwen2"),
    ("llada_moe", {"num_experts_per_tok": 17}, "between 1 and 16 num_experts_per_tok, not 17"),
    ("llada_moe", {"moe_layer_freq": [1, 0, 1]}, r"moe_layer_freq \[1, 0, 1\] is not supported; .* zeros, then ones"),
    ("llada2", {"n_group": 3}, "16 experts in n_group 3 groups"),
    ("llada2", {"partial_rotary_factor": 0.2}, r"turns 3 numbers of each head \(head_dim 16\); it must be"),
    ("llada2", {"score_function": "softmax"}, "score_function 'softmax' is not supported for llada2_moe"),
])
def test_a_configuration_that_cannot_work_is_refused(broken, name, changes, message):
    folder = broken(name)
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        DiffusionLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_parameters_that_are_missing_extra_or_misshapen_are_named_as_published(broken):
    folder = broken("llada2")
    state = load_file(folder / "model.safetensors")
    taken = state.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight$"):
        DiffusionLM.from_pretrained(folder)
    name = "model.layers.0.attention.query_key_value.weight"
    save_file({**state, name: state[name][:-1].contiguous(), "other.up_proj.weight": taken, "more": taken.clone()},
              folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\S*; unknown: more, other\.up_proj\.weight; "
                                        r"of another shape: \S*query_key_value\.weight \[127, 64\], not \[128, 64\]$"):
        DiffusionLM.from_pretrained(folder)


def test_llada2_without_query_norms_is_told_by_its_parameters(broken):
    folder = broken("llada2")
    state = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "layernorm" not in name
             or "attention." not in name.replace("post_attention_layernorm", "")}
    save_file(state, folder / "model.safetensors")
    model = DiffusionLM.from_pretrained(folder)
    assert not model.config.qk_norm and model(torch.arange(5)[None]).logits.isfinite().all()


def test_every_family_names_what_its_configuration_needs():
    for name, family in FAMILIES.items():
        told = {"llada_moe": {"num_experts": 4}, "idlm": {"use_regular_causal": True}}.get(
            name, {"architectures": [family.architecture]})
        with pytest.raises(UserError, match=f"{name} needs the keys"):
            read_config({"model_type": family.model_type or name, **told})
