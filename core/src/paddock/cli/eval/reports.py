"""What the commands that measure quality share: a text from a file, a table of figures, and what figures depend on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paddock.cli.bench.figures import Definitions, defined, print_facts, print_json
from paddock.cli.tables import show_table

if TYPE_CHECKING:
    from paddock.llm import LLM

SPEED: Definitions = {
    "seconds": ("time", "s", "from the first prompt given to the last one scored"),
}


def facts(llm: LLM, commit: str | None) -> dict[str, Any]:
    """Return what a figure of an engine depends on."""
    from paddock.bench import conditions

    around = conditions.circumstances(distributions=conditions.distributions_of(llm.plan), commit=commit)
    return {"gpu": conditions.gpus(), "plan": conditions.planned(llm.plan), **around}


def figures(found: object, definitions: Definitions, seconds: float) -> dict[str, Any]:
    """Return what was found by the names that `definitions` has, the seconds it took, and what each is."""
    return {
        **{name: getattr(found, name) for name in definitions},
        "seconds": round(seconds, 2),
        "definitions": defined({**definitions, **SPEED}),
    }


def give(report: Mapping[str, Any], definitions: Definitions, *plans: str, title: str, as_json: bool) -> None:
    """Print a report: as JSON, or under its title as tables; `plans` are the names of plans in it."""
    if as_json:
        print_json(report)
        return
    click.echo(title)
    _show_figures({**definitions, **SPEED}, report)
    _show_facts(report, *plans)


def _show_figures(definitions: Definitions, report: Mapping[str, Any]) -> None:
    """Print a table with a row a figure: label, value, unit, meaning; figures that are not known left out."""
    rows = [
        (label, _value(report[name]), unit, meaning)
        for name, (label, unit, meaning) in definitions.items()
        if report[name] is not None
    ]
    show_table(("figure", "value", "unit", "what it is"), rows)


def _show_facts(report: Mapping[str, Any], *plans: str) -> None:
    """Print what the figures depend on; `plans` are the names of plans in the report."""
    for name in plans:
        shown = {key: value for key, value in (report[name] or {}).items() if key != "ops"}
        print_facts({name: shown or None})
    print_facts({name: report[name] for name in ("gpu", "versions", "commit", "date", "command")})


def _value(value: float) -> str:
    """Return a count as it is, anything else to six significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


text_option = click.option(
    "--text", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The text to predict, in UTF-8."
)
