"""The patches against unpatched Transformers models, and against layers shaped like those of LLaDA and Dream."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dllm_kernels

transformers = pytest.importorskip("transformers")

FAMILIES = {"qwen2": dllm_kernels.apply_dllm_kernels_to_qwen2, "qwen3": dllm_kernels.apply_dllm_kernels_to_qwen3,
            "llama": dllm_kernels.apply_dllm_kernels_to_llama}
each_family = pytest.mark.parametrize("family", FAMILIES)


def make_model(family, implementation="eager", **changes):
    torch.manual_seed(0)
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family]
    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False,
           "initializer_range": 0.3, "attn_implementation": implementation, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def make_batch():
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    labels = tokens.masked_fill((tokens % 2 == 0) | (mask == 0), -100)
    return tokens, mask, labels


def bidirectional(model, tokens, mask, **kwargs):
    """The unpatched model with a 4-D mask that hides the padding alone."""
    visible = mask.bool()[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return model(tokens, attention_mask=additive, position_ids=torch.arange(9).expand(2, 9), **kwargs)


@each_family
def test_dllm_attention_is_bidirectional_and_hides_padding(family):
    dllm_kernels.register_attention()
    tokens, mask, _ = make_batch()
    ours = make_model(family, "dllm")(tokens, attention_mask=mask).logits
    theirs = bidirectional(make_model(family), tokens, mask).logits
    assert (ours - theirs)[mask.bool()].abs().max() < 1e-4
    unpadded = make_model(family, "dllm")(tokens).logits
    assert (unpadded - bidirectional(make_model(family), tokens, torch.ones_like(mask)).logits).abs().max() < 1e-4
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 97
    otherwise = make_model(family, "dllm")(changed).logits
    assert (otherwise - unpadded)[0, 0].abs().max() > 1e-4  # the first position sees the last


@each_family
def test_a_patched_model_gives_the_same_loss_and_gradients_and_undo_restores_it(family):
    tokens, mask, labels = make_batch()
    reference, model = make_model(family).train(), make_model(family).train()
    before = model(tokens, attention_mask=mask).logits.detach()
    undo = FAMILIES[family](model=model)
    for extra in ({}, {"num_items_in_batch": 7}, {"shift_labels": labels}):
        reference.zero_grad(), model.zero_grad()
        theirs = bidirectional(reference, tokens, mask, labels=labels, **extra)
        ours = model(tokens, attention_mask=mask, labels=labels, **extra)
        assert ours.logits is None and ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
        ours.loss.backward(), theirs.loss.backward()
        for (name, mine), its in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (mine.grad - its.grad).abs().max() < 1e-4, name
    assert model.eval()(tokens, attention_mask=mask, labels=labels).logits.shape == (2, 9, 97)
    undo()
    undo()  # once more does no harm
    assert torch.equal(model.train()(tokens, attention_mask=mask).logits, before)
    assert "forward" not in vars(model) and model.config._attn_implementation == "eager"


@each_family
def test_patched_classes_reach_models_made_afterwards_until_undone(family):
    tokens, mask, labels = make_batch()
    earlier = make_model(family)
    plain = earlier(tokens).logits
    undo = FAMILIES[family]()
    try:
        model = make_model(family)
        assert model.config._attn_implementation == "dllm" and earlier.config._attn_implementation == "eager"
        theirs = bidirectional(earlier, tokens, mask, labels=labels)
        ours = model.train()(tokens, attention_mask=mask, labels=labels)
        assert ours.logits is None and ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    finally:
        undo()
    assert torch.equal(model.eval()(tokens).logits, plain) and torch.equal(make_model(family)(tokens).logits, plain)


def test_each_flag_patches_its_part_alone():
    tokens, _, labels = make_batch()
    model = make_model("qwen2").train()
    causal = model(tokens, labels=labels)
    undo = dllm_kernels.apply_dllm_kernels_to_qwen2(attention=False, model=model)
    fused = model(tokens, labels=labels)
    assert fused.logits is None and fused.loss.item() == pytest.approx(causal.loss.item(), rel=1e-5)
    undo()
    dllm_kernels.apply_dllm_kernels_to_qwen2(fused_linear_cross_entropy=False, model=model)
    assert model(tokens, labels=labels).logits is not None and model.config._attn_implementation == "dllm"


def test_gradient_checkpointing_sees_the_patched_attention_again():
    tokens, mask, labels = make_batch()
    gradients = []
    for checkpointing in (False, True):
        model = make_model("qwen2").train()
        dllm_kernels.apply_dllm_kernels_to_qwen2(model=model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


def test_cached_keys_are_seen_and_unfilled_places_of_a_static_cache_are_not():
    dllm_kernels.register_attention()
    tokens, _, _ = make_batch()
    model = make_model("qwen2", "dllm")
    for cache in (transformers.DynamicCache(config=model.config),
                  transformers.StaticCache(config=model.config, max_cache_len=16)):
        first = model(tokens[:, :5], past_key_values=cache, use_cache=True).logits
        assert (first - model(tokens[:, :5]).logits).abs().max() < 1e-4
        later = model(tokens[:, 5:], past_key_values=cache, use_cache=True).logits
        assert later.shape == (2, 4, 97) and later.isfinite().all()


def test_what_cannot_be_patched_is_refused():
    dllm_kernels.register_attention()
    tokens, _, _ = make_batch()
    with pytest.raises(ValueError, match="takes a Qwen2 model of Transformers, not LlamaForCausalLM"):
        dllm_kernels.apply_dllm_kernels_to_qwen2(model=make_model("llama"))
    with pytest.raises(ValueError, match="Qwen2Model has no language modelling head"):
        dllm_kernels.apply_dllm_kernels_to_qwen2(model=make_model("qwen2").model)
    with pytest.raises(ValueError, match="'dllm' has no dropout, and the model asks for 0.1"):
        make_model("qwen2", "dllm", attention_dropout=0.1).train()(tokens)
    with pytest.raises(ValueError, match="neither sliding windows nor packed position_ids"):
        make_model("qwen2", "dllm")(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]] * 2))
    with pytest.raises(ValueError, match="neither sliding windows"):
        make_model("qwen2", "dllm", use_sliding_window=True, sliding_window=4, max_window_layers=1)(tokens)
    with pytest.raises(ValueError, match=r"takes an attention_mask \[B, L\], not \[2, 1, 9, 9\]"):
        make_model("qwen2", "dllm")(tokens, attention_mask=torch.zeros(2, 1, 9, 9))
    for family, apply in (("llada", dllm_kernels.apply_dllm_kernels_to_llada),
                          ("dream", dllm_kernels.apply_dllm_kernels_to_dream)):
        with pytest.raises(ValueError, match=f"apply_dllm_kernels_to_{family} takes model="):
            apply(model=None)
        with pytest.raises(ValueError, match="published code"):
            apply(model=make_model("llama"))


class LLaDABlock(nn.Module):
    """The method of LLaDA's published code that the patch replaces, as it is called there."""

    def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=False)

    def forward(self, q, k, v, mask=None):
        return self._scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)


