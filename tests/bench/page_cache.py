"""Files and the page cache: how much of them lies in it, out of it with them, and how fast a disk gives what is not there."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from attrs import frozen

from paddock.errors import CheckpointError

BLOCK_BYTES = 8 << 20
THREADS = 8
DIRECT, EVICTED = "O_DIRECT", "posix_fadvise DONTNEED, then buffered reads"


@frozen(kw_only=True)
class DiskSpeed:
    """How files were read, once and whole."""

    how: str
    nbytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Return 10**9 bytes a second."""
        return self.nbytes / self.seconds / 1e9


def cached_bytes(files: Sequence[Path]) -> int:
    """Return how many bytes of files lie in the page cache, by mincore; it says all of those that another user owns."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    found = 0
    for file in files:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            size = len(mapped)
            pages = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
            if library.mincore(np.frombuffer(mapped, dtype=np.uint8).ctypes.data, size, pages.ctypes.data) != 0:
                raise OSError(ctypes.get_errno(), "mincore failed", str(file))
            found += min(int((pages & 1).sum()) * mmap.PAGESIZE, size)
    return found


def evict(files: Sequence[Path]) -> None:
    """Ask that nothing of files be in the page cache; what was not on disk is written first."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(files: Sequence[Path]) -> DiskSpeed:
    """Return how fast a disk gives files to several threads: past the page cache, or where that is refused, from an empty one."""
    try:
        return _read(files, DIRECT, os.O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    evict(files)
    return _read(files, EVICTED, 0)


def _read(files: Sequence[Path], how: str, flags: int) -> DiskSpeed:
    """Read every block once, in order, as threads are free."""
    with ExitStack() as stack, ThreadPoolExecutor(THREADS) as pool:
        blocks: deque[tuple[int, int]] = deque()
        for file in files:
            opened = os.open(file, os.O_RDONLY | flags)
            stack.callback(os.close, opened)
            blocks += ((opened, start) for start in range(0, file.stat().st_size, BLOCK_BYTES))
        began = time.perf_counter()
        read = sum(pool.map(_read_blocks, [blocks] * THREADS))
        seconds = time.perf_counter() - began
    wanted = sum(file.stat().st_size for file in files)
    if read != wanted:
        raise CheckpointError(f"{read:,} bytes of {wanted:,} could be read with {how}", fix="check the disk")
    return DiskSpeed(how=how, nbytes=wanted, seconds=seconds)


def _read_blocks(blocks: deque[tuple[int, int]]) -> int:
    """Read blocks until none is left, into memory that begins at a page; return their bytes."""
    read = 0
    with mmap.mmap(-1, BLOCK_BYTES) as buffer:
        while True:
            try:
                file, start = blocks.popleft()
            except IndexError:
                return read
            read += os.preadv(file, [buffer], start)
