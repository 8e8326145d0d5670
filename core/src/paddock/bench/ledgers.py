"""The byte ledger beside what was measured: how well planning predicts memory."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from paddock.execution.memory import MemoryUse
from paddock.planning.padding import MIXED_GRAPHS, padded_sizes
from paddock.planning.plan import Ledger, Plan

MEANINGS = {
    "weights": "parameters and buffers as the device holds them",
    "KV": "the pool of pages; measured, what is really left once all that can be captured is set aside",
    "workspace": "the most a step has beside weights, pages and graphs",
    "gaps": "what the allocator holds and nothing uses: between blocks of other sizes than are asked for",
    "graphs": "predicted for all {shapes} shapes that can be captured; measured for those this run met and captured",
    "total": "the sum; graphs that were not captured are in the prediction alone",
}


@frozen(kw_only=True)
class Entry:
    """Bytes of one device under one name: as the plan predicted them and as measured, None where they were not."""

    name: str
    predicted: int
    measured: int | None

    @property
    def difference_percent(self) -> float | None:
        """Return how far measured lies above predicted, in percent of predicted; None where that says nothing."""
        if self.measured is None or not self.predicted:
            return None
        return 100 * (self.measured - self.predicted) / self.predicted


def compared(ledger: Ledger, use: MemoryUse | None) -> tuple[Entry, ...]:
    """Return weights, KV, workspace, gaps, graphs, and their total; gaps are what else the allocator holds."""
    predicted = {
        "weights": ledger.weights.total,
        "KV": ledger.kv_bytes,
        "workspace": ledger.workspace.total,
        "gaps": 0,
        "graphs": ledger.graph_bytes,
    }
    measured = _measured(use) if use else None
    rows = [Entry(name=name, predicted=size, measured=measured[name] if measured else None) for name, size in predicted.items()]
    total = sum(measured.values()) if measured else None
    return (*rows, Entry(name="total", predicted=sum(predicted.values()), measured=total))


def _measured(use: MemoryUse) -> dict[str, int]:
    used = {"weights": use.weight_bytes, "KV": use.kv_bytes, "workspace": use.workspace_bytes, "graphs": use.graph_bytes}
    return used | {"gaps": max(0, use.reserved_bytes - sum(used.values()))}


def ledger_report(plan: Plan | None, use: MemoryUse | None) -> dict[str, Any] | None:
    """Return the comparison as plain values, with the allocator's own sums; None without a plan."""
    if plan is None:
        return None
    entries = compared(plan.ledger, use)
    return {
        "bytes_of": "one device of the stage with the least to spare",
        "measured": use is not None,
        "definitions": {name: meaning.format(shapes=_shapes(plan)) for name, meaning in MEANINGS.items()},
        "entries": {
            each.name: {
                "predicted": each.predicted,
                "measured": each.measured,
                "difference_percent": each.difference_percent,
            }
            for each in entries
        },
        "peak_bytes": use.peak_bytes if use else None,
        "reserved_bytes": use.reserved_bytes if use else None,
    }


def _shapes(plan: Plan) -> int:
    """Return how many graphs the ledger sets memory aside for: of decodes of every padded size, and of steps with prompts."""
    return len(padded_sizes(plan.max_num_seqs)) + MIXED_GRAPHS if plan.graphs else 0
