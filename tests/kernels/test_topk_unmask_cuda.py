"""The CUDA C++ kernels of unmasking against the reference: on a GPU and, thread by thread, on a CPU (simt.h).

On the CPU the same source runs, compiled by g++: this proves indices, sums, barriers and what shared memory holds, not
what nvcc makes of them, nor speed. The uniforms are fixed, and in none of the draws does rounding decide.
"""

import ctypes
import importlib
import math

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import dllm_kernels
from benchmarks import predict
from dllm_kernels import native_extension
from dllm_kernels.dispatch import Backend
from dllm_kernels.topk_unmask import cuda, products, random, reference, selection
from dllm_kernels.topk_unmask.allowed import pack, width
from dllm_kernels.topk_unmask.settings import Rows, Sampling, Selection

topk_unmask = importlib.import_module("dllm_kernels.topk_unmask")
ON_GPU = cuda.missing() is None
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=f"cannot run here: {cuda.missing()}")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONFIDENCES = ["prob", "margin", "entropy", "random"]
FILTERS = [(3, None), (None, 0.8), (40, 0.9), (None, 1e-6)]  # top_k, top_p


class Emulated:
    """The operators of the extension, run by the emulator."""

    def __init__(self, path):
        self.compiled = ctypes.CDLL(str(path))

    def _run(self, name, *arguments):
        given = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else
                 ctypes.c_double(x) if isinstance(x, float) else None if x is None else ctypes.c_int64(x)
                 for x in arguments]
        function = getattr(self.compiled, name)
        function.restype = ctypes.c_int64
        assert function(*given) == 0

    def score_rows_cuda(self, logits, rows, uniform, allowed, token, score, confidence, temperature, filtered, top_k,
                        top_p, raw):
        token.fill_(-7), score.fill_(-7.0)
        stride = 0 if allowed is None else allowed.stride(0)
        sizes = torch.tensor([len(token), *logits.shape, logits.stride(0), stride, top_k])
        number = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 1}[logits.dtype]
        self._run("score_rows", number, logits, rows, uniform, allowed, token, score, sizes, confidence, filtered, raw,
                  temperature, top_p)

    def find_rows_cuda(self, tokens, mask_token_id, packed, masked, rows):
        self._run("find_rows", tokens, mask_token_id, tokens.numel(), packed, masked, rows)

    def commit_cuda(self, tokens, masked, token, confidence, k, uniform, temperature, threshold, filled, committed):
        self._run("commit", tokens, masked, token, confidence, k, uniform, float(temperature), threshold is not None,
                  float(threshold or 0), *tokens.shape, filled, committed)


@pytest.fixture(scope="module")
def emulator(emulator_library):
    return Emulated(emulator_library("score_rows_on_cpu.cpp"))


