"""The manifest is on disk when it says so."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from paddock.checkpoint.source import MANIFEST, PARTIAL
from paddock.errors import CheckpointError
from paddock.quantize.manifest import Manifest, read_manifest


def test_file_and_name_are_on_disk_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First what the file holds, then, once it is in place, the folder that names it."""
    synced: list[tuple[bool, bool]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append((is_folder, (tmp_path / MANIFEST).exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    Manifest(status=PARTIAL, made_from={"a": 1}).write(tmp_path)
    assert synced == [(False, False), (True, True)]


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_without_it_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool) -> None:
    """Some do not sync folders; a disk that fails is another matter."""
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    manifest = Manifest(status=PARTIAL, made_from={"a": 1})
    if fails:
        with pytest.raises(OSError, match="Input/output error"):
            manifest.write(tmp_path)
    else:
        manifest.write(tmp_path)
        assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize("written", ["", "[]", "{", '{"status": "done"}'])
def test_what_is_no_manifest_is_left_alone(tmp_path: Path, written: str) -> None:
    """Nobody can fetch it again: the way out is another folder."""
    (tmp_path / MANIFEST).write_text(written)
    with pytest.raises(CheckpointError, match=MANIFEST) as caught:
        read_manifest(tmp_path)
    assert caught.value.fix == "begin in another folder"
    assert (tmp_path / MANIFEST).read_text() == written
