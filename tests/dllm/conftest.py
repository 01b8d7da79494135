"""Fixtures of the stack's tests."""

import json
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """A cache of tokens for the tests, instead of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def functions() -> list[str]:
    """40 documents of one to five short functions."""
    return [f"def add_{i}(x, y):\n    return x + y + {i}\n\n" * (1 + i % 5) for i in range(40)]


@pytest.fixture(scope="session")
def corpus(functions, tmp_path_factory) -> Path:
    """A file of these documents."""
    path = tmp_path_factory.mktemp("corpus") / "code.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in functions))
    return path


@pytest.fixture
def model(model_folder):
    from dllm.diffusion_lm import DiffusionLM

    return DiffusionLM.from_pretrained(model_folder)


@pytest.fixture
def tokenizer(model_folder):
    from dllm.model.tokenizer import load_tokenizer

    return load_tokenizer(model_folder)


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory) -> Path:
    """A folder with a random tiny DiffusionGemma and its tokenizer. Do not change it."""
    from tests.dllm.tiny_models import save_tiny_gemma

    return save_tiny_gemma(tmp_path_factory.mktemp("model") / "gemma")


@pytest.fixture
def full_disk():
    """`with full_disk(limit):` no file grows beyond `limit` bytes: the system fails the write, as on a full disk.

    Keep the block short: the limit holds for the whole process, and pytest's own output may go to a file.
    """
    @contextmanager
    def limit_file_size(limit: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return limit_file_size


@pytest.fixture(scope="session")
def chromium():
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("no chromium here (apt-get install chromium)")

    def run(page, *flags: str) -> subprocess.CompletedProcess:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                   "--host-resolver-rules=MAP * ~NOTFOUND", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    return run
