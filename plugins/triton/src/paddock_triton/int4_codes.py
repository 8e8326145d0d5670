"""From packed INT4 weights to what the matrix unit multiplies, in registers.

R rows (outputs) of a half, 64; C bytes of two codes each, of rows eight apart, 32 x 128 of a half; K inputs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from paddock_triton.int4_spec import FEW
from paddock_triton.ring import ROWS, STEP

MIDDLE = gl.constexpr(8)  # the zero point where none is kept

# Four bytes to the codes of their low halves and of their high ones: as e4m3 the byte 0000qqqq is q / 512.
_TO_FP8 = gl.constexpr("""{
.reg .b32 high;
and.b32 $0, $2, 0x0F0F0F0F;
shr.b32 high, $2, 4;
and.b32 $1, high, 0x0F0F0F0F;
}""")
# Of zero points, the same less than 0.
_TO_MINUS_FP8 = gl.constexpr("""{
.reg .b32 high;
shr.b32 high, $2, 4;
lop3.b32 $0, $2, 0x0F0F0F0F, 0x80808080, 0xEA;
lop3.b32 $1, high, 0x0F0F0F0F, 0x80808080, 0xEA;
}""")
_IN_PAIRS = """{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.b32 c, a, 4;
shr.b32 d, b, 4;
"""
# In bfloat16 0x4300 | q is 128 + q, in float16 0x6400 | q 1024 + q; less a row's zero point, raised likewise.
_TO_BF16 = gl.constexpr(f"""{_IN_PAIRS}
lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
sub.rn.bf16x2 $0, a, $5;
sub.rn.bf16x2 $1, b, $6;
sub.rn.bf16x2 $2, c, $7;
sub.rn.bf16x2 $3, d, $8;
}}""")
_TO_FP16 = gl.constexpr(_TO_BF16.value.replace("43004300", "64006400").replace("bf16x2", "f16x2"))


@gluon.jit
def _bytes(packed_CJ: gl.shared_memory_descriptor) -> gl.tensor:
    """Return a half's bytes by row of the first eight of sixteen, and input [32, 128]; a thread reads 16 at once."""
    layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [4, 0]], [[0, 16], [0, 32], [0, 64], [1, 0], [2, 0]], [[8, 0], [16, 0]], [], [32, 128]
    )
    # slab, chunk, row / 2, row % 2, thread of four, then of the byte: step of 32, of 16, the input of four
    parts = packed_CJ.load(layout).reshape([4, 2, 4, 2, 4, 2, 2, 4])
    return parts.permute([0, 2, 3, 1, 5, 6, 4, 7]).reshape([32, 128])


@gluon.jit
def _rows(low_CJ: gl.tensor, high_CJ: gl.tensor) -> gl.tensor:
    """Return the codes of 64 rows [64, 128], of the first eight of sixteen and of the last [32, 128] each."""
    both = gl.join(low_CJ, high_CJ).reshape([4, 8, 128, 2])
    return both.permute([0, 3, 1, 2]).reshape([64, 128])


@gluon.jit
def _turned(numbers_RK: gl.tensor) -> gl.tensor:
    """Return numbers of a half with the inputs of each sixteen, 4 t + 2 b + e with b and e 0 or 1, in the order of b first.

    A thread has four neighbouring inputs, and its operand of 16 bits takes them two by two, eight apart.
    """
    return numbers_RK.reshape([ROWS, 8, 4, 2, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, STEP])


