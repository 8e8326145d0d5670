"""Persistent programs that stream a weight through a ring of slots: who takes which steps of which tiles, and slots' barriers.

`ops_linear_int4` and `linear_ring` are such kernels; `attention_roles` has their barriers and slots. A program has two
warps that copy, one weights and one tokens, and two or four teams of four warps that multiply. A step is 128 inputs of a tile of
outputs and tokens, or 128 for each team. What it needs lies in a slot of shared memory, with two barriers: one that says all of
it is there (`full`), one that all its readers are done with it (`free`). Step m of a program lies in slot m % slots; which of the
slot's uses a barrier speaks of is the parity of m // slots. A program's steps make pieces: a piece is the steps of one tile, all
of them or, where programs share tiles, some. Programs share all tiles, or none, or in waves: `tiles // programs` go whole to each
program, neighbours at a time, and only the rest are shared.

B slots.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

STEP = gl.constexpr(128)  # inputs
ROWS = gl.constexpr(64)  # outputs that a team's unit multiplies at once, a half of a team's rows where it has two
ALL_REGISTERS = 2048  # of each lane of a multiprocessor
_TEAM_WARPS, _COPIER_REGISTERS = 4, 24
role_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a role's warps: Triton 3.7's name and 3.6's


def launch_registers(teams: int, registers: int) -> int:
    """Return the registers of a thread as a program of so many teams and of `registers` a lane starts."""
    return _eights(registers // _warps(teams))


def team_registers(teams: int, registers: int) -> int:
    """Return what those that copy leave of them to a thread that multiplies."""
    left = launch_registers(teams, registers) * _warps(teams) - _COPIER_REGISTERS * _TEAM_WARPS
    return min(240, _eights(left // (teams * _TEAM_WARPS)))


def _warps(teams: int) -> int:
    return (teams + 1) * _TEAM_WARPS  # those that copy count as a team's


def _eights(registers: int) -> int:
    """Return the most registers of no more than these that a thread can have."""
    return registers // 8 * 8


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr) -> gl.shared_memory_descriptor:
    """Return `COUNT` barriers, each of `ARRIVALS` arrivals."""
    barriers_B = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(COUNT):
        mbarrier.init(barriers_B.index(slot), count=ARRIVALS)
    return barriers_B


@gluon.jit
def first_unit(program: gl.tensor, programs: gl.tensor, units: gl.tensor) -> gl.tensor:
    """Return the first unit of a program where programs share all: the first few have one more than the others.

    No product is larger than `units`: with 132 programs `program * units` would not fit 32 bits from 16 million units on.
    """
    each, more = units // programs, units % programs
    return program * each + min(more, program)


@gluon.jit
def program_of(unit: gl.tensor, programs: gl.tensor, units: gl.tensor) -> gl.tensor:
    """Return the program that has a unit, as `first_unit` shares them."""
    each, more = units // programs, units % programs
    return unit // (each + 1) if unit < more * (each + 1) else (unit - more) // each


@gluon.jit
def whole_tiles(programs: gl.tensor, tiles: gl.tensor, WAVES: gl.constexpr) -> gl.tensor:
    """Return how many tiles, the first, programs take whole where they share the others."""
    whole = tiles * 0
    if WAVES:
        whole = tiles // programs * programs
    return whole


@gluon.jit
def share_of(
    program: gl.tensor, programs: gl.tensor, span: gl.tensor, tiles: gl.tensor, SHARED: gl.constexpr, WAVES: gl.constexpr
) -> gl.tuple:
    """Return a program's first unit (a step of a tile) and how many steps it has; where tiles are shared, the first of those."""
    if SHARED:
        whole = whole_tiles(programs, tiles, WAVES)
        units = (tiles - whole) * span
        first = first_unit(program, programs, units)
        count = first_unit(program + 1, programs, units) - first + whole // programs * span
    else:
        first = program * span
        count = (tiles - program + programs - 1) // programs * span
    return first, count


@gluon.jit
def place_in(
    program: gl.tensor, programs: gl.tensor, first: gl.tensor, t: gl.tensor, span: gl.tensor, tiles: gl.tensor,
    SHARED: gl.constexpr, WAVES: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Return the tile of a program's step t, and which of the tile's it is: whole tiles first, then its part of others."""
    if SHARED:
        whole = whole_tiles(programs, tiles, WAVES)
        unit = first + t - whole // programs * span
        tile, block = whole + unit // span, unit % span
        if WAVES:  # noqa: SIM102  this is decided as the kernel is compiled, the next as it runs
            if t < whole // programs * span:
                tile, block = program + t // span * programs, t % span
    else:
        tile, block = program + t // span * programs, t % span
    return tile, block


@gluon.jit
def steps_of(sizes: gl.tuple, spec: gl.constexpr) -> gl.tuple:
    """Return the first unit of this program and how many steps it has."""
    _tokens, _outputs, _blocks, span, tiles, _token_tiles = sizes
    return share_of(gl.program_id(0), gl.num_programs(0), span, tiles, spec.shared, spec.waves)


@gluon.jit
def piece_of(first: gl.tensor, t: gl.tensor, count: gl.tensor, sizes: gl.tuple, spec: gl.constexpr) -> gl.tuple:
    """Return the tile of this program's step t, of `count`, which of the tile's it is, and how many it takes of it from there."""
    _tokens, _outputs, _blocks, span, tiles, _token_tiles = sizes
    tile, block = place_in(gl.program_id(0), gl.num_programs(0), first, t, span, tiles, spec.shared, spec.waves)
    return tile, block, gl.minimum(span - block, count - t)


@gluon.jit
def free_slot(barriers_of: gl.tuple, use: gl.tensor, COUNT: gl.constexpr, BYTES: gl.constexpr) -> gl.tensor:
    """Return the slot of a use once it is free, its barrier told how many bytes will come."""
    full_B, free_B = barriers_of
    slot = use % COUNT
    mbarrier.wait(free_B.index(slot), (use // COUNT & 1) ^ 1)
    mbarrier.expect(full_B.index(slot), BYTES)
    return slot
