"""The Triton kernels of unmasking against the reference, on a GPU or in Triton's interpreter.

Without a GPU the first test runs this file again in a process of its own (conftest.py).
The tokens must be those of the reference. Rounding decides where u is within some 1e-7 of where the token changes: in
none of the draws here, whose uniforms are fixed.
"""

import importlib
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import dllm_kernels
from dllm_kernels.topk_unmask import products, random, reference, selection
from dllm_kernels.topk_unmask.allowed import pack, width
from dllm_kernels.topk_unmask.settings import Rows, Sampling, Selection
from tests.kernels.triton_cases import DEVICE, DTYPES, INTERPRETED, with_dtypes

pytest.importorskip("triton")
from dllm_kernels.topk_unmask import triton_kernels  # noqa: E402

topk_unmask = importlib.import_module("dllm_kernels.topk_unmask")  # whose name the package has for a function
CONFIDENCES = ["prob", "margin", "entropy", "random"]
FILTERS = [(3, None), (None, 0.8), (40, 0.9), (None, 1e-6)]  # top_k, top_p

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.mark.slow
def test_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.fixture
def many_blocks(monkeypatch):
    """Blocks, tiles and a workspace so small that every loop and grid has several of them."""
    few = {"WORDS": 64, "INNER": 16, "num_warps": 4, "num_stages": 2}
    for name, value in (
            ("BLOCK", {"WORDS": 256, "num_warps": 4}), ("CUT", {"WORDS": 256, "num_warps": 4}), ("PROGRAMS", 4),
            ("TILES", {size: {"few": few, "linear": {"ROWS": 16, **few}} for size in (2, 4)}), ("MOST_FEW", 8),
            ("POSITIONS", {"BLOCK": 64, "num_warps": 4}), ("COMMIT", {"BLOCK": 16, "OTHERS": 32, "num_warps": 4})):
        monkeypatch.setattr(triton_kernels, name, value)
    monkeypatch.setattr(products, "WORKSPACE_BYTES", {"cpu": 4 * 301 * 12, "cuda": 4 * 301 * 12})


def make(n, V, dtype=torch.float32, scale=3.0, seed=0):
    """Logits, uniforms, and bits that allow half of the words."""
    g = torch.Generator().manual_seed(seed + V)
    logits, u = scale * torch.randn(n, V, generator=g), torch.rand(n, 2, dtype=torch.float64, generator=g)
    return logits.to(DEVICE, dtype), u.to(DEVICE), pack(torch.rand(n, V, generator=g) < 0.5).to(DEVICE)


def score_rows(logits, rows, u, bits, *settings):
    return triton_kernels.score_rows(logits, Rows(rows, u, bits), Sampling(*settings))


def linear_score_rows(hidden, weight, bias, rows, u, bits, *settings):
    return products.linear_score_rows(triton_kernels.score_rows, hidden, weight, bias, Rows(rows, u, bits),
                                      Sampling(*settings))


def truth(logits, *rows_and_settings):
    """`score_rows` by the reference, on the CPU."""
    logits, rows, u, bits, *settings = (x.cpu() if isinstance(x, torch.Tensor) else x
                                        for x in (logits, *rows_and_settings))
    return reference.score_rows(logits, Rows(rows, u, bits), Sampling(*settings))


def assert_same(ours, want):
    (token, score), (want_token, want_score) = [[x.cpu() for x in pair] for pair in (ours, want)]
    assert torch.allclose(score, want_score, rtol=2e-5, atol=2e-6, equal_nan=True), (score, want_score)
    defined = ~want_score.isnan()
    assert torch.equal(token[defined], want_token[defined])


def check(logits, u, bits, *settings):
    ours = score_rows(logits, None, u, bits, *settings)
    assert_same(ours, truth(logits, None, u, bits, *settings))
    return ours


@with_dtypes("raw, temperature, confidence", [
    *product([False], [0.0, 0.7], CONFIDENCES), *product([True], [0.7, 0.0], CONFIDENCES[::-1])], DTYPES)
def test_token_and_confidence(dtype, confidence, temperature, raw):
    for V in (2, 1000, 4099):  # no block divides the last two
        logits, u, bits = make(3, V, dtype)
        for allowed in (None, bits):
            check(logits, u, allowed, confidence, temperature, None, None, raw)


