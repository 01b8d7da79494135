"""DiffusionGemma against what Transformers' own recorded: forward passes, both layouts of its folder, bad folders."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dllm.diffusion_lm import DiffusionLM
from dllm.errors import Notice, UserError
from dllm.model.diffusion_gemma import Context, DiffusionGemma
from dllm.model.gemma_config import read_gemma_config
from dllm.model.layouts import Packed, Padded

pytestmark = pytest.mark.filterwarnings("ignore:.*vision tower")
LOGITS = 1e-4  # of order 10


@pytest.fixture(scope="module")
def goldens(shared):
    return shared / "golden" / "diffusion_gemma"


@pytest.fixture(scope="module", params=["random", "trained"])
def recorded(goldens, request):
    """A model, and what was recorded of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        model = DiffusionGemma.from_pretrained(goldens / f"model_{request.param}")
    return model, {name: torch.from_numpy(array) for name, array in
                   np.load(goldens / f"forward_{request.param}.npz").items()}


def logits(model, hidden):
    cap = model.config.logit_softcap
    return torch.tanh(F.linear(hidden, model.head_weight) / cap) * cap


def soft(model, logits):
    return logits.softmax(-1) @ model.head_weight


def encoded(model, ids, mask=None, whole=False):
    context = Context(whole)
    model.encode(ids.long(), context, mask)
    return context


@torch.no_grad()
@pytest.mark.parametrize("tag", ["short", "window", "long"])  # of the context, against the sliding window
def test_both_passes_give_the_recorded_logits(recorded, tag):
    model, golden = recorded
    ids, canvas = golden[f"{tag}.ids"].long(), golden[f"{tag}.canvas"].long()
    context = encoded(model, ids)
    signal = golden.get(f"{tag}.sc_logits", golden[f"{tag}.logits"] / 0.8)
    got = {"encoder_logits": model(ids).logits, "logits": logits(model, model.decode(canvas, context)),
           "logits_sc": logits(model, model.decode(canvas, context, soft(model, signal)))}
    if f"{tag}.encoder_hidden" in golden:
        hidden = model.hidden_states(ids, Padded(block_length=1))
        assert (hidden - golden[f"{tag}.encoder_hidden"]).abs().max() < 2e-5
        kept = golden[f"{tag}.sc_mask"].view(-1, 1, 1)
        got["logits_sc_masked"] = logits(model, model.decode(canvas, context, soft(model, signal) * kept))
    for name, found in got.items():
        assert (found - golden[f"{tag}.{name}"]).abs().max() < LOGITS, name


@torch.no_grad()
def test_padding_takes_no_position(recorded):
    model, golden = recorded
    mask = golden["padded.attention_mask"].bool()
    context = encoded(model, golden["padded.ids"], mask)
    assert (logits(model, model.decode(golden["padded.canvas"].long(), context))
            - golden["padded.logits"]).abs().max() < LOGITS
    found = model(golden["padded.ids"].long(), mask).logits
    assert (found - golden["padded.encoder_logits"])[mask].abs().max() < LOGITS


@torch.no_grad()
def test_a_context_grows_by_pieces_of_any_length(recorded, monkeypatch):
    model, golden = recorded
    context = encoded(model, golden["second.ids"])
    model.encode(golden["second.first_canvas"].long(), context)
    canvas = golden["second.canvas"].long()
    assert (logits(model, model.decode(canvas, context)) - golden["second.logits"]).abs().max() < LOGITS
    monkeypatch.setattr("dllm.model.diffusion_gemma.PIECE", 7)
    pieces = encoded(model, torch.cat((golden["second.ids"], golden["second.first_canvas"]), 1))
    assert (logits(model, model.decode(canvas, pieces)) - golden["second.logits"]).abs().max() < LOGITS
    assert all(k.shape[1] == 9 for k, _ in pieces.layers[:2])  # the window of 10 without the canvas' own token


@torch.no_grad()
def test_a_whole_context_serves_a_canvas_in_the_middle_of_it(recorded):
    model, golden = recorded
    ids, canvas = golden["long.ids"].long(), golden["long.canvas"].long()
    context = encoded(model, torch.cat((ids, canvas), 1), whole=True)
    before = (torch.arange(context.length) < ids.shape[1]).expand(2, -1)
    found = logits(model, model.decode(canvas, context, key_mask=before))
    assert (found - golden["long.logits"]).abs().max() < LOGITS
    one = context.take(torch.tensor([1]))
    alone = logits(model, model.decode(canvas[1:], one, key_mask=before[1:]))
    assert (alone - golden["long.logits"][1:]).abs().max() < LOGITS


