"""DiffusionLM: recorded logits, padding, packing, folders that come back bit for bit, and folders that are broken."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dllm.diffusion_lm import DiffusionLM
from dllm.errors import UserError
from dllm.model.cache import KeyValueCache
from dllm.model.layouts import Cached, Packed, Padded, TwoCopies, Visible
from dllm.model.ragged import Call, Ragged
from tests.dllm.tiny_models import tiny

GOLDENS = ["tied_a", "untied_a", "tied_b", "untied_b"]


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden/open_dllm/forward.safetensors")


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_equal_the_originals(shared, golden, name):
    model = DiffusionLM.from_pretrained(shared / f"golden/open_dllm/ckpt_{name}")
    with torch.no_grad():
        logits = model(golden[f"{name}.input_ids"].long()).logits
        padded = model(golden[f"{name}.pad.input_ids"].long(), golden[f"{name}.pad.valid"]).logits
    assert (logits - golden[f"{name}.logits"]).abs().max() < 1e-4
    valid = golden[f"{name}.pad.valid"].bool()
    assert (padded - golden[f"{name}.pad.logits"])[valid].abs().max() < 1e-4


def test_block_length_one_is_causal(shared, golden):
    model = DiffusionLM.from_pretrained(shared / "golden/open_dllm/ckpt_untied_b")
    with torch.no_grad():
        hidden = model.hidden_states(golden["untied_b.input_ids"].long(), Padded(block_length=1))
        logits = F.linear(hidden, model.head_weight)
    assert (logits - golden["untied_b.causal_logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", GOLDENS)
def test_a_golden_folder_comes_back_bit_for_bit(shared, tmp_path, name):
    source = shared / f"golden/open_dllm/ckpt_{name}"
    DiffusionLM.from_pretrained(source).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in source.iterdir()}
    for file in source.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def ask(rows: int, length: int, asked: int, seed: int, lengths=None, side: str = "right") -> Call:
    """A call of the model; lengths: of the tokens of each row, the rest is padding."""
    drawn = torch.Generator().manual_seed(seed)
    tokens = torch.randint(61, (rows, length), generator=drawn)
    queries = torch.stack([torch.randperm(length, generator=drawn)[:asked] for _ in range(rows)])
    if lengths is None:
        return Call(tokens, Padded(queries=queries))
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    mask = mask if side == "right" else mask.flip(1)
    seen = 0 if side == "right" else length - 1
    return Call(tokens, Padded(mask, queries=queries.where(mask.gather(1, queries), torch.tensor(seen))))


def test_calls_computed_together_give_what_each_gives_alone_and_padding_is_not_computed(monkeypatch):
    model = tiny(num_hidden_layers=3)
    calls = [ask(2, 9, 3, 0), ask(3, 40, 5, 1, [40, 7, 1]), ask(4, 11, 1, 2, [3, 11, 10, 2], "left"), ask(1, 300, 8, 3)]
    with torch.no_grad():
        alone = [model.hidden_states(call.input_ids, call.layout) for call in calls]
        seen, embed = [], model.model.embed_tokens.forward
        monkeypatch.setattr(model.model.embed_tokens, "forward", lambda ids: seen.append(ids.shape) or embed(ids))
        batch = Ragged.of(calls)
        together = batch.split(model.hidden_states(batch.row, batch))
    assert seen == [(1, 2 * 9 + 48 + 26 + 300)]
    for ours, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_rows_of_similar_length_are_attended_together():
    groups = Ragged.of([ask(3, 80, 2, 0), ask(2, 300, 2, 1, [300, 150]), ask(1, 9, 4, 2), ask(2, 60, 1, 3)]).groups
    assert [group.positions.index.shape for group in groups] == [(2, 300), (5, 80), (1, 9)]
    assert [group.layout.key_mask is None for group in groups] == [False, False, True]
    lone, = Ragged.of([ask(3, 8, 2, 0), ask(2, 64, 1, 1)]).groups
    assert lone.queries.index.shape == (5, 2) and len(lone.queries.kept) == 3 * 2 + 2 * 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gives_what_it_gives_alone(side):
    model, short, long = tiny(), torch.tensor([[5, 9, 60, 7]]), torch.tensor([[4, 60, 8, 3, 60, 11, 2]])
    pad = torch.zeros(1, 3, dtype=torch.long)
    row = torch.cat((pad, short) if side == "left" else (short, pad), 1)
    mask = torch.stack((row[0] > 0, torch.ones(7, dtype=torch.bool)))
    with torch.no_grad():
        together = model(torch.cat((row, long)), mask).logits
        assert (together[0][mask[0]] - model(short).logits[0]).abs().max() < 1e-5
        assert (together[1] - model(long).logits[0]).abs().max() < 1e-5


def test_packed_documents_give_what_they_give_alone():
    model, lengths = tiny(), (3, 1, 6, 2)
    documents = [torch.randint(60, (1, n)) for n in lengths]
    cu_seqlens = torch.tensor([0, 3, 4, 10, 12], dtype=torch.int32)
    with torch.no_grad():
        packed = model.hidden_states(torch.cat(documents, 1), Packed(cu_seqlens, 6))
        rows = model.hidden_states(torch.cat(documents, 1).view(2, 6), Packed(cu_seqlens, 6))
        alone = torch.cat([model.hidden_states(document) for document in documents], 1)
    assert (packed - alone).abs().max() < 1e-5
    assert (rows.view_as(packed) - alone).abs().max() < 1e-5


def test_queries_give_the_hidden_states_of_those_positions():
    model, tokens = tiny(), torch.randint(60, (2, 9))
    queries = torch.tensor([[3, 0, 8], [5, 5, 1]])
    with torch.no_grad():
        all_positions = model.hidden_states(tokens)
        some = model.hidden_states(tokens, Padded(queries=queries))
    for b in range(2):
        assert (some[b] - all_positions[b, queries[b]]).abs().max() < 1e-5


def test_queries_of_a_causal_layout_see_nothing_after_themselves():
    model, tokens = tiny(), torch.randint(60, (2, 12))
    queries = torch.tensor([[8, 11, 9], [10, 8, 8]])
    mask = torch.arange(12) >= torch.tensor([[0], [3]])
    cache = KeyValueCache(model.config, 2, 12, model.head_weight, 1)
    with torch.no_grad():
        whole = model.hidden_states(tokens, Padded(mask, 1)).take_along_dim(queries[:, :, None], 1)
        some = model.hidden_states(tokens, Padded(mask, 1, queries))
        model.hidden_states(tokens[:, :8], Cached(cache, key_mask=mask[:, :8]))
        last = Call(tokens[:, 8:], Cached(cache, 8, None, mask, queries - 8))
        after = model.hidden_states(last.input_ids, last.layout)
        batch = Ragged.of([last, last])
        together = batch.split(model.hidden_states(batch.row, batch))
    for result in (some, after, *together):
        assert (result - whole).abs().max() < 1e-5


@pytest.mark.parametrize("layout", [
    Padded(torch.arange(9) < torch.tensor([[9], [5]])), Padded(queries=torch.tensor([[3, 0], [5, 5]])),
    Packed(torch.tensor([0, 4, 18], dtype=torch.int32), 14, block_length=3), TwoCopies(torch.arange(18).view(2, 9), 4),
    Visible([torch.ones(9, 9).tril().bool()] * 2)])
def test_activations_computed_again_give_the_same_gradients(layout):
    model, tokens, gradients = tiny(), torch.randint(60, (2, 9)), []
    for model.checkpointing in (False, True):
        loss = model.hidden_states(tokens, layout).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.model.parameters())))
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("block_length", [None, 4])
def test_a_cache_that_holds_everything_before_changes_nothing(block_length):
    """Padding on the left: the second row's positions begin at 3."""
    model, tokens = tiny(), torch.randint(60, (2, 12))
    mask = torch.arange(12) >= torch.tensor([[0], [3]])
    cache = KeyValueCache(model.config, 2, 12, model.head_weight, block_length)
    with torch.no_grad():
        whole = model.hidden_states(tokens, Padded(mask, block_length))
        first = model.hidden_states(tokens[:, :8] if block_length else tokens, Cached(
            cache, key_mask=mask[:, :8] if block_length else mask))
        last = model.hidden_states(tokens[1:, 8:], Cached(cache, 8, torch.tensor([1]), mask[1:]))
    assert (first - whole[:, :first.shape[1]])[mask[:, :first.shape[1]]].abs().max() < 1e-5
    assert (last - whole[1:, 8:]).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family, changes", [
    ("qwen2", {"qkv_bias": True, "qk_norm": False}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("llama", {"qk_norm": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True}),
    ("llama", {"qk_norm": False, "rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
])
def test_transformers_loads_what_we_save_and_agrees(tmp_path, family, changes):
    """Causal, because Transformers has no other attention for these classes."""
    from transformers import AutoModelForCausalLM

    model = tiny(family=family, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(60, (2, 40))
    with torch.no_grad():
        ours = F.linear(model.hidden_states(tokens, Padded(block_length=1)), model.head_weight)
        assert (theirs(tokens).logits - ours).abs().max() < 1e-4
        again = DiffusionLM.from_pretrained(tmp_path)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    theirs.save_pretrained(tmp_path / "theirs")  # the configuration that Transformers writes
    with torch.no_grad():
        assert torch.equal(DiffusionLM.from_pretrained(tmp_path / "theirs")(tokens).logits, model(tokens).logits)


def test_sharded_weights_load(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensor in DiffusionLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_the_mask_token_comes_from_the_tokenizer_if_config_json_has_none(tmp_path):
    tiny(mask_token_id=None).save_pretrained(tmp_path)
    assert DiffusionLM.from_pretrained(tmp_path).mask_token_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"mask_token": "<M>", "added_tokens_decoder": {"57": {"content": "<M>"}}}))
    model = DiffusionLM.from_pretrained(tmp_path)
    assert model.mask_token_id == 57
    before = (tmp_path / "config.json").read_bytes()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_bf16_is_close_to_fp32(tmp_path):
    model, tokens = tiny(), torch.randint(60, (2, 9))
    model.save_pretrained(tmp_path)
    half = DiffusionLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        difference = (half(tokens).logits.float() - model(tokens).logits).abs().max() / model(tokens).logits.abs().max()
    assert half.dtype == torch.bfloat16 and difference < 0.05
    half.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def break_config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return change


