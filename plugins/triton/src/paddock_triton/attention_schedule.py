"""Which program does what: sequences cut into pieces, on the device, so that no length ever visits the host.

S sequences, U units, J units written at a time. A unit is six int32: sequence (-1: nothing to do), begin and end of its piece,
how many pieces the sequence has, its first unit, its length. The grid is sized by what the host knows; lengths may change from
replay to replay of a graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from paddock.layers import AttentionInputs
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import OTHER_ATTENTION, named
from paddock_triton.launch import launch

UNIT = tl.constexpr(8)  # int32 words between units: 32 bytes, one sector
_NO_WINDOW = 2**30
# Of keys in a piece of a decode. A Llama-3.1-8B layer of one token on an H100 with 2, 3, 4, 8: 153.9, 152.5, 152.6, 152.6 us for
# 192 keys, 156.8, 156.3, 158.8, 162.0 for 1,000, 163.0, 163.3, 163.5, 163.6 for 4,000. One: 11.0 us where 2 take 8.3.
_LEAST_TILES = 3
# Of a decode that stays whole. A layer of one token of 230 keys on an H200, of three tiles at most and of four: 8B in FP8
# 70.1 and 68.8 us, in bfloat16 116.1 and 116.4, Falcon-180B 312 and 310; of six, 380 keys of 8B take 71.2 instead of 69.9. By
# `layer_stack`'s layers, 8 or 10 of 8B's and 3 of Falcon's, with this number changed, in a script that is not kept.
_WHOLE_TILES = 4


@frozen(eq=False)
class Units:
    """`units_U8` as the kernels read them and `counters_S`, zero before and after each launch; U is what the grid needs."""

    units_U8: Tensor
    counters_S: Tensor

    @property
    def count(self) -> int:
        """Return U."""
        return self.units_U8.shape[0]


@named("decode_units", fix=OTHER_ATTENTION)
def decode_units(inputs: AttentionInputs, *, window: int | None, wanted: int, tile: int, heads: int) -> Units:
    """Return pieces of key ranges, about `wanted` in all, of equal length in whole tiles; a sequence of up to four tiles is one.

    With C = total / wanted rounded up, the sum of ceil(length / C) is at most `wanted` + S.
    """
    count = inputs.num_decodes
    return _launch(
        inputs,
        first=0,
        count=count,
        units=wanted + count,
        counters=count * heads,
        wanted=wanted,
        piece=tile,
        window=_NO_WINDOW if window is None else window,
        group=0,
    )


@named("prefill_units", fix=OTHER_ATTENTION)
def prefill_units(inputs: AttentionInputs, *, num_tokens: int, group: int, tile: int) -> Units:
    """Return tiles of each prefill's rows, a row for each token and query head of a KV head; the longest first."""
    first = inputs.num_decodes
    count = inputs.seq_lens_S.shape[0] - first
    units = (num_tokens - first) * group // tile + count
    return _launch(
        inputs, first=first, count=count, units=units, counters=0, wanted=1, piece=tile, window=_NO_WINDOW, group=group
    )


def _launch(
    inputs: AttentionInputs,
    *,
    first: int,
    count: int,
    units: int,
    counters: int,
    wanted: int,
    piece: int,
    window: int,
    group: int,
) -> Units:
    device = inputs.seq_lens_S.device
    units_U8 = torch.empty((units, UNIT.value), dtype=torch.int32, device=device)
    launch(
        _cut,
        (count,),
        units_U8,
        inputs.seq_lens_S,
        inputs.query_start_S1,
        first,
        count,
        units,
        wanted,
        window,
        group,
        PIECE=piece,
        LEAST=_LEAST_TILES,
        WHOLE=_WHOLE_TILES,
        BLOCK_S=_lanes(count),
        BLOCK_J=128,
        PREFILL=group > 0,
        num_warps=4,
        **DEPENDENT,
    )
    # Zeroed behind them: what runs after this fill, a kernel without dependent launch, may read the units before it waits.
    return Units(units_U8, torch.zeros(counters, dtype=torch.int32, device=device))


def _lanes(count: int) -> int:
    """Return 64, 256, 1024, ...: few sizes, for each is a kernel of its own, compiled amid serving when it is first met."""
    lanes = 64
    while lanes < count:
        lanes *= 4
    return lanes


