"""The functions that bench_gpu_attention.py and attention_choices.py time, on small heads on a CPU."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import attention_choices
from benchmarks import bench_gpu_attention as bench
from dllm_kernels import bidirectional_attention, bidirectional_attention_varlen, block_diffusion_attention

HEADS = (4, 2, 16)


def make(*lengths):
    return bench.make_heads(*lengths, heads=HEADS, dtype=torch.float32, device="cpu")


def assert_same(ours, theirs):
    mine, its = ours(), theirs()
    for x, y in zip(mine, its, strict=True) if isinstance(mine, tuple) else [(mine, its)]:
        torch.testing.assert_close(x, y.reshape(x.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("library", [None, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_dense_and_decoding(library, backward):
    heads = make(5, 2, 9)
    attend = lambda *x: bench.sdpa(*x, library).transpose(1, 2)  # noqa: E731
    assert_same(bench.call(bidirectional_attention, heads, backward), bench.call(attend, heads, backward))


def test_a_library_that_cannot_run_says_why():
    assert bench.why_not(SDPBackend.MATH, make(5, 2, 9)) is None
    assert "CUDNN_ATTENTION does not take this" in bench.why_not(SDPBackend.CUDNN_ATTENTION, make(5, 2, 9))


def test_packed_documents_and_the_heads_they_need():
    heads, ends = make(12, 12), bench.document_ends(12, 4, "cpu")
    assert ends.tolist() == [0, 4, 8, 12]
    out = bench.call(lambda *x: bidirectional_attention_varlen(*x, ends, 4), heads, True)()
    assert [x.shape for x in out] == [x.shape for x in heads]
    assert [x.shape[1] for x in bench.for_torch_varlen(*heads)] in ([4, 2, 2], [4, 4, 4])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_what_block_diffusion_sees():
    length, block_length = 64, 16
    heads, mask = make(2 * length, 1, 2 * length), bench.flex_mask(bench.block_diffusion_of(length, 16), length, "cpu")
    attend = lambda *x: bench.flex(*x, mask).transpose(1, 2)  # noqa: E731
    assert_same(bench.call(lambda *x: block_diffusion_attention(*x, block_length), heads, False),
                bench.call(attend, heads, False))  # on a CPU FlexAttention has no backward


def test_new_lengths_are_new():
    step = bench.new_length(HEADS, None, 8, 40, 2, 3, torch.float32, "cpu")
    assert step(True).shape == step(False).shape == (2, 3, 4, 16)


def test_choices_are_printed_as_they_are_kept(monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr("sys.argv", ["", "--device", "cpu", "--length", "16", "--rounds", "1"])
    attention_choices.main()
    lines = re.findall(r'\("cpu", "(\w+)"\): Choice\(\((.*?)\), "', capsys.readouterr().out)
    assert [kind for kind, _ in lines] == ["dense", "decoding", "packed", "block_diffusion"]
    assert all(sorted(re.findall(r"\w+", names)) == ["reference", "sdpa"] for _, names in lines)
