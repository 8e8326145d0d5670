"""Products of up to 64 tokens: persistent programs that read a weight, in FP8 or 16 bits, through a ring of slots, in Gluon.

It is the machinery of `ops_linear_int4` with nothing to decode: a warp copies weights, another tokens, two or four teams of
warps multiply, both operands from shared memory, as W x^T. A tile of outputs is 64 rows, and each team takes other inputs of
them. Programs take whole tiles in turn or, where the last of these would keep memory waiting, equal parts of all: then tiles are
shared. The matrix unit keeps 14 bits of FP8 sums: the 128 inputs a team takes of a step are added up in float32 outside of it.

Weights are copied before the kernel before has ended; who copies tokens, and who reads scales of x and writes, waits for it.

Outputs may be any number; the bytes of a row of inputs a multiple of 16, where the copy engine's rows may begin (`serves`).

R rows (outputs) of a tile, 64; N tokens of a tile; K inputs, 128 bytes of them; B slots, each of some times as many.
"""

from __future__ import annotations

import torch
from attrs import evolve
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paddock.layers import QuantizedActivation
from paddock_triton.attention_async import runs_on
from paddock_triton.attention_tuning import processors
from paddock_triton.counters import counters
from paddock_triton.dependence import DEPENDENT, fetch
from paddock_triton.launch import launch
from paddock_triton.linear_ring_gated import described_gated, row_of, store_gated
from paddock_triton.linear_ring_spec import RingTile
from paddock_triton.ring import ROWS, barriers, free_slot, piece_of, role_barrier, steps_of
from paddock_triton.ring_parts import finish, gathered, gathering_of, nothing, store
from paddock_triton.rows import ALIGNED, aligned, blocks_of

_SCALES = gl.constexpr(32)  # of a line of the L2 cache
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Bytes a second that one multiprocessor of an H200 reads, and all of them: 64 whole tiles, on half of its 132, read at 84 %
# of what all do. And the seconds for which memory may wait for the last whole tiles: what it takes tiles' parts to meet.
_ONE_READS, _ALL_READ, _MEETING = 56e9, 4.2e12, 3e-6
# By the most tokens; slots are what shared memory holds. On an H200, microseconds of a layer among its norms and attention, one
# token of 8B and of 70B: 65.4 and 209.0, in 5 slots 66.5 to 67.1 and 210.2, in 2 teams 66.4 and 210.8, by multiply-adds without
# the ring 67.5 and 211.1; of 64 tokens with 2,048 each 143.9 and 295.8, with all registers 145.4 and 298.4, in 5 slots 145.0
# and 297.6, in 4 teams 155.9 and 311.5, by blocks of 64 x 256 without the ring 154.2 and 310.5. Alone, the four products of a
# layer of 70B take 203.9 (1 token), 208.7 (16), 211.8 (32) and 222.2 (64), by such blocks 238.8, 237.6, 240.5 and 251.3.
_SPARING = 1536  # registers: a norm's program need not end before the next product's can begin beside it
TILES = {
    8: RingTile(tokens=8, teams=4, slots=6),
    16: RingTile(tokens=16, teams=4, slots=5, registers=_SPARING),
    32: RingTile(tokens=32, teams=4, slots=4, registers=_SPARING),
    64: RingTile(tokens=64, teams=2, slots=6, registers=_SPARING),
}


