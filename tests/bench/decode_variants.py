"""Tiles and cuts for decode attention, checked and timed: python -m tests.bench.decode_variants [--only WORD ...] [--compile].

Each is checked on ragged decodes against float64, then timed in CUDA graphs as `paddock bench kernels` has its cases: percent of
4.3 TB/s. `--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers, spills and shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
import pytest
import torch
import triton
from attrs import evolve, frozen
from torch import Tensor

from paddock.bench.kernels.attention_cases import STEPS, Step, laid_out
from paddock.bench.kernels.case import Draw
from paddock.bench.kernels.timing import argument_sets, graph_seconds
from paddock.layers import LayerKV
from paddock.layers.reference import FP8
from paddock.testing.kernels import attention_case
from paddock_triton import attention
from paddock_triton.attention import TritonAttention
from paddock_triton.attention_tile import Tile
from paddock_triton.attention_tuning import decode_programs, decode_tile
from tests.bench.hopper_code import compile_only, described

PAGE = 64
BANDWIDTH = 4.3e12  # bytes a second
CHECKED = [(0, 1), (70, 1), (63, 1), (64, 1), (300, 1), (1000, 1)]  # (tokens there, new ones)
TIMED = {step.name: step for step in STEPS if step.decodes and not step.prompts and not step.in_fp8}

PAIRS = Tile(block_m=16, block_n=64, warps=4, stages=3, tma=True, pairs=True)
BF16 = Tile(block_m=16, block_n=64, warps=4, stages=4, tma=True)
WIDE = Tile(block_m=32, block_n=64, warps=2, stages=4, pairs=True)


@frozen(kw_only=True)
class Cut:
    """A tile over pages of a type, and how many programs a multiprocessor has; what is None is as it is served."""

    kept: torch.dtype = FP8
    tile: Tile | None = None
    programs: int | None = None

    @contextmanager
    def served(self) -> Iterator[None]:
        """Have the backend cut decodes so."""

        def tile_of(q_THD: Tensor, kv: LayerKV) -> Tile:
            return self.tile or decode_tile(q_THD, kv)

        def programs_of(num_processors: int, *, whole: int, fp8: bool) -> int:
            return num_processors * self.programs if self.programs else decode_programs(num_processors, whole=whole, fp8=fp8)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "decode_tile", tile_of)
            patch.setattr(attention, "decode_programs", programs_of)
            yield


CUTS: dict[str, dict[str, Cut]] = {
    "decode 64 x 8k": {
        "bfloat16": Cut(kept=torch.bfloat16),
        "served": Cut(),
        **{f"{n} programs": Cut(programs=n) for n in (2, 3, 5, 6, 8)},
        **{f"{n} stages": Cut(tile=evolve(PAIRS, stages=n)) for n in (2, 4, 5)},
        "2 warps, 4 stages": Cut(tile=evolve(PAIRS, warps=2, stages=4)),
        "2 warps, 3 stages, 6 programs": Cut(tile=evolve(PAIRS, warps=2), programs=6),
        "2 warps, pointers": Cut(tile=evolve(PAIRS, warps=2, stages=4, tma=False)),
        "pointers": Cut(tile=evolve(PAIRS, tma=False)),
        "8 warps": Cut(tile=evolve(PAIRS, warps=8)),
        "96 registers, 5 programs": Cut(tile=evolve(PAIRS, registers=96), programs=5),
        "32 keys, 6 stages": Cut(tile=evolve(PAIRS, block_n=32, stages=6)),
        "no pairs": Cut(tile=evolve(PAIRS, pairs=False)),
        "two tiles, 2 stages": Cut(tile=evolve(PAIRS, tiles=2, stages=2)),
        "two tiles, 3 stages": Cut(tile=evolve(PAIRS, tiles=2)),
        "two tiles, 3 stages, 3 programs": Cut(tile=evolve(PAIRS, tiles=2), programs=3),
        "two tiles, 3 stages, 128 registers": Cut(tile=evolve(PAIRS, tiles=2, registers=128)),
        "two tiles, 2 stages, 128 registers": Cut(tile=evolve(PAIRS, tiles=2, stages=2, registers=128)),
        "two tiles, 2 warps": Cut(tile=evolve(PAIRS, tiles=2, warps=2)),
        "two tiles of 32": Cut(tile=evolve(PAIRS, tiles=2, block_n=32, stages=4)),
        "bfloat16, two tiles": Cut(kept=torch.bfloat16, tile=evolve(BF16, tiles=2, stages=2)),
    },
    "decode 64 x 2k, Falcon-180B heads": {
        "bfloat16": Cut(kept=torch.bfloat16),
        "bfloat16, 32 rows": Cut(kept=torch.bfloat16, tile=Tile(block_m=32, block_n=64, warps=4, stages=4, tma=True)),
        "served": Cut(),
        "copy engine": Cut(tile=evolve(WIDE, tma=True)),
        "4 warps, copy engine": Cut(tile=evolve(WIDE, warps=4, tma=True)),
        "6 programs": Cut(programs=6),
        "32 keys": Cut(tile=evolve(WIDE, block_n=32, stages=6)),
        "two tiles": Cut(tile=evolve(WIDE, tiles=2, stages=3)),
        "two tiles of 32": Cut(tile=evolve(WIDE, tiles=2, block_n=32, stages=4)),
        "bfloat16, two tiles": Cut(kept=torch.bfloat16, tile=evolve(BF16, block_m=32, tiles=2, stages=2)),
    },
}
CUTS["decode 64 x 2k"] = {
    name: CUTS["decode 64 x 8k"][name] for name in ("served", "3 programs", "6 programs", "4 stages", "no pairs")
}
CUTS["decode 1 x 131k"] = {
    name: CUTS["decode 64 x 8k"][name] for name in ("served", "3 programs", "6 programs", "two tiles, 3 stages")
}


def check(cut: Cut, step: Step) -> None:
    """Raise AssertionError where a cut is wrong on ragged decodes of a step's heads."""
    case = attention_case(CHECKED, step.heads, dtype=torch.bfloat16, page_size=PAGE, kv_dtype=cut.kept, device="cuda")
    params = case.params()
    with cut.served():
        case.check(case.attend(TritonAttention(torch.device("cuda")), params), params)


