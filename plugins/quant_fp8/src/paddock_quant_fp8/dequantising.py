"""FP8 linears that multiply what their weights mean, in plain torch: weights alone in FP8, and scales of odd blocks.

y = x^ W^T with W = stored value * scale and x^ the activation as FP8 rounds it, or x itself; summed in float32, rounded once.
T tokens, I inputs, O outputs, G groups of inputs, Q rows of blocks, J columns of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as nnf
from attrs import frozen
from torch import Tensor, nn

from paddock import axes
from paddock.layers import Activation, LinearLayer, QuantizedActivation, allocate, part_spans, reference
from paddock_quant_fp8.scales import checked, chunks, draw
from paddock_quant_fp8.schemes import BLOCK, TENSOR, Stored


@frozen(kw_only=True)
class DequantisedMethod:
    """An FP8 weight [O, I] with scales of a part, a row or a block; inputs plain, or scaled per token and group. Returns `dtype`.

    After `finalise` the layer holds `weight_scale` [Q, J] float32: a row of scales covers `stored.block[0]` outputs of a part, or
    one output where scales are not of blocks.
    """

    stored: Stored
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[axes.Tensor, ...]:
        """Return what holds the linear."""
        return self.stored.tensors

    @property
    def input_format(self) -> str:
        """Return what producers may hand over."""
        return self.stored.input_format

    @property
    def input_bound(self) -> float | None:
        """Return the magnitude above which inputs are clipped."""
        return self.stored.input_bound

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the uninitialised parameters by tensor name."""
        return allocate(linear, self.tensors, device)

    def finalise(self, layer: LinearLayer) -> None:
        """Check the scales, spread those of parts over rows, and call them `weight_scale`."""
        scale = checked(layer, self.tensors, self.stored.scale_name)
        if self.stored.scales == TENSOR:
            sizes = torch.tensor([part.size for part in layer.linear.out], device=scale.device)
            scale = scale.repeat_interleave(sizes).unsqueeze(1)
        layer.register_parameter(self.stored.scale_name, None)
        layer.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))

    def input_scale(self, layer: LinearLayer) -> Tensor | None:
        """Return None: no input has a stored scale."""
        return None

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x^ W^T [T, O]."""
        seen_TI = self._seen(x_TI)
        y_TO = seen_TI.new_empty((len(seen_TI), layer.linear.out_size), dtype=self.dtype)
        for rows, weight_RI in self._pieces(layer):
            y_TO[:, rows] = (seen_TI @ weight_RI.T).to(self.dtype)
        return y_TO

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32."""
        return torch.cat([weight_RI for _, weight_RI in self._pieces(layer)])

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the parameters so that outputs keep their inputs' magnitude."""
        draw(layer, self.stored.scale_name, generator)

    def _seen(self, x_TI: Activation) -> Tensor:
        """Return the input in float32, rounded to FP8 where the format says so."""
        if isinstance(x_TI, QuantizedActivation):
            return x_TI.values_TI.float() * x_TI.scale
        if self.input_format == axes.FP8_TOKEN:
            return self._seen(reference.quantize_fp8_token(x_TI, self.input_bound))
        return see_groups(x_TI, self.stored.group) if self.stored.group else x_TI.float()

    def _pieces(self, layer: LinearLayer) -> Iterator[tuple[slice, Tensor]]:
        """Yield runs of rows [R, I] in float32, each no more than a chunk, in order and without a gap."""
        weight_OI, scale_QJ = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        if self.stored.scales != BLOCK:
            for rows in chunks(weight_OI):
                yield rows, weight_OI[rows].float() * scale_QJ[rows]
            return
        outs, ins = self.stored.block
        weight, scale = self.tensors
        for (of_weight, _), (of_scale, _) in zip(part_spans(layer.linear, weight), part_spans(layer.linear, scale), strict=True):
            scale_QI = scale_QJ[slice(*of_scale)].repeat_interleave(ins, dim=1)[:, : weight_OI.shape[1]]
            for index, start in enumerate(range(*of_weight, outs)):
                rows = slice(start, min(start + outs, of_weight[1]))
                yield rows, weight_OI[rows].float() * scale_QI[index]


def see_groups(x_TI: Tensor, group: int) -> Tensor:
    """Return x in float32 as FP8 holds it with a scale for each token and `group` inputs; the last group may be shorter."""
    tokens, inputs = x_TI.shape
    x_GI = nnf.pad(x_TI, (0, -inputs % group)).reshape(-1, group)
    quantised = reference.quantize_fp8_token(x_GI)
    return (quantised.values_TI.float() * quantised.scale).reshape(tokens, -1)[:, :inputs]
