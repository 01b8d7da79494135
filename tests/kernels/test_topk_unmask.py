"""Unmasking: every backend against an oracle in float64, written here from the definition."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_kernels import linear_token_scores, linear_topk_unmask, philox_uniform, token_scores, topk_unmask
from dllm_kernels.dispatch import runnable
from dllm_kernels.topk_unmask import LOGITS_BACKENDS
from dllm_kernels.topk_unmask.random import philox
from dllm_kernels.topk_unmask.settings import Rows, Sampling

BACKENDS = runnable(LOGITS_BACKENDS, torch.zeros(1))
MASK = 0
FILTERS = [
    {},
    {"top_k": 3},
    {"top_p": 0.8},
    {"top_p": 0.9, "top_k": 4},
    {"top_p": 1e-6},
    {"top_k": 10**6, "top_p": 1.0},
]


def uniforms(*shape, seed=0):
    return torch.rand(*shape, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).clamp(
        1e-12, 1 - 1e-12
    )


def make_logits(M, V, dtype=torch.float32, scale=3.0, seed=0):
    return (scale * torch.randn(M, V, generator=torch.Generator().manual_seed(seed))).to(dtype)


def kept_tokens(x, top_k, top_p):
    """The ids that the filters keep, by the definition: a sort, then a loop over the tokens from the likeliest down."""
    ids = sorted(range(len(x)), key=lambda v: (-x[v], v))
    if top_p is not None and top_p < 1:
        weights = [math.exp(x[v] - x[ids[0]]) for v in ids]
        before, nucleus = 0.0, []
        for v, weight in zip(ids, weights, strict=True):
            if nucleus and before / math.fsum(weights) > top_p:
                break
            nucleus.append(v)
            before += weight
        ids = nucleus
    if top_k is not None and top_k < len(ids):
        ids = [v for v in ids if x[v] >= x[ids[top_k - 1]]]
    return set(ids)


def softmax64(x, kept):
    top = max(x[v] for v in kept)
    weights = [math.exp(x[v] - top) if v in kept else 0.0 for v in range(len(x))]
    return [weight / math.fsum(weights) for weight in weights]


def score64(row, u, confidence="prob", temperature=0.0, top_k=None, top_p=None, confidence_of="filtered"):
    """Token, confidence, and how far u is from where the token would change, of one row."""
    raw = row.double().tolist()
    x = (row.float() / temperature).double().tolist() if temperature else raw
    p = softmax64(x, kept_tokens(x, top_k, top_p))
    token, slack = max(range(len(p)), key=lambda v: (p[v], -v)), 1.0
    if temperature:
        total, cumulative = 0.0, []
        for share in p:
            total += share
            cumulative.append(total)
        token = next(v for v in range(len(p)) if cumulative[v] > u[0] * total)
        slack = min(abs(u[0] - c) for c in cumulative)
    if confidence == "random":
        return token, u[1], slack
    q = softmax64(raw, range(len(raw))) if confidence_of == "raw" else p
    best = sorted(q, reverse=True) + [0.0]
    score = {"prob": q[token], "margin": best[0] - best[1], "entropy": math.fsum(s * math.log(s) for s in q if s)}[
        confidence
    ]
    return token, score, slack


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("confidence", ["prob", "margin", "entropy", "random"])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(
    "temperature, confidence_of", [(0.0, "filtered"), (0.7, "filtered"), (1.0, "raw"), (0.0, "raw")]
)
def test_token_and_confidence_equal_the_definition(backend, confidence, filters, temperature, confidence_of):
    for M, V, dtype in [
        (1, 1, torch.float32),
        (3, 2, torch.bfloat16),
        (9, 41, torch.float32),
        (2, 1031, torch.float16),
    ]:
        logits, u = make_logits(M, V, dtype), uniforms(M)
        settings = {"confidence": confidence, "temperature": temperature, "confidence_of": confidence_of, **filters}
        token, score = token_scores(logits, generator=u, backend=backend, **settings)
        for m in range(M):
            want_token, want_score, slack = score64(logits[m], u[m].tolist(), **settings)
            if slack > 1e-6:
                assert token[m] == want_token
                assert score[m].item() == pytest.approx(want_score, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("V, scale", [(41, 1.0), (5003, 3.0), (40960, 8.0)])  # no block divides it; many blocks, peaked
def test_error_at_most_twice_that_of_eager(backend, dtype, V, scale):
    logits = make_logits(33, V, dtype, scale)
    for name, measure in {
        "prob": lambda p: p.max(-1).values,
        "margin": lambda p: p.topk(2).values @ torch.tensor([1.0, -1.0], dtype=p.dtype),
        "entropy": lambda p: torch.special.xlogy(p, p).sum(-1),
    }.items():
        exact, eager = measure(logits.double().softmax(-1)), measure(logits.float().softmax(-1))
        ours = token_scores(logits, confidence=name, backend=backend).confidence
        assert ours.dtype == torch.float32
        assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-7 * exact.abs().max().clamp(min=1)


@pytest.mark.slow
def test_backends_agree_to_the_token_on_the_same_uniforms():
    """Rounding decides where u is within some 1e-8 of a boundary: none of these 6,000 draws; 1 in 1,000 is allowed."""
    for V, scale, filters in [
        (8192, 1.0, {}),
        (8192, 0.05, {}),
        (4099, 3.0, {"top_p": 0.95}),
        (4099, 1.0, {"top_k": 50}),
    ]:
        logits, u = make_logits(1500, V, scale=scale), uniforms(1500)
        first, *others = [
            token_scores(logits, temperature=0.9, generator=u, backend=name, **filters) for name in BACKENDS
        ]
        for other in others:
            assert (first.token != other.token).double().mean() <= 1e-3
            same = first.token == other.token
            assert torch.allclose(first.confidence[same], other.confidence[same], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_go_to_the_lowest_token(backend):
    logits = torch.zeros(4, 5000)
    logits[1, [4999, 3000, 17]] = 2.0
    logits[2] = -torch.inf
    logits[2, 4097:] = -5.0
    logits[3, ::7] = -torch.inf
    result = token_scores(logits, confidence="margin", backend=backend)
    assert result.token.tolist() == [0, 17, 4097, 1]
    assert result.confidence.tolist() == [0.0] * 4
    many = make_logits(64, 3001, scale=0.02).to(torch.bfloat16) + 1  # a handful of distinct values
    first = [(row == row.max()).nonzero()[0].item() for row in many]
    assert token_scores(many, backend=backend).token.tolist() == first


@pytest.mark.parametrize("backend", BACKENDS)
def test_filters_decide_ties_as_defined(backend):
    logits = torch.log(torch.tensor([[0.2, 0.3, 0.2, 0.1, 0.2]]))
    u = torch.tensor([[0.999999, 0.5]], dtype=torch.float64)  # the last token, in the order of ids, that is kept

    def last_kept(**filters):
        token, probability = token_scores(logits, temperature=1.0, generator=u, backend=backend, **filters)
        return token.item(), round(probability.item(), 5)

    assert last_kept(top_k=2) == (4, round(0.2 / 0.9, 5))  # the second largest has equals: all stay
    assert last_kept(top_p=0.45) == (1, 0.6)  # 0.3, then 0.2 of the lowest id among equals
    assert last_kept(top_p=0.55) == (2, round(0.2 / 0.7, 5))
    assert last_kept(top_p=0.05) == (1, 1.0)  # the first is always kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_p": 0.7}, {"top_p": 0.9, "top_k": 100}])
def test_samples_follow_the_distribution(backend, filters):
    V, draws = 256, 20_000
    logits = make_logits(1, V, scale=1.5, seed=3)
    u = philox_uniform(7, torch.tensor(0), 5, torch.arange(draws))
    tokens = token_scores(logits.expand(draws, V), temperature=1.3, generator=u, backend=backend, **filters).token
    x = (logits[0] / 1.3).double().tolist()
    p = torch.tensor(softmax64(x, kept_tokens(x, filters.get("top_k"), filters.get("top_p"))))
    count = tokens.bincount(minlength=V)
    assert (count[p == 0] == 0).all()
    common = p * draws >= 5
    pools = [(count[common], p[common] * draws)]
    if rare := float((p[~common] * draws).sum()):
        pools.append((count[~common].sum().view(1), torch.tensor([rare])))
    chi2 = sum(float(((seen - want) ** 2 / want).sum()) for seen, want in pools)
    freedom = sum(len(seen) for seen, _ in pools) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniforms_at_the_ends_take_the_first_and_last_possible_token(backend):
    logits = torch.full((2, 3000), -torch.inf)
    logits[:, 5] = logits[:, 2000] = 0.0
    u = torch.tensor([[2.0**-53, 0.5], [1 - 2.0**-53, 0.5]], dtype=torch.float64)
    assert token_scores(logits, temperature=1.0, generator=u, backend=backend).token.tolist() == [5, 2000]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "temperature": 0.8}, {"top_k": 5, "confidence": "margin"},
                                      {"confidence": "entropy", "confidence_of": "raw", "temperature": 1.0}])
def test_infinite_and_huge_logits(backend, settings):
    logits = make_logits(6, 2500)
    logits[0, ::2] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 77] = 3.0
    logits[2] *= 1e4
    logits[3] = -1e30
    logits[3, 9] = 1e30
    logits[4, 1234] = torch.nan
    logits[5] = -torch.inf
    u = uniforms(6)
    token, score = token_scores(logits, generator=u, backend=backend, **settings)
    for m in range(4):
        want_token, want_score, _ = score64(logits[m], u[m].tolist(), **settings)
        assert token[m] == want_token and score[m].item() == pytest.approx(want_score, rel=2e-5, abs=2e-6)
    assert score[4:].isnan().all()
    assert ((token >= 0) & (token < 2500)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k, committed", [
    (0, [[], [], []]), (1, [[1], [5], []]), (2, [[1, 4], [2, 5], []]), (99, [[1, 3, 4], [0, 2, 5], []]),
    (torch.tensor([2, 0, 7]), [[1, 4], [], []])])
def test_the_k_surest_masked_positions_of_each_row_are_committed(backend, k, committed):
    tokens = torch.tensor([[9, 0, 9, 0, 0, 9], [0, 8, 0, 8, 8, 0], [7, 7, 7, 7, 7, 7]])
    sureness = torch.tensor([[0, 3, 0, 1, 2, 0], [0.5, 0, 2, 0, 0, 3], [1, 1, 1, 1, 1, 1]])
    logits = torch.zeros(3, 6, 50)
    logits[..., 11] = 1 + sureness
    result = topk_unmask(logits, tokens, MASK, k, backend=backend)
    assert [row.nonzero().flatten().tolist() for row in result.committed] == committed
    assert torch.equal(result.tokens, torch.where(result.committed, 11, tokens))
    assert torch.equal(result.confidence == -torch.inf, tokens != MASK)
    packed = topk_unmask(logits[tokens == MASK], tokens, MASK, k, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(result, packed, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_confidences_go_to_the_lowest_position_and_nan_is_never_committed(backend):
    tokens = torch.zeros(2, 40, dtype=torch.long)
    logits = make_logits(1, 30).expand(2, 40, 30).clone()
    logits[1, :3] = torch.nan
    result = topk_unmask(logits, tokens, MASK, 5, backend=backend)
    assert [row.nonzero().flatten().tolist() for row in result.committed] == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]
    for settings in ({}, {"threshold": -1.0}, {"confidence": "random"}, {"selection_temperature": 1.0}):
        result = topk_unmask(logits, tokens, MASK, 40, backend=backend, **settings)
        assert result.committed[0].all() and result.committed[1, 3:].all() and not result.committed[1, :3].any()
        assert result.confidence[1, :3].isnan().all() and (result.tokens[1, :3] == MASK).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_commits_all_that_reach_it_and_at_least_k(backend):
    tokens = torch.zeros(2, 4, dtype=torch.long)
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.1, 0.9], [0.8, 0.2]], [[0.5, 0.5]] * 4]))
    result = topk_unmask(logits, tokens, MASK, 1, threshold=0.7, backend=backend)
    assert result.committed.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert (
        topk_unmask(logits, tokens, MASK, 0, threshold=0.5, backend=backend).committed[1].all()
    )  # at least, not above


def test_selection_temperature_samples_positions_in_proportion_to_exp_of_confidence():
    confidence = torch.tensor([0.9, 0.5, 0.7])
    logits = torch.stack((torch.log(confidence), torch.log(1 - confidence)), -1)
    rows = 20_000
    u = philox_uniform(1, torch.arange(rows)[:, None], 0, torch.arange(3))
    tokens = torch.zeros(rows, 3, dtype=torch.long)
    result = topk_unmask(logits.expand(rows, 3, 2), tokens, MASK, 1, selection_temperature=0.5, generator=u)
    want = (confidence / 0.5).softmax(-1)
    share = result.committed.double().mean(0)
    assert (share - want).abs().max() < 5 * 0.5 / math.sqrt(rows)
    gumbel = -torch.log(-torch.log(u[..., 1]))
    assert torch.equal(result.committed.int().argmax(1), (confidence.double() / 0.5 + gumbel).argmax(1))
    assert torch.equal(result.confidence[0], result.confidence[-1])  # the noise is not in it


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear", [False, True])
def test_a_row_does_not_depend_on_its_batch(backend, linear):
    B, L, D, V = 5, 12, 16, 2100
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, L, D, generator=generator), torch.randn(V, D, generator=generator)
    tokens = torch.where(torch.rand(B, L, generator=generator) < 0.6, MASK, 9)
    u = philox_uniform(3, torch.arange(B)[:, None], 4, torch.arange(L))
    settings = {"temperature": 0.8, "top_p": 0.9, "selection_temperature": 0.3, "backend": backend}

    def unmask(rows):
        if linear:
            return linear_topk_unmask(hidden[rows], weight, tokens[rows], MASK, 3, generator=u[rows], **settings)
        return topk_unmask((hidden @ weight.T)[rows], tokens[rows], MASK, 3, generator=u[rows], **settings)

    together, backwards = unmask(range(B)), unmask(list(range(B))[::-1])
    for b in range(B):
        alone = unmask([b])
        for all_rows, reverse, one in zip(together, backwards, alone, strict=True):
            # A BLAS may sum in another order for another number of rows; without one the confidence is equal too.
            same = torch.allclose if linear and one.is_floating_point() else torch.equal
            assert same(all_rows[b], one[0]) and same(reverse[B - 1 - b], one[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                 (torch.float16, torch.float32)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_form_equals_the_logits_form(backend, dtype, weight_dtype, bias):
    B, L, D, V = 3, 20, 24, 4500
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, L, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(weight_dtype)
    bias = torch.randn(V, generator=generator).to(weight_dtype) if bias else None
    tokens = torch.where(torch.rand(B, L, generator=generator) < 0.5, 7, 9)
    logits = hidden.float() @ weight.float().T + (0 if bias is None else bias.float())
    for settings in ({}, {"temperature": 0.7, "top_p": 0.9, "confidence": "entropy"}):
        settings = {**settings, "generator": uniforms(B, L), "backend": backend}
        ours = linear_topk_unmask(hidden, weight, tokens, 7, 2, bias=bias, **settings)
        want = topk_unmask(logits, tokens, 7, 2, **settings)
        assert torch.equal(ours.tokens, want.tokens) and torch.equal(ours.committed, want.committed)
        assert torch.allclose(ours.confidence, want.confidence, rtol=1e-4, atol=1e-5)
        positions = (tokens == 7).flatten().nonzero().squeeze(1).flip(0)
        settings["generator"] = settings["generator"].flatten(0, 1)[positions]
        scores = linear_token_scores(hidden, weight, positions, bias=bias, **settings)
        assert torch.allclose(scores.confidence, want.confidence.flatten()[positions], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("D", [1, 31, 33, 66])  # no vector divides them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_from_hidden_states(dtype, D):
    """The product's form depends on the number of rows, on D and on the type."""
    generator = torch.Generator().manual_seed(D)
    weight = torch.randn(531, D, generator=generator).to(dtype)
    for rows in (1, 3, 4, 5, 16, 17, 33):
        hidden = torch.randn(rows, D, generator=generator).to(dtype)
        exact = (hidden.double() @ weight.double().T).softmax(-1).amax(-1)
        scores = linear_token_scores(hidden, weight, torch.arange(rows), backend="cpu")
        assert torch.allclose(scores.confidence.double(), exact, rtol=1e-5), rows


