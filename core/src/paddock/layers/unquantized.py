"""The plain linear method: one weight [O, I] in the model's dtype.

T tokens, I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paddock import axes
from paddock.layers import packing, parameters
from paddock.layers.linear import LinearLayer
from paddock.layers.quantized import Activation


def method(scheme: axes.Scheme, path: str, linear: axes.Linear) -> PlainMethod:
    """Return the method of a linear that its checkpoint stores plainly."""
    return PlainMethod(scheme.tensors(path, linear))


class PlainMethod:
    """y = x W^T with W as the checkpoint has it."""

    input_format = axes.PLAIN
    input_bound: float | None = None

    def __init__(self, tensors: tuple[axes.Tensor, ...]) -> None:
        """Hold one tensor named `weight` with the axes out, in."""
        assert [tensor.name for tensor in tensors] == ["weight"], tensors
        self.tensors = tensors
        self._packed: Tensor | None = None

    @classmethod
    def of(cls, linear: axes.Linear, dtype: torch.dtype) -> PlainMethod:
        """Return the method of a linear stored in `dtype`."""
        return cls(axes.Unquantized(str(dtype).removeprefix("torch.")).tensors("", linear))

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the uninitialised weight."""
        return parameters.allocate(linear, self.tensors, device)

    def finalise(self, layer: LinearLayer) -> None:
        """Lay the weight out for the CPU's kernels where that helps; it lives in the method from then on."""
        self._packed = packing.pack(layer.get_parameter("weight"))
        if self._packed is not None:
            layer.register_parameter("weight", None)

    def input_scale(self, layer: LinearLayer) -> Tensor | None:
        """Return None: the input is plain."""
        return None

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T [T, O]."""
        assert isinstance(x_TI, Tensor), "a plain linear takes plain activations"
        if self._packed is not None:
            return packing.multiply(x_TI, self._packed)
        return layer.ops.linear(x_TI, layer.get_parameter("weight"))

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32."""
        weight_OI = layer.get_parameter("weight") if self._packed is None else self._packed.to_dense()
        return weight_OI.float()

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the weight so that outputs keep their inputs' magnitude."""
        layer.get_parameter("weight").normal_(std=layer.whole.in_size**-0.5, generator=generator)
