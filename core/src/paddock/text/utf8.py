"""Texts that a user gives: files in UTF-8, of a bounded size. Free of torch."""

from __future__ import annotations

import codecs
from pathlib import Path

from paddock.errors import OptionError

MAX_BYTES = 256 << 20


def read_utf8(path: Path, *, most: int = MAX_BYTES) -> str:
    """Return the text of a UTF-8 file; raise OptionError where it cannot be read, is larger than `most` bytes, or is no UTF-8."""
    return decode_utf8(read_bounded(path, most=most), str(path))


def read_bounded(path: Path, *, most: int = MAX_BYTES) -> bytes:
    """Return the bytes of a file, or of a pipe; raise OptionError where it cannot be read or has more than `most`."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}", fix="check the path") from error
    except ValueError as error:
        raise OptionError(f"{str(path)!r} cannot be read: {error}", fix="check the path") from error
    if len(data) > most:
        raise OptionError(f"{path} has more than {most:,} bytes, which is the most that is read", fix="give a part of it")
    return data


def decode_utf8(data: bytes, name: str) -> str:
    """Return a text without its byte order mark; raise OptionError that names line and byte where it is no UTF-8."""
    bare = data.removeprefix(codecs.BOM_UTF8)
    try:
        return bare.decode("utf-8")
    except UnicodeDecodeError as error:
        before = bare[: error.start]
        line, byte = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise OptionError(
            f"{name} is not UTF-8: line {line}, byte {byte} is 0x{bare[error.start]:02x}",
            fix="save it as UTF-8, for example with iconv",
        ) from None
