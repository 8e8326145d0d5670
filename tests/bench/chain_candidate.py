"""A decode's products one after the other in one launch: a candidate to time, on the machinery of `linear_ring`.

Between two products memory idles for some 2 us: a program's ring fills the shared memory, so the next kernel's cannot begin
before it ends, and then has to start. Here programs stay. The warp that copies weights goes on with the next product's while the
last sums of this one are still on their way; what a product waits for, its tokens, takes about as long as a ring lasts.

    o -> add_rms_norm_fp8 -> gate and up, activated in FP8 -> down [-> add_rms_norm_fp8 -> q, k and v of the next layer]

A product's tiles are counted as they are written. Program t normalises token t once all are there, by its second team, which
finishes no tiles; who copies tokens waits for the count of what it copies. All programs of a launch must run at once: there are
no more than multiprocessors. The last of those that have counted sets all counts to zero, for the next launch.

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

from paddock_triton.attention_tuning import processors
from paddock_triton.counters import counters
from paddock_triton.dependence import DEPENDENT
from paddock_triton.launch import launch
from paddock_triton.linear_ring import _DTYPES as DTYPES
from paddock_triton.linear_ring import _copy, _described, _ring, _row_scales, _step, _token_scales, tile_for
from paddock_triton.linear_ring_gated import _to_fp8, described_gated, store_gated
from paddock_triton.linear_ring_spec import RingTile
from paddock_triton.ring import ALL_REGISTERS, piece_of, role_barrier, steps_of
from paddock_triton.ring_parts import finish, gathered, gathering_of, nothing, store
from paddock_triton.rows import blocks_of, power_of_2

MOST_TOKENS = 32  # that products up to so many cut alike
FLAGS = 8  # counts: tiles of a product or normalised tokens in the order they are made, the last who needs them no longer
_COUNTS, _GONE = gl.constexpr(FLAGS), gl.constexpr(FLAGS - 1)
_MIN_SCALE = gl.constexpr(1.0 / (448.0 * 512.0))


@gluon.jit
def _fence() -> None:
    """Have what this thread wrote seen by copy engines, and what it knows of others' writing too."""
    dummy = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise("fence.proxy.async; mov.b32 $0, $1;", "=r,r", [dummy], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _fence_team() -> None:
    """Do so for each of a team's threads."""
    dummy = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise("fence.proxy.async; mov.b32 $0, $1;", "=r,r", [dummy], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _count(flag_ptr: gl.tensor) -> None:
    """Count what a team has written."""
    _fence_team()
    role_barrier()
    gl.atomic_add(flag_ptr, 1, sem="release")


@gluon.jit
def _wait_for(flag_ptr: gl.tensor, wanted: gl.tensor, READS: gl.constexpr) -> None:
    """Return once so much has been counted: asked for by atomic sums, or, where it READS, by plain reads until one will do."""
    if READS:
        while gl.load(flag_ptr, volatile=True) < wanted:
            pass
    while gl.atomic_add(flag_ptr, 0, sem="acquire") < wanted:
        pass


@gluon.jit
def _ask_for(ptr: gl.tensor, e_E: gl.tensor) -> None:
    """Bring what lies at these places into the L2 cache, without waiting for it."""
    at_E = (ptr + e_E).to(gl.int64)
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at_E], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _leave(flags_ptr: gl.tensor, all_of_them: gl.tensor, COUNTS: gl.constexpr) -> None:
    """Say that this role looks at no count any more; the last of all sets so many to zero."""
    if gl.atomic_add(flags_ptr + _GONE, 1, sem="acq_rel") == all_of_them - 1:
        for flag in gl.static_range(COUNTS):
            gl.store(flags_ptr + flag, 0)


@gluon.jit
def _copy_stage(
    source: tma.tensor_descriptor, ring: gl.tuple, sizes: gl.tuple, m: gl.tensor, TOKENS: gl.constexpr, spec: gl.constexpr
) -> gl.tensor:  # fmt: skip
    """Copy a product's weights, or its tokens, from step m of the ring on; return the step after them."""
    first, count = steps_of(sizes, spec)
    t = first * 0
    while t < count:
        tile, block, taken = piece_of(first, t, count, sizes, spec)
        line = tile * 0 if TOKENS else tile * spec.rows
        for step in range(taken):
            _copy(source, ring, m + t + step, line, block + step, TOKENS, spec)
        t += taken
    return m + count


@gluon.jit
def _weights(weights: gl.tuple, ring: gl.tuple, sizes: gl.tuple, chain: gl.constexpr) -> None:
    """Copy all weights, whatever their tokens do: one warp."""
    o: gl.constexpr = chain.o
    gate_up: gl.constexpr = chain.gate_up
    down: gl.constexpr = chain.down
    qkv: gl.constexpr = chain.qkv
    m = _copy_stage(weights[0], ring, sizes[0], gl.program_id(0) * 0, False, o)
    m = _copy_stage(weights[1], ring, sizes[1], m, False, gate_up)
    m = _copy_stage(weights[2], ring, sizes[2], m, False, down)
    if qkv is not None:
        _copy_stage(weights[3], ring, sizes[3], m, False, qkv)


@gluon.jit
def _tokens(
    x: gl.tuple, ring: gl.tuple, sizes: gl.tuple, flags_ptr: gl.tensor, leavers: gl.tensor, chain: gl.constexpr
) -> None:  # fmt: skip
    """Copy all tokens, those of a product once all are there: one warp."""
    o: gl.constexpr = chain.o
    gate_up: gl.constexpr = chain.gate_up
    down: gl.constexpr = chain.down
    qkv: gl.constexpr = chain.qkv
    gdc_wait()
    tokens = sizes[0][0]
    m = _copy_stage(x[0], ring, sizes[0], gl.program_id(0) * 0, True, o)
    _wait_for(flags_ptr + 1, tokens, chain.reads)
    _fence()
    m = _copy_stage(x[1], ring, sizes[1], m, True, gate_up)
    _wait_for(flags_ptr + 2, sizes[1][4], chain.reads)
    _fence()
    m = _copy_stage(x[2], ring, sizes[2], m, True, down)
    if qkv is not None:
        _wait_for(flags_ptr + 4, tokens, chain.reads)
        _fence()
        _copy_stage(x[3], ring, sizes[3], m, True, qkv)
    _leave(flags_ptr, leavers, _COUNTS)


@gluon.jit
def _stage(
    outs: gl.tuple, scales: gl.tuple, ring: gl.tuple, gathering: gl.tuple, sizes: gl.tuple, flag_ptr: gl.tensor, m: gl.tensor,
    n: gl.tensor, INDEX: gl.constexpr, COUNTED: gl.constexpr, spec: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Multiply what is this team's of a product, from step m and piece n on; return what comes after them."""
    first, count = steps_of(sizes, spec)
    t = first * 0
    while t < count:
        tile, block, taken = piece_of(first, t, count, sizes, spec)
        nothing_RN = nothing(spec)
        scale_R = _row_scales(scales, tile, sizes, spec)
        sum_RN = nothing_RN
        for step in range(m + t, m + t + taken):
            sum_RN = _step(sum_RN, ring, step, INDEX, spec)
        accs = gathered((sum_RN, nothing_RN, nothing_RN, nothing_RN), gathering, n, INDEX, spec)
        if INDEX == 0:
            scale_N = _token_scales(scales, tile, sizes, 0, spec)
            accs = (accs[0] * (scale_N[None, :] * scale_R[:, None]), nothing_RN, nothing_RN, nothing_RN)
            finish(accs, outs, tile, block, taken, sizes, INDEX, store if spec.gated is None else store_gated, spec)
            if COUNTED:  # noqa: SIM102
                if block == 0:
                    _count(flag_ptr)
        n += 1
        t += taken
    return m + count, n


@gluon.jit
def token_scale(largest: gl.tensor) -> gl.tensor:
    """Return what maps the largest magnitude to 448: `fp8.token_scale`, which Gluon cannot call for its floor's sake."""
    return gl.maximum(gl.div_rn(largest, 448.0), _MIN_SCALE)


@gluon.jit
def normalise(norm: gl.tuple, flags_ptr: gl.tensor, tiles: gl.tensor, AT: gl.constexpr, chain: gl.constexpr) -> None:
    """Add a product's token to the residual and normalise the sum into FP8, once all its tiles are there: a team.

    By the static scale, or by the token's own, which is written, of a chain `per_token`.
    """
    delta_ptr, residual_ptr, weight_ptr, total_ptr, h_ptr, scale_ptr, width, eps = norm
    size: gl.constexpr = chain.norm_width
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    e_E = gl.arange(0, size, layout)
    inside_E = e_E < width
    row_E = gl.program_id(0) * width + e_E
    residual_E = gl.load(residual_ptr + row_E, mask=inside_E, other=0.0)
    _ask_for(weight_ptr, gl.where(inside_E, e_E, 0))
    _wait_for(flags_ptr + AT, tiles, chain.reads)
    delta_E = gl.load(delta_ptr + row_E, mask=inside_E, other=0.0, cache_modifier=".cg")
    total_E = (residual_E.to(gl.float32) + delta_E.to(gl.float32)).to(total_ptr.dtype.element_ty)
    gl.store(total_ptr + row_E, total_E, mask=inside_E)
    x_E = total_E.to(gl.float32)
    inverse = gl.rsqrt(gl.sum(x_E * x_E, 0) / width + eps)
    weight_E = gl.load(weight_ptr + e_E, mask=inside_E, other=0.0)
    y_E = (x_E * inverse).to(total_ptr.dtype.element_ty).to(gl.float32) * weight_E.to(gl.float32)
    y_E = y_E.to(total_ptr.dtype.element_ty).to(gl.float32)
    if chain.per_token:
        scale = token_scale(gl.max(gl.abs(y_E), 0))
        gl.store(scale_ptr + gl.program_id(0), scale)
    else:
        scale = gl.load(scale_ptr)
    gl.store(h_ptr + row_E, _to_fp8(y_E, scale), mask=inside_E)
    _count(flags_ptr + (AT + 1))


@gluon.jit
def _team(
    outs: gl.tuple, scales: gl.tuple, norms: gl.tuple, ring: gl.tuple, gathering: gl.tuple, sizes: gl.tuple,
    flags_ptr: gl.tensor, leavers: gl.tensor, INDEX: gl.constexpr, chain: gl.constexpr,
) -> None:  # fmt: skip
    """Multiply a team's part of all products; the second normalises in between."""
    o: gl.constexpr = chain.o
    gate_up: gl.constexpr = chain.gate_up
    down: gl.constexpr = chain.down
    qkv: gl.constexpr = chain.qkv
    gdc_wait()
    zero, mine = gl.program_id(0) * 0, gl.program_id(0) < sizes[0][0]
    last: gl.constexpr = qkv is None
    m, n = _stage(outs[0], scales[0], ring, gathering, sizes[0], flags_ptr, zero, zero, INDEX, True, o)
    if INDEX == 1:  # noqa: SIM102
        if mine:
            normalise(norms[0], flags_ptr, sizes[0][4], 0, chain)
    m, n = _stage(outs[1], scales[1], ring, gathering, sizes[1], flags_ptr + 2, m, n, INDEX, True, gate_up)
    m, n = _stage(outs[2], scales[2], ring, gathering, sizes[2], flags_ptr + 3, m, n, INDEX, not last, down)
    if not last:
        if INDEX == 1:  # noqa: SIM102
            if mine:
                normalise(norms[1], flags_ptr, sizes[2][4], 3, chain)
        _stage(outs[3], scales[3], ring, gathering, sizes[3], flags_ptr, m, n, INDEX, False, qkv)
    if INDEX == 1:  # noqa: SIM102
        if mine:
            _leave(flags_ptr, leavers, _COUNTS)


@gluon.jit
def _work(
    outs: gl.tuple, scales: gl.tuple, norms: gl.tuple, weights: gl.tuple, x: gl.tuple, ring: gl.tuple, sizes: gl.tuple,
    flags_ptr: gl.tensor, leavers: gl.tensor, chain: gl.constexpr,
) -> None:  # fmt: skip
    """Give each warp its role."""
    o: gl.constexpr = chain.o
    team: gl.constexpr = o.team_registers
    gathering = gathering_of(ring, o)
    fence_async_shared()  # the copy engine is to see the barriers as they begin
    if o.teams == 2:
        gl.warp_specialize(
            [
                (_team, (outs, scales, norms, ring, gathering, sizes, flags_ptr, leavers, 0, chain)),
                (_team, (outs, scales, norms, ring, gathering, sizes, flags_ptr, leavers, 1, chain)),
                (_weights, (weights, ring, sizes, chain)),
                (_tokens, (x, ring, sizes, flags_ptr, leavers, chain)),
            ],
            [4, 1, 1],
            [team, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_team, (outs, scales, norms, ring, gathering, sizes, flags_ptr, leavers, 0, chain)),
                (_team, (outs, scales, norms, ring, gathering, sizes, flags_ptr, leavers, 1, chain)),
                (_team, (outs, scales, norms, ring, gathering, sizes, flags_ptr, leavers, 2, chain)),
                (_team, (outs, scales, norms, ring, gathering, sizes, flags_ptr, leavers, 3, chain)),
                (_weights, (weights, ring, sizes, chain)),
                (_tokens, (x, ring, sizes, flags_ptr, leavers, chain)),
            ],
            [4, 4, 4, 1, 1],
            [team, team, team, 24, 24],
        )


@gluon.jit(do_not_specialize=["tokens", "leavers", *(f"{size}_{product}" for size in ("span", "tiles") for product in "ogdq")])
def _chain_kernel(
    x: tma.tensor_descriptor, x_scale_ptr: gl.tensor, weight_o: tma.tensor_descriptor, scale_o_ptr: gl.tensor,
    delta_ptr: gl.tensor, residual_ptr: gl.tensor, norm_ptr: gl.tensor, total_ptr: gl.tensor, h_ptr: gl.tensor,
    h: tma.tensor_descriptor, h_scale_ptr: gl.tensor, weight_g: tma.tensor_descriptor, scale_g_ptr: gl.tensor,
    a_ptr: gl.tensor, a: tma.tensor_descriptor, a_scale_ptr: gl.tensor, weight_d: tma.tensor_descriptor, scale_d_ptr: gl.tensor,
    down_ptr: gl.tensor, next_norm_ptr: gl.tensor, next_total_ptr: gl.tensor, next_h_ptr: gl.tensor,
    next_h: tma.tensor_descriptor, next_scale_ptr: gl.tensor, weight_q: tma.tensor_descriptor, scale_q_ptr: gl.tensor,
    q_ptr: gl.tensor, parts_ptr: gl.tensor, done_ptr: gl.tensor, flags_ptr: gl.tensor, eps: gl.tensor,
    tokens: gl.tensor, leavers: gl.tensor, embed: gl.tensor, gates: gl.tensor, outputs: gl.tensor,
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
        (delta_ptr, h_scale_ptr, parts_ptr, done_ptr), (a_ptr, a_scale_ptr, parts_ptr, done_ptr),
        (down_ptr, h_scale_ptr, parts_ptr, done_ptr), (q_ptr, h_scale_ptr, parts_ptr, done_ptr),
    )  # fmt: skip
    scales = (
        (scale_o_ptr, x_scale_ptr), (scale_g_ptr, h_scale_ptr), (scale_d_ptr, a_scale_ptr), (scale_q_ptr, next_scale_ptr),
    )  # fmt: skip
    norms = (
        (delta_ptr, residual_ptr, norm_ptr, total_ptr, h_ptr, h_scale_ptr, embed, eps),
        (down_ptr, total_ptr, next_norm_ptr, next_total_ptr, next_h_ptr, next_scale_ptr, embed, eps),
    )
    weights, inputs = (weight_o, weight_g, weight_d, weight_q), (x, h, a, next_h)
    _work(outs, scales, norms, weights, inputs, _ring(x.dtype, o), sizes, flags_ptr, leavers, chain)


@frozen(kw_only=True)
class Chain:
    """How each product is cut; `qkv` None ends with down. The ring is of the tokens, teams and slots of `o`, as of the others."""

    o: RingTile
    gate_up: RingTile
    down: RingTile
    qkv: RingTile | None
    norm_width: int  # a power of two that E is no more than
    reads: bool = False  # how who waits for a count asks for it

    per_token = False  # scales of inputs are static


@frozen(eq=False, kw_only=True)
class Linear:
    """An FP8 weight [O, I], a float32 scale for each row [O, 1], and the static scale [] of its inputs."""

    weight_OI: Tensor
    scale_O1: Tensor
    x_scale: Tensor


@frozen(eq=False, kw_only=True)
class Norm:
    """Weights of a norm [E], and what stops it from dividing by zero."""

    weight_E: Tensor
    eps: float


def chain_of(tokens: int, o: Linear, gate_up: Linear, down: Linear, qkv: Linear | None, dtype: torch.dtype) -> Chain:
    """Return how the products of so many tokens are cut: as each is by itself."""
    first, second, third, *fourth = (
        evolve(tile_for(tokens, each.weight_OI), registers=ALL_REGISTERS) for each in (o, gate_up, down, qkv) if each is not None
    )
    return Chain(
        o=first,
        gate_up=evolve(second, gated=DTYPES[dtype]),
        down=third,
        qkv=fourth[0] if fourth else None,
        norm_width=power_of_2(len(o.weight_OI)),
    )


def launch_chain(
    x_TI: Tensor, residual_TE: Tensor, o: Linear, norm: Norm, gate_up: Linear, down: Linear,
    following: tuple[Norm, Linear] | None = None, chain: Chain | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (the sum with the residual, what down gives), both [T, E], or, with what follows, (both sums, q, k and v [T, Q])."""
    tokens, device = len(x_TI), x_TI.device
    assert 0 < tokens <= MOST_TOKENS, tokens
    next_norm, qkv = following or (norm, None)
    chain = chain or chain_of(tokens, o, gate_up, down, qkv, residual_TE.dtype)
    fourth = qkv or o
    delta_TE, total_TE, down_TE, next_total_TE = (torch.empty_like(residual_TE) for _ in range(4))
    h_TE, next_h_TE = (torch.empty_like(residual_TE, dtype=x_TI.dtype) for _ in range(2))
    a_TF = x_TI.new_empty(tokens, len(gate_up.weight_OI) // 2)
    q_TQ = residual_TE.new_empty(tokens, len(fourth.weight_OI))
    steps = [blocks_of(each.weight_OI.shape[1], chain.o.pieces * chain.o.inputs) for each in (o, gate_up, down, fourth)]
    tiles = [blocks_of(len(each.weight_OI), chain.o.rows) for each in (o, gate_up, down, fourth)]
    programs = processors(device)
    assert tokens <= programs, (tokens, programs)
    parts = x_TI.new_empty(programs * chain.o.part_size, dtype=torch.float32)
    counted = counters(device, max(tiles) * chain.o.teams + FLAGS)
    described = [_described(each, chain.o.tokens, chain.o) for each in (x_TI, h_TE, a_TF, next_h_TE)]
    weights = [_described(each.weight_OI, chain.o.rows, chain.o) for each in (o, down, fourth)]
    launch(
        _chain_kernel, (programs,),
        described[0], o.x_scale, weights[0], o.scale_O1, delta_TE, residual_TE, norm.weight_E, total_TE, h_TE,
        described[1], gate_up.x_scale, described_gated(gate_up.weight_OI, chain.gate_up), gate_up.scale_O1,
        a_TF, described[2], down.x_scale, weights[1], down.scale_O1,
        down_TE, next_norm.weight_E, next_total_TE, next_h_TE, described[3], fourth.x_scale, weights[2], fourth.scale_O1,
        q_TQ, parts, counted[FLAGS :], counted[: FLAGS], norm.eps,
        tokens, programs + tokens, residual_TE.shape[1], len(gate_up.weight_OI), len(fourth.weight_OI),
        *(size for pair in zip(steps, tiles, strict=True) for size in pair),
        chain=chain, num_warps=4, maxnreg=chain.o.most_registers, **DEPENDENT,
    )  # fmt: skip
    return (total_TE, down_TE) if qkv is None else (total_TE, next_total_TE, q_TQ)
