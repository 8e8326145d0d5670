"""The evaluation sets and the Wikipedia text in `data/`, as `paddock eval fetch` gets them.

    python -m tests.assets.evaluation_sets          all tasks (85.6 MB to fetch) and wikipedia.txt (73.9 MB)

Pins and licences are those of `paddock.evaluation.sets`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from paddock.errors import PaddockError
from paddock.evaluation import sets
from paddock.evaluation.documents import documents_file
from tests.assets.folders import run

FOLDER = Path(__file__).parents[2] / "data"
TEXT = FOLDER / "wikipedia.txt"


def fetch(folder: Path = FOLDER) -> Path:
    """Return `folder` with every set in it; what is there already is not fetched again. Raises RuntimeError where one fails."""
    files = {name: folder / TEXT.name if name == sets.WIKIPEDIA else documents_file(name, folder) for name in sets.SETS}
    missing = [name for name, path in files.items() if not path.is_file()]
    try:
        sets.fetch(missing, folder)
    except PaddockError as error:
        raise RuntimeError(str(error)) from error
    return folder


if __name__ == "__main__":
    sys.exit(run("tests.assets.evaluation_sets", "Fetch the evaluation sets.", fetch, FOLDER))
