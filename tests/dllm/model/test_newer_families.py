"""The families of 2026: folders in their layout, logits, decoding by cached blocks, training's two copies, round trips.

Logits are compared with Transformers' own layers under each family's mask: Qwen2 (Fast-dLLM v2), Qwen3 (SDAR, I-DLM),
Qwen3-MoE (SDAR-MoE, RND1), Ministral 3 (Nemotron) and Llama (Stable-DiffCoder), which their published code repeats.
iLLaDA, whose code is not in Transformers, is compared with Llama by its parameters' names.
"""

import json
import re
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dllm.diffusion_lm import DiffusionLM
from dllm.errors import Notice, UserError
from dllm.generation.config import MDMGenerationConfig
from dllm.model.cache import KeyValueCache
from dllm.model.families import read_config, write_config
from dllm.model.growth import grow
from dllm.model.layouts import Cached, Packed, Padded, TwoCopies
from dllm.model.loading import load_with_tokenizer
from dllm.model.ragged import Call, Ragged
from tests.dllm.published import NEWER, change, publish

WANTED = {
    "sdar-30b-a3b": dict(family="sdar_moe", block_causal=True, block_length=4, shift_logits=False, norm_topk_prob=True),
    "i-dlm": dict(family="idlm", block_causal=True, block_length=4, causal_blocks=True, shift_logits=True),
    "fast-dllm-v2": dict(family="Fast_dLLM_Qwen", block_causal=True, block_length=32, sub_block_length=8,
                         shift_logits=True, qkv_bias=True, tie_word_embeddings=True),
    "rnd1": dict(family="rnd1", block_causal=False, shift_logits=True, rope_scaling=None, norm_topk_prob=True),
    "nemotron": dict(family="nemotron_labs_diffusion", block_causal=True, causal_context=True, block_length=32,
                     shift_logits=False, rope_theta=1e6),
    "illada": dict(family="llada", block_causal=False, shift_logits=False, num_key_value_heads=2,
                   tie_word_embeddings=True, max_position_embeddings=8192),
    "stable-diffcoder": dict(family="stable_diffcoder", block_causal=True, block_length=4, shift_logits=False)}
