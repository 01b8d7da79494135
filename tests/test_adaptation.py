"""The adaptation study: Open-dLLM's two defects are rendered as they are, and a study runs, goes on and is shown."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import adaptation
from dllm.data import PackedDataset
from dllm.diffusion.corruption import corrupt
from dllm.diffusion.objectives import Targets, sum_losses

ROOT = Path(__file__).parents[1]


def gradient(loss, scored, path_weights):
    torch.manual_seed(0)
    hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
    targets = Targets(torch.arange(6), scored, None, path_weights, scored.sum())
    total = loss(hidden, head, targets).loss
    total.backward()
    return total.item(), hidden.grad


@pytest.mark.parametrize("path", [False, True])
def test_the_shipped_gradient_is_that_of_the_plain_sum_scaled_by_the_first_row(path):
    weights = torch.tensor([2.0, 1.5, 1.0, 4.0, 3.0, 1.2]) if path else None
    scored = torch.tensor([True, False, True, True, False, True])
    value, shipped = gradient(adaptation.shipped_losses, scored, weights)
    exact, right = gradient(sum_losses, scored, weights)
    _, plain = gradient(sum_losses, scored, None)
    assert value == pytest.approx(exact)
    row = next(n for n in range(8) if abs(plain[0, n]) > 1e-3)
    scale = right[0, row] / plain[0, row]  # 1 + p / t of the first row
    assert (scale == 1) != path and torch.allclose(shipped, scale * plain, atol=1e-5)
    assert torch.allclose(shipped, right, atol=1e-5) != path


def test_the_shipped_gradient_is_zero_where_the_first_row_is_not_masked():
    scored = torch.tensor([False, True, True, False, True, True])
    value, shipped = gradient(adaptation.shipped_losses, scored, torch.ones(6))
    assert value > 0 and not shipped.any()


def test_the_shipped_loader_keeps_one_row_of_eight():
    rows = PackedDataset([torch.full((4,), n) for n in range(64)], 4)
    kept = adaptation.Discarding(rows).read(range(2, 5))
    assert kept.tokens.tolist() == torch.cat([rows.read(range(8 * n, 8 * n + 1)).tokens for n in (2, 3, 4)]).tolist()
    assert kept.row.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_complementary_rows_are_masked_at_what_the_other_shows():
    rows = PackedDataset([torch.arange(n, n + 5 + n % 3) for n in range(30, 60)], 8)
    packed = adaptation.Twice(rows).read(range(4, 10))
    assert packed.tokens[packed.row == 2].tolist() == packed.tokens[packed.row == 3].tolist() == (
        rows.read(range(3, 4)).tokens.tolist())
    generator = torch.Generator().manual_seed(0)
    drawn = corrupt(packed.tokens, packed.cu_seqlens, 7, generator=generator)
    both = adaptation.complement(packed, drawn)
    for row in range(0, 6, 2):
        first, second = packed.row == row, packed.row == row + 1
        assert torch.equal(both.corrupted[first], drawn.corrupted[first])
        assert torch.equal(both.corrupted[second], ~both.corrupted[first])
        assert torch.equal(both.t[second], 1 - both.t[first]) and torch.equal(both.weight, 1 / both.t)
    assert torch.equal(both.noisy, packed.tokens.masked_fill(both.corrupted, 7))


@pytest.mark.slow
def test_a_study_measures_goes_on_and_is_shown(model_folder, tmp_path):
    corpus = tmp_path / "code.jsonl"
    functions = (f"def add_{i}(x, y):\n    return x + y + {i}\n\n" * (1 + i % 5) for i in range(40))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in functions))

    def study(variants):
        done = subprocess.run([sys.executable, "-m", "benchmarks.adaptation", str(model_folder), "--minutes", "0.01",
                               "--output-dir", str(tmp_path), "--data", str(corpus), "--windows", "2", "--lines", "1",
                               "--automatic", "--variants", variants],
                              cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    study("mdm")
    first = json.loads((tmp_path / "results.json").read_text())["variants"]["mdm"]
    others = ["own token", "complementary masks", "independent times", "Open-dLLM as shipped"]
    table = study("/".join(["mdm", *others]))
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["variants"]["mdm"] == first and first["tokens"] > 0 and len(record["variants"]) == 5
    assert all(f"| {name} | " in table for name in others)
    assert 0 < record["autoregressive"]["bits_per_byte"] < 20 and 0 < first["bits_per_byte"] < 20
    assert "| mdm | " in table
