"""FP8 linears with scales of blocks of weights, their inputs scaled per token and group: DeepSeek's `weight_scale_inv`.

y = the sum over groups g of input scale (token, g) * weight scale (run, g) * sum(xq Wq of g), in float32, rounded once.
T tokens, I inputs, O outputs, Q runs of outputs, G groups of inputs.
"""

from __future__ import annotations

import math

import torch
from attrs import frozen
from torch import Tensor, nn

from paddock import axes
from paddock.layers import Activation, LinearLayer, QuantizedActivation, allocate, part_spans
from paddock_quant_fp8.scales import checked, draw
from paddock_quant_fp8.schemes import BLOCK, Stored

GROUP = 128  # inputs that share a scale in every published checkpoint, and the one width that kernels are written for


def multiplies(stored: Stored) -> bool:
    """Return whether `BlockMethod` is for linears stored so: as many inputs to a token's scale as to a weight's."""
    return stored.scales == BLOCK and stored.group == stored.block[1] == GROUP


@frozen(kw_only=True)
class BlockMethod:
    """An FP8 weight [O, I] with scales of blocks, inputs scaled per token and group. Returns `dtype`.

    Blocks begin anew at every fused part. After `finalise` the layer holds `weight_scale` [Q, G] float32, a row of which covers
    `outputs(linear)` outputs: as many as a block's, or fewer where a part begins amid what would be one.
    """

    stored: Stored
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[axes.Tensor, ...]:
        """Return what holds the linear."""
        return self.stored.tensors

    @property
    def input_format(self) -> str:
        """Return FP8 with a scale a token and group."""
        return axes.FP8_GROUP

    @property
    def input_group(self) -> int:
        """Return the inputs of a group."""
        return self.stored.group

    @property
    def input_bound(self) -> float | None:
        """Return None: nothing is clipped."""
        return None

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the uninitialised parameters by tensor name."""
        return allocate(linear, self.tensors, device)

    def finalise(self, layer: LinearLayer) -> None:
        """Check the scales and lay them out in runs of equally many outputs, under the name `weight_scale`."""
        scale_QG = checked(layer, self.tensors, self.stored.scale_name)
        step = self.outputs(layer.linear)
        rows = [row for part in self._rows(layer.linear) for row in part[::step]]
        layer.register_parameter(self.stored.scale_name, None)
        runs_QG = scale_QG[torch.tensor(rows, device=scale_QG.device)].contiguous()
        layer.register_parameter("weight_scale", nn.Parameter(runs_QG, requires_grad=False))

    def input_scale(self, layer: LinearLayer) -> Tensor | None:
        """Return None: no input has a stored scale."""
        return None

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T [T, O]."""
        xq = x_TI if isinstance(x_TI, QuantizedActivation) else layer.ops.quantize_fp8_token(x_TI, None, self.stored.group)
        block = self.outputs(layer.linear), self.stored.block[1]
        weight_OI, scale_QG = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        return layer.ops.linear_fp8_blocks(xq.values_TI, xq.scale, weight_OI, scale_QG, block, self.dtype)

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W [O, I] in float32."""
        weight_OI, scale_QG = layer.get_parameter("weight"), layer.get_parameter("weight_scale")
        outs, ins = self.outputs(layer.linear), self.stored.block[1]
        scale_OI = scale_QG.repeat_interleave(outs, dim=0).repeat_interleave(ins, dim=1)
        return weight_OI.float() * scale_OI[: weight_OI.shape[0], : weight_OI.shape[1]]

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Fill the parameters so that outputs keep their inputs' magnitude."""
        draw(layer, self.stored.scale_name, generator)

    def outputs(self, linear: axes.Linear) -> int:
        """Return how many outputs a row of the laid-out scales covers: no part begins amid it."""
        return math.gcd(self.stored.block[0], *(part.size for part in linear.out[:-1]))

    def _rows(self, linear: axes.Linear) -> list[list[int]]:
        """Return, for each output of each part, the row of the checkpoint's scales that covers it."""
        _, scale = self.tensors
        spans = (span for span, _ in part_spans(linear, scale))
        return [
            [first + output // self.stored.block[0] for output in range(part.size)]
            for part, (first, _) in zip(linear.out, spans, strict=True)
        ]
