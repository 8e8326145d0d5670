"""How a product with an INT4 weight is cut, and all that its kernel is compiled for.

N tokens of a tile, R rows (outputs) of a half, 64; K inputs of a group within a step of 128.
"""

from __future__ import annotations

from typing import Any

from attrs import frozen
from triton.experimental.gluon import language as gl

from paddock_triton.ring import ALL_REGISTERS, ROWS, STEP, launch_registers, team_registers

_STEP: int = STEP.value
_ROWS: int = ROWS.value
_LATE_GROUPS = 16
MOST_BY_WARPS = 8  # tokens of 16 bits
FEW = gl.constexpr(MOST_BY_WARPS)
_MOST_ROWS = 256  # that are copied at once
LATE_GROUPS, LATE_SLOTS = gl.constexpr(_LATE_GROUPS), gl.constexpr(2)


@frozen(kw_only=True)
class Int4Tile:
    """How a product is cut: `tokens` of a tile in `cuts`, `halves` of 64 rows for each of `teams` of four warps, `slots` steps.

    `shared`: programs take equal parts of all steps, so that tiles are shared; else whole tiles. `late`: FP8's zero points are
    taken off after a tile's steps, in a product of their own; else in each step. `deep`: a tile has 64 rows, and each team takes
    other inputs of a step, 128 of them, so that few tiles are shared where outputs are few. `waves`: each program takes
    `tiles // programs` whole ones, side by side with the others', and the rest alone is shared. A program takes at most
    `registers` of each lane of a multiprocessor, of all its 2,048: what is left is for kernels between the product before and
    this one.
    """

    tokens: int
    teams: int
    slots: int
    halves: int = 1
    cuts: int = 1
    shared: bool = True
    waves: bool = False
    late: bool = False
    deep: bool = False
    registers: int = ALL_REGISTERS


