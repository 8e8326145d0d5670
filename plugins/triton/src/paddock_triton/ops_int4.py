"""A 4-bit weight in another form.

Each of the sixteen codes of a group is divided and rounded once, into a table of sixteen bytes; codes are then looked up, four
at a time. docs/decisions/0068-int4-at-speed.md says what that costs; `python -m tests.bench.int4_to_fp8_variants` times tiles.

R pairs of outputs r and r + 8 of a slab, a thread each; Q groups of a block of 128 inputs, W words of four of a group's inputs,
32 of a block's. The bytes of a weight are those of `paddock.layers.int4`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor
from triton import knobs

from paddock.layers import reference
from paddock.layers.int4 import BLOCK, Int4Weight
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.fp8 import quotient
from paddock_triton.launch import launch, launches_nothing
from paddock_triton.rows import blocks_of

_ON_GPU = tl.constexpr(not knobs.runtime.interpret)
_PIECE = 16  # inputs that lie in four words of a thread: a group is so many or a multiple
_WARP_OUTPUTS = 64
_BLOCK, _SLAB, _PAIRS = tl.constexpr(128), tl.constexpr(16), tl.constexpr(8)
_SLAB_WORDS, _BLOCK_WORDS, _PIECE_WORDS = tl.constexpr(256), tl.constexpr(32), tl.constexpr(4)
_MIDDLES = tl.constexpr(0x88)  # the zeros of a pair where none are kept

# From a word of the codes of two outputs, and a table of 16 bytes in four words for each, to the values of four inputs of either.
# The lower three bits of a code choose one of eight bytes, its fourth, spread over a byte by `prmt`, the first or last eight.
_LOOK_UP = tl.constexpr("""{
.reg .b32 left, right, low, high, at, few, many, upper;
shl.b32 left, $2, 4;
shr.b32 right, $2, 4;
lop3.b32 low, $2, right, 0x0F0F0F0F, 0xE4;
lop3.b32 high, left, $2, 0x0F0F0F0F, 0xE4;
prmt.b32 at, low, high, 0x7520;
and.b32 at, at, 0x77777777;
prmt.b32 few, $3, $4, at;
prmt.b32 many, $5, $6, at;
prmt.b32 upper, left, 0, 0xBA98;
lop3.b32 $0, many, few, upper, 0xE4;
shr.b32 at, at, 16;
prmt.b32 few, $7, $8, at;
prmt.b32 many, $9, $10, at;
prmt.b32 upper, $2, 0, 0xBA98;
lop3.b32 $1, many, few, upper, 0xE4;
}""")

# Four numbers in FP8 to a word.
_TO_WORD = tl.constexpr("""{
.reg .b16 few, many;
cvt.rn.satfinite.e4m3x2.f32 few, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 many, $4, $3;
mov.b32 $0, {few, many};
}""")


@frozen(kw_only=True)
class Fp8Tile:
    """How a weight is cut: `outputs` of a program, a multiple of 64, in each of `blocks` of inputs, one after the other.

    `shared`: a warp reads bytes side by side, and threads tell each other their tables; else each reads all of its own pair's.
    """

    outputs: int
    blocks: int
    shared: bool = False


_TILE = Fp8Tile(outputs=64, blocks=1)


@named("int4_to_fp8")
def int4_to_fp8(weight: Int4Weight, row_scale_O1: Tensor) -> Tensor:
    """Return a 4-bit weight as FP8 e4m3 [O, I], each output divided by its scale: real = values * row_scale, and a rounding."""
    form = weight.form
    if form.group % _PIECE:  # products with such weights run in plain torch too
        nothing = torch.empty(form.outputs, form.inputs, dtype=torch.float8_e4m3fn, device=weight.packed.device)
        return nothing if launches_nothing() else reference.int4_to_fp8(weight, row_scale_O1)
    return launch_to_fp8(weight, row_scale_O1, _TILE)


def launch_to_fp8(weight: Int4Weight, row_scale_O1: Tensor, tile: Fp8Tile) -> Tensor:
    """Return a weight of groups of a multiple of 16 inputs as FP8 [O, I], cut as `tile` says."""
    form = weight.form
    values_OI = torch.empty(form.outputs, form.inputs, dtype=torch.float8_e4m3fn, device=weight.packed.device)
    launch(
        _fp8_kernel, (blocks_of(form.blocks, tile.blocks), blocks_of(form.outputs, tile.outputs)),
        weight.packed.view(torch.int32), weight.scales, weight.zeros, row_scale_O1.contiguous(), values_OI.view(torch.int32),
        form.inputs // _PIECE, form.outputs, form.slabs, form.blocks, GROUP=form.group,
        GROUPS=1 if form.groups == 1 else BLOCK // math.gcd(form.group, BLOCK), PAIRS=tile.outputs // 2, BLOCKS=tile.blocks,
        SHARED=tile.shared, num_warps=tile.outputs // _WARP_OUTPUTS, **DEPENDENT,
    )  # fmt: skip
    return values_OI


@triton.jit(do_not_specialize=["pieces", "outputs", "slabs", "blocks"])
def _fp8_kernel(
    packed_ptr: tl.tensor, scales_ptr: tl.tensor, zeros_ptr: tl.tensor, row_scale_ptr: tl.tensor, values_ptr: tl.tensor,
    pieces: tl.tensor, outputs: tl.tensor, slabs: tl.tensor, blocks: tl.tensor, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    PAIRS: tl.constexpr, BLOCKS: tl.constexpr, SHARED: tl.constexpr,
) -> None:  # fmt: skip
    """Write some blocks of some outputs; the weight is nobody's to write, the values may be a reader's before."""
    start_next()
    wait()
    pair_R = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    low_o_R = pair_R // _PAIRS * _SLAB + pair_R % _PAIRS
    high_o_R = low_o_R + _PAIRS
    low_row_R1 = tl.load(row_scale_ptr + low_o_R, mask=low_o_R < outputs, other=1.0)[:, None]
    high_row_R1 = tl.load(row_scale_ptr + high_o_R, mask=high_o_R < outputs, other=1.0)[:, None]
    for turn in range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + turn
        held_R1 = ((pair_R < slabs * _PAIRS) & (block < blocks))[:, None]
        group_1Q = ((block * _BLOCK + tl.arange(0, GROUPS) * (_BLOCK // GROUPS)) // GROUP).to(tl.int64)[None, :] * slabs
        low_at_RQ = scales_ptr + group_1Q * _SLAB + low_o_R[:, None]
        low_RQ = tl.load(low_at_RQ, mask=held_R1, other=0.0).to(tl.float32)
        high_RQ = tl.load(low_at_RQ + _PAIRS, mask=held_R1, other=0.0).to(tl.float32)
        if zeros_ptr is not None:
            zero_RQ = tl.load(zeros_ptr + group_1Q * _PAIRS + pair_R[:, None], mask=held_R1, other=0).to(tl.int32)
        else:
            zero_RQ = tl.full([PAIRS, GROUPS], _MIDDLES, tl.int32)
        first_ptr = packed_ptr + block.to(tl.int64) * slabs * _SLAB_WORDS
        if SHARED:
            first = tl.program_id(1) * (PAIRS * _BLOCK_WORDS)
            codes_RW = _shared_codes(first_ptr + first, tl.where(block < blocks, slabs * _SLAB_WORDS - first, 0), PAIRS)
        else:
            codes_RW = _codes(first_ptr, pair_R, held_R1)
        low_RW, high_RW = _looked_up(
            codes_RW,
            _table((zero_RQ & 15).to(tl.float32), low_RQ, low_row_R1),
            _table((zero_RQ >> 4).to(tl.float32), high_RQ, high_row_R1),
        )
        word_1W = (block * _BLOCK_WORDS + tl.arange(0, _BLOCK_WORDS))[None, :]
        _store(values_ptr, pieces * _PIECE_WORDS, outputs, low_o_R, word_1W, low_RW)
        _store(values_ptr, pieces * _PIECE_WORDS, outputs, high_o_R, word_1W, high_RW)


@triton.jit
def _codes(block_ptr: tl.tensor, pair_R: tl.tensor, held_R1: tl.tensor) -> tl.tensor:
    """Return a block's codes of each pair in the order of its inputs [R, W], four of each output a word.

    A thread reads all of its pair's bytes, 16 at once: its neighbour's begin 64 further on.
    """
    at_R4 = block_ptr + (pair_R // _PAIRS * _SLAB_WORDS + pair_R % _PAIRS * 16)[:, None] + tl.arange(0, 4)[None, :]
    halves_RX2 = tl.join(_half(at_R4, held_R1), _half(at_R4 + _SLAB_WORDS // 2, held_R1))
    return tl.reshape(tl.permute(halves_RX2, [0, 2, 1]), [pair_R.shape[0], _BLOCK_WORDS])


@triton.jit
def _shared_codes(ptr: tl.tensor, words: tl.tensor, PAIRS: tl.constexpr) -> tl.tensor:
    """Return what `_codes` does, read side by side from `ptr` on, where `words` are left: by slab, half, pair, 4 by 4 words."""
    word = tl.arange(0, PAIRS * _BLOCK_WORDS)
    codes = tl.load(ptr + word, mask=word < words, other=0)
    by_pair = tl.permute(tl.reshape(codes, [PAIRS // _PAIRS, 2, _PAIRS, 4, 4]), [0, 2, 1, 4, 3])
    return tl.reshape(by_pair, [PAIRS, _BLOCK_WORDS])


@triton.jit
def _half(at_R4: tl.tensor, held_R1: tl.tensor) -> tl.tensor:
    """Return half a block's words in the order of inputs [R, 16]: four side by side in memory are of 16 inputs each."""
    first_R4, second_R4 = tl.load(at_R4, mask=held_R1, other=0), tl.load(at_R4 + 4, mask=held_R1, other=0)
    third_R4, fourth_R4 = tl.load(at_R4 + 8, mask=held_R1, other=0), tl.load(at_R4 + 12, mask=held_R1, other=0)
    all_R422 = tl.join(tl.join(first_R4, third_R4), tl.join(second_R4, fourth_R4))
    return tl.reshape(all_R422, [at_R4.shape[0], 16])


