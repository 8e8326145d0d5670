"""Tiles for INT4 products, checked and timed: python -m tests.bench.int4_variants [--only WORD ...] [--tokens N ...].

Every tile is compiled first, on all cores, then held to the plain-torch twin on a small weight with zero points, then timed at
shapes of the layers of Llama-3.1-70B and Falcon-180B (O x I, groups of 128). Times are those of one call in a captured graph of
calls on weights that the L2 does not hold, sums of x included. A wrong result has no time. A line tells of all tiles for a
shape, the quickest first, what runs now marked *: microseconds, TB/s of codes, scales and zero points, TFLOP/s. In names n is
tokens of a tile, h halves of 64 rows for each of t teams, c cuts, s steps in shared memory, r registers of a lane.

`--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers, spills, shared memory and the instruction
that multiplies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import click
import torch
import triton
from attrs import evolve, frozen
from torch import Tensor

from paddock.bench.kernels.timing import L2_SPANS, Rounds, graph_seconds
from paddock.layers import reference
from paddock.layers.int4 import Int4Form, Int4Weight, int4_weight
from paddock.testing.oracle import bound, poisoned, relative_rms
from paddock_triton import ops_linear_int4
from paddock_triton.int4_spec import Int4Tile
from paddock_triton.launch import compile_ahead
from paddock_triton.ops_linear_int4 import launch_int4
from tests.bench.hopper_code import compile_only, described

CUDA, HALF = torch.device("cuda"), torch.bfloat16
GROUP = 128
ROUNDS = Rounds(warm=2, timed=7)
SHAPES = {
    "70B o": (8192, 8192),
    "70B qkv": (10240, 8192),
    "70B gate_up": (57344, 8192),
    "70B down": (8192, 28672),
    "Falcon up": (59392, 14848),
    "Falcon down": (14848, 59392),
}
TOKENS = (1, 16, 32, 64, 128, 256, 4096)
CHECKED = (192, 1280)  # a weight to check with: a tile and a half, five blocks of two groups of teams


@frozen(kw_only=True)
class Candidate:
    """A tile, whether inputs are FP8, and the fewest and most tokens it is for."""

    tile: Int4Tile
    fp8: bool
    fewest: int
    most: int

    @property
    def name(self) -> str:
        """Return what the tile is, a star where it is what runs now."""
        tile = self.tile
        marks = "".join(f" {word}" for word in ("shared", "waves", "late", "deep") if getattr(tile, word))
        star = "*" if tile in _running(self.fp8) else ""
        kind = "fp8" if self.fp8 else "bf16"
        cut = f"n{tile.tokens} h{tile.halves} t{tile.teams} c{tile.cuts} s{tile.slots} r{tile.registers}"
        return f"{star}{kind} {cut}{marks}"


def _running(fp8: bool) -> list[Int4Tile]:
    """Return the tiles that ops take."""
    op = ops_linear_int4
    if not fp8:
        return [*op._HALVES.values(), *op._MANY_HALVES]
    return [*op._FP8.values(), *op._FP8_DEEP.values(), op._FP8_MANY_NARROW, *op._MANY_FP8]


def _candidates() -> Iterator[Candidate]:
    """Yield what may multiply, by tokens."""
    deep = [evolve(tile, shared=shared) for tile in ops_linear_int4._FP8_DEEP.values() for shared in (True, False)]
    few = [ops_linear_int4._FP8[8], ops_linear_int4._FP8[16]]
    for tile in (*few, *(evolve(tile, registers=2048) for tile in few), *deep, evolve(deep[0], registers=2048)):
        yield Candidate(tile=tile, fp8=True, fewest=tile.tokens // 2 + 1 if tile.tokens > 8 else 1, most=tile.tokens)
    for shared in (True, False):
        yield Candidate(tile=evolve(ops_linear_int4._HALVES[8], shared=shared), fp8=False, fewest=1, most=8)
    yield Candidate(tile=evolve(ops_linear_int4._HALVES[8], deep=False), fp8=False, fewest=1, most=8)
    between = [
        ops_linear_int4._FP8[32],
        evolve(ops_linear_int4._FP8[32], late=True),
        *(Int4Tile(tokens=64, teams=2, halves=halves, slots=8 // halves + 2 * (halves == 2), late=True) for halves in (1, 2)),
        ops_linear_int4._FP8[64],
        evolve(ops_linear_int4._FP8[64], late=False),
        evolve(ops_linear_int4._FP8[64], late=False, slots=6),
        Int4Tile(tokens=128, teams=2, halves=2, slots=4, late=True),
        ops_linear_int4._FP8_MANY_NARROW,
    ]
    for tile in between:
        yield Candidate(tile=tile, fp8=True, fewest=tile.tokens // 2 + 1, most=tile.tokens)
    wide, narrow = ops_linear_int4._FP8_MANY, ops_linear_int4._FP8_MANY_NARROW
    many = [
        *(evolve(tile, shared=shared) for tile in (wide, narrow) for shared in (True, False)),
        *(ops_linear_int4._FP8_WAVES, ops_linear_int4._FP8_WAVES_NARROW),
        Int4Tile(tokens=128, teams=2, halves=2, slots=4, late=True),
    ]
    for tile in many:
        yield Candidate(tile=tile, fp8=True, fewest=129, most=8192)
    for tokens, tile in ops_linear_int4._HALVES.items():
        if tokens > 8:
            yield Candidate(tile=tile, fp8=False, fewest=tokens // 2 + 1, most=tokens)
    for tile in ops_linear_int4._MANY_HALVES:
        yield Candidate(tile=tile, fp8=False, fewest=129, most=8192)


def _weight(shape: tuple[int, int], seed: int) -> Int4Weight:
    """Return random codes, scales and zero points."""
    form = Int4Form(inputs=shape[1], outputs=shape[0], group=GROUP)
    generator = torch.Generator(CUDA).manual_seed(seed)

    def some(*size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator, device=CUDA)

    scales_GF = torch.rand(form.group_rows, form.filled_outputs, generator=generator, device=CUDA) * 0.01 + 0.005
    packed, zeros = some(form.blocks, form.slabs, 1024), some(form.group_rows, form.filled_outputs // 2)
    return Int4Weight(form=form, packed=packed, scales=scales_GF.to(HALF), zeros=zeros)


def _beyond_l2(shape: tuple[int, int]) -> tuple[list[Int4Weight], int]:
    """Return weights (outputs, inputs), as many as the L2 does not hold, and the bytes of one."""
    first = _weight(shape, 0)
    size = first.packed.nbytes + first.scales.nbytes + (0 if first.zeros is None else first.zeros.nbytes)
    span = L2_SPANS * torch.cuda.get_device_properties(CUDA).L2_cache_size
    return [first, *(_weight(shape, seed) for seed in range(1, max(2, span // size)))], size


def _given(tokens: int, inputs: int, *, fp8: bool, device: torch.device = CUDA) -> tuple[Tensor, Tensor | None]:
    """Return x and its scale."""
    x_TI = (torch.randn(tokens, inputs, generator=torch.Generator(device).manual_seed(tokens), device=device) + 0.3).to(HALF)
    quantized = reference.quantize_fp8_token(x_TI)
    return (quantized.values_TI, quantized.scale) if fp8 else (x_TI, None)


def _product(each: Candidate, x_TI: Tensor, scale_T1: Tensor | None, weight: Int4Weight) -> Tensor:
    out_TO = x_TI.new_empty((len(x_TI), weight.form.outputs), dtype=HALF)
    launch_int4(out_TO, x_TI, scale_T1, weight, each.tile)
    return out_TO


def error_of(each: Candidate) -> float:
    """Return a tile's error at as many tokens as it is for, less one."""
    weight, tokens = _weight(CHECKED, 0), max(1, each.tile.tokens - 1)
    x_TI, scale_T1 = _given(tokens, CHECKED[1], fp8=each.fp8)
    with poisoned():
        found = _product(each, x_TI, scale_T1, weight)
    if scale_T1 is None:
        return relative_rms(found, reference.linear_int4(x_TI.float(), weight))
    return relative_rms(found, reference.linear_int4_fp8(x_TI, scale_T1, weight, torch.float32))


