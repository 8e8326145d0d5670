"""Who takes which steps of a `ring`, by Python's own arithmetic."""

from __future__ import annotations

import pytest

from paddock_triton import ring


def call_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what shares steps be called, and call its like, outside of a kernel."""
    for name in ("first_unit", "program_of", "whole_tiles", "share_of", "place_in"):
        monkeypatch.setattr(ring, name, getattr(ring, name).fn)
