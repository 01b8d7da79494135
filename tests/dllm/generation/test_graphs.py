"""Forward passes from CUDA graphs: the same hidden states and tokens, for new inputs too."""

import pytest
import torch

from dllm.generation.config import MDMGenerationConfig
from dllm.generation.graphs import GraphedForward, bucket_of
from dllm.generation.sampler import denoise
from dllm.generation.scorers import HeadScorer
from dllm.model.layouts import Padded
from tests.dllm.tiny_models import tiny

MASK = 60


def test_buckets_are_powers_of_two_within_the_canvas():
    assert [bucket_of(n, 24) for n in (1, 2, 3, 8, 9, 16, 17, 24)] == [1, 2, 4, 8, 16, 16, 24, 24]


def inputs(rows, length, wanted, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) >= torch.randint(3, (rows, 1), generator=g)
    return torch.randint(60, (rows, length), generator=g), Padded(
        mask, queries=torch.stack([torch.randperm(length - 3, generator=g)[:wanted] + 3 for _ in range(rows)]))


def record_without_a_gpu(self, tokens, layout):
    """Runs the model anew each time, on the places of the inputs and the part of the cache that were recorded."""
    output = torch.empty(*layout.queries.shape, self.model.config.hidden_size)
    return tokens, layout, output, lambda: output.copy_(self.model.hidden_states(tokens, layout))


def test_what_is_filled_up_changes_nothing(monkeypatch):
    model = tiny().eval()
    monkeypatch.setattr(GraphedForward, "_record", record_without_a_gpu)
    forward = GraphedForward(model)
    with torch.no_grad():
        for seed, wanted in enumerate((5, 7, 3, 8, 5)):
            tokens, layout = inputs(2, 13, wanted, seed)
            expected = model.hidden_states(tokens, layout)
            assert torch.allclose(forward(tokens, layout), expected, atol=1e-6)
    assert len(forward.recorded) == 2  # of 4 and of 8 queries


METHODS = [{"alg": "maskgit_plus"}, {"remasking": "low_confidence", "block_length": 4, "cache": "dual"},
           {"remasking": "low_confidence", "block_length": 4, "cache": "prefix"},
           {"remasking": "low_confidence", "block_length": 4, "cfg_scale": 1.0},
           {"remasking": "low_confidence", "block_length": 4, "block_causal": True, "blocks_from": "masked"},
           {"threshold": -3.0, "block_length": 4, "block_causal": True, "window_blocks": 3, "enter_share": 0.5}]


@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_give_the_same_tokens_for_one_canvas_after_the_other(method, monkeypatch):
    """Prompts of two lengths in a batch, so that a mask is recorded too."""
    model = tiny(shift_logits=False).eval()
    monkeypatch.setattr(GraphedForward, "_record", record_without_a_gpu)
    monkeypatch.setattr(HeadScorer, "__init__", with_graphs(HeadScorer.__init__))
    config, recorded = MDMGenerationConfig(steps=12, mask_token_id=MASK, seed=0, **method), []
    for seed in range(3):
        canvas = torch.randint(1, MASK, (2, 18), generator=torch.Generator().manual_seed(seed))
        canvas[:, 6:] = MASK
        mask = torch.ones_like(canvas)
        mask[1, :2] = 0
        model.graphs = model.graphs or GraphedForward(model)
        replayed = denoise(model, canvas, config, mask)
        graphs, model.graphs = model.graphs, None
        plain = denoise(model, canvas, config, mask)
        model.graphs = graphs
        assert torch.equal(plain.sequences, replayed.sequences)
        recorded.append(len(graphs.recorded))
    assert recorded[0] > 0 and recorded == recorded[:1] * 3  # the canvases after the first need no new one


def with_graphs(original):
    """Make scorers on a CPU use `model.graphs`, which the setting cuda_graphs refuses there."""
    def init(self, model, *arguments):
        original(self, model, *arguments)
        self.forward = model.graphs or self.forward
    return init


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_passes_are_those_of_the_model():
    model = tiny().eval().cuda()
    forward = GraphedForward(model)
    with torch.no_grad():
        for seed, wanted in enumerate((5, 7, 3, 8, 5)):
            tokens, on_cpu = inputs(2, 13, wanted, seed)
            tokens, layout = tokens.cuda(), Padded(on_cpu.key_mask.cuda(), queries=on_cpu.queries.cuda())
            expected = model.hidden_states(tokens, layout)
            assert torch.allclose(forward(tokens, layout), expected, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_tokens_on_a_gpu_are_the_same_with_graphs(method):
    model = tiny(shift_logits=False).eval().cuda()
    for seed in range(3):
        canvas = torch.randint(1, MASK, (2, 18), generator=torch.Generator().manual_seed(seed)).cuda()
        canvas[:, 6:] = MASK
        plain, replayed = (denoise(model, canvas, MDMGenerationConfig(
            steps=12, mask_token_id=MASK, seed=0, cuda_graphs=graphs, **method)) for graphs in (False, True))
        assert torch.equal(plain.sequences, replayed.sequences) and plain.forwards == replayed.forwards


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_steps_do_not_wait_for_the_gpu(graphs):
    from dllm.generation.sampler import Denoising

    model = tiny().eval().cuda()
    canvas = torch.full((2, 20), MASK, device="cuda")
    canvas[:, :6] = torch.arange(6)
    steps = iter(Denoising(model, canvas, MDMGenerationConfig(alg="maskgit_plus", steps=14, mask_token_id=MASK, seed=0,
                                                              cuda_graphs=graphs)))
    for _ in range(3):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