def drop_parameter(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file({**state, "extra.weight": torch.zeros(1)}, folder / "model.safetensors")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage, message", [
    (break_config(model_type="brand_new"),
     "model_type 'brand_new' is not a family this version loads; it loads qwen2, qwen3, llama"),
    (break_config(hidden_size=None), "qwen3 needs the key hidden_size"),
    (break_config(hidden_act="gelu"), "hidden_act 'gelu' is not supported for qwen3; supported: 'silu'"),
    (break_config(vocab_size=62), "lm_head.weight [61, 24], not [62, 24]"),
    (break_config(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "rope_scaling {'rope_type': 'longrope'"),
    (break_config(mask_token_id=99), "mask_token_id 99 is outside the vocabulary of 61"),
    (drop_parameter, "missing: model.norm.weight; unknown: extra.weight"),
    (truncate, "model.safetensors is truncated or corrupt"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is not a readable JSON file"),
    (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors does not exist"),
])
def test_a_broken_folder_is_refused_with_the_reason(tmp_path, damage, message):
    tiny().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        DiffusionLM.from_pretrained(tmp_path)
    assert message in str(error.value)


def test_a_missing_folder_is_refused():
    with pytest.raises(UserError, match="no/such/folder is not a folder; give a model folder"):
        DiffusionLM.from_pretrained("no/such/folder")


def test_an_input_longer_than_the_model_is_refused():
    with pytest.raises(UserError, match="the input has 9 positions, the model 8"):
        tiny(max_position_embeddings=8)(torch.zeros(1, 9, dtype=torch.long))
