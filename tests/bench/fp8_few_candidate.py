"""A candidate for FP8 products of 2 to 64 tokens, in Gluon: persistent programs that read a weight through a ring of slots.

To time it: python -m tests.bench.fp8_variants --only ring --only "*few" (with --tokens 16 and so on for some tokens alone).
Where it ends in silu(gate) * up (`fp8_ring_gated`): python -m tests.bench.fp8_gated_variants.

It is the machinery of `paddock_triton.ops_linear_int4` with nothing to decode: a warp copies weights, another tokens, teams of
warps multiply, both operands from shared memory, as W x^T. A tile of outputs is 64, 128 or 256 rows, so that what it needs of x
comes from the L2 once for all of them, and programs may share tiles, so that each reads the same number of bytes. The matrix
unit keeps 14 bits of FP8 sums: what a team takes of a step, 128 or 256 inputs, is added up in float32 outside of it.

Weights are copied before the kernel before has ended; who copies tokens, and who reads scales of x and writes, waits for it.

Outputs may be any number; inputs a multiple of 16, where the copy engine's rows may begin (`takes`).

R rows (outputs) of a half, 64; N tokens of a tile; K inputs, 128; B slots, each of some times 128 inputs.
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
from paddock_triton.attention_tuning import processors
from paddock_triton.counters import counters
from paddock_triton.dependence import DEPENDENT
from paddock_triton.int4_bringing import barriers, free_slot, place_of, steps_of
from paddock_triton.int4_parts import finish, gathered, gathering_of, nothing, store
from paddock_triton.int4_spec import ROWS, STEP
from paddock_triton.launch import launch
from paddock_triton.rows import blocks_of
from tests.bench.fp8_ring_gated import described_gated, row_of, store_gated
from tests.bench.fp8_ring_tiles import INPUTS, RingTile

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a role's warps: Triton 3.7's name and 3.6's
_ALIGNED = 16  # bytes
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_MOST_IDLE = 0.05  # of the time that whole tiles take


@gluon.jit
def _ring(dtype: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the slots of steps: weights, x; barriers of those who copy and multiply."""
    teams: gl.constexpr = spec.teams
    weight_BRK = gl.allocate_shared_memory(dtype, [spec.slots * spec.pieces, spec.rows, STEP], spec.operand)
    x_BNK = gl.allocate_shared_memory(dtype, [spec.slots * spec.pieces, spec.tokens, STEP], spec.operand)
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
        column = (step * pieces + piece) * STEP
        if TOKENS or spec.gated is None:
            tma.async_copy_global_to_shared(source, [line, column], ring[2].index(slot), into.index(slot * pieces + piece))
        else:
            eights = into.index(slot * pieces + piece)._reinterpret(source.dtype, [spec.rows // 16, 2, 8, STEP], spec.in_eights)
            tma.async_copy_global_to_shared(source, [line // 16, 0, 0, column], ring[2].index(slot), eights)


@gluon.jit
def _copier(source: tma.tensor_descriptor, ring: gl.tuple, sizes: gl.tuple, TOKENS: gl.constexpr, spec: gl.constexpr) -> None:
    """Copy every step's weights, the first while the kernel before still runs, or its tokens, after it: one warp."""
    _tokens, _outputs, _blocks, span, _tiles, token_tiles = sizes
    if TOKENS:
        gdc_wait()
    first, count = steps_of(sizes, spec)
    t = first * 0
    while t < count:
        tile, block = place_of(first, t, sizes, spec)
        taken = gl.minimum(span - block, count - t)
        line = tile % token_tiles * spec.tokens if TOKENS else tile // token_tiles * spec.rows
        for step in range(taken):
            _copy(source, ring, t + step, line, block + step, TOKENS, spec)
        t += taken


@gluon.jit
def _multiplied(
    products_RN: gl.tensor, ring: gl.tuple, slot: gl.tensor, block: gl.constexpr, half: gl.constexpr, INDEX: gl.constexpr,
    spec: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Return products under way, with those of a team's half with 128 more inputs: the first of a step begin anew."""
    piece: gl.constexpr = INDEX * spec.blocks + block if spec.deep else block
    row: gl.constexpr = 0 if spec.deep else (INDEX * spec.halves + half) * ROWS
    weight_RK = ring[0].index(slot * spec.pieces + piece).slice(row, ROWS)
    x_KN = ring[1].index(slot * spec.pieces + piece).permute((1, 0))
    return warpgroup_mma(weight_RK, x_KN, products_RN, use_acc=block > 0, is_async=True)


@gluon.jit
def _step(accs: gl.tuple, ring: gl.tuple, m: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the sums after step m."""
    a_RN, b_RN, c_RN, d_RN = accs
    slot = m % spec.slots
    blocks: gl.constexpr = spec.blocks
    mbarrier.wait(ring[2].index(slot), m // spec.slots & 1)
    products_RN, more_RN = nothing(spec), nothing(spec)
    for block in gl.static_range(blocks):
        products_RN = _multiplied(products_RN, ring, slot, block, 0, INDEX, spec)
        if spec.halves == 2:
            more_RN = _multiplied(more_RN, ring, slot, block, 1, INDEX, spec)
    if spec.halves == 2:
        products_RN, more_RN = warpgroup_mma_wait(0, deps=[products_RN, more_RN])
        c_RN += more_RN
    else:
        products_RN = warpgroup_mma_wait(0, deps=[products_RN])
    a_RN += products_RN
    _barrier()
    mbarrier.arrive(ring[3].index(slot))
    return a_RN, b_RN, c_RN, d_RN


@gluon.jit
def _row_scales(scales: gl.tuple, tile: gl.tensor, half: gl.constexpr, sizes: gl.tuple, spec: gl.constexpr) -> gl.tensor:
    """Return the scales of a half's rows [64], anything beyond the last of them."""
    _tokens, outputs, _blocks, _span, _tiles, token_tiles = sizes
    row_R = tile // token_tiles * spec.rows + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, spec.mma))
    at_R = row_R if spec.gated is None else row_of(row_R, outputs // 2)
    return gl.load(scales[0] + at_R, mask=row_R < outputs, other=0.0)


@gluon.jit
def _token_scales(scales: gl.tuple, tile: gl.tensor, sizes: gl.tuple, PER_TOKEN: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Return the scales of a tile's tokens [N]."""
    tokens, _outputs, _blocks, _span, _tiles, token_tiles = sizes
    token_N = tile % token_tiles * spec.tokens + gl.arange(0, spec.tokens, gl.SliceLayout(0, spec.mma))
    return gl.load(scales[1] + token_N * PER_TOKEN, mask=token_N < tokens, other=0.0)


@gluon.jit
def _ended(
    accs: gl.tuple, row_scales: gl.tuple, scale_N: gl.tensor, outs: gl.tuple, tile: gl.tensor, block: gl.tensor, taken: gl.tensor,
    sizes: gl.tuple, INDEX: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    """Scale a piece's sums and write them, or keep them as a part: what is scaled before parts meet need not be after."""
    a_RN, b_RN, c_RN, d_RN = accs
    a_RN = a_RN * (scale_N[None, :] * row_scales[0][:, None])
    if spec.halves == 2:
        c_RN = c_RN * (scale_N[None, :] * row_scales[1][:, None])
    accs = (a_RN, b_RN, c_RN, d_RN)
    finish(accs, outs, tile, block, taken, sizes, INDEX, store if spec.gated is None else store_gated, spec)


@gluon.jit
def _multiplier(
    outs: gl.tuple, scales: gl.tuple, ring: gl.tuple, gathering: gl.tuple, sizes: gl.tuple, INDEX: gl.constexpr,
    PER_TOKEN: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    """Multiply what is this team's of every tile: four warps. Scales are asked for ahead of the products they are for."""
    _tokens, _outputs, _blocks, span, _tiles, _token_tiles = sizes
    gdc_wait()
    first, count = steps_of(sizes, spec)
    t, n = first * 0, first * 0
    half: gl.constexpr = 0 if spec.deep else INDEX * spec.halves
    while t < count:
        tile, block = place_of(first, t, sizes, spec)
        taken = gl.minimum(span - block, count - t)
        scale_R = _row_scales(scales, tile, half, sizes, spec)
        row_scales = (scale_R, _row_scales(scales, tile, half + 1, sizes, spec) if spec.halves == 2 else scale_R)
        scale_N = _token_scales(scales, tile, sizes, PER_TOKEN, spec)
        nothing_RN = nothing(spec)
        accs = (nothing_RN, nothing_RN, nothing_RN, nothing_RN)
        for m in range(t, t + taken):
            accs = _step(accs, ring, m, INDEX, spec)
        if spec.deep:
            accs = gathered(accs, gathering, n, INDEX, spec)
            n += 1
        if INDEX == 0 or not spec.deep:
            _ended(accs, row_scales, scale_N, outs, tile, block, taken, sizes, INDEX, spec)
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
                (_copier, (weight, ring, sizes, False, spec)),
                (_copier, (x, ring, sizes, True, spec)),
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
                (_copier, (weight, ring, sizes, False, spec)),
                (_copier, (x, ring, sizes, True, spec)),
            ],
            [4, 4, 4, 1, 1],
            [team, team, team, 24, 24],
        )


@gluon.jit(do_not_specialize=["tokens", "span", "tiles", "token_tiles"])
def _ring_kernel(
    out_ptr: gl.tensor, out_scale_ptr: gl.tensor, x: tma.tensor_descriptor, x_scale_ptr: gl.tensor, weight: tma.tensor_descriptor,
    scale_ptr: gl.tensor, parts_ptr: gl.tensor, done_ptr: gl.tensor, tokens: gl.tensor, outputs: gl.tensor, span: gl.tensor,
    tiles: gl.tensor, token_tiles: gl.tensor, PER_TOKEN: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    gdc_launch_dependents()
    sizes, outs = (tokens, outputs, span, span, tiles, token_tiles), (out_ptr, out_scale_ptr, parts_ptr, done_ptr)
    _work(outs, (scale_ptr, x_scale_ptr), weight, x, _ring(x.dtype, spec), sizes, PER_TOKEN, spec)


def takes(values_TI: Tensor, weight_OI: Tensor) -> bool:
    """Return whether the copy engine can bring both operands."""
    return all(t.stride(1) == 1 and t.stride(0) % _ALIGNED == t.data_ptr() % _ALIGNED == 0 for t in (values_TI, weight_OI))


def idle(tile: RingTile, outputs: int, programs: int) -> float:
    """Return for how much of its time, over the least it could take, a product waits for those who take the last whole tiles."""
    tiles = blocks_of(outputs, tile.rows)
    return blocks_of(tiles, programs) * programs / tiles - 1


def launch_ring(
    out_TO: Tensor, values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, *tiles: RingTile
) -> None:
    """Multiply, cut as the first tile says, or the next where programs that take whole ones would idle too long."""
    _launch(out_TO, weight_scale_O1, values_TI, x_scale, weight_OI, weight_scale_O1, tiles)  # no scale of what comes out


def launch_ring_gated(
    out: QuantizedActivation, values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype,
    *tiles: RingTile,
) -> None:  # fmt: skip
    """Multiply, cut as `launch_ring` does, and activate, gate and up rounded to `dtype`."""
    gated = tuple(evolve(tile, gated=_DTYPES[dtype]) for tile in tiles)
    _launch(out.values_TI, out.scale, values_TI, x_scale, weight_OI, weight_scale_O1, gated)


def _launch(
    out_TX: Tensor, out_scale: Tensor, values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor,
    tiles: tuple[RingTile, ...],
) -> None:  # fmt: skip
    assert takes(values_TI, weight_OI), (values_TI.stride(), weight_OI.stride())
    (outputs, inputs), tokens, most = weight_OI.shape, len(values_TI), processors(values_TI.device)
    tile = next((each for each in tiles if each.shared or idle(each, outputs, most) <= _MOST_IDLE), tiles[-1])
    token_tiles, span = blocks_of(tokens, tile.tokens), blocks_of(inputs, tile.pieces * INPUTS)
    count = token_tiles * blocks_of(outputs, tile.rows)
    tile, programs = tile.given_out(count, span, most)
    parts = values_TI.new_empty(programs * tile.part_size if tile.shared else 1, dtype=torch.float32)
    weight = _described(weight_OI, tile.rows, tile) if tile.gated is None else described_gated(weight_OI, tile)
    launch(
        _ring_kernel, (programs,),
        out_TX, out_scale, _described(values_TI, tile.tokens, tile), x_scale, weight, weight_scale_O1, parts,
        counters(values_TI.device, count * tile.teams if tile.shared else 1), tokens, outputs, span, count, token_tiles,
        PER_TOKEN=int(x_scale.ndim > 0), spec=tile, num_warps=4, maxnreg=tile.most_registers, **DEPENDENT,
    )  # fmt: skip


def _described(operand_LI: Tensor, lines: int, tile: RingTile) -> TensorDescriptor:
    """Return an operand as the copy engine sees it: so many rows of 128 inputs at once."""
    return TensorDescriptor(operand_LI, list(operand_LI.shape), list(operand_LI.stride()), [lines, INPUTS], tile.operand)
