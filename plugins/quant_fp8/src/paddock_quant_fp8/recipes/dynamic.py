"""`fp8-dynamic`: every linear of every layer with one scale a row; activations get one scale a token at run time.

Layout: compressed-tensors, format float-quantized, as its preset FP8_DYNAMIC. Needs no text, unless KV scales are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from paddock.quantize.recipe import LayerWork, PlainLayer, RecipeInputs
from paddock_quant_fp8.recipes.heads import head_names
from paddock_quant_fp8.recipes.layer import Fp8LayerWork, attention_kv_names
from paddock_quant_fp8.recipes.scales import quantised, row_scales

_FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
_FORMAT = "float-quantized"


@frozen(kw_only=True)
class DynamicRecipe:
    """`scale_dtype` is the one row scales are stored in; weights are divided by what it rounds them to."""

    plain: tuple[str, ...]
    scale_dtype: torch.dtype
    kv_cache: bool

    @property
    def calibrated(self) -> bool:
        """Return whether KV scales are wanted."""
        return self.kv_cache

    def begin(self, layer: PlainLayer) -> LayerWork:
        """Return the work on a layer."""
        return Fp8LayerWork(
            layer=layer,
            chosen=frozenset(layer.linears),
            quantise=self._weight,
            kv_names=attention_kv_names(layer) if self.kv_cache else None,
            kv_shape=(1,),
        )

    def files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Return config.json with the description."""
        weights = {**_FLOAT, "strategy": "channel", "dynamic": False}
        tokens = {**_FLOAT, "strategy": "token", "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": tokens, "output_activations": None}
        description = {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "ignore": list(self.plain),
            "kv_cache_scheme": {**_FLOAT, "strategy": "tensor", "dynamic": False} if self.kv_cache else None,
            "global_compression_ratio": None,
            "config_groups": {"group_0": {**group, "format": _FORMAT}},
        }
        return {"config.json": {**config, "quantization_config": description}}

    def _weight(self, path: str, weight_OI: Tensor) -> dict[str, Tensor]:
        scale_O1 = row_scales(weight_OI, f"the weights of {path}").to(self.scale_dtype)
        return {f"{path}.weight": quantised(weight_OI, scale_O1), f"{path}.weight_scale": scale_O1}


def create(inputs: RecipeInputs) -> DynamicRecipe:
    """Return the recipe. Readers keep scales in the model's dtype; float16 has too few small numbers, so there it is float32."""
    dtype = torch.bfloat16 if inputs.dtype == "bfloat16" else torch.float32
    return DynamicRecipe(plain=head_names(inputs.table), scale_dtype=dtype, kv_cache=inputs.kv_cache_dtype is not None)
