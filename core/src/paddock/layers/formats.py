"""Input formats: a producer (norm, activation, attention) hands its output over as the linears behind it want it.

T tokens, I features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paddock import axes
from paddock.layers.linear import LinearLayer, LinearMethod, TakesFewPlain, TakesGroups
from paddock.layers.ops import Ops
from paddock.layers.quantized import Activation


class InputFormat:
    """What the linears fed by one producer take, and how to make it of a plain tensor.

    The linears are known when the model is built, static scales only after loading: until `settle`, everything is plain. Steps of
    fewer than `from_tokens` tokens stay plain too: a step's size is fixed where it is captured as a graph.
    """

    def __init__(self, ops: Ops) -> None:
        """Start plain, feeding nobody."""
        self._ops = ops
        self._consumers: list[LinearLayer] = []
        self.name = axes.PLAIN
        self.from_tokens = 1
        self.scale: Tensor | None = None
        self.bound: float | None = None
        self.group: int | None = None

    def is_fp8(self, x_TI: Tensor) -> bool:
        """Return whether the ops named `_fp8` make the format of so many tokens, by `scale`, `bound` and `group`."""
        return self.name != axes.PLAIN and len(x_TI) >= self.from_tokens

    @property
    def scaling(self) -> tuple[Tensor | None, float | None, int | None]:
        """Return what the ops named `_fp8` are told: scale, bound and group."""
        return self.scale, self.bound, self.group

    def feed(self, consumer: LinearLayer) -> None:
        """Note a linear that takes the producer's output."""
        self._consumers.append(consumer)

    def settle(self) -> None:
        """Choose the format all linears agree on, static scale and bound included; plain when they do not agree."""
        if not self._consumers:
            return
        methods = [layer.method for layer in self._consumers]
        names, bounds = {m.input_format for m in methods}, {m.input_bound for m in methods}
        scales = [layer.method.input_scale(layer) for layer in self._consumers]
        borders = {m.input_format_from if isinstance(m, TakesFewPlain) else 1 for m in methods}
        groups = {_group(m) for m in methods}
        if any(len(found) != 1 for found in (names, bounds, borders, groups)) or not _same(scales):
            return
        (self.name,), (self.bound,), (self.from_tokens,), (self.group,), self.scale = names, bounds, borders, groups, scales[0]
        assert (self.scale is not None) == (self.name == axes.FP8_STATIC), self.name

    def __call__(self, x_TI: Tensor) -> Activation:
        """Return x in the format agreed on for so many tokens."""
        if not self.is_fp8(x_TI):
            return x_TI
        if self.scale is None:
            return self._ops.quantize_fp8_token(x_TI, self.bound, self.group)
        return self._ops.quantize_fp8_static(x_TI, self.scale)


def _group(method: LinearMethod) -> int | None:
    """Return the inputs that share a token's scale, None for all of them."""
    if method.input_format != axes.FP8_GROUP:
        return None
    assert isinstance(method, TakesGroups), f"{type(method).__name__} takes groups of inputs and does not say how wide"
    return method.input_group


def _same(scales: list[Tensor | None]) -> bool:
    first = scales[0]
    return all(s is first or (s is not None and first is not None and torch.equal(s, first)) for s in scales)
