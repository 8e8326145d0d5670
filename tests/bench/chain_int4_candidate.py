"""A decode's products with INT4 weights one after the other in one launch: a candidate to time, on `ops_linear_int4`'s machinery.

As `chain_candidate` has FP8 ones, which says why; inputs are FP8 with a scale a token, found where they are made.

    o -> add_rms_norm_fp8 -> gate and up -> silu_mul_fp8 -> down -> add_rms_norm_fp8 -> q, k and v of the next layer

Who normalises a token finds its scale by itself. Activations are wide: all programs take slices of them, and meet once more, when
the largest magnitude of all slices is known.

T tokens, E embed, F feed-forward, Q outputs of q, k and v, I inputs of o; R rows of a tile, 64; N tokens of a tile.
"""

from __future__ import annotations

import torch
from attrs import evolve, frozen
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paddock.layers import QuantizedActivation
from paddock.layers.int4 import Int4Weight
from paddock_triton.attention_tuning import processors
from paddock_triton.counters import counters
from paddock_triton.dependence import DEPENDENT
from paddock_triton.int4_bringing import _copy_tokens, _copy_weight
from paddock_triton.int4_multiplying import _step_fp8, _step_two
from paddock_triton.int4_spec import Int4Spec, Int4Tile
from paddock_triton.launch import launch
from paddock_triton.linear_ring_gated import _to_fp8
from paddock_triton.ops_activation import silu_times
from paddock_triton.ops_linear_int4 import _FP8_DEEP, _described, _ring, _spec
from paddock_triton.ring import ALL_REGISTERS, ROWS, piece_of, steps_of
from paddock_triton.ring_parts import finish, gathered, gathering_of, nothing, store
from paddock_triton.rows import blocks_of, power_of_2
from tests.bench.chain_candidate import FLAGS, Norm, _count, _fence, _leave, _wait_for, normalise, token_scale

MOST_TOKENS = 16  # of deep tiles for all weights
SLOTS, SLICE = 9, 2048
# Counts, in the order of what is counted: tiles of o, normalised tokens, tiles of gate and up, slices whose largest is known,
# slices in FP8, tiles of down, normalised tokens, who needs none of these any longer; behind them each token's largest magnitude,
# whose zero has the same bits.
COUNTS = FLAGS + MOST_TOKENS
_COUNTS = gl.constexpr(COUNTS)


