"""A plan as `paddock plan --json` prints it: the verdict and the figures people look for, then the plan itself."""

from __future__ import annotations

from typing import Any

from paddock.planning.plan import Plan
from paddock.planning.serial import fingerprint, to_dict


def as_report(plan: Plan) -> dict[str, Any]:
    """Return plain JSON values. `memory` has one entry a pipeline stage, for each of its devices; `plan` reads back whole."""
    return {
        "runnable": not plan.errors,
        "fingerprint": fingerprint(plan),
        "hardware": str(plan.hardware),
        "devices": plan.num_gpus,
        "max_model_len": plan.max_model_len,
        "weight_bytes": plan.weight_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_pages": plan.num_pages,
        "kv_tokens": plan.kv_tokens,
        "full_sequences": plan.full_sequences,
        "missing_bytes": plan.ledger.missing_bytes,
        "memory": [
            {
                "stage": ledger.stage,
                "budget_bytes": ledger.budget_bytes,
                "weight_bytes": ledger.weights.total,
                "workspace_bytes": ledger.workspace.total,
                "graph_bytes": ledger.graph_bytes,
                "kv_bytes": ledger.kv_bytes,
                "free_bytes": ledger.free_bytes,
                "missing_bytes": ledger.missing_bytes,
            }
            for ledger in plan.ledgers
        ],
        "issues": [{"level": i.level, "code": i.code, "message": i.message, "fix": i.fix} for i in plan.issues],
        "plan": to_dict(plan),
    }
