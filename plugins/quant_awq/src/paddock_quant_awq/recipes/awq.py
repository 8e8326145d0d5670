"""`awq`: activation-aware 4-bit weights of every linear of every layer (arXiv 2306.00978), in one of three layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen

from paddock.axes import Linear
from paddock.quantize.recipe import LayerWork, PlainLayer, RecipeInputs
from paddock_quant_awq.recipes.chosen import Chosen, chosen
from paddock_quant_awq.recipes.descriptions import Files, description
from paddock_quant_awq.recipes.groups import ScaleGroup, scale_groups
from paddock_quant_awq.recipes.layer import AwqLayerWork
from paddock_quant_awq.recipes.layouts import Layout, layout


@frozen(kw_only=True)
class AwqRecipe:
    """Quantises all linears of the layers; `heads` are those outside, which stay plain."""

    what: Chosen
    groups: tuple[ScaleGroup, ...]
    layout: Layout
    dtype: torch.dtype
    heads: tuple[str, ...]
    calibrated: bool = True

    def begin(self, layer: PlainLayer) -> LayerWork:
        """Return the work on a layer."""
        return AwqLayerWork(layer=layer, groups=self.groups, layout=self.layout, dtype=self.dtype)

    def files(self, config: Mapping[str, Any]) -> Files:
        """Return config.json with the description, and what the format wants beside it."""
        return description(self.what, config, self.heads)


def create(inputs: RecipeInputs) -> AwqRecipe:
    """Return the recipe; raise OptionError for options that contradict each other or the model's sizes."""
    what, dtype = chosen(inputs), getattr(torch, inputs.dtype)
    return AwqRecipe(
        what=what,
        groups=scale_groups(inputs.table),
        layout=layout(what, dtype),
        dtype=dtype,
        heads=tuple(part.source for module in inputs.table.outer if isinstance(module, Linear) for part in module.out),
    )