def as_bits(allowed):
    """[..., V] bool as int32, by the definition: bit v % 32 of number v // 32."""
    rows = allowed.flatten(0, -2) if allowed.ndim > 1 else allowed[None]
    numbers = [[sum(1 << i for i, yes in enumerate(row[v:v + 32].tolist()) if yes) for v in range(0, len(row), 32)]
               for row in rows]
    signed = torch.tensor(numbers).where(torch.tensor(numbers) < 2**31, torch.tensor(numbers) - 2**32)
    return signed.int().view(*allowed.shape[:-1], -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V, dtype", [(2, torch.float32), (33, torch.bfloat16), (1500, torch.float32),
                                      (1025, torch.float16)])
def test_words_not_allowed_have_no_probability(backend, V, dtype):
    B, L, D = 2, 9, 6
    g = torch.Generator().manual_seed(V)
    hidden, weight = torch.randn(B, L, D, generator=g).to(dtype), torch.randn(V, D, generator=g).to(dtype)
    tokens = torch.where(torch.rand(B, L, generator=g) < 0.7, MASK, 1)
    each = torch.rand(B, L, V, generator=g) < 0.4
    each[0, :3], each[1, 2] = False, True
    one = torch.rand(V, generator=g) < 0.5
    logits = (hidden.float() @ weight.float().T)
    for settings in ({}, {"confidence": "margin"}, {"confidence": "entropy", "temperature": 0.8}, {"top_k": 3},
                     {"temperature": 0.7, "top_p": 0.8}, {"confidence": "random", "temperature": 2.0}):
        settings = {**settings, "generator": uniforms(B, L), "backend": backend}
        for allowed, given in ((one, one), (each, each), (each, each[tokens == MASK]), (each, as_bits(each)),
                               (one, as_bits(one)), (each, as_bits(each)[tokens == MASK])):
            want = topk_unmask(logits.masked_fill(~allowed, -torch.inf), tokens, MASK, 4, **settings)
            for got in (topk_unmask(logits, tokens, MASK, 4, allowed=given, **settings),
                        linear_topk_unmask(hidden, weight, tokens, MASK, 4, allowed=given, **settings)):
                assert torch.equal(got.tokens, want.tokens) and torch.equal(got.committed, want.committed)
                assert torch.allclose(got.confidence, want.confidence, rtol=1e-5, atol=1e-6, equal_nan=True)
        impossible = (tokens == MASK) & ~each.any(-1)
        assert got.confidence[impossible].isnan().all() and not got.committed[impossible].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_raw_confidence_is_of_all_words(backend, temperature):
    logits, allowed, u = make_logits(20, 700), torch.arange(700) % 3 == 1, uniforms(20)
    settings = {"allowed": allowed, "temperature": temperature, "confidence_of": "raw", "generator": u,
                "backend": backend}
    token, confidence = token_scores(logits, **settings)
    assert (token % 3 == 1).all()
    exact = logits.double().softmax(-1)
    assert torch.allclose(confidence.double(), exact.gather(1, token[:, None])[:, 0], rtol=1e-5)
    entropy = token_scores(logits, confidence="entropy", **settings).confidence
    assert torch.allclose(entropy.double(), (exact * exact.log()).sum(1), rtol=1e-5)
    linear = linear_token_scores(logits, torch.eye(700), torch.arange(20), **settings)
    assert torch.equal(linear.token, token) and torch.allclose(linear.confidence, confidence, rtol=1e-5)
    none = token_scores(logits, **{**settings, "allowed": torch.zeros(700, dtype=torch.bool)})
    assert none.confidence.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_form_over_many_rows_and_blocks_of_words(backend):
    rows, D, V = 200, 4, 3001
    g = torch.Generator().manual_seed(2)
    # Integers, so that products are exact in any order, with many equals, in different blocks of words too.
    hidden, weight = (torch.randint(-2, 3, shape, generator=g).float() for shape in ((1, rows, D), (V, D)))
    logits = hidden[0] @ weight.T
    for settings in ({}, {"confidence": "margin"}, {"temperature": 1.5},
                     {"confidence": "entropy", "confidence_of": "raw", "temperature": 0.5}):
        settings = {**settings, "generator": uniforms(rows), "backend": backend}
        for M in (1, 3, 10, 11, rows):
            settings["generator"] = uniforms(M)
            got = linear_token_scores(hidden, weight, torch.arange(M), **settings)
            want = token_scores(logits[:M], **settings)
            assert torch.equal(got.token, want.token)
            assert torch.allclose(got.confidence, want.confidence, rtol=1e-4, atol=1e-5)


