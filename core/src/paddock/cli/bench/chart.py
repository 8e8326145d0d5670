"""`paddock bench chart`: reports as bars."""

from __future__ import annotations

from pathlib import Path

import click

from paddock.errors import OptionError


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="NAME", type=click.Path(path_type=Path), help="Written as NAME.png and NAME.svg.")
def chart(files: tuple[Path, ...], out: Path) -> None:
    """Draw the JSON of throughput, latency and kernels: how fast, and what share of the roof."""
    from paddock.bench.charts import NEEDS, charts_of, draw
    from paddock.bench.reports import read_reports

    charts = charts_of(read_reports(files, NEEDS))
    if not charts:
        raise OptionError(f"no figure in {', '.join(map(str, files))}", fix="give reports that measured something")
    for path in draw(charts, out):
        click.echo(str(path))
