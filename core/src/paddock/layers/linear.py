"""Linear layers: one module for every format; the method says how the weight is stored and multiplied.

T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from attrs import evolve
from torch import Tensor, nn

from paddock import axes
from paddock.checkpoint.targets import Target
from paddock.layers import packing, parameters
from paddock.layers.ops import Ops
from paddock.layers.quantized import Activation, QuantizedActivation


class LinearMethod(Protocol):
    """How one linear is stored and multiplied. Made for one linear by `QuantizationSpec.method`."""

    @property
    def tensors(self) -> tuple[axes.Tensor, ...]:
        """Return what the scheme declares for this linear."""

    @property
    def input_format(self) -> str:
        """Return the activation it takes best: `axes.PLAIN`, `FP8_STATIC`, `FP8_TOKEN` or, of `TakesGroups`, `FP8_GROUP`."""

    @property
    def input_bound(self) -> float | None:
        """Return the magnitude above which an `FP8_TOKEN` input is clipped, None for no bound."""

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the uninitialised parameters of `linear` by tensor name, parts fused along `out`: `parameters.allocate`."""

    def finalise(self, layer: LinearLayer) -> None:
        """Bring the loaded parameters into the layout `apply` wants; called once, after loading."""

    def input_scale(self, layer: LinearLayer) -> Tensor | None:
        """Return the static scale [] of an `FP8_STATIC` input, after `finalise`; None for the other formats."""

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T [T, O] in the model's dtype, bias excluded. A plain x is always taken, and quantised here if need be.

        A CUDA graph holds it: nothing is copied from or to the host, and no value decides what is launched.
        """

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32, the definition of what `apply` multiplies with."""

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the parameters with random values of a trained model's magnitude."""


@runtime_checkable
class QuantisesRows(Protocol):
    """A `LinearMethod` whose `weight` and `weight_scale` [O, 1] are made of a plain weight while that is read.

    What `QuantizationSpec.online` offers uses it; no more than a piece of the plain weight is ever held.
    """

    def quantise_rows(self, rows_RI: Tensor) -> tuple[Tensor, Tensor]:
        """Return values [R, I] of `weight`'s dtype and scales [R, 1] of whole rows, each made of its row alone."""


@runtime_checkable
class TakesFewPlain(Protocol):
    """A `LinearMethod` that takes its input format best in large steps alone, and plain inputs in small ones."""

    @property
    def input_format_from(self) -> int:
        """Return the tokens from which the input format holds; fewer are best left plain."""


@runtime_checkable
class TakesGroups(Protocol):
    """A `LinearMethod` that takes inputs with a scale a token and group: `FP8_GROUP`."""

    @property
    def input_group(self) -> int:
        """Return the inputs that share a token's scale, counted from the first of this rank's."""


@runtime_checkable
class FusesSiluMul(Protocol):
    """A `LinearMethod` whose product can end in silu(gate) * up in FP8, its outputs being gates and then as many ups."""

    def apply_silu_mul(self, layer: LinearLayer, xq: QuantizedActivation, scale: Tensor) -> QuantizedActivation:
        """Return what `silu_mul_fp8` makes, by the static `scale` [], of what `apply` returns for FP8 inputs."""


class LinearLayer(nn.Module):
    """y = x W^T + b for a rank's share of a declared linear.

    `linear` is the share, `whole` the declaration, `source` the checkpoint prefix of its scope. `reduce` sums partial results
    over ranks where the input axis is cut; `gather` joins the ranks' columns where every rank needs them all (the head). A method
    that multiplies plainly does so through `ops`. `aliases` are other checkpoint names of the one tensor of a plain linear.
    `fuses_silu_mul` is the method where it can go on to an activation: nothing else follows the product, and it offers that.
    """

    def __init__(
        self,
        whole: axes.Linear,
        method: LinearMethod,
        dtype: torch.dtype,
        device: torch.device,
        *,
        shard: axes.Shard = axes.WHOLE,
        source: str = "",
        reduce: Callable[[Tensor], Tensor] | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        ops: Ops | None = None,
        aliases: tuple[str, ...] = (),
    ) -> None:
        """Allocate the parameters on `device`; they hold nothing until loaded or randomised."""
        super().__init__()
        self.ops = ops or Ops()
        self.whole, self.linear, self.shard, self.source = whole, shard.linear(whole), shard, source
        self.method, self.dtype, self.reduce, self.gather, self.aliases = method, dtype, reduce, gather, aliases
        for name, tensor in method.create(self.linear, device).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        bias = torch.empty(self.linear.out_size, dtype=dtype, device=device) if whole.bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        last = bias is None and reduce is None and gather is None
        self.fuses_silu_mul: FusesSiluMul | None = method if last and isinstance(method, FusesSiluMul) else None

    def forward(self, x_TI: Activation) -> Tensor:
        """Return y [T, O]."""
        y_TO = self.method.apply(self, x_TI)
        if self.reduce is not None:
            y_TO = self.reduce(y_TO)
        if self.bias is not None:
            y_TO = y_TO + self.bias
        return y_TO if self.gather is None else self.gather(y_TO)

    def split(self, y_TO: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of an output, as views: `q, k, v = qkv.split(qkv(x))`."""
        return torch.split_with_sizes(y_TO, [part.size for part in self.linear.out], dim=-1)

    def targets(self) -> Iterator[Target]:
        """Yield where the checkpoint's tensors for this layer go."""
        named = dict(self.named_parameters())
        if isinstance(self.method, QuantisesRows):
            convert = self.method.quantise_rows
            yield from parameters.quantised_targets(self.whole, self.shard, self.source, self.dtype, named, convert)
            return
        for target in parameters.linear_targets(self.whole, self.shard, self.source, self.method.tensors, named):
            yield evolve(target, aliases=self.aliases)

    def finalise(self) -> None:
        """Bring the loaded parameters into the layout the method multiplies with."""
        self.method.finalise(self)

    def randomise(self, generator: torch.Generator) -> None:
        """Fill the parameters with random values of a trained model's magnitude."""
        self.method.randomise(self, generator)
        if self.bias is not None:
            self.bias.normal_(std=0.02, generator=generator)


class TiedLinear(nn.Module):
    """A head that multiplies with the embedding's table: nothing to load; on a CPU it keeps a copy in its kernels' layout."""

    def __init__(self, table_VE: nn.Parameter, ops: Ops, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        """Share `table_VE`."""
        super().__init__()
        self.weight, self.gather, self.ops = table_VE, gather, ops
        self._packed: Tensor | None = None

    def forward(self, x_TE: Tensor) -> Tensor:
        """Return y [T, V]."""
        y_TV = self.ops.linear(x_TE, self.weight) if self._packed is None else packing.multiply(x_TE, self._packed)
        return y_TV if self.gather is None else self.gather(y_TV)

    def targets(self) -> Iterator[Target]:
        """Yield nothing: the embedding loads the table."""
        yield from ()

    def finalise(self) -> None:
        """Lay the table out for the CPU's kernels where that helps."""
        self._packed = packing.pack(self.weight)

    def randomise(self, generator: torch.Generator) -> None:
        """Leave the table to the embedding."""
