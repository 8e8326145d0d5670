"""One token times a 4-bit weight by packed multiply-adds of halves: the kernel that `tests.bench.int4_one_token` times.

Many small programs read the weight, as those of one token in FP8 do (decision 63): a lane's 16 bytes are four words of eight
codes, of two outputs and four inputs; two masks and a shift make halves of them, which packed multiply-adds take.

A code masked out of a word is, as a half, code * 2^-24 (a subnormal number, exact), or 16 times that; so no constant has to leave
it again. Sixteen products are added up in a half, then scaled in float32; the zero point times the sum of the inputs leaves
there. Such sums have an absolute error, so inputs are brought to one exponent a block of 128 first: its largest lies between 256
and 512. FP8 inputs stay exact; those of 16 bits keep 11 bits, as far as 2^-22 of the largest.

B blocks of a turn, S slabs of a program, L lanes, V, H = 2 and C chunks as `paddock.layers.int4` says.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Four FP8 inputs to the first and third, the second and fourth as halves.
_TO_HALVES = gl.constexpr("""{
.reg .b32 t;
.reg .b16 a, b;
prmt.b32 t, $2, 0, 0x3120;
mov.b32 {a, b}, t;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
}""")
# The larger magnitudes of two pairs of four inputs, and of those before.
LARGER = gl.constexpr("""{
.reg .b32 a, b;
mov.b64 {a, b}, $1;
and.b32 a, a, 0x7FFF7FFF;
and.b32 b, b, 0x7FFF7FFF;
max.TYPE a, a, b;
max.TYPE $0, a, $2;
}""")
_LARGER_HALVES = gl.constexpr("""{
.reg .b32 a, b;
and.b32 a, $1, 0x7FFF7FFF;
and.b32 b, $2, 0x7FFF7FFF;
max.f16x2 a, a, b;
max.f16x2 $0, a, $3;
}""")
# A pair of halves times a factor.
_SCALED = gl.constexpr("""{
.reg .b16 f;
.reg .b32 g;
cvt.rn.f16.f32 f, $2;
mov.b32 g, {f, f};
mul.rn.f16x2 $0, $1, g;
}""")
# Of a pair, and of the four lanes that have a block's inputs, the largest in float32.
LARGEST = gl.constexpr("""{
.reg .b32 m, n;
.reg .b16 a, b;
.reg .f32 p, q;
shfl.sync.bfly.b32 n, $1, 1, 0x1F, 0xFFFFFFFF;
max.TYPE m, $1, n;
shfl.sync.bfly.b32 n, m, 2, 0x1F, 0xFFFFFFFF;
max.TYPE m, m, n;
mov.b32 {a, b}, m;
WIDENp, a;
WIDENq, b;
max.f32 $0, p, q;
}""")
# Four inputs of 16 bits times a factor, to the first and third, the second and fourth as halves.
TO_SCALED_HALVES = gl.constexpr("""{
.reg .b16 a, b, c, d;
.reg .f32 p, q, r, s;
mov.b64 {a, b, c, d}, $2;
WIDENp, a;
WIDENq, b;
WIDENr, c;
WIDENs, d;
mul.f32 p, p, $3;
mul.f32 q, q, $3;
mul.f32 r, r, $3;
mul.f32 s, s, $3;
cvt.rn.f16x2.f32 $0, r, p;
cvt.rn.f16x2.f32 $1, s, q;
}""")
_ADD_TWO = gl.constexpr("""{
.reg .b32 t;
add.rn.f16x2 t, $1, $2;
add.rn.f16x2 $0, t, $3;
}""")
# A word's codes of the low output and of the high one, times the inputs, to the sums of each.
_MULTIPLY = gl.constexpr("""{
.reg .b32 s, a, b, c, d;
shr.b32 s, $2, 8;
and.b32 a, $2, 0x000F000F;
and.b32 b, s, 0x000F000F;
and.b32 c, $2, 0x00F000F0;
and.b32 d, s, 0x00F000F0;
fma.rn.f16x2 a, a, $3, $5;
fma.rn.f16x2 $0, b, $4, a;
fma.rn.f16x2 c, c, $3, $6;
fma.rn.f16x2 $1, d, $4, c;
}""")
_BOTH = gl.constexpr("""{
.reg .b16 a, b;
.reg .f32 p, q;
mov.b32 {a, b}, $1;
cvt.f32.f16 p, a;
cvt.f32.f16 q, b;
add.f32 $0, p, q;
}""")
_LOW_UNIT, _HIGH_UNIT = gl.constexpr(2.0**24), gl.constexpr(2.0**20)  # what a masked code is multiplied by to be itself


@gluon.jit
def _words(
    packed_ptr: gl.tensor, start: gl.tensor, slab: gl.tensor, slabs: gl.tensor, blocks: gl.tensor, CHUNK: gl.constexpr,
    cut: gl.constexpr, layout: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Return a chunk's words [B, S, L, V, H] of the blocks from `start` on, zeros beyond the last."""
    outer: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, layout))
    b_B = gl.arange(0, cut.turn, gl.SliceLayout(1, gl.SliceLayout(2, outer)))
    s_S = gl.arange(0, cut.slabs, gl.SliceLayout(0, gl.SliceLayout(2, outer)))
    l_L = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, outer)))
    v_V = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, layout)))))
    h_H = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))))
    block_B1111 = start + b_B[:, None, None, None, None]
    word = (slab + s_S[None, :, None, None, None]) * 256 + CHUNK * 128 + l_L[None, None, :, None, None] * 4
    word += v_V[None, None, None, :, None] * 2 + h_H[None, None, None, None, :]
    return gl.load(packed_ptr + block_B1111.to(gl.int64) * (slabs * 256) + word, mask=block_B1111 < blocks, other=0)


