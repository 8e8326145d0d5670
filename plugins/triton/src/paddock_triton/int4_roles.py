"""The roles of warps in `ops_linear_int4`: one warp copies weights, one tokens, teams of four warps multiply.

A step is 128 inputs of a tile of outputs and tokens. What it needs lies in a slot of shared memory, with two barriers: one that
says all of it is there (`full`), one that all its readers are done with it (`free`). Step m of a program lies in slot m % slots;
which of the slot's uses a barrier speaks of is the parity of m // slots.

Zero points leave the steps of FP8: sum x (code - zero) scale = sum x code scale - sum over groups of (sum x) (zero scale), whose
last term is a product of its own, over groups instead of inputs. It is taken off in steps of 16 groups after a tile's others
(`late`), whose operands have two slots of their own; where tokens are few, group by group.

A program's steps make pieces: a piece is the steps of one tile, all of them or, where programs share tiles, some.

R rows (outputs) of a half, 64; C bytes of the codes or zeros of two rows, 32 a half; N tokens of a tile, or of a cut of one;
K inputs of a group within a step; G groups; B slots, P planes of sums: their bfloat16s and what those left.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from paddock_triton.int4_codes import MIDDLE, codes_fp8, numbers, part_of, row_values, shifts, zero_bytes, zeros_of_rows
from paddock_triton.int4_parts import finish
from paddock_triton.int4_spec import LATE_GROUPS, LATE_SLOTS, ROWS, STEP

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a role's warps: Triton 3.7's name and 3.6's


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr) -> gl.shared_memory_descriptor:
    """Return `COUNT` barriers, each of `ARRIVALS` arrivals."""
    barriers_B = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(COUNT):
        mbarrier.init(barriers_B.index(slot), count=ARRIVALS)
    return barriers_B


@gluon.jit
def _steps_of(sizes: gl.tuple, spec: gl.constexpr) -> gl.tuple:
    """Return the first unit (a step of a tile) of this program and how many steps it has."""
    _tokens, _outputs, _blocks, span, tiles, _token_tiles = sizes
    program, programs = gl.program_id(0), gl.num_programs(0)
    if spec.shared:
        first = program * tiles * span // programs
        count = (program + 1) * tiles * span // programs - first
    else:
        first = program * span
        count = (tiles - program + programs - 1) // programs * span
    return first, count


@gluon.jit
def _place(first: gl.tensor, t: gl.tensor, sizes: gl.tuple, spec: gl.constexpr) -> gl.tuple:
    """Return the tile of this program's step t, and which of the tile's it is."""
    _tokens, _outputs, _blocks, span, _tiles, _token_tiles = sizes
    if spec.shared:
        tile, block = (first + t) // span, (first + t) % span
    else:
        tile, block = gl.program_id(0) + t // span * gl.num_programs(0), t % span
    return tile, block


@gluon.jit
def _free_slot(barriers_of: gl.tuple, use: gl.tensor, COUNT: gl.constexpr, BYTES: gl.constexpr) -> gl.tensor:
    """Return the slot of a use once it is free, its barrier told how many bytes will come."""
    full_B, free_B = barriers_of
    slot = use % COUNT
    mbarrier.wait(free_B.index(slot), (use // COUNT & 1) ^ 1)
    mbarrier.expect(full_B.index(slot), BYTES)
    return slot


@gluon.jit
def _copy_weight(
    sources: gl.tuple, ring: gl.tuple, m: gl.tensor, row: gl.tensor, line: gl.tensor, block: gl.tensor, spec: gl.constexpr
) -> None:
    """Have a step's part of the weight copied; `line` is where its codes begin."""
    packed, scales, zeros, _x, _sums, _late_scales = sources
    slot = _free_slot((ring[5], ring[6]), m, spec.slots, spec.weight_bytes)
    full = ring[5].index(slot)
    group = block // spec.steps_of_group * spec.groups
    boxes: gl.constexpr = spec.boxes
    for i in gl.static_range(boxes):
        at = slot * boxes + i
        tma.async_copy_global_to_shared(packed, [line + i * (spec.box // 2), 0], full, ring[0].index(at))
        tma.async_copy_global_to_shared(scales, [group, row + i * spec.box], full, ring[1].index(at))
        if spec.zeros and not spec.late:
            tma.async_copy_global_to_shared(zeros, [group, (row + i * spec.box) // 2], full, ring[2].index(at))


@gluon.jit
def _copy_late_weight(
    sources: gl.tuple, late: gl.tuple, u: gl.tensor, row: gl.tensor, step: gl.tensor, spec: gl.constexpr
) -> None:
    """Have the scales and zero points of 16 groups copied."""
    _packed, _scales, zeros, _x, _sums, late_scales = sources
    slot = _free_slot((late[3], late[4]), u, LATE_SLOTS, spec.late_weight_bytes)
    full = late[3].index(slot)
    boxes: gl.constexpr = spec.boxes
    for i in gl.static_range(boxes):
        place = [step * LATE_GROUPS, row + i * spec.box]
        tma.async_copy_global_to_shared(late_scales, place, full, late[0].index(slot * boxes + i))
    if spec.zeros:
        halves: gl.constexpr = spec.teams * spec.halves
        for half in gl.static_range(halves):
            place = [step * LATE_GROUPS, row // 2 + half * 32]
            tma.async_copy_global_to_shared(zeros, place, full, late[1].index(slot * halves + half))


@gluon.jit
def weight_copier(sources: gl.tuple, ring: gl.tuple, late: gl.tuple, sizes: gl.tuple, spec: gl.constexpr) -> None:
    """Copy every step's part of the weight as slots become free, the first while the kernel before still runs: one warp."""
    _tokens, outputs, blocks, span, _tiles, token_tiles = sizes
    first, count = _steps_of(sizes, spec)
    lines = (outputs + ROWS - 1) // ROWS * 32  # of a block
    t, m, u = first * 0, first * 0, first * 0
    while t < count:
        tile, block = _place(first, t, sizes, spec)
        taken = gl.minimum(span - block, count - t)
        row, line = tile // token_tiles * spec.rows, block * lines + tile // token_tiles * (spec.rows // 2)
        stop = gl.minimum(block + taken, blocks)
        for step in range(block, stop):
            _copy_weight(sources, ring, m, row, line, step, spec)
            line += lines
            m += 1
        if spec.late:
            for step in range(gl.maximum(block, blocks), block + taken):
                _copy_late_weight(sources, late, u, row, step - blocks, spec)
                u += 1
        t += taken


@gluon.jit
def _copy_tokens(
    sources: gl.tuple, ring: gl.tuple, m: gl.tensor, token: gl.tensor, block: gl.tensor, spec: gl.constexpr
) -> None:
    """Have a step's part of x copied into the slot that its weights go to."""
    _packed, _scales, _zeros, x, sums, _late_scales = sources
    slot = _free_slot((ring[5], ring[6]), m, spec.slots, spec.token_bytes)
    full = ring[5].index(slot)
    groups: gl.constexpr = spec.groups
    for group in gl.static_range(groups):
        place = [token, block * STEP + group * spec.inputs]
        tma.async_copy_global_to_shared(x, place, full, ring[3].index(slot * spec.groups + group))
    if spec.copies_sums:
        tma.async_copy_global_to_shared(sums, [block * spec.groups, token], full, ring[4].index(slot))


@gluon.jit
def _copy_late_tokens(
    sources: gl.tuple, late: gl.tuple, u: gl.tensor, tokens: gl.tensor, token: gl.tensor, step: gl.tensor, spec: gl.constexpr
) -> None:
    """Have the sums of 16 groups copied."""
    slot = _free_slot((late[3], late[4]), u, LATE_SLOTS, spec.late_token_bytes)
    for plane in gl.static_range(2):
        place = [plane * tokens + token, step * LATE_GROUPS]
        tma.async_copy_global_to_shared(sources[4], place, late[3].index(slot), late[2].index(slot * 2 + plane))


@gluon.jit
def token_copier(sources: gl.tuple, ring: gl.tuple, late: gl.tuple, sizes: gl.tuple, spec: gl.constexpr) -> None:
    """Copy every step's part of x, and of its sums, as slots become free: one warp."""
    tokens, _outputs, blocks, span, _tiles, token_tiles = sizes
    gdc_wait()
    first, count = _steps_of(sizes, spec)
    t, m, u = first * 0, first * 0, first * 0
    while t < count:
        tile, block = _place(first, t, sizes, spec)
        taken = gl.minimum(span - block, count - t)
        token, stop = tile % token_tiles * spec.tokens, gl.minimum(block + taken, blocks)
        for step in range(block, stop):
            _copy_tokens(sources, ring, m, token, step, spec)
            m += 1
        if spec.late:
            for step in range(gl.maximum(block, blocks), block + taken):
                _copy_late_tokens(sources, late, u, tokens, token, step - blocks, spec)
                u += 1
        t += taken


@gluon.jit
def adder(ring: gl.tuple, sizes: gl.tuple, spec: gl.constexpr) -> None:
    """Add up each group's values of a few tokens as they come: one warp."""
    _packed, _scales, _zeros, x_BNK, sums_BGN, full_B, _free_B, added_B = ring
    _first, count = _steps_of(sizes, spec)
    tokens: gl.constexpr = spec.tokens
    groups: gl.constexpr = spec.groups
    layout: gl.constexpr = gl.BlockedLayout([16, 1], [4, 8], [1, 1], [0, 1])
    for m in range(count):
        slot = m % spec.slots
        mbarrier.wait(full_B.index(slot), m // spec.slots & 1)
        for group in gl.static_range(groups):
            value_KN = x_BNK.index(slot * groups + group).permute((1, 0)).load(layout).to(gl.float32)
            sum_1N = gl.expand_dims(gl.sum(value_KN, 0), 0)
            sums_BGN.index(slot).slice(group, 1).slice(0, tokens, dim=1).store(sum_1N)
        mbarrier.arrive(added_B.index(slot))


@gluon.jit
def _half_of(tiles: gl.shared_memory_descriptor, slot: gl.tensor, half: gl.constexpr, spec: gl.constexpr) -> gl.shared_memory_descriptor:
    """Return the box of a step that a half is in."""
    return tiles.index(slot * spec.boxes + half // spec.halves_of_box)


@gluon.jit
def _packed_of(ring: gl.tuple, slot: gl.tensor, half: gl.constexpr, spec: gl.constexpr) -> gl.shared_memory_descriptor:
    """Return the bytes of a step's half [32, 128]."""
    return _half_of(ring[0], slot, half, spec).slice(half % spec.halves_of_box * 32, 32)


@gluon.jit
def _nothing(spec: gl.constexpr) -> gl.tensor:
    """Return the sums of no products [64, N]."""
    columns: gl.constexpr = spec.columns
    layout: gl.constexpr = spec.mma
    return gl.zeros([ROWS, columns], gl.float32, layout)


@gluon.jit
def _factors(ring: gl.tuple, slot: gl.tensor, group: gl.constexpr, half: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return what a half's products with codes over 512, and the sums of x, are multiplied by [64]."""
    scale_R = row_values(_half_of(ring[1], slot, half, spec), group, half % spec.halves_of_box, spec).to(gl.float32)
    if spec.late:
        shift_R = scale_R
    elif spec.zeros:
        shift_R = -scale_R * zeros_of_rows(zero_bytes(_half_of(ring[2], slot, half, spec), group, half % spec.halves_of_box), spec)
    else:
        shift_R = -scale_R * MIDDLE
    return scale_R * 512.0, shift_R


@gluon.jit
def _add_fp8(
    acc_RN: gl.tensor, products_RN: gl.tensor, factors: gl.tuple, ring: gl.tuple, m: gl.tensor, group: gl.constexpr,
    spec: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Return sums with a group's: scale * (products - zero * sum of x), the zero point's part perhaps late."""
    scale_R, shift_R = factors
    slot = m % spec.slots
    if spec.adds:
        mbarrier.wait(ring[7].index(slot), m // spec.slots & 1)
    if not spec.late:
        columns: gl.constexpr = spec.columns
        sum_1N = ring[4].index(slot).slice(group, 1).slice(0, columns, dim=1).load(spec.token_layout)
        sum_N = gl.convert_layout(sum_1N.reshape([columns]), gl.SliceLayout(0, spec.mma))
        acc_RN = shift_R[:, None] * sum_N[None, :] + acc_RN
    return products_RN * scale_R[:, None] + acc_RN


@gluon.jit
def _start(codes_RK: gl.tensor, x_KN: gl.shared_memory_descriptor, cut: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Start the products of codes with a cut of the tokens."""
    cut_KN = x_KN.slice(cut * spec.columns, spec.columns, dim=1)
    return warpgroup_mma(codes_RK, cut_KN, _nothing(spec), use_acc=False, is_async=True)


@gluon.jit
def _step_fp8(accs: gl.tuple, ring: gl.tuple, m: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the sums after step m, whose inputs are of one group."""
    _packed, _scales, _zeros, x_BNK, _sums, full_B, free_B, _added_B = ring
    slot = m % spec.slots
    x_KN = x_BNK.index(slot).permute((1, 0))
    a_RN, b_RN, c_RN, d_RN = accs
    half: gl.constexpr = INDEX * spec.halves
    mbarrier.wait(full_B.index(slot), m // spec.slots & 1)
    codes_RK = part_of(codes_fp8(_packed_of(ring, slot, half, spec)), 0, spec)
    products_RN = _start(codes_RK, x_KN, 0, spec)
    factors = _factors(ring, slot, 0, half, spec)
    products_RN = warpgroup_mma_wait(0, deps=[products_RN])
    if spec.cuts == 2:
        more_RN = _start(codes_RK, x_KN, 1, spec)
        a_RN = _add_fp8(a_RN, products_RN, factors, ring, m, 0, spec)
        more_RN = warpgroup_mma_wait(0, deps=[more_RN])
        b_RN = _add_fp8(b_RN, more_RN, factors, ring, m, 0, spec)
    else:
        a_RN = _add_fp8(a_RN, products_RN, factors, ring, m, 0, spec)
    if spec.halves == 2:
        codes_RK = part_of(codes_fp8(_packed_of(ring, slot, half + 1, spec)), 0, spec)
        products_RN = _start(codes_RK, x_KN, 0, spec)
        factors = _factors(ring, slot, 0, half + 1, spec)
        products_RN = warpgroup_mma_wait(0, deps=[products_RN])
        if spec.cuts == 2:
            more_RN = _start(codes_RK, x_KN, 1, spec)
            c_RN = _add_fp8(c_RN, products_RN, factors, ring, m, 0, spec)
            more_RN = warpgroup_mma_wait(0, deps=[more_RN])
            d_RN = _add_fp8(d_RN, more_RN, factors, ring, m, 0, spec)
        else:
            c_RN = _add_fp8(c_RN, products_RN, factors, ring, m, 0, spec)
    _barrier()
    mbarrier.arrive(free_B.index(slot))
    return a_RN, b_RN, c_RN, d_RN


@gluon.jit
def _started(ring: gl.tuple, m: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Start step m's products, once its operands are there."""
    _packed, _scales, _zeros, x_BNK, _sums, full_B, _free, _added_B = ring
    slot = m % spec.slots
    mbarrier.wait(full_B.index(slot), m // spec.slots & 1)
    codes_RK = part_of(codes_fp8(_packed_of(ring, slot, INDEX, spec)), 0, spec)
    return _start(codes_RK, x_BNK.index(slot).permute((1, 0)), 0, spec)


@gluon.jit
def _taken(
    acc_RN: gl.tensor, products_RN: gl.tensor, ring: gl.tuple, m: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr
) -> gl.tensor:
    """Return the sums with step m's products, and free its slot."""
    slot = m % spec.slots
    acc_RN = _add_fp8(acc_RN, products_RN, _factors(ring, slot, 0, INDEX, spec), ring, m, 0, spec)
    _barrier()
    mbarrier.arrive(ring[6].index(slot))
    return acc_RN


@gluon.jit
def _steps_fp8(accs: gl.tuple, ring: gl.tuple, m: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the sums after several steps; a step's codes are made while the products of the one before run."""
    acc_RN, b_RN, c_RN, d_RN = accs
    steps: gl.constexpr = spec.steps
    running_RN = _started(ring, m, INDEX, spec)
    for i in gl.static_range(1, steps):
        next_RN = _started(ring, m + i, INDEX, spec)
        products_RN = warpgroup_mma_wait(1, deps=[running_RN])
        acc_RN = _taken(acc_RN, products_RN, ring, m + (i - 1), INDEX, spec)
        running_RN = next_RN
    products_RN = warpgroup_mma_wait(0, deps=[running_RN])
    acc_RN = _taken(acc_RN, products_RN, ring, m + (steps - 1), INDEX, spec)
    return acc_RN, b_RN, c_RN, d_RN


@gluon.jit
def _step_groups(accs: gl.tuple, ring: gl.tuple, m: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return the sums after step m: in 16 bits, or in FP8 with several groups a step."""
    _packed, scales_BGR, zeros_BGC, x_BNK, _sums, full_B, free_B, _added_B = ring
    slot = m % spec.slots
    mbarrier.wait(full_B.index(slot), m // spec.slots & 1)
    acc_RN, b_RN, c_RN, d_RN = accs
    packed_CJ = _packed_of(ring, slot, INDEX, spec)
    groups: gl.constexpr = spec.groups
    for group in gl.static_range(groups):
        x_KN = x_BNK.index(slot * spec.groups + group).permute((1, 0))
        if spec.fp8:
            products_RN = _start(part_of(codes_fp8(packed_CJ), group, spec), x_KN, 0, spec)
            products_RN = warpgroup_mma_wait(0, deps=[products_RN])
            acc_RN = _add_fp8(acc_RN, products_RN, _factors(ring, slot, group, INDEX, spec), ring, m, group, spec)
        else:
            if spec.zeros:
                zero_C = zero_bytes(_half_of(zeros_BGC, slot, INDEX, spec), group, INDEX % spec.halves_of_box)
            else:
                zero_C = gl.full([32], MIDDLE * 17, gl.uint8, gl.SliceLayout(1, spec.bytes_layout))
            codes_RK = part_of(numbers(packed_CJ, zero_C, x_BNK.dtype, spec), group, spec)
            if spec.wide:
                products_RN = warpgroup_mma(codes_RK, x_KN, _nothing(spec), use_acc=False, is_async=True)
                products_RN = warpgroup_mma_wait(0, deps=[products_RN])
            else:
                products_RN = mma_v2(codes_RK, x_KN.load(gl.DotOperandLayout(1, spec.mma, 4)), _nothing(spec))
            scale_R = row_values(_half_of(scales_BGR, slot, INDEX, spec), group, INDEX % spec.halves_of_box, spec).to(gl.float32)
            acc_RN += products_RN * scale_R[:, None]
    _barrier()
    mbarrier.arrive(free_B.index(slot))
    return acc_RN, b_RN, c_RN, d_RN


@gluon.jit
def _shifted(
    acc_RN: gl.tensor, late: gl.tuple, slot: gl.tensor, half: gl.constexpr, cut: gl.constexpr, spec: gl.constexpr
) -> gl.tensor:
    """Return sums less the zero points' part of 16 groups."""
    scales_BGR, zeros_BGC, sums_PNG, _full, _free = late
    halves: gl.constexpr = spec.teams * spec.halves
    box_GR = _half_of(scales_BGR, slot, half, spec)
    high_RG, low_RG = shifts(box_GR, zeros_BGC.index(slot * halves + half), half % spec.halves_of_box, spec)
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
    _barrier()
    mbarrier.arrive(late[4].index(slot))
    return a_RN, b_RN, c_RN, d_RN


@gluon.jit
def multiplier(outs: gl.tuple, ring: gl.tuple, late: gl.tuple, sizes: gl.tuple, INDEX: gl.constexpr, spec: gl.constexpr) -> None:
    """Multiply the halves of every tile that are this team's: four warps."""
    _tokens, _outputs, blocks, span, _tiles, _token_tiles = sizes
    gdc_wait()
    first, count = _steps_of(sizes, spec)
    t, m, u = first * 0, first * 0, first * 0
    while t < count:
        tile, block = _place(first, t, sizes, spec)
        taken = gl.minimum(span - block, count - t)
        stop = m + gl.maximum(gl.minimum(taken, blocks - block), 0)
        nothing_RN = _nothing(spec)
        accs = (nothing_RN, nothing_RN, nothing_RN, nothing_RN)
        late_stop = u + taken - (stop - m)
        if spec.steps > 1:
            several = m + (stop - m) // spec.steps * spec.steps
            for step in range(m, several, spec.steps):
                accs = _steps_fp8(accs, ring, step, INDEX, spec)
            m = several
        for step in range(m, stop):
            if spec.fp8 and spec.groups == 1:
                accs = _step_fp8(accs, ring, step, INDEX, spec)
            else:
                accs = _step_groups(accs, ring, step, INDEX, spec)
        if spec.late:
            for step in range(u, late_stop):
                accs = _step_late(accs, late, step, INDEX, spec)
        finish(accs, outs, tile, block, taken, sizes, INDEX, spec)
        t, m, u = t + taken, stop, late_stop
