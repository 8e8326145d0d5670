"""The teams of `ops_linear_int4`: four warps each that turn codes into operands, multiply, and add up by groups.

Codes in FP8 keep their zero points: sum x (code - zero) scale = sum x code scale - sum over groups of (sum x) (zero scale), whose
last term is a product of its own, over groups instead of inputs. It is taken off in steps of 16 groups after a tile's others
(`late`); where tokens are few, products of x with -zero follow those with codes in each step instead.

R rows (outputs) of a half, 64; C bytes of the codes or zeros of two rows, 32 a half; N tokens of a tile, or of a cut of one;
K inputs of a group within a step; G groups; B slots, S teams, P planes of sums: their bfloat16s and what those left.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from paddock_triton.int4_codes import (
    MIDDLE,
    codes_fp8,
    inputs_of,
    minus_zeros_fp8,
    numbers,
    part_of,
    row_values,
    shifts,
    zero_bytes,
)
from paddock_triton.int4_spec import LATE_SLOTS
from paddock_triton.ring import piece_of, role_barrier, steps_of
from paddock_triton.ring_parts import finish, gathered, nothing, store


@gluon.jit
def _packed_of(ring: gl.tuple, slot: gl.tensor, half: gl.constexpr, spec: gl.constexpr) -> gl.shared_memory_descriptor:
    """Return the bytes of a step's half [32, 128]."""
    if spec.deep:
        packed_CJ = ring[0].index(slot * spec.pieces + half)
    else:
        packed_CJ = ring[0].index(slot).slice(half * 32, 32)
    return packed_CJ


