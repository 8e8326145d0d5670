"""Products with INT4 weights, for Hopper's matrix unit, in Gluon: codes become its register operand where they are multiplied.

A program is two warps that have the copy engine bring operands and teams of four warps that multiply (`int4_bringing`,
`int4_multiplying`). Inputs in 16 bits take code - zero, exact in them; FP8 inputs take the codes as they are, four by a mask, and
zero points leave the sums. Each group's products are added up in float32 and multiplied by its scale there.

T tokens, I input and O output features, G groups of inputs; B, S, N, F, P as `paddock.layers.int4` says.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from attrs import evolve
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from paddock.layers import reference
from paddock.layers.int4 import Int4Weight
from paddock_triton.attention_async import runs_on
from paddock_triton.attention_tuning import processors
from paddock_triton.counters import counters
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.int4_bringing import token_copier, weight_copier
from paddock_triton.int4_multiplying import multiplier
from paddock_triton.int4_spec import LATE_GROUPS, LATE_SLOTS, Int4Spec, Int4Tile
from paddock_triton.launch import launch, launches_nothing
from paddock_triton.plugin import INT4_GROUPS
from paddock_triton.ring import ROWS, STEP, barriers
from paddock_triton.ring_parts import gathering_of
from paddock_triton.rows import aligned, blocks_of

_JOIN_BYTES = 8e6  # of codes that are read while parts of a tile meet: 2 us
# By the most tokens. `python -m tests.bench.int4_variants` times them; on an H200, microseconds with zero points, groups of 128:
# 1 token, 8192 -> 8192: deep, whole tiles 11.8, shared 12.1; not deep 13.5. 8192 -> 57344: 61.6, 65.5, 63.8; 8192 -> 10240: 17.4,
# 15.4, 15.9; 28672 -> 8192: 33.6, 35.7, 36.9; 14848 -> 59392: not deep 114.0, deep and shared 118.3.
# 32 tokens, 8192 -> 8192: deep, whole tiles 14.2, not deep 20.9, late 25.9; 8192 -> 57344: 79.6, 73.6, 73.7.
# 64 tokens, 8192 -> 8192: deep, whole tiles 18.5, late with 4 teams 24.6, 2 halves 25.4; 8192 -> 57344: 118.6, 88.7, 96.7;
# 59392 -> 14848: 199.6, 155.4, 165.3.
# 128 tokens, 8192 -> 8192: 1 half 28.7, 2 halves 33.4; 8192 -> 57344: 129.8, 129.4; 14848 -> 59392: 234.5, 223.2.
# 256 tokens, 14848 -> 59392: 407.0, 128 at a time in 2 halves 421.7, in 1 461.9, whole tiles 565.6.
# 4,096 tokens, shared in waves, 8192 -> 57344: 3,772, 59392 -> 14848: 7,618; all shared 4,676, 8,750; whole tiles 4,710, 8,366.
# 512 tokens, 8192 -> 10240: 97, 14848 -> 59392: 836; all shared 91, 805. 128 at a time, 8192 -> 57344: 459; all shared 489.
# Zero points taken off in each step cost 10 to 20 percent from 64 tokens on. Fewer registers are quicker by 2 percent among a
# layer's other kernels, by nothing alone: a norm's program need not end before the next product's can begin beside it.
_SPARING = 1536  # registers
_FP8 = {
    8: Int4Tile(tokens=8, teams=4, slots=6, registers=_SPARING),
    16: Int4Tile(tokens=16, teams=4, slots=6, registers=_SPARING),
    32: Int4Tile(tokens=32, teams=4, slots=6),
    64: Int4Tile(tokens=64, teams=4, slots=5, late=True),
    128: Int4Tile(tokens=128, teams=2, halves=2, slots=4, late=True),
    256: Int4Tile(tokens=256, teams=2, cuts=2, slots=4, late=True),
}
# Where whole tiles of 64 outputs keep all multiprocessors busy; of more than 16 tokens for few outputs only.
_FP8_DEEP = {
    8: Int4Tile(tokens=8, teams=4, slots=6, deep=True, shared=False, registers=_SPARING),
    16: Int4Tile(tokens=16, teams=4, slots=6, deep=True, shared=False, registers=_SPARING),
    32: Int4Tile(tokens=32, teams=4, slots=4, deep=True, shared=False),
    64: Int4Tile(tokens=64, teams=4, slots=3, deep=True, shared=False),
}
_FEW_OUTPUTS, _FEWER_OUTPUTS = 16384, 12288  # below the latter deep tiles are quicker even where they are shared
_FP8_MANY = _FP8[256]
_FP8_MANY_NARROW = Int4Tile(tokens=128, teams=2, slots=6, late=True)
_FP8_WAVES, _FP8_WAVES_NARROW = evolve(_FP8_MANY, waves=True), evolve(_FP8_MANY_NARROW, waves=True)
_MOST_IDLE = 0.05  # of the time that whole tiles take: what sharing them costs in large products of 16-bit inputs
_IN_STEP = 512  # tokens beyond which waves were the quicker
_MOST_FILLED = 1.06  # of the tokens that narrow tiles compute: wide ones are that much quicker
_FP8_OTHER_GROUPS = Int4Tile(tokens=64, teams=2, slots=6)
# 16-bit inputs, 8192 -> 57344: 1 token 70.5, not deep 72.2 (8192 -> 8192 13.9, 18.2); 8 tokens 98.6, 16 107.5, 32 104.2,
# 64 135.8, 128 198.8, 4,096 6,133: 628 TFLOP/s. 256 tokens, 8192 -> 10240: 129.0, in waves 90.5; 59392 -> 14848: 942, 770; 4,096,
# 8192 -> 8192: 885, 981; 59392 -> 14848: 13,350, 14,214.
_HALVES = {
    8: Int4Tile(tokens=8, teams=4, slots=6, deep=True),
    16: Int4Tile(tokens=16, teams=4, slots=6),
    32: Int4Tile(tokens=32, teams=4, slots=5),
    64: Int4Tile(tokens=64, teams=4, slots=4),
    128: Int4Tile(tokens=128, teams=2, slots=4),
}
_HALVES_MANY = Int4Tile(tokens=128, teams=2, slots=4, shared=False)
_HALVES_WAVES = evolve(_HALVES_MANY, shared=True, waves=True)
# Tiles of more than 256 tokens in FP8, or 128 in 16 bits. Where kernels are compiled ahead a kind is asked for together,
# so that a step of another size compiles none amid serving.
_MANY_FP8, _MANY_HALVES = (_FP8_MANY, _FP8_WAVES, _FP8_WAVES_NARROW), (_HALVES_MANY, _HALVES_WAVES)


@named("linear_int4")
def linear_int4(x_TI: Tensor, weight: Int4Weight) -> Tensor:
    """Return x W^T [T, O] in x's dtype: the sum of x * (code - zero) * scale in float32, rounded once."""
    tokens = x_TI.shape[0]
    out_TO = x_TI.new_empty(tokens, weight.form.outputs)
    if not _serves(x_TI, weight):
        return out_TO if launches_nothing() else reference.linear_int4(x_TI, weight)
    if tokens:
        for tile in _asked_for(_halves_tile(tokens, weight)):
            launch_int4(out_TO, x_TI, None, weight, tile)
    return out_TO


