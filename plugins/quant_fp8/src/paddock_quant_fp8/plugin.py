"""The FP8 plugin: what it adds, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from paddock.plugins import QuantizationSpec, hookimpl


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
