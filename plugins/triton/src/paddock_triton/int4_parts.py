"""What the teams of `ops_linear_int4` do with sums: write a tile's outputs, or keep a part of them for who is done last.

Where programs share tiles, parts of one are added up in the order of their programs by the one that is done last: the same sum
each time. R rows of a half, 64; N tokens of a cut.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from paddock_triton.int4_bringing import program_of
from paddock_triton.int4_spec import ROWS

_AT_ONCE = gl.constexpr(3)  # parts
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a role's warps: Triton 3.7's name and 3.6's


@gluon.jit
def _store(
    acc_RN: gl.tensor, outs: gl.tuple, tile: gl.tensor, half: gl.constexpr, cut: gl.constexpr, sizes: gl.tuple,
    spec: gl.constexpr,
) -> None:  # fmt: skip
    """Write a half's outputs of a cut."""
    out_ptr, x_scale_ptr, _parts_ptr, _done_ptr = outs
    tokens, outputs, _blocks, _span, _tiles, token_tiles = sizes
    first_token = tile % token_tiles * spec.tokens + cut * spec.columns
    first_row = tile // token_tiles * spec.rows + half * ROWS
    if spec.fp8:
        token_N = first_token + gl.arange(0, spec.columns, gl.SliceLayout(0, spec.mma))
        acc_RN *= gl.load(x_scale_ptr + token_N, mask=token_N < tokens, other=0.0)[None, :]
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    token_N = first_token + gl.arange(0, spec.columns, gl.SliceLayout(0, layout))
    row_R = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    at_RN = out_ptr + token_N.to(gl.int64)[None, :] * outputs + row_R[:, None]
    inside_RN = (token_N < tokens)[None, :] & (row_R < outputs)[:, None]
    gl.store(at_RN, gl.convert_layout(acc_RN.to(out_ptr.dtype.element_ty), layout), mask=inside_RN)


@gluon.jit
def _part_at(
    parts_ptr: gl.tensor, program: gl.tensor, begins: gl.tensor, half: gl.constexpr, cut: gl.constexpr, spec: gl.constexpr
) -> gl.tensor:
    """Return where a program keeps a half of a cut of the part of a tile that it begins, or goes on with [64, N]."""
    row_R = gl.arange(0, ROWS, gl.SliceLayout(1, spec.mma))
    column_N = gl.arange(0, spec.columns, gl.SliceLayout(0, spec.mma))
    pieces: gl.constexpr = spec.cuts if spec.deep else spec.teams * spec.halves * spec.cuts
    first = ((program * 2 + begins) * pieces + half * spec.cuts + cut) * (ROWS * spec.columns)
    return parts_ptr + first + row_R[:, None] * spec.columns + column_N[None, :]


@gluon.jit
def _store_all(accs: gl.tuple, outs: gl.tuple, tile: gl.tensor, sizes: gl.tuple, INDEX: gl.constexpr, spec: gl.constexpr) -> None:
    """Write this team's halves of a tile."""
    halves: gl.constexpr = spec.halves
    cuts: gl.constexpr = spec.cuts
    for which in gl.static_range(halves):
        for cut in gl.static_range(cuts):
            _store(accs[which * 2 + cut], outs, tile, INDEX * spec.halves + which, cut, sizes, spec)


@gluon.jit
def _keep(accs: gl.tuple, parts_ptr: gl.tensor, begins: gl.tensor, INDEX: gl.constexpr, spec: gl.constexpr) -> None:
    """Keep this team's halves of a part of a tile."""
    halves: gl.constexpr = spec.halves
    cuts: gl.constexpr = spec.cuts
    for which in gl.static_range(halves):
        for cut in gl.static_range(cuts):
            at_RN = _part_at(parts_ptr, gl.program_id(0), begins, INDEX * spec.halves + which, cut, spec)
            gl.store(at_RN, accs[which * 2 + cut])


@gluon.jit
def _with_parts(
    sum_RN: gl.tensor, parts_ptr: gl.tensor, program: gl.tensor, last: gl.tensor, half: gl.constexpr, cut: gl.constexpr,
    spec: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Return a sum with the parts of some programs, asked for at once."""
    a_RN = gl.load(_part_at(parts_ptr, program, 0, half, cut, spec))
    b_RN = gl.load(_part_at(parts_ptr, program + 1, 0, half, cut, spec), mask=program + 1 <= last, other=0.0)
    c_RN = gl.load(_part_at(parts_ptr, program + 2, 0, half, cut, spec), mask=program + 2 <= last, other=0.0)
    return sum_RN + a_RN + b_RN + c_RN


@gluon.jit
def _join(
    outs: gl.tuple, tile: gl.tensor, first: gl.tensor, last: gl.tensor, sizes: gl.tuple, INDEX: gl.constexpr, spec: gl.constexpr
) -> None:  # fmt: skip
    """Write this team's halves of a tile, of the parts of programs `first` to `last`."""
    halves: gl.constexpr = spec.halves
    cuts: gl.constexpr = spec.cuts
    for which in gl.static_range(halves):
        for cut in gl.static_range(cuts):
            sum_RN = gl.load(_part_at(outs[2], first, 1, INDEX * spec.halves + which, cut, spec))
            for program in range(first + 1, last + 1, _AT_ONCE):
                sum_RN = _with_parts(sum_RN, outs[2], program, last, INDEX * spec.halves + which, cut, spec)
            _store(sum_RN, outs, tile, INDEX * spec.halves + which, cut, sizes, spec)


@gluon.jit
def finish(
    accs: gl.tuple, outs: gl.tuple, tile: gl.tensor, block: gl.tensor, steps: gl.tensor, sizes: gl.tuple, INDEX: gl.constexpr,
    spec: gl.constexpr,
) -> None:  # fmt: skip
    """Write a piece's outputs; where it is a part of a tile, keep it, and add up all parts if it is the last to be done."""
    _out_ptr, _x_scale_ptr, parts_ptr, done_ptr = outs
    _tokens, _outputs, _blocks, span, tiles, _token_tiles = sizes
    if not spec.shared or steps == span:
        _store_all(accs, outs, tile, sizes, INDEX, spec)
    else:
        _keep(accs, parts_ptr, (block == 0).to(gl.int32), INDEX, spec)
        _barrier()
        programs, units = gl.num_programs(0), tiles * span
        first, last = program_of(tile * span, programs, units), program_of(tile * span + span - 1, programs, units)
        done = gl.atomic_add(done_ptr + tile * spec.teams + INDEX, 1)
        if done == last - first:
            gl.store(done_ptr + tile * spec.teams + INDEX, 0)
            _join(outs, tile, first, last, sizes, INDEX, spec)