@pytest.mark.parametrize("confidence, temperature, raw", [
    ("prob", 0.7, False), ("margin", 0.0, False), ("entropy", 1.3, False), ("prob", 0.7, True), ("margin", 1.0, True),
    ("entropy", 0.0, True), ("random", 0.7, False)])
@pytest.mark.parametrize("top_k, top_p", FILTERS)
def test_filters(top_k, top_p, confidence, temperature, raw):
    place = CONFIDENCES.index(confidence)
    V, dtype = [(1000, torch.float16), (2, torch.float32), (300, torch.float16), (517, torch.float32)][place]
    logits, u, bits = make(2, V, dtype)
    check(logits, u, bits if top_k else None, confidence, temperature, top_k, top_p, raw)


@with_dtypes("top_k, top_p", FILTERS, DTYPES)
def test_many_blocks_and_many_equals(dtype, top_k, top_p, many_blocks):
    _, u, bits = make(3, 600)
    logits = make(3, 600, dtype, scale=1.0)[0].round()
    logits[logits == 0] *= -1  # -0.0 equals 0.0
    logits[:, ::3] = logits[:, ::3].abs()
    u[:, 0] = torch.tensor([0.001, 0.6, 1 - 2**-53], dtype=torch.float64)  # the last word that is kept
    check(logits, u, None, "prob", 1.0, top_k, top_p, False)
    check(logits, u, bits, "margin", 0.0, None, None, False)
    check(logits, u, None, "entropy", 0.3, None, None, True)
    check(logits, u, None, "prob", 0.0, None, None, False)


def test_a_cut_through_equals_goes_to_the_lowest_words():
    logits = torch.zeros(4, 300, device=DEVICE)
    logits[1, 7] = 5.0
    logits[2, :] = -3.0
    logits[3, 100:] = -torch.inf
    u = torch.full((4, 2), 1 - 2.0**-53, dtype=torch.float64, device=DEVICE)
    token, probability = score_rows(logits, None, u, None, "prob", 1.0, None, 0.5, False)
    share = math.exp(5) / (math.exp(5) + 299)
    equals = int((0.5 - share) / ((1 - share) / 299)) + 1  # kept beside word 7
    assert token.tolist() == [150, equals, 150, 50]
    assert probability.tolist() == pytest.approx([1 / 151, 1 / (math.exp(5) + equals), 1 / 151, 1 / 51])


@pytest.mark.parametrize("settings", [("prob", 0.0, None, None, False), ("entropy", 0.8, None, 0.9, False),
                                      ("margin", 0.7, 5, None, True), ("random", 0.5, None, None, False),
                                      ("prob", 1.0, None, None, True)])
def test_nan_infinite_and_huge_logits(settings):
    logits, u, _ = make(7, 300)
    logits[0, ::2] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 77] = 3.0
    logits[2] *= 1e4
    logits[3, 9] = 1e30
    logits[4, 123] = torch.nan
    logits[5] = -torch.inf
    logits[6, 200] = torch.inf
    token, score = check(logits, u, None, *settings)
    check(logits, u, torch.zeros(1, width(300), dtype=torch.int32, device=DEVICE).expand(7, -1), *settings)
    but_those = torch.ones(1, 300, dtype=torch.bool)
    but_those[:, [123, 200]] = False
    check(logits, u, pack(but_those).to(DEVICE).expand(7, -1), *settings)
    assert score[4:].isnan().all() and not score[:4].isnan().any() and ((token >= 0) & (token < 300)).all()


@pytest.mark.parametrize("temperature, top_p", [(0.0, None), (0.9, None), (0.9, 0.7)])
def test_rows_are_read_where_asked_and_nowhere_else(temperature, top_p):
    logits, u, bits = make(5, 700)
    rows = torch.tensor([3, -1, 0, 5, 3, 2**40, -1], device=DEVICE)
    logits[[1, 2, 4]] = torch.nan
    u, bits = u[[0, 1, 2, 3, 4, 0, 1]], bits[[0, 1, 2, 3, 4, 0, 1]]
    settings = ("prob", temperature, None, top_p, False)
    token, score = score_rows(logits, rows, u, bits, *settings)
    live = [0, 2, 4]
    assert_same((token[live], score[live]),
                truth(logits, rows[live], u[live], bits[live], *settings))
    assert (score[[1, 6]] == -torch.inf).all() and score[[3, 5]].isnan().all()
    wide = torch.full((5, 2, 700), torch.nan, device=DEVICE)
    wide[:, 0] = logits
    for strided in (wide[:, 0], logits.T.contiguous().T, torch.stack([logits, logits], 2)[..., 0]):
        again = score_rows(strided, rows, u, bits, *settings)
        assert torch.equal(again[0][live], token[live]) and torch.equal(again[1][live], score[live])


