"""Bytes from files into parameters: positional reads, straight into place where the layout allows, else through a small buffer.

Nothing is mapped into memory, so no more than the parameters and one buffer a reader is ever resident.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack

import torch
from attrs import evolve, frozen
from torch import Tensor

from paddock.checkpoint.dtypes import BITS, TORCH_NAMES
from paddock.checkpoint.header import StoredTensor
from paddock.checkpoint.matching import Match
from paddock.checkpoint.targets import RowQuantiser, Target
from paddock.errors import CheckpointError

READERS = 4
PIECE_BYTES = 2 << 20  # 1 to 16 MiB read equally fast; small keeps four buffers under 10 MB

Progress = Callable[[int, int], None]


@frozen(eq=False, kw_only=True)
class Piece:
    """A contiguous run of a file, of `shape` in the stored dtype; its part at `inner` goes to `view`, quantised by `rows`."""

    stored: StoredTensor
    start: int
    shape: tuple[int, ...]
    inner: tuple[slice, ...]
    view: Tensor
    rows: RowQuantiser | None = None

    @property
    def nbytes(self) -> int:
        """Return how many bytes are read."""
        return math.prod(self.shape) * BITS[self.stored.dtype] // 8

    @property
    def dtype(self) -> torch.dtype:
        """Return the stored dtype."""
        found = getattr(torch, TORCH_NAMES[self.stored.dtype])
        assert isinstance(found, torch.dtype)
        return found

    @property
    def is_direct(self) -> bool:
        """Return whether the bytes can be read straight into the view."""
        view = self.view
        if self.rows is not None:
            return False
        return view.device.type == "cpu" and view.is_contiguous() and view.dtype == self.dtype and tuple(view.shape) == self.shape


def read(matches: Sequence[Match], progress: Progress | None) -> None:
    """Fill every target; `progress` is called with bytes read and bytes in all, first with none read.

    Raises CheckpointError when a file cannot be read any more or a value does not fit the parameter's dtype.
    """
    pieces = sorted(itertools.chain.from_iterable(map(_pieces, matches)), key=lambda piece: (piece.stored.file, piece.start))
    done, total, local = 0, sum(piece.nbytes for piece in pieces), threading.local()
    report = progress or (lambda done, total: None)
    report(0, total)
    with ExitStack() as stack, ThreadPoolExecutor(READERS) as pool:
        paths = dict.fromkeys(piece.stored.file for piece in pieces)
        files = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in paths}
        futures = {pool.submit(_fill, piece, files[piece.stored.file], local): piece.nbytes for piece in pieces}
        try:
            for future in as_completed(futures):
                future.result()
                report(done := done + futures[future], total)
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(match: Match) -> Iterator[Piece]:
    """Yield the runs of the file that hold a target's region, each of at most PIECE_BYTES.

    Runs are cut along the first axis whose entries are small enough, and never within a row that is quantised; axes behind it
    are read whole and cut in memory.
    """
    stored, target = match.stored, match.target
    view, shape, region = _at_least_one_axis(target)
    if not view.numel():
        return
    strides = [math.prod(shape[axis + 1 :]) * BITS[stored.dtype] // 8 for axis in range(len(shape))]
    axis = next((axis for axis, stride in enumerate(strides) if stride <= PIECE_BYTES), len(shape) - 1)
    if target.rows is not None:
        axis = 0
    step = max(1, PIECE_BYTES // strides[axis])
    inner = (slice(None), *(slice(*span) for span in region[axis + 1 :]))
    first, last = region[axis]
    for lead in itertools.product(*(range(*span) for span in region[:axis])):
        within = tuple(index - span[0] for index, span in zip(lead, region, strict=False))
        before = sum(index * stride for index, stride in zip(lead, strides, strict=False))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            place: tuple[int | slice, ...] = (*within, slice(begin - first, end - first))
            yield Piece(
                stored=stored,
                start=stored.start + before + begin * strides[axis],
                shape=(end - begin, *shape[axis + 1 :]),
                inner=inner,
                view=view[place],
                rows=_scales_of(target.rows, begin - first, end - first),
            )


def _scales_of(rows: RowQuantiser | None, begin: int, end: int) -> RowQuantiser | None:
    return None if rows is None else evolve(rows, scales=rows.scales[begin:end])


def _at_least_one_axis(target: Target) -> tuple[Tensor, tuple[int, ...], tuple[tuple[int, int], ...]]:
    view = target.view.detach()
    return (view, target.shape, target.region) if target.shape else (view.unsqueeze(0), (1,), ((0, 1),))


@torch.inference_mode()  # a thread's own: without it tensors that the caller made in that mode could not be written
def _fill(piece: Piece, file: int, local: threading.local) -> None:
    """Read a piece and put it in place; `local` keeps a reader's buffer from piece to piece."""
    try:
        if piece.is_direct:
            _read_into(piece.view.reshape(-1).view(torch.uint8), file, piece.start)
            return
        staged = _staging(local, piece)
        _read_into(staged, file, piece.start)
    except OSError as error:
        raise CheckpointError(
            f"{piece.stored.file} cannot be read any more: {error}", fix="check the disk, then fetch the file again"
        ) from error
    values = staged.view(piece.dtype).view(piece.shape)
    if piece.rows is not None:
        values, scales = piece.rows.convert(values.to(piece.view.device))
        piece.rows.scales.copy_(scales)
    piece.view.copy_(values[piece.inner])
    narrows = piece.view.dtype == torch.float16 and piece.dtype != torch.float16
    if narrows and not torch.isfinite(piece.view).all():
        raise CheckpointError(f"{piece.stored.name} holds values that float16 cannot", fix="load with dtype bfloat16 or float32")


def _staging(local: threading.local, piece: Piece) -> Tensor:
    """Return this reader's buffer, cut to the piece: page-locked for a GPU, so that the copy is one transfer."""
    pinned = piece.view.device.type == "cuda"
    buffer: Tensor | None = getattr(local, "buffer", None)
    if buffer is None or buffer.numel() < piece.nbytes or buffer.is_pinned() != pinned:
        buffer = torch.empty(max(PIECE_BYTES, piece.nbytes), dtype=torch.uint8, pin_memory=pinned)
        local.buffer = buffer
    return buffer[: piece.nbytes]


def _read_into(bytes_: Tensor, file: int, start: int) -> None:
    """Fill a tensor of bytes from position `start` of a file; raise OSError when the file ends before."""
    rest = bytes_.numpy().data
    while rest:
        count = os.preadv(file, [rest], start)
        if not count:
            raise OSError("it has become shorter")
        rest, start = rest[count:], start + count
