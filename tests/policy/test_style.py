"""The formatter and the linter have nothing left to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.policy.source_tree import ROOT


@pytest.mark.parametrize("words", [("check", "--output-format=concise"), ("format", "--check")], ids=["lint", "format"])
def test_ruff_is_content(words: tuple[str, ...]) -> None:
    """Every file is as `make format` leaves it, examples in the docs included."""
    result = subprocess.run([Path(sys.executable).with_name("ruff"), *words, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