@torch.no_grad()
def test_the_parts_of_a_layer(goldens):
    golden = {name: torch.from_numpy(array) for name, array in np.load(goldens / "components_random.npz").items()}
    model = DiffusionGemma.from_pretrained(goldens / "model_random")
    for kind, size in (("sliding_attention", 16), ("full_attention", 32)):
        cos, sin = model._rotary((kind, size), golden["rope.positions"].view(1, -1), torch.float32)
        assert (cos.squeeze(2) - golden[f"rope.{kind}.cos"]).abs().max() < 1e-6
        assert (sin.squeeze(2) - golden[f"rope.{kind}.sin"]).abs().max() < 1e-6
    found: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.decoder.layers):
        layer.register_forward_hook(lambda _, args, out, index=index: found.update({f"layer{index}.out": out[0]}))
        layer.router.register_forward_hook(
            lambda _, args, out, index=index: found.update({f"layer{index}.expert_ids": out[2]}))
    model.model.decoder.self_conditioning.register_forward_hook(
        lambda _, args, out: found.update({"self_conditioned": out}))
    context = encoded(model, golden["ids"] if "ids" in golden else golden["encoder.ids"])
    for index, (k, v) in enumerate(context.layers):
        assert (k.transpose(1, 2) - golden[f"cache.layer{index}.keys"]).abs().max() < 2e-5
        assert (v.transpose(1, 2) - golden[f"cache.layer{index}.values"]).abs().max() < 2e-5
    model.decode(golden["canvas"].long(), context, soft(model, golden["sc_logits"]))
    for name, value in found.items():
        wanted = golden[f"decoder.{name}"]
        if value.is_floating_point():
            assert (value.view(wanted.shape) - wanted).abs().max() < 2e-5 * max(1, wanted.abs().max()), name
        else:
            assert (value.view(wanted.shape).sort(-1).values == wanted.sort(-1).values).all(), name


@torch.no_grad()
@pytest.mark.parametrize("dtype, error", [("bfloat16", 0.5), ("float16", 0.1), ("float64", LOGITS)])
def test_other_dtypes_are_as_near_as_they_can_be(goldens, dtype, error):
    golden = {name: torch.from_numpy(array) for name, array in np.load(goldens / "forward_trained.npz").items()}
    model = DiffusionGemma.from_pretrained(goldens / "model_trained", dtype)
    found = logits(model, model.decode(golden["long.canvas"].long(), encoded(model, golden["long.ids"])))
    assert found.dtype == model.dtype and (found - golden["long.logits"]).abs().mean() < error


def test_both_layouts_of_the_configuration_are_one(goldens):
    google = json.loads((goldens / "model_random" / "config.json").read_text())
    theirs = json.loads((goldens / "config_as_transformers_5_23_writes_it.json").read_text())
    assert read_gemma_config(google) == read_gemma_config(theirs)
    torch.manual_seed(0)
    one = DiffusionGemma(read_gemma_config(google))
    torch.manual_seed(0)
    other = DiffusionGemma(read_gemma_config(theirs))
    ids = torch.arange(30).view(2, 15)
    assert one.windows == other.windows == [10, 10, None, None]
    assert torch.equal(one(ids).logits, other(ids).logits)


@torch.no_grad()
def test_a_saved_folder_is_loaded_by_us_and_by_transformers(goldens, tmp_path):
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionLM.from_pretrained(goldens / "model_trained")
    model.save_pretrained(tmp_path)
    again = DiffusionLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(mine, saved) for mine, saved in zip(model.state_dict().values(),
                                                               again.state_dict().values(), strict=True))
    assert (again.end_token_ids, again.mask_token_id, again.generation_defaults["t_max"]) == ([1, 6, 7], None, 0.8)
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, canvas = torch.arange(26).view(2, 13) + 20, torch.arange(24).view(2, 12) + 100
    wanted = theirs(input_ids=ids, decoder_input_ids=canvas).logits
    assert (logits(again, again.decode(canvas, encoded(again, ids))) - wanted).abs().max() < LOGITS


