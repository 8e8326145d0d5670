"""Many small host arrays to the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HostArray = NDArray[np.int32] | NDArray[np.int64] | NDArray[np.float32]

_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}
_ALIGNMENT = 16  # bytes; vector loads of kernels want it


def to_device(arrays: Mapping[str, HostArray], device: torch.device) -> dict[str, Tensor]:
    """Return the arrays as tensors on `device`: in place on a CPU, through one pinned buffer and one copy elsewhere."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    # torch's pinned allocator keeps the block from reuse until the copy has run: no ring of buffers is needed
    return unpack(pack(arrays, pinned=True).to(device, non_blocking=True), arrays)


def pack(arrays: Mapping[str, HostArray], *, pinned: bool) -> Tensor:
    """Return one byte tensor that holds the arrays one after the other, each aligned."""
    spans = _spans(arrays)
    buffer = torch.empty(spans[-1][1] if spans else 0, dtype=torch.uint8, pin_memory=pinned)
    host = buffer.numpy()
    for array, (start, _) in zip(arrays.values(), spans, strict=True):
        host[start : start + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
    return buffer


def unpack(buffer: Tensor, arrays: Mapping[str, HostArray]) -> dict[str, Tensor]:
    """Return views of a packed buffer with the arrays' names, types and shapes."""
    return {
        name: buffer[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for (name, array), (start, _) in zip(arrays.items(), _spans(arrays), strict=True)
    }


def _spans(arrays: Mapping[str, HostArray]) -> list[tuple[int, int]]:
    spans, start = [], 0
    for array in arrays.values():
        stop = start + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        spans.append((start, stop))
        start = stop
    return spans
