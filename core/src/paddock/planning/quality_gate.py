"""Folders that `paddock quantize` made and whose quality gate failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paddock.config import DUMMY, EngineConfig
from paddock.planning.notes import Notes

FAILED = "failed"  # what a manifest's status says then
WAY_OUT = "use another recipe, or calibrate on more text of the kind the model will read"


def measured_kv(gate: Mapping[str, Any]) -> str:
    """Return the words for what keys and values were kept in after quantising, where that is not what the plain model's were."""
    before, after = (gate.get(when, {}).get("kv_cache_dtype") for when in ("before", "after"))
    return f" with keys and values in {after}" if after is not None and after != before else ""


def say_failed_gate(config: EngineConfig, manifest: Mapping[str, Any], notes: Notes) -> None:
    """Warn where a folder's manifest says that its perplexity grew by more than was allowed."""
    if manifest.get("status") != FAILED or config.load_format == DUMMY:
        return
    gate = manifest.get("gate")
    grown, limit = (gate.get(name) if isinstance(gate, Mapping) else None for name in ("growth", "limit"))
    numbers = isinstance(grown, int | float) and isinstance(limit, int | float)
    said = f"perplexity had grown by {grown:.2%}, its gate allowed {limit:.2%}" if numbers else "its gate was not passed"
    notes.find(
        "warning",
        "quality_gate_failed",
        f"paddock quantize marked the checkpoint failed: {said}",
        WAY_OUT,
    )
