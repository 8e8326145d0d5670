"""Tiles for a 4-bit weight in FP8, checked and timed: python -m tests.bench.int4_to_fp8_variants [--only WORD ...].

Every tile is held to the plain-torch twin, bit by bit, on small weights, then timed at shapes of the layers of Llama-3.1-70B and
Falcon-180B (groups of 128, zero points). Times are those of one call in a captured graph of calls on weights that the L2 does
not hold. A wrong result has no time. A line tells of all tiles for a shape, the quickest first, what runs now marked *:
microseconds, TB/s of bytes read and written; last, what a copy that moves as many bytes does. In names o is outputs of a
program, b blocks of inputs; in a shared tile threads tell each other their tables.

`--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers, spills and shared memory.
"""

from __future__ import annotations

from functools import partial

import click
import torch
import triton
from torch import Tensor

from paddock.bench.kernels.timing import L2_SPANS, Rounds, graph_seconds
from paddock.layers import reference
from paddock.layers.int4 import Int4Form, Int4Weight, int4_weight
from paddock_triton import ops_int4
from paddock_triton.ops_int4 import Fp8Tile, launch_to_fp8
from tests.bench.hopper_code import compile_only, described

CUDA, HALF = torch.device("cuda"), torch.bfloat16
ROUNDS = Rounds(warm=2, timed=7)
SHAPES = {
    "70B o": (8192, 8192),
    "70B qkv": (10240, 8192),
    "70B gate_up": (57344, 8192),
    "70B down": (8192, 28672),
    "Falcon up": (59392, 14848),
    "Falcon down": (14848, 59392),
}
DEFAULT_SHAPES = ("70B gate_up", "Falcon down")
CHECKED = ((330, 1152, 128), (128, 640, 64), (70, 416, 32))  # outputs, inputs, group: programs and blocks that fill up
TILES = [
    *(Fp8Tile(outputs=64, blocks=blocks, shared=shared) for shared in (False, True) for blocks in (1, 2, 4)),
    *(Fp8Tile(outputs=outputs, blocks=1, shared=shared) for shared in (False, True) for outputs in (128, 256)),
    Fp8Tile(outputs=256, blocks=4),
]


def _name(tile: Fp8Tile) -> str:
    """Return what the tile is, a star where it is what runs now."""
    star = "*" if tile == ops_int4._TILE else ""
    return f"{star}o{tile.outputs} b{tile.blocks}{' shared' if tile.shared else ''}"


def _weight(outputs: int, inputs: int, group: int, seed: int) -> Int4Weight:
    """Return random codes, scales and zero points."""
    form = Int4Form(inputs=inputs, outputs=outputs, group=group)
    generator = torch.Generator(CUDA).manual_seed(seed)

    def some(*size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator, device=CUDA)

    scales_GF = torch.rand(form.group_rows, form.filled_outputs, generator=generator, device=CUDA) * 0.01 + 0.005
    packed, zeros = some(form.blocks, form.slabs, 1024), some(form.group_rows, form.filled_outputs // 2)
    return Int4Weight(form=form, packed=packed, scales=scales_GF.to(HALF), zeros=zeros)


def wrong_values(tile: Fp8Tile) -> int:
    """Return how many values are not the twin's."""
    wrong = 0
    for seed, size in enumerate(CHECKED):
        weight = _weight(*size, seed)
        found, expected = (
            call(weight, weight.row_scales()) for call in (partial(launch_to_fp8, tile=tile), reference.int4_to_fp8)
        )
        wrong += int((found.float() != expected.float()).sum())
    return wrong


def _copy_seconds(moved: int) -> float:
    """Return how long a copy takes that reads and writes `moved` bytes."""
    given = torch.zeros(moved // 2, dtype=torch.uint8, device=CUDA)
    return graph_seconds(torch.clone, [(given,), (given.clone(),)], ROUNDS)


def measure(shape: str, tiles: list[Fp8Tile]) -> None:
    """Print a line of the tiles."""
    outputs, inputs = SHAPES[shape]
    first = _weight(outputs, inputs, 128, 0)
    held = first.packed.nbytes + first.scales.nbytes + (0 if first.zeros is None else first.zeros.nbytes)
    span = L2_SPANS * torch.cuda.get_device_properties(CUDA).L2_cache_size
    weights = [first, *(_weight(outputs, inputs, 128, seed) for seed in range(1, max(2, span // held)))]
    sets = [(weight, weight.row_scales()) for weight in weights]
    moved = held + outputs * inputs + 4 * outputs
    timed = [(graph_seconds(partial(launch_to_fp8, tile=tile), sets, ROUNDS), _name(tile)) for tile in tiles]
    timed = [*sorted(timed), (_copy_seconds(moved), "a copy")]
    click.echo(f"{shape}: " + "; ".join(f"{name} {1e6 * s:.1f}us {moved / s / 1e12:.2f}TB/s" for s, name in timed))


def print_compiled(tiles: list[Fp8Tile]) -> None:
    """Compile for compute capability 9.0 at one shape and print what came of each."""
    made = compile_only()
    groups_GO = torch.zeros(4, 256, dtype=torch.uint8)
    weight = int4_weight(torch.zeros(256, 512, dtype=torch.uint8), groups_GO.to(HALF), groups_GO)
    for tile in tiles:
        launch_to_fp8(weight, weight.row_scales(), tile)
        text = made[-1].asm["ptx"]
        wide = f"{text.count('ld.global.v4')} loads and {text.count('st.global.v4')} stores of 16 bytes"
        click.echo(f"{_name(tile):20} {described(made[-1])}, {wide}")


@click.command()
@click.option("--only", multiple=True, help="Tiles whose name holds the word; repeatable.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="This shape alone; repeatable.")
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], shapes: tuple[str, ...], compiled: bool) -> None:
    """Check and time every tile."""
    tiles = [tile for tile in TILES if not only or any(word in _name(tile) for word in only)]
    if compiled:
        print_compiled(tiles)
        return
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    right = []
    for tile in tiles:
        wrong = wrong_values(tile)
        if wrong:
            click.echo(f"{_name(tile)} WRONG in {wrong} values")
        else:
            right.append(tile)
    for shape in shapes or DEFAULT_SHAPES:
        measure(shape, right)


if __name__ == "__main__":
    main()
