"""Activations between two linears.

T tokens, I input features of the linear before, F feed-forward size of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from paddock import axes
from paddock.checkpoint.targets import Target
from paddock.errors import CheckpointError
from paddock.layers.formats import InputFormat
from paddock.layers.linear import LinearLayer
from paddock.layers.ops import Ops
from paddock.layers.quantized import Activation, QuantizedActivation

ActivationKind = Literal["silu_mul", "gelu"]


class ActivationLayer(nn.Module):
    """`silu_mul`: gate and up side by side [T, 2F] to [T, F]; `gelu`: [T, F] to [T, F].

    AWQ (arXiv 2306.00978) multiplies the columns of the linear behind by a scale each. An activation that is not linear cannot
    hold the inverse in the rows of the linear before, so such checkpoints store the scales [F], and the output is divided by
    them. `scaled` is the part they cover, its source the prefix of `.scales`; None where the family stores none.
    """

    def __init__(
        self,
        kind: ActivationKind,
        ops: Ops,
        emits: InputFormat,
        device: torch.device,
        *,
        scaled: axes.Part | None = None,
        shard: axes.Shard = axes.WHOLE,
        source: str = "",
    ) -> None:
        """Bind the op; the output comes in the format `emits` says. Scales are 1 until a checkpoint fills them."""
        super().__init__()
        self._gated = kind == "silu_mul"
        self._activate = ops.silu_mul if self._gated else ops.gelu
        self._activate_fp8 = ops.silu_mul_fp8 if self._gated else ops.gelu_fp8
        self.emits, self.scaled, self.shard, self.source = emits, scaled, shard, source
        ones_F = None if scaled is None else torch.ones(shard.part(scaled).size, dtype=torch.float32, device=device)
        self.scales = None if ones_F is None else nn.Parameter(ones_F, requires_grad=False)

    def forward(self, x_TF: Tensor) -> Activation:
        """Return the activation in the format the next linear takes."""
        if self.emits.is_fp8(x_TF) and self.scales is None:
            return self._activate_fp8(x_TF, *self.emits.scaling)
        y_TF = self._activate(x_TF)
        return self.emits(y_TF if self.scales is None else (y_TF / self.scales).to(y_TF.dtype))

    def after(self, linear: LinearLayer, x_TI: Activation) -> Activation:
        """Return the activation of what a linear makes of x, with the same bits whether one op does both or two.

        One op does where the activation is `silu_mul` without scales, x is in FP8, the next linear takes FP8 by a static scale,
        the method of this one is `FusesSiluMul`, and neither a bias nor another rank's share is added to its product.
        """
        fused = linear.fuses_silu_mul if self._gated and self.scales is None else None
        if fused is not None and isinstance(x_TI, QuantizedActivation) and self.emits.is_fp8(x_TI.values_TI):
            scale = self.emits.scale
            if scale is not None:
                return fused.apply_silu_mul(linear, x_TI, scale)
        activated: Activation = self(linear(x_TI))
        return activated

    def targets(self) -> Iterator[Target]:
        """Yield where the checkpoint's scales go; it need hold none."""
        if self.scaled is None or self.scales is None:
            return
        yield Target(
            name=f"{self.source}{self.scaled.source}.scales",
            view=self.scales,
            shape=(self.scaled.size,),
            region=(self.shard.span(self.scaled),),
            optional=True,
        )

    def finalise(self) -> None:
        """Check the scales, and drop them where they change nothing; raise CheckpointError for one that is not positive."""
        if self.scaled is None or self.scales is None:
            return
        if not bool(((self.scales > 0) & self.scales.isfinite()).all()):
            raise CheckpointError(
                f"{self.source}{self.scaled.source}.scales holds a number that is not positive",
                fix="make or download the checkpoint again",
            )
        if bool((self.scales == 1).all()):
            self.scales = None

    def randomise(self, generator: torch.Generator) -> None:
        """Leave the scales at 1."""
