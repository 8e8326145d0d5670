"""Linear layers: one module for every format; the method says how the weight is stored and multiplied.

T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor, nn

from paddock import axes


@frozen(eq=False)
class QuantizedActivation:
    """An activation in FP8 e4m3 with its scale: real = values * scale; scale is [] (static) or [T, 1] (per token)."""

    values_TI: Tensor
    scale: Tensor


Activation = Tensor | QuantizedActivation


class LinearMethod(Protocol):
    """How one linear is stored and multiplied. Made for one linear by `QuantizationSpec.method`.

    `input_format` is the activation it takes (`axes.PLAIN`, `FP8_STATIC`, `FP8_TOKEN`); a static scale is read from
    `input_scale(layer)` after `finalise`.
    """

    input_format: str

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the uninitialised parameters of `linear` by tensor name, parts fused along `out`."""

    def finalise(self, layer: LinearLayer) -> None:
        """Bring the loaded parameters into the layout `apply` wants; called once, after loading."""

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T [T, O] in the model's dtype, bias excluded."""

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32, the definition of what `apply` multiplies with."""

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the parameters with random values of a trained model's magnitude."""


class LinearLayer(nn.Module):
    """y = x W^T + b for this rank's share of a declared linear; `reduce` sums partial results over ranks where `in` is cut."""

    def __init__(
        self,
        linear: axes.Linear,
        method: LinearMethod,
        dtype: torch.dtype,
        device: torch.device,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Allocate the parameters on `device`; they hold nothing until loaded or randomised."""
        super().__init__()
        self.linear, self.method, self.reduce = linear, method, reduce
        for name, tensor in method.create(linear, device).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        bias = torch.empty(linear.out_size, dtype=dtype, device=device) if linear.bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x_TI: Activation) -> Tensor:
        """Return y [T, O]."""
        y_TO = self.method.apply(self, x_TI)
        if self.reduce is not None:
            y_TO = self.reduce(y_TO)
        return y_TO if self.bias is None else y_TO + self.bias
