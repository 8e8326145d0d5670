"""Kernels and tiles for FP8 products of few tokens, checked and timed: python -m tests.bench.fp8_variants [--only WORD ...].

Every candidate is compiled first, on all cores, then held to the plain-torch twin, then timed at the shapes of the layers of
Llama-3.1-8B and 70B for 1 to 64 tokens, with cuBLAS beside it; then 256 and 4096 tokens by cuBLAS and by a kernel of ours, with
sums in float32 and with the matrix unit's own. Times are those of one call in a captured graph of calls on weights that the L2
does not hold. A wrong result has no time. A line tells of the quickest, of what runs now (*), of cuBLAS and of what is wrong:
TB/s (TFLOP/s, TF, where operations bound it), percent of the roof, error in brackets. The summary says which is the quickest
for a layer's products. In names a is lines fetched ahead, s stages or slots, w warps, t teams of four warps, r the most registers
of a thread or, of a ring, of a lane.

`--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers, spills, shared memory and the instruction
that multiplies; of asynchronous ones how many the code has, and how many waits for them. What came of it stands in
docs/decisions/0063.

T tokens, I input features, O output features; B output features and J input features of a block, M tokens of a tile.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import torch
import triton
import triton.language as tl
from attrs import evolve, frozen
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from paddock.bench.kernels.case import Case, Draw
from paddock.bench.kernels.op_cases import FULL, OpCases
from paddock.bench.kernels.timing import Rounds, argument_sets, graph_seconds
from paddock.layers.reference import linear_fp8 as twin
from paddock.planning.roofs import ceilings_of
from paddock.testing.oracle import bound, poisoned, relative_rms
from paddock_triton.dependence import DEPENDENT, fetch, start_next, wait
from paddock_triton.launch import compile_ahead, launch
from paddock_triton.linear_ring import TILES, launch_ring, tile_for
from paddock_triton.linear_ring_spec import RingTile
from paddock_triton.ops_linear_fp8 import FEW, FewTile, cublas, launch_few
from paddock_triton.ring import ALL_REGISTERS
from tests.bench.hopper_code import compile_only, described

MODELS, FEW_TOKENS, MANY_TOKENS = ("8B", "70B"), (1, 2, 8, 16, 32, 64), (256, 4096)
BEST = 3  # candidates of which a line tells, beside what runs now, cuBLAS and what is wrong
ROUNDS = Rounds(warm=2, timed=7)
HALF = torch.bfloat16
_LINE = tl.constexpr(128)

Given = tuple[Tensor, Tensor, Tensor, Tensor]
Call = Callable[..., Tensor]


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _copied_kernel(
    x_ptr: tl.tensor, x_scale_ptr: tl.tensor, weight: tl.tensor, weight_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor,
    tokens: tl.tensor, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr,
) -> None:  # fmt: skip
    """Do what the plugin's kernel of few tokens does, the weight brought by the copy engine; whole blocks, a scale a token."""
    start_next()
    first = tl.program_id(0) * BLOCK_B
    o_B, m_M, j_J = first + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_J)
    inside_M = m_M < tokens
    ahead_L = tl.arange(0, AHEAD) * _LINE
    fetch(weight_ptr + o_B.to(tl.int64)[:, None] * IN + ahead_L[None, :])
    scale_B = tl.load(scale_ptr + o_B)
    wait()
    sum_BM = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    for start in tl.range(0, IN, BLOCK_J, num_stages=STAGES):
        weight_BJ = weight.load([first, start])
        x_MJ = tl.load(x_ptr + m_M[:, None] * IN + (start + j_J)[None, :], mask=inside_M[:, None], other=0.0)
        sum_BM += tl.dot(weight_BJ, tl.trans(x_MJ))
    x_scale_M = tl.load(x_scale_ptr + m_M, mask=inside_M, other=0.0)
    out_BM = out_ptr + m_M[None, :] * OUT + o_B[:, None]
    y_BM = sum_BM * (x_scale_M[None, :] * scale_B[:, None])
    tl.store(out_BM, y_BM.to(out_ptr.dtype.element_ty), mask=inside_M[None, :])


