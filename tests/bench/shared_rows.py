"""Rows in FP8 with a scale a token, by one program a row and by several: python -m tests.bench.shared_rows [--compile].

SiLU of gate and up, GELU and the quantisation alone, at 1, 2, 8, 64 and 4,096 tokens, by one program a row, by parts that meet
and by parts in two launches: microseconds in a captured graph of ten, each behind the one before as in a step. All ways are held
to each other bit for bit first. `--compile` needs no GPU: it compiles for compute capability 9.0 and prints registers and spills.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import click
import torch
import triton
from attrs import frozen
from torch import Tensor

from paddock.bench.kernels.timing import FEW, graph_seconds
from paddock.layers import QuantizedActivation
from paddock_triton import meeting, ops_activation_fp8, ops_quantize
from paddock_triton.attention_tuning import processors
from paddock_triton.fp8 import empty_fp8
from paddock_triton.launch import compile_ahead
from tests.bench.hopper_code import compile_only, described

TOKENS = (1, 2, 8, 64, 4096)
LAUNCHES = 10
PROCESSORS = 132  # of an H200, where there is no GPU to ask
Launch = Callable[..., None]


@frozen(kw_only=True)
class Op:
    """An op with a scale a token: features it writes and reads for each, the least that programs share, and ways to launch it."""

    name: str
    width: int
    reads: int
    least: int
    alone: Launch
    shared: Launch
    twice: Launch

    def given(self, tokens: int, device: torch.device) -> Tensor:
        """Return random inputs in bfloat16."""
        return torch.randn(tokens, self.reads * self.width, device=device).to(torch.bfloat16)

    def ways(self, tokens: int) -> dict[str, Launch]:
        """Return the launches that can run so many tokens, by name."""
        most = processors(torch.device("cuda")) if torch.cuda.is_available() else PROCESSORS
        parts = [part for part in meeting.PARTS if tokens * -(-self.width // part) <= most]
        meet = {f"parts of {part}": partial(_by_parts, self.shared, part) for part in parts}
        twice = {f"two launches of {part}": partial(_by_parts, self.twice, part) for part in meeting.PARTS}
        return {"one": self.alone} | meet | twice

    def runs(self, tokens: int, device: torch.device) -> str:
        """Return which of the ways the op takes for so many tokens."""
        part = meeting.part_of(tokens, self.width, device, self.least)
        if part is not None:
            return f"parts of {part}"
        return f"two launches of {meeting.TWICE_PART}" if self.width > meeting.MOST_ALONE else "one"


def _by_parts(launch: Launch, part: int, out: QuantizedActivation, x_TX: Tensor, bound: float | None) -> None:
    launch(out, x_TX, bound, part)


def _activation(name: str, width: int, *, gated: bool) -> Op:
    op = ops_activation_fp8
    alone, shared, twice = (partial(way, gated=gated) for way in (op.launch_rows, op.launch_shared, op.launch_twice))
    reads, least = 2 if gated else 1, meeting.LEAST_ACTIVATION
    return Op(name=f"{name} {width}", width=width, reads=reads, least=least, alone=alone, shared=shared, twice=twice)


def _quantisation(width: int) -> Op:
    op, least = ops_quantize, meeting.LEAST_QUANTISATION
    alone, shared, twice = op.launch_rows, op.launch_shared, op.launch_twice
    return Op(name=f"quantize {width}", width=width, reads=1, least=least, alone=alone, shared=shared, twice=twice)


OPS = (
    *(_activation("silu_mul", width, gated=True) for width in (14336, 28672, 53248)),
    *(_activation("gelu", width, gated=False) for width in (18176, 59392)),
    *(_quantisation(width) for width in (14848, 28672, 59392)),
)


def call(launch: Launch, width: int, x_TX: Tensor) -> QuantizedActivation:
    """Return what a way gives."""
    out = empty_fp8(x_TX, width, None)
    launch(out, x_TX, None)
    return out


def measure(op: Op, tokens: int, device: torch.device) -> None:
    """Print the microseconds of each way, the one that runs marked; raise AssertionError where their bits differ."""
    x_TX = op.given(tokens, device)
    sets = [(x_TX,)] * LAUNCHES
    expected = call(op.alone, op.width, x_TX)
    runs, said = op.runs(tokens, device), []
    for name, launch in op.ways(tokens).items():
        found = call(launch, op.width, x_TX)
        assert torch.equal(found.scale, expected.scale), (op.name, tokens, name)
        assert torch.equal(found.values_TI.view(torch.uint8), expected.values_TI.view(torch.uint8)), (op.name, tokens, name)
        microseconds = 1e6 * graph_seconds(partial(call, launch, op.width), sets, FEW)
        said.append(f"{name}{'*' if name == runs else ''} {microseconds:.2f}")
    click.echo(f"{op.name:16} {tokens:5}: {', '.join(said)}")


def print_compiled() -> None:
    """Print what the assembler says of each kernel."""
    made = compile_only()
    for op in OPS:
        x_TX = torch.zeros(2, op.reads * op.width, dtype=torch.bfloat16)
        for name, launch in op.ways(1).items():
            made.clear()
            call(launch, op.width, x_TX)
            for kernel in made:
                click.echo(f"{op.name:16} {name:20} {kernel.metadata.name:16} {described(kernel)}")


@click.command()
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(compiled: bool) -> None:
    """Hold all ways to each other and time them."""
    if compiled:
        print_compiled()
        return
    began, device = time.perf_counter(), torch.device("cuda")
    click.echo(f"{torch.cuda.get_device_name()}, triton {triton.__version__}; * is what runs; microseconds")
    with compile_ahead(device):
        for op in OPS:
            for launch in op.ways(1).values():
                call(launch, op.width, op.given(1, device))
    for op in OPS:
        for tokens in TOKENS:
            measure(op, tokens, device)
    click.echo(f"in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
