"""One FP8 token times a 4-bit weight without the matrix unit, checked and timed: python -m tests.bench.int4_one_token.

`ops_linear_int4` keeps one program a multiprocessor, and of one token's product some 2.6 us are its start and its end. Here many
small programs read the weight, as those of one token in FP8 do (decision 63): a lane's 16 bytes are four words of eight codes, of
two outputs and four inputs; two masks and a shift make halves of them, which packed multiply-adds take with their inputs.

A code masked out of a word is, as a half, code * 2^-24 (a subnormal number, exact), or 16 times that; so no constant has to leave
it again. Sixteen products are added up in a half, then scaled in float32; the zero point times the sum of the inputs leaves
there. By emulation that errs by 3e-4 to 8e-4 of the result's root mean square, where bfloat16 rounds by 2e-3.

Each cut is held to the twin, then timed at shapes of the layers of Llama-3.1-70B and Falcon-180B (groups of 128, zero points)
beside what runs now. `--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers, spills and shared
memory. In names s is slabs of a program, b blocks of a warp in a turn, w warps, a turns ahead that the weight is asked for.

B blocks of a turn, S slabs of a program, L lanes, V, H = 2 and C chunks as `paddock.layers.int4` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import torch
import triton
from attrs import frozen
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paddock.bench.kernels.timing import L2_SPANS, Rounds, graph_seconds
from paddock.layers import reference
from paddock.layers.int4 import Int4Form, Int4Weight, int4_weight
from paddock.testing.oracle import bound, poisoned, relative_rms
from paddock_triton.dependence import DEPENDENT
from paddock_triton.ops_linear_int4 import linear_int4_fp8
from tests.bench.hopper_code import compile_only, described
from tests.bench.int4_variants import SHAPES

CUDA, HALF, GROUP = torch.device("cuda"), torch.bfloat16, 128
ROUNDS = Rounds(warm=2, timed=7)
CHECKED = ((200, 640, True), (512, 1024, False), (64, 128, True), (2048, 8192, True))  # outputs, inputs, zero points

# Four FP8 inputs to the first and third, the second and fourth as halves.
_TO_HALVES = gl.constexpr("""{
.reg .b32 t;
.reg .b16 a, b;
prmt.b32 t, $2, 0, 0x3120;
mov.b32 {a, b}, t;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
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


@frozen(kw_only=True)
class Cut:
    """How a product is cut: slabs of a program, blocks of a warp in a turn, warps, turns that the weight is asked for ahead."""

    slabs: int
    blocks: int
    warps: int
    ahead: int = 1
    registers: int | None = None

    @property
    def name(self) -> str:
        """Return it in short."""
        more = "" if self.registers is None else f" r{self.registers}"
        return f"s{self.slabs} b{self.blocks} w{self.warps} a{self.ahead}{more}"

    @property
    def turn(self) -> int:
        """Return B."""
        return self.blocks * self.warps

    def layout(self, *more: int) -> Any:
        """Return how [B, S, L] and then `more`, all of a thread, lie: slabs and blocks in registers, blocks over warps."""
        rest = [0] * len(more)
        registers = [[0, 0, 0, *(at if i == axis else 0 for i in range(len(more)))] for axis, at in _inner(more)]
        registers += [[0, at, 0, *rest] for at in _powers(self.slabs)]
        registers += [[self.warps * at, 0, 0, *rest] for at in _powers(self.blocks)]
        lanes, warps = [[0, 0, at, *rest] for at in _powers(32)], [[at, 0, 0, *rest] for at in _powers(self.warps)]
        return gl.DistributedLinearLayout(registers, lanes, warps, [], [self.turn, self.slabs, 32, *more])


def _powers(size: int) -> list[int]:
    return [1 << i for i in range(size.bit_length() - 1)]


def _inner(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (axis, position) of each bit of the inner axes, the last axis first."""
    return [(axis, at) for axis in reversed(range(len(sizes))) for at in _powers(sizes[axis])]


CUTS = [
    Cut(slabs=4, blocks=1, warps=4),
    Cut(slabs=4, blocks=1, warps=8),
    Cut(slabs=4, blocks=1, warps=16),
    Cut(slabs=4, blocks=1, warps=4, ahead=2),
    Cut(slabs=2, blocks=1, warps=4),
    Cut(slabs=2, blocks=1, warps=4, ahead=2),
    Cut(slabs=2, blocks=1, warps=8),
    Cut(slabs=2, blocks=1, warps=8, ahead=2),
    Cut(slabs=2, blocks=1, warps=16),
    Cut(slabs=2, blocks=2, warps=4),
    Cut(slabs=1, blocks=1, warps=8, ahead=2),
    Cut(slabs=1, blocks=1, warps=16, ahead=2),
    Cut(slabs=1, blocks=2, warps=8),
]


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
def _multiplied(
    sums: gl.tuple, word_BSL: gl.tensor, x_ptr: gl.tensor, start: gl.tensor, blocks: gl.tensor, AT: gl.constexpr,
    cut: gl.constexpr, layout: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Return the sums of low and high outputs [B, S, L], halves in pairs, and of inputs [B, L], after words of four inputs.

    AT is where those of a block's lane 0 lie, in fours.
    """
    low_BSL, high_BSL, sum_BL = sums
    flat: gl.constexpr = gl.SliceLayout(1, layout)
    b_B, l_L = gl.arange(0, cut.turn, gl.SliceLayout(1, flat)), gl.arange(0, 32, gl.SliceLayout(0, flat))
    block_B1 = start + b_B[:, None]
    x_BL = gl.load(x_ptr + block_B1 * 32 + AT + l_L[None, :] % 4, mask=block_B1 < blocks, other=0)
    even_BL, odd_BL = gl.inline_asm_elementwise(_TO_HALVES, "=r,=r,r", [x_BL], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
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
    blocks: gl.tensor, cut: gl.constexpr, layout: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Return the outputs' sums of low and high [B, S, L] in float32 after a turn of blocks."""
    low_BSL, high_BSL = found
    turn: gl.constexpr = cut.turn
    per: gl.constexpr = cut.slabs
    nothing_BSL = gl.zeros([turn, per, 32], gl.int32, layout)
    sums = (nothing_BSL, nothing_BSL, gl.zeros([turn, 32], gl.int32, gl.SliceLayout(1, layout)))
    words = _apart(first_BSLVH, layout)
    for i in gl.static_range(4):
        sums = _multiplied(sums, words[i], x_ptr, start, blocks, 4 * i, cut, layout)
    words = _apart(second_BSLVH, layout)
    for i in gl.static_range(4):
        sums = _multiplied(sums, words[i], x_ptr, start, blocks, 16 + 4 * i, cut, layout)
    scale_BSL, high_scale_BSL, zero_BSL = groups
    sum_BSL, _ = gl.broadcast(_both(sums[2])[:, None, :], low_BSL)
    low_BSL += (_both(sums[0]) * _LOW_UNIT - (zero_BSL & 15).to(gl.float32) * sum_BSL) * scale_BSL.to(gl.float32)
    high_BSL += (_both(sums[1]) * _HIGH_UNIT - (zero_BSL >> 4).to(gl.float32) * sum_BSL) * high_scale_BSL.to(gl.float32)
    return low_BSL, high_BSL


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
def _one_token_kernel(
    out_ptr: gl.tensor, x_ptr: gl.tensor, x_scale_ptr: gl.tensor, packed_ptr: gl.tensor, scales_ptr: gl.tensor,
    zeros_ptr: gl.tensor, outputs: gl.tensor, slabs: gl.tensor, blocks: gl.tensor, SPAN: gl.constexpr, cut: gl.constexpr,
    layout: gl.constexpr, words: gl.constexpr,
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
        found = _turn(found, first, second, groups, x_ptr, start, blocks, cut, layout)
        if cut.ahead == 2:
            first, second, groups = behind
            behind = asked
        else:
            first, second, groups = asked
    scale, low_BSL, high_BSL = gl.load(x_scale_ptr), found[0], found[1]
    _write(out_ptr, low_BSL, scale, slab * 16, outputs, cut)
    _write(out_ptr, high_BSL, scale, slab * 16 + 8, outputs, cut)


def launch_one_token(out_1O: Tensor, values_1I: Tensor, scale_11: Tensor, weight: Int4Weight, cut: Cut) -> None:
    """Multiply; inputs are a multiple of 128, and so is the group."""
    form = weight.form
    assert form.inputs % 128 == 0, form
    assert form.group % 128 == 0, form
    _one_token_kernel[(form.slabs // cut.slabs,)](
        out_1O, values_1I.view(torch.int32), scale_11, weight.packed.view(torch.int32), weight.scales, weight.zeros,
        form.outputs, form.slabs, form.blocks, SPAN=form.group // 128, cut=cut, layout=cut.layout(), words=cut.layout(2, 2),
        num_warps=cut.warps, maxnreg=cut.registers, **DEPENDENT,
    )  # fmt: skip


def _weight(outputs: int, inputs: int, *, zeros: bool, device: torch.device) -> Int4Weight:
    generator = torch.Generator(device).manual_seed(outputs + inputs)

    def nibbles(*size: int) -> Tensor:
        return torch.randint(0, 16, size, dtype=torch.uint8, generator=generator, device=device)

    scales_GO = torch.rand(inputs // GROUP, outputs, generator=generator, device=device) * 0.01 + 0.001
    return int4_weight(nibbles(outputs, inputs), scales_GO.to(HALF), nibbles(inputs // GROUP, outputs) if zeros else None)


def error(cut: Cut, *, outputs: int, inputs: int, zeros: bool) -> float:
    """Return a cut's relative RMS error."""
    weight = _weight(outputs, inputs, zeros=zeros, device=CUDA)
    xq = reference.quantize_fp8_token((torch.randn(1, inputs, device=CUDA) + 0.3).to(HALF))
    with poisoned():
        out_1O = torch.empty(1, outputs, device=CUDA)
    launch_one_token(out_1O, xq.values_TI, xq.scale, weight, cut)
    return relative_rms(out_1O, reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32))


def times(outputs: int, inputs: int, cuts: list[Cut]) -> list[str]:
    """Return what runs now and each cut, with microseconds and TB/s, the quickest first."""
    form = Int4Form(inputs=inputs, outputs=outputs, group=GROUP)

    def random(*size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device=CUDA)

    def weight() -> Int4Weight:
        scales_GF = torch.rand(form.group_rows, form.filled_outputs, device=CUDA).to(HALF)
        zeros_GP = random(form.group_rows, form.filled_outputs // 2)
        return Int4Weight(form=form, packed=random(form.blocks, form.slabs, 1024), scales=scales_GF, zeros=zeros_GP)

    first = weight()
    assert first.zeros is not None
    size = first.packed.nbytes + first.scales.nbytes + first.zeros.nbytes
    count = max(2, L2_SPANS * torch.cuda.get_device_properties(CUDA).L2_cache_size // size + 1)
    sets = [(each,) for each in (first, *(weight() for _ in range(count - 1)))]
    xq, out_1O = reference.quantize_fp8_token(torch.randn(1, inputs, device=CUDA).to(HALF)), first.scales.new_empty(1, outputs)
    ways: dict[str, Callable[[Int4Weight], Any]] = {"now": lambda each: linear_int4_fp8(xq.values_TI, xq.scale, each, HALF)}
    ways |= {cut.name: lambda each, cut=cut: launch_one_token(out_1O, xq.values_TI, xq.scale, each, cut) for cut in cuts}  # type: ignore[misc]
    found = sorted((graph_seconds(way, sets, ROUNDS), name) for name, way in ways.items())
    return [f"{name} {seconds * 1e6:.1f}us {size / seconds / 1e12:.2f}TB/s" for seconds, name in found]


def compile_all(cuts: list[Cut]) -> None:
    """Compile for compute capability 9.0 and print what the assembler says of each."""
    made = compile_only()
    cpu = torch.device("cpu")
    weight, values_1I = _weight(64, 1024, zeros=True, device=cpu), torch.zeros(1, 1024, dtype=torch.float8_e4m3fn)
    for cut in cuts:
        launch_one_token(torch.zeros(1, 64, dtype=HALF), values_1I, torch.ones(1, 1), weight, cut)
        click.echo(f"{cut.name:24} {described(made[-1])}")


@click.command()
@click.option("--only", multiple=True, help="Cuts whose name holds this; repeatable.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="These alone; repeatable.")
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], shapes: tuple[str, ...], compiled: bool) -> None:
    """Check and time every cut."""
    cuts = [cut for cut in CUTS if not only or any(word in cut.name for word in only)]
    if compiled:
        compile_all(cuts)
        return
    click.echo(f"{torch.cuda.get_device_name()}, triton {triton.__version__}")
    right = []
    for cut in cuts:
        errors = [error(cut, outputs=o, inputs=i, zeros=zeros) for o, i, zeros in CHECKED]
        click.echo(f"{cut.name:24} errors {' '.join(f'{each:.1e}' for each in errors)}")
        if max(errors) <= bound("linear_int4_fp8", HALF):
            right.append(cut)
    for name in shapes or SHAPES:
        click.echo(f"{name}: {'; '.join(times(*SHAPES[name], right))}")


if __name__ == "__main__":
    main()