def _copied(tile: FewTile, x_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, *_: object) -> Tensor:
    (features, inputs), tokens = weight_OI.shape, x_TI.shape[0]
    out_TO = x_TI.new_empty((tokens, features), dtype=HALF)
    descriptor = TensorDescriptor.from_tensor(weight_OI, [tile.block_o, tile.block_i])
    launch(
        _copied_kernel, (features // tile.block_o,),
        x_TI, x_scale, descriptor, weight_OI, weight_scale_O1, out_TO, tokens, OUT=features, IN=inputs, BLOCK_M=tile.rows,
        BLOCK_B=tile.block_o, BLOCK_J=tile.block_i, STAGES=tile.stages, AHEAD=tile.ahead, num_warps=tile.warps, **DEPENDENT,
    )  # fmt: skip
    return out_TO


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _many_kernel(
    x: tl.tensor, x_scale_ptr: tl.tensor, weight: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor, tokens: tl.tensor,
    OUT: tl.constexpr, IN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr, BESIDE: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Write a tile of many tokens' outputs; BESIDE tiles of tokens share a tile of the weight before the next is read."""
    tiles_m, tiles_b = tl.cdiv(tokens, BLOCK_M), OUT // BLOCK_B
    band = tl.program_id(0) // (BESIDE * tiles_b)
    tall = tl.minimum(tiles_m - band * BESIDE, BESIDE)
    first_m = (band * BESIDE + tl.program_id(0) % (BESIDE * tiles_b) % tall) * BLOCK_M
    first_b = (tl.program_id(0) % (BESIDE * tiles_b) // tall) * BLOCK_B
    sum_MB = tl.zeros([BLOCK_M, BLOCK_B], tl.float32)
    for start in tl.range(0, IN, BLOCK_J, num_stages=STAGES):
        x_MJ, weight_BJ = x.load([first_m, start]), weight.load([first_b, start])
        if FAST:
            sum_MB = tl.dot(x_MJ, tl.trans(weight_BJ), sum_MB)
        else:
            sum_MB += tl.dot(x_MJ, tl.trans(weight_BJ))
    m_M, o_B = first_m + tl.arange(0, BLOCK_M), first_b + tl.arange(0, BLOCK_B)
    scale_MB = tl.load(x_scale_ptr + m_M, mask=m_M < tokens, other=0.0)[:, None] * tl.load(scale_ptr + o_B)[None, :]
    at_MB = out_ptr + m_M.to(tl.int64)[:, None] * OUT + o_B[None, :]
    tl.store(at_MB, (sum_MB * scale_MB).to(out_ptr.dtype.element_ty), mask=(m_M < tokens)[:, None])


@frozen(kw_only=True)
class ManyTile:
    """How a product of many tokens is cut; `fast` leaves all of a sum to the matrix unit; `registers` caps those of a thread."""

    rows: int
    block_o: int
    stages: int
    warps: int
    registers: int | None = None
    fast: bool = False


def _many(tile: ManyTile, x_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, *_: object) -> Tensor:
    (features, inputs), tokens = weight_OI.shape, x_TI.shape[0]
    out_TO = x_TI.new_empty((tokens, features), dtype=HALF)
    x, weight = (TensorDescriptor.from_tensor(a, [size, 128]) for a, size in ((x_TI, tile.rows), (weight_OI, tile.block_o)))
    launch(
        _many_kernel, (-(-tokens // tile.rows) * (features // tile.block_o),),
        x, x_scale, weight, weight_scale_O1, out_TO, tokens, OUT=features, IN=inputs, BLOCK_M=tile.rows, BLOCK_B=tile.block_o,
        BLOCK_J=128, STAGES=tile.stages, BESIDE=8, FAST=tile.fast, num_warps=tile.warps, maxnreg=tile.registers,
    )  # fmt: skip
    return out_TO


def _few(tile: FewTile, x_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, *_: object) -> Tensor:
    out_TO = x_TI.new_empty((len(x_TI), len(weight_OI)), dtype=HALF)
    launch_few(out_TO, x_TI, x_scale, weight_OI, weight_scale_O1, tile)
    return out_TO


def _library(fast: bool, x_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, *_: object) -> Tensor:
    return cublas(x_TI, x_scale, weight_OI, weight_scale_O1, HALF, fast_accumulation=fast)


def _ringed(
    tile: RingTile | None, x_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, *_: object
) -> Tensor:
    out_TO = x_TI.new_empty((len(x_TI), len(weight_OI)), dtype=HALF)
    launch_ring(out_TO, x_TI, x_scale, weight_OI, weight_scale_O1, tile or tile_for(len(x_TI), weight_OI))
    return out_TO


@frozen(eq=False, kw_only=True)
class Candidate:
    """A name, a call, the fewest and most tokens it is for, whether it is the library's and whether its sums are float32's."""

    name: str
    call: Call
    fewest: int
    most: int
    library: bool = False
    exact: bool = True


def _tiles() -> Iterator[Candidate]:
    """Yield blocks that may multiply few tokens: those that the plugin has for what a ring does not serve first, of each size."""
    others = {
        16: (
            (64, 256, 5, 8, 4),
            (64, 256, 8, 16, 4),
            (64, 128, 12, 8, 4),
            (64, 512, 4, 8, 4),
            (128, 256, 5, 8, 8),
            (32, 512, 5, 8, 4),
        ),
        32: ((64, 256, 4, 4, 4), (64, 128, 10, 4, 4), (128, 256, 4, 4, 8)),
        64: ((64, 256, 3, 4, 4), (64, 128, 8, 4, 4), (128, 128, 6, 4, 8), (128, 256, 4, 4, 8), (256, 128, 4, 4, 8)),
    }
    for rows, shapes in others.items():
        tiles = [
            FEW[rows],
            *(FewTile(rows=rows, block_o=o, block_i=i, stages=s, ahead=a, warps=w) for o, i, s, a, w in shapes),
        ]
        fewest = 1 if rows == 16 else rows // 2 + 1
        for tile in tiles:
            size = f"{tile.block_o}x{tile.block_i} s{tile.stages} a{tile.ahead} w{tile.warps}"
            yield Candidate(name=f"few {rows} {size}", call=partial(_few, tile), fewest=fewest, most=rows)
        copied = FewTile(rows=rows, block_o=64, block_i=128, stages=8, ahead=4)
        yield Candidate(name=f"copied {rows} 64x128 s8 a4 w4", call=partial(_copied, copied), fewest=fewest, most=rows)


def _rings() -> Iterator[Candidate]:
    """Yield what streams a weight through a ring: as the plugin does, then by whole tiles and shared ones, and other rings."""
    others: dict[int, tuple[dict[str, Any], ...]] = {
        8: ({"slots": 5}, {"registers": 1536}, {"teams": 2, "slots": 12}),
        16: ({"registers": ALL_REGISTERS}, {"slots": 4}, {"teams": 2, "slots": 10}),
        32: ({"registers": ALL_REGISTERS}, {"slots": 3}, {"teams": 2, "slots": 8}),
        64: ({"registers": ALL_REGISTERS}, {"slots": 5}, {"teams": 4, "slots": 2}),
    }
    for rows, tile in TILES.items():
        fewest = 1 if rows == 8 else rows // 2 + 1
        yield Candidate(name=f"*ring {rows}", call=partial(_ringed, None), fewest=fewest, most=rows)
        for each in (tile, *(evolve(tile, **other) for other in others[rows])):
            for shared in (True, False):
                name = f"ring {rows} t{each.teams} s{each.slots} r{each.registers} {'shared' if shared else 'whole'}"
                yield Candidate(name=name, call=partial(_ringed, evolve(each, shared=shared)), fewest=fewest, most=rows)


def _large_tiles() -> Iterator[Candidate]:
    """Yield what may multiply many tokens: sums in float32 each 128 inputs, and one with the matrix unit's own, for its error."""
    shapes = ((128, 256, 4, 8, None), (128, 128, 6, 8, None), (128, 128, 3, 8, 128), (128, 64, 4, 4, None), (64, 128, 4, 4, None))
    tiles = [ManyTile(rows=m, block_o=o, stages=s, warps=w, registers=r) for m, o, s, w, r in shapes]
    for tile in (*tiles, ManyTile(rows=128, block_o=256, stages=4, warps=8, fast=True)):
        name = f"many {tile.rows}x{tile.block_o} s{tile.stages} w{tile.warps}{f' r{tile.registers}' if tile.registers else ''}"
        name += " fast" if tile.fast else ""
        yield Candidate(name=name, call=partial(_many, tile), fewest=256, most=4096, exact=not tile.fast)


CANDIDATES = [
    *_tiles(),
    *_rings(),
    *_large_tiles(),
    Candidate(name="cuBLAS", call=partial(_library, False), fewest=1, most=4096, library=True, exact=False),
    Candidate(name="cuBLAS fast", call=partial(_library, True), fewest=1, most=4096, library=True, exact=False),
]


@frozen(kw_only=True)
class Timed:
    """What came of a candidate at a size: its error and, where that is small enough or nobody says it is exact, its seconds."""

    name: str
    error: float
    seconds: float | None

    def said(self, case: Case, limit: float | None, *, operations: bool) -> str:
        """Return rate and percent of the roof, or what is wrong."""
        if self.seconds is None:
            return f"{self.name} WRONG, error {self.error:.1e}"
        rate = (case.flops if operations else case.nbytes) / self.seconds / 1e12
        roof = "" if limit is None else f" {100 * limit / self.seconds:.0f}%"
        return f"{self.name} {rate:.2f}{'TF' if operations else ''}{roof} ({self.error:.0e})"


def cases(models: tuple[str, ...], tokens: tuple[int, ...], device: torch.device) -> list[Case]:
    """Return the products of the models' layers, by size and then by tokens."""
    found = OpCases(table=FULL, draw=Draw(device=device, dtype=HALF)).of("linear_fp8")
    wanted = [case for case in found if case.name.split(" ", 1)[0] in models and int(case.name.split(" ")[1]) in tokens]
    return sorted(wanted, key=lambda case: (case.name.split(" x ", 1)[1], int(case.name.split(" ")[1])))


def taking(case: Case, chosen: list[Candidate]) -> list[Candidate]:
    """Return the candidates for so many tokens."""
    tokens = int(case.name.split(" ")[1])
    return [each for each in chosen if each.fewest <= tokens <= each.most]


def compile_all(chosen: list[Candidate], sizes: list[Case], device: torch.device) -> None:
    """Have every kernel compiled, on all cores; what does not compile says so when it is launched."""
    with compile_ahead(device):
        for case in sizes:
            given = case.make(0)
            for each in taking(case, chosen):
                if not each.library:
                    each.call(*given)


def measured(each: Candidate, sets: list[tuple[Any, ...]], expected: Tensor) -> Timed:
    """Return a candidate's error and time; an exception is an infinite error."""
    try:
        with poisoned():
            found = each.call(*sets[0])
        error = relative_rms(found, expected)
        if each.exact and error > bound("linear_fp8", HALF):
            return Timed(name=each.name, error=error, seconds=None)
        return Timed(name=each.name, error=error, seconds=graph_seconds(each.call, sets, ROUNDS))
    except Exception as error:  # the others still count
        click.echo(f"{each.name}: {type(error).__name__}: {str(error)[:200]}")
        return Timed(name=each.name, error=float("inf"), seconds=None)


def measure(case: Case, chosen: list[Candidate], device: torch.device) -> list[Timed]:
    """Print a line and return what came of each candidate, the quickest first."""
    sets = argument_sets(case, device)
    x_TI, x_scale_T1, weight_OI, weight_scale_O1 = sets[0][:4]
    expected = twin(x_TI, x_scale_T1, weight_OI, weight_scale_O1, torch.float32)
    found = [measured(each, sets, expected) for each in taking(case, chosen)]
    found.sort(key=lambda each: each.seconds or float("inf"))
    limit = case.limit(ceilings_of(torch.cuda.get_device_name()))
    operations, least = limit is not None and limit.computes, None if limit is None else limit.seconds
    shown = [each for i, each in enumerate(found) if i < BEST or each.name.startswith(("*", "cuBLAS")) or each.seconds is None]
    click.echo(f"{case.name:24} {'; '.join(each.said(case, least, operations=operations) for each in shown)}")
    return found


def summarise(totals: dict[tuple[str, int], dict[str, list[float]]]) -> None:
    """Print, for a model and a number of tokens, each candidate's seconds for the four products of a layer."""
    click.echo("microseconds for the four products of a layer")
    for (model, tokens), by_name in totals.items():
        whole = {name: sum(times) * 1e6 for name, times in by_name.items() if len(times) == 4}
        best = sorted(whole.items(), key=lambda pair: pair[1])
        shown = [pair for i, pair in enumerate(best) if i < BEST or pair[0].startswith(("*", "cuBLAS"))]
        click.echo(f"{model} {tokens:4}  {'; '.join(f'{name} {taken:.1f}' for name, taken in shown)}")


def print_compiled(chosen: list[Candidate]) -> None:
    """Compile for compute capability 9.0 at one shape and print what came of each."""
    fp8, inputs = torch.float8_e4m3fn, 8192
    made = compile_only()
    for each in (each for each in chosen if not each.library):
        x_TI, weight_OI = torch.zeros(each.most, inputs).to(fp8), torch.zeros(256, inputs).to(fp8)
        each.call(x_TI, torch.ones(each.most, 1), weight_OI, torch.ones(256, 1))
        units = re.findall(r"wgmma\.mma_async\S*|mma\.sync\S*|cvt\.rn\.f16x2\S*", made[-1].asm["ptx"])
        waits = len(re.findall(r"wgmma\.wait_group", made[-1].asm["ptx"]))
        said = f"{units[0]}{f' x {len(units)}, {waits} waits' if waits else ''}" if units else "no matrix unit"
        click.echo(f"{each.name:48} {described(made[-1])}, {said}")


@click.command()
@click.option("--only", multiple=True, help="Candidates whose name holds the word; repeatable.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Layers of this model alone; repeatable.")
@click.option("--tokens", multiple=True, type=int, help="So many tokens alone; repeatable.")
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], models: tuple[str, ...], tokens: tuple[int, ...], compiled: bool) -> None:
    """Check and time every candidate."""
    chosen = [each for each in CANDIDATES if not only or any(word in each.name for word in only)]
    if compiled:
        print_compiled(chosen)
        return
    began, device = time.perf_counter(), torch.device("cuda")
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    sizes = cases(models or MODELS, tokens or (*FEW_TOKENS, *MANY_TOKENS), device)
    compile_all(chosen, sizes, device)
    click.echo(f"compiled in {time.perf_counter() - began:.0f} s")
    totals: dict[tuple[str, int], dict[str, list[float]]] = {}
    with torch.inference_mode():
        for case in sizes:
            model, count = case.name.split(" ")[:2]
            for each in measure(case, chosen, device):
                if each.seconds is not None:
                    totals.setdefault((model, int(count)), {}).setdefault(each.name, []).append(each.seconds)
    summarise(dict(sorted(totals.items())))
    click.echo(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