@gluon.jit
def _apart(word_BSLVH: gl.tensor, layout: gl.constexpr) -> gl.tuple:
    """Return the words [B, S, L] of (v, h) = 00, 01, 10, 11."""
    first_BSLV, second_BSLV = gl.split(word_BSLVH)
    v0h0, v1h0 = gl.split(first_BSLV)
    v0h1, v1h1 = gl.split(second_BSLV)
    return (
        gl.convert_layout(v0h0, layout, assert_trivial=True),
        gl.convert_layout(v0h1, layout, assert_trivial=True),
        gl.convert_layout(v1h0, layout, assert_trivial=True),
        gl.convert_layout(v1h1, layout, assert_trivial=True),
    )


@gluon.jit
def _groups(
    scales_ptr: gl.tensor, zeros_ptr: gl.tensor, start: gl.tensor, slab: gl.tensor, slabs: gl.tensor, blocks: gl.tensor,
    SPAN: gl.constexpr, cut: gl.constexpr, layout: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Return scales of low and high outputs, and zero points of both in a byte [B, S, L]; a group has SPAN blocks."""
    b_B = gl.arange(0, cut.turn, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    s_S = gl.arange(0, cut.slabs, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    l_L = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    block_B11 = start + b_B[:, None, None]
    group_B11, inside_B11 = block_B11 // SPAN, block_B11 < blocks
    pair_BSL = group_B11 * (slabs * 8) + (slab + s_S[None, :, None]) * 8 + l_L[None, None, :] // 4
    low_at_BSL = pair_BSL * 2 - l_L[None, None, :] // 4
    low_BSL = gl.load(scales_ptr + low_at_BSL, mask=inside_B11, other=0.0)
    high_BSL = gl.load(scales_ptr + low_at_BSL + 8, mask=inside_B11, other=0.0)
    if zeros_ptr is not None:
        zero_BSL = gl.load(zeros_ptr + pair_BSL, mask=inside_B11, other=0).to(gl.int32)
    else:
        zero_BSL = gl.zeros_like(pair_BSL) + 0x88
    return low_BSL, high_BSL, zero_BSL


@gluon.jit
def _inputs(
    x_ptr: gl.tensor, start: gl.tensor, blocks: gl.tensor, AT: gl.constexpr, cut: gl.constexpr, layout: gl.constexpr
) -> gl.tensor:
    """Return four inputs of each lane in one word [B, L], zeros beyond the last block; AT is where lane 0's lie, in fours."""
    flat: gl.constexpr = gl.SliceLayout(1, layout)
    b_B, l_L = gl.arange(0, cut.turn, gl.SliceLayout(1, flat)), gl.arange(0, 32, gl.SliceLayout(0, flat))
    block_B1 = start + b_B[:, None]
    return gl.load(x_ptr + block_B1 * 32 + AT + l_L[None, :] % 4, mask=block_B1 < blocks, other=0)


@gluon.jit
def _factors(largest_BL: gl.tensor, ASM: gl.constexpr) -> gl.tuple:
    """Return powers of two that bring a block's largest input to 256 and more, under 512, and what undoes them [B, L].

    `largest_BL` holds pairs, of a lane's own inputs; below the last of ASM, an exponent as float32 has it, none counts.
    """
    found_BL = gl.inline_asm_elementwise(ASM[1], "=f,r", [largest_BL], dtype=gl.float32, is_pure=False, pack=1)
    exponent_BL = gl.maximum(found_BL.to(gl.int32, bitcast=True) >> 23, ASM[3])
    factor_BL = ((262 - exponent_BL) << 23).to(gl.float32, bitcast=True)
    return factor_BL, ((exponent_BL - 8) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _widened(input_BL: gl.tensor) -> gl.tuple:
    """Return the first and third of four FP8 inputs, and the second and fourth, as pairs of halves [B, L]."""
    return gl.inline_asm_elementwise(_TO_HALVES, "=r,=r,r", [input_BL], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)


@gluon.jit
def _largest(inputs: gl.tuple, KIND: gl.constexpr, ASM: gl.constexpr) -> gl.tensor:
    """Return pairs whose larger is the largest magnitude of a lane's inputs [B, L]."""
    largest_BL = gl.zeros_like(inputs[0]).to(gl.int32)
    for i in gl.static_range(8):
        if KIND == "fp8":
            even_BL, odd_BL = _widened(inputs[i])
            largest_BL = gl.inline_asm_elementwise(
                _LARGER_HALVES, "=r,r,r,r", [even_BL, odd_BL, largest_BL], dtype=gl.int32, is_pure=True, pack=1
            )
        else:
            largest_BL = gl.inline_asm_elementwise(
                ASM[0], "=r,l,r", [inputs[i], largest_BL], dtype=gl.int32, is_pure=True, pack=1
            )
    return largest_BL


@gluon.jit
def _halves(input_BL: gl.tensor, factor_BL: gl.tensor, KIND: gl.constexpr, ASM: gl.constexpr) -> gl.tuple:
    """Return four inputs times the factor: the first and third, and the second and fourth, as pairs of halves [B, L]."""
    if KIND == "fp8":
        even_BL, odd_BL = _widened(input_BL)
        even_BL = gl.inline_asm_elementwise(_SCALED, "=r,r,f", [even_BL, factor_BL], dtype=gl.int32, is_pure=True, pack=1)
        odd_BL = gl.inline_asm_elementwise(_SCALED, "=r,r,f", [odd_BL, factor_BL], dtype=gl.int32, is_pure=True, pack=1)
    else:
        even_BL, odd_BL = gl.inline_asm_elementwise(
            ASM[2], "=r,=r,l,f", [input_BL, factor_BL], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
    return even_BL, odd_BL


@gluon.jit
def _multiplied(sums: gl.tuple, word_BSL: gl.tensor, even_BL: gl.tensor, odd_BL: gl.tensor) -> gl.tuple:
    """Return the sums of low and high outputs [B, S, L], halves in pairs, and of inputs [B, L], after words of four inputs."""
    low_BSL, high_BSL, sum_BL = sums
    sum_BL = gl.inline_asm_elementwise(_ADD_TWO, "=r,r,r,r", [even_BL, odd_BL, sum_BL], dtype=gl.int32, is_pure=True, pack=1)
    even_BSL, _ = gl.broadcast(even_BL[:, None, :], word_BSL)
    odd_BSL, _ = gl.broadcast(odd_BL[:, None, :], word_BSL)
    low_BSL, high_BSL = gl.inline_asm_elementwise(
        _MULTIPLY, "=&r,=&r,r,r,r,r,r", [word_BSL, even_BSL, odd_BSL, low_BSL, high_BSL], dtype=(gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    return low_BSL, high_BSL, sum_BL


@gluon.jit
def _both(pair: gl.tensor) -> gl.tensor:
    """Return the sum of the two halves of each element in float32."""
    return gl.inline_asm_elementwise(_BOTH, "=f,r", [pair], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _turn(
    found: gl.tuple, first_BSLVH: gl.tensor, second_BSLVH: gl.tensor, groups: gl.tuple, x_ptr: gl.tensor, start: gl.tensor,
    blocks: gl.tensor, KIND: gl.constexpr, ASM: gl.constexpr, cut: gl.constexpr, layout: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Return the outputs' sums of low and high [B, S, L] in float32 after a turn of blocks."""
    low_BSL, high_BSL = found
    turn: gl.constexpr = cut.turn
    per: gl.constexpr = cut.slabs
    inputs = (
        _inputs(x_ptr, start, blocks, 0, cut, layout),
        _inputs(x_ptr, start, blocks, 4, cut, layout),
        _inputs(x_ptr, start, blocks, 8, cut, layout),
        _inputs(x_ptr, start, blocks, 12, cut, layout),
        _inputs(x_ptr, start, blocks, 16, cut, layout),
        _inputs(x_ptr, start, blocks, 20, cut, layout),
        _inputs(x_ptr, start, blocks, 24, cut, layout),
        _inputs(x_ptr, start, blocks, 28, cut, layout),
    )
    factor_BL, undone_BL = _factors(_largest(inputs, KIND, ASM), ASM)
    nothing_BSL = gl.zeros([turn, per, 32], gl.int32, layout)
    sums = (nothing_BSL, nothing_BSL, gl.zeros([turn, 32], gl.int32, gl.SliceLayout(1, layout)))
    words, more = _apart(first_BSLVH, layout), _apart(second_BSLVH, layout)
    for i in gl.static_range(4):
        even_BL, odd_BL = _halves(inputs[i], factor_BL, KIND, ASM)
        sums = _multiplied(sums, words[i], even_BL, odd_BL)
    for i in gl.static_range(4):
        even_BL, odd_BL = _halves(inputs[4 + i], factor_BL, KIND, ASM)
        sums = _multiplied(sums, more[i], even_BL, odd_BL)
    scale_BSL, high_scale_BSL, zero_BSL = groups
    sum_BSL, _ = gl.broadcast(_both(sums[2])[:, None, :], low_BSL)
    more_low_BSL = (_both(sums[0]) * _LOW_UNIT - (zero_BSL & 15).to(gl.float32) * sum_BSL) * scale_BSL.to(gl.float32)
    more_high_BSL = (_both(sums[1]) * _HIGH_UNIT - (zero_BSL >> 4).to(gl.float32) * sum_BSL) * high_scale_BSL.to(gl.float32)
    return low_BSL + more_low_BSL * undone_BL[:, None, :], high_BSL + more_high_BSL * undone_BL[:, None, :]


@gluon.jit
def _write(
    out_ptr: gl.tensor, sum_BSL: gl.tensor, scale: gl.tensor, first: gl.tensor, outputs: gl.tensor, cut: gl.constexpr
) -> None:
    """Write each slab's low outputs, or high ones, of which `first` is the first."""
    per: gl.constexpr = cut.slabs
    y_S8 = gl.sum(gl.sum(sum_BSL, 0).reshape([per, 8, 4]), 2) * scale
    layout: gl.constexpr = y_S8.type.layout
    s_S, r_8 = gl.arange(0, per, gl.SliceLayout(1, layout)), gl.arange(0, 8, gl.SliceLayout(0, layout))
    o_S8 = first + s_S[:, None] * 16 + r_8[None, :]
    gl.store(out_ptr + o_S8, y_S8.to(out_ptr.dtype.element_ty), mask=o_S8 < outputs)


@gluon.jit(do_not_specialize=["blocks"])
def one_token_kernel(
    out_ptr: gl.tensor, x_ptr: gl.tensor, x_scale_ptr: gl.tensor, packed_ptr: gl.tensor, scales_ptr: gl.tensor,
    zeros_ptr: gl.tensor, outputs: gl.tensor, slabs: gl.tensor, blocks: gl.tensor, SPAN: gl.constexpr, KIND: gl.constexpr,
    ASM: gl.constexpr, cut: gl.constexpr, layout: gl.constexpr, words: gl.constexpr,
) -> None:  # fmt: skip
    """Write the outputs of some slabs."""
    gdc_launch_dependents()
    slab = gl.program_id(0) * cut.slabs
    first = _words(packed_ptr, 0, slab, slabs, blocks, 0, cut, words)
    second = _words(packed_ptr, 0, slab, slabs, blocks, 1, cut, words)
    groups = _groups(scales_ptr, zeros_ptr, 0, slab, slabs, blocks, SPAN, cut, layout)
    behind = (first, second, groups)
    if cut.ahead == 2:
        behind = (
            _words(packed_ptr, cut.turn, slab, slabs, blocks, 0, cut, words),
            _words(packed_ptr, cut.turn, slab, slabs, blocks, 1, cut, words),
            _groups(scales_ptr, zeros_ptr, cut.turn, slab, slabs, blocks, SPAN, cut, layout),
        )
    turn: gl.constexpr = cut.turn
    per: gl.constexpr = cut.slabs
    nothing_BSL = gl.zeros([turn, per, 32], gl.float32, layout)
    found = (nothing_BSL, nothing_BSL)
    gdc_wait()
    for start in range(0, blocks, cut.turn):
        later = start + cut.ahead * cut.turn
        asked = (
            _words(packed_ptr, later, slab, slabs, blocks, 0, cut, words),
            _words(packed_ptr, later, slab, slabs, blocks, 1, cut, words),
            _groups(scales_ptr, zeros_ptr, later, slab, slabs, blocks, SPAN, cut, layout),
        )
        found = _turn(found, first, second, groups, x_ptr, start, blocks, KIND, ASM, cut, layout)
        if cut.ahead == 2:
            first, second, groups = behind
            behind = asked
        else:
            first, second, groups = asked
    scale = 1.0
    if KIND == "fp8":
        scale = gl.load(x_scale_ptr)
    low_BSL, high_BSL = found[0], found[1]
    _write(out_ptr, low_BSL, scale, slab * 16, outputs, cut)
    _write(out_ptr, high_BSL, scale, slab * 16 + 8, outputs, cut)
