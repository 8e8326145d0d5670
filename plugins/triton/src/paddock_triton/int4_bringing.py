"""The warps of `ops_linear_int4` that bring what is multiplied: one copies weights, one tokens.

Steps and slots are those of `ring`. After a tile's steps may come late ones, of 16 groups each, whose operands have two slots of
their own: `int4_multiplying` says what for.

N tokens of a tile, K inputs of a group within a step, B slots.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra.cuda import gdc_wait

from paddock_triton.int4_spec import LATE_GROUPS, LATE_SLOTS
from paddock_triton.ring import ROWS, STEP, free_slot, piece_of, steps_of


@gluon.jit
def _copy_weight(
    sources: gl.tuple, ring: gl.tuple, m: gl.tensor, row: gl.tensor, line: gl.tensor, lines: gl.tensor, block: gl.tensor,
    spec: gl.constexpr,
) -> None:  # fmt: skip
    """Have a step's part of the weight copied; its codes begin at `line`, those of 128 inputs on `lines` later."""
    packed, scales, zeros, _x, _sums, _late_scales = sources
    slot = free_slot((ring[4], ring[5]), m, spec.slots, spec.weight_bytes)
    full = ring[4].index(slot)
    group = block // spec.steps_of_group * spec.row_groups
    pieces: gl.constexpr = spec.pieces
    for i in gl.static_range(pieces):
        tma.async_copy_global_to_shared(packed, [line + i * lines, 0], full, ring[0].index(slot * pieces + i))
    tma.async_copy_global_to_shared(scales, [group, row], full, ring[1].index(slot))
    if spec.zeros and not spec.late:
        tma.async_copy_global_to_shared(zeros, [group, row // 2], full, ring[2].index(slot))


@gluon.jit
def _copy_late_weight(
    sources: gl.tuple, late: gl.tuple, u: gl.tensor, row: gl.tensor, step: gl.tensor, spec: gl.constexpr
) -> None:
    """Have the scales and zero points of 16 groups copied."""
    _packed, _scales, zeros, _x, _sums, late_scales = sources
    slot = free_slot((late[3], late[4]), u, LATE_SLOTS, spec.late_weight_bytes)
    full = late[3].index(slot)
    tma.async_copy_global_to_shared(late_scales, [step * LATE_GROUPS, row], full, late[0].index(slot))
    if spec.zeros:
        halves: gl.constexpr = spec.teams * spec.halves
        for half in gl.static_range(halves):
            place = [step * LATE_GROUPS, row // 2 + half * 32]
            tma.async_copy_global_to_shared(zeros, place, full, late[1].index(slot * halves + half))


@gluon.jit
def weight_copier(sources: gl.tuple, ring: gl.tuple, late: gl.tuple, sizes: gl.tuple, spec: gl.constexpr) -> None:
    """Copy every step's part of the weight as slots become free, the first while the kernel before still runs: one warp."""
    _tokens, outputs, blocks, _span, _tiles, token_tiles = sizes
    first, count = steps_of(sizes, spec)
    lines = (outputs + ROWS - 1) // ROWS * 32  # of a block
    t, m, u = first * 0, first * 0, first * 0
    while t < count:
        tile, block, taken = piece_of(first, t, count, sizes, spec)
        row, line = tile // token_tiles * spec.rows, block * spec.pieces * lines + tile // token_tiles * (spec.rows // 2)
        stop = gl.minimum(block + taken, blocks)
        for step in range(block, stop):
            _copy_weight(sources, ring, m, row, line, lines, step, spec)
            line += spec.pieces * lines
            m += 1
        if spec.late:
            for step in range(gl.maximum(block, blocks), block + taken):
                _copy_late_weight(sources, late, u, row, step - blocks, spec)
                u += 1
        t += taken


@gluon.jit
def _copy_tokens(sources: gl.tuple, ring: gl.tuple, m: gl.tensor, token: gl.tensor, block: gl.tensor, spec: gl.constexpr) -> None:
    """Have a step's part of x copied into the slot that its weights go to."""
    _packed, _scales, _zeros, x, _sums, _late_scales = sources
    slot = free_slot((ring[4], ring[5]), m, spec.slots, spec.token_bytes)
    full = ring[4].index(slot)
    groups: gl.constexpr = spec.row_groups
    for group in gl.static_range(groups):
        place = [token, block * spec.pieces * STEP + group * spec.inputs]
        tma.async_copy_global_to_shared(x, place, full, ring[3].index(slot * groups + group))


@gluon.jit
def _copy_late_tokens(
    sources: gl.tuple, late: gl.tuple, u: gl.tensor, tokens: gl.tensor, token: gl.tensor, step: gl.tensor, spec: gl.constexpr
) -> None:
    """Have the sums of 16 groups copied."""
    slot = free_slot((late[3], late[4]), u, LATE_SLOTS, spec.late_token_bytes)
    for plane in gl.static_range(2):
        place = [plane * tokens + token, step * LATE_GROUPS]
        tma.async_copy_global_to_shared(sources[4], place, late[3].index(slot), late[2].index(slot * 2 + plane))


@gluon.jit
def token_copier(sources: gl.tuple, ring: gl.tuple, late: gl.tuple, sizes: gl.tuple, spec: gl.constexpr) -> None:
    """Copy every step's part of x, and late steps' sums, as slots become free: one warp."""
    tokens, _outputs, blocks, _span, _tiles, token_tiles = sizes
    gdc_wait()
    first, count = steps_of(sizes, spec)
    t, m, u = first * 0, first * 0, first * 0
    while t < count:
        tile, block, taken = piece_of(first, t, count, sizes, spec)
        token, stop = tile % token_tiles * spec.tokens, gl.minimum(block + taken, blocks)
        for step in range(block, stop):
            _copy_tokens(sources, ring, m, token, step, spec)
            m += 1
        if spec.late:
            for step in range(gl.maximum(block, blocks), block + taken):
                _copy_late_tokens(sources, late, u, tokens, token, step - blocks, spec)
                u += 1
        t += taken
