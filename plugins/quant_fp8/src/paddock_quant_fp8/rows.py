"""Rows of a plain weight into FP8: one scale a row, the largest magnitude at 448 (FBGEMM's rule). R rows, I inputs."""

from __future__ import annotations

from torch import Tensor

from paddock.layers import reference


def quantise_rows(rows_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return FP8 values [R, I] and float32 scales [R, 1]; a row that is not finite gets a scale that is not, either."""
    quantised = reference.quantize_fp8_token(rows_RI)
    return quantised.values_TI, quantised.scale
