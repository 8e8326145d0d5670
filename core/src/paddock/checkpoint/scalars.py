"""Single numbers out of safetensors files, as scales are, without torch."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from paddock.checkpoint.header import StoredTensor
from paddock.checkpoint.index import stored_tensors
from paddock.errors import CheckpointError

_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e"}


def stored_scalars(folder: Path, names: Iterable[str]) -> dict[str, float]:
    """Return the named tensors of one float each, by name; others, and all of weights that are not sound, are left out."""
    try:
        found = stored_tensors(folder)
        return {name: value for name in names if name in found and (value := _value(found[name])) is not None}
    except (CheckpointError, OSError):
        return {}


def _value(stored: StoredTensor) -> float | None:
    if any(size != 1 for size in stored.shape) or stored.dtype not in (*_FORMATS, "BF16"):
        return None
    with stored.file.open("rb") as stream:
        stream.seek(stored.start)
        data = stream.read(stored.nbytes)
    if stored.dtype == "BF16":  # the first half of a float32
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    return float(struct.unpack(_FORMATS[stored.dtype], data)[0])
