"""FP8 linears in plain torch: the CPU path, and the definition of every FP8 kernel.

y = input scale * weight scale * sum(xq Wq), summed in float32 and rounded once. T tokens, I inputs, O outputs, P fused parts.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor, nn

from paddock import axes
from paddock.layers import (
    Activation,
    LinearLayer,
    LinearMethod,
    PlainMethod,
    QuantizedActivation,
    allocate,
    torch_dtype,
)
from paddock_quant_fp8.blocks import BlockMethod, multiplies
from paddock_quant_fp8.dequantising import DequantisedMethod
from paddock_quant_fp8.online import OnlineFp8
from paddock_quant_fp8.rows import quantise_rows
from paddock_quant_fp8.scales import checked, draw
from paddock_quant_fp8.schemes import BLOCK, Fp8Scheme

_RANDOM_INPUT_SCALE = 0.05


def linear_method(scheme: Fp8Scheme, path: str, linear: axes.Linear) -> LinearMethod:
    """Return how `linear`, whose first part is at checkpoint prefix `path`, is stored and multiplied."""
    stored, dtype = scheme.stored(path, linear), torch_dtype(scheme.dtype)
    if stored is None:
        return PlainMethod(scheme.tensors(path, linear))
    if multiplies(stored):
        return BlockMethod(stored=stored, dtype=dtype)
    if stored.scales == BLOCK or stored.input_format == axes.PLAIN:
        return DequantisedMethod(stored=stored, dtype=dtype)
    method = OnlineMethod if isinstance(scheme, OnlineFp8) else Fp8Method
    return method(
        path=path,
        tensors=stored.tensors,
        dtype=dtype,
        input_format=stored.input_format,
        input_bound=stored.input_bound,
    )


@frozen(kw_only=True)
class Fp8Method:
    """An FP8 weight [O, I] with one scale a row or a part, activations scaled statically or per token. Returns `dtype`.

    After `finalise` the layer holds `weight_scale` [O, 1] and, when static, `input_scale` [], both float32.
    """

    path: str
    tensors: tuple[axes.Tensor, ...]
    dtype: torch.dtype
    input_format: str
    input_bound: float | None

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the uninitialised parameters by tensor name."""
        return allocate(linear, self.tensors, device)

    def finalise(self, layer: LinearLayer) -> None:
        """Check the scales and spread those of the parts over rows; of several input scales the largest clips nothing."""
        weight_scale = checked(layer, self.tensors, "weight_scale")
        if weight_scale.ndim == 1:
            sizes = torch.tensor([part.size for part in layer.linear.out], device=weight_scale.device)
            weight_scale = weight_scale.repeat_interleave(sizes).unsqueeze(1)
        layer.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        if self.input_format == axes.FP8_STATIC:
            layer.input_scale = nn.Parameter(checked(layer, self.tensors, "input_scale").max(), requires_grad=False)

    def input_scale(self, layer: LinearLayer) -> Tensor | None:
        """Return the static input scale [], None when activations are scaled per token."""
        return layer.get_parameter("input_scale") if self.input_format == axes.FP8_STATIC else None

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T [T, O]."""
        xq = x_TI if isinstance(x_TI, QuantizedActivation) else self._quantise(layer, x_TI)
        weight_OI, scale_O1 = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        return layer.ops.linear_fp8(xq.values_TI, xq.scale, weight_OI, scale_O1, self.dtype)

    def apply_silu_mul(self, layer: LinearLayer, xq: QuantizedActivation, scale: Tensor) -> QuantizedActivation:
        """Return silu(gate) * up in FP8 by the static scale, for gate and up side by side in x W^T."""
        weight_OI, scale_O1 = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        return layer.ops.linear_silu_mul_fp8(xq.values_TI, xq.scale, weight_OI, scale_O1, self.dtype, scale)

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32."""
        return layer.get_parameter("weight").float() * layer.get_parameter("weight_scale")

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the parameters so that outputs keep their inputs' magnitude."""
        draw(layer, "weight_scale", generator)
        if self.input_format == axes.FP8_STATIC:
            layer.get_parameter("input_scale").fill_(_RANDOM_INPUT_SCALE)

    def _quantise(self, layer: LinearLayer, x_TI: Tensor) -> QuantizedActivation:
        scale = self.input_scale(layer)
        if scale is not None:
            return layer.ops.quantize_fp8_static(x_TI, scale)
        return layer.ops.quantize_fp8_token(x_TI, self.input_bound)


class OnlineMethod(Fp8Method):
    """A plain weight that is stored in FP8 with a scale a row, row by row while it is read."""

    def quantise_rows(self, rows_RI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the FP8 values [R, I] and float32 scales [R, 1] of whole rows of a plain weight."""
        return quantise_rows(rows_RI)