@gluon.jit
def _ring(dtype: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the slots of steps: weights, x; barriers of those who copy and multiply."""
    teams: gl.constexpr = spec.teams
    weight_BRK = gl.allocate_shared_memory(dtype, [spec.slots * spec.pieces, spec.rows, spec.inputs], spec.operand)
    x_BNK = gl.allocate_shared_memory(dtype, [spec.slots * spec.pieces, spec.tokens, spec.inputs], spec.operand)
    return weight_BRK, x_BNK, barriers(spec.slots, 2), barriers(spec.slots, teams)


@gluon.jit
def _copy(
    source: tma.tensor_descriptor, ring: gl.tuple, m: gl.tensor, line: gl.tensor, step: gl.tensor, TOKENS: gl.constexpr,
    spec: gl.constexpr,
) -> None:  # fmt: skip
    """Have a step's part of the weight, or of x, copied into its slot once that is free; its rows begin at `line`."""
    slot = free_slot((ring[2], ring[3]), m, spec.slots, spec.token_bytes if TOKENS else spec.weight_bytes)
    into = ring[1] if TOKENS else ring[0]
    pieces: gl.constexpr = spec.pieces
    for piece in gl.static_range(pieces):
        column = (step * pieces + piece) * spec.inputs
        if TOKENS or spec.gated is None:
            tma.async_copy_global_to_shared(source, [line, column], ring[2].index(slot), into.index(slot * pieces + piece))
        else:
            eights = into.index(slot * pieces + piece)._reinterpret(
                source.dtype, [spec.rows // 16, 2, 8, spec.inputs], spec.in_eights
            )
            tma.async_copy_global_to_shared(source, [line // 16, 0, 0, column], ring[2].index(slot), eights)


@gluon.jit
def _copier(
    source: tma.tensor_descriptor, scales: gl.tuple, ring: gl.tuple, sizes: gl.tuple, TOKENS: gl.constexpr, spec: gl.constexpr
) -> None:  # fmt: skip
    """Copy every step's weights, the first while the kernel before still runs, or its tokens, after it: one warp.

    Who copies weights has the scales of their blocks brought to the L2 cache: who multiplies needs them some steps later.
    """
    _tokens, _outputs, groups, _span, _tiles, token_tiles = sizes
    if TOKENS:
        gdc_wait()
    first, count = steps_of(sizes, spec)
    t = first * 0
    while t < count:
        tile, block, taken = piece_of(first, t, count, sizes, spec)
        line = tile % token_tiles * spec.tokens if TOKENS else tile // token_tiles * spec.rows
        if spec.run and not TOKENS:
            of_run = scales[0] + line // spec.run * groups
            for group in range(0, groups, _SCALES):
                fetch(of_run + group)
        for step in range(taken):
            _copy(source, ring, t + step, line, block + step, TOKENS, spec)
        t += taken


@gluon.jit
def _block_scales(
    scales: gl.tuple, tile: gl.tensor, step: gl.tensor, sizes: gl.tuple, INDEX: gl.constexpr, spec: gl.constexpr
) -> gl.tensor:  # fmt: skip
    """Return what a team's products of a step are multiplied by [N]: each token's scale times the weight's.

    Anything where there are no blocks. Products of what is beyond the last inputs are zeros, whatever they are multiplied by.
    """
    tokens, _outputs, groups, _span, _tiles, token_tiles = sizes
    token_N = tile % token_tiles * spec.tokens + gl.arange(0, spec.tokens, gl.SliceLayout(0, spec.mma))
    scale_N = token_N.to(gl.float32)
    if spec.run:
        group = gl.minimum(step * spec.pieces + INDEX, groups - 1)
        scale_N = gl.load(scales[1] + token_N * groups + group, mask=token_N < tokens, other=0.0)
        scale_N *= gl.load(scales[0] + tile // token_tiles * spec.rows // spec.run * groups + group)
    return scale_N


@gluon.jit
def _step(
    sum_RN: gl.tensor, ring: gl.tuple, m: gl.tensor, scale_N: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr
) -> gl.tensor:  # fmt: skip
    """Return a team's sums after step m: FP8 products of its 128 inputs begin anew, and are added in float32."""
    slot = m % spec.slots
    mbarrier.wait(ring[2].index(slot), m // spec.slots & 1)
    weight_RK = ring[0].index(slot * spec.pieces + INDEX)
    x_KN = ring[1].index(slot * spec.pieces + INDEX).permute((1, 0))
    if spec.item == 1:
        products_RN = warpgroup_mma(weight_RK, x_KN, nothing(spec), use_acc=False, is_async=True)
        products_RN = warpgroup_mma_wait(0, deps=[products_RN])
        sum_RN += products_RN * scale_N[None, :] if spec.run else products_RN
    else:
        sum_RN = warpgroup_mma(weight_RK, x_KN, sum_RN, use_acc=True, is_async=True)
        sum_RN = warpgroup_mma_wait(0, deps=[sum_RN])
    role_barrier()
    mbarrier.arrive(ring[3].index(slot))
    return sum_RN


@gluon.jit
def _row_scales(scales: gl.tuple, tile: gl.tensor, sizes: gl.tuple, spec: gl.constexpr) -> gl.tensor:
    """Return the scales of a tile's rows [64], anything beyond the last of them."""
    _tokens, outputs, _blocks, _span, _tiles, token_tiles = sizes
    row_R = tile // token_tiles * spec.rows + gl.arange(0, ROWS, gl.SliceLayout(1, spec.mma))
    at_R = row_R if spec.gated is None else row_of(row_R, outputs // 2)
    return gl.load(scales[0] + at_R, mask=row_R < outputs, other=0.0)


@gluon.jit
def _token_scales(scales: gl.tuple, tile: gl.tensor, sizes: gl.tuple, PER_TOKEN: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Return the scales of a tile's tokens [N]."""
    tokens, _outputs, _blocks, _span, _tiles, token_tiles = sizes
    token_N = tile % token_tiles * spec.tokens + gl.arange(0, spec.tokens, gl.SliceLayout(0, spec.mma))
    return gl.load(scales[1] + token_N * PER_TOKEN, mask=token_N < tokens, other=0.0)


@gluon.jit
def _multiplier(
    outs: gl.tuple, scales: gl.tuple, ring: gl.tuple, gathering: gl.tuple, sizes: gl.tuple, INDEX: gl.constexpr,
    PER_TOKEN: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    """Multiply what is this team's of every tile: four warps. Scales are asked for ahead of the products they are for.

    The first team adds up all teams' sums, scales them and writes them or keeps them as a part: what is scaled before parts meet
    need not be after.
    """
    gdc_wait()
    first, count = steps_of(sizes, spec)
    t, n = first * 0, first * 0
    while t < count:
        tile, block, taken = piece_of(first, t, count, sizes, spec)
        nothing_RN = nothing(spec)
        if spec.item == 1 and not spec.run:
            scale_R = _row_scales(scales, tile, sizes, spec)
            of_token_N = _token_scales(scales, tile, sizes, PER_TOKEN, spec)
        sum_RN = nothing_RN
        for m in range(t, t + taken):
            scale_N = _block_scales(scales, tile, block + m - t, sizes, INDEX, spec)  # asked for ahead of what it is for
            sum_RN = _step(sum_RN, ring, m, scale_N, INDEX, spec)
        accs = gathered((sum_RN, nothing_RN, nothing_RN, nothing_RN), gathering, n, INDEX, spec)
        if INDEX == 0:
            if spec.item == 1 and not spec.run:
                accs = (accs[0] * (of_token_N[None, :] * scale_R[:, None]), nothing_RN, nothing_RN, nothing_RN)
            finish(accs, outs, tile, block, taken, sizes, INDEX, store if spec.gated is None else store_gated, spec)
        n += 1
        t += taken


@gluon.jit
def _work(
    outs: gl.tuple, scales: gl.tuple, weight: tma.tensor_descriptor, x: tma.tensor_descriptor, ring: gl.tuple, sizes: gl.tuple,
    PER_TOKEN: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    """Give each warp its role."""
    team: gl.constexpr = spec.team_registers
    gathering = gathering_of(ring, spec)
    fence_async_shared()  # the copy engine is to see the barriers as they begin
    if spec.teams == 2:
        gl.warp_specialize(
            [
                (_multiplier, (outs, scales, ring, gathering, sizes, 0, PER_TOKEN, spec)),
                (_multiplier, (outs, scales, ring, gathering, sizes, 1, PER_TOKEN, spec)),
                (_copier, (weight, scales, ring, sizes, False, spec)),
                (_copier, (x, scales, ring, sizes, True, spec)),
            ],
            [4, 1, 1],
            [team, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiplier, (outs, scales, ring, gathering, sizes, 0, PER_TOKEN, spec)),
                (_multiplier, (outs, scales, ring, gathering, sizes, 1, PER_TOKEN, spec)),
                (_multiplier, (outs, scales, ring, gathering, sizes, 2, PER_TOKEN, spec)),
                (_multiplier, (outs, scales, ring, gathering, sizes, 3, PER_TOKEN, spec)),
                (_copier, (weight, scales, ring, sizes, False, spec)),
                (_copier, (x, scales, ring, sizes, True, spec)),
            ],
            [4, 4, 4, 1, 1],
            [team, team, team, 24, 24],
        )


@gluon.jit(do_not_specialize=["tokens", "span", "tiles", "token_tiles", "groups"])
def _ring_kernel(
    out_ptr: gl.tensor, out_scale_ptr: gl.tensor, x: tma.tensor_descriptor, x_scale_ptr: gl.tensor, weight: tma.tensor_descriptor,
    scale_ptr: gl.tensor, parts_ptr: gl.tensor, done_ptr: gl.tensor, tokens: gl.tensor, outputs: gl.tensor, span: gl.tensor,
    tiles: gl.tensor, token_tiles: gl.tensor, groups: gl.tensor, PER_TOKEN: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    gdc_launch_dependents()
    sizes, outs = (tokens, outputs, groups, span, tiles, token_tiles), (out_ptr, out_scale_ptr, parts_ptr, done_ptr)
    _work(outs, (scale_ptr, x_scale_ptr), weight, x, _ring(x.dtype, spec), sizes, PER_TOKEN, spec)


def serves(values_TI: Tensor, weight_OI: Tensor) -> bool:
    """Return whether the kernel is for this device, so many tokens, and a weight that the copy engine can bring."""
    few, row = 0 < len(values_TI) <= max(TILES), weight_OI.stride(0) * weight_OI.element_size()
    return few and runs_on(values_TI.device) and row % ALIGNED == weight_OI.data_ptr() % ALIGNED == 0


def tile_for(tokens: int, weight_OI: Tensor) -> RingTile:
    """Return how a product of up to 64 tokens is cut."""
    (outputs, inputs), item = weight_OI.shape, weight_OI.element_size()
    tile = TILES[next(most for most in TILES if tokens <= most)]
    return evolve(tile, item=item, shared=_waits(outputs, inputs * item, processors(weight_OI.device)) > _MEETING)


def _waits(outputs: int, row: int, programs: int) -> float:
    """Return for how many seconds memory waits for the programs that take the last of whole tiles, of rows of so many bytes."""
    tile, last = RingTile.rows * row, (blocks_of(outputs, RingTile.rows) - 1) % programs + 1
    return tile / _ONE_READS - last * tile / _ALL_READ


def launch_ring(
    out_TO: Tensor, values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, tile: RingTile
) -> None:
    """Multiply, cut as the tile says."""
    _launch(out_TO, weight_scale_O1, values_TI, x_scale, weight_OI, weight_scale_O1, tile)  # no scale of what comes out


def launch_ring_blocks(
    out_TO: Tensor, values_TI: Tensor, scale_TG: Tensor, weight_OI: Tensor, weight_scale_QG: Tensor, run: int, tile: RingTile
) -> None:
    """Multiply, cut as the tile says, with a scale for each token and 128 inputs, and for each `run` rows and 128 inputs."""
    _launch(out_TO, weight_scale_QG, values_TI, scale_TG, weight_OI, weight_scale_QG, evolve(tile, run=run))


def launch_ring_plain(out_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, tile: RingTile) -> None:
    """Multiply 16-bit inputs with a 16-bit weight, cut as the tile says: no scales."""
    _launch(out_TO, out_TO, x_TI, out_TO, weight_OI, out_TO, tile)


def launch_ring_gated(
    out: QuantizedActivation, values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype,
    tile: RingTile,
) -> None:  # fmt: skip
    """Multiply, cut as the tile says, and activate, gate and up rounded to `dtype`."""
    gated = evolve(tile, gated=_DTYPES[dtype])
    _launch(out.values_TI, out.scale, values_TI, x_scale, weight_OI, weight_scale_O1, gated)


def _launch(
    out_TX: Tensor, out_scale: Tensor, values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor,
    tile: RingTile,
) -> None:  # fmt: skip
    values_TI = aligned(values_TI)
    (outputs, inputs), tokens = weight_OI.shape, len(values_TI)
    token_tiles, span = blocks_of(tokens, tile.tokens), blocks_of(inputs, tile.pieces * tile.inputs)
    count = token_tiles * blocks_of(outputs, tile.rows)
    programs = min(processors(values_TI.device), count * (span if tile.shared else 1))
    parts = values_TI.new_empty(programs * tile.part_size if tile.shared else 1, dtype=torch.float32)
    weight = _described(weight_OI, tile.rows, tile) if tile.gated is None else described_gated(weight_OI, tile)
    launch(
        _ring_kernel, (programs,),
        out_TX, out_scale, _described(values_TI, tile.tokens, tile), x_scale, weight, weight_scale_O1, parts,
        counters(values_TI.device, count * tile.teams if tile.shared else 1), tokens, outputs, span, count, token_tiles,
        blocks_of(inputs, tile.inputs), PER_TOKEN=int(x_scale.ndim > 0), spec=tile, num_warps=4, maxnreg=tile.most_registers,
        **DEPENDENT,
    )  # fmt: skip


def _described(operand_LI: Tensor, lines: int, tile: RingTile) -> TensorDescriptor:
    """Return an operand as the copy engine sees it: so many rows of 128 bytes at once."""
    return TensorDescriptor(operand_LI, list(operand_LI.shape), list(operand_LI.stride()), [lines, tile.inputs], tile.operand)
