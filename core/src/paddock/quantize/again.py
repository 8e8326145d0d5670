"""A layer run again over a sample of the calibration sequences, with other weights in place of some of its own.

N sequences, B of them in the sample, L tokens a sequence, T = B * L tokens, E model size, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from paddock import axes, layers
from paddock.quantize.recipe import PlainLinear

SAMPLE_TOKENS = 4096  # a search runs a layer dozens of times


def sample(x_NLE: Tensor, most: int) -> Tensor:
    """Return a copy of some sequences, evenly spread: at most `SAMPLE_TOKENS` and `most` tokens, but at least one sequence."""
    count, length = x_NLE.shape[:2]
    taken = min(count, max(1, min(SAMPLE_TOKENS, most) // length))
    return x_NLE[[i * count // taken for i in range(taken)]].clone()


class LayerAgain:
    """`PlainLayer.run_with` of a layer: `run` computes its output [T, E] for the sample."""

    def __init__(self, model: nn.Module, linears: Mapping[str, PlainLinear], run: Callable[[], Tensor]) -> None:
        """Keep the layer and its plain weights."""
        self._run, self._linears = run, linears
        self._modules = {m.whole.name: m for m in model.modules() if isinstance(m, layers.LinearLayer)}

    @torch.inference_mode()
    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the layer's output with these weights [O, I] by checkpoint prefix, of any float dtype; its others stay."""
        known = {path for plain in self._linears.values() for path in plain.weights}
        assert weights.keys() <= known, f"the layer has no {sorted(weights.keys() - known)}"
        changed = [name for name, plain in self._linears.items() if weights.keys() & plain.weights.keys()]
        methods = {name: self._modules[name].method for name in changed}
        try:
            for name in changed:
                module = self._modules[name]
                parts = [weights.get(path, own_OI).to(own_OI) for path, own_OI in self._linears[name].weights.items()]
                module.method = cast(layers.LinearMethod, _Replaced(torch.cat(parts)))
            return self._run()
        finally:
            for name, method in methods.items():
                self._modules[name].method = method


class _Replaced:
    """As much of a linear method as a forward pass needs: a product with one weight."""

    input_format = axes.PLAIN
    input_bound: float | None = None

    def __init__(self, weight_OI: Tensor) -> None:
        """Keep the weight."""
        self._weight_OI = weight_OI

    def apply(self, layer: layers.LinearLayer, x_TI: Tensor) -> Tensor:
        """Return x W^T [T, O]."""
        return layer.ops.linear(x_TI, self._weight_OI)
