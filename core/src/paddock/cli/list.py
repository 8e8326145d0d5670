"""`paddock list KIND`: what is installed of one kind, and who brings it."""

from __future__ import annotations

import json
from typing import Any

import click
from attrs import asdict

from paddock.cli.session import Session
from paddock.cli.tables import show_table
from paddock.plugins import CommandSpec, kinds
from paddock.plugins.provider import Provided

LISTED = {
    "models": kinds.MODELS,
    "quantizations": kinds.QUANTIZATIONS,
    "recipes": kinds.RECIPES,
    "attention": kinds.ATTENTION,
    "parallel": kinds.PARALLEL,
    "ops": kinds.OPS,
    "commands": kinds.COMMANDS,
    "observers": kinds.OBSERVERS,
}


@click.command()
@click.argument("kind", type=click.Choice(tuple(LISTED)))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array, each element a complete descriptor.")
@click.pass_obj
def command(session: Session, kind: str, as_json: bool) -> None:
    """List what is installed of one KIND, and who brings it. Installed means available, not in use."""
    chosen = LISTED[kind]
    found: tuple[Provided[Any], ...] = getattr(session.registry(), chosen.name)
    if as_json:
        click.echo(json.dumps([_described(each) for each in found], indent=2))
    elif found:
        show_table((chosen.noun, "plugin", "distribution", "summary"), [row for each in found for row in _rows(chosen, each)])
    else:
        click.echo(f"no plugin brings any {chosen.noun}", err=True)
    for conflict in session.registry().conflicts:
        if conflict.noun == chosen.noun:
            click.echo(f"conflict: {conflict.error()}", err=True)
    if session.strict:
        session.registry().require_unbroken()


def _described(provided: Provided[Any]) -> dict[str, Any]:
    return asdict(provided.spec, value_serializer=_plain) | asdict(provided.provider)


def _plain(_: object, __: object, value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value


def _rows(kind: kinds.Kind, provided: Provided[Any]) -> list[tuple[str, str, str, str]]:
    spec, provider = provided.spec, provided.provider
    summary = spec.help if isinstance(spec, CommandSpec) else spec.summary
    distribution = " ".join(filter(None, (provider.distribution, provider.version)))
    return [(name, provider.plugin, distribution, summary) for name in kind.names(spec)]
