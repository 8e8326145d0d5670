"""`paddock bench table`: reports as Markdown, for a page of figures."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
def table(files: tuple[Path, ...]) -> None:
    """Print the JSON of throughput, latency, startup and kernels as Markdown tables, with what each figure depends on."""
    from paddock.bench.reports import read_reports
    from paddock.cli.bench.markdown import NEEDS, page

    click.echo(page(read_reports(files, NEEDS)), nl=False)