@gluon.jit
def inputs_of(x_KN: gl.shared_memory_descriptor, spec: gl.constexpr) -> gl.tensor:
    """Return a group's inputs of a few tokens as each warp's operand [K, 8], in the order of `numbers`."""
    inputs: gl.constexpr = spec.inputs
    parts = x_KN.load(spec.few_layout).reshape([inputs // 16, 4, 2, 2, FEW]).permute([0, 2, 1, 3, 4])
    operand: gl.constexpr = gl.DotOperandLayout(1, spec.mma, 2)
    return gl.convert_layout(parts.reshape([inputs, FEW]), operand, assert_trivial=True)


@gluon.jit
def codes_fp8(packed_CJ: gl.shared_memory_descriptor) -> gl.tensor:
    """Return the codes of a half [64, 128] in e4m3, over 512."""
    low_CJ, high_CJ = gl.inline_asm_elementwise(
        _TO_FP8, "=r,=r,r", [_bytes(packed_CJ)], dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=True, pack=4
    )
    return _rows(low_CJ, high_CJ)


@gluon.jit
def minus_zeros_fp8(zero_C: gl.tensor, spec: gl.constexpr) -> gl.tensor:
    """Return -zero of a half's rows for every input [64, 128] in e4m3, over 512; zero_C [32] holds those of two rows a byte."""
    layout: gl.constexpr = spec.bytes_layout
    zero_C = gl.convert_layout(zero_C, gl.SliceLayout(1, layout))
    byte_CJ = gl.zeros([32, STEP], gl.uint8, layout) + zero_C[:, None]
    low_CJ, high_CJ = gl.inline_asm_elementwise(
        _TO_MINUS_FP8, "=r,=r,r", [byte_CJ], dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=True, pack=4
    )
    return _rows(low_CJ, high_CJ)


@gluon.jit
def numbers(packed_CJ: gl.shared_memory_descriptor, zero_C: gl.tensor, dtype: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Return code - zero of a half [64, 128] in 16 bits; zero_C [32] holds the zeros of two rows a byte.

    The order of inputs is that of `_turned`, and of `ops_linear_int4._turned`.
    """
    layout: gl.constexpr = spec.bytes_layout
    raised: gl.constexpr = 128.0 if dtype == gl.bfloat16 else 1024.0
    zero_C = gl.convert_layout(zero_C, gl.SliceLayout(1, layout))
    nothing_CJ = gl.zeros([32, STEP], dtype, layout)
    low_CJ = nothing_CJ + ((zero_C & 15).to(gl.float32) + raised).to(dtype)[:, None]
    high_CJ = nothing_CJ + ((zero_C >> 4).to(gl.float32) + raised).to(dtype)[:, None]
    given = [gl.convert_layout(_bytes(packed_CJ), spec.bytes_layout, assert_trivial=True), low_CJ, high_CJ]
    regs: gl.constexpr = "=r,=r,=r,=r,r,r,r,r,r"
    if dtype == gl.bfloat16:
        low_CJ, high_CJ = gl.inline_asm_elementwise(_TO_BF16, regs, given, (gl.bfloat16, gl.bfloat16), is_pure=True, pack=4)
    else:
        low_CJ, high_CJ = gl.inline_asm_elementwise(_TO_FP16, regs, given, (gl.float16, gl.float16), is_pure=True, pack=4)
    return _turned(_rows(low_CJ, high_CJ))


@gluon.jit
def row_values(rows_GR: gl.shared_memory_descriptor, group: gl.constexpr, half: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Return a group's values of a half's rows [64]."""
    layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 8]], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[0, 16], [0, 32]], [], [1, 64]
    )
    values_R = rows_GR.slice(group, 1).slice(half * ROWS, ROWS, dim=1).load(layout).reshape([ROWS])
    return gl.convert_layout(values_R, gl.SliceLayout(1, spec.mma))


@gluon.jit
def zero_bytes(zeros_GC: gl.shared_memory_descriptor, group: gl.constexpr, half: gl.constexpr) -> gl.tensor:
    """Return the zeros of a half's rows, two a byte [32]."""
    layout: gl.constexpr = gl.DistributedLinearLayout(
        [], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16]], [], [1, 32]
    )
    return zeros_GC.slice(group, 1).slice(half * 32, 32, dim=1).load(layout).reshape([32])


@gluon.jit
def part_of(codes_RK: gl.tensor, group: gl.constexpr, spec: gl.constexpr) -> gl.tensor:
    """Return a group's inputs of a half's codes as the matrix unit's operand."""
    part_RK = codes_RK
    if spec.groups == 2:
        low_RK, high_RK = gl.split(codes_RK.reshape([ROWS, 2, 64]).permute([0, 2, 1]))
        part_RK = low_RK if group == 0 else high_RK
    elif spec.groups == 4:
        low_RK2, high_RK2 = gl.split(codes_RK.reshape([ROWS, 2, 2, 32]).permute([0, 3, 2, 1]))
        even_RK, odd_RK = gl.split(low_RK2 if group < 2 else high_RK2)
        part_RK = even_RK if group % 2 == 0 else odd_RK
    return gl.convert_layout(part_RK, gl.DotOperandLayout(0, spec.mma, spec.operand_width))


@gluon.jit
def shifts(
    scales_GR: gl.shared_memory_descriptor, zeros_GC: gl.shared_memory_descriptor, half: gl.constexpr, spec: gl.constexpr
) -> gl.tuple:
    """Return -scale * zero of a half's rows in 16 groups [64, 16] as two bfloat16 that add up to it, operands both."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    scale_RG = scales_GR.slice(half * ROWS, ROWS, dim=1).permute((1, 0)).load(layout).to(gl.float32)
    if spec.zeros:
        byte_CG = zeros_GC.permute((1, 0)).load(layout)
        both = gl.join(byte_CG & 15, byte_CG >> 4).reshape([4, 8, 16, 2]).permute([0, 3, 1, 2]).reshape([ROWS, 16])
        shift_RG = -scale_RG * gl.convert_layout(both, layout).to(gl.float32)
    else:
        shift_RG = -scale_RG * MIDDLE
    high_RG = shift_RG.to(gl.bfloat16)
    low_RG = (shift_RG - high_RG.to(gl.float32)).to(gl.bfloat16)
    operand: gl.constexpr = gl.DotOperandLayout(0, spec.late_mma, 2)
    return gl.convert_layout(high_RG, operand), gl.convert_layout(low_RG, operand)
