"""Where the documents of a task lie: JSON Lines in a folder, one file a task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from attrs import frozen

from paddock.checkpoint.json_file import parse_object
from paddock.errors import PaddockError
from paddock.evaluation.tasks import find_task
from paddock.text.utf8 import read_utf8

FOLDER_HELP = "$XDG_CACHE_HOME/paddock/evaluation, ~/.cache where that is not set"


@frozen(kw_only=True)
class Documents:
    """A task's documents, and others that may be examples for them (None: there are none of their own)."""

    documents: tuple[dict[str, Any], ...]
    examples: tuple[dict[str, Any], ...] | None


def data_folder() -> Path:
    """Return where evaluation sets are kept unless a folder is given."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "paddock" / "evaluation"


def documents_file(task: str, folder: Path) -> Path:
    """Return the file of a task's documents."""
    return folder / f"{task}.jsonl"


def examples_file(task: str, folder: Path) -> Path:
    """Return the file of a task's examples, which not every task has."""
    return folder / f"{task}.examples.jsonl"


def read_documents(task: str, folder: Path | None = None) -> Documents:
    """Return a task's documents from `folder` (data_folder() when None): TASK.jsonl, and TASK.examples.jsonl where it is there.

    Raises OptionError for an unknown task; PaddockError naming the command that fetches them where there are none, or the file is
    empty, and the line that is no JSON object.
    """
    name = find_task(task).name
    at = data_folder() if folder is None else folder
    path = documents_file(name, at)
    fetch = f"paddock eval fetch {name}" + ("" if folder is None else f" --data {folder}")
    if not path.is_file():
        raise PaddockError(f"no documents of {name}: {path} is not there", fix=fetch)
    documents = _lines(path)
    if not documents:
        raise PaddockError(f"no documents of {name}: {path} is empty", fix=f"remove it, then {fetch}")
    examples = examples_file(name, at)
    return Documents(documents=documents, examples=_lines(examples) if examples.is_file() else None)


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    lines = read_utf8(path).split("\n")
    return tuple(_object(line, path, number) for number, line in enumerate(lines, 1) if line.strip())


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        return parse_object(line.encode())
    except ValueError as error:
        raise PaddockError(
            f"{path}, line {number}: {line!r:.60} is no JSON object: {error}", fix="write one document a line, as JSON"
        ) from None
