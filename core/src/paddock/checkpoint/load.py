"""Loading: a folder's checkpoint into a model's parameters, strictly, with one copy of the weights in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from paddock.checkpoint.index import stored_tensors
from paddock.checkpoint.matching import match
from paddock.checkpoint.reading import Progress, read
from paddock.checkpoint.targets import Target


def load(
    folder: Path,
    targets: Iterable[Target],
    *,
    ignored_suffixes: Iterable[str] = (),
    progress: Progress | None = None,
) -> None:
    """Fill every target from the safetensors checkpoint in `folder`; floats convert into a target's dtype.

    Every tensor of the checkpoint is used once, except those whose name ends in one of `ignored_suffixes` (or is one).
    `progress` is called in the calling thread with bytes read and bytes in all. Everything is checked before anything is read;
    CheckpointError lists all that is malformed, or all that is missing, unexpected, mis-shaped or of the wrong dtype.
    """
    matches = match(stored_tensors(folder), targets, ignored_suffixes=ignored_suffixes, source=folder)
    read(matches, progress)
