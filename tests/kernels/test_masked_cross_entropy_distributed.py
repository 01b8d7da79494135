"""Masked cross-entropy in two processes (gloo): words or data shared out give what one process gives."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dllm_kernels import linear_masked_cross_entropy

N, D, V = 24, 8, 41
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo")


def make_case():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((N, D), (V, D), (V,)))
    return (hidden, weight, bias, torch.randint(V, (N,), generator=g), torch.rand(N, generator=g) < 0.5,
            torch.rand(N, generator=g) * 4)


def run_alone(reduction, **settings):
    hidden, weight, bias, targets, corrupted, weights = make_case()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_masked_cross_entropy(*leaves[:2], targets, corrupted, bias=bias, weights=weights, reduction=reduction,
                                       backend="reference", **settings)
    upstream = torch.linspace(-1, 2, loss.numel()).view_as(loss)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def check_words_shared_out(rank):
    words = slice(0, 15) if rank == 0 else slice(15, V)  # not alike
    for reduction in ("none", "sum", "mean"):
        for settings in ({}, {"softcap": 5.0}):
            hidden, weight, bias, targets, corrupted, weights = make_case()
            hidden[~corrupted], targets[~corrupted] = torch.nan, -100
            leaves = [x.requires_grad_() for x in (hidden, weight[words].clone(), bias[words].clone())]
            loss = linear_masked_cross_entropy(*leaves[:2], targets, corrupted, bias=leaves[2], weights=weights,
                                               reduction=reduction, group=dist.group.WORLD, **settings)
            upstream = torch.linspace(-1, 2, loss.numel()).view_as(loss)
            mine = loss.detach(), *torch.autograd.grad(loss, leaves, upstream)
            whole = run_alone(reduction, **settings)
            for got, expected in zip(mine, (whole[0], whole[1], whole[2][words], whole[3][words]), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def check_targets_out_of_range_are_refused(rank):
    hidden, weight, bias, targets, corrupted, _ = make_case()
    targets[corrupted.nonzero()[0]] = 2 * V
    with pytest.raises(ValueError, match=rf"must be in \[0, {2 * V}\), not \d+ to {2 * V}; is the vocabulary"):
        linear_masked_cross_entropy(hidden, weight, targets, corrupted, group=dist.group.WORLD)


class Head(nn.Module):
    """A layer, and the head with its loss, as a model has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x, targets, corrupted):
        return linear_masked_cross_entropy(self.layer(x), self.head.weight, targets, corrupted, bias=self.head.bias,
                                           reduction="sum")


def check_data_shared_out(rank, wrap):
    hidden, _, _, targets, corrupted, _ = make_case()
    alone = Head()
    (alone(hidden, targets, corrupted) / 2).backward()  # DDP and FSDP average over the processes
    both = wrap(Head())
    half = slice(0, N // 2) if rank == 0 else slice(N // 2, N)
    both(hidden[half], targets[half], corrupted[half]).backward()
    for ours, theirs in zip(both.parameters(), alone.parameters(), strict=True):
        grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        torch.testing.assert_close(grad, theirs.grad, rtol=1e-4, atol=1e-5)


def fsdp(module):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module.layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def check_a_dtensor_is_refused(rank):
    hidden, _, _, targets, corrupted, _ = make_case()
    with pytest.raises(ValueError, match="takes a plain weight, not a DTensor; inside a module that FSDP wraps it is"):
        linear_masked_cross_entropy(hidden, fsdp(Head()).head.weight, targets, corrupted)


def check_all(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    check_words_shared_out(rank)
    check_targets_out_of_range_are_refused(rank)
    check_data_shared_out(rank, nn.parallel.DistributedDataParallel)
    check_data_shared_out(rank, fsdp)
    check_a_dtensor_is_refused(rank)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Vocabulary parallelism with slices that differ in size, DDP, and FSDP2; in one start of the processes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(check_all, (str(tmp_path / "store"),), nprocs=2)
