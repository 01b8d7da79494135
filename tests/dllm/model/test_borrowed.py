"""Models of Transformers whose family is not ours: they equal our own layers, are adapted, used, saved, or refused."""

import json
import warnings
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dllm.config.schema import Config, DataGroup, ModelGroup, TrainGroup
from dllm.diffusion.objectives import Targets, sum_losses
from dllm.diffusion_lm import DiffusionLM
from dllm.errors import Notice, UserError
from dllm.model.families import FAMILIES, ModelConfig, read_config
from dllm.model.growth import add_edit_heads, grow
from dllm.model.layouts import Packed, Padded, TwoCopies, Visible
from dllm.model.ragged import Call, Ragged
from dllm.model.tokenizer import load_tokenizer
from dllm.training.lora import add_adapters
from dllm.training.trainer import train
from tests.dllm.training.test_growth import make_tokenizer

SHAPE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
         "initializer_range": 0.2, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
          "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
          "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
OTHERS = {  # models and what differs from SHAPE; windows are wider than the texts of the tests
    "gemma3_text": {"sliding_window": 32, "final_logit_softcapping": 5.0, "layer_types": ["sliding_attention",
                                                                                        "full_attention"]},
    "phi3": {}, "smollm3": {}, "olmo2": {}, "ministral": {"sliding_window": 32}, "qwen3_moe": EXPERTS,
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    "gpt2": {"num_key_value_heads": 4}, "deepseek_v3": LATENT}


@pytest.fixture
def make(tmp_path):
    """The folder of a random model of Transformers; its configuration is SHAPE, changed."""
    def write(name, **changes):
        torch.manual_seed(0)
        config = hf.CONFIG_MAPPING[name](**{**SHAPE, **OTHERS.get(name, {}), **changes})
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name
    return write


def load(folder, **keys) -> DiffusionLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        return DiffusionLM.from_pretrained(folder, **{"mask_token_id": 99, **keys})


def edit(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def draw(*shape):
    return torch.randint(99, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["qwen2", "qwen3", "llama"])
def pair(request, make):
    """One folder as our own layers compute it, and as Transformers' do."""
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16, "rope_theta": 1e4}
    folder = make(request.param, tie_word_embeddings=request.param != "llama",
                  **({"rope_parameters": llama3} if request.param == "llama" else {}))
    own = load(folder)
    with patch.dict(FAMILIES):
        del FAMILIES[request.param]
        lent = load(folder)
        assert lent.borrowed and not own.borrowed and type(lent.model).__module__.startswith("transformers.")
        yield own, lent


