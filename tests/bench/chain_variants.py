"""A decode's products in one launch, beside the ops it is made of: python -m tests.bench.chain_variants [--tokens N].

Checked against the ops and timed in CUDA graphs over several layers' weights, for Llama-3.1-8B's and 70B's widths: from o to
down, and to the next layer's q, k and v. Percent are of 4.3 TB/s for the bytes of the weights. `--compile` needs no GPU: it
compiles for compute capability 9.0 and prints registers, spills and shared memory. A mistake in such a kernel hangs: give it a
limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import torch
import triton
from attrs import evolve, frozen
from torch import Tensor

from paddock.bench.kernels.timing import graph_seconds
from paddock.layers.reference import FP8
from paddock.testing.oracle import relative_rms
from paddock_triton.ops_linear_fp8 import linear_fp8
from paddock_triton.ops_linear_fp8_gated import linear_silu_mul_fp8
from paddock_triton.ops_norm import rms_norm_fp8
from tests.bench.chain_candidate import MOST_TOKENS, Chain, Linear, Norm, chain_of, launch_chain
from tests.bench.hopper_code import compile_only, described

Change = Callable[[Chain], Chain]
WIDTHS = {"8B": (4096, 14336, 6144), "70B": (8192, 28672, 10240)}  # embed, feed-forward, q k and v
BANDWIDTH = 4.3e12  # bytes a second
LAYERS_BYTES = 2e9  # of weights that a graph goes through, so that none is found in the L2 cache
AGREE = 0.02  # relative RMS: FP8 values and bfloat16 ones that another order of sums tips


@frozen(eq=False, kw_only=True)
class Layer:
    """Weights from o to the next q, k and v."""

    o: Linear
    norm: Norm
    gate_up: Linear
    down: Linear
    next_norm: Norm
    qkv: Linear

    @classmethod
    def made(cls, name: str, device: torch.device, *, drawn: bool = True) -> Layer:
        """Return weights of a model's widths, with scales that keep every value well inside FP8; not `drawn`, anybody's."""
        embed, feed, outputs = WIDTHS[name]

        def linear(rows: int, columns: int, x_scale: float) -> Linear:
            weight_OI = torch.empty(rows, columns, dtype=FP8, device=device)
            if drawn:
                weight_OI.copy_(torch.randn(rows, columns, dtype=torch.bfloat16, device=device))
            scale_O1 = torch.full((rows, 1), columns**-0.5, device=device)
            return Linear(weight_OI=weight_OI, scale_O1=scale_O1, x_scale=torch.tensor(x_scale, device=device))

        norm, next_norm = (Norm(weight_E=torch.ones(embed, dtype=torch.bfloat16, device=device), eps=1e-5) for _ in range(2))
        return cls(
            o=linear(embed, embed, 0.5),
            norm=norm,
            gate_up=linear(2 * feed, embed, 0.01),
            down=linear(embed, feed, 0.02),
            next_norm=next_norm,
            qkv=linear(outputs, embed, 0.01),
        )

    def nbytes(self, *, following: bool) -> int:
        """Return the bytes of the weights that are read."""
        linears = (self.o, self.gate_up, self.down, *((self.qkv,) if following else ()))
        return sum(each.weight_OI.nbytes for each in linears)

    def chained(self, x_TI: Tensor, residual_TE: Tensor, *, following: bool, change: Change) -> tuple[Tensor, ...]:
        """Return what one launch gives."""
        qkv = self.qkv if following else None
        chain = change(chain_of(len(x_TI), self.o, self.gate_up, self.down, qkv, residual_TE.dtype))
        after = (self.next_norm, self.qkv) if following else None
        return launch_chain(x_TI, residual_TE, self.o, self.norm, self.gate_up, self.down, after, chain)

    def by_ops(self, x_TI: Tensor, residual_TE: Tensor, *, following: bool) -> tuple[Tensor, ...]:
        """Return what the served ops give, one after the other."""
        delta_TE = _product(x_TI, self.o, residual_TE)
        up, down = self.gate_up, self.down
        total_TE, h = rms_norm_fp8(residual_TE, delta_TE, self.norm.weight_E, self.norm.eps, up.x_scale, None)
        a = linear_silu_mul_fp8(h.values_TI, up.x_scale, up.weight_OI, up.scale_O1, residual_TE.dtype, down.x_scale)
        down_TE = _product(a.values_TI, down, residual_TE)
        if not following:
            return total_TE, down_TE
        next_norm, scale = self.next_norm, self.qkv.x_scale
        next_TE, h = rms_norm_fp8(total_TE, down_TE, next_norm.weight_E, next_norm.eps, scale, None)
        return total_TE, next_TE, _product(h.values_TI, self.qkv, residual_TE)


def _product(x_TI: Tensor, of: Linear, like_TE: Tensor) -> Tensor:
    return linear_fp8(x_TI, of.x_scale, of.weight_OI, of.scale_O1, like_TE.dtype)


def cut(chain: Chain, **changes: Any) -> Chain:
    """Return the chain with every product's tile so changed."""
    tiles = {name: evolve(getattr(chain, name), **changes) for name in ("o", "gate_up", "down")}
    return evolve(chain, **tiles, qkv=None if chain.qkv is None else evolve(chain.qkv, **changes))


