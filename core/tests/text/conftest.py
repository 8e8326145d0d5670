"""Tiny tokenizers, built once."""

from __future__ import annotations

import pytest

from paddock.testing.text import byte_fallback_tokenizer, byte_level_tokenizer
from paddock.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Return a byte-level BPE tokenizer."""
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """Return a SentencePiece-style tokenizer with byte fallback."""
    return byte_fallback_tokenizer()


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Return each tokenizer in turn."""
    found: Tokenizer = request.getfixturevalue(request.param)
    return found
