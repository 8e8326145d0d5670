"""`paddock bench startup`: how soon a new process answers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from paddock.cli.bench.figures import commit_option, defined, json_option, print_facts, print_figures, print_json
from paddock.cli.engine_options import engine_options
from paddock.cli.session import Session

if TYPE_CHECKING:
    from paddock.bench.startup import Started

_CACHES = ("empty", "warm", "as-is")


@click.command()
@click.argument("model")
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Starts; medians are shown.")
@click.option(
    "--kernel-cache",
    type=click.Choice(_CACHES),
    default="as-is",
    show_default=True,
    help="Triton's compiled kernels: none at each start; those an untimed start left; or as they are.",
)
@engine_options
@commit_option
@json_option
@click.pass_obj
def startup(
    session: Session, /, model: str, runs: int, kernel_cache: str, commit: str | None, as_json: bool, **options: Any
) -> None:
    """Start a process again and again: how long until it accepts a request, and until its first token."""
    from paddock.bench.startup import child_command, measured

    given = {name: value for name, value in options.items() if value is not None}
    given |= {"model": model, "strict": session.strict, "prefer": dict(session.prefer)}
    timed = measured(child_command(given), cache=kernel_cache, runs=runs, on_run=_progress)
    report = {"bench": "startup", "model": model, "kernel_cache": kernel_cache, **_report(timed, commit)}
    if as_json:
        print_json(report)
    else:
        _print(report)


def _progress(number: int, run: Started) -> None:
    if sys.stderr.isatty():
        click.echo(f"start {number + 1}: {run.seconds['first_token']:.2f} s", err=True)


def _report(timed: list[Started], commit: str | None) -> dict[str, Any]:
    from paddock.bench import conditions
    from paddock.bench.startup import DEFINITIONS, summary

    said = timed[-1].facts
    here = conditions.own_circumstances(commit=commit)
    return {
        **summary(timed),
        "runs": [run.figures() for run in timed],
        "definitions": defined(DEFINITIONS),
        **{name: said.get(name) for name in ("weight_bytes", "modules_without_bytecode", "gpu", "plan", "versions")},
        **here,
    }


def _print(report: dict[str, Any]) -> None:
    from paddock.bench.startup import DEFINITIONS

    click.echo(f"start-up of {report['model']}, kernel cache {report['kernel_cache']}, median of {len(report['runs'])}")
    print_figures(DEFINITIONS, report)
    each = ", ".join(f"{run['accepted_seconds']:,.2f}" for run in report["runs"])
    click.echo(f"  first request accepted in each run: {each}")
    if report["modules_without_bytecode"]:
        click.echo(
            f"  {report['modules_without_bytecode']} modules were compiled from source, because no bytecode of them is kept: "
            "unset PYTHONDONTWRITEBYTECODE, and start once where the installed modules' folders can be written"
        )
    plan = {key: value for key, value in (report["plan"] or {}).items() if key != "ops"}
    names = ("gpu", "weight_bytes", "versions", "commit", "date", "command")
    print_facts({"plan": plan or None, **{name: report[name] for name in names}})