def apply_rotary_pos_emb(q, k, cos, sin):
    return q * cos + sin, k * cos + sin


class DreamSdpaAttention(nn.Module):
    """The attention layer of Dream's published code: its projections, and the arguments its forward gets."""

    def __init__(self):
        super().__init__()
        self.head_dim, self.attention_dropout = 8, 0.0
        self.q_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k_proj, self.v_proj = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None,
                output_attentions=False, use_cache=False, cache_position=None, position_embeddings=None):
        self.calls = getattr(self, "calls", 0) + 1
        heads = (*hidden_states.shape[:2], -1, 8)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states).view(heads).transpose(1, 2) for project in projections)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        out = F.scaled_dot_product_attention(q, *(x.repeat_interleave(2, dim=1) for x in (k, v)), attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(hidden_states.shape)), None, None


def test_llada_attention_is_replaced_where_it_has_no_mask(monkeypatch):
    q, k, v = (torch.randn(2, heads, 7, 8) for heads in (4, 2, 2))
    bias = torch.randn(2, 1, 7, 7)
    model = nn.Sequential(LLaDABlock(), LLaDABlock())
    plain, masked = model[1](q, k, v), model[1](q, k, v, bias)
    undo = dllm_kernels.apply_dllm_kernels_to_llada(model=model)
    assert torch.equal(model[1](q, k, v, bias), masked)
    monkeypatch.setattr(LLaDABlock, "_scaled_dot_product_attention", None)
    assert (model[1](q, k, v) - plain).abs().max() < 1e-5
    undo()
    assert not any("_scaled_dot_product_attention" in vars(block) for block in model)


