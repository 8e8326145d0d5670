"""`paddock bench kernels`: every op and attention backend beside its twin, torch's own, and the limit."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import click

from paddock.cli.bench.case_progress import case_progress
from paddock.cli.bench.figures import commit_option, defined, json_option, number, print_facts, print_json
from paddock.cli.bench.interruption import Interruption, interruptible
from paddock.cli.session import Session
from paddock.config import DEVICES

if TYPE_CHECKING:
    from paddock.bench.kernels.measuring import Bench
    from paddock.bench.kernels.rows import Planned, Row

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
    what the device's bandwidth or arithmetic allows. Interrupted by Ctrl-C or SIGTERM it still reports what was measured.
    """
    bench = _bench(session, device, dtype, quick=quick)
    unsized = bench.without_cases(bench.ops(ops)) if ops or not backends else []
    planned = _planned(bench, ops, backends)
    if not as_json:
        click.echo(f"kernels on {bench.hardware.name}, {dtype}\n{_HEAD}")
    with interruptible() as interruption:
        rows = _measured(planned, interruption, as_lines=not as_json)
    report = _report(bench, rows, commit, unsized=unsized, left=planned)
    if as_json:
        print_json(report)
    else:
        _print_end(report)
    if interruption.asked:
        raise KeyboardInterrupt


def _bench(session: Session, device: str, dtype: str, *, quick: bool) -> Bench:
    from paddock.assemble import detect_hardware
    from paddock.bench.kernels.measuring import Bench
    from paddock.config import EngineConfig

    hardware = detect_hardware(EngineConfig(model="", device=device))
    return Bench(registry=session.registry(), hardware=hardware, dtype=dtype, quick=quick)


def _planned(bench: Bench, ops: tuple[str, ...], backends: tuple[str, ...]) -> deque[Planned]:
    """Return all rows to measure, or those of what was named; raise OptionError for a wrong name."""
    attention = bench.backends(backends) if backends or not ops else []
    others = bench.ops(ops) if ops or not backends else []
    planned = [*map(bench.attention_cases, attention), *map(bench.op_cases, others)]
    return deque(each for cases in planned for each in cases)


def _measured(planned: deque[Planned], interruption: Interruption, *, as_lines: bool) -> list[Row]:
    """Return the rows measured before an interruption; one that was under way, or still to come, stays in `planned`."""
    rows: list[Row] = []
    with case_progress(len(planned), beside_lines=as_lines) as progress:
        try:
            while planned:
                progress.begin(_title(planned[0].row))
                row = planned[0].measured()
                if interruption.asked:  # the kernel may have taken the interruption for an error of its own
                    break
                rows.append(row)
                planned.popleft()  # with its case goes what that keeps on the device
                progress.end(_title(row), row.wall_seconds or 0.0)
                if as_lines:
                    click.echo(_line(row))
        except KeyboardInterrupt:
            interruption.asked = True
    return rows


def _title(row: Row) -> str:
    return f"{row.name} {row.case}"


def _report(bench: Bench, rows: list[Row], commit: str | None, *, unsized: list[str], left: deque[Planned]) -> dict[str, Any]:
    from attrs import asdict

    from paddock.bench import conditions
    from paddock.bench.kernels.rows import DEFINITIONS

    measured = {row.plugin for row in rows}
    distributions = [
        (each.distribution, each.version) for each in bench.registry.loaded if each.plugin in measured and each.version
    ]
    return {
        "bench": "kernels",
        "device": bench.hardware.name,
        "dtype": bench.dtype,
        "quick": bench.quick,
        "complete": not left,
        "interrupted_at": _title(left[0].row) if left else None,
        "cases_not_measured": len(left),
        "measured_seconds": sum(row.wall_seconds or 0.0 for row in rows),
        "rows": [{"name": row.name, **asdict(row)} for row in rows],
        "ops_without_sizes": unsized,
        "ceilings": None if bench.ceilings is None else asdict(bench.ceilings),
        "definitions": defined(DEFINITIONS),
        "gpu": conditions.gpus(),
        **conditions.circumstances(distributions=distributions, commit=commit),
    }


def _line(row: Row) -> str:
    head = f"{row.name:22} {row.case:46}"
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
    from paddock.bench.kernels.rows import DEFINITIONS

    for label, unit, meaning in DEFINITIONS.values():
        click.echo(f"  {label}, {unit}: {meaning}")
    ceilings = report["ceilings"]
    click.echo(f"  roof: {ceilings['source'] if ceilings else f'none, {NO_CEILINGS}'}")
    if not report["complete"]:
        click.echo(f"  incomplete: interrupted at {report['interrupted_at']}, {report['cases_not_measured']} cases not measured")
    if report["ops_without_sizes"]:
        click.echo(f"  no sizes are known for: {', '.join(report['ops_without_sizes'])}")
    print_facts({name: report[name] for name in ("gpu", "versions", "commit", "date", "command")})
