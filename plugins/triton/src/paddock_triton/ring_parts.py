"""What the teams of a kernel with a `ring` do with sums: write a tile's outputs, or keep a part for who begins the tile.

Where programs share tiles, parts of one are added up in the order of their programs by the one that begins it: the same sum each
time. That part is the last of a program's work, what others go on with the first of what they share (in waves all of it comes
after whole tiles, of which each has equally many), so that it has mostly been kept by then; if not, the program waits. It may: a
launch has no more programs than multiprocessors have places, so that it keeps none of those it waits for from starting; kernels
before it end by themselves, and none behind it starts before all of its programs have.
R rows of a half, 64; N tokens of a cut.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from paddock_triton.ring import ROWS, barriers, program_of, role_barrier, whole_tiles


@gluon.jit
def nothing(spec: gl.constexpr) -> gl.tensor:
    """Return the sums of no products [64, N]."""
    columns: gl.constexpr = spec.columns
    layout: gl.constexpr = spec.mma
    return gl.zeros([ROWS, columns], gl.float32, layout)


@gluon.jit
def gathering_of(ring: gl.tuple, spec: gl.constexpr) -> gl.tuple:
    """Return where teams hand over their sums of a tile, and its barriers; anything where they do not."""
    gathering = ring
    if spec.deep:
        handed: gl.constexpr = spec.handed_shared
        others: gl.constexpr = spec.teams - 1
        sums_SRN = gl.allocate_shared_memory(gl.float32, [spec.teams - 1, ROWS, spec.tokens], handed)
        gathering = (sums_SRN, barriers(1, others), barriers(1, 1))
    return gathering


@gluon.jit
def gathered(accs: gl.tuple, gathering: gl.tuple, n: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> gl.tuple:
    """Return, for the first team, the sums of all teams over piece n's inputs; the others hand theirs to it."""
    sums_SRN, given, taken = gathering
    acc_RN, b_RN, c_RN, d_RN = accs
    if INDEX == 0:
        mbarrier.wait(given.index(0), n & 1)
        others: gl.constexpr = spec.teams - 1
        for other in gl.static_range(others):
            acc_RN += sums_SRN.index(other).load(spec.mma)
        role_barrier()
        mbarrier.arrive(taken.index(0))
    else:
        mbarrier.wait(taken.index(0), (n & 1) ^ 1)
        sums_SRN.index(INDEX - 1).store(acc_RN)
        role_barrier()
        mbarrier.arrive(given.index(0))
    return acc_RN, b_RN, c_RN, d_RN


@gluon.jit
def store(
    acc_RN: gl.tensor, outs: gl.tuple, tile: gl.tensor, half: gl.constexpr, cut: gl.constexpr, sizes: gl.tuple,
    spec: gl.constexpr,
) -> None:  # fmt: skip
    """Write a half's outputs of a cut."""
    out_ptr, x_scale_ptr, _parts_ptr, _done_ptr = outs
    tokens, outputs, _blocks, _span, _tiles, token_tiles = sizes
    first_token = tile % token_tiles * spec.tokens + cut * spec.columns
    first_row = tile // token_tiles * spec.rows + half * ROWS
    if spec.token_scales:
        token_N = first_token + gl.arange(0, spec.columns, gl.SliceLayout(0, spec.mma))
        acc_RN *= gl.load(x_scale_ptr + token_N, mask=token_N < tokens, other=0.0)[None, :]
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    token_N = first_token + gl.arange(0, spec.columns, gl.SliceLayout(0, layout))
    row_R = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    at_RN = out_ptr + token_N.to(gl.int64)[None, :] * outputs + row_R[:, None]
    inside_RN = (token_N < tokens)[None, :] & (row_R < outputs)[:, None]
    gl.store(at_RN, gl.convert_layout(acc_RN.to(out_ptr.dtype.element_ty), layout), mask=inside_RN)


