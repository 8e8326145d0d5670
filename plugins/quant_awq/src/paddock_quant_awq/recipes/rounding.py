"""Weights rounded to the nearest 4-bit number: real = (code - zero) * scale with codes and zeros 0..15.

O outputs, I inputs, G groups of S inputs.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from paddock.layers.int4 import MIDDLE

LARGEST = 15
_LEAST_RANGE = 1e-5  # of a group, so that its scale is a number above 0 in float16 too (AutoAWQ)


@frozen(eq=False, kw_only=True)
class Rounded:
    """A weight: codes [O, I] uint8, scales [O, G] in the dtype they are stored in, zeros [O, G] uint8, None where each is 8."""

    codes_OI: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor | None

    def meaning(self) -> Tensor:
        """Return the weight [O, I] in float32 that is stored."""
        outputs, groups = self.scales_OG.shape
        numbers_OGS = self.codes_OI.view(outputs, groups, -1).float()
        numbers_OGS -= MIDDLE if self.zeros_OG is None else self.zeros_OG.float().unsqueeze(-1)
        return (numbers_OGS * self.scales_OG.float().unsqueeze(-1)).flatten(1)


@frozen(kw_only=True)
class Rounding:
    """How a format rounds: groups of `group` inputs, scales in `scale_dtype`.

    With `divisor` a scale is a group's largest magnitude divided by it, and there are no zero points; with None the scale is the
    group's range / 15, 0 being within the range, and the zero point is where 0 falls: of all of that range, or of the part that
    `rounded` is told. Weights are divided by the scale as stored.
    """

    group: int
    divisor: float | None
    scale_dtype: torch.dtype

    @property
    def steps(self) -> float:
        """Return how many steps there are from end to end of a group's range: 2 x divisor of one from -largest to largest."""
        return LARGEST if self.divisor is None else 2 * self.divisor

    def rounded(self, weight_OI: Tensor, parts_OG: Tensor | None = None) -> Rounded:
        """Return a float32 weight rounded: each to the nearest of the 16 numbers that span this part of its group's range.

        A part below 1 is nearer to 0 at both ends, so that the weights beyond it are cut off; one above 1 has longer steps.
        """
        weight_OGS = grouped(weight_OI, self.group)
        parts_OG = torch.ones((), device=weight_OI.device) if parts_OG is None else parts_OG
        if self.divisor is not None:
            range_OG = weight_OGS.abs().amax(-1) * parts_OG * (LARGEST / self.divisor)
            scales_OG, zeros_OG = (range_OG.clamp(min=_LEAST_RANGE) / LARGEST).to(self.scale_dtype), None
            shift_OG1: Tensor | int = MIDDLE
        else:
            low_OG = weight_OGS.amin(-1).clamp(max=0) * parts_OG
            range_OG = weight_OGS.amax(-1).clamp(min=0) * parts_OG - low_OG
            scales_OG = (range_OG.clamp(min=_LEAST_RANGE) / LARGEST).to(self.scale_dtype)
            zeros_OG = (-low_OG / scales_OG.float()).round().clamp(0, LARGEST).to(torch.uint8)
            shift_OG1 = zeros_OG.float().unsqueeze(-1)
        codes_OGS = (weight_OGS / scales_OG.float().unsqueeze(-1)).round_().add_(shift_OG1).clamp_(0, LARGEST)
        return Rounded(codes_OI=codes_OGS.to(torch.uint8).flatten(1), scales_OG=scales_OG, zeros_OG=zeros_OG)


def grouped(weight_OI: Tensor, group: int) -> Tensor:
    """Return a weight as [O, G, S]."""
    return weight_OI.view(len(weight_OI), -1, group)
