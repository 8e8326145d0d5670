"""How figures and what they depend on look on standard output."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import click

from paddock.checkpoint.json_file import finite

Definitions = Mapping[str, tuple[str, str, str]]  # name: label, unit, meaning

commit_option = click.option("--commit", metavar="TEXT", help="What the source is [its git commit].")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def defined(definitions: Definitions) -> dict[str, str]:
    """Return each figure's unit and meaning, as the JSON carries them."""
    return {name: f"{unit}: {meaning}" for name, (_, unit, meaning) in definitions.items()}


def print_json(report: Mapping[str, Any]) -> None:
    """Print one JSON object on one line, with null for numbers that are not finite."""
    click.echo(json.dumps(finite(report), allow_nan=False))


def print_figures(
    definitions: Definitions, report: Mapping[str, Any], *, rates: Collection[str] = (), share: float | None = None
) -> None:
    """Print a line a figure: label, value, unit, meaning; and for `rates` their share of the roof in percent."""
    for name, (label, unit, meaning) in definitions.items():
        of_roof = f"; {share:.1f} % of the roof" if name in rates and share is not None else ""
        click.echo(f"  {label:28}{number(report[name]):>12} {unit:9} {meaning}{of_roof}")


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print a line a fact; a fact of several parts on one line, those that are not known left out."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {part}" for key, part in value.items() if part is not None)
        if value is not None:
            click.echo(f"  {name}: {value}")


def number(value: float | None, digits: int = 2) -> str:
    """Return a value to so many decimals, a dash for one that is not known."""
    return "-" if value is None else f"{value:,.{digits}f}"