def test_more_elements_than_an_int32_counts():
    V = 1 << 14
    logits = torch.empty((1 << 17) + 2, V, dtype=torch.float16, device=DEVICE)  # only the row that is read is written
    logits[-1] = make(1, V, torch.float16)[0][0]
    rows = torch.tensor([len(logits) - 1], device=DEVICE)
    u = torch.tensor([[0.4, 0.5]], dtype=torch.float64, device=DEVICE)
    for temperature in (0.0, 0.8):
        settings = ("prob", temperature, None, None, False)
        assert_same(score_rows(logits, rows, u, None, *settings),
                    truth(logits[-1:], None, u, None, *settings))


@pytest.mark.parametrize("few, dtype, weight_dtype, settings", [
    *product([128], DTYPES, [None], [("margin", 0.0, None, None, False), ("prob", 0.7, None, None, False),
                                     ("entropy", 0.7, None, None, True)]),
    *product([128], DTYPES[:1 if INTERPRETED else None], [None], [("prob", 0.9, 40, 0.9, False)]),
    (128, torch.float16, torch.float32, ("prob", 0.7, None, None, False)),
    *product([0], DTYPES, [None, torch.float32], [("margin", 0.7, None, None, False)])])
def test_linear_form(few, dtype, weight_dtype, settings, many_blocks, monkeypatch):
    """By tiles and, of more than `few` rows, by PyTorch's product."""
    monkeypatch.setattr(products, "FEW", few)
    n, D, V, weight_dtype = 11 if settings[2] else 21, 37, 301, weight_dtype or dtype  # filters take longest
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(30, D, generator=g) / 3, torch.randn(V, D, generator=g)
    bias, rows = torch.randn(V, generator=g), torch.randint(30, (n,), generator=g)
    hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, weight_dtype)
    bias, rows = bias.to(DEVICE, weight_dtype), rows.to(DEVICE)
    _, u, bits = make(n, V)
    rows[::4], rows[5] = -1, 30
    unread = torch.ones(30, dtype=torch.bool, device=DEVICE)
    unread[rows[(rows >= 0) & (rows < 30)]] = False
    hidden[unread] = torch.nan
    live = (rows >= 0) & (rows < 30)
    for b, allowed in ((None, None), (bias, bits)):
        token, score = linear_score_rows(hidden, weight, b, rows, u, allowed, *settings)
        logits = F.linear(hidden.double(), weight.double(), None if b is None else b.double()).float()
        want = truth(logits, rows[live], u[live], None if allowed is None else allowed[live],
                      *settings)
        assert_same((token[live], score[live]), want)
        assert (score[rows == -1] == -torch.inf).all() and score[5].isnan()
    all_rows = linear_score_rows(hidden[:3].nan_to_num(), weight, None, None, u, None, *settings)
    want = reference.linear_score_rows(hidden[:3].nan_to_num().cpu(), weight.cpu(), None, Rows(None, u[:3].cpu()),
                                       Sampling(*settings))
    assert_same(all_rows, want)


def test_uninitialised_memory_is_never_read(many_blocks):
    hidden, weight = make(20, 37)[0], make(101, 37, scale=1.0)[0]
    _, u, bits = make(20, 101)
    rows = torch.full((20,), -1, device=DEVICE)
    rows[::3] = torch.arange(7, device=DEVICE)

    def run():
        outcomes = []
        for settings in (("prob", 0.0, None, None, False), ("entropy", 0.7, None, None, True),
                         ("margin", 0.9, None, 0.9, False)):
            outcomes += linear_score_rows(hidden, weight, None, rows, u, bits, *settings)
            outcomes += score_rows(hidden[:3], None, u, None, *settings)
        return outcomes

    plain = run()
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("settings, launches", [
    (("prob", 0.0, None, None, False), ["statistics", "choose"]),
    (("entropy", 0.7, None, None, True), ["statistics", "choose"]),
    (("random", 0.0, 5, 0.5, False), ["statistics", "choose"]),
    (("margin", 0.0, None, 1.0, False), ["statistics", "choose"]),
    (("margin", 0.0, None, 0.5, False), ["statistics", "cut", "statistics", "choose"])])