@frozen(kw_only=True)
class Int4Spec:
    """All that the kernel is compiled for: the tile, types, groups of inputs, and what follows from them."""

    tile: Int4Tile
    fp8: bool
    zeros: bool
    group: int  # inputs: 32, 64 or a multiple of 128
    scale_bytes: int  # of a group's scale: 2, or 4 in float32, as ModelOpt's are

    def __attrs_post_init__(self) -> None:
        """Hold the tile to what the kernel can do: it would leave out halves or cuts, or groups' zero points."""
        tile = self.tile
        assert tile.tokens % tile.cuts == 0, tile
        assert tile.late or (tile.halves, tile.cuts) == (1, 1), (tile, "has halves or cuts", self.group)
        assert not tile.late or (self.fp8 and self.group == _STEP and not tile.deep), (tile, "is late", self.group)
        assert not tile.deep or (self.group == _STEP and (tile.halves, tile.cuts) == (1, 1)), (tile, "is deep", self.group)
        assert tile.teams in (2, 4), (tile, "has other roles")
        assert tile.shared or not tile.waves, (tile, "shares nothing, and in waves")
        assert self.rows <= _MOST_ROWS, (tile, "has more rows than are copied at once")

    @property
    def tokens(self) -> int:
        """Return N."""
        return self.tile.tokens

    @property
    def token_scales(self) -> bool:
        """Return whether a tile's sums are multiplied by a scale a token as they are written."""
        return self.fp8

    @property
    def columns(self) -> int:
        """Return the tokens of a cut."""
        return self.tile.tokens // self.tile.cuts

    @property
    def teams(self) -> int:
        """Return how many teams multiply."""
        return self.tile.teams

    @property
    def halves(self) -> int:
        """Return how many halves a team has."""
        return self.tile.halves

    @property
    def cuts(self) -> int:
        """Return into how many cuts the tokens of a tile are divided."""
        return self.tile.cuts

    @property
    def slots(self) -> int:
        """Return how many steps lie in shared memory."""
        return self.tile.slots

    @property
    def shared(self) -> bool:
        """Return whether programs share tiles."""
        return self.tile.shared

    @property
    def waves(self) -> bool:
        """Return whether programs share only what whole tiles leave."""
        return self.tile.waves

    @property
    def late(self) -> bool:
        """Return whether zero points are taken off after a tile's steps."""
        return self.tile.late

    @property
    def deep(self) -> bool:
        """Return whether teams take other inputs, not other rows."""
        return self.tile.deep

    @property
    def pieces(self) -> int:
        """Return how many times 128 inputs a step has."""
        return self.teams if self.deep else 1

    @property
    def rows(self) -> int:
        """Return the outputs of a tile."""
        return _ROWS if self.deep else _ROWS * self.teams * self.halves

    @property
    def row_groups(self) -> int:
        """Return how many groups of scales are copied at once."""
        return self.groups * self.pieces

    @property
    def groups(self) -> int:
        """Return the groups of 128 inputs."""
        return max(1, _STEP // self.group)

    @property
    def steps_of_group(self) -> int:
        """Return over how many steps a group goes."""
        return max(1, self.group // _STEP)

    @property
    def inputs(self) -> int:
        """Return K."""
        return _STEP // self.groups

    @property
    def zero_columns(self) -> int:
        """Return the bytes of zero points a step has copied of a group: at least what may begin in shared memory."""
        return max(128, self.rows // 2)

    @property
    def inside(self) -> bool:
        """Return whether zero points are taken off by products of their own in each step."""
        return self.fp8 and not self.tile.late

    @property
    def wide(self) -> bool:
        """Return whether 16-bit inputs are multiplied by a team's unit, not by each warp's: where tokens are more than a few."""
        return not self.fp8 and self.tokens > MOST_BY_WARPS

    @property
    def operand_width(self) -> int:
        """Return how many neighbouring inputs a thread has of an operand."""
        return 4 if self.fp8 else 2

    @property
    def part_size(self) -> int:
        """Return the sums of a tile, or of a program's part of one."""
        return self.rows * self.tokens

    @property
    def parts_at_once(self) -> int:
        """Return how many parts of a tile are asked for at once: 1 or 3."""
        return 1 if self.columns > 32 else 3

    @property
    def launch_registers(self) -> int:
        """Return the registers of a thread as a program starts; its roles divide them anew."""
        return launch_registers(self.teams, self.tile.registers)

    @property
    def most_registers(self) -> int | None:
        """Return the most that the compiler may give a thread as a program starts, None where it may use all there are."""
        return None if self.tile.registers == ALL_REGISTERS else self.launch_registers

    @property
    def team_registers(self) -> int:
        """Return the registers of a thread that multiplies."""
        return team_registers(self.teams, self.tile.registers)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes copied of the weight for a step."""
        size = self.pieces * self.rows * _STEP // 2 + self.row_groups * self.rows * self.scale_bytes
        return size + self.row_groups * self.zero_columns * (self.zeros and not self.late)

    @property
    def token_bytes(self) -> int:
        """Return the bytes copied of x for a step."""
        return self.pieces * self.tokens * _STEP * (1 if self.fp8 else 2)

    @property
    def late_weight_bytes(self) -> int:
        """Return the bytes of scales and zero points copied for a late step."""
        return _LATE_GROUPS * (self.rows * self.scale_bytes + self.rows // 2 * self.zeros)

    @property
    def late_token_bytes(self) -> int:
        """Return the bytes of both planes of sums copied for a late step."""
        return _LATE_GROUPS * 2 * self.tokens * 2

    @property
    def mma(self) -> Any:
        """Return how sums lie in registers: by a team's unit, or each warp's."""
        if self.wide:
            return self.late_mma
        if self.fp8:
            return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.columns, 32])
        return gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])

    @property
    def late_mma(self) -> Any:
        """Return how sums lie for the unit's products in 16 bits."""
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.columns, 16])

    @property
    def bytes_layout(self) -> Any:
        """Return how a half's bytes lie in registers [32, 128], by row of the first eight of sixteen, and input."""
        inputs, lanes = [[0, 1], [0, 2], [0, 16], [0, 32], [0, 64]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
        return gl.DistributedLinearLayout(inputs, lanes, [[8, 0], [16, 0]], [], [32, _STEP])

    @property
    def few_layout(self) -> Any:
        """Return how inputs of a few tokens lie in registers [K, 8], the same in each warp: four neighbours of each sixteen."""
        inputs = [[k, 0] for k in (1, 2, 16, 32, 64) if k < self.inputs]
        return gl.DistributedLinearLayout(
            inputs, [[4, 0], [8, 0], [0, 1], [0, 2], [0, 4]], [[0, 0], [0, 0]], [], [self.inputs, MOST_BY_WARPS]
        )

    @property
    def handed_shared(self) -> Any:
        """Return how sums that a team hands over lie in shared memory [64, N]."""
        return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    @property
    def packed_shared(self) -> Any:
        """Return how codes lie in shared memory [32 a half, 128]."""
        return _swizzled(128, 8)

    @property
    def x_shared(self) -> Any:
        """Return how a group's inputs lie there [N, K]."""
        bits = 8 if self.fp8 else 16
        return _swizzled(min(128, self.inputs * bits // 8), bits)

    @property
    def scales_shared(self) -> Any:
        """Return how a step's scales lie there [groups, rows]."""
        return _swizzled(0, 8 * self.scale_bytes)

    @property
    def zeros_shared(self) -> Any:
        """Return how a step's zero points lie there [groups, bytes]."""
        return _swizzled(0, 8)

    @property
    def late_scales_shared(self) -> Any:
        """Return how a late step's scales lie there [16, rows]."""
        return _swizzled(128, 8 * self.scale_bytes)

    @property
    def late_zeros_shared(self) -> Any:
        """Return how a late step's zero points of a half lie there [16, 32]."""
        return _swizzled(32, 8)

    @property
    def late_sums_shared(self) -> Any:
        """Return how a plane of a late step's sums lies there [N, 16]."""
        return _swizzled(32, 16)


def _swizzled(width: int, bits: int) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=2)
