"""How checkpoints hold 4-bit numbers: eight to a 32-bit word, in one of two orders, or two to a byte.

W words, N = 8 W numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 8
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)  # number i begins at bit 4i: GPTQ, compressed-tensors
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # number i begins at bit 4 AWQ_ORDER[i]: nibbles hold numbers 0, 2, 4, 6, 1, 3, 5, 7


def unpack(words_W: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return the numbers 0..15 [..., N] uint8 that int32 words [..., W] hold."""
    return torch.stack([((words_W >> (4 * nibble)) & 15).to(torch.uint8) for nibble in order], dim=-1).flatten(-2)


def pack(numbers_N: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return the int32 words [..., W] that hold numbers 0..15 [..., N]; the last word is filled up with zeros."""
    padded_N = torch.nn.functional.pad(numbers_N.long(), (0, -numbers_N.shape[-1] % WORD))
    eights_W8 = padded_N.view(*padded_N.shape[:-1], -1, WORD)
    words_W = (eights_W8 << torch.tensor([4 * nibble for nibble in order], device=numbers_N.device)).sum(-1)
    return (words_W - ((words_W >> 31) << 32)).int()
