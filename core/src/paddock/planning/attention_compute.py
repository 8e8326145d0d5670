"""What attention over FP8 pages multiplies in: the dtype of activations (plain), or FP8 for queries and probabilities too."""

from __future__ import annotations

from paddock.config import FP8_ATTENTION, PLAIN_ATTENTION
from paddock.errors import PlanError
from paddock.planning.hardware import Hardware
from paddock.planning.notes import ASKED, Candidate, Notes
from paddock.planning.plan import Rejected

COST = "it raised the perplexity of two small models by 0.09 and 0.46 % over FP8 keys and values (docs/benchmarks/quality.md)"


def over_fp8(compute: str, kvs: list[Candidate]) -> list[Candidate]:
    """Return the KV dtypes that products of that kind can read; raise PlanError where FP8 is asked for and none is FP8."""
    if compute != FP8_ATTENTION:
        return kvs
    found = [kv for kv in kvs if kv.value == "fp8"]
    if not found:
        kept = kvs[0]
        raise PlanError(
            f"attention_compute is {compute!r}, which reads FP8 keys and values, but KV is kept in {kept.value} ({kept.reason})",
            fix=f"set kv_cache_dtype to fp8, or leave attention_compute at {PLAIN_ATTENTION}",
        )
    return found


def say_compute(compute: str, kv_dtype: str, hardware: Hardware, notes: Notes) -> None:
    """Write the choice down where there was one: over FP8 pages."""
    if kv_dtype != "fp8":
        return
    if compute == FP8_ATTENTION:
        gain = "" if hardware.device == "cuda" else "; a CPU has no FP8 products and wins nothing"
        notes.choose("attention_compute", compute, f"{ASKED}; {COST}{gain}")
        return
    rejected = Rejected(FP8_ATTENTION, f"not asked for; {COST}")
    notes.choose(
        "attention_compute", compute, "queries and probabilities are rounded to FP8 where that is asked for alone", [rejected]
    )