# The layers of Transformers that compute the same.
LAYERS = {"sdar-30b-a3b": "qwen3_moe", "rnd1": "qwen3_moe", "i-dlm": "qwen3", "fast-dllm-v2": "qwen2",
          "nemotron": "ministral3", "stable-diffcoder": "llama", "illada": "llama", "sdar": "qwen3"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("newer")
    return {name: publish(name, base / name) for name in LAYERS}


@pytest.fixture
def copy(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


@pytest.fixture(scope="module")
def pairs(folders, tmp_path_factory):
    """name -> (our model, that of Transformers with the same weights), both in fp32."""
    made = {}

    def pair(name):
        if name not in made:
            ours = DiffusionLM.from_pretrained(folders[name])
            made[name] = ours, in_transformers(ours, LAYERS[name], tmp_path_factory.mktemp("theirs"))
        return made[name]
    return pair


def in_transformers(ours, model_type, folder):
    config = ours.config
    state = dict(ours.state_dict())
    for name in [name for name in state if ".experts." in name]:  # published as one matrix an expert
        for index, one in enumerate(state.pop(name).unbind(0)):
            layer, projection = name.split(".experts.")
            state[f"{layer}.experts.{index}.{projection}.weight"] = one.contiguous()
    rotary = {"rope_theta": config.rope_theta, "rope_type": "default", **(config.rope_scaling or {})}
    raw = {"model_type": model_type, "architectures": None, "rope_parameters": rotary, "decoder_sparse_step": 1,
           "mlp_only_layers": [], **{name: getattr(config, name) for name in (
               "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
               "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")}}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def sees(length, block=None, after=None):
    """[length, length] bool: which keys a query sees; block None: all, 1: those up to itself. after: the queries from
    there on see all, the others those up to themselves."""
    place = torch.arange(length)
    if after is not None:
        return (place <= place[:, None]) | (place[:, None] >= after)
    if block is None:
        return torch.ones(length, length, dtype=torch.bool)
    return place // block <= place[:, None] // block


@torch.no_grad()
def theirs(model, ids, mask):
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None].expand(len(ids), -1, -1, -1)
    return model(ids, attention_mask=additive, position_ids=torch.arange(ids.shape[1]).expand(ids.shape)).logits


@pytest.mark.parametrize("name", NEWER)
def test_published_folders_load_without_their_code(folders, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokenizer = load_with_tokenizer(folders[name], "cpu")
    texts = [str(warning.message) for warning in caught if warning.category is Notice]
    assert all("each of them ends one" in text for text in texts), texts
    assert {key: getattr(model.config, key) for key in WANTED[name]} == WANTED[name]
    assert not (folders[name] / "RAN").exists()
    assert model.mask_token_id == tokenizer.mask_token_id is not None
    named = tokenizer.convert_ids_to_tokens(model.mask_token_id)
    assert named == {"fast-dllm-v2": "|<MASK>|", "nemotron": "<SPECIAL_100>", "rnd1": "<|mask|>", "i-dlm": "<|MASK|>",
                     "sdar-30b-a3b": "<|MASK|>"}.get(name, "<[MASK_TOKEN]>")


@pytest.mark.parametrize("name", LAYERS)
def test_logits_are_those_of_transformers_layers(pairs, name):
    ours, reference = pairs(name)
    ids = torch.arange(2 * 70).view(2, 70) * 7 % ours.config.vocab_size
    with torch.no_grad():
        full = theirs(reference, ids, sees(70))
        assert (ours(ids).logits - full).abs().max() < 1e-4 < full.std()
        if not ours.config.block_causal:
            return
        block = 1 if ours.config.causal_blocks else ours.config.block_length
        blocks = theirs(reference, ids, sees(70, block))
        mine = F.linear(ours.hidden_states(ids, Padded(block_length=block)), ours.head_weight)
    assert (mine - blocks).abs().max() < 1e-4 < (blocks - full).abs().max()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [False, True])
def test_a_block_sees_the_text_before_it_as_nemotrons_autoregressive_model_does(pairs, queries, padded):
    """Queries of the last block alone, or every position; with and without padding before the texts."""
    ours, reference = pairs("nemotron")
    length, block, first = 72, 32, 64
    ids = torch.arange(2 * length).view(2, length) * 11 % ours.config.vocab_size
    expected = theirs(reference, ids, sees(length, after=first))
    key_mask = None
    if padded:
        ids, key_mask = F.pad(ids, (3, 0)), F.pad(torch.ones_like(ids, dtype=torch.bool), (3, 0))
        length, first = length + 3, first + 3
    cache = KeyValueCache(ours.config, 2, length, ours.head_weight, block)
    last = torch.arange(first, length).expand(2, -1)
    with torch.no_grad():
        hidden = ours.hidden_states(ids, Cached(cache, 0, None, key_mask, last if queries else None, context=first))
        hidden = hidden if queries else hidden[:, first:]
        assert (F.linear(hidden, ours.head_weight) - expected[:, -8:]).abs().max() < 1e-4
        again = ours.hidden_states(ids[:, first:], Cached(cache, first, None, key_mask))  # with what is kept
    assert (F.linear(again, ours.head_weight) - expected[:, -8:]).abs().max() < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_nemotron_is_trained_with_noisy_blocks_beside_a_clean_causal_text(pairs, packed):
    ours, reference = pairs("nemotron")
    length, block = 40, 32
    clean = torch.arange(length)[None] * 13 % ours.config.vocab_size
    noisy = clean.clone()
    noisy[:, ::3] = ours.mask_token_id
    place = torch.arange(length)
    own = place // block == place[:, None] // block
    before = place // block < place[:, None] // block
    causal = place <= place[:, None]
    mask = torch.cat((torch.cat((own, before), 1), torch.cat((torch.zeros_like(own), causal), 1)))
    both = torch.cat((noisy, clean), 1)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        expected = reference(both, attention_mask=additive, position_ids=place.repeat(2)[None]).logits[:, :length]
    copy = Packed(torch.tensor([0, length], dtype=torch.int32), length, block) if packed else Padded(block_length=block)
    hidden = ours.hidden_states(noisy, TwoCopies(clean, block, copy, causal_context=True))
    assert (F.linear(hidden, ours.head_weight) - expected).abs().max() < 1e-4
    hidden.square().sum().backward()
    assert ours.model.layers[0].self_attn.k_proj.weight.grad.isfinite().all()
    ours.zero_grad()


def fill(ours, reference, prompt, new):
    """Greedily, the surest position of a block at a time, each after a whole pass by Transformers."""
    config, mask_id = ours.config, ours.mask_token_id
    given = len(prompt)
    start = given if config.causal_context else 0  # where blocks are counted from
    block = config.block_length if config.block_causal else given + new
    end = start + -(-(given + new - start) // block) * block
    tokens = torch.tensor([prompt + [mask_id] * (end - given)])
    for first in range(start + (given - start) // block * block, end, block):
        last = min(first + block, given + new if config.causal_context else end)
        seen = sees(last, 1 if config.causal_blocks else block if config.block_causal else None,
                    after=first if config.causal_context else None)
        while (masked := tokens[0, :last] == mask_id).any():
            logits = theirs(reference, tokens[:, :last], seen)[0]
            if config.shift_logits:
                logits = torch.cat((logits[:1], logits[:-1]))
            sure, words = logits.softmax(-1).max(-1)
            place = int(sure.masked_fill(~masked, -1).argmax())
            assert words[place] != mask_id
            tokens[0, place] = words[place]
    return tokens[:, :given + new]


@pytest.mark.parametrize("name", NEWER)
def test_texts_are_sampled_as_if_nothing_were_kept(copy, name, tmp_path):
    """By blocks of the family's own length, with finished blocks kept, against a whole pass of Transformers a step."""
    folder = copy(name)
    if name == "fast-dllm-v2":
        change(folder / "config.json", small_block_size=32)  # the parts of a block are another test's
    ours = DiffusionLM.from_pretrained(folder)
    reference = in_transformers(ours, LAYERS[name], tmp_path)
    prompt = [(5 * place + 1) % 250 for place in range(37)]
    expected = fill(ours, reference, prompt, 13)
    settings = MDMGenerationConfig(max_new_tokens=13, alg="maskgit_plus", threshold=1.0)
    out = ours.diffusion_generate(torch.tensor([prompt]), generation_config=settings)
    assert torch.equal(out.sequences, expected)
    shorter = fill(ours, reference, prompt[4:], 13)
    rows, seen = torch.tensor([[0] * 4 + prompt[4:], prompt]), torch.ones(2, 37, dtype=torch.long)
    seen[0, :4] = 0
    batch = ours.diffusion_generate(rows, attention_mask=seen, generation_config=settings).sequences
    assert torch.equal(batch[1], expected[0]) and torch.equal(batch[0, 4:], shorter[0])


def test_fast_dllm_v2_fills_its_blocks_part_by_part(folders):
    """Where confidences decide how many positions a step commits, in parts of 8, as its folder says."""
    model, passes = DiffusionLM.from_pretrained(folders["fast-dllm-v2"]), []
    settings = {"max_new_tokens": 40, "alg": "maskgit_plus", "threshold": 0.02, "output_history": True}
    for parts in ({}, {"sub_block_length": 8}, {"sub_block_length": 32}):
        out = model.diffusion_generate([5, 6, 7], **settings, **parts)
        passes.append((out.sequences.tolist(), out.forwards))
        ordered = all((canvas[0, 8:] == model.mask_token_id).all() or (canvas[0, :8] != model.mask_token_id).all()
                      for canvas in out.history)
        assert ordered == (parts != {"sub_block_length": 32})
    assert passes[0] == passes[1] != passes[2]


def test_nemotrons_blocks_are_not_denoised_together(folders):
    model = DiffusionLM.from_pretrained(folders["nemotron"])
    with pytest.raises(UserError, match="window_blocks lets blocks see unfinished ones before them.*; leave it out"):
        model.diffusion_generate([5, 6, 7], max_new_tokens=40, alg="maskgit_plus", threshold=0.5, window_blocks=2)


@pytest.mark.parametrize("name", NEWER)
def test_gaps_are_filled(folders, name):
    model = DiffusionLM.from_pretrained(folders[name])
    out = model.infill(list(range(20)), [7, 8, 9], length=11, generation_config=MDMGenerationConfig(steps=11))
    assert out.sequences.shape == (1, 34) and out.sequences[0, -3:].tolist() == [7, 8, 9]
    assert not (out.sequences == model.mask_token_id).any()


def test_calls_in_one_row_give_what_each_gives_alone(pairs):
    """Served together: finished blocks of one call, cached, beside the block that another fills."""
    ours, _ = pairs("nemotron")
    calls = []
    for length, context in ((70, 64), (33, 32), (20, 0)):
        ids = torch.arange(length)[None] * 3 % 200
        cache = KeyValueCache(ours.config, 1, length, ours.head_weight, 32)
        calls.append(Call(ids, Cached(cache, 0, None, None, torch.arange(context, length)[None],
                                      context=context)))
    batch = Ragged.of(calls)
    with torch.no_grad():
        for call, together in zip(calls, batch.split(ours.hidden_states(batch.row, batch)), strict=True):
            assert (ours.hidden_states(call.input_ids, call.layout) - together).abs().max() < 1e-5


@pytest.mark.parametrize("name", NEWER)
def test_a_folder_comes_back_and_grows(copy, name, tmp_path):
    folder = copy(name)
    model = DiffusionLM.from_pretrained(folder, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    raw = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "saved/config.json").read_text()) == raw
    before = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    after = load_file(tmp_path / "saved/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    grow(model, model.config.vocab_size + 64, 0)
    model.save_pretrained(tmp_path / "grown")
    again = DiffusionLM.from_pretrained(tmp_path / "grown", dtype="auto")
    assert again.config == model.config and again.model.embed_tokens.weight.shape[0] == model.config.vocab_size
    made = type(model.config)(**{**vars(model.config), "source": {}})  # as a model made here is written
    assert read_config(write_config(made, "float32")) == made


# Which family, and what is refused

DIFFCODER = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 155136, "hidden_size": 4096,
             "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "max_position_embeddings": 8192, "rope_theta": 500000.0, "bos_token_id": 0, "pad_token_id": 1,
             "eos_token_id": 2}


def told(raw):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = read_config(raw)
    return config, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("mask", [{}, {"mask_token_id": 5}])
def test_stable_diffcoder_is_recognised_without_its_class(mask):
    config, texts = told({**DIFFCODER, **mask})
    assert (config.family, config.block_length, config.shift_logits) == ("stable_diffcoder", 4, False)
    assert len(texts) == 1 and "read as Stable-DiffCoder by its 155136 words and 8192 positions" in texts[0]
    grown = write_config(type(config)(**{**vars(config), "vocab_size": 155200}), "float32")
    assert told(grown)[0].family == "stable_diffcoder"


@pytest.mark.parametrize("changes", [{"max_position_embeddings": 32768}, {"max_position_embeddings": 65536},
                                     {"shift_logits": True}, {"mask_token_id": 155135}, {"vocab_size": 128256}])
def test_its_autoregressive_relatives_stay_llamas(changes):
    config, texts = told({**DIFFCODER, **changes})
    assert config.family == "llama" and config.shift_logits and not config.block_causal and not texts


SDAR = {"model_type": "sdar", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4}


@pytest.mark.parametrize("raw, wanted", [
    (SDAR, dict(family="sdar", block_length=4, shift_logits=False, causal_blocks=False)),  # TraDo names no block
    ({**SDAR, "block_size": 7}, dict(family="sdar", block_length=7)),
    ({**SDAR, "block_size": 7, "use_regular_causal": True}, dict(family="idlm", block_length=8)),
    ({**SDAR, "block_size": 1, "use_regular_causal": None}, dict(family="idlm", block_length=2, causal_blocks=True)),
    ({**SDAR, "use_regular_causal": True}, dict(family="idlm", block_length=4, shift_logits=True)),
    ({**SDAR, "model_type": "FastdLLMV2", "bd_size": 16}, dict(family="Fast_dLLM_Qwen", block_length=16,
                                                               sub_block_length=8))])
def test_families_are_told_apart(raw, wanted):
    config, texts = told(raw)
    assert {name: getattr(config, name) for name in wanted} == wanted and not texts


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "wedlm"}, "wedlm is not supported, because it moves known tokens .* use WeDLM's own engine"),
    ({"model_type": "deepseek_v3", "architectures": ["GFusionForDiffusionLM"]}, r"gfusion .*\(MLA\).* choose another"),
    ({"kv_lora_rank": 512}, "kv_lora_rank 512 is not supported for sdar; multi-head latent attention"),
    ({"quantization_config": {"bits": 4}}, "quantization_config .* take the checkpoint that it was quantised from"),
    ({"use_relay": True, "use_regular_causal": True}, "use_relay True is not supported for idlm"),
    ({"use_regular_causal": False}, "use_regular_causal False is not supported for idlm; supported: True"),
    ({"use_sliding_window": True, "sliding_window": 16, "max_position_embeddings": 64},
     "sliding_window 16 is not supported.* set max_position_embeddings to at most the window"),
    ({"model_type": "nemotron_labs_diffusion", "sliding_window": 16, "max_position_embeddings": 64}, "sliding_window"),
    ({"model_type": "nemotron_labs_diffusion", "dlm_paradigm": "autoregressive"}, "dlm_paradigm 'autoregressive' is"),
    ({"model_type": "Fast_dLLM_Qwen", "small_block_size": 12}, "sub_block_length 12 must divide block_length 32"),
    ({"model_type": "rnd1"}, "rnd1 needs the keys num_experts, num_experts_per_tok, moe_intermediate_size"),
    ({"model_type": "rnd1", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
      "decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported for rnd1; supported: 1"),
    ({"model_type": "qwen3", "causal_context": True}, "has no configuration key 'causal_context'")])
