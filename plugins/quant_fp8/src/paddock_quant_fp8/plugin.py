"""The FP8 plugin: what it adds, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from paddock.plugins import QuantizationSpec, hookimpl

FIRST_WITH_FP8 = (8, 9)  # compute capability: Ada, then Hopper
_COMMON: dict[str, Any] = {
    "method": "paddock_quant_fp8.method:linear_method",
    "kv_cache_dtypes": ("fp8",),
    "min_compute_capability": FIRST_WITH_FP8,
}


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
            name="compressed-tensors",
            detect="paddock_quant_fp8.compressed:detect",
            summary="FP8 of llm-compressor: weights scaled per tensor, row or block, activations in every way",
            **_COMMON,
        ),
    )
