"""Texts from files: whole, bounded, and in UTF-8."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from paddock.errors import OptionError
from paddock.text.utf8 import read_utf8


def test_a_text_is_read_as_it_stands(tmp_path: Path) -> None:
    """Line ends and all; a byte order mark is none of it."""
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + "ü\r\nb\u2028c".encode())
    assert read_utf8(tmp_path / "text") == "ü\r\nb\u2028c"


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"ab\xff", "line 1, byte 3 is 0xff"),
        (b"a\nb\n\xc3(", "line 3, byte 1 is 0xc3"),
        (b"\xef\xbb\xbf\xe2\x82", "line 1, byte 1 is 0xe2"),
    ],
)
def test_what_is_no_utf8_is_found(tmp_path: Path, data: bytes, where: str) -> None:
    """By line and byte, counted from 1."""
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(OptionError, match=f"text is not UTF-8: {where}") as caught:
        read_utf8(tmp_path / "text")
    assert "iconv" in caught.value.fix


@pytest.mark.parametrize("path", ["nowhere.txt", ".", "a\0b"])
def test_what_cannot_be_read_is_named(tmp_path: Path, path: str) -> None:
    """No file, a folder, a name that no file can have."""
    with pytest.raises(OptionError, match="cannot be read"):
        read_utf8(tmp_path / path)


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    """Also of what has no size, and no end."""
    (tmp_path / "text").write_text("abcd")
    assert read_utf8(tmp_path / "text", most=4) == "abcd"
    with pytest.raises(OptionError, match="text has more than 3 bytes"):
        read_utf8(tmp_path / "text", most=3)
    with pytest.raises(OptionError, match="zero has more than 1,000 bytes"):
        read_utf8(Path("/dev/zero"), most=1000)


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    """As `--text <(command)` gives one."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("from a pipe",))
    writer.start()
    assert read_utf8(tmp_path / "pipe") == "from a pipe"
    writer.join()