def test_launches_are_those_that_are_promised(settings, launches, monkeypatch):
    launched = []
    for name, kernel in vars(triton_kernels).copy().items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(triton_kernels, name, Watched(kernel, name, launched))
    logits, u, _ = make(2, 40)
    score_rows(logits, None, u, None, *settings)
    assert launched == [f"_{name}_kernel" for name in launches]


@pytest.mark.parametrize("temperature, top_p, n, sparse, launches", [
    (0.0, None, 4, False, ["list", "linear", "choose"]),
    (0.7, None, 4, False, ["list", "linear", "choose"]),
    (0.7, 0.5, 4, False, ["list", "linear", "statistics", "cut", "statistics", "choose"]),
    (0.0, None, 5, True, ["list", "linear", "choose"]),
    (0.7, None, 5, False, ["statistics", "choose"])])
def test_few_rows_and_rows_that_only_the_gpu_counts_are_multiplied_in_tiles(temperature, top_p, n, sparse, launches,
                                                                            monkeypatch):
    monkeypatch.setattr(products, "FEW", 4)
    launched = []
    for name, kernel in vars(triton_kernels).copy().items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(triton_kernels, name, Watched(kernel, name, launched))
    hidden, u, _ = make(n, 16)
    products.linear_score_rows(triton_kernels.score_rows, hidden, make(40, 16)[0], None, Rows(None, u, sparse=sparse),
                               Sampling("prob", temperature, None, top_p))
    assert launched == [f"_{name}_kernel" for name in launches]


class Watched:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize("linear, top_k, top_p, draws", [(False, None, None, 150), (True, None, None, 150),
                                                         (False, 5, 0.7, 40)])
def test_samples_follow_the_distribution(linear, top_k, top_p, draws, many_blocks):
    V = 70
    logits = make(1, V, scale=1.5)[0]
    u = random.philox_uniform(7, torch.tensor(0), 5, torch.arange(draws)).to(DEVICE)
    rows = torch.zeros(draws, dtype=torch.int64, device=DEVICE)
    settings = ("prob", 1.3, top_k, top_p, False)
    if linear:
        one = torch.ones(1, 1, device=DEVICE)
        token, score = linear_score_rows(one, logits.T.contiguous(), None, rows, u, None, *settings)
    else:
        token, score = score_rows(logits, rows, u, None, *settings)
    assert_same((token, score), truth(logits, rows, u, None, *settings))
    p = reference.filter_logits(logits.cpu().double() / 1.3, top_k, top_p).softmax(1)[0]
    count = token.cpu().bincount(minlength=V)
    assert (count[p == 0] == 0).all()
    common = p * draws >= 5
    seen, want = count[common].double(), p[common] * draws
    if (rare := p[~common].sum()) > 0:
        seen, want = torch.cat([seen, count[~common].sum().view(1)]), torch.cat([want, rare.view(1) * draws])
    freedom = len(seen) - 1
    assert ((seen - want) ** 2 / want).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("B, L", [(0, 5), (3, 0), (1, 1), (3, 700)])
