"""Rows in FP8 with a scale a token, by one program a row and by several: python -m tests.bench.shared_rows [--compile].

SiLU of gate and up, GELU and the quantisation alone, at 1, 2, 8, 64 and 4,096 tokens, by one program a row, where one holds it,
and in parts: microseconds in a captured graph of ten, each behind the one before as in a step. Both are held bit for bit to the
activation by itself, quantised by one program a row. `--compile` needs no GPU: it compiles for compute capability 9.0 and prints
registers and spills.
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
from paddock_triton import ops_activation, ops_activation_fp8, ops_quantize
from paddock_triton.fp8 import empty_fp8
from paddock_triton.launch import compile_ahead
from paddock_triton.parts import MOST_ALONE, PART, Kind, in_parts, launch_parts
from tests.bench.hopper_code import compile_only, described

TOKENS = (1, 2, 8, 64, 4096)
LAUNCHES = 10
ONE, PARTS = "one", f"parts of {PART}"
WIDTHS: dict[Kind, tuple[int, ...]] = {"silu_mul": (14336, 28672, 53248), "gelu": (18176, 59392), "plain": (14848, 28672, 59392)}
ACTIVATIONS: dict[Kind, Callable[[Tensor], Tensor]] = {"silu_mul": ops_activation.silu_mul, "gelu": ops_activation.gelu}
Launch = Callable[[QuantizedActivation, Tensor, float | None], None]


@frozen
class Rows:
    """Rows of `width` features of one kind of value, and the ways to launch them."""

    kind: Kind
    width: int

    def __str__(self) -> str:
        """Return what is done, and to how many features."""
        return f"{'quantize' if self.kind == 'plain' else self.kind} {self.width}"

    def given(self, tokens: int, device: torch.device) -> Tensor:
        """Return random inputs in bfloat16."""
        reads = 2 if self.kind == "silu_mul" else 1
        return torch.randn(tokens, reads * self.width, device=device).to(torch.bfloat16)

    def ways(self) -> dict[str, Launch]:
        """Return what can launch them, by name."""
        ways: dict[str, Launch] = {PARTS: partial(launch_parts, kind=self.kind)}
        if self.kind == "plain":
            ways[ONE] = ops_quantize.launch_rows
        elif self.width <= MOST_ALONE:
            ways[ONE] = partial(ops_activation_fp8.launch_rows, kind=self.kind)
        return ways

    def expected(self, x_TX: Tensor) -> QuantizedActivation:
        """Return the activation's values, if there is one, quantised by one program a row."""
        values_TI = x_TX if self.kind == "plain" else ACTIVATIONS[self.kind](x_TX)
        return self.call(ops_quantize.launch_rows, values_TI)

    def call(self, launch: Launch, x_TX: Tensor) -> QuantizedActivation:
        """Return what a way gives."""
        out = empty_fp8(x_TX, self.width, None)
        launch(out, x_TX, None)
        return out


ROWS = tuple(Rows(kind, width) for kind, widths in WIDTHS.items() for width in widths)


def measure(rows: Rows, tokens: int, device: torch.device) -> None:
    """Print the microseconds of each way, the one that runs marked; raise AssertionError where bits are not the expected ones."""
    x_TX = rows.given(tokens, device)
    sets = [(x_TX,)] * LAUNCHES
    expected = rows.expected(x_TX)
    runs, said = PARTS if in_parts(tokens, rows.width, rows.kind) else ONE, []
    for name, launch in rows.ways().items():
        found = rows.call(launch, x_TX)
        assert torch.equal(found.scale, expected.scale), (rows, tokens, name)
        assert torch.equal(found.values_TI.view(torch.uint8), expected.values_TI.view(torch.uint8)), (rows, tokens, name)
        microseconds = 1e6 * graph_seconds(partial(rows.call, launch), sets, FEW)
        said.append(f"{name}{'*' if name == runs else ''} {microseconds:.2f}")
    click.echo(f"{rows!s:16} {tokens:5}: {', '.join(said)}")


def print_compiled() -> None:
    """Print what the assembler says of each kernel."""
    made = compile_only()
    for rows in ROWS:
        x_TX = rows.given(2, torch.device("cpu"))
        for name, launch in rows.ways().items():
            made.clear()
            rows.call(launch, x_TX)
            for kernel in made:
                click.echo(f"{rows!s:16} {name:14} {kernel.metadata.name:16} {described(kernel)}")


@click.command()
@click.option("--compile", "compiled", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(compiled: bool) -> None:
    """Hold all ways to what is expected and time them."""
    if compiled:
        print_compiled()
        return
    began, device = time.perf_counter(), torch.device("cuda")
    click.echo(f"{torch.cuda.get_device_name()}, triton {triton.__version__}; * is what runs; microseconds")
    with compile_ahead(device):
        for rows in ROWS:
            rows.expected(rows.given(1, device))
            for launch in rows.ways().values():
                rows.call(launch, rows.given(1, device))
    for rows in ROWS:
        for tokens in TOKENS:
            measure(rows, tokens, device)
    click.echo(f"in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
