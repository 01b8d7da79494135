"""The layers: what the Kernels Hub asks of them, and that each computes what its function promises."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dllm_kernels import layers, topk_unmask

LAYERS = [value for value in vars(layers).values() if inspect.isclass(value) and value.__module__ == layers.__name__]


def make_inputs(layer: type[nn.Module]) -> tuple:
    torch.manual_seed(0)
    if layer is layers.MaskedLinearCrossEntropy:
        return (torch.randn(3, 7, 13), torch.randn(41, 13), torch.randint(41, (3, 7)), torch.rand(3, 7) < 0.5,
                torch.randn(41), torch.rand(3, 7))
    if layer is layers.TopKUnmask:
        return torch.randn(3, 7, 41), torch.randint(0, 40, (3, 7)).index_fill_(1, torch.tensor([1, 4, 6]), 40), 40, 2
    assert layer is layers.BidirectionalAttention
    key_mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    return torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8), key_mask


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_keep_the_rules_of_the_hub(layer):
    assert layer.__init__ is nn.Module.__init__
    added = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert added == {"has_backward", "can_torch_compile"}
    assert not layer().state_dict()
    kinds = {parameter.kind for parameter in inspect.signature(layer.forward).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}  # those of the layers it may replace


def test_loss_and_its_gradients_against_float64():
    hidden, weight, targets, corrupted, bias, weights = make_inputs(layers.MaskedLinearCrossEntropy)
    ours = [x.requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    nll = F.cross_entropy((exact[0] @ exact[1].T + exact[2]).flatten(0, 1), targets.flatten(), reduction="none")
    wanted = (nll.view(3, 7) * weights * corrupted).sum() / corrupted.sum()
    loss = layers.MaskedLinearCrossEntropy()(hidden, weight, targets, corrupted, bias, weights)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_loss_in_the_other_reductions(reduction):
    hidden, weight, targets, corrupted, bias, weights = make_inputs(layers.MaskedLinearCrossEntropy)
    logits = (hidden.double() @ weight.double().T + bias).flatten(0, 1)
    each = F.cross_entropy(logits, targets.flatten(), reduction="none").view(3, 7) * weights * corrupted
    loss = layers.MaskedLinearCrossEntropy()(hidden, weight, targets, corrupted, bias, weights, reduction)
    torch.testing.assert_close(loss.double(), each if reduction == "none" else each.sum(), rtol=1e-5, atol=1e-5)


def test_unmask_fills_the_surest_positions_and_is_its_function():
    logits, tokens, mask, k = make_inputs(layers.TopKUnmask)
    sureness, best = logits.double().softmax(-1).max(-1)
    masked = tokens == mask
    chosen = sureness.masked_fill(~masked, -1).topk(k, dim=1).indices
    filled = tokens.scatter(1, chosen, best.gather(1, chosen))
    assert torch.equal(layers.TopKUnmask()(logits, tokens, mask, k).tokens, filled)
    torch.manual_seed(1)
    sampled = layers.TopKUnmask()(logits, tokens, mask, k, 0.7, 0.2)
    torch.manual_seed(1)
    again = topk_unmask(logits, tokens, mask, k, temperature=0.7, threshold=0.2)
    assert sampled.committed.any() and all(torch.equal(one, other) for one, other in zip(sampled, again, strict=True))


def test_attention_and_its_gradients_against_float64():
    *ours, key_mask = make_inputs(layers.BidirectionalAttention)
    exact = [x.double().requires_grad_() for x in ours]
    ours = [x.requires_grad_() for x in ours]
    mask = key_mask[:, None, None, :] & (torch.arange(7) // 2 <= (torch.arange(2, 7) // 2)[:, None])
    q, k, v = (x.transpose(1, 2) for x in exact)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    found = layers.BidirectionalAttention()(*ours, key_mask, 2, 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    wanted.backward(upstream.double())
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_torch_compile_keeps_a_layer_whole(layer):
    inputs = make_inputs(layer)
    compiled, eager = torch.compile(layer(), fullgraph=True, backend="aot_eager")(*inputs), layer()(*inputs)
    torch.testing.assert_close(compiled, eager)
