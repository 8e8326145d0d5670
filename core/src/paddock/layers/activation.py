"""Activations between two linears.

T tokens, F feed-forward size of this rank.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from paddock.layers.formats import InputFormat
from paddock.layers.ops import Ops
from paddock.layers.quantized import Activation

ActivationKind = Literal["silu_mul", "gelu"]


class ActivationLayer(nn.Module):
    """`silu_mul`: gate and up side by side [T, 2F] to [T, F]; `gelu`: [T, F] to [T, F]."""

    def __init__(self, kind: ActivationKind, ops: Ops, emits: InputFormat) -> None:
        """Bind the op; the output comes in the format `emits` says."""
        super().__init__()
        self._activate = ops.silu_mul if kind == "silu_mul" else ops.gelu
        self._activate_fp8 = ops.silu_mul_fp8 if kind == "silu_mul" else ops.gelu_fp8
        self.emits = emits

    def forward(self, x_TF: Tensor) -> Activation:
        """Return the activation in the format the next linear takes."""
        if self.emits.is_fp8:
            return self._activate_fp8(x_TF, self.emits.scale, self.emits.bound)
        return self.emits(self._activate(x_TF))
