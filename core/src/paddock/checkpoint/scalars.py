"""Single numbers out of safetensors files, as scales are, without torch."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from paddock.checkpoint.header import StoredTensor

_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e"}


def stored_scalars(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> dict[str, float]:
    """Return those of the named tensors that are one float each, by name; raise OSError for a file that cannot be read."""
    return {name: value for name in names if name in stored and (value := _value(stored[name])) is not None}


def _value(stored: StoredTensor) -> float | None:
    if any(size != 1 for size in stored.shape) or stored.dtype not in (*_FORMATS, "BF16"):
        return None
    with stored.file.open("rb") as stream:
        stream.seek(stored.start)
        data = stream.read(stored.nbytes)
    if stored.dtype == "BF16":  # the first half of a float32
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    return float(struct.unpack(_FORMATS[stored.dtype], data)[0])
