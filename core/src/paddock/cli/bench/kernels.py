"""`paddock bench kernels`: every op and attention backend beside its twin, torch's own, and the limit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from paddock.cli.bench.figures import commit_option, defined, json_option, number, print_facts, print_json
from paddock.cli.session import Session
from paddock.config import DEVICES

if TYPE_CHECKING:
    from paddock.bench.kernels.measuring import Bench, Row

_COLUMNS = ("us", "rate", "unit", "% roof", "limit us", "twin us", "torch us")
_HEAD = f"{'':22} {'case':46}" + "".join(f"{column:>10}" for column in _COLUMNS)


@click.command()
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Measure this op alone; may be repeated.")
@click.option("--backend", "backends", multiple=True, metavar="NAME", help="Measure this attention backend alone; likewise.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", help="Where to run [auto: a GPU where there is one].")
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    default="bfloat16",
    show_default=True,
    help="Type of activations and weights.",
)
@click.option("--quick", is_flag=True, help="Small sizes: whether kernels are right and run at all, not how fast they are.")
@commit_option
@json_option
@click.pass_obj
def kernels(
    session: Session,
    /,
    ops: tuple[str, ...],
    backends: tuple[str, ...],
    device: str,
    dtype: str,
    quick: bool,
    commit: str | None,
    as_json: bool,
) -> None:
    """Time every op and attention backend that serves this device, at the widths of published models.

    Each is checked against its plain-torch twin first; a wrong one is shown with its error and without a time. The limit is
    what the device's bandwidth or arithmetic allows.
    """
    bench = _bench(session, device, dtype, quick=quick)
    rows: list[Row] = []
    coming = _rows(bench, ops, backends)
    if not as_json:
        click.echo(f"kernels on {bench.hardware.name}, {dtype}\n{_HEAD}")
    for row in coming:
        rows.append(row)
        if not as_json:
            click.echo(_line(row))
    report = _report(bench, rows, commit, unsized=bench.without_cases(bench.ops(ops)) if ops or not backends else [])
    if as_json:
        print_json(report)
    else:
        _print_end(report)


def _bench(session: Session, device: str, dtype: str, *, quick: bool) -> Bench:
    from paddock.assemble import detect_hardware
    from paddock.bench.kernels.measuring import Bench
    from paddock.config import EngineConfig

    hardware = detect_hardware(EngineConfig(model="", device=device))
    return Bench(registry=session.registry(), hardware=hardware, dtype=dtype, quick=quick)


def _rows(bench: Bench, ops: tuple[str, ...], backends: tuple[str, ...]) -> Iterator[Row]:
    """Return all rows, or those of what was named, each measured when it is asked for; raise OptionError for a wrong name."""
    attention = bench.backends(backends) if backends or not ops else []
    others = bench.ops(ops) if ops or not backends else []
    return chain.from_iterable((*map(bench.attention_rows, attention), *map(bench.op_rows, others)))


def _report(bench: Bench, rows: list[Row], commit: str | None, *, unsized: list[str]) -> dict[str, Any]:
    from attrs import asdict

    from paddock.bench import conditions
    from paddock.bench.kernels.measuring import DEFINITIONS

    measured = {row.plugin for row in rows}
    distributions = [
        (each.distribution, each.version) for each in bench.registry.loaded if each.plugin in measured and each.version
    ]
    return {
        "bench": "kernels",
        "device": bench.hardware.name,
        "dtype": bench.dtype,
        "quick": bench.quick,
        "rows": [asdict(row) for row in rows],
        "ops_without_sizes": unsized,
        "ceilings": None if bench.ceilings is None else asdict(bench.ceilings),
        "definitions": defined(DEFINITIONS),
        "gpu": conditions.gpus(),
        **conditions.circumstances(distributions=distributions, commit=commit),
    }


def _line(row: Row) -> str:
    name = row.implementation if row.subject == "attention" else row.subject
    head = f"{name if row.plugin == 'builtin' else f'{row.plugin} {name}':22} {row.case:46}"
    if row.problem is not None:
        return f"{head} {row.problem}"
    cells = (
        number(row.microseconds, 2),
        number(row.rate, 3),
        row.unit,
        number(row.percent_of_roof, 1),
        number(row.limit_microseconds, 2),
        number(row.twin_microseconds, 1),
        number(row.library_microseconds, 1),
    )
    return head + "".join(f"{cell:>10}" for cell in cells) + (f"  {row.library}" if row.library else "")


def _print_end(report: dict[str, Any]) -> None:
    from paddock.bench.against_roof import NO_CEILINGS
    from paddock.bench.kernels.measuring import DEFINITIONS

    for label, unit, meaning in DEFINITIONS.values():
        click.echo(f"  {label}, {unit}: {meaning}")
    ceilings = report["ceilings"]
    click.echo(f"  roof: {ceilings['source'] if ceilings else f'none, {NO_CEILINGS}'}")
    if report["ops_without_sizes"]:
        click.echo(f"  no sizes are known for: {', '.join(report['ops_without_sizes'])}")
    print_facts({name: report[name] for name in ("gpu", "versions", "commit", "date", "command")})