@triton.jit
def _sizes(
    lens_ptr: tl.tensor, starts_ptr: tl.tensor, seq: tl.tensor, inside: tl.tensor, window: tl.tensor, group: tl.tensor,
    PIECE: tl.constexpr, PREFILL: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return where each sequence's work begins and how long it is: keys for a decode, rows for a prefill."""
    if PREFILL:
        start = tl.load(starts_ptr + seq, mask=inside, other=0)
        stop = tl.load(starts_ptr + seq + 1, mask=inside, other=0)
        return start * 0, (stop - start) * group
    length = tl.load(lens_ptr + seq, mask=inside, other=0)
    begin = tl.maximum(length - window, 0) // PIECE * PIECE
    return begin, length - begin


@triton.jit
def _pieces(size: tl.tensor, piece: tl.tensor, PIECE: tl.constexpr, WHOLE: tl.constexpr, PREFILL: tl.constexpr) -> tl.tensor:
    """Return into how many pieces a sequence is cut: a decode of few tiles into one, for pieces have to be joined."""
    pieces = tl.maximum(tl.cdiv(size, piece), 1)
    if not PREFILL:
        pieces = tl.where(size <= WHOLE * PIECE, 1, pieces)
    return pieces


@triton.jit(  # one kernel for steps of every size: a new one would be compiled amid serving
    do_not_specialize=["first", "count", "num_units", "wanted", "window", "group"],
    do_not_specialize_on_alignment=["lens_ptr", "starts_ptr"],
)
def _cut(
    units_ptr: tl.tensor, lens_ptr: tl.tensor, starts_ptr: tl.tensor, first: tl.tensor, count: tl.tensor, num_units: tl.tensor,
    wanted: tl.tensor, window: tl.tensor, group: tl.tensor, PIECE: tl.constexpr, LEAST: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, PREFILL: tl.constexpr,
) -> None:  # fmt: skip
    """Write one sequence's units; the last sequence's program writes the empty ones too."""
    start_next()
    me = tl.program_id(0)
    wait()
    s_S = tl.arange(0, BLOCK_S)
    _, size_S = _sizes(lens_ptr, starts_ptr, first + s_S, s_S < count, window, group, PIECE, PREFILL)
    piece = PIECE
    if not PREFILL:
        piece = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(size_S), wanted), PIECE), LEAST) * PIECE
    pieces_S = tl.where(s_S < count, _pieces(size_S, piece, PIECE, WHOLE, PREFILL), 0)
    begin, size = _sizes(lens_ptr, starts_ptr, first + me, True, window, group, PIECE, PREFILL)
    pieces = _pieces(size, piece, PIECE, WHOLE, PREFILL)
    if not PREFILL:  # of equal length: 65 tiles in pieces of 64 would be one of 64 and one of 1
        piece = tl.cdiv(tl.cdiv(size, pieces), PIECE) * PIECE
    first_unit = tl.sum(tl.where(s_S < me, pieces_S, 0))
    owner = first + me
    if PREFILL:
        owner = tl.where(size > 0, owner, -1)
    lane_J = tl.arange(0, BLOCK_J)
    for start in range(0, pieces, BLOCK_J):
        j_J = start + lane_J
        part_J = pieces - 1 - j_J if PREFILL else j_J
        at_J, inside_J = units_ptr + (first_unit + j_J) * UNIT, j_J < pieces
        tl.store(at_J, j_J * 0 + owner, mask=inside_J)
        tl.store(at_J + 1, begin + part_J * piece, mask=inside_J)
        tl.store(at_J + 2, begin + tl.minimum((part_J + 1) * piece, size), mask=inside_J)
        tl.store(at_J + 3, j_J * 0 + pieces, mask=inside_J)
        tl.store(at_J + 4, j_J * 0 + first_unit, mask=inside_J)
        tl.store(at_J + 5, j_J * 0 + tl.load(lens_ptr + first + me), mask=inside_J)
    if me == count - 1:
        for start in range(first_unit + pieces, num_units, BLOCK_J):
            unit_J = start + lane_J
            tl.store(units_ptr + unit_J * UNIT, unit_J * 0 - 1, mask=unit_J < num_units)
