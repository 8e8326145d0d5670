"""One token times a 4-bit weight without the matrix unit, checked and timed: python -m tests.bench.int4_one_token.

`ops_linear_int4` keeps one program a multiprocessor, and of one token's product some 2.6 us are its start and its end. Here many
small programs read the weight (`tests.bench.one_token_kernel`), with FP8 inputs or with those of 16 bits. By emulation FP8 inputs
err by 3e-4 to 8e-4 of the result's root mean square, where bfloat16 rounds by 2e-3.

Each cut is held to the twin, then timed at shapes of the layers of Llama-3.1-70B and Falcon-180B (groups of 128, zero points)
beside what runs now. `--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers, spills and shared
memory. In names s is slabs of a program, b blocks of a warp in a turn, w warps, a turns ahead that the weight is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
import triton
from attrs import frozen
from torch import Tensor
from triton.experimental.gluon import language as gl

from paddock.bench.kernels.timing import Rounds, graph_seconds
from paddock.layers import reference
from paddock.layers.int4 import Int4Weight, int4_weight
from paddock.testing.oracle import bound, poisoned, relative_rms
from paddock_triton.dependence import DEPENDENT
from paddock_triton.ops_linear_int4 import linear_int4, linear_int4_fp8
from tests.bench.hopper_code import compile_only, described
from tests.bench.int4_variants import SHAPES, beyond_l2
from tests.bench.one_token_kernel import LARGER, LARGEST, TO_SCALED_HALVES, one_token_kernel

CUDA, FP8, BF16, GROUP = torch.device("cuda"), torch.float8_e4m3fn, torch.bfloat16, 128
ROUNDS = Rounds(warm=2, timed=7)
CHECKED = ((200, 640, True), (512, 1024, False), (64, 128, True), (2048, 8192, True))  # outputs, inputs, zero points
KINDS = {"fp8": FP8, "bf16": BF16, "fp16": torch.float16}


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


def _kind(dtype: torch.dtype) -> tuple[str, tuple[str | int, ...]]:
    """Return what inputs are, the instructions that find their largest and widen them, and the least exponent of a largest one.

    FP8 inputs are multiplied as halves, in which no factor is above 2^15.
    """
    halves = ("f16x2", "cvt.f32.f16 ")
    names = {FP8: ("fp8", *halves), torch.float16: ("fp16", *halves), BF16: ("bf16", "bf16x2", "cvt.f32.bf16 ")}
    name, type_of, widen = names[dtype]
    asm = (each.value.replace("TYPE", type_of).replace("WIDEN", widen) for each in (LARGER, LARGEST, TO_SCALED_HALVES))
    return name, (*asm, 120 if name == "fp8" else 16)


def launch_one_token(out_1O: Tensor, x_1I: Tensor, scale_11: Tensor | None, weight: Int4Weight, cut: Cut) -> None:
    """Multiply; inputs are a multiple of 128, and so is the group. Inputs of 16 bits have no scale."""
    form, (kind, asm) = weight.form, _kind(x_1I.dtype)
    assert form.inputs % 128 == 0, form
    assert form.group % 128 == 0, form
    x_1W = x_1I.view(torch.int32 if kind == "fp8" else torch.int64)
    one_token_kernel[(form.slabs // cut.slabs,)](
        out_1O, x_1W, x_1W if scale_11 is None else scale_11, weight.packed.view(torch.int32), weight.scales, weight.zeros,
        form.outputs, form.slabs, form.blocks, SPAN=form.group // 128, KIND=kind, ASM=asm, cut=cut, layout=cut.layout(),
        words=cut.layout(2, 2), num_warps=cut.warps, maxnreg=cut.registers, **DEPENDENT,
    )  # fmt: skip


def _weight(outputs: int, inputs: int, *, zeros: bool, device: torch.device) -> Int4Weight:
    generator = torch.Generator(device).manual_seed(outputs + inputs)

    def nibbles(*size: int) -> Tensor:
        return torch.randint(0, 16, size, dtype=torch.uint8, generator=generator, device=device)

    scales_GO = torch.rand(inputs // GROUP, outputs, generator=generator, device=device) * 0.01 + 0.001
    return int4_weight(nibbles(outputs, inputs), scales_GO.to(BF16), nibbles(inputs // GROUP, outputs) if zeros else None)


def _token(inputs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return a token, whose few largest inputs are a hundred times the others, and its scale if it is in FP8."""
    generator = torch.Generator(device).manual_seed(inputs)
    x_1I = torch.randn(1, inputs, generator=generator, device=device) + 0.3
    x_1I[:, ::97] *= 100
    if dtype != FP8:
        return x_1I.to(dtype), None
    xq = reference.quantize_fp8_token(x_1I.to(BF16))
    return xq.values_TI, xq.scale


