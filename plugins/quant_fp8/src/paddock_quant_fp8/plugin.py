"""The FP8 plugin: what it adds, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from paddock.plugins import QuantizationSpec, RecipeSpec, hookimpl

FIRST_WITH_FP8 = (8, 9)  # compute capability: Ada, then Hopper
_ANYWHERE: dict[str, Any] = {"method": "paddock_quant_fp8.method:linear_method", "kv_cache_dtypes": ("fp8",)}
_COMMON = _ANYWHERE | {"min_compute_capability": FIRST_WITH_FP8}


@hookimpl
def paddock_quantizations() -> Iterable[QuantizationSpec]:
    """Return the FP8 checkpoint formats, one for each tool that writes them."""
    return (
        QuantizationSpec(
            name="fbgemm_fp8",
            detect="paddock_quant_fp8.detect:detect_fbgemm",
            summary="FP8 weights scaled per row, activations per token (the official Llama 3.1 405B)",
            **_COMMON,
        ),
        QuantizationSpec(
            name="fp8",
            detect="paddock_quant_fp8.detect:detect_autofp8",
            online="paddock_quant_fp8.online:scheme",
            summary="FP8 weights scaled per tensor or block (AutoFP8); a plain checkpoint quantised while it is read",
            **_COMMON,
        ),
        QuantizationSpec(
            name="modelopt",
            detect="paddock_quant_fp8.modelopt:detect",
            summary="FP8, FP8_PER_CHANNEL_PER_TOKEN and FP8_PB_WO of NVIDIA's ModelOpt",
            **_COMMON,
        ),
        QuantizationSpec(
            name="modelopt-kv",
            detect="paddock_quant_fp8.modelopt:detect_kv",
            summary="plain weights with ModelOpt's scales of FP8 keys and values",
            **_ANYWHERE,
        ),
        QuantizationSpec(
            name="compressed-tensors",
            detect="paddock_quant_fp8.compressed:detect",
            summary="FP8 of llm-compressor: weights scaled per tensor, row or block, activations in every way",
            **_COMMON,
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