def test_what_is_not_computed_is_refused_in_one_line(changes, message):
    if "no configuration key" in message:
        assert re.search(message, told({**SDAR, **changes})[1][0])
        return
    with pytest.raises(UserError, match=message) as error:
        read_config({**SDAR, **changes})
    assert "\n" not in str(error.value)


def test_the_drafting_adapter_of_nemotron_is_left_out_and_named(copy):
    folder = copy("nemotron")
    (folder / "linear_spec_lora").mkdir()
    save_file({"base_model.model.encoder.layers.0.self_attn.o_proj.lora_A.weight": torch.zeros(4, 32)},
              folder / "linear_spec_lora/adapter_model.safetensors")
    with pytest.warns(Notice, match="linear_spec_lora is left out: an adapter that drafts for self-speculation"):
        DiffusionLM.from_pretrained(folder)


def test_a_mixture_of_llada_may_rotate_a_part_of_its_heads(shared, tmp_path):
    """Numbers that are not rotated are like pairs of frequency 0, in another order of the heads' rows. (Compared with
    the published code, too, which the repository does not hold.)"""
    folder = shutil.copytree(shared / "golden/families/llada_moe/checkpoint", tmp_path / "half")
    change(folder / "config.json", partial_rotary_factor=0.5)
    half = DiffusionLM.from_pretrained(folder)
    assert half.config.rotary_dim == 8 and half.config.head_dim == 16
    ids = torch.arange(23)[None] * 5 % 300
    with torch.no_grad():
        expected = half(ids).logits
        change(folder / "config.json", partial_rotary_factor=1)
        whole = DiffusionLM.from_pretrained(folder)
        assert (whole(ids).logits - expected).abs().max() > 1e-2
        order = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15])
        for layer in whole.model.layers:
            attention = layer.self_attn
            for matrix in (attention.q_proj, attention.k_proj):
                matrix.weight.copy_(matrix.weight.unflatten(0, (-1, 16))[:, order].flatten(0, 1))
            for norm in (attention.q_norm, attention.k_norm):
                norm.weight.copy_(norm.weight[order])
        whole.rotary.frequencies = torch.cat((half.rotary.frequencies, torch.zeros(4)))
        assert (whole(ids).logits - expected).abs().max() < 1e-4
    half.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["partial_rotary_factor"] == 0.5