def test_find_rows(B, L, packed):
    tokens = torch.randint(3, (B, L), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    masked, rows = triton_kernels.find_rows(tokens, 2, packed)
    assert torch.equal(masked, tokens == 2)
    flat = masked.flatten()
    place = flat.cumsum(0) - 1 if packed else torch.arange(B * L, device=DEVICE)
    assert torch.equal(rows, torch.where(flat, place, -1))


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("selection_temperature", [0.0, 0.3])
@pytest.mark.parametrize("B, L", [(1, 1), (5, 37), (2, 100)])
def test_commit_equals_the_definition_to_the_bit(B, L, selection_temperature, threshold, many_blocks):
    g = torch.Generator().manual_seed(L)
    tokens, token = torch.randint(9, (2, B, L), generator=g)
    masked = torch.rand(B, L, generator=g) < 0.6
    confidence = (torch.rand(B, L, generator=g) * 8).round() / 8  # equals
    confidence[torch.rand(B, L, generator=g) < 0.1] = torch.nan
    confidence[torch.rand(B, L, generator=g) < 0.1] = 0.7
    if selection_temperature == 0:
        confidence[torch.rand(B, L, generator=g) < 0.1] = -torch.inf
    confidence[~masked] = -torch.inf
    u = torch.rand(B, L, 2, dtype=torch.float64, generator=g)
    k = torch.tensor([3, 0, L + 5, -1, 1])[:B]
    arguments = tokens, masked, token, confidence
    want = selection.commit(*arguments, Selection(k, selection_temperature, threshold), u)
    ours = triton_kernels.commit(*(x.to(DEVICE) for x in arguments),
                                 Selection(k.to(DEVICE), selection_temperature, threshold), u.to(DEVICE))
    for mine, theirs in zip(ours, want, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine.cpu().nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("seed", [0, 11, -11, 2**40 + 5, 2**63])
def test_philox_equals_the_definition_to_the_bit(seed):
    sequence, position = torch.tensor([0, 5, 2**32 - 1]), torch.arange(70) * 61356675
    for shape in (lambda s, p: (s[:, None], p), lambda s, p: (s[0], p), lambda s, p: (s[:, None, None], p.view(7, 10))):
        for step in (0, 3, 2**32 - 1):
            s, p = shape(sequence, position)
            want = random.philox_uniform(seed, s, step, p)
            for given in (step, torch.tensor(step, device=DEVICE)):
                ours = triton_kernels.philox_uniform(seed, s.to(DEVICE), given, p.to(DEVICE))
                assert torch.equal(ours.cpu(), want)


def test_empty_inputs():
    logits, u, _ = make(0, 50)
    for temperature, top_k in ((0.0, None), (0.7, None), (0.7, 3)):
        settings = ("prob", temperature, top_k, None, False)
        none = torch.empty(0, dtype=torch.int64, device=DEVICE)
        for token, score in (score_rows(logits, None, u, None, *settings),
                             score_rows(make(3, 50)[0], none, u, None, *settings),
                             linear_score_rows(logits, make(9, 50)[0], None, None, u, None, *settings)):
            assert token.shape == score.shape == (0,) and token.dtype == torch.int64 and score.dtype == torch.float32


@on_gpu
@pytest.mark.parametrize("settings", [("prob", 0.0, None, None, False), ("margin", 0.7, None, None, True),
                                      ("entropy", 0.9, 50, 0.9, False)])
@pytest.mark.parametrize("linear", [False, True])
def test_the_host_never_waits_and_a_graph_replays_on_new_inputs(linear, settings):
    B, L, D, V = 4, 50, 64, 5003
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)
    hidden, weight = make(B * L, D, torch.bfloat16)[0], make(V, D, torch.bfloat16, scale=0.3)[0]
    tokens = torch.randint(3, (B, L), device=DEVICE)
    k = torch.full((B,), 3, device=DEVICE)
    sequence, position = torch.arange(B, device=DEVICE)[:, None], torch.arange(L, device=DEVICE)

    def denoise():
        u = triton_kernels.philox_uniform(5, sequence, step, position)
        masked, rows = triton_kernels.find_rows(tokens, 0, False)
        inputs = (hidden, weight, None) if linear else (hidden @ weight.T,)
        score = linear_score_rows if linear else score_rows
        token, confidence = score(*inputs, rows, u.flatten(0, 1), None, *settings)
        return triton_kernels.commit(tokens, masked, token.view(B, L), confidence.view(B, L), Selection(k, 0.5, 0.9), u)

    denoise()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        denoise()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = denoise()
    for _ in range(3):
        step += 1
        hidden.copy_(torch.randn_like(hidden))
        tokens.copy_(torch.randint_like(tokens, 3))
        graph.replay()
        for mine, theirs in zip(out, denoise(), strict=True):
            assert torch.equal(mine, theirs)


STEPS = [{}, {"temperature": 0.8}, {"confidence": "entropy", "top_k": 5}, {"temperature": 0.8, "top_p": 0.9},
         {"threshold": 0.3}, {"confidence": "random", "selection_temperature": 0.5}]
GIVEN = ["none", "each", "masked", "one"]


@pytest.mark.parametrize("settings, given", product(STEPS, GIVEN) if not INTERPRETED else [
    *product(STEPS[:2], GIVEN), *zip(STEPS[2:], GIVEN, strict=True)])
def test_a_whole_step_equals_the_reference(settings, given):
    """Through the public functions: logits of all positions, of the masked ones, and hidden states."""
    B, L, D, V = 2, 4, 16, 301
    hidden, u, _ = make(B * L, D)
    hidden, weight = hidden.view(B, L, D), make(V, D, scale=0.3)[0]
    tokens = torch.where(torch.rand(B, L, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) < 0.6, 7, 3)
    each = torch.rand(B, L, V, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)) < 0.5
    allowed = {"none": None, "each": each, "masked": each[tokens == 7], "one": each[0, 0]}[given]
    settings = {**settings, "generator": u.view(B, L, 2), "allowed": allowed}
    logits = hidden @ weight.T
    for inputs in ((logits,), (logits[tokens == 7],), (hidden, weight)):
        step = dllm_kernels.linear_topk_unmask if len(inputs) == 2 else dllm_kernels.topk_unmask
        mine, theirs = (step(*inputs, tokens, 7, 2, backend=name, **settings) for name in ("triton", "reference"))
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.committed, theirs.committed)
        torch.testing.assert_close(mine.confidence, theirs.confidence, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", ["none", "each", "one"])
def test_a_step_of_counted_positions_equals_one_of_others(given, monkeypatch):
    """Those that are masked are gathered, and multiplied by PyTorch."""
    B, L, D, V = 2, 6, 16, 301
    hidden, u, _ = make(B * L, D)
    hidden, weight = hidden.view(B, L, D), make(V, D, scale=0.3)[0]
    tokens = torch.tensor([[7, 3, 7, 7, 3, 7], [3, 3, 7, 3, 7, 7]], device=DEVICE)
    hidden[tokens != 7] = torch.nan
    allowed = torch.rand(B, L, V, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)) < 0.5
    settings = {"temperature": 0.8, "generator": u.view(B, L, 2), "backend": "triton",
                "allowed": {"none": None, "each": allowed, "one": allowed[0, 0]}[given]}
    plain = dllm_kernels.linear_topk_unmask(hidden, weight, tokens, 7, 2, **settings)
    monkeypatch.setattr(products, "FEW", 2)
    monkeypatch.setattr(triton_kernels, "linear_score_rows", None)
    counted = dllm_kernels.linear_topk_unmask(hidden, weight, tokens, 7, 2, count=7, **settings)
    assert torch.equal(plain.tokens, counted.tokens) and torch.equal(plain.committed, counted.committed)
    torch.testing.assert_close(plain.confidence, counted.confidence, rtol=1e-5, atol=1e-6)
    if given == "none":
        for wrong in (6, 8, 13):
            tokens_of, confidence, committed = topk_unmask._unmask_without_waiting(
                topk_unmask.Inputs(hidden, weight), tokens, 7, Rows(None, u.view(B, L, 2)), Sampling("prob", 0.8),
                Selection(torch.full((B,), L, device=DEVICE)), wrong, "triton")
            assert confidence[tokens == 7].isnan().all() and not committed.any() and torch.equal(tokens_of, tokens)


def test_a_whole_step_of_nothing_and_of_missing_rows():
    for B, L in ((0, 5), (2, 0)):
        tokens = torch.zeros(B, L, dtype=torch.int64, device=DEVICE)
        inputs, weight = torch.zeros(B, L, 9, device=DEVICE), torch.zeros(4, 9, device=DEVICE)
        for result in (dllm_kernels.topk_unmask(inputs, tokens, 0, 1, backend="triton"),
                       dllm_kernels.linear_topk_unmask(inputs, weight, tokens, 0, 1, backend="triton")):
            assert result.tokens.shape == (B, L)
    tokens = torch.zeros(1, 5, dtype=torch.int64, device=DEVICE)
    result = dllm_kernels.topk_unmask(torch.zeros(3, 9, device=DEVICE), tokens, 0, 5, backend="triton")
    assert result.confidence.isnan().tolist() == [[False, False, False, True, True]]
    assert result.committed.tolist() == [[True, True, True, False, False]]
