"""Forward passes from CUDA graphs: the same hidden states and tokens, for new inputs too."""

import pytest
import torch
from test_model import tiny

from dllm.graphs import GraphedForward, bucket_of
from dllm.sampler import MDMGenerationConfig, denoise

MASK = 60


def test_buckets_are_powers_of_two_within_the_canvas():
    assert [bucket_of(n, 24) for n in (1, 2, 3, 8, 9, 16, 17, 24)] == [1, 2, 4, 8, 16, 16, 24, 24]


def inputs(rows, length, wanted, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) >= torch.randint(3, (rows, 1), generator=g)
    return torch.randint(60, (rows, length), generator=g), {
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "attention_mask": mask,
        "queries": torch.stack([torch.randperm(length - 3, generator=g)[:wanted] + 3 for _ in range(rows)])}


def test_what_is_filled_up_changes_nothing(monkeypatch):
    """Without a GPU: the recording runs the model anew each time, on the places of the inputs."""
    model = tiny().eval()

    def record(self, places):
        output = torch.empty(*places[2].shape, self.model.config.hidden_size)
        names = ("position_ids", "queries", "attention_mask")
        return places, output, lambda: output.copy_(
            self.model.hidden_states(places[0], **dict(zip(names, places[1:], strict=False))))

    monkeypatch.setattr(GraphedForward, "_record", record)
    forward = GraphedForward(model)
    with torch.no_grad():
        for seed, wanted in enumerate((5, 7, 3, 8, 5)):
            tokens, settings = inputs(2, 13, wanted, seed)
            expected = model.hidden_states(tokens, **settings)
            assert torch.allclose(forward(tokens, **settings), expected, atol=1e-6)
    assert len(forward.recorded) == 2  # of 4 and of 8 queries


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_passes_are_those_of_the_model():
    model = tiny().eval().cuda()
    forward = GraphedForward(model)
    with torch.no_grad():
        for seed, wanted in enumerate((5, 7, 3, 8, 5)):
            tokens, settings = inputs(2, 13, wanted, seed)
            tokens, settings = tokens.cuda(), {name: x.cuda() for name, x in settings.items()}
            expected = model.hidden_states(tokens, **settings)
            assert torch.allclose(forward(tokens, **settings), expected, atol=1e-5)
    canvas = torch.full((3, 20), MASK, device="cuda")
    canvas[:, :6] = torch.arange(6)
    plain, replayed = (denoise(model, canvas, MDMGenerationConfig(
        alg="maskgit_plus", steps=14, mask_token_id=MASK, cuda_graphs=graphs)) for graphs in (False, True))
    assert torch.equal(plain.sequences, replayed.sequences)
    assert replayed.forwards == 14


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_steps_do_not_wait_for_the_gpu(graphs):
    from dllm.sampler import Denoising

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
