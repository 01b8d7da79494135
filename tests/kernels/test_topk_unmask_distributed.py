"""Unmasking in two processes (gloo) that share out the words gives what one process gives, the same in both."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dllm_kernels import linear_token_scores, linear_topk_unmask

B, L, D, V, MASK = 3, 17, 8, 90, 4
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo")
SETTINGS = [{}, {"confidence": "margin"}, {"confidence": "entropy"}, {"temperature": 0.7}, {"confidence": "random"},
            {"temperature": 1.3, "confidence": "entropy", "confidence_of": "raw"}, {"confidence_of": "raw"},
            {"temperature": 0.9, "top_p": 0.8, "top_k": 9}, {"temperature": 0.8, "selection_temperature": 0.5}]


def make_case():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((B, L, D), (V, D), (V,)))
    tokens = torch.where(torch.rand(B, L, generator=g) < 0.6, MASK, 9)
    u = torch.rand(B, L, 2, generator=g, dtype=torch.float64)
    return hidden, weight, bias, tokens, u, torch.rand(B, L, V, generator=g) < 0.3


def check_words_shared_out(rank, cut):
    words = slice(0, cut) if rank == 0 else slice(cut, V)
    hidden, weight, bias, tokens, u, allowed = make_case()
    allowed[0, :, :cut], allowed[1, :, cut:] = False, False  # nothing is left in one slice, or in the other
    allowed[2, :5] = False
    head = weight[words].clone()
    for settings in SETTINGS:
        for words_allowed in (None, allowed, torch.arange(V) != 7):
            together = {**settings, "generator": u, "allowed": words_allowed, "backend": "reference"}
            whole = linear_topk_unmask(hidden, weight, tokens, MASK, 4, bias=bias, **together)
            mine = linear_topk_unmask(hidden, head, tokens, MASK, 4, bias=bias[words], group=dist.group.WORLD,
                                      **together)
            assert torch.equal(mine.tokens, whole.tokens) and torch.equal(mine.committed, whole.committed), settings
            torch.testing.assert_close(mine.confidence, whole.confidence, rtol=1e-5, atol=1e-6, equal_nan=True)
    ties = linear_token_scores(torch.zeros(1, 2, D), head, torch.tensor([1, 0]), group=dist.group.WORLD)
    assert ties.token.tolist() == [0, 0]
    broken = hidden.clone()
    broken[0] = torch.nan
    scores = linear_token_scores(broken, head, torch.tensor([0, L]), group=dist.group.WORLD)
    assert scores.confidence.isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match=f"the group holds {V} words, so allowed needs 3 int32 .* not 2"):
        linear_token_scores(hidden, head, torch.tensor([0]), allowed=torch.ones(40) > 0, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="over a group only the backend 'reference' runs, not 'cpu'"):
        linear_token_scores(hidden, head, torch.tensor([0]), backend="cpu", group=dist.group.WORLD)


def run_process(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for cut in (33, 89):
        check_words_shared_out(rank, cut)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_words_shared_out_give_the_same_step(tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(run_process, (str(tmp_path / "store"),), nprocs=2)
