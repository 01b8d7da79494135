"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded inputs and outputs of the original systems, kept beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the recorded goldens (../shared) are not on this machine")
    return SHARED
