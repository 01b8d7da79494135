"""Calls as the world writes them: prompts of any kind, Open-dLLM's and Dream's forms, other defaults of torch."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from dllm.constraints import AllowedTokens
from dllm.errors import UserError
from dllm.generation.config import MDMGenerationConfig
from tests.dllm.tiny_models import tiny

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
SHORT = {"max_new_tokens": 4, "steps": 4}


@pytest.mark.parametrize("inputs", [
    IDS.int(), IDS.byte(), IDS.short(), IDS.numpy(), IDS.numpy().astype(np.uint16), IDS.tolist(), tuple(IDS.tolist()),
    IDS.flip(0).numpy()[::-1], IDS.numpy().astype(">i4"), np.array([[5, 6, 7], [8, 9, 10]], dtype=object),
    list(IDS), list(IDS.numpy()), {"input_ids": IDS}, BatchEncoding({"input_ids": IDS.tolist()}),
    BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "token_type_ids": IDS * 0})])
def test_prompts_of_any_kind_give_the_same_texts(inputs):
    model = tiny()
    expected = model.diffusion_generate(IDS, **SHORT).sequences
    assert torch.equal(model.diffusion_generate(inputs, **SHORT).sequences, expected)


@pytest.mark.parametrize("inputs", [[5, 6, 7], (5, 6, 7), IDS[0], IDS[0].numpy(), list(IDS[0]),
                                    BatchEncoding({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]})])
def test_one_prompt_needs_no_batch(inputs):
    model = tiny()
    assert torch.equal(model.diffusion_generate(inputs, **SHORT).sequences,
                       model.diffusion_generate(IDS[:1], **SHORT).sequences)
    assert torch.equal(model.infill(inputs, inputs, length=np.int64(2)).sequences,
                       model.infill(IDS[0], IDS[0], length=2).sequences)


def test_an_array_that_cannot_be_written_to_is_taken_in_silence(recwarn):
    array = IDS.numpy().copy()
    array.flags.writeable = False
    model = tiny()
    assert torch.equal(model.diffusion_generate(array, **SHORT).sequences,
                       model.diffusion_generate(IDS, **SHORT).sequences)
    assert not recwarn.list


def test_all_that_a_tokenizer_gives_may_be_given_by_name():
    model, given = tiny(), {"input_ids": IDS, "token_type_ids": IDS * 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.diffusion_generate(**given, **SHORT).sequences,
                       model.diffusion_generate(IDS, **SHORT).sequences)
    assert torch.equal(model(**given).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list, lambda mask: np.array(mask)[::-1].copy()[::-1],
                                  lambda mask: torch.tensor(mask).bool(),
                                  lambda mask: torch.tensor(mask, dtype=torch.float16)])
def test_masks_of_any_kind_hide_the_padding(kind):
    model, mask = tiny(), [[0, 1, 1], [1, 1, 1]]
    ids = torch.tensor([[-100, 6, 7], [8, 9, 10]])  # an id of padding may be anything
    alone = model.diffusion_generate(ids[0, 1:], **SHORT).sequences[0, -4:]
    for out in (model.diffusion_generate(ids, kind(mask), **SHORT),
                model.diffusion_generate({"input_ids": ids, "attention_mask": kind(mask)}, **SHORT)):
        assert torch.equal(out.sequences[0, -4:], alone)


@pytest.mark.parametrize("inputs, mask, message", [
    ([[5, 6], [7]], None, "inputs have rows of 1 to 2 ids; pad them to one length, and give the attention_mask"),
    (IDS.float(), None, "inputs must be token ids, whole numbers, not torch.float32"),
    (IDS > 5, None, "inputs must be token ids, whole numbers, not torch.bool"),
    ("text", None, "inputs must be token ids, not text"), (["text"], None, "inputs must be token ids, not text"),
    (None, None, "inputs must be token ids, not missing"), ([5, [6]], None, "inputs must be token ids"),
    (IDS[None], None, r"inputs must be token ids \[B, P\] or \[P\], not \[1, 2, 3\]"),
    (5, None, r"inputs must be token ids \[B, P\] or \[P\], not \[\]"),
    (IDS[:0], None, r"not \[0, 3\]"), ({"ids": IDS}, None, "inputs must have input_ids, not only ids"),
    ([61], None, "inputs have the id 61, outside the model's vocabulary of 61"),
    ([[5, -1]], None, "inputs have the id -1, outside"), ([2**70], None, "inputs must be token ids"),
    (IDS, IDS[:, :2] * 0, r"attention_mask has the shape \[2, 2\], inputs \[2, 3\]; they must be the same"),
    (IDS, IDS.T > 0, r"attention_mask has the shape \[3, 2\]"), (IDS, IDS[None] > 0, "attention_mask has the shape"),
    (IDS, torch.tensor([[0, -torch.inf, 0]] * 2), "one where there is a token and zero where there is padding"),
    (IDS, "yes", "attention_mask must be ones and zeros, not text"),
])
def test_anything_else_is_refused_in_one_sentence(inputs, mask, message):
    with pytest.raises(UserError, match=message) as refused:
        tiny().diffusion_generate(inputs, mask, **SHORT)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("call, message", [
    (lambda model: model.infill(IDS, [5], length=2), "there are 2 prefixes and 1 suffixes"),
    (lambda model: model.infill([5], [99], length=2), "suffix_ids have the id 99"),
    (lambda model: model.infill([5], [6], length=10**12), "a gap needs 1000000000002 positions"),
    (lambda model: model.infill([5], [6], length=2.5), "length must be at least 1 or 'auto', not 2.5"),
    (lambda model: model.perplexity_bound([[5, 99]]), "input_ids have the id 99"),
    (lambda model: model.diffusion_generate(IDS, max_new_tokens=10**15), "the model has 2048"),
    (lambda model: model.diffusion_generate(IDS, seed=2**64), "seed must be a whole number, not one beyond 64 bits"),
    (lambda model: model.diffusion_generate(IDS, seed=10**5000), "not one beyond 64 bits"),
    (lambda model: model.diffusion_generate(IDS, temperature=float("inf")), "temperature must be finite, not inf"),
    (lambda model: model.diffusion_generate(IDS, threshold=float("nan")), "threshold must be finite, not nan"),
    (lambda model: model.diffusion_generate(IDS, generation_config="x"), "must be an MDMGenerationConfig, not str"),
    (lambda model: model.diffusion_generate(IDS, do_sample=False, temperature=0.5), "do_sample=False contradicts"),
    (lambda model: model.diffusion_generate(IDS, return_dict_in_generate=False), "take .sequences of the output"),
    (lambda model: model.infill([5], [6], length=True), "length must be at least 1 or 'auto', not True"),
    (lambda model: model.perplexity_bound(IDS, samples=4.0), "samples must be a whole number, not 4.0"),
    (lambda model: model.perplexity_bound(IDS, seed=2**64), "seed must be a whole number, not one beyond 64 bits"),
    *((lambda model, ends=ends: model.diffusion_generate(IDS, eos_token_id=ends), "eos_token_id must be a token id or")
      for ends in ("x", ["x"], [], -1, [5, -1], 0.5)),
    (lambda model: model.diffusion_generate(IDS, eos_token_id=[5, 61]), "eos_token_id 61 is outside the model's"),
    (lambda model: model.diffusion_generate(IDS, stop_at_eos=True), "names no end-of-text token, which stop_at_eos"),
    (lambda model: model.infill([5], [6], length=2, expand_token_id=5), "and growing gaps need; set eos_token_id"),
    (lambda model: model.diffusion_generate(IDS, constraint="a+"), "must be one of dllm.constraints, not str; make it"),
    (lambda model: model.diffusion_generate(IDS, constraint=AllowedTokens([5], 99)),
     "the constraint is for a vocabulary of 99, the model has 61; make it with model.config.vocab_size"),
])
def test_settings_and_gaps_that_cannot_work_are_one_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call(tiny(max_position_embeddings=2048))


@pytest.mark.parametrize("inputs", [
    IDS.int(), IDS.numpy(), IDS.tolist(), BatchEncoding({"input_ids": IDS, "attention_mask": np.ones((2, 3))})])
def test_a_model_takes_what_its_methods_take(inputs):
    model = tiny()
    expected = model(IDS).logits
    assert torch.equal(model(inputs).logits, expected)
    assert torch.equal(model(inputs, [[1] * 3] * 2).logits, expected) and model(IDS[0]).logits.shape == (1, 3, 61)


@pytest.mark.parametrize("inputs, mask, message", [
    ([[5, 61]], None, "input_ids have the id 61, outside the model's vocabulary of 61"),
    (IDS.float(), None, "input_ids must be token ids, whole numbers"), ("text", None, "must be token ids, not text"),
    (IDS, torch.ones(2, 1, 3, 3), r"attention_mask has the shape \[2, 1, 3, 3\], input_ids \[2, 3\]")])
def test_a_model_refuses_what_its_methods_refuse(inputs, mask, message):
    with pytest.raises(UserError, match=message):
        tiny()(inputs, mask)


@pytest.mark.parametrize("ends", [5, np.int64(5), [5], (5, 7), {5, 7}, torch.tensor(5), torch.tensor([5, 7]),
                                  np.array([5, 7])])
def test_tokens_that_end_a_text_may_be_of_any_kind(ends):
    assert MDMGenerationConfig(eos_token_id=ends).eos_token_id in ((5,), (5, 7))


def test_open_dllms_sample_script():
    config = MDMGenerationConfig(
        mask_token_id=60, pad_token_id=1, eos_token_id=0, max_new_tokens=8, steps=8, temperature=0.5, top_k=200,
        alg="p2", alg_temp=0.5, num_return_sequences=1, return_dict_in_generate=True, output_history=True)
    out = tiny().diffusion_generate(inputs=IDS, generation_config=config)
    assert out.sequences.shape == (2, 11) and len(out.history) == out.steps


def test_open_dllms_evaluation_of_infilling():
    model, x = tiny(), torch.tensor([[5, 60, 60, 6, 0], [7, 60, 8, 9, 10]])
    config = MDMGenerationConfig(
        mask_token_id=60, pad_token_id=None, eos_token_id=0, max_new_tokens=10_000_000, steps=4, temperature=0.2,
        top_p=0.95, alg="p2", alg_temp=0.5, return_dict_in_generate=True)
    out = model._mdm_sample(x=x, attention_mask=None, generation_config=config)
    assert torch.equal(out.sequences[x != 60], x[x != 60]) and out.sequences.shape == x.shape


def test_dreams_call():
    out = tiny().diffusion_generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, output_history=True, return_dict_in_generate=True,
        steps=4, temperature=0.2, top_p=0.95, alg="entropy", alg_temp=0.)
    assert out.sequences.shape == (2, 7) and len(out.history) == 4
    assert MDMGenerationConfig(alg_temp=None, temperature=None) == MDMGenerationConfig()


def test_keywords_override_the_config():
    model, config = tiny(), MDMGenerationConfig(max_new_tokens=9, steps=3, seed=1, temperature=1.0)
    expected = model.diffusion_generate(IDS, None, MDMGenerationConfig(max_new_tokens=4, steps=3, seed=1,
                                                                       temperature=1.0)).sequences
    for out in (model.diffusion_generate(IDS, generation_config=config, max_new_tokens=4),
                model.diffusion_generate(IDS, config, max_new_tokens=4), model.diffusion_generate(
                    input_ids=IDS, generation_config={"steps": 3, "seed": 1, "temperature": 1.0}, max_new_tokens=4),
                [*model.diffusion_steps(IDS, config, max_new_tokens=4)][-1]):
        assert torch.equal(getattr(out, "sequences", None) if hasattr(out, "sequences") else out.tokens, expected)
    assert model.infill([5], [6], length=3, generation_config=config, seed=2).sequences.shape == (1, 5)


@pytest.mark.parametrize("name, near", [("max_tokens", "max_new_tokens"), ("stepz", "steps"), ("hooks", "")])
def test_an_unknown_keyword_is_named(name, near):
    for call in (lambda **k: tiny().diffusion_generate(IDS, **k), lambda **k: tiny().infill([5], [6], length=2, **k)):
        with pytest.raises(TypeError, match=f"no setting '{name}'.*{near}"):
            call(**{name: 3})


def test_an_end_of_text_token_of_the_config_ends_a_text():
    model = tiny(tie_word_embeddings=False, eos_token_id=3)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # always word 0
    for ends in (0, [0, 9], (9, 0)):
        out = model.diffusion_generate([5], max_new_tokens=8, steps=8, alg="maskgit_plus", stop_at_eos=True,
                                       eos_token_id=ends)
        assert out.forwards < 8


METHODS = [
    {"alg": "origin", "temperature": 0.8}, {"alg": "p2", "temperature": 0.8, "top_p": 0.9}, {"alg": "remdm"},
    {"alg": "entropy", "temperature": 0.8, "top_p": 0.9, "top_k": 20, "alg_temp": 0.2}, {"alg": "topk_margin"},
    {"alg": "confidence_threshold", "threshold": 0.1}, {"remasking": "low_confidence", "block_length": 4},
    {"remasking": "low_confidence", "schedule": "cosine"}, {"remasking": "random", "cfg_scale": 1.0}, {"factor": 0.9},
    {"remasking": "low_confidence_dynamic", "threshold": 0.5, "editing_threshold": 0.2},
    {"cache": "dual", "block_length": 4, "alg": "maskgit_plus"}, {"expand_token_id": 9, "eos_token_id": 3},
    {"block_causal": True, "block_length": 4}, {"alg": "entropy_bound", "entropy_bound": 3.0},
    {"block_causal": True, "block_length": 4, "threshold": -3.0, "window_blocks": 3}]


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def other_defaults(request):
    """After `next`, another default dtype or device; one that nothing may be computed on stands for a GPU."""
    def change():
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(request.param)

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.slow
def test_other_defaults_of_torch_change_nothing(other_defaults):
    model, mask = tiny(eos_token_id=3), torch.tensor([[0, 1, 1], [1, 1, 1]])

    def results():
        for settings in METHODS:
            yield model.diffusion_generate(IDS, mask, max_new_tokens=8, steps=24, seed=3, **settings).sequences.tolist()
        for length in (4, "auto"):
            yield model.infill([5, 6], [8], length=length, seed=1, temperature=0.5).sequences.tolist()
        yield model.perplexity_bound([[5, 6, 7, 8], [9, 10, 11, 12]], samples=8).nats.tolist()

    before = [*results()]
    other_defaults()
    assert [*results()] == before
