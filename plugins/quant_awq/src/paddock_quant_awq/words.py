"""Eight 4-bit numbers to a 32-bit word, in AutoAWQ's order: nibble i, from the least significant, holds number ORDER[i].

W words, N = 8 W numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SHIFTS = tuple(4 * ORDER.index(number) for number in range(8))


def unpack(words_W: Tensor) -> Tensor:
    """Return the numbers 0..15 [..., N] int32 that int32 words [..., W] hold."""
    shifts_8 = torch.tensor(_SHIFTS, dtype=torch.int32, device=words_W.device)
    return ((words_W.unsqueeze(-1) >> shifts_8) & 15).flatten(-2)


def pack(numbers_N: Tensor) -> Tensor:
    """Return the int32 words [..., W] that hold numbers 0..15 [..., N]; N is a multiple of 8."""
    shifts_8 = torch.tensor(_SHIFTS, dtype=torch.int64, device=numbers_N.device)
    numbers_W8 = numbers_N.long().view(*numbers_N.shape[:-1], -1, 8)
    words_W = (numbers_W8 << shifts_8).sum(-1)
    return (words_W - ((words_W >> 31) << 32)).int()