@named("linear_int4_fp8")
def linear_int4_fp8(values_TI: Tensor, scale_T1: Tensor, weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return x W^T [T, O] in `dtype` for x in FP8 e4m3 with a float32 scale a token: scale_T * sum over groups of scale * s.

    s is a group's sum of values * (code - zero), of products in FP8, added up in float32.
    """
    tokens = values_TI.shape[0]
    out_TO = values_TI.new_empty((tokens, weight.form.outputs), dtype=dtype)
    if not _serves(values_TI, weight):
        return out_TO if launches_nothing() else reference.linear_int4_fp8(values_TI, scale_T1, weight, dtype)
    if tokens:
        for tile in _asked_for(_fp8_tile(tokens, weight)):
            launch_int4(out_TO, values_TI, scale_T1.contiguous(), weight, tile)
    return out_TO


def _serves(x_TI: Tensor, weight: Int4Weight) -> bool:
    """Return whether the kernel is for this device and this size of groups; others run in plain torch, as plans say."""
    group = weight.form.group
    return runs_on(x_TI.device) and (group in INT4_GROUPS or group % STEP.value == 0)


def _asked_for(tile: Int4Tile) -> tuple[Int4Tile, ...]:
    """Return the tile, or where kernels are compiled ahead and it is for many tokens, those for any number of them."""
    many = next((many for many in (_MANY_FP8, _MANY_HALVES) if tile in many), None)
    return (tile,) if many is None or not launches_nothing() else many


def _halves_tile(tokens: int, weight: Int4Weight) -> Int4Tile:
    """Return the tile for 16-bit inputs; a deep one shares tiles only where that is the quicker."""
    tile = next((tile for most, tile in _HALVES.items() if tokens <= most), None)
    if tile is None:
        return _HALVES_WAVES if _idle(_HALVES_MANY, tokens, weight) > _MOST_IDLE else _HALVES_MANY
    if weight.form.group != STEP.value:
        return evolve(tile, deep=False)
    return evolve(tile, shared=not _whole_tiles_are_quicker(weight)) if tile.deep else tile


def _fp8_tile(tokens: int, weight: Int4Weight) -> Int4Tile:
    """Return the tile for FP8 inputs."""
    most = next((most for most in _FP8 if tokens <= most), None)
    if weight.form.group != STEP.value:
        return _FP8[most] if most is not None and most < _FP8_OTHER_GROUPS.tokens else _FP8_OTHER_GROUPS
    if most is None:
        wide, narrow = (blocks_of(tokens, tile.tokens) * tile.tokens for tile in (_FP8_MANY, _FP8_MANY_NARROW))
        if wide > _MOST_FILLED * narrow:
            return _FP8_WAVES_NARROW
        return _FP8_WAVES if tokens > _IN_STEP else _FP8_MANY
    if most == _FP8_MANY_NARROW.tokens and weight.form.outputs <= _FEW_OUTPUTS:
        return _FP8_MANY_NARROW
    if most in _FP8_DEEP and (most <= 16 or weight.form.outputs <= _FEW_OUTPUTS) and _whole_tiles_are_quicker(weight):
        return _FP8_DEEP[most]
    if most <= 16 and weight.form.outputs <= _FEWER_OUTPUTS:
        return evolve(_FP8_DEEP[most], shared=True)
    return _FP8[most]


def _whole_tiles_are_quicker(weight: Int4Weight) -> bool:
    """Return whether programs that take whole deep tiles of few tokens idle for less than it takes parts of tiles to meet."""
    return _idle(_FP8_DEEP[8], 1, weight) * weight.packed.nbytes <= _JOIN_BYTES


def _idle(tile: Int4Tile, tokens: int, weight: Int4Weight) -> float:
    """Return for how much of its time, over the least it could take, a product waits for those who take the last whole tiles."""
    rows = ROWS.value if tile.deep else ROWS.value * tile.teams * tile.halves
    tiles, programs = blocks_of(weight.form.outputs, rows) * blocks_of(tokens, tile.tokens), processors(weight.packed.device)
    return blocks_of(tiles, programs) * programs / tiles - 1


def launch_int4(out_TO: Tensor, x_TI: Tensor, scale_T1: Tensor | None, weight: Int4Weight, tile: Int4Tile) -> None:
    """Multiply, cut as `tile` says; with `scale_T1`, whose scales lie side by side, x is FP8."""
    form, x_TI = weight.form, aligned(x_TI)
    assert x_TI.shape[1] == form.inputs, (x_TI.shape, form)
    assert x_TI.element_size() == (2 if scale_T1 is None else 1), x_TI.dtype
    spec = _spec(tile, weight, fp8=scale_T1 is not None)
    tokens, token_tiles = len(x_TI), blocks_of(len(x_TI), spec.tokens)
    tiles = token_tiles * blocks_of(form.outputs, spec.rows)
    steps = blocks_of(form.blocks, spec.pieces)
    span = steps + (blocks_of(form.group_rows, LATE_GROUPS.value) if spec.late else 0)
    programs = min(processors(x_TI.device), tiles * (span if spec.shared else 1))
    parts = x_TI.new_empty(programs * spec.part_size if spec.shared else 1, dtype=torch.float32)
    if spec.wide:
        x_TI = _turned(x_TI)
    sums = _sums(x_TI, form.blocks) if spec.late else None
    launch(
        _int4_kernel, (programs,),
        out_TO, *_described(weight, x_TI, sums, spec), out_TO if scale_T1 is None else scale_T1, parts,
        counters(x_TI.device, _shared_tiles(tiles, programs, spec) * spec.teams), tokens, form.outputs, steps, span, tiles,
        token_tiles, spec=spec, num_warps=4, maxnreg=spec.most_registers, **DEPENDENT,
    )  # fmt: skip


def _shared_tiles(tiles: int, programs: int, spec: Int4Spec) -> int:
    """Return how many tiles have parts, the last ones."""
    return (tiles % programs if spec.waves else tiles) if spec.shared else 0


def _spec(tile: Int4Tile, weight: Int4Weight, *, fp8: bool) -> Int4Spec:
    zeros, scale_bytes = weight.zeros is not None, weight.scales.element_size()
    return Int4Spec(tile=tile, fp8=fp8, zeros=zeros, group=weight.form.group, scale_bytes=scale_bytes)


def _described(weight: Int4Weight, x_TI: Tensor, sums: Tensor | None, spec: Int4Spec) -> tuple[TensorDescriptor, ...]:
    """Return operands as the copy engine sees them: codes, scales, zeros, x, sums, and a late step's scales."""
    packed = _descriptor(weight.packed.view(-1, STEP.value), (spec.rows // 2, STEP.value), spec.packed_shared)
    scales = _descriptor(weight.scales, (spec.row_groups, spec.rows), spec.scales_shared)
    zeros = summed = late_scales = packed
    if weight.zeros is not None and spec.late:
        zeros = _descriptor(weight.zeros, (LATE_GROUPS.value, ROWS.value // 2), spec.late_zeros_shared)
    elif weight.zeros is not None:
        zeros = _descriptor(weight.zeros, (spec.row_groups, spec.zero_columns), spec.zeros_shared)
    if sums is not None:
        summed = _descriptor(sums, (spec.tokens, LATE_GROUPS.value), spec.late_sums_shared)
        late_scales = _descriptor(weight.scales, (LATE_GROUPS.value, spec.rows), spec.late_scales_shared)
    return packed, scales, zeros, _descriptor(x_TI, (spec.tokens, spec.inputs), spec.x_shared), summed, late_scales


def _descriptor(tensor: Tensor, box: tuple[int, int], layout: Any) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout)


def _sums(values_TI: Tensor, blocks: int) -> Tensor:
    """Return the sums of each group's values [2 T, G] as bfloat16 and, below it, what that leaves."""
    tokens, inputs = values_TI.shape
    groups, block = blocks_of(blocks, LATE_GROUPS.value) * LATE_GROUPS.value, 16
    sums = values_TI.new_empty((2 * tokens, groups), dtype=torch.bfloat16)
    launch(
        _sums_kernel, (tokens, blocks_of(groups, block)), values_TI, sums, inputs, values_TI.stride(0), groups, tokens,
        BLOCK_G=block, GROUP=STEP.value, num_warps=4, **DEPENDENT,
    )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["inputs", "x_stride", "groups", "tokens"])
def _sums_kernel(
    values_ptr: tl.tensor, sums_ptr: tl.tensor, inputs: tl.tensor, x_stride: tl.tensor, groups: tl.tensor, tokens: tl.tensor,
    BLOCK_G: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Write the sums of some groups of a token's values."""
    start_next()
    token, group_G = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    input_GK = group_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    wait()
    value_GK = tl.load(values_ptr + token * x_stride + input_GK, mask=input_GK < inputs, other=0.0)
    sum_G = tl.sum(value_GK.to(tl.float32), 1)
    high_G = sum_G.to(tl.bfloat16)
    at_G = sums_ptr + token * groups + group_G
    tl.store(at_G, high_G)
    tl.store(at_G + tokens.to(tl.int64) * groups, (sum_G - high_G.to(tl.float32)).to(tl.bfloat16))


def _turned(x_TI: Tensor) -> Tensor:
    """Return x with each sixteen inputs in the order of the codes' operand: of 4 t + 2 b + e, with b and e 0 or 1, b first."""
    tokens, inputs = x_TI.shape
    turned_TI, block = x_TI.new_empty(tokens, inputs), 1024
    launch(
        _turn_kernel, (tokens, blocks_of(inputs, block)), x_TI, turned_TI, inputs, x_TI.stride(0), BLOCK_I=block, num_warps=4,
        **DEPENDENT,
    )  # fmt: skip
    return turned_TI


@triton.jit(do_not_specialize=["inputs", "x_stride"])
def _turn_kernel(x_ptr: tl.tensor, turned_ptr: tl.tensor, inputs: tl.tensor, x_stride: tl.tensor, BLOCK_I: tl.constexpr) -> None:
    """Write some of a token's inputs in the order of `_turned`; inputs are a multiple of 16."""
    start_next()
    token, at_I = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    from_I = at_I // 16 * 16 + at_I % 8 // 2 * 4 + at_I // 8 % 2 * 2 + at_I % 2
    wait()
    x_I = tl.load(x_ptr + token * x_stride + from_I, mask=from_I < inputs, other=0.0)
    tl.store(turned_ptr + token * inputs + at_I, x_I, mask=at_I < inputs)


@gluon.jit
def _ring(scales_dtype: gl.constexpr, x_dtype: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the slots of steps: codes, scales, zero points, x; barriers of those who copy and multiply."""
    slots: gl.constexpr = spec.slots
    teams: gl.constexpr = spec.teams
    zero_slots: gl.constexpr = slots if spec.zeros and not spec.late else 1
    packed_BCJ = gl.allocate_shared_memory(gl.uint8, [slots * spec.pieces, spec.rows // 2, STEP], spec.packed_shared)
    scales_BGR = gl.allocate_shared_memory(scales_dtype, [slots, spec.row_groups, spec.rows], spec.scales_shared)
    zeros_BGC = gl.allocate_shared_memory(gl.uint8, [zero_slots, spec.row_groups, spec.zero_columns], spec.zeros_shared)
    x_BNK = gl.allocate_shared_memory(x_dtype, [slots * spec.row_groups, spec.tokens, spec.inputs], spec.x_shared)
    return packed_BCJ, scales_BGR, zeros_BGC, x_BNK, barriers(slots, 2), barriers(slots, teams)


@gluon.jit
def _late_ring(scales_dtype: gl.constexpr, ring: gl.tuple, spec: gl.constexpr) -> gl.tuple:
    """Return the slots of late steps: scales, zero points, planes of sums, barriers; anything where there are none."""
    late = ring
    if spec.late:
        halves: gl.constexpr = spec.teams * spec.halves
        teams: gl.constexpr = spec.teams
        late = (
            gl.allocate_shared_memory(scales_dtype, [LATE_SLOTS, LATE_GROUPS, spec.rows], spec.late_scales_shared),
            gl.allocate_shared_memory(gl.uint8, [LATE_SLOTS * halves, LATE_GROUPS, ROWS // 2], spec.late_zeros_shared),
            gl.allocate_shared_memory(gl.bfloat16, [LATE_SLOTS * 2, spec.tokens, LATE_GROUPS], spec.late_sums_shared),
            barriers(LATE_SLOTS, 2),
            barriers(LATE_SLOTS, teams),
        )
    return late


@gluon.jit
def _work(
    outs: gl.tuple, sources: gl.tuple, ring: gl.tuple, late: gl.tuple, gathering: gl.tuple, sizes: gl.tuple, spec: gl.constexpr
) -> None:
    """Give each warp its role."""
    team: gl.constexpr = spec.team_registers
    if spec.teams == 2:
        gl.warp_specialize(
            [
                (multiplier, (outs, ring, late, gathering, sizes, 0, spec)),
                (multiplier, (outs, ring, late, gathering, sizes, 1, spec)),
                (weight_copier, (sources, ring, late, sizes, spec)),
                (token_copier, (sources, ring, late, sizes, spec)),
            ],
            [4, 1, 1],
            [team, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (multiplier, (outs, ring, late, gathering, sizes, 0, spec)),
                (multiplier, (outs, ring, late, gathering, sizes, 1, spec)),
                (multiplier, (outs, ring, late, gathering, sizes, 2, spec)),
                (multiplier, (outs, ring, late, gathering, sizes, 3, spec)),
                (weight_copier, (sources, ring, late, sizes, spec)),
                (token_copier, (sources, ring, late, sizes, spec)),
            ],
            [4, 4, 4, 1, 1],
            [team, team, team, 24, 24],
        )


@gluon.jit(do_not_specialize=["tokens", "blocks", "span", "tiles", "token_tiles"])
def _int4_kernel(
    out_ptr: gl.tensor, packed: tma.tensor_descriptor, scales: tma.tensor_descriptor, zeros: tma.tensor_descriptor,
    x: tma.tensor_descriptor, sums: tma.tensor_descriptor, late_scales: tma.tensor_descriptor, x_scale_ptr: gl.tensor,
    parts_ptr: gl.tensor, done_ptr: gl.tensor, tokens: gl.tensor, outputs: gl.tensor, blocks: gl.tensor, span: gl.tensor,
    tiles: gl.tensor, token_tiles: gl.tensor, spec: gl.constexpr,
) -> None:  # fmt: skip
    gdc_launch_dependents()
    sizes = (tokens, outputs, blocks, span, tiles, token_tiles)
    sources, outs = (packed, scales, zeros, x, sums, late_scales), (out_ptr, x_scale_ptr, parts_ptr, done_ptr)
    ring = _ring(scales.dtype, x.dtype, spec)
    late = _late_ring(scales.dtype, ring, spec)
    gathering = gathering_of(ring, spec)
    fence_async_shared()  # the copy engine is to see the barriers as they begin
    _work(outs, sources, ring, late, gathering, sizes, spec)
