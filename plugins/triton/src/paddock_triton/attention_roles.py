"""The roles of warps in `attention_async`: one warp copies pages, four may convert them, two groups of four multiply.

Roles meet in shared memory alone, in pipes: a pipe of K or of V is slots for tiles, with two barriers a slot, one that says
its tile is there (`full`) and one that says all its readers are done with it (`free`). Tile t lies in slot t % slots; which of a
slot's uses a barrier speaks of is the parity of t // slots. The groups read one pair of pipes; where pages are FP8, those who
convert read a third, through which K and V go in turns: its use 2 t is tile t of K, 2 t + 1 that of V.

M rows of a group, N keys of a tile, D head size, B slots.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from paddock_triton.ring import barriers, free_slot, role_barrier

ROWS = gl.constexpr(64)  # M
KEYS = gl.constexpr(128)  # N
SLOTS = gl.constexpr(2)  # B of the pipes that products read from
RAW_SLOTS = gl.constexpr(3)  # B of the one that FP8 pages are copied to: a tile of K, its tile of V, the next of K
_HALF_MAX = gl.constexpr(65504.0)  # the largest finite float16


@gluon.jit
def pipe(dtype: gl.constexpr, COUNT: gl.constexpr, READERS: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return a pipe of `COUNT` slots; one whose tiles pages are copied to where there is one reader."""
    layout: gl.constexpr = spec.page_layout if READERS == 1 else spec.layout
    tiles_BND = gl.allocate_shared_memory(dtype, [COUNT, KEYS, spec.head], layout)
    return tiles_BND, barriers(COUNT, 1), barriers(COUNT, READERS)


