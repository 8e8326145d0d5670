"""`paddock_manifest.json`: what a quantised folder was made from and how, and how far the making has come. Free of torch."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cattrs
from attrs import field, frozen, validators

from paddock.checkpoint.json_file import finite, read_object
from paddock.checkpoint.source import MANIFEST, MOST_OF_MANIFEST, PARTIAL
from paddock.errors import CheckpointError
from paddock.planning.quality_gate import FAILED

COMPLETE = "complete"


@frozen(kw_only=True)
class File:
    """A file that was written: its name, size, and the SHA-256 of its bytes."""

    name: str = field()
    nbytes: int
    sha256: str

    @name.validator
    def _is_in_the_folder(self, _: object, value: str) -> None:
        if not value or value.startswith(".") or "/" in value:
            raise ValueError(f"the file name {value!r} leads elsewhere")


@frozen(kw_only=True)
class Shard:
    """A file of tensors, by their names; its final name, which says how many files there are, comes once all are written."""

    file: File
    tensors: tuple[str, ...]
    tensor_bytes: int


@frozen(kw_only=True)
class Manifest:
    """`made_from` is what must not change when a run is resumed: recipe, options, source, calibration, versions.

    `status`: partial, complete or failed (by its gate). `layers_done` layers are in `shards`, and so is all that is outside them
    where `outside_done`; `activations` is the residual stream behind them, None where nothing needs it any more.
    """

    status: str = field(validator=validators.in_((PARTIAL, COMPLETE, FAILED)))
    made_from: dict[str, Any]
    layers_done: int = 0
    outside_done: bool = False
    shards: tuple[Shard, ...] = ()
    activations: File | None = None
    gate: dict[str, Any] = field(factory=dict)

    def write(self, folder: Path) -> None:
        """Put the manifest in place of the one there, at once and for good; a perplexity that is no number is null."""
        write_json(folder / MANIFEST, finite(cattrs.unstructure(self)))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder; raise CheckpointError where it is not one."""
    try:
        found = read_object(folder / MANIFEST, max_bytes=MOST_OF_MANIFEST)
    except CheckpointError as error:
        raise CheckpointError(error.message, fix="begin in another folder") from error
    try:
        return cattrs.structure(found, Manifest)
    except (cattrs.BaseValidationError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is no manifest of paddock quantize", fix="begin in another folder") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what differs between two values of `made_from`, one line an entry, sorted."""
    lines: list[str] = []
    for key in sorted({*before, *now}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            lines.append(f"{prefix}{key}: was {one!r:.100}, is now {other!r:.100}")
    return lines


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole, or the old one, whenever the machine stops."""
    scratch = path.with_name(f"{path.name}.new")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_names(path.parent)


def sync_names(folder: Path) -> None:
    """Return once the names of a folder's files are on disk, where its file system can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have no such thing
            raise
    finally:
        os.close(descriptor)
