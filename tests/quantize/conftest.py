"""Models to quantise, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quantize.made import random_llama, write_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random float32 Llama of four layers."""
    return write_model(tmp_path_factory.mktemp("plain") / "llama", random_llama())