@pytest.fixture
def folder(goldens, tmp_path):
    return shutil.copytree(goldens / "model_random", tmp_path / "model", copy_function=shutil.copyfile)


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_vision_tower_is_named_and_left_out(folder):
    with pytest.warns(Notice, match=r"the 16 tensors of the vision tower .* are left out") as told:
        model = DiffusionGemma.from_pretrained(folder)
    assert len(told) == 1 and not [name for name in model.state_dict() if "vision" in name]


def test_equal_copies_of_tied_weights_are_dropped_and_others_refused(folder):
    embedding = "model.decoder.embed_tokens.weight"
    key = "model.encoder.language_model.layers.0.self_attn.k_proj.weight"

    def copy(state):
        state["lm_head.weight"] = state[embedding].clone()
        state[key] = state[key.replace("encoder.language_model", "decoder")].clone()

    change_weights(folder, copy)
    assert key not in DiffusionGemma.from_pretrained(folder).state_dict()
    change_weights(folder, lambda state: state[key].add_(1))
    with pytest.raises(UserError, match=r"encoder.*k_proj.weight differs from model\.decoder.*ties them"):
        DiffusionGemma.from_pretrained(folder)
    change_weights(folder, lambda state: (state.pop(key), state["lm_head.weight"].add_(1)))
    with pytest.raises(UserError, match="lm_head.weight differs from model.decoder.embed_tokens.weight"):
        DiffusionGemma.from_pretrained(folder)


def test_missing_and_quantised_weights_are_refused(folder):
    name = "model.encoder.language_model.layers.1.layer_scalar"
    change_weights(folder, lambda state: state.pop(name))
    with pytest.raises(UserError, match=rf"missing: {name}"):
        DiffusionGemma.from_pretrained(folder)
    change_weights(folder, lambda state: state.update({name: torch.ones(1, dtype=torch.int8)}))
    with pytest.raises(UserError, match=r"layer_scalar is quantised \(torch.int8\)"):
        DiffusionGemma.from_pretrained(folder)


@pytest.mark.parametrize("changes, message", [
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' is not supported"),
    ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
    ({"enable_moe_block": False}, "enable_moe_block false is not supported"),
    ({"num_experts": None}, "text_config needs the key num_experts"),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {
        "rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}}}, "rope_type 'linear' of full_attention"),
    ({"hidden_size": "wide"}, "text_config is none of DiffusionGemma"),
])
def test_what_is_not_computed_is_refused_by_name(goldens, changes, message):
    raw = json.loads((goldens / "model_random" / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        read_gemma_config({**raw, "text_config": {**raw["text_config"], **changes}})


def test_quantised_and_unknown_keys(goldens):
    raw = json.loads((goldens / "model_random" / "config.json").read_text())
    with pytest.raises(UserError, match="quantization_config .* is not supported for diffusion_gemma"):
        read_gemma_config({**raw, "quantization_config": {"quant_method": "fp8"}})
    with pytest.warns(Notice, match="no configuration key 'sparkle', ignored"):
        read_gemma_config({**raw, "text_config": {**raw["text_config"], "sparkle": 3}})


def test_no_mask_token_is_taken(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "mask_token": "<mask>", "added_tokens_decoder": {"4": {"content": "<mask>", "special": True}}}))
    assert DiffusionLM.from_pretrained(folder).mask_token_id is None
    for named in ({"mask_token_id": 4}, {"mask_token": "<mask>"}):
        with pytest.raises(UserError, match="DiffusionGemma has no mask token"):
            DiffusionLM.from_pretrained(folder, **named)


def test_other_layouts_and_longer_inputs_are_refused(goldens):
    model = DiffusionGemma.from_pretrained(goldens / "model_random")
    ids = torch.zeros(1, 4, dtype=torch.long)
    for layout in (Padded(), Packed(torch.tensor([0, 4], dtype=torch.int32), 4)):
        with pytest.raises(UserError, match="sees what is before each token, in padded rows"):
            model.hidden_states(ids, layout)
    with pytest.raises(UserError, match="the input has 513 positions, the model 512"):
        model(torch.zeros(1, 513, dtype=torch.long))
