"""The AWQ plugin: what it adds, as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from paddock.plugins import QuantizationSpec, hookimpl


@hookimpl
def paddock_quantizations() -> Iterable[QuantizationSpec]:
    """Return the AWQ checkpoint format."""
    return (
        QuantizationSpec(
            name="awq",
            detect="paddock_quant_awq.detect:detect",
            method="paddock_quant_awq.method:linear_method",
            summary="4-bit weights with zero points, one scale a group (AutoAWQ gemm)",
        ),
    )
