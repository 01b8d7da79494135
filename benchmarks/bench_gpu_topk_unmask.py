"""A denoising step on a GPU, bf16, vocabulary of Qwen2.5: 32 sequences with 128 or 512 masked positions each.

Calls are replayed from a CUDA graph, so that launching does not count. Inputs exceed the L2 cache or come from several
copies in turn. The memory's speed is that of copying half of the logits, which moves as many bytes as reading all.
"""

import pytest
import torch

from benchmarks import inputs
from benchmarks.device import (
    DEVICE,
    captured,
    measure,
    on_device,
    peak_memory,
    pick,
    skip_where_missing,
    without_waiting,
)
from dllm_kernels import linear_token_scores, linear_topk_unmask, philox_uniform, token_scores, topk_unmask
from dllm_kernels.topk_unmask import LOGITS_BACKENDS

V = pick(151_936, 1_000)
MASK = V - 1
B, PER_ROW, ROWS = pick((32, 128, [32 * 128, 32 * 512]), (2, 8, [16, 32]))
SIZES = pick([896, 3584], [16, 32])  # hidden
pytestmark = on_device


def make_logits(rows: int, words: int = V, device: str = DEVICE):
    return inputs.make_logits(rows, words, torch.bfloat16, device)


def make_head(rows: int, D: int, words: int = V, device: str = DEVICE):
    hidden, weight = inputs.make_head(rows, D, words, torch.bfloat16, device)
    return hidden.unsqueeze(0), weight, torch.arange(rows, device=device)


def make_uniforms(rows: int, device: str = DEVICE):
    return philox_uniform(0, torch.zeros((), dtype=torch.int64, device=device), 0, torch.arange(rows, device=device))


def softmax_and_sample(logits, temperature):
    """The obvious implementation; compiled below."""
    p = (logits.float() / (temperature or 1)).softmax(-1)
    if temperature:
        noise = torch.empty_like(p).exponential_()
        token = (p / noise).argmax(-1)
        return token, p.gather(-1, token.unsqueeze(-1))
    return p.max(-1)


def llada_step(logits, temperature):
    """LLaDA's own (generate.py): Gumbel noise in float64, then an untempered softmax in float64."""
    noisy = logits
    if temperature:
        z = logits.to(torch.float64)
        noisy = z.exp() / (-torch.rand_like(z).log())**temperature
    token = noisy.argmax(-1)
    return token, logits.to(torch.float64).softmax(-1).gather(-1, token.unsqueeze(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def bench_logits_against_the_memory(paired, backend, rows, temperature):
    skip_where_missing(LOGITS_BACKENDS, backend, torch.empty(1, V, device=DEVICE))
    logits, u = make_logits(rows), make_uniforms(rows)
    half = logits[:rows // 2]
    to = torch.empty_like(half)
    measure(paired, captured(lambda: token_scores(logits, temperature=temperature, generator=u, backend=backend)),
            captured(lambda: to.copy_(half)), 0.85, must_read_bytes=logits.nbytes)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("rows", ROWS)
def bench_logits_against_compiled(paired, rows, temperature):
    logits, u = make_logits(rows), make_uniforms(rows)
    compiled = torch.compile(softmax_and_sample, dynamic=False)
    compiled(logits, temperature)
    measure(paired, captured(lambda: token_scores(logits, temperature=temperature, generator=u)),
            lambda: compiled(logits, temperature), 3)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def bench_logits_against_llada(paired, temperature):
    logits, u = make_logits(ROWS[0]), make_uniforms(ROWS[0])
    measure(paired, captured(lambda: token_scores(logits, temperature=temperature, generator=u)),
            lambda: llada_step(logits, temperature), 15)


@pytest.mark.parametrize("rows, temperature", [(ROWS[0], 0.0), (ROWS[0], 0.7), (ROWS[1], 0.0)])
@pytest.mark.parametrize("D, at_least", zip(SIZES, (0.75, 0.9), strict=True))
def bench_head_against_product_then_logits(paired, D, at_least, rows, temperature):
    """Of a product that rounds logits to bf16, half of the bytes."""
    hidden, weight, positions = make_head(rows, D)
    rest = {"temperature": temperature, "generator": make_uniforms(rows)}
    measure(paired, captured(lambda: linear_token_scores(hidden, weight, positions, **rest)),
            captured(lambda: token_scores(hidden[0] @ weight.T, **rest)), at_least,
            must_multiply_flop=2 * rows * D * V)


@pytest.mark.parametrize("D", SIZES)
def bench_head_of_counted_positions(paired, D):
    """Half of the positions masked: by cuBLAS, against Triton's tiles where only the GPU knows how many they are."""
    hidden, weight, _ = make_head(ROWS[0], D)
    tokens, k = torch.zeros((1, ROWS[0]), dtype=torch.int64, device=DEVICE), torch.full((1,), 4, device=DEVICE)
    count = ROWS[0] // 2
    tokens[:, :count] = MASK
    measure(paired, captured(lambda: linear_topk_unmask(hidden, weight, tokens, MASK, k, count=count)),
            captured(lambda: linear_topk_unmask(hidden, weight, tokens, MASK, k)))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("D", SIZES)
def bench_head_of_one_block(paired, D, temperature):
    """32 masked positions of one sequence take at most 1.3 times as long as reading the head."""
    cases = [make_head(32, D) for _ in range(3)]
    halves = [weight[:V // 2] for _, weight, _ in cases]
    to, rest = torch.empty_like(halves[0]), {"temperature": temperature, "generator": make_uniforms(32)}
    measure(paired, captured(*(lambda case=case: linear_token_scores(*case, **rest) for case in cases)),
            captured(*(lambda half=half: to.copy_(half) for half in halves)), 1 / 1.3)


def bench_launches_bytes_and_synchronisations(paired):
    """A whole step from hidden states at temperature 0. PyTorch raises at the first host synchronisation."""
    hidden, weight, _ = make_head(B * PER_ROW, SIZES[0])
    hidden, tokens = hidden.view(B, PER_ROW, SIZES[0]), torch.full((B, PER_ROW), MASK, device=DEVICE)
    k = torch.full((B,), 4, device=DEVICE)

    def step():
        return linear_topk_unmask(hidden, weight, tokens, MASK, k)

    step()
    without_waiting(step)
    bytes_allocated, launches = peak_memory(step), None
    if DEVICE == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        launches = sum(event.count for event in profile.key_averages() if event.device_type == on_gpu)
    logits = make_logits(B * PER_ROW)
    # find_rows, the list of them, statistics, choice, commit
    measure(paired, step, lambda: topk_unmask(logits, tokens, MASK, k), None, exactly={"launches": (launches, 5)},
            bytes_allocated=bytes_allocated)
