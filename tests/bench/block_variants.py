"""FP8 products with scales of blocks, checked and timed: python -m tests.bench.block_variants [--only WORD ...].

At the shapes of the layers of Llama-3.1-8B and 70B, by the ring, by cuBLAS and by tiles of the kernels for the rest, each with
the numbers of tokens it is for: held to the plain-torch twin, then timed in a captured graph of calls on weights that the
L2 does not hold. A wrong result has no time; * is what runs now on compute capability 9, + is the tile that runs elsewhere.
`--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers, spills and shared memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import torch
import triton
from attrs import frozen
from torch import Tensor

from paddock.bench.kernels.case import Case, Draw
from paddock.bench.kernels.op_cases import FULL, OpCases
from paddock.bench.kernels.timing import Rounds, argument_sets, graph_seconds
from paddock.layers.reference import linear_fp8_blocks as twin
from paddock.testing.oracle import bound, poisoned, relative_rms
from paddock_triton.launch import compile_ahead
from paddock_triton.linear_ring import TILES, launch_ring_blocks, tile_for
from paddock_triton.linear_ring_spec import RingTile
from paddock_triton.ops_linear_fp8 import FewTile
from paddock_triton.ops_linear_fp8_blocks import FEW, GROUP, ONE, OneTile, cublas_blocks, launch_few, launch_one
from tests.bench.hopper_code import compile_only, described

MODELS, MANY_TOKENS = ("8B", "70B"), (256, 4096)
ROUNDS = Rounds(warm=2, timed=5)
HALF = torch.bfloat16


@frozen(kw_only=True)
class Candidate:
    """A tile, None for cuBLAS, and the tokens it is timed with."""

    tile: OneTile | FewTile | RingTile | None
    tokens: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return its sides, stages and warps."""
        tile = self.tile
        if tile is None:
            return "cuBLAS"
        if isinstance(tile, RingTile):
            return f"ring {tile.tokens} tokens"
        if isinstance(tile, OneTile):
            return f"one {tile.block_o}x{tile.block_i} w{tile.warps}"
        return f"{tile.rows} tokens {tile.block_o}x{tile.block_i} s{tile.stages} a{tile.ahead} w{tile.warps}"

    @property
    def mark(self) -> str:
        """Return what says that the plugin takes it now, on compute capability 9 or elsewhere."""
        if self.tile is None or isinstance(self.tile, RingTile):
            return "*"
        return "+" if self.tile == ONE or self.tile in FEW.values() else ""

    def __call__(
        self, x_TI: Tensor, scale_TG: Tensor, weight_OI: Tensor, scale_QG: Tensor, block: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Return the product."""
        if self.tile is None:
            return cublas_blocks(x_TI, scale_TG, weight_OI, scale_QG, dtype)
        out_TO = x_TI.new_empty((len(x_TI), len(weight_OI)), dtype=dtype)
        given = (x_TI, scale_TG, weight_OI, scale_QG, out_TO)
        if isinstance(self.tile, OneTile):
            launch_one(given, block[0], self.tile)
        elif isinstance(self.tile, RingTile):
            launch_ring_blocks(out_TO, x_TI, scale_TG, weight_OI, scale_QG, block[0], tile_for(len(x_TI), weight_OI))
        else:
            launch_few(given, block[0], self.tile)
        return out_TO


def candidates() -> Iterator[Candidate]:
    """Yield every way that is tried."""
    for most, tokens in ((8, (1, 2)), (16, (16,)), (32, (32,)), (64, (64,))):
        yield Candidate(tile=TILES[most], tokens=tokens)
    yield Candidate(tile=None, tokens=MANY_TOKENS)
    for block_o, block_i, warps in ((4, 8192, 8), (2, 8192, 8), (4, 4096, 4), (4, 4096, 8), (8, 4096, 8)):
        yield Candidate(tile=OneTile(block_o=block_o, block_i=block_i, warps=warps), tokens=(1,))
    for rows, tokens in ((16, (2, 16)), (32, (32,)), (64, (64,))):
        for stages, ahead in ((4, 4), (6, 4), (8, 4), (8, 8), (10, 8)):
            tile = FewTile(rows=rows, block_o=64, block_i=GROUP, stages=stages, ahead=ahead)
            yield Candidate(tile=tile, tokens=tokens)
    for rows, block_o, stages, warps in ((128, 128, 4, 8), (128, 128, 3, 8), (64, 128, 4, 4), (128, 64, 4, 4), (64, 256, 4, 8)):
        tile = FewTile(rows=rows, block_o=block_o, block_i=GROUP, stages=stages, ahead=0, warps=warps)
        yield Candidate(tile=tile, tokens=MANY_TOKENS)


def cases(tokens: int) -> list[Case]:
    """Return the products of the models' layers with so many tokens."""
    found = OpCases(table=FULL, draw=Draw(device=torch.device("cuda"), dtype=HALF)).of("linear_fp8_blocks")
    return [case for case in found if case.name.split()[0] in MODELS and case.name.split()[1] == str(tokens)]


def measure(case: Case, chosen: list[Candidate], device: torch.device) -> None:
    """Print each candidate's error or microseconds for a product, the quickest first."""
    x_TI, scale_TG, weight_OI, scale_QG, block, _ = case.make(0)
    expected = twin(x_TI, scale_TG, weight_OI, scale_QG, block, torch.float32)
    sets, lines = argument_sets(case, device), list[tuple[float, str]]()
    for each in chosen:
        with poisoned():
            error = relative_rms(each(*sets[0]), expected)
        if not error <= bound("linear_fp8_blocks", HALF):
            lines.append((0.0, f"  {each.name}: wrong, {error:.2e}"))
            continue
        seconds = graph_seconds(each, sets, ROUNDS)
        rates = f"{case.nbytes / seconds / 1e12:.2f} TB/s, {case.flops / seconds / 1e12:.0f} TFLOP/s"
        lines.append((seconds, f"  {each.name}{each.mark}: {1e6 * seconds:.1f} us, {rates}"))
    click.echo(f"{case.name}\n" + "\n".join(line for _, line in sorted(lines)))


def print_compiled(chosen: list[Candidate]) -> None:
    """Print what the assembler says of each kernel."""
    made = compile_only()
    for each in (one for one in chosen if one.tile is not None):
        call: Callable[..., Any] = partial(each, *_nothing(each.tokens[0]))
        call()
        click.echo(f"{each.name:32} {described(made[-1])}")


def _nothing(tokens: int) -> tuple[Any, ...]:
    x_TI, weight_OI = (torch.zeros(rows, 8192).to(torch.float8_e4m3fn) for rows in (tokens, 8192))
    return x_TI, torch.ones(tokens, 64), weight_OI, torch.ones(64, 64), (GROUP, GROUP), HALF


@click.command()
@click.option("--only", multiple=True, help="Candidates with this word in their name alone; repeatable.")
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], compiled: bool) -> None:
    """Check and time every candidate."""
    chosen = [each for each in candidates() if not only or any(word in each.name for word in only)]
    if compiled:
        print_compiled(chosen)
        return
    began, device = time.perf_counter(), torch.device("cuda")
    click.echo(f"{torch.cuda.get_device_name()}, triton {triton.__version__}")
    numbers = sorted({tokens for each in chosen for tokens in each.tokens})
    with compile_ahead(device):
        for tokens in numbers:
            for case in cases(tokens):
                for each in (one for one in chosen if tokens in one.tokens):
                    each(*case.make(0))
    click.echo(f"compiled in {time.perf_counter() - began:.0f} s")
    for tokens in numbers:
        for case in cases(tokens):
            measure(case, [each for each in chosen if tokens in each.tokens], device)
    click.echo(f"in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
