"""Figures of a model beside the roof: what its device could give at best."""

from __future__ import annotations

from typing import Any

from attrs import asdict

from paddock.bench.measure import Workload
from paddock.planning.plan import Plan
from paddock.planning.roofs import FORMULA, Ceilings, Roof, ceilings_of, demand_of, roof

RATES = ("output_tokens_per_second", "total_tokens_per_second", "requests_per_second")  # all of which have one share
NO_PLAN = "no plan is known"
NO_CEILINGS = "the ceilings of this device are not known"


def beside_roof(plan: Plan | None, work: Workload, output_tokens_per_second: float | None) -> dict[str, Any]:
    """Return the roof of each of RATES and `percent_of_roof`, None where there is no roof, and `roof`, how it was found.

    `roof_tokens_per_second` is that of output. One percent holds for all: the roof of each is the same seconds.
    """
    if plan is None:
        return _no_roof(NO_PLAN)
    ceilings = ceilings_of(plan.hardware.name) if plan.hardware.device == "cuda" else None
    if ceilings is None:
        return _no_roof(NO_CEILINGS)
    at_once = min(work.requests, plan.max_num_seqs) if work.at_once else 1
    found = roof(demand_of(plan), ceilings, isl=work.isl, osl=work.osl, at_once=at_once)
    share = None if output_tokens_per_second is None else 100 * output_tokens_per_second / found.tokens_per_second
    return {
        **_rates(found.tokens_per_second, (work.isl + work.osl) / found.seconds, 1 / found.seconds),
        "percent_of_roof": share,
        "roof": _explained(found, ceilings),
    }


def _explained(found: Roof, ceilings: Ceilings) -> dict[str, Any]:
    return {"formula": FORMULA, "ceilings": asdict(ceilings), "seconds_a_request": found.seconds, "terms": asdict(found)}


def _rates(output: float | None, total: float | None, requests: float | None) -> dict[str, Any]:
    return {"roof_tokens_per_second": output, "roof_total_tokens_per_second": total, "roof_requests_per_second": requests}


def _no_roof(why: str) -> dict[str, Any]:
    return {**_rates(None, None, None), "percent_of_roof": None, "roof": {"none_because": why}}
