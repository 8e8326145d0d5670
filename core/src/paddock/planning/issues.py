"""What is wrong with a plan or worth saying about it: planning's own findings and those of the plugins' checks."""

from __future__ import annotations

from attrs import evolve

from paddock.errors import PlanError
from paddock.planning.plan import Plan
from paddock.plugins.registry import Registry


def with_issues(plan: Plan, registry: Registry, *, strict: bool) -> Plan:
    """Return the plan with the plugins' issues after its own; `strict` turns warnings into errors."""
    issues = (*plan.issues, *registry.check_plan(plan))
    if strict:
        issues = tuple(evolve(issue, level="error") if issue.level == "warning" else issue for issue in issues)
    return evolve(plan, issues=issues)


def require_runnable(plan: Plan) -> None:
    """Raise one PlanError that says every error of the plan and its way out; nothing when the plan can run."""
    if not plan.errors:
        return
    messages = "\n  ".join(issue.message for issue in plan.errors)
    raise PlanError(messages, fix="; ".join(dict.fromkeys(issue.fix for issue in plan.errors if issue.fix)))