def measure(shape: str, tokens: int, chosen: list[Candidate]) -> None:
    """Print a line of the tiles for so many tokens."""
    outputs, inputs = SHAPES[shape]
    weights, size = _beyond_l2((outputs, inputs))
    timed = []
    for each in chosen:
        if each.fewest <= tokens <= each.most:
            x_TI, scale_T1 = _given(tokens, inputs, fp8=each.fp8)
            seconds = graph_seconds(partial(_product, each, x_TI, scale_T1), [(weight,) for weight in weights], ROUNDS)
            timed.append((seconds, each.name))
    work = 2e-12 * tokens * outputs * inputs
    said = (f"{name} {1e6 * s:.1f}us {size / s / 1e12:.2f}TB/s {work / s:.0f}TF" for s, name in sorted(timed))
    click.echo(f"{shape} {tokens}: {'; '.join(said)}")


def print_compiled(chosen: list[Candidate]) -> None:
    """Compile for compute capability 9.0 at one shape and print what came of each."""
    made = compile_only()
    setattr(ops_linear_int4, "processors", lambda device: 132)  # noqa: B010  there is no device to ask
    groups_GO = torch.zeros(4, 256, dtype=torch.uint8)
    weight = int4_weight(torch.zeros(256, 512, dtype=torch.uint8), groups_GO.to(HALF), groups_GO)
    for each in chosen:
        x_TI, scale_T1 = _given(each.tile.tokens, 512, fp8=each.fp8, device=torch.device("cpu"))
        _product(each, x_TI, scale_T1, weight)
        unit: Any = re.search(r"wgmma\.mma_async\S*|mma\.sync\S*", made[-1].asm["ptx"])
        click.echo(f"{each.name:44} {described(made[-1])}, {unit.group() if unit else 'no matrix unit'}")


@click.command()
@click.option("--only", multiple=True, help="Tiles whose name holds the word; repeatable.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="This shape alone; repeatable.")
@click.option("--tokens", multiple=True, type=int, help="So many tokens alone; repeatable.")
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], shapes: tuple[str, ...], tokens: tuple[int, ...], compiled: bool) -> None:
    """Check and time every tile."""
    chosen = [each for each in _candidates() if not only or any(word in each.name for word in only)]
    if compiled:
        print_compiled(chosen)
        return
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    wanted = tokens or TOKENS
    chosen = [each for each in chosen if any(each.fewest <= count <= each.most for count in wanted)]
    with compile_ahead(CUDA):
        for each in chosen:
            error_of(each)
    right = []
    for each in chosen:
        error, allowed = error_of(each), bound("linear_int4_fp8" if each.fp8 else "linear_int4", HALF)
        if error <= allowed:
            right.append(each)
        else:
            click.echo(f"{each.name} WRONG, error {error:.1e}")
    for shape in shapes or SHAPES:
        for count in wanted:
            measure(shape, count, right)


if __name__ == "__main__":
    main()