def test_debug_names_the_first_row_without_an_answer(monkeypatch):
    logits = torch.zeros(4, 9)
    logits[2, 3] = torch.nan
    assert token_scores(logits).confidence.isnan().sum() == 1
    monkeypatch.setenv("DLLM_DEBUG", "1")
    with pytest.raises(ValueError, match="1 of 4 rows, the first of them 2, have a NaN or an infinity among"):
        token_scores(logits)
    token_scores(logits[:2])


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled extension is not available")
def test_cpu_backend_reads_masked_rows_only_and_neither_stores_nor_copies_logits():
    B, L, D, V = 4, 64, 8, 20_000
    hidden, weight = torch.full((B, L, D), torch.nan), torch.randn(V, D)
    tokens = torch.ones(B, L, dtype=torch.long)
    tokens[:, ::2] = MASK
    hidden[:, ::2] = torch.randn(B, L // 2, D)
    logits, u = hidden @ weight.T, uniforms(B, L)
    for settings in ({}, {"temperature": 0.7, "generator": u}, {"temperature": 0.7, "generator": u, "top_p": 0.9}):
        with LargestTensor() as largest:
            result = linear_topk_unmask(hidden, weight, tokens, MASK, 4, backend="cpu", **settings)
        stored = 4 * largest.elements  # bytes
        assert stored <= 64 << 20 if "top_p" in settings else stored <= 4 * hidden.numel()
        assert result.confidence[tokens == MASK].isfinite().all()
        with LargestTensor() as largest:
            result = topk_unmask(logits, tokens, MASK, 4, backend="cpu", **settings)
        assert largest.elements <= 2 * B * L and result.confidence[tokens == MASK].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, L", [(0, 5), (3, 0), (3, 5)])
def test_nothing_masked_changes_nothing(backend, B, L):
    tokens = torch.ones(B, L, dtype=torch.long)
    for result in (topk_unmask(torch.randn(B, L, 7), tokens, MASK, 2, temperature=1.0, backend=backend),
                   topk_unmask(torch.randn(0, 7), tokens, MASK, 2, backend=backend),
                   linear_topk_unmask(torch.randn(B, L, 4), torch.randn(7, 4), tokens, MASK, 2, backend=backend)):
        assert torch.equal(result.tokens, tokens) and not result.committed.any()
        assert (result.confidence == -torch.inf).all() and result.confidence.shape == (B, L)
    empty = linear_token_scores(
        torch.randn(2, 3, 4), torch.randn(7, 4), torch.empty(0, dtype=torch.long), backend=backend
    )
    assert empty.token.shape == empty.confidence.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_no_gradient(backend):
    base = make_logits(40, 1300)
    want = token_scores(base[::2, :650].contiguous(), confidence="entropy", backend=backend)
    transposed = base[::2, :650].T.contiguous().T
    for view in (base[::2, :650], transposed, transposed.clone().requires_grad_()):
        result = token_scores(view, confidence="entropy", backend=backend)
        assert torch.equal(result.token, want.token) and torch.equal(result.confidence, want.confidence)
        assert not result.confidence.requires_grad
    one = token_scores(base[:1].expand(4, 1300), backend=backend)
    assert (one.token == base[0].argmax()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninitialised_memory_is_never_read(backend):
    hidden, weight, tokens = torch.randn(2, 9, 8), torch.randn(5001, 8), torch.zeros(2, 9, dtype=torch.long)
    settings = {
        "confidence": "entropy",
        "temperature": 0.9,
        "top_p": 0.9,
        "generator": uniforms(2, 9),
        "backend": backend,
    }
    want = linear_topk_unmask(hidden, weight, tokens, MASK, 4, **settings)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        got = linear_topk_unmask(hidden, weight, tokens, MASK, 4, **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_works_under_autocast(backend):
    hidden, weight, tokens = torch.randn(2, 9, 8), torch.randn(600, 8), torch.zeros(2, 9, dtype=torch.long)
    want = linear_topk_unmask(hidden, weight, tokens, MASK, 4, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_topk_unmask(hidden, weight, tokens, MASK, 4, backend=backend)
        assert token_scores(torch.randn(3, 50), backend=backend).confidence.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend):
    tokens, u = torch.tensor([[0, 4, 0], [0, 0, 5]]), uniforms(2, 3)
    rows, sampling = Rows(None, u), Sampling("prob", 0.8, 5, 0.9)
    hidden, weight = torch.randn(2, 3, 6), torch.randn(11, 6)
    for head in ((torch.randn(2, 3, 11), None, None), (hidden, weight, torch.randn(11))):
        torch.library.opcheck(torch.ops.dllm_kernels.topk_unmask,
                              (*head, tokens, MASK, *rows, *sampling, torch.tensor([1, 2]), 0.5, 0.9, None, backend))
    for head, index in (((torch.randn(4, 11), None, None), None), ((hidden, weight, None), torch.tensor([1, 5, 0, 2]))):
        torch.library.opcheck(torch.ops.dllm_kernels.token_scores,
                              (*head, *Rows(index, uniforms(4)), *sampling, backend))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    hidden, weight, u = torch.randn(2, 6, 8), torch.randn(50, 8), uniforms(2, 6)
    tokens = torch.tensor([[0, 4, 0, 0, 1, 2], [0, 0, 5, 0, 0, 0]])

    def step(hidden, tokens, k, u):
        result = linear_topk_unmask(
            hidden * 2, weight, tokens, MASK, k, temperature=0.9, top_p=0.9, generator=u, backend=backend
        )
        again = topk_unmask(hidden @ weight.T, result.tokens, MASK, k, confidence="margin", backend=backend)
        scores = linear_token_scores(hidden, weight, torch.arange(3), backend=backend)
        return (
            again.tokens,
            again.confidence,
            scores.token + token_scores(hidden[0] @ weight.T, backend=backend).token[:3],
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for k in (torch.tensor([1, 2]), 2):
        assert all(
            torch.equal(a, b) for a, b in zip(step(hidden, tokens, k, u), compiled(hidden, tokens, k, u), strict=True)
        )


def test_a_generator_and_the_global_seed_repeat():
    logits, tokens = make_logits(12, 30).view(2, 6, 30), torch.zeros(2, 6, dtype=torch.long)

    def draw(generator=None):
        return topk_unmask(logits, tokens, MASK, 6, temperature=1.5, generator=generator).tokens

    assert torch.equal(draw(torch.Generator().manual_seed(5)), draw(torch.Generator().manual_seed(5)))
    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(first, draw()) and not torch.equal(first, second)


@pytest.mark.parametrize("counter, key, want", [  # from the paper's implementation, Random123
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1])])
def test_philox_gives_the_known_answers(counter, key, want):
    assert [int(word) for word in philox(tuple(torch.tensor(word) for word in counter), key)] == want


def test_philox_uniform_depends_on_seed_sequence_step_and_position_alone():
    sequence, position = torch.arange(40)[:, None], torch.arange(250)
    u = philox_uniform(11, sequence, 3, position)
    assert u.shape == (40, 250, 2) and u.dtype == torch.float64 and 0 < u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / u.numel())
    assert u.unique().numel() == u.numel()
    assert torch.equal(philox_uniform(11, sequence[7:9], 3, position[100:]), u[7:9, 100:])
    for seed, step in ((12, 3), (11, 4), (11 + 2**40, 3), (-11, 3)):
        assert (philox_uniform(seed, sequence, step, position) != u).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda z, t: topk_unmask(z, t, 0, 1, backend="nothing"), "no backend 'nothing'"),
        (
            lambda z, t: topk_unmask(z, t, 0, 1, confidence="best"),
            "confidence must be one of prob, margin, entropy, random",
        ),
        (lambda z, t: topk_unmask(z, t, 0, 1, confidence_of="both"), "'filtered' or 'raw', not 'both'"),
        (lambda z, t: topk_unmask(z, t, 0, 1, temperature=-0.5), "must be 0 or more and finite, not -0.5"),
        (lambda z, t: topk_unmask(z, t, 0, 1, temperature=math.nan), "must be 0 or more and finite, not nan"),
        (lambda z, t: topk_unmask(z, t, 0, 1, selection_temperature=-1.0), "selection_temperature must .* not -1.0"),
        (lambda z, t: topk_unmask(z, t, 0, 1, top_p=0.0), r"top_p must be in \(0, 1\], not 0.0"),
        (lambda z, t: topk_unmask(z, t, 0, 1, top_p=math.nan), "top_p"),
        (lambda z, t: topk_unmask(z, t, 0, 1, top_k=0), "top_k must be at least 1"),
        (lambda z, t: topk_unmask(z, t, 0, -1), "k must be 0 or more, not -1"),
        (
            lambda z, t: topk_unmask(z, t, 0, torch.ones(3, dtype=torch.long)),
            r"k \[B\] int64 = \[2\] or an int, not \[3\]",
        ),
        (lambda z, t: topk_unmask(z, t, 0, torch.tensor([1, -2])), r"k must be 0 or more, not \[1, -2\]"),
        (lambda z, t: topk_unmask(z, t, 0, 1, allowed=torch.ones(8) > 0),
         r"allowed \[9\], \[M, 9\] or \[2, 3, 9\] bool, or their bits \[..., 1\] int32, not \[8\] torch.bool"),
        (lambda z, t: topk_unmask(z, t, 0, 1, allowed=torch.ones(9)), "not .* torch.float32"),
        (lambda z, t: topk_unmask(z, t, 0, 1, allowed=torch.ones(3, 2, 9) > 0), r"not \[3, 2, 9\]"),
        (lambda z, t: topk_unmask(z, t, 0, 1, allowed=torch.ones(5, 9) > 0), "allowed words .* 5 rows, 6 masked"),
        (lambda z, t: token_scores(z[0], allowed=torch.ones(2, 9) > 0), "2 rows, 3 positions"),
        (lambda z, t: topk_unmask(z, t, 9, 1), "mask_token_id 9 is outside the vocabulary of 9"),
        (lambda z, t: topk_unmask(z, t, -1, 1), "mask_token_id -1 is outside"),
        (lambda z, t: topk_unmask(z, t.int(), 0, 1), r"tokens \[B, L\] int64, not \[2, 3\] torch.int32"),
        (lambda z, t: topk_unmask(z[:, :2], t, 0, 1), r"not \[2, 2, 9\] and \[2, 3\]"),
        (lambda z, t: topk_unmask(z[0], t, 0, 1), "3 rows, 6 masked"),
        (
            lambda z, t: topk_unmask(z, t, 0, 1, generator=torch.rand(2, 3, 2)),
            r"uniforms \[2, 3, 2\] float64, not .* torch.float32",
        ),
        (lambda z, t: token_scores(z), "flatten B and L first"),
        (lambda z, t: token_scores(torch.empty(2, 0)), "V at least 1"),
        (lambda z, t: linear_topk_unmask(z, torch.randn(9, 9), t, 0, 1, count=3), "masked positions, 6, not 3"),
        (lambda z, t: linear_topk_unmask(z, torch.randn(9, 8), t, 0, 1), r"weight \[V, D\] and bias \[V\], not"),
        (lambda z, t: linear_topk_unmask(z, torch.randn(9, 9), t[:1], 0, 1), r"hidden \[B, L, D\] and tokens \[B, L\]"),
        (lambda z, t: linear_token_scores(z, torch.randn(9, 9), t), r"positions \[M\] int64"),
    ],
)
def test_bad_input_is_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.long))
