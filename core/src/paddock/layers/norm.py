"""Norms of the residual stream, each also the place where what the previous block made is added to it.

T tokens, E model size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paddock import axes
from paddock.checkpoint.targets import Target
from paddock.layers.formats import InputFormat
from paddock.layers.ops import Ops
from paddock.layers.quantized import Activation


class _Scaled(nn.Module):
    """A norm's parameters: a weight [E] and, where declared, a bias [E], whole on every rank."""

    def __init__(
        self,
        declared: axes.Vector,
        dtype: torch.dtype,
        device: torch.device,
        *,
        eps: float,
        ops: Ops | None = None,
        emits: InputFormat | None = None,
        source: str = "",
    ) -> None:
        """Allocate the parameters; the output comes in the format `emits` says, plain when it says nothing."""
        super().__init__()
        self.declared, self.source, self.eps, self.ops = declared, source, eps, ops or Ops()
        self.emits = emits or InputFormat(self.ops)
        size = declared.width.size
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        bias = torch.empty(size, dtype=dtype, device=device) if declared.bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def targets(self) -> Iterator[Target]:
        """Yield where the checkpoint's vectors go."""
        size = self.declared.width.size
        for name, parameter in self.named_parameters():
            yield Target(name=f"{self.source}{self.declared.source}.{name}", view=parameter, shape=(size,), region=((0, size),))

    def finalise(self) -> None:
        """Leave the vectors as loaded."""

    def randomise(self, generator: torch.Generator) -> None:
        """Fill the parameters with random values of a trained model's magnitude."""
        self.weight.normal_(1.0, 0.1, generator=generator)
        if self.bias is not None:
            self.bias.normal_(std=0.02, generator=generator)


class RMSNorm(_Scaled):
    """Root-mean-square norm: x, h = norm(x, delta)."""

    def forward(self, x_TE: Tensor, delta_TE: Tensor | None = None) -> tuple[Tensor, Activation]:
        """Return (x + delta, its norm in the format the next linear takes)."""
        if self.emits.is_fp8(x_TE):
            return self.ops.rms_norm_fp8(x_TE, delta_TE, self.weight, self.eps, *self.emits.scaling)
        if delta_TE is None:
            return x_TE, self.emits(self.ops.rms_norm(x_TE, self.weight, self.eps))
        sum_TE, h_TE = self.ops.add_rms_norm(x_TE, delta_TE, self.weight, self.eps)
        return sum_TE, self.emits(h_TE)


class LayerNorm(_Scaled):
    """Layer norm, with or without bias: x, h = norm(x, delta)."""

    def forward(self, x_TE: Tensor, delta_TE: Tensor | None = None, more_TE: Tensor | None = None) -> tuple[Tensor, Activation]:
        """Return (x + delta, its norm in the format the next linear takes).

        `more_TE`, of a block with two branches, is added to the delta first.
        """
        assert more_TE is None or delta_TE is not None, "a second delta without a first"
        vectors = self.weight, self.bias, self.eps
        if self.emits.is_fp8(x_TE):
            return self.ops.layer_norm_fp8(x_TE, delta_TE, *vectors, *self.emits.scaling, more_TE=more_TE)
        if delta_TE is None:
            return x_TE, self.emits(self.ops.layer_norm(x_TE, *vectors))
        sum_TE, h_TE = self.ops.add_layer_norm(x_TE, delta_TE, *vectors, more_TE=more_TE)
        return sum_TE, self.emits(h_TE)