@gluon.jit
def _by_thread(sum_RN: gl.tensor, spec: gl.constexpr) -> gl.tensor:
    """Return sums as a row [64 N] of which a thread has four neighbours, and the next thread the next four: 16 bytes a load."""
    parts = sum_RN.reshape([4, 2, 8, spec.columns // 8, 4, 2])  # warp, eight rows, row, eight columns, thread of four, column
    return parts.permute([3, 0, 2, 4, 1, 5]).reshape([ROWS * spec.columns])


@gluon.jit
def _by_row(sum_F: gl.tensor, spec: gl.constexpr) -> gl.tensor:
    """Return what `_by_thread` was given [64, N]."""
    parts = sum_F.reshape([spec.columns // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5])
    return gl.convert_layout(parts.reshape([ROWS, spec.columns]), spec.mma, assert_trivial=True)


@gluon.jit
def _part_at(
    parts_ptr: gl.tensor, program: gl.tensor, piece: gl.constexpr, like_F: gl.tensor, spec: gl.constexpr
) -> gl.tensor:  # fmt: skip
    """Return where a program keeps a piece (a half of a cut) of the part of a tile that it goes on with [64 N]."""
    size: gl.constexpr = ROWS * spec.columns
    return parts_ptr + (program * spec.part_size + piece * size) + gl.arange(0, size, like_F.type.layout)


@gluon.jit
def _store_all(
    accs: gl.tuple, outs: gl.tuple, tile: gl.tensor, sizes: gl.tuple, INDEX: gl.constexpr, STORE: gl.constexpr,
    spec: gl.constexpr,
) -> None:  # fmt: skip
    """Write this team's halves of a tile."""
    halves: gl.constexpr = spec.halves
    cuts: gl.constexpr = spec.cuts
    for which in gl.static_range(halves):
        for cut in gl.static_range(cuts):
            STORE(accs[which * 2 + cut], outs, tile, INDEX * spec.halves + which, cut, sizes, spec)


@gluon.jit
def _keep(accs: gl.tuple, parts_ptr: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> None:
    """Keep this team's halves of a part of a tile."""
    halves: gl.constexpr = spec.halves
    cuts: gl.constexpr = spec.cuts
    for which in gl.static_range(halves):
        for cut in gl.static_range(cuts):
            sum_F = _by_thread(accs[which * 2 + cut], spec)
            piece = (INDEX * spec.halves + which) * spec.cuts + cut
            gl.store(_part_at(parts_ptr, gl.program_id(0), piece, sum_F, spec), sum_F)


@gluon.jit
def _with_parts(sum_RN: gl.tensor, parts_ptr: gl.tensor, last: gl.tensor, piece: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Return a piece's sum with the parts of the programs from the next one to `last`, in their order.

    Small ones are asked for three at once. The nearest cache would not see what others write.
    """
    sum_F = _by_thread(sum_RN, spec)
    for program in range(gl.program_id(0) + 1, last + 1, spec.parts_at_once):
        at_F = _part_at(parts_ptr, program, piece, sum_F, spec)
        part_F = gl.load(at_F, cache_modifier=".cg")
        if spec.parts_at_once == 3:
            second_F = gl.load(at_F + spec.part_size, mask=program + 1 <= last, other=0.0, cache_modifier=".cg")
            third_F = gl.load(at_F + 2 * spec.part_size, mask=program + 2 <= last, other=0.0, cache_modifier=".cg")
            sum_F = sum_F + part_F + second_F + third_F
        else:
            sum_F += part_F
    return _by_row(sum_F, spec)


@gluon.jit
def _join(
    accs: gl.tuple, outs: gl.tuple, tile: gl.tensor, last: gl.tensor, sizes: gl.tuple, INDEX: gl.constexpr, STORE: gl.constexpr,
    spec: gl.constexpr,
) -> None:  # fmt: skip
    """Write this team's halves of a tile: what it has, and the parts of the programs up to `last`."""
    halves: gl.constexpr = spec.halves
    cuts: gl.constexpr = spec.cuts
    for which in gl.static_range(halves):
        for cut in gl.static_range(cuts):
            piece = (INDEX * spec.halves + which) * spec.cuts + cut
            sum_RN = _with_parts(accs[which * 2 + cut], outs[2], last, piece, spec)
            STORE(sum_RN, outs, tile, INDEX * spec.halves + which, cut, sizes, spec)


@gluon.jit
def _wait_for(done_ptr: gl.tensor, parts: gl.tensor) -> None:
    """Return once so many parts are kept, and forget them."""
    while gl.atomic_add(done_ptr, 0, sem="acquire") < parts:
        pass
    gl.store(done_ptr, 0)


@gluon.jit
def finish(
    accs: gl.tuple, outs: gl.tuple, tile: gl.tensor, block: gl.tensor, steps: gl.tensor, sizes: gl.tuple, INDEX: gl.constexpr,
    STORE: gl.constexpr, spec: gl.constexpr,
) -> None:  # fmt: skip
    """Write a piece's outputs, as STORE writes a half's of a cut.

    Who begins a tile adds up its parts; who goes on with one keeps a part, and counts it.
    """
    _out_ptr, _x_scale_ptr, parts_ptr, done_ptr = outs
    _tokens, _outputs, _blocks, span, tiles, _token_tiles = sizes
    if not spec.shared or steps == span:
        _store_all(accs, outs, tile, sizes, INDEX, STORE, spec)
    else:
        whole = whole_tiles(gl.num_programs(0), tiles, spec.waves)
        done_ptr += (tile - whole) * spec.teams + INDEX
        if block > 0:
            _keep(accs, parts_ptr, INDEX, spec)
            role_barrier()
            gl.atomic_add(done_ptr, 1, sem="release")
        else:
            last = program_of((tile - whole) * span + span - 1, gl.num_programs(0), (tiles - whole) * span)
            _wait_for(done_ptr, last - gl.program_id(0))
            _join(accs, outs, tile, last, sizes, INDEX, STORE, spec)
