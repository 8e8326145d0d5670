"""The byte ledger beside what was measured: how well planning predicts memory."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from paddock.execution.memory import MemoryUse
from paddock.planning.plan import Ledger, Plan


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
    """Return weights, KV, workspace, graphs, and their total."""
    predicted = {
        "weights": ledger.weights.total,
        "KV": ledger.kv_bytes,
        "workspace": ledger.workspace.total,
        "graphs": ledger.graph_bytes,
    }
    measured = use and dict(zip(predicted, (use.weight_bytes, use.kv_bytes, use.workspace_bytes, use.graph_bytes), strict=True))
    rows = [Entry(name=name, predicted=size, measured=measured[name] if measured else None) for name, size in predicted.items()]
    total = sum(measured.values()) if measured else None
    return (*rows, Entry(name="total", predicted=sum(predicted.values()), measured=total))


def ledger_report(plan: Plan | None, use: MemoryUse | None) -> dict[str, Any] | None:
    """Return the comparison as plain values, with the allocator's own sums; None without a plan."""
    if plan is None:
        return None
    entries = compared(plan.ledger, use)
    return {
        "bytes_of": "one device of the stage with the least to spare",
        "measured": use is not None,
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
