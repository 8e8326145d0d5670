"""Tiles and cuts for decode attention, checked and timed: python -m tests.bench.decode_variants [--only WORD ...] [--repeat N].

Each is checked on ragged decodes against float64, then timed in CUDA graphs as `paddock bench kernels` has its cases: percent of
4.3 TB/s. `--repeat` times the whole list that many times over, so that a cut's lines lie apart and show how clocks drift.
`--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers, spills and shared memory. What came of
cuts that are gone stands in `paddock_triton.attention_tuning`.
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

PAIRS = Tile(block_m=16, block_n=64, warps=4, stages=4, pairs=True, masked=True)
WIDE = Tile(block_m=32, block_n=64, warps=2, stages=4, tma=True, pairs=True)


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


LLAMA_70B: dict[str, Cut] = {
    "served": Cut(),
    "3 stages": Cut(tile=evolve(PAIRS, stages=3)),
    "2 warps": Cut(tile=evolve(PAIRS, warps=2)),
    "copy engine, the last tile apart": Cut(tile=evolve(PAIRS, stages=3, tma=True, masked=False)),
    "no pairs": Cut(tile=evolve(PAIRS, pairs=False)),
    "3 programs": Cut(programs=3),
}
CUTS: dict[str, dict[str, Cut]] = {
    "decode 64 x 8k": LLAMA_70B,
    "decode 64 x 2k": LLAMA_70B,
    "decode 64 x 2k, Falcon-180B heads": {
        "bfloat16": Cut(kept=torch.bfloat16),
        "bfloat16, 32 rows": Cut(kept=torch.bfloat16, tile=Tile(block_m=32, block_n=64, warps=4, stages=4, tma=True)),
        "served": Cut(),
        "pointers": Cut(tile=evolve(WIDE, tma=False)),
        "4 warps": Cut(tile=evolve(WIDE, warps=4)),
        "6 programs": Cut(programs=6),
        "32 keys": Cut(tile=evolve(WIDE, block_n=32, stages=6)),
    },
    "decode 1 x 131k": {"served": Cut(), "3 programs": Cut(programs=3), "6 programs": Cut(programs=6)},
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


def chosen(only: tuple[str, ...]) -> list[tuple[str, Cut, Step]]:
    """Return label, cut and step of what holds one of these words, of all where there are none.

    Raises click.BadParameter where nothing holds one.
    """
    labels = [(f"{name}: {at}", cut, TIMED[name]) for name, cuts in CUTS.items() for at, cut in cuts.items()]
    found = [each for each in labels if not only or any(word in each[0] for word in only)]
    if not found:
        raise click.BadParameter(
            f"no cut holds {' or '.join(map(repr, only))}; there are {'; '.join(label for label, _, _ in labels)}",
            param_hint="--only",
        )
    return found


def fault(cut: Cut, step: Step) -> str:
    """Return what keeps a cut from being timed in a line, an empty text where nothing does."""
    try:
        check(cut, step)
    except (AssertionError, triton.CompilationError, triton.runtime.errors.OutOfResources) as error:
        return f"{type(error).__name__} {str(error).splitlines()[0][:90]}"
    return ""


@click.command()
@click.option("--only", multiple=True, help="Cases whose name or cut holds this word; repeatable.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="How often the list is timed.")
@click.option("--compile", "compiling", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], repeat: int, compiling: bool) -> None:
    """Check every cut, then time all that are right, one after the other, as often as asked."""
    cuts = chosen(only)
    if compiling and repeat > 1:
        raise click.UsageError(f"--repeat {repeat} is for what is timed, and --compile times nothing: leave out one of them")
    if compiling:
        made = compile_only()
        click.echo(f"triton {triton.__version__}")
        for label, cut, step in cuts:
            compiled(cut, step)
            click.echo(f"{label:56} {described(made[-1])}")
        return
    click.echo(f"triton {triton.__version__}, {torch.cuda.get_device_name()}")
    right = []
    for label, cut, step in cuts:
        if wrong := fault(cut, step):
            click.echo(f"{label:56} {wrong}")
        else:
            right.append((label, cut, step))
    for label, cut, step in right * repeat:
        microseconds, share = percent(cut, step)
        click.echo(f"{label:56} {microseconds:8.1f} us {share:6.1f} %")


if __name__ == "__main__":
    main()