CUTS: dict[str, Change] = {
    "as products are cut": lambda chain: chain,
    "all tiles shared": partial(cut, shared=True),
    "all tiles whole": partial(cut, shared=False),
    "all tiles shared, counts read": lambda chain: evolve(cut(chain, shared=True), reads=True),
}


def _inputs(name: str, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    embed = WIDTHS[name][0]
    x_TE, residual_TE = torch.randn(2, tokens, embed, device=device)
    return x_TE.to(FP8), residual_TE.to(torch.bfloat16)


def variants(tokens: int, only: tuple[str, ...] = ()) -> Iterator[tuple[str, bool, str]]:
    """Yield a model, whether the next q, k and v follow, and a cut."""
    assert 0 < tokens <= MOST_TOKENS, tokens
    for name in only or WIDTHS:
        for following in (False, True):
            for each in CUTS:
                yield name, following, each


def _timed(name: str, tokens: int) -> None:
    device = torch.device("cuda")
    first = Layer.made(name, device)
    layers = [first, *(Layer.made(name, device) for _ in range(int(LAYERS_BYTES / first.nbytes(following=True))))]
    inputs = _inputs(name, tokens, device)
    for following in (False, True):
        what = f"{name} {tokens} tokens, to {'the next q, k and v' if following else 'down'}"
        ops = graph_seconds(lambda layer, after=following: layer.by_ops(*inputs, following=after), [(each,) for each in layers])
        _say(f"{what}: ops", ops, first.nbytes(following=following))
        expected = first.by_ops(*inputs, following=following)
        for cut, change in CUTS.items():
            call = partial(Layer.chained, following=following, change=change)
            apart = max(relative_rms(*pair) for pair in zip(call(first, *inputs), expected, strict=True))
            if not apart < AGREE:
                click.echo(f"{what}: {cut}: wrong, {apart:.3g} apart")
                continue
            seconds = graph_seconds(lambda layer, call=call: call(layer, *inputs), [(each,) for each in layers])
            _say(f"{what}: {cut}, {apart:.1g} apart", seconds, first.nbytes(following=following))


def _say(what: str, seconds: float, nbytes: int) -> None:
    click.echo(f"{what:80} {seconds * 1e6:8.2f} us {nbytes / seconds / BANDWIDTH * 100:6.1f} %")


@click.command()
@click.option("--tokens", "counts", type=click.IntRange(1, MOST_TOKENS), multiple=True, default=(1, 16), show_default=True)
@click.option("--only", type=click.Choice(tuple(WIDTHS)), multiple=True, help="Widths of these models alone.")
@click.option("--compile", "compiling", is_flag=True, help="Compile without a GPU and print what came of it.")
def main(counts: tuple[int, ...], only: tuple[str, ...], compiling: bool) -> None:
    """Check and time every cut."""
    made = compile_only() if compiling else []
    for tokens in counts:
        if not compiling:
            with torch.inference_mode():
                for name in only or WIDTHS:
                    _timed(name, tokens)
            continue
        for name, following, cut in variants(tokens, only):
            layer = Layer.made(name, torch.device("cpu"), drawn=False)
            layer.chained(*_inputs(name, tokens, torch.device("cpu")), following=following, change=CUTS[cut])
            click.echo(f"{name} {tokens} tokens, {cut}, {'to the next' if following else 'to down':12} {described(made[-1])}")
    click.echo(f"triton {triton.__version__}")


if __name__ == "__main__":
    main()
