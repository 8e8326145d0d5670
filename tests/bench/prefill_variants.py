"""Kernels and tiles for prefill, checked and timed: python -m tests.bench.prefill_variants [--only NAME ...] [--compile].

Each is checked on a small ragged case against float64, FP8 arithmetic against its definition, then timed on 1 x 8k and 4 x 2k
tokens in CUDA graphs: bfloat16, 64 query heads on 8, D 128, pages of 64, causal. `--compile` needs no GPU: it compiles for
compute capability 9.0 and prints registers, spills and shared memory. What came of it, and of forms that are gone, stands in
docs/decisions/0053.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import torch
import triton
from attrs import evolve, frozen
from torch import Tensor

from paddock.bench.kernels.attention_cases import Step, laid_out
from paddock.bench.kernels.case import Draw
from paddock.bench.kernels.timing import graph_seconds
from paddock.layers import AttentionInputs, AttentionParams, LayerKV, reference_attention
from paddock.layers.reference import FP8, cache_kv
from paddock.plugins import AttentionNeeds
from paddock.testing.oracle import bound, dense_attention, relative_rms
from paddock.testing.paging import Pages
from paddock_triton.attention_async import UNIT_ROWS, prefill_async
from paddock_triton.attention_prefill import prefill
from paddock_triton.attention_schedule import Units, prefill_units
from paddock_triton.attention_tile import Tile
from tests.bench.hopper_code import compile_only, described

H, K, D, P = 64, 8, 128, 64
GROUP = H // K
LAUNCHES = 10
SMALL = [(0, 1), (0, 300), (37, 200), (511, 130), (0, 64), (1000, 9)]  # (tokens there, new tokens)
LARGE = (
    Step(name="1 x 8k", heads=(H, K, D), prompts=(8192,)),
    Step(name="4 x 2k", heads=(H, K, D), prompts=(2048,) * 4),
)

Launch = Callable[[Tensor, Tensor, LayerKV, AttentionInputs, Units], Any]

TILES = {"64 x 64, 4 warps": Tile(block_m=64, block_n=64, warps=4, stages=3, tma=True)}
OVER_FP8 = {
    "fp8, 256 x 64, 8 warps": Tile(block_m=256, block_n=64, warps=8, stages=3, tma=True),
    "fp8, 128 x 64, 8 warps": Tile(block_m=128, block_n=64, warps=8, stages=3, tma=True),
    "fp8, 64 x 64, 4 warps": Tile(block_m=64, block_n=64, warps=4, stages=3, tma=True),
    "fp8, 256 x 32, 8 warps": Tile(block_m=256, block_n=32, warps=8, stages=3, tma=True),
}

IN_FP8 = {
    "fp8 arithmetic, 128 x 64, 8 warps": Tile(block_m=128, block_n=64, warps=8, stages=3, tma=True),
    "fp8 arithmetic, 256 x 64, 8 warps": Tile(block_m=256, block_n=64, warps=8, stages=3, tma=True),
    "fp8 arithmetic, 64 x 64, 4 warps": Tile(block_m=64, block_n=64, warps=4, stages=3, tma=True),
}


def tile_launch(tile: Tile, *, in_fp8: bool = False) -> Launch:
    """Return what launches the kernel in Triton's own language with a tile."""

    def launch(out_THD: Tensor, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, units: Units) -> Any:
        one = torch.ones((), device=q_THD.device) if kv.k_pages_NPKD.dtype == FP8 else None
        params = AttentionParams(scale=D**-0.5, k_scale=one, v_scale=one, in_fp8=in_fp8)
        return prefill(out_THD, q_THD, kv, inputs, units, params, tile)

    return launch


@frozen(eq=False, kw_only=True)
class Candidate:
    """What is checked and timed: a launch, its rows of a tile, and what the pages hold."""

    launch: Launch
    rows: int
    kept: torch.dtype = torch.bfloat16
    in_fp8: bool = False

    def error(self) -> float:
        """Return the relative RMS error on the small case: scattered pages whose unused rows are NaN."""
        q_THD, pages, inputs = small_case(torch.device("cuda"), self.kept)
        (kv,) = pages.layers
        out_THD = torch.full_like(q_THD, torch.nan)
        self.launch(out_THD, q_THD, kv, inputs, self._units(q_THD, inputs))
        if self.in_fp8:
            return relative_rms(out_THD, defined_in_fp8(q_THD, kv, inputs))
        expected = []
        for name, q_LHD in enumerate(torch.split(q_THD, [new for _, new in SMALL])):
            k_LKD, v_LKD = (pages.rows(str(name), x_NPKD).to(q_THD.dtype) for x_NPKD in (kv.k_pages_NPKD, kv.v_pages_NPKD))
            expected.append(dense_attention(q_LHD, k_LKD, v_LKD, scale=D**-0.5))
        return relative_rms(out_THD, torch.cat(expected))

    def teraflops(self, step: Step) -> float:
        """Return TFLOP/s of a launch in a captured graph of several."""
        draw = Draw(device=torch.device("cuda"), dtype=torch.bfloat16)
        laid = laid_out(step, page_size=P, kv_dtype=self.kept, draw=draw)
        q_THD, kv = laid.case.make(0)
        given = (torch.empty_like(q_THD), q_THD, kv, laid.inputs, self._units(q_THD, laid.inputs))
        return step.flops() / graph_seconds(self.launch, [given] * LAUNCHES) / 1e12

    def compiled(self) -> None:
        """Launch once on tensors of a CPU, where launches only compile."""
        q_THD, pages, inputs = small_case(torch.device("cpu"), self.kept)
        self.launch(q_THD, q_THD, pages.layers[0], inputs, self._units(q_THD, inputs))

    def _units(self, q_THD: Tensor, inputs: AttentionInputs) -> Units:
        return prefill_units(inputs, num_tokens=len(q_THD), group=GROUP, tile=self.rows)


