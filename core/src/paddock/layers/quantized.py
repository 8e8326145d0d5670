"""What lies between a producer and the linears it feeds: a plain tensor, or one already quantised for them.

T tokens, I features, G groups of them.
"""

from __future__ import annotations

from attrs import frozen
from torch import Tensor


@frozen(eq=False)
class QuantizedActivation:
    """An activation in FP8 e4m3 with its scale: real = values * scale.

    The scale is float32: [] (static), [T, 1] (per token) or [T, G] (per token and group of features, the last may be shorter).
    """

    values_TI: Tensor
    scale: Tensor


Activation = Tensor | QuantizedActivation
