"""How rows are laid over programs. In plain integers: `triton.cdiv` and its kin take a microsecond of the host's time each."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 16  # bytes: where rows may begin that the copy engine brings


def unit_stride(x_TE: Tensor) -> Tensor:
    """Return x itself where its features lie side by side, whatever the distance of its rows; else a copy."""
    return x_TE if x_TE.stride(1) == 1 else x_TE.contiguous()


def aligned(x_TI: Tensor) -> Tensor:
    """Return x itself where the copy engine can bring its rows, whose features lie side by side; else a copy."""
    x_TI = unit_stride(x_TI)
    if x_TI.stride(0) * x_TI.element_size() % ALIGNED or x_TI.data_ptr() % ALIGNED:
        return x_TI.clone(memory_format=torch.contiguous_format)  # of a single row any other copy keeps the stride
    return x_TI


def power_of_2(size: int) -> int:
    """Return the power of two from `size` up."""
    return 1 << max(size - 1, 0).bit_length()


def blocks_of(size: int, block: int) -> int:
    """Return how many blocks cover `size`."""
    return -(-size // block)


def pieces_of(blocks: int, most: int) -> int:
    """Return how many programs share a row of `blocks`, 1 at least: the fewest of which none has more than `most` would give one.

    `most` below 1 counts as 1.
    """
    return blocks_of(blocks, blocks_of(blocks, max(most, 1)))


def row_warps(block: int) -> int:
    """Return the warps for a row of `block` elements in registers; it depends on nothing else, so no token on its neighbours.

    RMS norm of 4096 rows on an H200, percent of 4.3 TB/s with 4, 8, 16, 32 warps: width 4096 80, 80, 76, 51; 8192 87, 88, 88, 74;
    14848 78, 91, 92, 88. One row takes the same 1.4, 1.6 and 2.2 us with any of them, give or take 0.2.
    """
    return min(max(block // 1024, 1), 16)
