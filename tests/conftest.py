"""Fixtures shared by all tests, and how tests are shared out among processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compiled import SHELVES

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: `make test` runs one process for each core
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(SHELVES / "inductor"))  # of layers compiled by torch.compile

SHARED = Path(__file__).parents[2] / "shared"


def pytest_configure() -> None:
    os.environ.pop("PYTEST_XDIST_WORKER", None)  # with it pytest-benchmark writes nothing in processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left alone with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded inputs and outputs of the original systems, kept beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the recorded goldens (../shared) are not on this machine")
    return SHARED


@pytest.fixture
def run_interpreted() -> Callable[[str], None]:
    """A function that runs a test file in a process where Triton interprets, and fails where its tests do.

    The interpreter must be asked for before Triton is imported, and other tests would find it too.
    """
    def run(file: str) -> None:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                               "-p", "tests.interpreter", file], cwd=Path(__file__).parents[1], capture_output=True,
                              text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A folder with a random tiny model (400 tokens, 256 positions) and a tokenizer of its own. Do not change it."""
    import torch

    from dllm.diffusion_lm import DiffusionLM
    from dllm.model.families import ModelConfig
    from dllm.model.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = train_tokenizer([Path(__file__).read_text()], 400)
    torch.manual_seed(0)
    model = DiffusionLM(ModelConfig(
        family="qwen3", vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, qk_norm=True, tie_word_embeddings=True,
        max_position_embeddings=256, initializer_range=0.2, mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def edit_folder(model_folder, tmp_path_factory) -> Path:
    """The same model with random heads that insert, delete and substitute, and edits as its method. Do not change
    it."""
    import torch

    from dllm.diffusion_lm import DiffusionLM
    from dllm.model.growth import add_edit_heads
    from dllm.model.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("model") / "edits"
    model = add_edit_heads(DiffusionLM.from_pretrained(model_folder), "all")
    with torch.no_grad():
        model.insert_head.weight.copy_(model.insert_head.weight.flip(0))
        model.rate_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        model.rate_head.bias.copy_(torch.tensor([-1.0, 0.5, 1.5]))
    model.generation_defaults = {"alg": "edit"}
    model.save_pretrained(folder)
    load_tokenizer(model_folder).save_pretrained(folder)
    return folder
