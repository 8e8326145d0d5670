"""Ops that no kernel fuses: their parts one after the other, whoever implements them.

T tokens, E model size, I features, O output features, F feed-forward size. The definitions in `layers.reference` give the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import fields, frozen
from torch import Tensor

from paddock.layers.op_marks import TWO_DELTAS, takes
from paddock.layers.quantized import QuantizedActivation
from paddock.planning.fused_ops import PARTS_OF_PRODUCTS


@frozen(eq=False, kw_only=True)
class Unfused:
    """The ops that end in `_fp8` and are not products, each made of these."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    quantize_fp8_static: Callable[[Tensor, Tensor], QuantizedActivation]
    quantize_fp8_token: Callable[[Tensor, float | None, int | None], QuantizedActivation]

    def rms_norm_fp8(
        self,
        x_TE: Tensor,
        delta_TE: Tensor | None,
        weight_E: Tensor,
        eps: float,
        scale: Tensor | None,
        bound: float | None,
        group: int | None = None,
    ) -> tuple[Tensor, QuantizedActivation]:
        """Return (x + delta, its rms_norm in FP8)."""
        if delta_TE is None:
            return x_TE, self._quantized(self.rms_norm(x_TE, weight_E, eps), scale, bound, group)
        sum_TE, h_TE = self.add_rms_norm(x_TE, delta_TE, weight_E, eps)
        return sum_TE, self._quantized(h_TE, scale, bound, group)

    @takes(TWO_DELTAS)
    def layer_norm_fp8(
        self,
        x_TE: Tensor,
        delta_TE: Tensor | None,
        weight_E: Tensor,
        bias_E: Tensor | None,
        eps: float,
        scale: Tensor | None,
        bound: float | None,
        group: int | None = None,
        *,
        more_TE: Tensor | None = None,
    ) -> tuple[Tensor, QuantizedActivation]:
        """Return (x + delta, its layer_norm in FP8). `more_TE` is added to the delta first."""
        if delta_TE is None:
            return x_TE, self._quantized(self.layer_norm(x_TE, weight_E, bias_E, eps), scale, bound, group)
        sum_TE, h_TE = self.add_layer_norm(x_TE, delta_TE, weight_E, bias_E, eps, more_TE=more_TE)
        return sum_TE, self._quantized(h_TE, scale, bound, group)

    def silu_mul_fp8(
        self, gate_up_T2F: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None
    ) -> QuantizedActivation:
        """Return silu(gate) * up in FP8."""
        return self._quantized(self.silu_mul(gate_up_T2F), scale, bound, group)

    def gelu_fp8(self, x_TF: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None) -> QuantizedActivation:
        """Return gelu(x) in FP8."""
        return self._quantized(self.gelu(x_TF), scale, bound, group)

    def _quantized(
        self, x_TI: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None
    ) -> QuantizedActivation:
        return self.quantize_fp8_token(x_TI, bound, group) if scale is None else self.quantize_fp8_static(x_TI, scale)


@frozen(eq=False, kw_only=True)
class UnfusedProduct:
    """A product that ends in an activation, made of these."""

    product: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
    silu_mul_fp8: Callable[[Tensor, Tensor | None, float | None], QuantizedActivation]

    def linear_silu_mul_fp8(
        self,
        values_TI: Tensor,
        x_scale: Tensor,
        weight_OI: Tensor,
        weight_scale_O1: Tensor,
        dtype: torch.dtype,
        scale: Tensor,
    ) -> QuantizedActivation:
        """Return silu(gate) * up in FP8 by the static scale, for gate and up side by side in the product."""
        return self.silu_mul_fp8(self.product(values_TI, x_scale, weight_OI, weight_scale_O1, dtype), scale, None)


_QUANTISERS = ("quantize_fp8_static", "quantize_fp8_token")
FUSED = {
    "rms_norm_fp8": ("rms_norm", "add_rms_norm", *_QUANTISERS),
    "layer_norm_fp8": ("layer_norm", "add_layer_norm", *_QUANTISERS),
    "silu_mul_fp8": ("silu_mul", *_QUANTISERS),
    "gelu_fp8": ("gelu", *_QUANTISERS),
} | PARTS_OF_PRODUCTS  # what each does one after the other; a part that is fused itself stands before what it is a part of


def unfused(name: str, ops: Any) -> Callable[..., Any]:
    """Return the fused op of that name made of its parts in `ops`."""
    if name in PARTS_OF_PRODUCTS:
        product, silu_mul_fp8 = (getattr(ops, part) for part in PARTS_OF_PRODUCTS[name])
        return UnfusedProduct(product=product, silu_mul_fp8=silu_mul_fp8).linear_silu_mul_fp8
    made: Callable[..., Any] = getattr(Unfused(**{part.name: getattr(ops, part.name) for part in fields(Unfused)}), name)
    return made
