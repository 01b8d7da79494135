"""The masked Kullback-Leibler divergence against float64, its gradients, and what it never touches."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dllm_kernels import linear_masked_kl_divergence
from dllm_kernels.masked_cross_entropy import products

REDUCTIONS = ["mean", "sum", "none"]
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def make(N, D, E, V, dtype=torch.float32, share=0.5):
    """Student (hidden, weight, bias), teacher (the same), corrupted and weights."""
    g = torch.Generator().manual_seed(N)
    shapes = (N, D), (V, D), (V,), (N, E), (V, E), (V,)
    tensors = [(torch.randn(*shape, generator=g) * 0.7).to(dtype) for shape in shapes]
    return tensors[:3], tensors[3:], torch.rand(N, generator=g) < share, torch.rand(N, generator=g) * 4


def exact(student, teacher, corrupted, weights, temperature, reduction):
    (x, w, b), (y, u, c) = student, teacher
    log_q, log_p = ((F.linear(*of) / temperature).log_softmax(-1) for of in ((x, w, b), (y, u, c)))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    kl = torch.where(corrupted, kl * weights.to(kl.dtype), 0)
    return kl if reduction == "none" else kl.sum() / (max(int(corrupted.sum()), 1) if reduction == "mean" else 1)


def run(student, teacher, *rest, dtype, **settings):
    corrupted, weights, temperature, reduction = rest
    leaves = [x.detach().to(dtype).requires_grad_() for x in student]
    theirs = [x.to(dtype) for x in teacher]
    if settings:
        loss = linear_masked_kl_divergence(*leaves[:2], *theirs[:2], corrupted, bias=leaves[2], teacher_bias=theirs[2],
                                           weights=weights, temperature=temperature, reduction=reduction, **settings)
    else:
        loss = exact(leaves, theirs, *rest)
    upstream = torch.linspace(-1, 1.5, loss.numel()).view_as(loss)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))


@reductions
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (33, 16, 24, 1001), (150, 8, 8, 77)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_divergence_and_gradients_are_as_exact_as_eager(shape, share, dtype, temperature, reduction):
    case = (*make(*shape, dtype, share), temperature, reduction)
    ours = run(*case, dtype=dtype, workspace_bytes=8 * 1008 * 20, backend="reference")
    eager, truth = run(*case, dtype=dtype), run(*case, dtype=torch.double)
    assert ours[0].dtype == torch.float32
    for mine, theirs, true in zip(ours, eager, truth, strict=True):
        bound = 2 * (theirs.double() - true).abs().max() + 4e-6 * true.abs().max() + 1e-7
        assert (mine.double() - true).abs().max() <= bound


def test_it_is_zero_against_itself_and_rows_that_are_not_corrupted_are_not_read():
    student, _, corrupted, weights = make(33, 16, 16, 101)
    hidden = student[0].masked_fill(~corrupted[:, None], torch.nan).requires_grad_()
    loss = linear_masked_kl_divergence(hidden, student[1], hidden.detach(), student[1], corrupted, reduction="none",
                                       weights=weights.masked_fill(~corrupted, torch.nan))
    loss.sum().backward()
    assert loss.abs().max() < 1e-6 and hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("reduction, count", [("mean", 4), ("none", 6)])
def test_it_takes_four_products_and_stores_some_rows_of_logits_at_a_time(reduction, count, monkeypatch):
    student, teacher, corrupted, _ = make(300, 16, 16, 1001, share=1.0)
    leaves = [x.requires_grad_() for x in student[:2]]
    sizes, original = [], products.logits_of
    monkeypatch.setattr(products, "logits_of", lambda *a: sizes.append(len(a[0])) or original(*a))
    with FlopCounterMode(display=False) as counter:
        loss = linear_masked_kl_divergence(*leaves, *teacher[:2], corrupted, reduction=reduction,
                                           workspace_bytes=2 * 4 * 1001 * 130)
        loss.sum().backward()
    assert counter.get_total_flops() == count * 2 * 300 * 16 * 1001 and max(sizes) == 128


def test_gradients_in_double_and_words_that_neither_has():
    student, teacher, corrupted, weights = ([*map(torch.Tensor.double, x)] if isinstance(x, list) else x
                                            for x in make(5, 3, 4, 7))
    leaves = [x.requires_grad_() for x in student]
    assert torch.autograd.gradcheck(lambda x, w, b: linear_masked_kl_divergence(
        x, w, *teacher[:2], corrupted, bias=b, weights=weights.double(), temperature=1.3), leaves)
    absent = torch.zeros(7).index_fill(0, torch.tensor([2, 5]), -torch.inf)
    case = [x.detach().float() for x in student[:2]], [x.float() for x in teacher[:2]], corrupted
    loss = linear_masked_kl_divergence(*case[0], *case[1], corrupted, bias=absent, teacher_bias=absent)
    kept = torch.tensor([0, 1, 3, 4, 6])
    (x, w), (y, u) = case[:2]
    assert loss.item() == pytest.approx(linear_masked_kl_divergence(x, w[kept], y, u[kept], corrupted).item(), rel=1e-5)


@pytest.mark.slow
@reductions
def test_compiles_whole(reduction):
    student, teacher, corrupted, weights = make(9, 4, 5, 17)
    leaves = [x.requires_grad_() for x in student[:2]]

    def loss(x, w):
        return linear_masked_kl_divergence(x * 2, w, *teacher[:2], corrupted, weights=weights, reduction=reduction)

    eager, compiled = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, eager)
    for ours, theirs in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (compiled, eager)), strict=True):
        assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("changes, message", [
    ({"teacher_weight": torch.zeros(16, 5)}, "the same positions and words, and corrupted [...], not [[9, 4], [17, 4]"),
    ({"teacher_hidden": torch.zeros(8, 5)}, "with the same positions and words"),
    ({"corrupted": torch.zeros(9)}, "takes bool corrupted and weights of its shape [9], not torch.float32 and None"),
    ({"weights": torch.ones(3)}, "not torch.bool and [3]"), ({"count": 99}, "count is the number of corrupted"),
    ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
    ({"reduction": "batchmean"}, "reduction must be one of mean, sum, none, not 'batchmean'"),
    ({"workspace_bytes": 0}, "workspace_bytes must be above 0, or None for the default, not 0"),
    ({"teacher_weight": torch.zeros(17, 5, dtype=torch.int8)}, "and biases, not torch.int8"),
    ({"weight": torch.zeros(17, 4, device="meta")}, "inputs are on cpu, meta; move them to one device"),
    ({"backend": "cuda"}, "there is no backend 'cuda'")])
def test_errors_say_what_was_wanted_and_what_came(changes, message):
    student, teacher, corrupted, _ = make(9, 4, 5, 17)
    given = {"hidden": student[0], "weight": student[1], "teacher_hidden": teacher[0], "teacher_weight": teacher[1],
             "corrupted": corrupted, **changes}
    with pytest.raises(ValueError) as error:
        linear_masked_kl_divergence(**given)
    assert message in str(error.value)
