"""A Plan as JSON, both ways, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import TYPE_CHECKING, Any

from paddock.errors import PlanError
from paddock.planning.plan import Plan

if TYPE_CHECKING:
    from cattrs import Converter

# What may differ between two plans that run the same engine: how it was asked for and explained, and the bytes counted.
VOLATILE = frozenset({"asked", "choices", "issues", "ledgers"})
# What the engine is built from, of the options that no resolved field repeats.
_LASTING_OPTIONS = ("model", "load_format", "enable_prefix_caching")


@cache
def _converter() -> Converter:
    from cattrs import Converter

    return Converter(forbid_extra_keys=True, detailed_validation=False)


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain JSON values; sets are sorted lists."""
    # Through json, so that what is returned equals what is read back: it makes lists of tuples and, by `default`, of sets.
    plain: dict[str, Any] = json.loads(json.dumps(_converter().unstructure(plan), default=sorted))
    return plain


def to_json(plan: Plan) -> str:
    """Return the plan as one canonical line of JSON: sorted keys, no spaces."""
    return _canonical(to_dict(plan))


def from_json(text: str | bytes) -> Plan:
    """Return the plan a JSON text holds; raise PlanError when it is not one of this version's plans."""
    try:
        return _converter().structure(json.loads(text), Plan)
    except Exception as error:  # cattrs raises whatever the field's type, validator or converter raises
        message = f"this is not a plan of this version: {error!r:.300}"
        raise PlanError(message, fix="make it anew with paddock plan --json") from error


def fingerprint(plan: Plan) -> str:
    """Return the SHA-256, in hex, of what the plan runs: equal plans share compiled kernels and cached pages.

    Free memory, ledger, issues and explanations do not count.
    """
    values = to_dict(plan)
    kept = {name: value for name, value in values.items() if name not in VOLATILE}
    lasting = (*_LASTING_OPTIONS, "seed") if plan.asked.load_format == "dummy" else _LASTING_OPTIONS  # it draws the weights
    kept["options"] = {name: values["asked"][name] for name in lasting}
    kept["hardware"] = {name: value for name, value in values["hardware"].items() if name != "available_bytes"}
    return hashlib.sha256(_canonical(kept).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