def test_dream_attention_is_replaced_where_it_has_no_mask():
    model = nn.Sequential(DreamSdpaAttention())
    layer, x = model[0], torch.randn(2, 7, 32)
    at = {"position_embeddings": (torch.randn(7, 8), torch.randn(7, 8)), "position_ids": torch.arange(7),
          "use_cache": False}
    mask = torch.rand(2, 1, 7, 7) < 0.8
    plain, masked = layer(x, attention_mask="full", **at)[0], layer(x, attention_mask=mask, **at)[0]
    undo = dllm_kernels.apply_dllm_kernels_to_dream(model=model)
    ours, _, cache = layer(hidden_states=x, attention_mask="full", past_key_value=None, **at)
    assert (ours - plain).abs().max() < 1e-5 and cache is None and layer.calls == 2
    assert torch.equal(layer(x, attention_mask=mask, **at)[0], masked) and layer.calls == 3
    undo()
    assert torch.equal(layer(x, attention_mask="full", **at)[0], plain) and layer.calls == 4


def test_copies_of_a_patched_model_compute_with_their_own_weights(tmp_path):
    tokens = make_batch()[0]
    model = make_model("qwen3")
    undo = dllm_kernels.apply_dllm_kernels_to_qwen3(model=model)
    copies = [copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module]
    torch.save(model, tmp_path / "model.pt")
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    expected = model(tokens).logits
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    for other in copies:
        assert torch.equal(other(tokens).logits, expected)
        other.train()(tokens, labels=tokens).loss.backward()
        assert other.lm_head.weight.grad is not None and model.lm_head.weight.grad is None
        for parameter in other.parameters():
            parameter.data.zero_()
        assert (other.eval()(tokens).logits == 0).all()
    assert copies[0].train()(tokens, labels=tokens).logits is None  # still patched
    undo()
    assert "forward" not in vars(model) and copies[0](tokens, labels=tokens).logits is None


def test_copies_of_patched_layers_compute_with_their_own_weights():
    x, at = torch.randn(2, 7, 32), {"position_embeddings": (torch.randn(7, 8), torch.randn(7, 8))}
    model = nn.Sequential(DreamSdpaAttention(), DreamSdpaAttention())
    dllm_kernels.apply_dllm_kernels_to_dream(model=model)
    other = copy.deepcopy(model)
    expected = model[0](x, **at)[0]
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(other[0](x, **at)[0], expected) and not hasattr(other[0], "calls")
    blocks = nn.Sequential(LLaDABlock(), LLaDABlock())
    dllm_kernels.apply_dllm_kernels_to_llada(model=blocks)
    twin = copy.deepcopy(blocks)
    assert all(method.__self__ is block for block in twin
               for method in vars(block).values() if isinstance(method, types.MethodType))


def test_a_model_patched_twice_is_undone_in_steps():
    tokens = make_batch()[0]
    model = make_model("llama").train()
    undos = [dllm_kernels.apply_dllm_kernels_to_llama(model=model) for _ in range(2)]
    twin = copy.deepcopy(model)
    losses = [model(tokens, labels=tokens).loss]
    for undo in reversed(undos):
        undo()
        losses.append(model(tokens, labels=tokens).loss)
    assert "forward" not in vars(model) and (losses[0] - losses[1]).abs() < 1e-5
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert (twin(tokens, labels=tokens).loss - torch.log(torch.tensor(97.0))).abs() < 1e-5


def test_adapters_of_a_patched_model_train_alone():
    peft = pytest.importorskip("peft")
    tokens = make_batch()[0]
    model = make_model("qwen2")
    dllm_kernels.apply_dllm_kernels_to_qwen2(model=model)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    adapted = peft.get_peft_model(model, settings).train()
    twin = copy.deepcopy(adapted)
    twin(input_ids=tokens, labels=tokens).loss.backward()
    grads = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert any(grad is not None and grad.abs().sum() > 0 for name, grad in grads.items() if "lora_B" in name)
    assert all(grad is None for name, grad in grads.items() if "lora_" not in name and "modules_to_save" not in name)
    assert all(parameter.grad is None for parameter in adapted.parameters())
