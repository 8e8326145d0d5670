"""`paddock plugins`: every plugin found, what it brings, or why it failed."""

from __future__ import annotations

import json
from typing import Any

import click

from paddock.cli.session import Session
from paddock.cli.tables import show_table
from paddock.plugins.kinds import KINDS
from paddock.plugins.provider import Provider
from paddock.plugins.registry import Registry


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def command(session: Session, as_json: bool) -> None:
    """Show every plugin found: what it brings, or why it failed.

    A plugin is `ok`, `broken` (isolated, nothing of it is used) or `filtered` (kept out by PADDOCK_PLUGINS). With --strict,
    a broken plugin makes the command fail once it has shown the table.
    """
    report = describe(session.registry())
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    if session.strict:
        session.registry().require_unbroken()


def describe(registry: Registry) -> dict[str, Any]:
    """Return what is installed as plain values, complete: plugins, conflicts, overridden names, shadowed copies."""
    whole = [_row(provider, "ok", provides=_provides(registry, provider)) for provider in registry.loaded]
    broken = [_row(each.provider, "broken", error=f"{each.stage}: {each.reason}", fix=each.fix) for each in registry.broken]
    filtered = [_row(provider, "filtered") for provider in registry.filtered]
    conflicts = [
        {"kind": each.noun, "name": each.name, "owners": [str(owner) for owner in each.owners], "fix": each.error().fix}
        for each in registry.conflicts
    ]
    overridden = [
        {"kind": each.noun, "name": each.name, "plugin": str(each.provider), "preferred": str(each.by)}
        for each in registry.overridden
    ]
    shadowed = [str(provider) for provider in registry.shadowed]
    return {"plugins": [*whole, *broken, *filtered], "conflicts": conflicts, "overridden": overridden, "shadowed": shadowed}


def _row(
    provider: Provider, status: str, *, provides: dict[str, list[str]] | None = None, error: str = "", fix: str = ""
) -> dict[str, Any]:
    return {
        "plugin": provider.plugin,
        "distribution": provider.distribution,
        "version": provider.version,
        "status": status,
        "provides": provides or {},
        "error": error or None,
        "fix": fix or None,
    }


def _provides(registry: Registry, provider: Provider) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        for each in getattr(registry, kind.name):
            if each.provider == provider:
                found.setdefault(kind.name, []).extend(kind.names(each.spec))
    if any(owner == provider for owner, _ in registry.checks):
        found["plan_checks"] = [provider.plugin]
    return found


def _show(report: dict[str, Any]) -> None:
    rows = [
        (
            row["plugin"],
            " ".join(filter(None, (row["distribution"], row["version"]))),
            row["status"],
            "; ".join(f"{kind}: {', '.join(names)}" for kind, names in row["provides"].items()),
        )
        for row in report["plugins"]
    ]
    show_table(("plugin", "distribution", "status", "brings"), rows)
    for row in report["plugins"]:
        if row["error"]:
            click.echo(
                f"\nbroken: {row['plugin']} ({row['distribution']} {row['version']}) at {row['error']}\n  fix: {row['fix']}"
            )
    for each in report["conflicts"]:
        click.echo(f"\nconflict: {each['kind']} {each['name']!r}: {' and '.join(each['owners'])}\n  fix: {each['fix']}")
    for each in report["overridden"]:
        click.echo(f"\npreferred: {each['kind']} {each['name']!r} from {each['preferred']}, not from {each['plugin']}")
    for shadowed in report["shadowed"]:
        click.echo(f"\nshadowed: another copy of {shadowed} lies later on the path and is not used")