def error(cut: Cut, dtype: torch.dtype, *, outputs: int, inputs: int, zeros: bool) -> float:
    """Return a cut's relative RMS error."""
    weight, (x_1I, scale_11) = _weight(outputs, inputs, zeros=zeros, device=CUDA), _token(inputs, dtype, CUDA)
    with poisoned():
        out_1O = torch.empty(1, outputs, device=CUDA)
    launch_one_token(out_1O, x_1I, scale_11, weight, cut)
    if scale_11 is None:
        return relative_rms(out_1O, reference.linear_int4(x_1I.float(), weight))
    return relative_rms(out_1O, reference.linear_int4_fp8(x_1I, scale_11, weight, torch.float32))


def times(outputs: int, inputs: int, cuts: list[tuple[str, Cut]]) -> list[str]:
    """Return what runs now and each cut, with microseconds and TB/s, the quickest first."""
    weights, size = beyond_l2((outputs, inputs))
    sets = [(weight,) for weight in weights]
    tokens = {kind: _token(inputs, dtype, CUDA) for kind, dtype in KINDS.items()}
    out_1O = torch.empty(1, outputs, dtype=BF16, device=CUDA)
    (x8_1I, scale_11), (x_1I, _) = tokens["fp8"], tokens["bf16"]
    assert scale_11 is not None
    ways: dict[str, Callable[[Int4Weight], Any]] = {
        "fp8 now": lambda each: linear_int4_fp8(x8_1I, scale_11, each, BF16),
        "bf16 now": lambda each: linear_int4(x_1I, each),
    }
    for kind, cut in cuts:
        ways[f"{kind} {cut.name}"] = partial(launch_one_token, out_1O, *tokens[kind], cut=cut)
    found = sorted((graph_seconds(way, sets, ROUNDS), name) for name, way in ways.items())
    return [f"{name} {seconds * 1e6:.1f}us {size / seconds / 1e12:.2f}TB/s" for seconds, name in found]


def compile_all(cuts: list[tuple[str, Cut]]) -> None:
    """Compile for compute capability 9.0 and print what the assembler says of each."""
    made, cpu = compile_only(), torch.device("cpu")
    weight = _weight(64, 1024, zeros=True, device=cpu)
    for kind, cut in cuts:
        launch_one_token(torch.zeros(1, 64, dtype=BF16), *_token(1024, KINDS[kind], cpu), weight, cut)
        click.echo(f"{kind} {cut.name:24} {described(made[-1])}")


@click.command()
@click.option("--only", multiple=True, help="Cuts whose name holds this; repeatable.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="These alone; repeatable.")
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], shapes: tuple[str, ...], compiled: bool) -> None:
    """Check and time every cut."""
    every = [(kind, cut) for kind in KINDS for cut in CUTS]
    cuts = [(kind, cut) for kind, cut in every if not only or any(word in f"{kind} {cut.name}" for word in only)]
    if compiled:
        compile_all(cuts)
        return
    click.echo(f"{torch.cuda.get_device_name()}, triton {triton.__version__}")
    right = []
    for kind, cut in cuts:
        errors = [error(cut, KINDS[kind], outputs=o, inputs=i, zeros=zeros) for o, i, zeros in CHECKED]
        is_right = max(errors) <= bound("linear_int4_fp8", BF16)
        click.echo(
            f"{kind} {cut.name:24} errors {' '.join(f'{each:.1e}' for each in errors)}{'' if is_right else ' WRONG, not timed'}"
        )
        if is_right:
            right.append((kind, cut))
    for name in shapes or SHAPES:
        timed = [(kind, cut) for kind, cut in right if kind != "fp16"]
        click.echo(f"{name}: {'; '.join(times(*SHAPES[name], timed))}")


if __name__ == "__main__":
    main()
