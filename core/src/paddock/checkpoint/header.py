"""Strict safetensors headers: nothing in one is believed before it is checked against the file. Free of torch.

A file is eight bytes of little-endian header size N, N bytes of JSON, then data. The header maps each tensor's name to dtype,
shape and data_offsets (begin, end) in the data; the tensors tile the data without gap or overlap.
Source: README.md of the safetensors project.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attrs import frozen

from paddock.checkpoint.dtypes import BITS
from paddock.checkpoint.json_file import parse_object
from paddock.checkpoint.problems import Problems, quoted

MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 64
MAX_INT = 1 << 63
_PREFIX = 8
_LFS_POINTER = int.from_bytes(b"version ", "little")  # how a file begins that Git LFS has in place of a large one
_KEYS = {"dtype", "shape", "data_offsets"}


@frozen(kw_only=True)
class StoredTensor:
    """A tensor in a file: `nbytes` bytes from byte `start` of `file` on, row-major."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: Path, problems: Problems) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name; what is wrong with it goes to `problems`."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            problems.add(f"{file.name}: not a regular file")
            return {}
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_PREFIX), "little") if found.st_size >= _PREFIX else -1
            reason = _bad_length(length, found.st_size)
            head = b"" if reason else stream.read(length)
    except OSError as error:
        problems.add(f"{file.name}: cannot be read: {error.strerror}")
        return {}
    if reason:
        problems.add(f"{file.name}: {reason}")
        return {}
    return _parse(head, file, found.st_size - _PREFIX - length, problems)


def _bad_length(length: int, file_size: int) -> str:
    if length < 0:
        return f"{file_size} bytes are too few for a safetensors file"
    if length == _LFS_POINTER:
        return "a pointer of Git LFS, not the file it stands for; `git lfs pull` in the model folder fetches that"
    if length > MAX_HEADER_BYTES:
        return f"the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed; this is no safetensors file"
    if _PREFIX + length > file_size:
        return f"truncated: the header claims {length:,} bytes and the file has {file_size:,}"
    return ""


def _parse(head: bytes, file: Path, data_size: int, problems: Problems) -> dict[str, StoredTensor]:
    try:
        if not head.startswith(b"{"):
            raise ValueError("it does not begin with {")
        entries = parse_object(head)
    except ValueError as error:
        problems.add(f"{file.name}: the header is not a valid JSON object: {error}")
        return {}
    _check_metadata(entries.pop("__metadata__", {}), file, problems)
    data_start, before = _PREFIX + len(head), len(problems)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        reason = _bad_entry(entry)
        if reason:
            problems.add(f"{file.name}: tensor {quoted(name)}: {reason}")
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            name=name,
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=data_start + begin,
            nbytes=end - begin,
        )
    if len(problems) == before:
        _check_tiling(tensors.values(), file, data_start, data_size, problems)
    return tensors


def _check_metadata(metadata: Any, file: Path, problems: Problems) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.add(f"{file.name}: __metadata__ must map strings to strings")


def _bad_entry(entry: Any) -> str:
    """Return what is wrong with a tensor's entry, or an empty string."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        return f"its entry must have exactly {', '.join(sorted(_KEYS))}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"dtype {quoted(dtype)} is unknown"
    if not _are_counts(shape) or len(shape) > MAX_AXES:
        return f"shape {quoted(shape)} must be at most {MAX_AXES} whole numbers, none negative or above 2**63"
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        return f"data_offsets {quoted(offsets)} must be a begin and an end, not before it"
    bits = math.prod(shape) * BITS[dtype]
    if bits >= MAX_INT:
        return f"shape {quoted(shape)} is more than any file can hold"
    if bits % 8:
        return f"{dtype} of shape {quoted(shape)} does not end on a whole byte"
    if offsets[1] - offsets[0] != bits // 8:
        return f"{dtype} of shape {quoted(shape)} takes {bits // 8:,} bytes, its data_offsets span {offsets[1] - offsets[0]:,}"
    return ""


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MAX_INT for value in values)


def _check_tiling(tensors: Iterable[StoredTensor], file: Path, data_start: int, data_size: int, problems: Problems) -> None:
    """Complain unless the tensors follow one another from the first byte of data to the last of the file."""
    position = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != position:
            kind = "leaves a gap after" if tensor.start > position else "overlaps"
            problems.add(f"{file.name}: tensor {quoted(tensor.name)} {kind} the tensor before it")
        position = max(position, tensor.start + tensor.nbytes)
    missing = position - data_start - data_size
    if missing > 0:
        problems.add(f"{file.name}: truncated: {missing:,} bytes of tensor data are missing")
    elif missing < 0:
        problems.add(f"{file.name}: {-missing:,} bytes after the last tensor belong to none")