@gluon.jit
def _scales_of(ring: gl.tuple, slot: gl.tensor, group: gl.constexpr, half: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Return the scales of a half's rows in a group [64], float32."""
    if spec.deep:
        scale_R = row_values(ring[1].index(slot), half, 0, spec)
    else:
        scale_R = row_values(ring[1].index(slot), group, half, spec)
    return scale_R.to(gl.float32)


@gluon.jit
def _zeros_of(ring: gl.tuple, slot: gl.tensor, group: gl.constexpr, half: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Return the zero points of a half's rows in a group, two a byte [32]."""
    if not spec.zeros:
        zero_C = gl.full([32], MIDDLE * 17, gl.uint8, gl.SliceLayout(1, spec.bytes_layout))
    elif spec.deep:
        zero_C = zero_bytes(ring[2].index(slot), half, 0)
    else:
        zero_C = zero_bytes(ring[2].index(slot), group, half)
    return zero_C


@gluon.jit
def _add_fp8(acc_RN: gl.tensor, products_RN: gl.tensor, scale_R: gl.tensor) -> gl.tensor:
    """Return sums with a group's, of products with codes over 512."""
    return products_RN * (scale_R * 512.0)[:, None] + acc_RN


@gluon.jit
def _start(codes_RK: gl.tensor, x_KN: gl.shared_memory_descriptor, cut: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Start the products of codes with a cut of the tokens."""
    cut_KN = x_KN.slice(cut * spec.columns, spec.columns, dim=1)
    return warpgroup_mma(codes_RK, cut_KN, nothing(spec), use_acc=False, is_async=True)


@gluon.jit
def _without_zeros(
    products_RN: gl.tensor, x_KN: gl.shared_memory_descriptor, ring: gl.tuple, slot: gl.tensor, group: gl.constexpr,
    half: gl.constexpr, spec: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Return products under way with those of zero points taken off, where that is done inside a step."""
    if spec.inside:
        zero_C = _zeros_of(ring, slot, group, half, spec)
        minus_RK = part_of(minus_zeros_fp8(zero_C, spec), group, spec)
        products_RN = warpgroup_mma(minus_RK, x_KN, products_RN, is_async=True)
    return products_RN


@gluon.jit
def _step_fp8(accs: gl.tuple, ring: gl.tuple, m: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the sums after step m, whose inputs are of one group."""
    _packed, _scales, _zeros, x_BNK, full_B, free_B = ring
    slot = m % spec.slots
    piece: gl.constexpr = INDEX if spec.deep else 0
    x_KN = x_BNK.index(slot * spec.pieces + piece).permute((1, 0))
    a_RN, b_RN, c_RN, d_RN = accs
    half: gl.constexpr = INDEX * spec.halves
    mbarrier.wait(full_B.index(slot), m // spec.slots & 1)
    codes_RK = part_of(codes_fp8(_packed_of(ring, slot, half, spec)), 0, spec)
    products_RN = _without_zeros(_start(codes_RK, x_KN, 0, spec), x_KN, ring, slot, 0, half, spec)
    scale_R = _scales_of(ring, slot, 0, half, spec)
    products_RN = warpgroup_mma_wait(0, deps=[products_RN])
    if spec.cuts == 2:
        more_RN = _start(codes_RK, x_KN, 1, spec)
        a_RN = _add_fp8(a_RN, products_RN, scale_R)
        more_RN = warpgroup_mma_wait(0, deps=[more_RN])
        b_RN = _add_fp8(b_RN, more_RN, scale_R)
    else:
        a_RN = _add_fp8(a_RN, products_RN, scale_R)
    if spec.halves == 2:
        codes_RK = part_of(codes_fp8(_packed_of(ring, slot, half + 1, spec)), 0, spec)
        products_RN = _start(codes_RK, x_KN, 0, spec)
        scale_R = _scales_of(ring, slot, 0, half + 1, spec)
        products_RN = warpgroup_mma_wait(0, deps=[products_RN])
        if spec.cuts == 2:
            more_RN = _start(codes_RK, x_KN, 1, spec)
            c_RN = _add_fp8(c_RN, products_RN, scale_R)
            more_RN = warpgroup_mma_wait(0, deps=[more_RN])
            d_RN = _add_fp8(d_RN, more_RN, scale_R)
        else:
            c_RN = _add_fp8(c_RN, products_RN, scale_R)
    role_barrier()
    mbarrier.arrive(free_B.index(slot))
    return a_RN, b_RN, c_RN, d_RN


@gluon.jit
def _step_groups(accs: gl.tuple, ring: gl.tuple, m: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the sums after step m: in 16 bits, or in FP8 with several groups a step."""
    _packed, _scales, _zeros, x_BNK, full_B, free_B = ring
    slot = m % spec.slots
    mbarrier.wait(full_B.index(slot), m // spec.slots & 1)
    acc_RN, b_RN, c_RN, d_RN = accs
    packed_CJ = _packed_of(ring, slot, INDEX, spec)
    groups: gl.constexpr = spec.groups
    for group in gl.static_range(groups):
        x_KN = x_BNK.index(slot * spec.row_groups + (INDEX if spec.deep else group)).permute((1, 0))
        if spec.fp8:
            products_RN = _start(part_of(codes_fp8(packed_CJ), group, spec), x_KN, 0, spec)
            products_RN = _without_zeros(products_RN, x_KN, ring, slot, group, INDEX, spec)
            products_RN = warpgroup_mma_wait(0, deps=[products_RN])
            acc_RN = _add_fp8(acc_RN, products_RN, _scales_of(ring, slot, group, INDEX, spec))
        else:
            zero_C = _zeros_of(ring, slot, group, INDEX, spec)
            if spec.wide:
                numbers_RK = part_of(numbers(packed_CJ, zero_C, x_BNK.dtype, spec), group, spec)
                products_RN = warpgroup_mma(numbers_RK, x_KN, nothing(spec), use_acc=False, is_async=True)
                products_RN = warpgroup_mma_wait(0, deps=[products_RN])
            else:
                numbers_RK = part_of(numbers(packed_CJ, zero_C, x_BNK.dtype, spec), group, spec)
                products_RN = mma_v2(numbers_RK, inputs_of(x_KN, spec), nothing(spec))
            acc_RN += products_RN * _scales_of(ring, slot, group, INDEX, spec)[:, None]
    role_barrier()
    mbarrier.arrive(free_B.index(slot))
    return acc_RN, b_RN, c_RN, d_RN


@gluon.jit
def _shifted(
    acc_RN: gl.tensor, late: gl.tuple, slot: gl.tensor, half: gl.constexpr, cut: gl.constexpr, spec: gl.constexpr
) -> gl.tensor:
    """Return sums less the zero points' part of 16 groups."""
    scales_BGR, zeros_BGC, sums_PNG, _full, _free = late
    halves: gl.constexpr = spec.teams * spec.halves
    high_RG, low_RG = shifts(scales_BGR.index(slot), zeros_BGC.index(slot * halves + half), half, spec)
    high_GN = sums_PNG.index(slot * 2).permute((1, 0)).slice(cut * spec.columns, spec.columns, dim=1)
    low_GN = sums_PNG.index(slot * 2 + 1).permute((1, 0)).slice(cut * spec.columns, spec.columns, dim=1)
    acc_RN = gl.convert_layout(acc_RN, spec.late_mma)
    acc_RN = warpgroup_mma(high_RG, high_GN, acc_RN, is_async=True)
    acc_RN = warpgroup_mma(high_RG, low_GN, acc_RN, is_async=True)
    acc_RN = warpgroup_mma(low_RG, high_GN, acc_RN, is_async=True)
    return gl.convert_layout(warpgroup_mma_wait(0, deps=[acc_RN]), spec.mma)


@gluon.jit
def _step_late(accs: gl.tuple, late: gl.tuple, u: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the sums after late step u."""
    a_RN, b_RN, c_RN, d_RN = accs
    slot = u % LATE_SLOTS
    half: gl.constexpr = INDEX * spec.halves
    mbarrier.wait(late[3].index(slot), u // LATE_SLOTS & 1)
    a_RN = _shifted(a_RN, late, slot, half, 0, spec)
    if spec.cuts == 2:
        b_RN = _shifted(b_RN, late, slot, half, 1, spec)
    if spec.halves == 2:
        c_RN = _shifted(c_RN, late, slot, half + 1, 0, spec)
        if spec.cuts == 2:
            d_RN = _shifted(d_RN, late, slot, half + 1, 1, spec)
    role_barrier()
    mbarrier.arrive(late[4].index(slot))
    return a_RN, b_RN, c_RN, d_RN


@gluon.jit
def multiplier(
    outs: gl.tuple, ring: gl.tuple, late: gl.tuple, gathering: gl.tuple, sizes: gl.tuple, INDEX: gl.constexpr, spec: gl.constexpr
) -> None:  # fmt: skip
    """Multiply the halves of every tile that are this team's: four warps."""
    _tokens, _outputs, blocks, _span, _tiles, _token_tiles = sizes
    gdc_wait()
    first, count = steps_of(sizes, spec)
    t, m, u, n = first * 0, first * 0, first * 0, first * 0
    while t < count:
        tile, block, taken = piece_of(first, t, count, sizes, spec)
        stop = m + gl.maximum(gl.minimum(taken, blocks - block), 0)
        nothing_RN = nothing(spec)
        accs = (nothing_RN, nothing_RN, nothing_RN, nothing_RN)
        late_stop = u + taken - (stop - m)
        for step in range(m, stop):
            if spec.fp8 and spec.groups == 1:
                accs = _step_fp8(accs, ring, step, INDEX, spec)
            else:
                accs = _step_groups(accs, ring, step, INDEX, spec)
        if spec.late:
            for step in range(u, late_stop):
                accs = _step_late(accs, late, step, INDEX, spec)
        if spec.deep:
            accs = gathered(accs, gathering, n, INDEX, spec)
            if INDEX == 0:
                finish(accs, outs, tile, block, taken, sizes, INDEX, store, spec)
            n += 1
        else:
            finish(accs, outs, tile, block, taken, sizes, INDEX, store, spec)
        t, m, u = t + taken, stop, late_stop