def defined_in_fp8(q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs) -> Tensor:
    """Return what plain torch makes of it in FP8 arithmetic and float32."""
    one = torch.ones((), device=q_THD.device)
    backend = reference_attention.create(AttentionNeeds(num_heads=H, num_kv_heads=K, head_dim=D), q_THD.device)
    params = AttentionParams(scale=D**-0.5, k_scale=one, v_scale=one, in_fp8=True)
    return backend.attend(q_THD.float(), kv, evolve(inputs, prepared=backend.prepare(inputs)), params)


def async_launch(out_THD: Tensor, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, units: Units) -> Any:
    """Launch the plugin's kernel of asynchronous products."""
    one = torch.ones((), device=q_THD.device) if kv.k_pages_NPKD.dtype == FP8 else None
    return prefill_async(out_THD, q_THD, kv, inputs, units, AttentionParams(scale=D**-0.5, k_scale=one, v_scale=one))


CANDIDATES = {
    "asynchronous": Candidate(launch=async_launch, rows=UNIT_ROWS),
    "fp8, asynchronous": Candidate(launch=async_launch, rows=UNIT_ROWS, kept=FP8),
    **{name: Candidate(launch=tile_launch(tile), rows=tile.block_m) for name, tile in TILES.items()},
    **{name: Candidate(launch=tile_launch(tile), rows=tile.block_m, kept=FP8) for name, tile in OVER_FP8.items()},
    **{
        name: Candidate(launch=tile_launch(tile, in_fp8=True), rows=tile.block_m, kept=FP8, in_fp8=True)
        for name, tile in IN_FP8.items()
    },
}


def small_case(device: torch.device, kept: torch.dtype) -> tuple[Tensor, Pages, AttentionInputs]:
    """Return random q, the pages with random keys and values written, and the inputs of the ragged step."""
    pages = Pages(num_layers=1, num_kv_heads=K, head_dim=D, page_size=P, dtype=kept, device=device)
    draw, one = Draw(device=device, dtype=torch.bfloat16), torch.ones((), device=device) if kept == FP8 else None
    there = [(name, length) for name, (length, _) in enumerate(SMALL) if length]
    before = pages.inputs([(str(name), length) for name, length in there])
    inputs = pages.inputs([(str(name), new) for name, (_, new) in enumerate(SMALL)])
    for seed, step in enumerate((before, inputs)):
        k_TKD, v_TKD = draw.normal(seed, 2, len(step.positions_T), K, D)
        cache_kv(k_TKD, v_TKD, pages.layers[0], step.slots_T, one, one)
    return draw.normal(2, len(inputs.positions_T), H, D), pages, evolve(inputs, num_decodes=0)


def measure(name: str) -> None:
    """Print a candidate's error and, where that is small enough, its speed."""
    candidate = CANDIDATES[name]
    error = candidate.error()
    if error > bound("attention_fp8" if candidate.in_fp8 else "attention", torch.bfloat16):
        click.echo(f"{name:28} error {error:.2e}: wrong")
        return
    speeds = (f"{step.name} {candidate.teraflops(step):6.1f}" for step in LARGE)
    click.echo(f"{name:28} error {error:.2e}   {'   '.join(speeds)} TFLOP/s")


def compile_all(names: tuple[str, ...]) -> None:
    """Compile for compute capability 9.0 and print what the assembler says of each."""
    made = compile_only()
    for name in names:
        CANDIDATES[name].compiled()
        click.echo(f"{name:28} {described(made[-1])}")


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(CANDIDATES)), help="These alone; repeatable.")
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], compiled: bool) -> None:
    """Check and time every candidate."""
    names = only or tuple(CANDIDATES)
    if compiled:
        compile_all(names)
        return
    click.echo(f"{torch.cuda.get_device_name()}, triton {triton.__version__}")
    for name in names:
        measure(name)


if __name__ == "__main__":
    main()
