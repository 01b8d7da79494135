"""The scoring half of a denoising step on a CPU, at the vocabulary of Qwen2.5: `cpu` against carefully written PyTorch.

With filters the baseline does as Open-dLLM and Dream do: sort, cumulative sum, scatter, softmax, multinomial.
"""

import pytest
import torch

from benchmarks.inputs import make_head, make_logits
from dllm.files import processor_flags
from dllm_kernels import linear_token_scores, token_scores

V = 151_936


def probability(logits):
    return logits.softmax(-1).max(-1)


def entropy(logits):
    p = logits.softmax(-1)
    return p.argmax(-1), torch.special.xlogy(p, p).sum(-1)


def margin(logits):
    top = logits.softmax(-1).topk(2)
    return top.indices[:, 0], top.values[:, 0] - top.values[:, 1]


def sample(logits):
    p = (logits / 0.6).softmax(-1)
    token = p.multinomial(1)
    return token, p.gather(1, token)


def sorted_top_p(logits):
    logits = logits / 0.6
    ordered, order = logits.sort(descending=True)
    drop = ordered.softmax(-1).cumsum(-1) > 0.95
    drop[:, 1:] = drop[:, :-1].clone()
    drop[:, 0] = False
    logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), torch.finfo(logits.dtype).min)
    p = logits.softmax(-1)
    token = torch.distributions.Categorical(p, validate_args=False).sample()
    return token, p.gather(1, token.unsqueeze(1))


CASES = {  # baseline, settings, the promised ratio
    "prob": (probability, {}, 6), "margin": (margin, {"confidence": "margin"}, 6),
    "entropy": (entropy, {"confidence": "entropy"}, 10), "sample": (sample, {"temperature": 0.6}, 20),
    "top_p": (sorted_top_p, {"temperature": 0.6, "top_p": 0.95}, 15)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def bench_token_scores(paired, case, dtype):
    baseline, settings, at_least = CASES[case]
    if case == "prob" and dtype == torch.bfloat16 and "avx512f" not in processor_flags():
        at_least = 5  # measured with AVX2 alone: 4.9 to 5.0
    rows = 8 if case == "top_p" else 64
    logits = make_logits(rows, V, dtype)
    uniform = torch.rand(rows, 2, dtype=torch.float64)
    paired(
        ours=lambda: token_scores(logits, generator=uniform, backend="cpu", **settings),
        baseline=lambda: baseline(logits),
        at_least=at_least,
        rows=rows,
        must_read_bytes=logits.nbytes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [4, 32])
def bench_linear_token_scores(paired, rows, dtype):
    """Against the product in the weights' dtype, which in bf16 rounds the logits, followed by our scores of logits."""
    D = 256
    (hidden, weight), positions = make_head(rows, D, V, dtype), torch.arange(rows)
    paired(ours=lambda: linear_token_scores(hidden.unsqueeze(0), weight, positions, backend="cpu"),
           baseline=lambda: token_scores(hidden @ weight.T, backend="cpu"), rows=rows, hidden=D,
           at_least=1.15)