@pytest.fixture(params=[
    pytest.param("emulated", marks=pytest.mark.slow),
    pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
def device(request, monkeypatch):
    """Where the tensors are; on the CPU the operators are the emulator's."""
    if request.param == "gpu":
        return "cuda"
    emulated = request.getfixturevalue("emulator")
    monkeypatch.setattr(native_extension, "operators", lambda: emulated)
    return "cpu"


def make(n, V, device, dtype=torch.float32, scale=3.0):
    """Logits, uniforms, and bits that allow half of the words."""
    g = torch.Generator().manual_seed(V)
    logits, u = scale * torch.randn(n, V, generator=g), torch.rand(n, 2, dtype=torch.float64, generator=g)
    return logits.to(device, dtype), u.to(device), pack(torch.rand(n, V, generator=g) < 0.5).to(device)


def assert_same(ours, want):
    (token, score), (want_token, want_score) = [[x.cpu() for x in pair] for pair in (ours, want)]
    assert torch.allclose(score, want_score, rtol=2e-5, atol=2e-6, equal_nan=True), (score, want_score)
    defined = ~want_score.isnan()
    assert torch.equal(token[defined], want_token[defined])
    assert (token >= 0).all()


def score_rows(logits, rows, u, bits, *settings):
    return cuda.score_rows(logits, Rows(rows, u, bits), Sampling(*settings))


def truth(logits, *rows_and_settings):
    """`score_rows` by the reference, on the CPU."""
    logits, rows, u, bits, *settings = (x.cpu() if isinstance(x, Tensor) else x for x in (logits, *rows_and_settings))
    return reference.score_rows(logits, Rows(rows, u, bits), Sampling(*settings))


def check(*arguments):
    logits, u, bits, *settings = arguments
    assert_same(score_rows(logits, None, u, bits, *settings), truth(logits, None, u, bits, *settings))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_and_confidence(dtype, confidence, temperature, raw, device):
    for V in (1, 2, 1000, 4099):  # one segment and several, rows that begin between two multiples of 16 bytes
        logits, u, bits = make(3, V, device, dtype)
        for allowed in (None, bits):
            check(logits, u, allowed, confidence, temperature, None, None, raw)


@pytest.mark.parametrize("confidence, temperature, raw", [
    ("prob", 0.7, False), ("margin", 0.0, False), ("entropy", 1.3, False), ("prob", 0.7, True), ("margin", 1.0, True),
    ("entropy", 0.0, True), ("random", 0.7, False)])
@pytest.mark.parametrize("top_k, top_p", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_filters(dtype, top_k, top_p, confidence, temperature, raw, device):
    V = [1000, 2, 1301, 517][CONFIDENCES.index(confidence)]
    logits, u, bits = make(2, V, device, dtype)
    check(logits, u, bits if top_k else None, confidence, temperature, top_k, top_p, raw)


@pytest.mark.parametrize("top_k, top_p", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_equals(dtype, top_k, top_p, device):
    _, u, bits = make(3, 3000, device)
    logits = make(3, 3000, device, dtype, scale=1.0)[0].round()
    logits[logits == 0] *= -1  # -0.0 equals 0.0
    logits[:, ::3] = logits[:, ::3].abs()
    u[:, 0] = torch.tensor([0.001, 0.6, 1 - 2**-53], dtype=torch.float64)  # the last word that is kept
    check(logits, u, None, "prob", 1.0, top_k, top_p, False)
    check(logits, u, bits, "margin", 0.0, None, None, False)
    check(logits, u, None, "entropy", 0.3, None, None, True)
    check(logits, u, None, "prob", 0.0, None, None, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cut_through_equals_goes_to_the_lowest_words(dtype, device):
    logits = torch.zeros(4, 3000, device=device, dtype=dtype)
    logits[0, ::2] = -0.0
    logits[1, 7] = 5.0
    logits[2, :] = -3.0
    logits[3, 1000:] = -torch.inf
    u = torch.full((4, 2), 1 - 2.0**-53, dtype=torch.float64, device=device)
    token, probability = score_rows(logits, None, u, None, "prob", 1.0, None, 0.5, False)
    share = math.exp(5) / (math.exp(5) + 2999)
    equals = int((0.5 - share) / ((1 - share) / 2999)) + 1  # kept beside word 7
    assert token.tolist() == [1500, equals, 1500, 500]
    assert probability.tolist() == pytest.approx([1 / 1501, 1 / (math.exp(5) + equals), 1 / 1501, 1 / 501])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [("prob", 0.0, None, None, False), ("entropy", 0.8, None, 0.9, False),
                                      ("margin", 0.7, 5, None, True), ("random", 0.5, None, None, False),
                                      ("prob", 1.0, None, None, True)])
def test_nan_infinite_and_huge_logits(settings, dtype, device):
    logits, u, _ = make(7, 1100, device, dtype)
    logits[0, ::2] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 77] = 3.0
    logits[2] *= 1e3
    logits[3, 9] = 6e4 if dtype == torch.float16 else 1e30
    logits[4, 123] = torch.nan
    logits[5] = -torch.inf
    logits[6, 1099] = torch.inf
    check(logits, u, None, *settings)
    check(logits, u, torch.zeros(1, width(1100), dtype=torch.int32, device=device).expand(7, -1), *settings)
    but_those = torch.ones(1, 1100, dtype=torch.bool)
    but_those[:, [123, 1099]] = False
    check(logits, u, pack(but_those).to(device).expand(7, -1), *settings)
    token, score = score_rows(logits, None, u, None, *settings)
    assert score[4:].isnan().all() and not score[:4].isnan().any() and ((token >= 0) & (token < 1100)).all()


@pytest.mark.parametrize("temperature, top_p", [(0.0, None), (0.9, None), (0.9, 0.7)])
def test_rows_are_read_where_asked_and_nowhere_else(temperature, top_p, device):
    logits, u, bits = make(5, 701, device)
    rows = torch.tensor([3, -1, 0, 5, 3, 2**40, -1], device=device)
    logits[[1, 2, 4]] = torch.nan
    u, bits = u[[0, 1, 2, 3, 4, 0, 1]], bits[[0, 1, 2, 3, 4, 0, 1]]
    settings = ("prob", temperature, None, top_p, False)
    token, score = score_rows(logits, rows, u, bits, *settings)
    live = [0, 2, 4]
    assert_same((token[live], score[live]),
                truth(logits, rows[live], u[live], bits[live], *settings))
    assert (score[[1, 6]] == -torch.inf).all() and score[[3, 5]].isnan().all()
    wide = torch.full((5, 2, 701), torch.nan, device=device)
    wide[:, 0] = logits
    for strided in (wide[:, 0], logits.T.contiguous().T, torch.stack([logits, logits], 2)[..., 0]):
        again = score_rows(strided, rows, u, bits, *settings)
        assert torch.equal(again[0][live], token[live]) and torch.equal(again[1][live], score[live])


@pytest.mark.parametrize("settings", [("entropy", 0.7, None, None, False), ("prob", 0.9, 40, 0.9, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gives_the_same_bits_wherever_it_lies(settings, dtype, device):
    """Also where it does not begin at a multiple of 16 bytes."""
    logits, u, _ = make(1, 2500, device, dtype)
    memory = torch.full((2600,), torch.nan, dtype=dtype, device=device)
    token, score = score_rows(logits, None, u, None, *settings)
    for offset in range(16 // dtype.itemsize + 1):
        row = memory[offset:offset + 2500].copy_(logits[0])
        again = score_rows(row.unsqueeze(0), None, u, None, *settings)
        assert again[0] == token and again[1] == score
        memory.fill_(torch.nan)


@pytest.mark.parametrize("top_k, top_p, draws", [(None, None, 600), (5, 0.7, 100)])
def test_samples_follow_the_distribution(top_k, top_p, draws, device):
    V = 70
    logits = make(1, V, device, scale=1.5)[0]
    u = random.philox_uniform(7, torch.tensor(0), 5, torch.arange(draws)).to(device)
    rows = torch.zeros(draws, dtype=torch.int64, device=device)
    settings = ("prob", 1.3, top_k, top_p, False)
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


@pytest.mark.parametrize("u", [2.0**-54, 1 - 2.0**-53])
def test_uniforms_at_the_ends_take_the_first_and_last_possible_word(u, device):
    """Where sums differ by their rounding, no sum may pass: then the last word that has a probability."""
    logits = make(34, 5000, device)[0]
    logits[:, :40], logits[:, 4500:] = -torch.inf, -torch.inf
    logits[1, 2000:] = -torch.inf
    logits[2, :4499] = -torch.inf
    logits[3, 4000:] = -200.0  # whose probability rounds to nothing
    both = torch.full((34, 2), u, dtype=torch.float64, device=device)
    token, _ = score_rows(logits, None, both, None, "prob", 1.0, None, None, False)
    p = logits[4:].cpu().double().softmax(1)
    beside = torch.stack([row[:t].sum() if u < 0.5 else row[t + 1:].sum() for row, t in zip(p, token[4:], strict=True)])
    assert (beside < 1e-6).all() and (p.gather(1, token[4:, None].cpu()) > 0).all()
    assert token[:4].tolist() == ([40, 40, 4499, 40] if u < 0.5 else [4499, 1999, 4499, 3999])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("B, L", [(0, 5), (3, 0), (1, 1), (3, 1700)])
def test_find_rows(B, L, packed, device):
    tokens = torch.randint(3, (B, L), generator=torch.Generator().manual_seed(0)).to(device)
    masked, rows = cuda.find_rows(tokens, 2, packed)
    assert torch.equal(masked, tokens == 2)
    flat = masked.flatten()
    place = flat.cumsum(0) - 1 if packed else torch.arange(B * L, device=device)
    assert torch.equal(rows, torch.where(flat, place, -1))


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("selection_temperature", [0.0, 0.3])
@pytest.mark.parametrize("B, L", [(1, 1), (5, 67), (2, 600)])
def test_commit_equals_the_definition_to_the_bit(B, L, selection_temperature, threshold, device):
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
    ours = cuda.commit(*(x.to(device) for x in arguments), Selection(k.to(device), selection_temperature, threshold),
                       u.to(device))
    for mine, theirs in zip(ours, want, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine.cpu().nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9},
                                      {"confidence": "entropy", "threshold": 0.3},
                                      {"confidence": "random", "selection_temperature": 0.5}])
@pytest.mark.parametrize("given", ["none", "each", "masked", "one"])
def test_a_whole_step_equals_the_reference(settings, given, device, monkeypatch):
    """Through the public functions: logits of all positions, of the masked ones, and hidden states."""
    if device == "cpu":
        for table in ("LOGITS_BACKENDS", "LINEAR_BACKENDS"):
            by_definition, = (x for x in getattr(topk_unmask, table) if x.name == "reference")
            ours, = (x.run for x in getattr(topk_unmask, table) if x.name == "cuda")
            monkeypatch.setattr(topk_unmask, table, (Backend("cuda", ours), by_definition))
    B, L, V = 2, 9, 301
    hidden, u, _ = make(B * L, 16, device)
    hidden, weight = hidden.view(B, L, 16), make(V, 16, device, scale=0.3)[0]
    logits = hidden @ weight.T
    tokens = torch.where(torch.rand(B, L, generator=torch.Generator().manual_seed(0)) < 0.6, 7, 3).to(device)
    each = (torch.rand(B, L, V, generator=torch.Generator().manual_seed(1)) < 0.5).to(device)
    allowed = {"none": None, "each": each, "masked": each[tokens == 7], "one": each[0, 0]}[given]
    settings = {**settings, "generator": u.view(B, L, 2), "allowed": allowed}
    for inputs in ((logits,), (logits[tokens == 7],), (hidden, weight)):
        step = dllm_kernels.linear_topk_unmask if len(inputs) == 2 else dllm_kernels.topk_unmask
        mine, theirs = (step(*inputs, tokens, 7, 2, backend=name, **settings) for name in ("cuda", "reference"))
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.committed, theirs.committed)
        torch.testing.assert_close(mine.confidence, theirs.confidence, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [("margin", 0.0, None, None, False), ("prob", 0.7, None, None, True),
                                      ("entropy", 0.9, 40, 0.9, False)])
@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                 (torch.float16, torch.bfloat16)])
def test_products_of_chunks_of_rows(dtype, weight_dtype, settings, device, monkeypatch):
    """Rows that are not asked for are read nowhere; a workspace for five rows of logits makes several chunks."""
    V, D, n = 301, 37, 21
    monkeypatch.setattr(products, "FEW", 0)
    monkeypatch.setattr(products, "WORKSPACE_BYTES", {"cpu": 5 * 4 * V, "cuda": 5 * 4 * V})
    hidden, weight = make(30, D, device, dtype, scale=0.3)[0], make(V, D, device, weight_dtype, scale=1.0)[0]
    _, u, bits = make(n, V, device)
    rows = torch.randint(1, 30, (n,), generator=torch.Generator().manual_seed(1)).to(device)
    rows[::4], rows[5] = -1, 30
    live = (rows >= 0) & (rows < 30)
    hidden[0] = torch.nan
    for bias, allowed in ((None, None), (make(1, V, device, weight_dtype)[0][0], bits)):
        token, score = products.linear_score_rows(cuda.score_rows, hidden, weight, bias, Rows(rows, u, allowed),
                                                  Sampling(*settings))
        logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
        assert_same((token[live], score[live]), truth(logits.float(), rows[live], u[live],
                                                      None if allowed is None else allowed[live], *settings))
        assert (score[rows == -1] == -torch.inf).all() and score[5].isnan()


class WidensProducts(TorchFunctionMode):
    """PyTorch's product of 16-bit matrices into fp32, which a CPU lacks."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.mm and kwargs.pop("out_dtype", None) == torch.float32:
            args = [x.float() for x in args]
        return function(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pytorch_has_a_product_of_16_bits_into_fp32(dtype):
    given, out = torch.empty(3, 3, dtype=dtype, device="meta"), torch.empty(3, 3, device="meta")
    assert torch.mm(given, given, out_dtype=torch.float32, out=out) is out


def test_logits_of_16_bits_inputs_are_not_rounded(device, monkeypatch):
    """Two words whose logits differ by less than bf16 resolves: the second is the largest."""
    monkeypatch.setattr(products, "FEW", 0)
    hidden, weight = torch.tensor([[8.0, 2**-8]]).bfloat16(), torch.tensor([[8.0, 1.0], [8.0, 2.0]]).bfloat16()
    if device == "cpu":
        with WidensProducts():
            token, _ = products.linear_score_rows(cuda.score_rows, hidden.as_subclass(SaysGpu), weight, None, Rows(),
                                                  Sampling())
    else:
        token, _ = products.linear_score_rows(cuda.score_rows, hidden.cuda(), weight.cuda(), None, Rows(), Sampling())
    assert token.tolist() == [1] and (hidden @ weight.T).argmax() == 0


@pytest.mark.parametrize("compiler", predict.counts_by_triton())
@pytest.mark.parametrize("D", predict.HEAD_AT_LEAST)
def test_few_rows_go_to_tiles_as_long_as_the_count_says_so(D, compiler):
    """At FEW rows tiles take at most 15% longer, where programs overlap: the estimates are no better than that."""
    counts, scores = predict.counts_by_triton()[compiler], predict.counts_by_nvcc()["scores"]
    few, many = counts["head 32"], counts["head 128"]
    assert predict.head_in_tiles(few, 32, D).most < predict.head_by_products(scores, 32, D)
    assert predict.head_in_tiles(many, products.FEW, D).least < 1.15 * predict.head_by_products(scores, products.FEW, D)
    for rows in (products.FEW + 1, 2 * products.FEW, 1024, 16_384):
        assert predict.head_in_tiles(many, rows, D).most > predict.head_by_products(scores, rows, D)


class SaysGpu(torch.Tensor):
    is_cuda = property(lambda self: True)


def test_it_says_what_it_cannot_run_on():
    assert cuda.refuses(torch.zeros(1, 2)) == "needs a CUDA tensor"
    logits = torch.zeros(1, 2).as_subclass(SaysGpu)
    assert cuda.refuses(logits) is None
    assert cuda.refuses(logits.double()) == "takes fp32, fp16 and bf16, not torch.float64"
    long = torch.empty(1, (1 << 20) + 1, dtype=torch.bfloat16).as_subclass(SaysGpu)
    assert cuda.refuses(long) == "takes at most 1048576 words, not 1048577"


@pytest.mark.skipif(not ON_GPU, reason=f"cannot run here: {cuda.missing()}")
def test_the_host_never_waits_and_a_cuda_graph_follows_its_inputs():
    B, L, V = 4, 50, 5003
    logits, _, bits = make(B * L, V, "cuda", torch.bfloat16)
    tokens, k = torch.randint(3, (B, L), device="cuda"), torch.full((B,), 3, device="cuda")
    u = torch.rand(B, L, 2, dtype=torch.float64, device="cuda")

    def step():
        return [dllm_kernels.topk_unmask(logits.view(B, L, V), tokens, 0, k, backend="cuda", generator=u,
                                         allowed=bits.view(B, L, -1), **settings)
                for settings in ({}, {"temperature": 0.7, "confidence": "margin", "confidence_of": "raw"},
                                 {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "selection_temperature": 0.5})]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        logits.copy_(torch.randn_like(logits))
        tokens.copy_(torch.randint_like(tokens, 3))
        graph.replay()
        for mine, theirs in zip(captured, step(), strict=True):
            assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
