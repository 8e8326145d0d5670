"""How a plan looks in a terminal: the choices, the bytes of each device, what fits, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import click

from paddock.cli.tables import show_table
from paddock.planning.hardware import GIB
from paddock.planning.plan import Ledger, Plan

_COPIES, _IN_FP8 = "FP8 copies", "a weight in FP8"  # with w8a8 alone: kept, or beside a large step
_LINES: tuple[tuple[str, Callable[[Ledger], int]], ...] = (
    ("embeddings", lambda ledger: ledger.weights.embeddings),
    ("layers", lambda ledger: ledger.weights.layers),
    ("head", lambda ledger: ledger.weights.head),
    ("norms", lambda ledger: ledger.weights.norms),
    (_COPIES, lambda ledger: ledger.weights.copies),
    ("weights", lambda ledger: ledger.weights.total),
    ("activations", lambda ledger: ledger.workspace.activations),
    ("logits and sampling", lambda ledger: ledger.workspace.logits),
    ("attention workspace", lambda ledger: ledger.workspace.attention),
    (_IN_FP8, lambda ledger: ledger.workspace.weights),
    ("graphs", lambda ledger: ledger.graph_bytes),
    ("KV pages", lambda ledger: ledger.kv_bytes),
    ("free", lambda ledger: ledger.free_bytes),
    ("may use", lambda ledger: ledger.budget_bytes),
)


def show_plan(plan: Plan, *, explain: bool) -> None:
    """Print the plan; with `explain` also why each choice was made and what was rejected."""
    click.echo(f"{plan.asked.model} on {plan.hardware}\n")
    _show_choices(plan, explain=explain)
    click.echo()
    _show_ledger(plan)
    click.echo(f"\n{_what_fits(plan)}")
    for issue in plan.issues:
        if issue.level != "error":
            click.echo(f"{issue.level}: {issue.message}" + (f"\n  fix: {issue.fix}" if issue.fix else ""))
    click.echo("It cannot run so." if plan.errors else "It can run.")


def _show_choices(plan: Plan, *, explain: bool) -> None:
    if not explain:
        show_table(("choice", "value"), [(c.name, c.value) for c in plan.choices if not c.name.startswith("op ")])
        return
    rows = []
    for choice in plan.choices:
        rows.append((choice.name, choice.value, choice.reason))
        rows += [("", f"not {rejected.value}", rejected.reason) for rejected in choice.rejected]
    show_table(("choice", "value", "because"), rows)


def _show_ledger(plan: Plan) -> None:
    each = "each GPU" if plan.num_gpus > 1 else "memory"
    stages = [f"{each}, layers {s.first_layer}-{s.end_layer - 1}, GiB" for s in plan.ledgers]
    heads = stages if len(plan.ledgers) > 1 else [f"{each}, GiB"]
    lines = [(name, size) for name, size in _LINES if name not in (_COPIES, _IN_FP8) or any(map(size, plan.ledgers))]
    rows = [(name, *(f"{size(ledger) / GIB:10.3f}" for ledger in plan.ledgers)) for name, size in lines]
    missing = [ledger.missing_bytes for ledger in plan.ledgers]
    if any(missing):
        rows.append(("missing", *(f"{size / GIB:10.3f}" for size in missing)))
    show_table(("", *heads), rows)


def _what_fits(plan: Plan) -> str:
    return (
        f"KV: {plan.kv_bytes_per_token:,} bytes a token; {plan.num_pages:,} pages of {plan.page_size} hold {plan.kv_tokens:,} "
        f"tokens, {plan.full_sequences:,} sequences of {plan.max_model_len:,}"
    )
