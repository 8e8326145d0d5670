"""`fp8-static`: NVIDIA ModelOpt's FP8_DEFAULT_CFG. Every linear of every layer, one scale a weight, one static scale an input.

Layout: that of ModelOpt's exporter for Hugging Face, config.json and hf_quant_config.json both. `producer` says `modelopt`, as
readers of the layout ask before they take it, with Paddock's version.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from attrs import frozen
from torch import Tensor

from paddock.quantize.recipe import LayerWork, PlainLayer, RecipeInputs
from paddock_quant_fp8.recipes.heads import head_names
from paddock_quant_fp8.recipes.layer import Fp8LayerWork, attention_kv_names
from paddock_quant_fp8.recipes.scales import quantised, tensor_scale

_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}


@frozen(kw_only=True)
class ModelOptRecipe:
    """Amax over all that was seen, / 448. `plain` are the modules outside the layers that stay as they are."""

    plain: tuple[str, ...]
    kv_cache: bool
    calibrated: bool = True

    def begin(self, layer: PlainLayer) -> LayerWork:
        """Return the work on a layer."""
        return Fp8LayerWork(
            layer=layer,
            chosen=frozenset(layer.linears),
            quantise=_weight,
            static_inputs=True,
            kv_names=_kv_names(layer) if self.kv_cache else None,
        )

    def files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Return config.json with the newer form of the description, and hf_quant_config.json with the older."""
        producer = {"name": "modelopt", "version": f"paddock {version('paddock')}"}
        newer = {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "config_groups": {"group_0": {"input_activations": _FP8, "weights": _FP8, "targets": ["Linear"]}},
            "ignore": list(self.plain),
            **({"kv_cache_scheme": _FP8} if self.kv_cache else {}),
            "producer": producer,
        }
        older = {
            "producer": producer,
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": "FP8" if self.kv_cache else None,
                "exclude_modules": list(self.plain),
            },
        }
        return {"config.json": {**config, "quantization_config": newer}, "hf_quant_config.json": older}


def create(inputs: RecipeInputs) -> ModelOptRecipe:
    """Return the recipe."""
    return ModelOptRecipe(plain=head_names(inputs.table), kv_cache=inputs.kv_cache_dtype is not None)


def _weight(path: str, weight_OI: Tensor) -> dict[str, Tensor]:
    scale = tensor_scale(weight_OI, f"the weights of {path}")
    return {f"{path}.weight": quantised(weight_OI, scale), f"{path}.weight_scale": scale}


def _kv_names(layer: PlainLayer) -> tuple[str, str]:
    """Return the KV scales' names: at the key's and the value's projection, or where these are one, beside it."""
    paths = {path for linear in layer.linears.values() for path in linear.weights}
    k_path, v_path = (f"{layer.attention_source}.{kind}_proj" for kind in "kv")
    if {k_path, v_path} <= paths:
        return f"{k_path}.k_scale", f"{v_path}.v_scale"
    return attention_kv_names(layer)
