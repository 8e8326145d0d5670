"""The one form in which every 4-bit weight lies in memory, whatever checkpoint it came from.

real = (code - zero) * scale with codes and zeros 0..15, one scale and zero for each group of inputs; without zeros each is 8.
Inputs are cut in blocks of 128. A byte holds the codes of input k, in its low nibble, and of input k + 64 of the same block, so
that each half of a block is one mask, or one shift and mask, away from a matrix unit's operand; the bytes of a block lie
together, 64 for each output. docs/decisions/0065-one-layout-for-int4.md says why.

I inputs, O outputs, B = ceil(I / 128) blocks, J = 64 bytes, G = ceil(128 B / group) rows of groups, P = ceil(O / 2) pairs.
"""

from __future__ import annotations

import math

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as nnf

BLOCK = 128
HALF = BLOCK // 2
MIDDLE = 8  # the zero of every group where none are kept


@frozen(kw_only=True)
class Int4Form:
    """The sizes of one weight: `inputs` I, `outputs` O, `group` inputs to a scale; `group` divides I."""

    inputs: int
    outputs: int
    group: int

    @property
    def blocks(self) -> int:
        """Return B."""
        return math.ceil(self.inputs / BLOCK)

    @property
    def groups(self) -> int:
        """Return how many groups the inputs have."""
        return self.inputs // self.group

    @property
    def group_rows(self) -> int:
        """Return G: rows past the inputs' groups belong to inputs that only fill up the last block, and hold scales of 0."""
        return math.ceil(self.blocks * BLOCK / self.group)


def pack(codes_OI: Tensor) -> Tensor:
    """Return codes 0..15 (uint8) as bytes [B, O, J]; inputs that fill up the last block have code 0."""
    outputs, inputs = codes_OI.shape
    padded_OI = nnf.pad(codes_OI, (0, -inputs % BLOCK))
    low_OBJ, high_OBJ = padded_OI.view(outputs, -1, 2, HALF).unbind(2)
    return (low_OBJ | (high_OBJ << 4)).transpose(0, 1).contiguous()


def unpack(packed_BOJ: Tensor, inputs: int) -> Tensor:
    """Return the codes [O, I] (uint8)."""
    halves_BO2J = torch.stack((packed_BOJ & 15, packed_BOJ >> 4), dim=2)
    return halves_BO2J.transpose(0, 1).flatten(1)[:, :inputs]


def pack_zeros(zeros_GO: Tensor) -> Tensor:
    """Return zeros 0..15 (uint8) as bytes [G, P]: the even output of a pair in the low nibble."""
    padded_GO = nnf.pad(zeros_GO, (0, zeros_GO.shape[1] % 2))
    return padded_GO[:, 0::2] | (padded_GO[:, 1::2] << 4)


def unpack_zeros(packed_GP: Tensor, outputs: int) -> Tensor:
    """Return the zeros [G, O] (uint8)."""
    return torch.stack((packed_GP & 15, packed_GP >> 4), dim=-1).flatten(1)[:, :outputs]


def fill_groups(rows_GO: Tensor, form: Int4Form) -> Tensor:
    """Return scales or zeros of the inputs' groups with rows of 0 for the inputs that fill up the last block."""
    return nnf.pad(rows_GO, (0, 0, 0, form.group_rows - len(rows_GO)))
