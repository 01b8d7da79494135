"""The choice of a backend, and what it says when there is none."""

import pytest
import torch

import dllm_kernels
from dllm_kernels.dispatch import Backend, choose, runnable

TABLE = (
    Backend("gpu", lambda: None, missing=lambda: "needs a GPU"),
    Backend("half", lambda: None, refuses=lambda tensor: None if tensor.dtype == torch.float16 else "takes fp16"),
    Backend("reference", lambda: None),
)


def test_the_first_that_can_run_is_taken():
    assert choose("op", TABLE, None, torch.zeros(1)).name == "reference"
    assert choose("op", TABLE, None, torch.zeros(1, dtype=torch.float16)).name == "half"
    assert choose("op", TABLE, "reference", torch.zeros(1, dtype=torch.float16)).name == "reference"
    assert runnable(TABLE, torch.zeros(1)) == ["reference"]
    assert runnable(TABLE, torch.zeros(1, dtype=torch.float16)) == ["half", "reference"]


@pytest.mark.parametrize("name, message", [
    ("gpu", "op: backend 'gpu' cannot run on cpu torch.float32 (gpu: needs a GPU; half: takes fp16; reference: ok)"),
    ("fast", "op: there is no backend 'fast' (gpu: needs a GPU; half: takes fp16; reference: ok)"),
])
def test_a_backend_that_cannot_run_is_refused_with_every_reason(name, message):
    with pytest.raises(ValueError) as error:
        choose("op", TABLE, name, torch.zeros(1))
    assert str(error.value) == message


def test_every_public_name_is_there():
    for name in dllm_kernels.__all__:
        found = getattr(dllm_kernels, name)
        assert callable(found) or found is dllm_kernels.layers, name


def test_describe_backends_has_a_line_for_each(capsys):
    text = dllm_kernels.describe_backends()
    assert capsys.readouterr().out.strip() == text
    for op in ("bidirectional_attention", "block_diffusion_attention", "linear_masked_cross_entropy",
               "linear_topk_unmask"):
        assert any(line.startswith(op) and "reference" in line and line.endswith("yes") for line in text.splitlines())
