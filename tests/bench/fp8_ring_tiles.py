"""How the candidate for FP8 products of few tokens cuts them, and the cuts that `fp8_variants` times.

R rows (outputs) of a half, 64; N tokens of a tile; K inputs, 128.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve, frozen
from triton.experimental.gluon import language as gl

from paddock_triton.int4_spec import ALL_REGISTERS, ROWS, STEP, launch_registers, team_registers

_HALF: int = ROWS.value
INPUTS: int = STEP.value
EIGHT = 8  # rows between a feature's gate and its up: the matrix unit gives a thread both of them
_MOST_SUM = 256  # inputs that the matrix unit may add up: 14 bits of them err by 0.02 percent
_MOST_ROWS = 256  # that are copied at once
_WIDE_PART = 32  # tokens above which one part of a tile is asked for at a time, as registers go


@frozen(kw_only=True)
class RingTile:
    """How a product is cut: tokens of a tile, `halves` of 64 rows for each of `teams` of four warps, `slots` of steps in memory.

    A team takes `blocks` times 128 inputs of a step: all of a step's, or with `deep` others than the other teams, of the same 64
    rows. `shared`: programs take parts of all steps, so that tiles are shared; else whole tiles.

    The parts are equal, or those of the second half of programs have `lead` steps more: with two `places` on a multiprocessor
    the first half end sooner, and where they were the next kernel's programs fill their slots while the second half go on.

    The kernel is compiled for it; what else the INT4 kernel's parts ask of theirs follows from it, by their names.
    """

    tokens: int
    teams: int
    slots: int
    halves: int = 1
    blocks: int = 1
    deep: bool = False
    shared: bool = True
    places: int = 1
    lead: int = 0
    gated: Any = None  # what gate and up are rounded to, Gluon's dtype, where a product ends in silu(gate) * up in FP8

    token_scales = False  # they are multiplied in before parts meet, with the rows'
    cuts = 1  # of a tile's tokens

    def __attrs_post_init__(self) -> None:
        """Hold the tile to what the kernel can do."""
        assert self.teams in (2, 4), (self, "has other roles")
        assert self.halves in (1, 2), (self, "has more halves than sums are handed on")
        assert self.blocks * INPUTS <= _MOST_SUM, (self, "leaves more inputs to the matrix unit's sums")
        assert not (self.deep and self.halves > 1), (self, "is deep and has halves")
        assert not self.lead or self.shared, (self, "gives out whole tiles unevenly")
        assert self.rows <= _MOST_ROWS, (self, "has more rows than are copied at once")

    @property
    def name(self) -> str:
        """Return the rows and inputs of a step, slots and teams, places and lead, and how tiles are given out."""
        size = f"{self.rows}x{self.pieces * INPUTS} s{self.slots} t{self.teams}"
        places = "" if self.places == 1 else f" p{self.places} l{self.lead}"
        return f"ring {self.tokens} {size}{places}{'' if self.shared else ' whole'}"

    @property
    def rows(self) -> int:
        """Return the outputs of a tile."""
        return _HALF if self.deep else _HALF * self.teams * self.halves

    @property
    def pieces(self) -> int:
        """Return how many times 128 inputs a step has."""
        return self.blocks * (self.teams if self.deep else 1)

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
        return None if self.places == 1 else launch_registers(self.teams, ALL_REGISTERS // self.places)

    @property
    def team_registers(self) -> int:
        """Return the registers of a thread that multiplies."""
        return team_registers(self.teams, ALL_REGISTERS // self.places)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes copied of the weight for a step."""
        return self.pieces * self.rows * INPUTS

    @property
    def token_bytes(self) -> int:
        """Return the bytes copied of x for a step."""
        return self.pieces * self.tokens * INPUTS

    @property
    def mma(self) -> Any:
        """Return how sums lie in registers [64, N]."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.tokens, 32])

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
        """Return how both operands lie in shared memory, rows of 128 inputs."""
        return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)

    @property
    def in_eights(self) -> Any:
        """Return how a weight lies there while it is copied as eights of gates and of ups: as `operand` has it."""
        return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=4)

    def given_out(self, tiles: int, span: int, processors: int) -> tuple[RingTile, int]:
        """Return it with what lead there may be for so many tiles of `span` steps, and the programs that take them.

        The first half of programs keep a step at least, and half of what all have on average.
        """
        units = tiles * (span if self.shared else 1)
        programs = min(processors * self.places, units)
        return evolve(self, lead=min(self.lead, units // programs - 1)), programs


# By the most tokens: wide tiles that are shared, and deep ones of 64 rows, shared and whole; slots are what shared memory holds.
RINGS = {
    8: (
        RingTile(tokens=8, teams=2, slots=6, blocks=2),
        RingTile(tokens=8, teams=4, slots=6, deep=True),
        RingTile(tokens=8, teams=4, slots=6, deep=True, shared=False),
    ),
    16: (
        RingTile(tokens=16, teams=2, slots=6, blocks=2),
        RingTile(tokens=16, teams=2, slots=11),
        RingTile(tokens=16, teams=2, slots=6, halves=2),
        RingTile(tokens=16, teams=2, slots=3, blocks=2, places=2, lead=4),
        RingTile(tokens=16, teams=2, slots=6, places=2, lead=8),
        RingTile(tokens=16, teams=4, slots=5, deep=True),
        RingTile(tokens=16, teams=4, slots=5, deep=True, shared=False),
        RingTile(tokens=16, teams=2, slots=10, deep=True, shared=False),
    ),
    32: (
        RingTile(tokens=32, teams=2, slots=5, blocks=2),
        RingTile(tokens=32, teams=2, slots=10),
        RingTile(tokens=32, teams=2, slots=6, halves=2),
        RingTile(tokens=32, teams=2, slots=5, places=2),
        RingTile(tokens=32, teams=2, slots=5, places=2, lead=8),
        RingTile(tokens=32, teams=4, slots=4, deep=True),
        RingTile(tokens=32, teams=4, slots=4, deep=True, shared=False),
    ),
    64: (
        RingTile(tokens=64, teams=2, slots=4, blocks=2),
        RingTile(tokens=64, teams=2, slots=8),
        RingTile(tokens=64, teams=2, slots=5, halves=2),
        RingTile(tokens=64, teams=4, slots=5),
        RingTile(tokens=64, teams=2, slots=4, places=2),
        RingTile(tokens=64, teams=2, slots=4, places=2, lead=8),
        RingTile(tokens=64, teams=2, slots=6, deep=True),
        RingTile(tokens=64, teams=2, slots=6, deep=True, shared=False),
    ),
}
MIXES = {most: (tiles[-1], tiles[0]) for most, tiles in RINGS.items()}
