"""Fixtures of the stack's tests."""

import pytest


@pytest.fixture
def model(model_folder):
    from dllm.model import DiffusionLM

    return DiffusionLM.from_pretrained(model_folder)


@pytest.fixture
def tokenizer(model_folder):
    from dllm.tokenizer import load_tokenizer

    return load_tokenizer(model_folder)
