"""Scales and the weights they give: real = stored * scale, stored in FP8 e4m3, magnitudes above 448 saturated.

O output features, I input features, K KV heads, D head size, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paddock.errors import CheckpointError
from paddock.layers.reference import FP8, FP8_MAX, FP8_MIN_SCALE, fp8_scale
from paddock_quant_fp8.scales import chunks


class Largest:
    """The largest magnitude seen so far, kept on the device."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._amax: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """Take note of some values."""
        amax = x.abs().amax().float()
        self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)

    def scale(self, what: str) -> Tensor:
        """Return largest / 448 [] float32, 1 where only zeros were seen; raise CheckpointError where a value was not finite."""
        assert self._amax is not None, f"nothing was seen of {what}"
        return _checked(self._amax, what)


def tensor_scale(weight_OI: Tensor, what: str) -> Tensor:
    """Return the scale [] float32 of a whole weight: its largest magnitude / 448, 1 for a weight of zeros."""
    return _checked(weight_OI.abs().amax().float(), what)


def row_scales(weight_OI: Tensor, what: str) -> Tensor:
    """Return a scale for each row [O, 1] float32: its largest magnitude / 448, at least FBGEMM's floor of 1 / (448 * 512)."""
    amax_O1 = weight_OI.abs().amax(-1, keepdim=True).float()
    _refuse_not_finite(amax_O1, what)
    return fp8_scale(amax_O1).clamp(min=FP8_MIN_SCALE)


def quantised(weight_OI: Tensor, scale: Tensor) -> Tensor:
    """Return weight / scale in FP8; `scale` is [] or [O, 1]."""
    weight_fp8_OI = torch.empty_like(weight_OI, dtype=FP8)
    for rows in chunks(weight_OI):
        scale_rows = scale if scale.ndim == 0 else scale[rows]
        weight_fp8_OI[rows] = (weight_OI[rows].float() / scale_rows.float()).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return weight_fp8_OI


def _checked(amax: Tensor, what: str) -> Tensor:
    _refuse_not_finite(amax, what)
    return torch.where(amax > 0, fp8_scale(amax), torch.ones_like(amax))


def _refuse_not_finite(amax: Tensor, what: str) -> None:
    if not bool(amax.isfinite().all()):
        raise CheckpointError(
            f"{what} hold values that are not finite numbers, so no scale fits them",
            fix="check the source's weights, and that it was trained in the dtype its config names",
        )
