"""The candidate for FP8 products of few tokens where it ends in silu(gate) * up: python -m tests.bench.fp8_gated_variants.

As `fp8_variants` does with plain products, for gate and up of Llama-3.1-8B and 70B: every cut is compiled, held to the twin by
the bounds of `paddock bench kernels`, and timed beside what runs now (*) in captured graphs on weights that the L2 does not hold.
A line tells of all cuts for a number of tokens, the quickest first: microseconds, TB/s, the FP8 values that differ. `--compile`
needs no GPU: it prints registers, spills and shared memory.

T tokens, I input features, F feed-forward size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import torch
import triton
from torch import Tensor

from paddock.bench.kernels.case import Case, Draw
from paddock.bench.kernels.op_cases import FULL, OpCases
from paddock.bench.kernels.timing import argument_sets, graph_seconds
from paddock.bench.kernels.verdict import ERROR_OF_SUMS, TIPPED_BY_SUMS
from paddock.layers import QuantizedActivation
from paddock.layers.reference import linear_silu_mul_fp8 as twin
from paddock.testing.oracle import poisoned, relative_rms
from paddock_triton.fp8 import empty_fp8
from paddock_triton.launch import compile_ahead
from paddock_triton.ops_linear_fp8_gated import linear_silu_mul_fp8
from tests.bench.fp8_few_candidate import launch_ring_gated
from tests.bench.fp8_ring_tiles import MIXES, RINGS, RingTile
from tests.bench.fp8_variants import HALF, MODELS, ROUNDS
from tests.bench.hopper_code import compile_only, described

Cuts = dict[str, tuple[RingTile, ...]]


def cuts(tokens: int, only: tuple[str, ...]) -> Cuts:
    """Return the cuts for so many tokens whose names hold one of the words."""
    most = next(most for most in RINGS if tokens <= most)
    found: Cuts = {tile.name: (tile,) for tile in RINGS[most]} | {f"ring {most} mix": MIXES[most]}
    return {name: tiles for name, tiles in found.items() if not only or any(word in name for word in only)}


def _ringed(
    tiles: tuple[RingTile, ...],
    x_TI: Tensor,
    x_scale: Tensor,
    weight_OI: Tensor,
    scale_O1: Tensor,
    dtype: torch.dtype,
    scale: Tensor,
) -> QuantizedActivation:
    out = empty_fp8(x_TI, len(weight_OI) // 2, scale)
    launch_ring_gated(out, x_TI, x_scale, weight_OI, scale_O1, dtype, *tiles)
    return out


def measure(case: Case, only: tuple[str, ...], device: torch.device) -> None:
    """Print a line of what came of the cuts for a case."""
    tokens = int(case.name.split(" ")[1])
    calls: dict[str, Any] = {"*served": linear_silu_mul_fp8}
    calls |= {name: partial(_ringed, tiles) for name, tiles in cuts(tokens, only).items()}
    sets = argument_sets(case, device)
    with compile_ahead(device):
        for call in calls.values():
            call(*sets[0])
    expected_TF, found = twin(*sets[0]).values_TI.float(), list[tuple[float, str]]()
    for name, call in calls.items():
        with poisoned():
            values_TF = call(*sets[0]).values_TI.float()
        tipped, error = (values_TF != expected_TF).float().mean().item(), relative_rms(values_TF, expected_TF)
        if not (tipped <= TIPPED_BY_SUMS and error <= ERROR_OF_SUMS):
            click.echo(f"{name} WRONG, {tipped:.1%} differ, error {error:.1e}")
            continue
        seconds = graph_seconds(call, sets, ROUNDS)
        found.append((seconds, f"{name} {1e6 * seconds:.1f}us {case.nbytes / seconds / 1e12:.2f}TB/s ({tipped:.1%})"))
    click.echo(f"{case.name}: {'; '.join(said for _, said in sorted(found))}")


def print_compiled(only: tuple[str, ...]) -> None:
    """Compile for compute capability 9.0 at one shape and print what came of each."""
    made, fp8, one = compile_only(), torch.float8_e4m3fn, torch.ones(())
    for most in RINGS:
        for name, tiles in cuts(most, only).items():
            x_TI, weight_OI = torch.zeros(most, 8192).to(fp8), torch.zeros(512, 8192).to(fp8)
            _ringed(tiles, x_TI, one, weight_OI, torch.ones(512, 1), HALF, one)
            click.echo(f"{name:48} {described(made[-1])}")


@click.command()
@click.option("--only", multiple=True, help="Cuts whose name holds the word; repeatable.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="Layers of this model alone; repeatable.")
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(only: tuple[str, ...], models: tuple[str, ...], compiled: bool) -> None:
    """Check and time every cut."""
    if compiled:
        print_compiled(only)
        return
    device = torch.device("cuda")
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    with torch.inference_mode():
        for case in OpCases(table=FULL, draw=Draw(device=device, dtype=HALF)).of("linear_silu_mul_fp8"):
            model, count = case.name.split(" ")[:2]
            if model in (models or MODELS) and 1 < int(count) <= max(RINGS):
                measure(case, only, device)


if __name__ == "__main__":
    main()