@gluon.jit
def _copy(
    pages: tma.tensor_descriptor, table_ptr: gl.tensor, tile: gl.tensor, length: gl.tensor, column: gl.tensor, into: gl.tuple,
    use: gl.tensor, COUNT: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    """Have a tile copied into a pipe, page by page, as its use number `use`; keys from `length` on come from page 0."""
    tiles_BND, full_B, free_B = into
    slot = free_slot((full_B, free_B), use, COUNT, KEYS * spec.head * (1 if spec.fp8 else 2))
    full, tile_ND = full_B.index(slot), tiles_BND.index(slot)
    pieces: gl.constexpr = KEYS // spec.box
    for piece in gl.static_range(pieces):
        key = tile * KEYS + piece * spec.box
        page = gl.load(table_ptr + key // spec.page, mask=key < length, other=0)
        place = [page * spec.page + key % spec.page, column]
        tma.async_copy_global_to_shared(pages, place, full, tile_ND.slice(piece * spec.box, spec.box))


@gluon.jit
def copier(
    k_pages: tma.tensor_descriptor, v_pages: tma.tensor_descriptor, table_ptr: gl.tensor, place: gl.tuple, keys: gl.tuple,
    values: gl.tuple, spec: gl.constexpr,
) -> None:  # fmt: skip
    """Copy keys and values of every tile as slots become free: one warp. FP8 ones go through one pipe in turns."""
    _start, _context, length, _first_row, _stop_row, kv_head, tiles = place
    column = kv_head * spec.head
    for tile in range(tiles):
        if spec.fp8:
            _copy(k_pages, table_ptr, tile, length, column, keys, 2 * tile, RAW_SLOTS, spec)
            _copy(v_pages, table_ptr, tile, length, column, keys, 2 * tile + 1, RAW_SLOTS, spec)
        else:
            _copy(k_pages, table_ptr, tile, length, column, keys, tile, SLOTS, spec)
            _copy(v_pages, table_ptr, tile, length, column, values, tile, SLOTS, spec)


@gluon.jit
def _convert_rows(
    raw_ND: gl.shared_memory_descriptor, into_ND: gl.shared_memory_descriptor, tile: gl.tensor, length: gl.tensor,
    MASKED: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    """Write a tile in float16; where it is masked rows from `length` on are zeros, whatever they were."""
    D: gl.constexpr = spec.head
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    for part in gl.static_range(4):
        value_ND = raw_ND.slice(part * 32, 32).load(layout).to(gl.float16)
        if MASKED:
            key_N = tile * KEYS + part * 32 + gl.arange(0, 32, gl.SliceLayout(1, layout))
            value_ND = gl.where((key_N < length)[:, None], value_ND, gl.zeros_like(value_ND))
        into_ND.slice(part * 32, 32).store(value_ND)


@gluon.jit
def _convert(tile: gl.tensor, use: gl.tensor, length: gl.tensor, raw: gl.tuple, into: gl.tuple, spec: gl.constexpr) -> None:
    """Pass a tile on in float16."""
    raw_BND, raw_full, raw_free = raw
    tiles_BND, full_B, free_B = into
    slot, raw_slot = tile % SLOTS, use % RAW_SLOTS
    mbarrier.wait(raw_full.index(raw_slot), use // RAW_SLOTS & 1)
    mbarrier.wait(free_B.index(slot), (tile // SLOTS & 1) ^ 1)
    if (tile + 1) * KEYS <= length:
        _convert_rows(raw_BND.index(raw_slot), tiles_BND.index(slot), tile, length, False, spec)
    else:
        _convert_rows(raw_BND.index(raw_slot), tiles_BND.index(slot), tile, length, True, spec)
    fence_async_shared()
    role_barrier()
    mbarrier.arrive(full_B.index(slot))
    mbarrier.arrive(raw_free.index(raw_slot))


@gluon.jit
def converter(place: gl.tuple, raw: gl.tuple, keys: gl.tuple, values: gl.tuple, spec: gl.constexpr) -> None:
    """Bring FP8 tiles into the type that is multiplied: four warps."""
    _start, _context, length, _first_row, _stop_row, _kv_head, tiles = place
    for tile in range(tiles):
        _convert(tile, 2 * tile, length, raw, keys, spec)
        _convert(tile, 2 * tile + 1, length, raw, values, spec)


@gluon.jit
def _clear(v_ND: gl.shared_memory_descriptor, used: gl.tensor, layout: gl.constexpr) -> None:
    """Make rows from `used` on zero: what no token has written yet may be anything, and nothing times NaN is NaN.

    Both groups do, each for itself: what they write over each other is the same.
    """
    for part in gl.static_range(8):
        rows_ND = v_ND.slice(part * 16, 16)
        row_N = part * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
        value_ND = rows_ND.load(layout)
        rows_ND.store(gl.where((row_N < used)[:, None], value_ND, gl.zeros_like(value_ND)))
    fence_async_shared()
    role_barrier()


@gluon.jit
def _logits(q_MD: gl.shared_memory_descriptor, keys: gl.tuple, tile: gl.tensor) -> gl.tensor:
    """Start the product with a tile of keys, once it is there."""
    tiles_BND, full_B, _free_B = keys
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    mbarrier.wait(full_B.index(tile % SLOTS), tile // SLOTS & 1)
    nothing_MN = gl.zeros([ROWS, KEYS], gl.float32, layout)
    return warpgroup_mma(q_MD, tiles_BND.index(tile % SLOTS).permute((1, 0)), nothing_MN, use_acc=False, is_async=True)


@gluon.jit
def _softmax(
    s_MN: gl.tensor, tile: gl.tensor, position_M: gl.tensor, max_M: gl.tensor, sum_M: gl.tensor, factor: gl.tensor,
    masked: gl.tensor,
) -> gl.tuple:  # fmt: skip
    """Return exponentials of a tile's logits, the maximum and sum with it, and what older sums are to be multiplied by."""
    if masked:
        key_N = tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, s_MN.type.layout))
        s_MN = gl.where(key_N[None, :] <= position_M[:, None], s_MN, float("-inf"))
    new_M = gl.maximum(max_M, gl.max(s_MN, 1) * factor)  # never -inf: every row sees key 0
    p_MN = gl.exp2(s_MN * factor - new_M[:, None])
    alpha_M = gl.exp2(max_M - new_M)
    return p_MN, new_M, sum_M * alpha_M + gl.sum(p_MN, 1), alpha_M


@gluon.jit
def _turn(
    state: gl.tuple, q_MD: gl.shared_memory_descriptor, keys: gl.tuple, values: gl.tuple, turns: gl.shared_memory_descriptor,
    tile: gl.tensor, position_M: gl.tensor, factor: gl.tensor, INDEX: gl.constexpr, masked: gl.tensor, spec: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Return the state after one more tile: its product with K, then its softmax beside the last tile's product with V."""
    acc_MD, p_MN, max_M, sum_M = state
    v_BND, full_v, free_v = values
    before = tile - 1
    mbarrier.wait(turns.index(INDEX), (tile & 1) ^ (1 - INDEX))
    s_MN = _logits(q_MD, keys, tile)
    mbarrier.wait(full_v.index(before % SLOTS), before // SLOTS & 1)
    acc_MD = warpgroup_mma(p_MN, v_BND.index(before % SLOTS), acc_MD, is_async=True)
    mbarrier.arrive(turns.index(1 - INDEX))
    s_MN = warpgroup_mma_wait(1, deps=[s_MN])
    mbarrier.arrive(keys[2].index(tile % SLOTS))
    p_MN, max_M, sum_M, alpha_M = _softmax(s_MN, tile, position_M, max_M, sum_M, factor, masked)
    acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
    mbarrier.arrive(free_v.index(before % SLOTS))
    acc_MD = acc_MD * gl.convert_layout(alpha_M, gl.SliceLayout(1, acc_MD.type.layout))[:, None]
    operand: gl.constexpr = gl.DotOperandLayout(0, acc_MD.type.layout, 2)
    return acc_MD, gl.convert_layout(p_MN.to(q_MD.dtype), operand), max_M, sum_M


@gluon.jit
def _sweep(
    q_MD: gl.shared_memory_descriptor, keys: gl.tuple, values: gl.tuple, turns: gl.shared_memory_descriptor, place: gl.tuple,
    factor: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Return the state of rows before the product of the last tile with V."""
    _start, context, _length, first_row, _stop_row, _kv_head, tiles = place
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    D: gl.constexpr = spec.head
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    position_M = context + (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))) // spec.group
    sum_M = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    max_M = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    mbarrier.wait(turns.index(INDEX), 1 - INDEX)
    s_MN = _logits(q_MD, keys, 0)
    mbarrier.arrive(turns.index(1 - INDEX))
    s_MN = warpgroup_mma_wait(0, deps=[s_MN])
    mbarrier.arrive(keys[2].index(0))
    p_MN, max_M, sum_M, _ = _softmax(s_MN, 0, position_M, max_M, sum_M, factor, True)
    p_MN = gl.convert_layout(p_MN.to(q_MD.dtype), gl.DotOperandLayout(0, acc_layout, 2))
    state = gl.zeros([ROWS, D], gl.float32, acc_layout), p_MN, max_M, sum_M
    whole = gl.maximum((context + first_row // spec.group + 1) // KEYS, 1)  # of tile 0 the mask has been applied
    for tile in range(1, tiles):
        state = _turn(state, q_MD, keys, values, turns, tile, position_M, factor, INDEX, tile >= whole, spec)
    return state


@gluon.jit
def attend(
    out_ptr: gl.tensor, q_ptr: gl.tensor, q_2MD: gl.shared_memory_descriptor, keys: gl.tuple, values: gl.tuple,
    turns: gl.shared_memory_descriptor, place: gl.tuple, scales: gl.tuple, INDEX: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    """Attend with 64 rows, from the program's first + 64 INDEX on: a group of four warps."""
    start, context, length, first_row, stop_row, kv_head, tiles = place
    first_row += ROWS * INDEX
    factor, v_scale = scales
    D: gl.constexpr = spec.head
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row_M = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    head_M = (start.to(gl.int64) + row_M // spec.group) * spec.heads + kv_head * spec.group + row_M % spec.group
    at_MD = head_M[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    used_MD = (row_M < stop_row)[:, None]
    given_MD = gl.load(q_ptr + at_MD, mask=used_MD, other=0.0)
    if spec.fp8:
        given_MD = given_MD.to(gl.float32)
        given_MD = gl.where(given_MD > _HALF_MAX, _HALF_MAX, gl.where(given_MD < -_HALF_MAX, -_HALF_MAX, given_MD))
    q_MD = q_2MD.index(INDEX)
    q_MD.store(given_MD.to(q_MD.dtype))
    fence_async_shared()
    role_barrier()
    mine = (start, context, length, first_row, stop_row, kv_head, tiles)
    acc_MD, p_MN, _max_M, sum_M = _sweep(q_MD, keys, values, turns, mine, factor, INDEX, spec)
    v_BND, full_v, _free_v = values
    last = tiles - 1
    mbarrier.wait(full_v.index(last % SLOTS), last // SLOTS & 1)
    if not spec.fp8 and tiles * KEYS > length:
        _clear(v_BND.index(last % SLOTS), length - last * KEYS, layout)
    acc_MD = warpgroup_mma(p_MN, v_BND.index(last % SLOTS), acc_MD, is_async=True)
    acc_MD = warpgroup_mma_wait(0, deps=[acc_MD])
    acc_MD = acc_MD * gl.convert_layout(v_scale / sum_M, gl.SliceLayout(1, acc_MD.type.layout))[:, None]
    gl.store(out_ptr + at_MD, gl.convert_layout(acc_MD.to(out_ptr.dtype.element_ty), layout), mask=used_MD)