class TestEqualsOurOwnLayers:
    def test_whatever_the_layout(self, pair):
        own, lent = pair
        ids, ends = draw(2, 12), torch.tensor([0, 5, 14, 24], dtype=torch.int32)
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[0, :3] = mask[1, 9:] = False
        asked = torch.tensor([[4, 7], [8, 5]])
        packed = Packed(ends, 10)
        visible = [torch.rand(n, n, generator=torch.Generator().manual_seed(n)) < 0.7 for n in (5, 9, 10)]
        for layout, given in ((Padded(mask), ids), (Padded(mask, queries=asked), ids), (Padded(block_length=4), ids),
                              (packed, ids), (Packed(ends, 10, 3), ids), (TwoCopies(draw(2, 12), 4), ids),
                              (TwoCopies(draw(1, 24), 4, packed), ids.view(1, 24)),
                              (Visible([seen | torch.eye(len(seen), dtype=torch.bool) for seen in visible]), ids)):
            ours, theirs = own.hidden_states(given, layout), lent.hidden_states(given, layout)
            if isinstance(layout, Padded) and layout.key_mask is not None and layout.queries is None:
                ours, theirs = ours[mask], theirs[mask]
            assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        levels = [], []
        for model, kept in zip(pair, levels, strict=True):
            model.hidden_states(ids, levels=kept)
        assert_close(levels[1], levels[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_losses_and_gradients_of_block_diffusion(self, pair, checkpointing):
        clean, noisy = draw(1, 16), draw(1, 16).masked_fill(torch.arange(16) % 3 == 0, 99)
        targets = Targets(clean.flatten(), (noisy == 99).flatten(), None, None, torch.tensor(6))
        layout, found = TwoCopies(clean, 4, Packed(torch.tensor([0, 7, 16], dtype=torch.int32), 9)), []
        for model in pair:
            model.train().checkpointing = checkpointing
            loss = sum_losses(model.hidden_states(noisy, layout), model.head_weight, targets).loss
            loss.backward()
            found.append({"loss": loss, **{name: p.grad for name, p in model.named_parameters()}})
        assert found[0].keys() == found[1].keys()  # the names are the same too
        assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)

    def test_texts_to_the_token(self, pair):
        prompt, mask = draw(3, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
        for settings in ({"alg": "p2", "temperature": 0.7}, {"block_length": 4, "cache": "dual"}, {"cfg_scale": 1.0},
                         {"block_causal": True, "block_length": 4, "threshold": 0.3}):
            ours, theirs = (model.diffusion_generate(prompt, mask, max_new_tokens=8, steps=4, seed=1, **settings)
                            for model in pair)
            assert torch.equal(ours.sequences, theirs.sequences), settings
        ours, theirs = (model.infill([5, 6], [7, 8, 9], length=5, steps=5).sequences for model in pair)
        assert torch.equal(ours, theirs)
        ours, theirs = (model.perplexity_bound(prompt, seed=1) for model in pair)
        assert_close(theirs.nats, ours.nats)

    def test_several_calls_as_one(self, pair):
        calls = [Call(draw(2, 5), Padded(queries=torch.tensor([[1, 3], [0, 4]]))),
                 Call(draw(1, 9), Padded(queries=torch.tensor([[8]])))]
        batch = Ragged.of(calls)
        for model in pair:
            for together, call in zip(batch.split(model.hidden_states(batch.row, batch)), calls, strict=True):
                assert_close(together, model.hidden_states(call.input_ids, call.layout), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_models_see_both_directions_each_text_alone_and_come_back(make, tmp_path, name):
    folder = make(name)
    model, theirs = load(folder), hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, other = draw(1, 9), draw(1, 5)
    causal = model.logits(model.hidden_states(ids, Padded(block_length=1)))
    assert_close(causal, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    logits = model(ids).logits
    later = ids.clone()
    later[0, -1] = 98
    assert (model(later).logits - logits)[0, 0].abs().max() > 1e-4  # an earlier position sees a later token
    row = torch.cat((ids, other), 1)
    packed = model.hidden_states(row, Packed(torch.tensor([0, 9, 14], dtype=torch.int32), 9))
    assert_close(packed, torch.cat((model.hidden_states(ids), model.hidden_states(other)), 1), rtol=1e-4, atol=1e-5)
    padded = model(F.pad(ids, (4, 0)), F.pad(torch.ones_like(ids), (4, 0))).logits
    assert_close(padded[:, 4:], logits, rtol=1e-4, atol=1e-4)
    for settings in ({}, {"block_length": 3, "cache": "prefix"}):
        out = model.diffusion_generate(other, max_new_tokens=6, steps=6, **settings).sequences
        assert out.shape == (1, 11) and not (out == 99).all(1).any()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, logits)
    saved, before = (load_file(path / "model.safetensors") for path in (tmp_path / "again", folder))
    assert saved.keys() == before.keys() and all(torch.equal(saved[key], before[key]) for key in saved)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids).logits, theirs(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name, keys", [
    ("gemma3_text", {"enable_gradient_checkpointing": True}),
    ("phi3", {"objective": "block_diffusion", "block_length": 4}),
    ("smollm3", {"lora_rank": 2}), ("olmo2", {"objective": "edit"}), ("ministral", {"repr_align_wt": 0.1}),
    ("qwen3_moe", {"optimizer": "muon", "objective": "elbo"})])
def test_other_models_are_adapted_used_and_served(make, corpus, functions, tmp_path, name, keys):
    if "lora_rank" in keys:
        pytest.importorskip("peft")
    folder = make(name, vocab_size=300)
    make_tokenizer(functions).save_pretrained(folder)
    for file in (folder / "tokenizer.json",):
        file.write_text(file.read_text().replace("<|mask|>", "<|reserved|>"))
    settings = TrainGroup(**{"output_dir": str(tmp_path / "run"), "lr": 1e-2, "micro_batch_size": 4, "max_steps": 3,
                             "device": "cpu", "use_tensorboard": False, "precision": "fp32", **keys})
    result = train(Config(model=ModelGroup(model_path=str(folder)), train=settings,
                          data=DataGroup(train_path=str(corpus), max_seq_len=32)))
    losses = [line["loss"] for line in result.history]
    assert len(losses) == 3 and all(loss < 20 for loss in losses)
    model, tokenizer = load(result.checkpoint, mask_token_id=None), load_tokenizer(result.checkpoint)
    assert model.config.vocab_size == 320 and model.mask_token_id == tokenizer.mask_token_id == 300
    theirs = hf.AutoModelForCausalLM.from_pretrained(result.checkpoint, dtype=torch.float32)
    ids = draw(1, 8)
    with torch.no_grad():
        ours = model.logits(model.hidden_states(ids, Padded(block_length=1)))
        assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    if keys.get("objective") == "edit":
        assert model.edit(ids, max_new_tokens=4, steps=4).sequences.shape[1] >= 8
        return
    assert model.infill([1, 2], [3, 4], length=4, steps=4).sequences.shape == (1, 8)
    assert model.perplexity_bound(ids, samples=2).nats.isfinite().all()
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from dllm.generation.config import MDMGenerationConfig
    from dllm.server.app import make_app
    with TestClient(make_app(model, tokenizer, "tiny", MDMGenerationConfig(max_new_tokens=8, steps=4))) as client:
        answer = client.post("/v1/completions", json={"prompt": "def add_1(x", "max_tokens": 8})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("name, reason", [
    ("gemma3_text", "uniform_share needs a head without the soft cap 5.0 of gemma3_text"),
    ("phi", "objective=uniform computes the loss of a head without bias, and phi has one")])
def test_uniform_words_need_a_plain_head(make, corpus, functions, tmp_path, name, reason):
    folder = make(name, vocab_size=320)
    make_tokenizer(functions).save_pretrained(folder)
    with pytest.raises(UserError, match=reason):
        train(Config(model=ModelGroup(model_path=str(folder)), data=DataGroup(train_path=str(corpus), max_seq_len=32),
                     train=TrainGroup(output_dir=str(tmp_path / "run"), objective="uniform", device="cpu", max_steps=1,
                                      use_tensorboard=False, precision="fp32")))


class TestHeads:
    @torch.no_grad()
    def test_a_soft_cap_bounds_logits_losses_and_confidences(self, make):
        model = load(make("gemma3_text"))
        ids, hidden = draw(1, 6), model.hidden_states(draw(1, 6))
        capped = 5 * torch.tanh(hidden @ model.head_weight.T / 5)
        assert_close(model(ids).logits, capped)
        scored = torch.ones(6, dtype=torch.bool)
        sums = sum_losses(hidden, model.head_weight, Targets(ids[0], scored, None, None, torch.tensor(6)), softcap=5.0)
        assert_close(sums.nll, F.cross_entropy(capped[0], ids[0], reduction="sum"))
        canvas = torch.cat((ids, torch.full((1, 1), 99)), 1)
        step = next(iter(model.diffusion_steps(ids, max_new_tokens=1, steps=1, alg="maskgit_plus")))
        exact = (5 * torch.tanh(model.hidden_states(canvas)[0, -2] @ model.head_weight.T / 5)).softmax(-1)
        assert int(step.tokens[0, -1]) == int(exact.argmax())
        assert_close(step.confidence[0, -1], exact.max())

    @torch.no_grad()
    def test_a_soft_cap_shapes_what_drafts_are_verified_by(self, make):
        model = load(make("gemma3_text"))
        model.config = replace(model.config, block_causal=True, block_length=4, causal_blocks=True)
        out = model.diffusion_generate(draw(1, 6), max_new_tokens=8, alg="self_speculation", temperature=1.0, seed=3)
        logits = model.logits(model.hidden_states(out.sequences, Padded(block_length=1)))[0, 5:-1]
        logits[:, 99] = -torch.inf
        chosen = logits.softmax(-1).gather(1, out.sequences[0, 6:, None]).squeeze(1)
        assert_close(out.confidence[0, 6:], chosen, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_a_bias_is_learnt_grows_and_decides_tokens(self, make):
        model = load(make("phi"))
        model.lm_head.bias[7] = 100.0
        ids = draw(1, 4)
        assert (model(ids).logits.argmax(-1) == 7).all()
        assert (model.diffusion_generate(ids, max_new_tokens=4, steps=2).sequences[:, 4:] == 7).all()
        assert_close(grow(model, 128, seed=0).head_bias[100:], torch.full((28,), 1.0), atol=0.1, rtol=0)
        assert model(ids).logits.shape == (1, 4, 128)

    def test_guidance_and_edits_need_a_plain_product(self, make):
        model = load(make("gemma3_text"))
        with pytest.raises(UserError, match="cfg_scale combines logits .* gemma3_text have a soft cap; leave it out"):
            model.diffusion_generate(draw(1, 4), max_new_tokens=2, steps=2, cfg_scale=1.0)
        with pytest.raises(UserError, match="a bias or a soft cap, which heads for edits do not have; choose"):
            add_edit_heads(model, "insert")


REFUSED = {  # model and changes -> the reason
    "mamba": ({"intermediate_size": 64}, "takes no position_ids, which packed texts need; take another"),
    "gpt_oss": ({"num_local_experts": 4}, "has s_aux beside queries, keys and values"),
    "gemma2": ({}, "set attn_logit_softcapping to null in config.json"),
    "gptj": ({"rotary_dim": 4}, "gptj has layers that mix positions otherwise than by .* attention of its own"),
    "qwen3_next": (EXPERTS | {"shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
                              "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
                   "has layers that mix positions otherwise than by .*; take another model"),
    "llama4_text": ({"num_local_experts": 2, "intermediate_size_mlp": 48}, "attn_temperature_tuning of llama4_text"),
    "bert": ({"is_decoder": True}, "the head of BertLMHeadModel is the embedding and a bias; untie them")}


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    def test_what_cannot_be_adapted(self, make, name):
        changes, reason = REFUSED[name]
        with pytest.raises(UserError, match=reason):
            load(make(name, **changes))

    @pytest.mark.parametrize("changes, reason", [
        ({"model_type": "brand_new"}, "model_type 'brand_new' is not a family this version loads; it loads qwen2, .* "
                                      r"and the causal language models of Transformers \d.*: pip install -U transf"),
        ({"model_type": None}, "model_type None is not a family"),
        ({"model_type": "gemma3"}, "gemma3 is more than a language model"),
        ({"model_type": "bart"}, "bart is more than a language model, it has an encoder too; take a causal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported for olmo2"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "Transformers cannot .*spiral.*; correct"),
        ({"num_hidden_layers": "two"}, "Transformers cannot read it as olmo2 .*; correct the file"),
        ({"eos_token_id": "end"}, "eos_token_id must be a whole number"),
        ({"mask_token_id": 1000}, "mask_token_id 1000 is outside the vocabulary of 100"),
        ({"model_type": "gemma2", "final_logit_softcapping": 5.0, "uniform_share": 1}, "uniform_share needs a head "
                                                                                       "without the soft cap 5.0"),
        ({"self_conditioning": True}, "self_conditioning adds to embeddings of our own layers, and those of olmo2"),
        ({"hidden_size": 64}, r"the parameters are not those of config.json. .*of another shape: lm_head\.weight")],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
    def test_configurations(self, make, changes, reason):
        folder = make("olmo2")
        edit(folder, **changes)
        with pytest.raises(UserError, match=reason) as told:
            load(folder, mask_token_id=None)
        assert "\n" not in str(told.value)

    def test_a_model_that_numbers_the_tokens_itself(self, make, monkeypatch):
        forward = hf.GPT2Model.forward

        def without_positions(self, *args, position_ids, **kwargs):
            return forward(self, *args, **kwargs)

        folder = make("gpt2")
        monkeypatch.setattr(hf.GPT2Model, "forward", without_positions)
        with pytest.raises(UserError, match="numbers the tokens of a batch itself, not by position_ids"):
            load(folder)

    def test_weights_that_are_missing_or_unknown(self, make):
        folder = make("olmo2")
        state = load_file(folder / "model.safetensors")
        state["more"] = state.pop("model.norm.weight")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"missing: model\.norm\.weight; unknown: more$"):
            load(folder)

    def test_what_a_borrowed_backbone_does_not_have(self, make, monkeypatch):
        folder = make("olmo2")
        with pytest.raises(UserError, match="layers_backend liger replaces our own layers, and those of olmo2 are Tra"):
            monkeypatch.setattr("dllm.model.liger.check_backend", lambda name: None)
            load(folder, layers_backend="liger")
        with pytest.raises(UserError, match="train.lora_rank adapts the linear maps inside the layers, and those of g"):
            pytest.importorskip("peft")
            add_adapters(load(make("gpt2")), 2, 4.0)
        with pytest.raises(UserError, match="family 'spiral' is none of qwen2, .* is made from its config.json"):
            ModelConfig(family="spiral", vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                        num_attention_heads=1, num_key_value_heads=1, head_dim=8)
        latent = load(make("deepseek_v3"))
        latent.config = latent.config.__class__(**{**vars(latent.config), "head_dim": 8})
        with pytest.raises(UserError, match="a cache holds keys and values of one shape, and the layers of this model"):
            latent.diffusion_generate(draw(1, 4), max_new_tokens=4, steps=4, block_length=2, cache="dual")


@pytest.mark.parametrize("name, changes, told", [
    ("gemma3_text", {"sliding_window": 16}, "gemma3_text has layers that see 16 positions; here every layer sees the"),
    ("ministral", {"sliding_window": 64}, None), ("olmo2", {}, None),
    ("mistral", {"sliding_window": 16}, "mistral has layers that see 16 positions; here every layer sees the whole"),
    ("phi3", {"max_position_embeddings": 128, "original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32}}, "no text may be longer, though config.json says 128")])
def test_differences_from_the_original_are_told_once(make, name, changes, told):
    folder = make(name, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = DiffusionLM.from_pretrained(folder).config
    notices = [str(one.message) for one in caught if issubclass(one.category, Notice)]
    assert len(notices) == (told is not None) and (told is None or told in notices[0])
    assert config.max_position_embeddings == (32 if name == "phi3" else 64)
    edit(folder, mask_token_id=99)  # as an adapted model has it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DiffusionLM.from_pretrained(folder)
    assert sum(issubclass(one.category, Notice) for one in caught) == (name == "phi3")


def test_of_a_model_that_sees_the_language_model_is_taken(make, tmp_path):
    inner = hf.Gemma3TextConfig(**SHAPE, sliding_window=64)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "vision_use_head": False}
    seeing = hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(
        text_config=inner.to_dict(), vision_config=vision, mm_tokens_per_image=4, eos_token_id=[0, 1])).eval()
    seeing.save_pretrained(tmp_path / "seeing")
    with pytest.warns(Notice, match="of gemma3 the language model is taken alone, gemma3_text, which neither sees nor"):
        model = DiffusionLM.from_pretrained(tmp_path / "seeing")
    ids = draw(1, 6)
    causal = model.logits(model.hidden_states(ids, Padded(block_length=1)))
    assert_close(causal, seeing(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.family == "gemma3_text" and model.config.eos_token_id == [0, 1]
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


def test_nothing_is_drawn_at_random_in_training(make):
    model = load(make("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    ids = draw(1, 6)
    assert torch.equal(model(ids).logits, model(ids).logits)
    raw = json.loads(json.dumps(model.config.source))
    assert raw["resid_pdrop"] == 0.5 and read_config(raw).borrowed  # config.json keeps it for other programs


def test_code_of_the_folder_is_never_run(make):
    folder = make("olmo2")
    (folder / "modeling_x.py").write_text("raise RuntimeError('code of the folder ran')")
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"})
    assert load(folder)(draw(1, 4)).logits.isfinite().all()
