"""`fp8-official`: what Meta did to Llama 3.1 405B. The feed-forward of every layer but the first and the last, one scale a row.

Activations get one scale a token at run time, of magnitudes up to 1200. Layout: `fbgemm_fp8`. The format has no word for KV
scales: they are stored as compressed-tensors names them, and a reader that wants them asks for an FP8 cache.
Source: meta-llama/llama-models, models/llama3/quantization/loader.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen
from torch import Tensor

from paddock.axes import WeightTable
from paddock.errors import OptionError
from paddock.quantize.recipe import LayerWork, PlainLayer, RecipeInputs
from paddock_quant_fp8.detect import DEFAULT_ACTIVATION_BOUND
from paddock_quant_fp8.recipes.heads import head_names, is_feed_forward, layer_linears
from paddock_quant_fp8.recipes.layer import Fp8LayerWork, attention_kv_names
from paddock_quant_fp8.recipes.scales import quantised, row_scales


@frozen(kw_only=True)
class OfficialRecipe:
    """Quantises some linears of the inner layers of a model."""

    table: WeightTable
    kv_cache: bool

    @property
    def calibrated(self) -> bool:
        """Return whether KV scales are wanted."""
        return self.kv_cache

    def begin(self, layer: PlainLayer) -> LayerWork:
        """Return the work on a layer."""
        chosen = (name for name, linear in layer.linears.items() if is_feed_forward(linear.declared))
        return Fp8LayerWork(
            layer=layer,
            chosen=frozenset(chosen if self._is_inner(layer.index) else ()),
            quantise=_weight,
            kv_names=attention_kv_names(layer) if self.kv_cache else None,
            kv_shape=(1,),
        )

    def files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Return config.json with the description; plain linears are listed by full path, which all readers understand."""
        description = {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": DEFAULT_ACTIVATION_BOUND,
            "modules_to_not_convert": [*self._plain_linears(), *head_names(self.table)],
        }
        return {"config.json": {**config, "quantization_config": description}}

    def _is_inner(self, index: int) -> bool:
        return 0 < index < self.table.num_layers - 1

    def _plain_linears(self) -> list[str]:
        return [
            self.table.layer_source.format(i=index) + part.source
            for index in range(self.table.num_layers)
            for linear in layer_linears(self.table)
            if not (self._is_inner(index) and is_feed_forward(linear))
            for part in linear.out
        ]


def create(inputs: RecipeInputs) -> OfficialRecipe:
    """Return the recipe; raise OptionError for a model without layers between the first and the last."""
    if inputs.table.num_layers < 3:
        raise OptionError(
            f"recipe is 'fp8-official', which leaves the first and the last layer plain; the model has {inputs.table.num_layers}",
            fix="use fp8-dynamic or fp8-static",
        )
    return OfficialRecipe(table=inputs.table, kv_cache=inputs.kv_cache_dtype is not None)


def _weight(path: str, weight_OI: Tensor) -> dict[str, Tensor]:
    scale_O1 = row_scales(weight_OI, f"the weights of {path}")
    return {f"{path}.weight": quantised(weight_OI, scale_O1), f"{path}.weight_scale": scale_O1}
