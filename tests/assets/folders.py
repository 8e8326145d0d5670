"""Model folders that appear whole or not at all, and say where they came from."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

MODELS = Path(__file__).parents[2] / "models"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ORIGIN = "ORIGIN"  # the file in the folder that says where it came from


def origin(folder: Path, files: Sequence[str] = FILES) -> str | None:
    """Return what the folder says of its origin, or None when it is not whole."""
    if not all((folder / name).is_file() for name in (*files, ORIGIN)):
        return None
    return (folder / ORIGIN).read_text()


def filled(folder: Path, said: str, fill: Callable[[Path, Path], None]) -> Path:
    """Return `folder`, filled by `fill(scratch, fresh)` and put in its place whole, with `said` as its origin."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / folder.name
        fresh.mkdir()
        fill(Path(scratch), fresh)
        (fresh / ORIGIN).write_text(said)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)
    return folder


def run(module: str, summary: str, fetch: Callable[[Path], Path], default: Path) -> int:
    """Fetch into the folder the command line names, print it, and return the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=summary)
    parser.add_argument("--to", type=Path, default=default, metavar="FOLDER", help="where to put it (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.to))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"it could not be fetched: {error}\n  fix: check the network, and try again", file=sys.stderr)
        return 1
    return 0
