"""The plugin of 4-bit checkpoints: what it adds, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from paddock.plugins import QuantizationSpec, RecipeSpec, hookimpl

_METHOD = "paddock_quant_awq.method:linear_method"


@hookimpl
def paddock_quantizations() -> Iterable[QuantizationSpec]:
    """Return the 4-bit checkpoint formats; whether activations are rounded to FP8 is planning's choice, for all of them."""
    return (
        QuantizationSpec(
            name="awq",
            detect="paddock_quant_awq.autoawq:detect",
            method=_METHOD,
            summary="4-bit weights with zero points, one scale a group (AutoAWQ gemm)",
        ),
        QuantizationSpec(
            name="gptq",
            detect="paddock_quant_awq.gptq:detect",
            method=_METHOD,
            summary="4-bit weights, inputs in order or by g_idx (GPTQ, both versions of its layout)",
        ),
        QuantizationSpec(
            name="auto-round",
            detect="paddock_quant_awq.autoround:detect",
            method=_METHOD,
            summary="4-bit weights of AutoRound, in GPTQ's or AutoAWQ's packing",
        ),
        QuantizationSpec(
            name="compressed-tensors-w4a16",
            detect="paddock_quant_awq.compressed:detect_w4a16",
            method=_METHOD,
            kv_cache_dtypes={"fp8"},
            summary="4-bit integers of compressed-tensors, packed or not, with or without zero points",
        ),
        QuantizationSpec(
            name="compressed-tensors-w4a8",
            detect="paddock_quant_awq.compressed:detect_w4a8",
            method=_METHOD,
            kv_cache_dtypes={"fp8"},
            summary="4-bit integers of compressed-tensors, activations FP8 per token (W4AFP8)",
        ),
        QuantizationSpec(
            name="modelopt-w4a16",
            detect="paddock_quant_awq.modelopt:detect_w4a16",
            method=_METHOD,
            kv_cache_dtypes={"fp8"},
            summary="ModelOpt INT4 AWQ, activations as they are",
        ),
        QuantizationSpec(
            name="modelopt-w4a8",
            detect="paddock_quant_awq.modelopt:detect_w4a8",
            method=_METHOD,
            kv_cache_dtypes={"fp8"},
            summary="ModelOpt INT4 AWQ, activations FP8 per token",
        ),
    )


@hookimpl
def paddock_recipes() -> Iterable[RecipeSpec]:
    """Return the 4-bit recipe."""
    return (
        RecipeSpec(
            name="awq",
            create="paddock_quant_awq.recipes.awq:create",
            options={"format", "group_size", "scheme", "tp_compatible", "zero_points"},
            summary="4-bit weights, scaled and clipped by what a text shows them (compressed-tensors, AutoAWQ, ModelOpt)",
        ),
    )
