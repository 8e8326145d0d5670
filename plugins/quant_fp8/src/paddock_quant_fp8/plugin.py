"""The FP8 plugin: what it adds, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from paddock.plugins import QuantizationSpec, RecipeSpec, hookimpl


@hookimpl
def paddock_quantizations() -> Iterable[QuantizationSpec]:
    """Return the FP8 checkpoint formats."""
    return (
        QuantizationSpec(
            name="fbgemm_fp8",
            detect="paddock_quant_fp8.detect:detect_fbgemm",
            method="paddock_quant_fp8.method:linear_method",
            summary="FP8 weights scaled per row, activations per token (the official Llama 3.1 405B)",
        ),
        QuantizationSpec(
            name="fp8",
            detect="paddock_quant_fp8.detect:detect_autofp8",
            method="paddock_quant_fp8.method:linear_method",
            kv_cache_dtypes={"fp8"},
            summary="FP8 weights scaled per tensor, activations static or per token (AutoFP8)",
        ),
    )


@hookimpl
def paddock_recipes() -> Iterable[RecipeSpec]:
    """Return the FP8 recipes."""
    return (
        RecipeSpec(
            name="fp8-static",
            create="paddock_quant_fp8.recipes.modelopt:create",
            kv_cache_dtypes={"fp8"},
            summary="every linear of the layers, a scale a tensor, static input scales from a text (ModelOpt)",
        ),
        RecipeSpec(
            name="fp8-dynamic",
            create="paddock_quant_fp8.recipes.dynamic:create",
            kv_cache_dtypes={"fp8"},
            summary="every linear of the layers, a scale a row, inputs scaled per token, no text needed (compressed-tensors)",
        ),
        RecipeSpec(
            name="fp8-official",
            create="paddock_quant_fp8.recipes.official:create",
            kv_cache_dtypes={"fp8"},
            summary="feed-forward of all but the first and last layer, a scale a row, inputs per token up to 1200 (fbgemm_fp8)",
        ),
    )
