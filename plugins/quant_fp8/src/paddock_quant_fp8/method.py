"""FP8 linears in plain torch: the CPU path, and the definition of every FP8 kernel.

y = input scale * weight scale * sum(xq Wq), summed in float32 and rounded once. T tokens, I inputs, O outputs, P fused parts.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor, nn

from paddock import axes
from paddock.errors import CheckpointError
from paddock.layers import (
    Activation,
    LinearLayer,
    LinearMethod,
    PlainMethod,
    QuantizedActivation,
    allocate,
    reference,
    torch_dtype,
)
from paddock_quant_fp8.detect import E4M3, RowwiseFp8, TensorwiseFp8

_CHUNK_BYTES = 64 << 20  # of weights held in float32 at a time
_RANDOM_DEVIATION = 100.0  # of stored values: most of the range is used, next to nothing saturates
_RANDOM_INPUT_SCALE = 0.05


def linear_method(scheme: RowwiseFp8 | TensorwiseFp8, path: str, linear: axes.Linear) -> LinearMethod:
    """Return how `linear`, whose first part is at checkpoint prefix `path`, is stored and multiplied."""
    tensors = scheme.tensors(path, linear)
    if tensors[0].dtype != E4M3:
        return PlainMethod(tensors)
    bound = scheme.activation_bound if isinstance(scheme, RowwiseFp8) else None
    return Fp8Method(
        path=path,
        tensors=tensors,
        dtype=torch_dtype(scheme.dtype),
        input_format=scheme.input_format,
        input_bound=bound,
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
        weight_scale = self._checked(layer, "weight_scale")
        if weight_scale.ndim == 1:
            sizes = torch.tensor([part.size for part in layer.linear.out], device=weight_scale.device)
            weight_scale = weight_scale.repeat_interleave(sizes).unsqueeze(1)
        layer.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        if self.input_format == axes.FP8_STATIC:
            layer.input_scale = nn.Parameter(self._checked(layer, "input_scale").max(), requires_grad=False)

    def input_scale(self, layer: LinearLayer) -> Tensor | None:
        """Return the static input scale [], None when activations are scaled per token."""
        return layer.get_parameter("input_scale") if self.input_format == axes.FP8_STATIC else None

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T [T, O]."""
        xq = x_TI if isinstance(x_TI, QuantizedActivation) else self._quantise(layer, x_TI)
        weight_OI, scale_O1 = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        return layer.ops.linear_fp8(xq.values_TI, xq.scale, weight_OI, scale_O1, self.dtype)

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32."""
        return layer.get_parameter("weight").float() * layer.get_parameter("weight_scale")

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the parameters so that outputs keep their inputs' magnitude."""
        weight_OI = layer.get_parameter("weight")
        for rows in _chunks(weight_OI):
            values_OI = torch.empty(weight_OI[rows].shape, device=weight_OI.device)
            values_OI.normal_(std=_RANDOM_DEVIATION, generator=generator).clamp_(-reference.FP8_MAX, reference.FP8_MAX)
            weight_OI[rows] = values_OI.to(weight_OI.dtype)
        layer.get_parameter("weight_scale").fill_(layer.whole.in_size**-0.5 / _RANDOM_DEVIATION)
        if self.input_format == axes.FP8_STATIC:
            layer.get_parameter("input_scale").fill_(_RANDOM_INPUT_SCALE)

    def _quantise(self, layer: LinearLayer, x_TI: Tensor) -> QuantizedActivation:
        scale = self.input_scale(layer)
        if scale is not None:
            return layer.ops.quantize_fp8_static(x_TI, scale)
        return layer.ops.quantize_fp8_token(x_TI, self.input_bound)

    def _checked(self, layer: LinearLayer, name: str) -> Tensor:
        scale = layer.get_parameter(name).detach()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise CheckpointError(
                f"{name} of {self.path} holds a scale that is not a positive number", fix="make or download the checkpoint again"
            )
        return scale


def _chunks(weight_OI: Tensor) -> list[slice]:
    """Return slices of rows small enough to hold in float32."""
    rows, inputs = weight_OI.shape
    step = max(1, _CHUNK_BYTES // (4 * inputs))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