def percent(cut: Cut, step: Step) -> tuple[float, float]:
    """Return microseconds of a step's attention and percent of the bandwidth."""
    device = torch.device("cuda")
    draw = Draw(device=device, dtype=torch.bfloat16)
    laid = laid_out(step, page_size=PAGE, kv_dtype=cut.kept, draw=draw)
    backend = TritonAttention(device)
    inputs = evolve(laid.inputs, prepared=backend.prepare(laid.inputs))
    with cut.served():
        seconds = graph_seconds(
            lambda q_THD, kv: backend.attend(q_THD, kv, inputs, laid.params), argument_sets(laid.case, device)
        )
    return seconds * 1e6, laid.case.nbytes / seconds / BANDWIDTH * 100


def compiled(cut: Cut, step: Step) -> None:
    """Launch once on tensors of a CPU, where launches only compile."""
    case = attention_case(CHECKED[:2], step.heads, dtype=torch.bfloat16, page_size=PAGE, kv_dtype=cut.kept)
    with cut.served():
        case.attend(TritonAttention(torch.device("cpu")), case.params())


@click.command()
@click.option("--only", multiple=True, help="Cases whose name or cut holds this word; repeatable.")
@click.option("--compile", "compiling", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], compiling: bool) -> None:
    """Check and time every cut."""
    made = compile_only() if compiling else []
    click.echo(f"triton {triton.__version__}" + ("" if compiling else f", {torch.cuda.get_device_name()}"))
    for name, cuts in CUTS.items():
        for at, cut in cuts.items():
            if only and not any(word in f"{name}: {at}" for word in only):
                continue
            if compiling:
                compiled(cut, TIMED[name])
                click.echo(f"{name}: {at:30} {described(made[-1])}")
                continue
            try:
                check(cut, TIMED[name])
            except (AssertionError, triton.CompilationError, triton.runtime.errors.OutOfResources) as error:
                click.echo(f"{name}: {at:30} {type(error).__name__} {str(error).splitlines()[0][:90]}")
                continue
            microseconds, share = percent(cut, TIMED[name])
            click.echo(f"{name}: {at:30} {microseconds:8.1f} us {share:6.1f} %")


if __name__ == "__main__":
    main()