@triton.jit
def _table(zero_RQ: tl.tensor, scale_RQ: tl.tensor, row_scale_R1: tl.tensor) -> tl.tuple:
    """Return the values of the sixteen codes, four in each of four words [R, Q]."""
    a_RQ = _entries(0, zero_RQ, scale_RQ, row_scale_R1)
    b_RQ = _entries(4, zero_RQ, scale_RQ, row_scale_R1)
    c_RQ = _entries(8, zero_RQ, scale_RQ, row_scale_R1)
    d_RQ = _entries(12, zero_RQ, scale_RQ, row_scale_R1)
    return a_RQ, b_RQ, c_RQ, d_RQ


@triton.jit
def _entries(FIRST: tl.constexpr, zero_RQ: tl.tensor, scale_RQ: tl.tensor, row_scale_R1: tl.tensor) -> tl.tensor:
    """Return the values of four codes from FIRST on in a word [R, Q]."""
    a_RQ = quotient((FIRST - zero_RQ) * scale_RQ, row_scale_R1)
    b_RQ = quotient((FIRST + 1 - zero_RQ) * scale_RQ, row_scale_R1)
    c_RQ = quotient((FIRST + 2 - zero_RQ) * scale_RQ, row_scale_R1)
    d_RQ = quotient((FIRST + 3 - zero_RQ) * scale_RQ, row_scale_R1)
    if _ON_GPU:
        word_RQ = tl.inline_asm_elementwise(
            _TO_WORD, "=r,r,r,r,r", [a_RQ, b_RQ, c_RQ, d_RQ], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word_RQ = _byte(a_RQ) | _byte(b_RQ) << 8 | _byte(c_RQ) << 16 | _byte(d_RQ) << 24
    return word_RQ


@triton.jit
def _byte(value: tl.tensor) -> tl.tensor:
    """Return what is FP8 when rounded as the byte that it is then."""
    return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _looked_up(codes_RW: tl.tensor, low_RQ4: tl.tuple, high_RQ4: tl.tuple) -> tl.tuple:
    """Return the values of four inputs a word [R, W]: of the outputs in the low halves of codes' bytes, of those in the high.

    `low_RQ4` is the table of the former, `high_RQ4` that of the latter.
    """
    a, b, c, d = _widened(low_RQ4)
    e, f, g, h = _widened(high_RQ4)
    codes_RQW = tl.reshape(codes_RW, [a.shape[0], a.shape[1], _BLOCK_WORDS // a.shape[1]])
    if _ON_GPU:
        low_RQW, high_RQW = tl.inline_asm_elementwise(
            _LOOK_UP, "=r,=r,r,r,r,r,r,r,r,r,r", [codes_RQW, a, b, c, d, e, f, g, h], (tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        low_RQW, high_RQW = _looked_up_singly(codes_RQW, a, b, c, d), _looked_up_singly(codes_RQW >> 4, e, f, g, h)
    return tl.reshape(low_RQW, codes_RW.shape), tl.reshape(high_RQW, codes_RW.shape)


@triton.jit
def _widened(table_RQ4: tl.tuple) -> tl.tuple:
    """Return a table's words [R, Q, 1]."""
    a_RQ, b_RQ, c_RQ, d_RQ = table_RQ4
    return a_RQ[:, :, None], b_RQ[:, :, None], c_RQ[:, :, None], d_RQ[:, :, None]


@triton.jit
def _looked_up_singly(codes: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Return what `_LOOK_UP` does for the low halves of codes' bytes, where there is no GPU to run it."""
    values = tl.zeros_like(codes)
    for place in tl.static_range(4):
        code = codes >> 8 * place & 15
        four = tl.where(code < 8, tl.where(code < 4, a, b), tl.where(code < 12, c, d))
        values |= (four >> 8 * (code & 3) & 255) << 8 * place
    return values


@triton.jit
def _store(
    values_ptr: tl.tensor, words: tl.tensor, outputs: tl.tensor, o_R: tl.tensor, word_1W: tl.tensor, values_RW: tl.tensor
) -> None:  # fmt: skip
    """Write a block's words of some outputs, whose rows have `words`."""
    at_RW = values_ptr + o_R.to(tl.int64)[:, None] * words + word_1W
    tl.store(at_RW, values_RW, mask=(o_R < outputs)[:, None] & (word_1W < words))
