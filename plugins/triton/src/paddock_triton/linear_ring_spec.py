"""How a product of few tokens is cut, of FP8 values or of 16-bit ones, and all that its kernel is compiled for.

N tokens of a tile, R rows (outputs) of a tile, 64; K inputs, 128 bytes of them.
"""

from __future__ import annotations

from typing import Any

from attrs import frozen
from triton.experimental.gluon import language as gl

from paddock_triton.ring import ALL_REGISTERS, ROWS, launch_registers, team_registers

_HALF: int = ROWS.value
_LINE = 128  # bytes of a row that lie together in shared memory
EIGHT = 8  # rows between a feature's gate and its up: the matrix unit gives a thread both of them
_WIDE_PART = 32  # tokens above which one part of a tile is asked for at a time, as registers go


@frozen(kw_only=True)
class RingTile:
    """How a product is cut: tokens of a tile of 64 outputs, `teams` of four warps, `slots` of steps in shared memory.

    Each team takes another 128 bytes of inputs of a step, `item` bytes each. `shared`: programs take equal parts of all steps, so
    that tiles are shared; else whole tiles. A program takes at most `registers` of each lane of a multiprocessor, of all its
    2,048: what is left is for kernels between the product before and this one. `run`: how many rows of a weight share a scale for
    128 inputs, for which each token has one too; 0 where rows and tokens have one. What else the INT4 kernel's parts ask of
    theirs is said by their names.
    """

    tokens: int
    teams: int
    slots: int
    shared: bool = True
    registers: int = ALL_REGISTERS
    item: int = 1
    run: int = 0
    gated: Any = None  # what gate and up are rounded to, Gluon's dtype, where a product ends in silu(gate) * up in FP8

    rows = _HALF  # of a tile
    deep = True  # teams take other inputs, not other rows
    halves = 1  # of 64 rows a team
    cuts = 1  # of a tile's tokens
    waves = False  # programs share all tiles or none
    token_scales = False  # they are multiplied in before parts meet, with the rows'

    def __attrs_post_init__(self) -> None:
        """Hold the tile to what the kernel can do."""
        assert self.teams in (2, 4), (self, "has other roles")
        assert self.run % self.rows == 0, (self, "has tiles whose rows have two scales")
        assert not self.run or (self.item == 1 and self.gated is None), (self, "has no scales of blocks")

    @property
    def pieces(self) -> int:
        """Return how many times 128 bytes of inputs a step has."""
        return self.teams

    @property
    def inputs(self) -> int:
        """Return K."""
        return _LINE // self.item

    @property
    def columns(self) -> int:
        """Return the tokens of a cut."""
        return self.tokens

    @property
    def part_size(self) -> int:
        """Return the sums of a tile."""
        return self.rows * self.tokens

    @property
    def parts_at_once(self) -> int:
        """Return how many parts of a tile are asked for at once: 1 or 3."""
        return 1 if self.tokens > _WIDE_PART else 3

    @property
    def most_registers(self) -> int | None:
        """Return the most that the compiler may give a thread as a program starts, None where it may use all there are."""
        return None if self.registers == ALL_REGISTERS else launch_registers(self.teams, self.registers)

    @property
    def team_registers(self) -> int:
        """Return the registers of a thread that multiplies."""
        return team_registers(self.teams, self.registers)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes copied of the weight for a step."""
        return self.pieces * self.rows * _LINE

    @property
    def token_bytes(self) -> int:
        """Return the bytes copied of x for a step."""
        return self.pieces * self.tokens * _LINE

    @property
    def mma(self) -> Any:
        """Return how sums lie in registers [64, N]."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.tokens, 32 // self.item])

    @property
    def handed_shared(self) -> Any:
        """Return how sums that a team hands over lie in shared memory [64, N].

        Four threads have eight neighbours of a row, and sixteen store eight bytes each at once: four rows, which must not meet in
        a bank. Rows of fewer than 32 sums lie in other banks by themselves, in twos or fours.
        """
        eights = self.tokens // 8
        return gl.SwizzledSharedLayout(8, max(1, 4 // eights), min(4, eights), [1, 0])

    @property
    def operand(self) -> Any:
        """Return how both operands lie in shared memory, rows of 128 bytes."""
        return gl.NVMMASharedLayout(swizzle_byte_width=_LINE, element_bitwidth=8 * self.item, rank=2)

    @property
    def in_eights(self) -> Any:
        """Return how a weight lies there while it is copied as eights of gates and of ups: as `operand` has it."""
        return gl.NVMMASharedLayout(swizzle_byte_width=_LINE, element_bitwidth=8, rank=4)