@gluon.jit
def _copy_stage(
    sources: gl.tuple, ring: gl.tuple, sizes: gl.tuple, m: gl.tensor, TOKENS: gl.constexpr, spec: gl.constexpr
) -> gl.tensor:
    """Copy a product's weights, or its tokens, from step m of the ring on; return the step after them."""
    _tokens, outputs, _blocks, _span, _tiles, _token_tiles = sizes
    first, count = steps_of(sizes, spec)
    lines = (outputs + ROWS - 1) // ROWS * 32  # of a block
    t = first * 0
    while t < count:
        tile, block, taken = piece_of(first, t, count, sizes, spec)
        for step in range(taken):
            if TOKENS:
                _copy_tokens(sources, ring, m + t + step, tile * 0, block + step, spec)
            else:
                line = (block + step) * spec.pieces * lines + tile * (spec.rows // 2)
                _copy_weight(sources, ring, m + t + step, tile * spec.rows, line, lines, block + step, spec)
        t += taken
    return m + count


@gluon.jit
def _weights(sources: gl.tuple, ring: gl.tuple, sizes: gl.tuple, chain: gl.constexpr) -> None:
    """Copy all weights, whatever their tokens do: one warp."""
    o: gl.constexpr = chain.o
    gate_up: gl.constexpr = chain.gate_up
    down: gl.constexpr = chain.down
    qkv: gl.constexpr = chain.qkv
    m = _copy_stage(sources[0], ring, sizes[0], gl.program_id(0) * 0, False, o)
    m = _copy_stage(sources[1], ring, sizes[1], m, False, gate_up)
    m = _copy_stage(sources[2], ring, sizes[2], m, False, down)
    _copy_stage(sources[3], ring, sizes[3], m, False, qkv)


@gluon.jit
def _tokens(
    sources: gl.tuple, ring: gl.tuple, sizes: gl.tuple, flags_ptr: gl.tensor, slices: gl.tensor, chain: gl.constexpr,
) -> None:  # fmt: skip
    """Copy all tokens, those of a product once all are there: one warp."""
    o: gl.constexpr = chain.o
    gate_up: gl.constexpr = chain.gate_up
    down: gl.constexpr = chain.down
    qkv: gl.constexpr = chain.qkv
    gdc_wait()
    tokens = sizes[0][0]
    m = _copy_stage(sources[0], ring, sizes[0], gl.program_id(0) * 0, True, o)
    _wait_for(flags_ptr + 1, tokens, chain.reads)
    _fence()
    m = _copy_stage(sources[1], ring, sizes[1], m, True, gate_up)
    _wait_for(flags_ptr + 4, slices, chain.reads)
    _fence()
    m = _copy_stage(sources[2], ring, sizes[2], m, True, down)
    _wait_for(flags_ptr + 6, tokens, chain.reads)
    _fence()
    _copy_stage(sources[3], ring, sizes[3], m, True, qkv)
    _leave(flags_ptr, 2 * gl.num_programs(0), _COUNTS)


@gluon.jit
def _stage(
    outs: gl.tuple, ring: gl.tuple, gathering: gl.tuple, sizes: gl.tuple, flag_ptr: gl.tensor, m: gl.tensor, n: gl.tensor,
    INDEX: gl.constexpr, COUNTED: gl.constexpr, spec: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Multiply what is this team's of a product, from step m and piece n on; return what comes after them."""
    first, count = steps_of(sizes, spec)
    t = first * 0
    while t < count:
        tile, block, taken = piece_of(first, t, count, sizes, spec)
        nothing_RN = nothing(spec)
        accs = (nothing_RN, nothing_RN, nothing_RN, nothing_RN)
        for step in range(m + t, m + t + taken):
            if spec.depth == 2:
                accs = _step_two(accs, ring, step, INDEX, spec)
            else:
                accs = _step_fp8(accs, ring, step, INDEX, spec)
        accs = gathered(accs, gathering, n, INDEX, spec)
        if INDEX == 0:
            finish(accs, outs, tile, block, taken, sizes, INDEX, store, spec)
            if COUNTED:  # noqa: SIM102
                if block == 0:
                    _count(flag_ptr)
        n += 1
        t += taken
    return m + count, n


@gluon.jit
def _activate(act: gl.tuple, flags_ptr: gl.tensor, tiles: gl.tensor, tokens: gl.tensor, chain: gl.constexpr) -> None:
    """Activate slices of gate and up once all tiles are there, then quantise them once every slice's largest is known: a team."""
    gate_up_ptr, h_ptr, a_ptr, scale_ptr, most_ptr, width, slices = act
    size: gl.constexpr = chain.slice
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    e_E = gl.arange(0, size, layout)
    each = slices // tokens
    _wait_for(flags_ptr + 2, tiles, chain.reads)
    unit = gl.program_id(0)
    while unit < slices:
        token, column_E = unit // each, unit % each * size + e_E
        inside_E = column_E < width
        at_E = gate_up_ptr + token * 2 * width + column_E
        gate_E = gl.load(at_E, mask=inside_E, other=0.0, cache_modifier=".cg").to(gl.float32)
        up_E = gl.load(at_E + width, mask=inside_E, other=0.0, cache_modifier=".cg").to(gl.float32)
        h_E = silu_times(gate_E, up_E, h_ptr.dtype.element_ty)
        gl.store(h_ptr + token * width + column_E, h_E, mask=inside_E)
        gl.atomic_max(most_ptr + token, gl.max(gl.abs(h_E.to(gl.float32)), 0), sem="relaxed")
        _count(flags_ptr + 3)
        unit += gl.num_programs(0)
    _wait_for(flags_ptr + 3, slices, chain.reads)
    unit = gl.program_id(0)
    while unit < slices:
        token, column_E = unit // each, unit % each * size + e_E
        inside_E = column_E < width
        scale = token_scale(gl.load(most_ptr + token, cache_modifier=".cg"))
        h_E = gl.load(h_ptr + token * width + column_E, mask=inside_E, other=0.0)
        gl.store(a_ptr + token * width + column_E, _to_fp8(h_E.to(gl.float32), scale), mask=inside_E)
        gl.store(scale_ptr + token, scale)
        _count(flags_ptr + 4)
        unit += gl.num_programs(0)


@gluon.jit
def _team(
    outs: gl.tuple, norms: gl.tuple, act: gl.tuple, ring: gl.tuple, gathering: gl.tuple, sizes: gl.tuple, flags_ptr: gl.tensor,
    INDEX: gl.constexpr, chain: gl.constexpr,
) -> None:  # fmt: skip
    """Multiply a team's part of all products; the second normalises and activates in between."""
    o: gl.constexpr = chain.o
    gate_up: gl.constexpr = chain.gate_up
    down: gl.constexpr = chain.down
    qkv: gl.constexpr = chain.qkv
    gdc_wait()
    tokens = sizes[0][0]
    zero, mine = gl.program_id(0) * 0, gl.program_id(0) < tokens
    m, n = _stage(outs[0], ring, gathering, sizes[0], flags_ptr, zero, zero, INDEX, True, o)
    if INDEX == 1:  # noqa: SIM102
        if mine:
            normalise(norms[0], flags_ptr, sizes[0][4], 0, chain)
    m, n = _stage(outs[1], ring, gathering, sizes[1], flags_ptr + 2, m, n, INDEX, True, gate_up)
    if INDEX == 1:
        _activate(act, flags_ptr, sizes[1][4], tokens, chain)
    m, n = _stage(outs[2], ring, gathering, sizes[2], flags_ptr + 5, m, n, INDEX, True, down)
    if INDEX == 1:  # noqa: SIM102
        if mine:
            normalise(norms[1], flags_ptr, sizes[2][4], 5, chain)
    _stage(outs[3], ring, gathering, sizes[3], flags_ptr, m, n, INDEX, False, qkv)
    if INDEX == 1:
        _leave(flags_ptr, 2 * gl.num_programs(0), _COUNTS)


@gluon.jit
def _work(
    outs: gl.tuple, norms: gl.tuple, act: gl.tuple, sources: gl.tuple, ring: gl.tuple, sizes: gl.tuple, flags_ptr: gl.tensor,
    chain: gl.constexpr,
) -> None:  # fmt: skip
    """Give each warp its role."""
    o: gl.constexpr = chain.o
    team: gl.constexpr = o.team_registers
    gathering = gathering_of(ring, o)
    fence_async_shared()  # the copy engine is to see the barriers as they begin
    gl.warp_specialize(
        [
            (_team, (outs, norms, act, ring, gathering, sizes, flags_ptr, 0, chain)),
            (_team, (outs, norms, act, ring, gathering, sizes, flags_ptr, 1, chain)),
            (_team, (outs, norms, act, ring, gathering, sizes, flags_ptr, 2, chain)),
            (_team, (outs, norms, act, ring, gathering, sizes, flags_ptr, 3, chain)),
            (_weights, (sources, ring, sizes, chain)),
            (_tokens, (sources, ring, sizes, flags_ptr, act[6], chain)),
        ],
        [4, 4, 4, 1, 1],
        [team, team, team, 24, 24],
    )


@gluon.jit(do_not_specialize=["tokens", "slices", *(f"{size}_{product}" for size in ("span", "tiles") for product in "ogdq")])
def _chain_kernel(
    packed_o: tma.tensor_descriptor, scales_o: tma.tensor_descriptor, zeros_o: tma.tensor_descriptor, x: tma.tensor_descriptor,
    packed_g: tma.tensor_descriptor, scales_g: tma.tensor_descriptor, zeros_g: tma.tensor_descriptor, h: tma.tensor_descriptor,
    packed_d: tma.tensor_descriptor, scales_d: tma.tensor_descriptor, zeros_d: tma.tensor_descriptor, a: tma.tensor_descriptor,
    packed_q: tma.tensor_descriptor, scales_q: tma.tensor_descriptor, zeros_q: tma.tensor_descriptor,
    next_h: tma.tensor_descriptor,
    x_scale_ptr: gl.tensor, h_scale_ptr: gl.tensor, a_scale_ptr: gl.tensor, next_scale_ptr: gl.tensor,
    delta_ptr: gl.tensor, residual_ptr: gl.tensor, norm_ptr: gl.tensor, total_ptr: gl.tensor, h_ptr: gl.tensor,
    gate_up_ptr: gl.tensor, activated_ptr: gl.tensor, a_ptr: gl.tensor, most_ptr: gl.tensor, down_ptr: gl.tensor,
    next_norm_ptr: gl.tensor, next_total_ptr: gl.tensor, next_h_ptr: gl.tensor, q_ptr: gl.tensor, parts_ptr: gl.tensor,
    done_ptr: gl.tensor, flags_ptr: gl.tensor, eps: gl.tensor, tokens: gl.tensor, slices: gl.tensor, embed: gl.tensor,
    gates: gl.tensor, outputs: gl.tensor,
    span_o: gl.tensor, tiles_o: gl.tensor, span_g: gl.tensor, tiles_g: gl.tensor, span_d: gl.tensor, tiles_d: gl.tensor,
    span_q: gl.tensor, tiles_q: gl.tensor, chain: gl.constexpr,
) -> None:  # fmt: skip
    gdc_launch_dependents()
    o: gl.constexpr = chain.o
    sizes = (
        (tokens, embed, span_o, span_o, tiles_o, 1), (tokens, gates, span_g, span_g, tiles_g, 1),
        (tokens, embed, span_d, span_d, tiles_d, 1), (tokens, outputs, span_q, span_q, tiles_q, 1),
    )  # fmt: skip
    outs = (
        (delta_ptr, x_scale_ptr, parts_ptr, done_ptr), (gate_up_ptr, h_scale_ptr, parts_ptr, done_ptr),
        (down_ptr, a_scale_ptr, parts_ptr, done_ptr), (q_ptr, next_scale_ptr, parts_ptr, done_ptr),
    )  # fmt: skip
    norms = (
        (delta_ptr, residual_ptr, norm_ptr, total_ptr, h_ptr, h_scale_ptr, embed, eps),
        (down_ptr, total_ptr, next_norm_ptr, next_total_ptr, next_h_ptr, next_scale_ptr, embed, eps),
    )
    act = (gate_up_ptr, activated_ptr, a_ptr, a_scale_ptr, most_ptr, gates // 2, slices)
    sources = (
        (packed_o, scales_o, zeros_o, x, x, x), (packed_g, scales_g, zeros_g, h, h, h),
        (packed_d, scales_d, zeros_d, a, a, a), (packed_q, scales_q, zeros_q, next_h, next_h, next_h),
    )  # fmt: skip
    _work(outs, norms, act, sources, _ring(scales_o.dtype, x.dtype, o), sizes, flags_ptr, chain)


@frozen(kw_only=True)
class Int4Chain:
    """How each product is cut, all of deep tiles; the ring is that of `o`."""

    o: Int4Spec
    gate_up: Int4Spec
    down: Int4Spec
    qkv: Int4Spec
    norm_width: int  # a power of two that E is no more than
    slice: int  # features of gate and up that are activated at once
    reads: bool = False  # how who waits for a count asks for it

    per_token = True  # inputs have scales of their own


def chain_of(
    tokens: int, weights: tuple[Int4Weight, ...], *, shared: bool = True, slots: int = SLOTS, depth: int = 1, reads: bool = False
) -> Int4Chain:
    """Return how the products of so many tokens are cut."""
    tile: Int4Tile = next(tile for most, tile in _FP8_DEEP.items() if tokens <= most)
    tile = evolve(tile, shared=shared, slots=slots, depth=depth, registers=ALL_REGISTERS)
    o, gate_up, down, qkv = (_spec(tile, weight, fp8=True) for weight in weights)
    width = power_of_2(weights[0].form.outputs)
    return Int4Chain(o=o, gate_up=gate_up, down=down, qkv=qkv, norm_width=width, slice=SLICE, reads=reads)


def launch_chain(
    x: QuantizedActivation, residual_TE: Tensor, norms: tuple[Norm, Norm], weights: tuple[Int4Weight, ...],
    chain: Int4Chain | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (the sums with the residual behind o and behind down [T, E], q, k and v [T, Q]).

    Weights are of o, gate and up, down, q k and v.
    """
    tokens, device, (embed, gates, _, outputs) = len(x.values_TI), residual_TE.device, [each.form.outputs for each in weights]
    chain, (norm, next_norm) = chain or chain_of(tokens, weights), norms
    assert 0 < tokens <= chain.o.tokens <= MOST_TOKENS, tokens
    assert all(spec.deep for spec in (chain.o, chain.gate_up, chain.down, chain.qkv)), chain
    delta_TE, total_TE, down_TE, next_total_TE = (torch.empty_like(residual_TE) for _ in range(4))
    h_TE, next_h_TE = (torch.empty_like(residual_TE, dtype=x.values_TI.dtype) for _ in range(2))
    gate_up_TO, h_TF = residual_TE.new_empty(tokens, gates), residual_TE.new_empty(tokens, gates // 2)
    a_TF, q_TQ = x.values_TI.new_empty(tokens, gates // 2), residual_TE.new_empty(tokens, outputs)
    h_scale_T1, a_scale_T1, next_scale_T1 = x.scale.new_empty(3, tokens, 1)
    programs, slices = processors(device), tokens * blocks_of(gates // 2, chain.slice)
    assert tokens <= programs, (tokens, programs)
    parts = residual_TE.new_empty(programs * chain.o.part_size, dtype=torch.float32)
    tiles = [blocks_of(each.form.outputs, chain.o.rows) for each in weights]
    steps = [blocks_of(each.form.blocks, chain.o.pieces) for each in weights]
    counted = counters(device, max(tiles) * chain.o.teams + COUNTS)
    inputs = (x.values_TI, h_TE, a_TF, next_h_TE)
    described = [_described(*pair, None, chain.o)[:4] for pair in zip(weights, inputs, strict=True)]
    launch(
        _chain_kernel, (programs,),
        *(each for stage in described for each in stage), x.scale, h_scale_T1, a_scale_T1, next_scale_T1,
        delta_TE, residual_TE, norm.weight_E, total_TE, h_TE, gate_up_TO, h_TF, a_TF,
        counted[FLAGS:COUNTS].view(torch.float32), down_TE, next_norm.weight_E, next_total_TE, next_h_TE, q_TQ,
        parts, counted[COUNTS :], counted[:COUNTS], norm.eps, tokens, slices, embed, gates, outputs,
        *(size for pair in zip(steps, tiles, strict=True) for size in pair),
        chain=chain, num_warps=4, maxnreg=chain.o.most_registers, **DEPENDENT,
    )  # fmt: skip
    return total_TE, next_total_TE, q_TQ
