"""Eight 4-bit numbers to a 32-bit word, in AutoAWQ's order: from the least significant, numbers 0, 2, 4, 6, 1, 3, 5, 7.

So number 2a + b begins at bit 4a + 16b. W words, N = 8 W numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words_W: Tensor) -> Tensor:
    """Return the numbers 0..15 [..., N] int32 that int32 words [..., W] hold."""
    return ((words_W.unsqueeze(-1) >> _shifts(torch.int32, words_W.device)) & 15).flatten(-2)


def pack(numbers_N: Tensor) -> Tensor:
    """Return the int32 words [..., W] that hold numbers 0..15 [..., N]; N is a multiple of 8."""
    numbers_W8 = numbers_N.long().view(*numbers_N.shape[:-1], -1, 8)
    words_W = (numbers_W8 << _shifts(torch.int64, numbers_N.device)).sum(-1)
    return (words_W - ((words_W >> 31) << 32)).int()


def _shifts(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return where each of the eight numbers begins in a word [8]; counted on the device: a graph holds no copy from the host."""
    even_4 = torch.arange(0, 16, 4, dtype=dtype, device=device)
    return torch.stack((even_4, even_4 + 16), dim=-1).flatten()
