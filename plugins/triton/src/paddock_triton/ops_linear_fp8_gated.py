"""FP8 products that end in silu(gate) * up in FP8 by a static scale: what the linear behind gate and up takes, in one launch.

T tokens, I input features, F feed-forward size, O = 2F output features, gate before up.

Up to 64 tokens end so where `linear_ring` serves the weight in whole tiles: a row's sum is then the plain product's,
whichever rows share its tile. Gate, up and silu are rounded where `silu_mul_fp8` rounds them, so the bits are those of
`linear_fp8` and then `silu_mul_fp8`, and, as few tokens are summed alike, of `linear_fp8_fast` and then that. All else is both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paddock.layers import QuantizedActivation
from paddock_triton.failures import named
from paddock_triton.fp8 import empty_fp8
from paddock_triton.linear_ring import launch_ring_gated, serves, tile_for
from paddock_triton.linear_ring_spec import EIGHT
from paddock_triton.ops_activation_fp8 import silu_mul_fp8
from paddock_triton.ops_linear_fp8 import linear_fp8, linear_fp8_fast
from paddock_triton.rows import unit_stride


@named("linear_silu_mul_fp8")
def linear_silu_mul_fp8(
    values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype, scale: Tensor
) -> QuantizedActivation:
    """Return silu(gate) * up in FP8 by the static `scale` [], for gate and up, the halves of x W^T, rounded to `dtype`.

    More than 64 tokens, and weights whose tiles programs would share, are `linear_fp8` and then `silu_mul_fp8`.
    """
    return _activated(values_TI, x_scale, weight_OI, weight_scale_O1, dtype, scale, product=linear_fp8)


@named("linear_silu_mul_fp8_fast")
def linear_silu_mul_fp8_fast(
    values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype, scale: Tensor
) -> QuantizedActivation:
    """Return what `linear_silu_mul_fp8` does; what it leaves to `linear_fp8` is `linear_fp8_fast`'s here."""
    return _activated(values_TI, x_scale, weight_OI, weight_scale_O1, dtype, scale, product=linear_fp8_fast)


def _activated(
    values_TI: Tensor,
    x_scale: Tensor,
    weight_OI: Tensor,
    weight_scale_O1: Tensor,
    dtype: torch.dtype,
    scale: Tensor,
    *,
    product: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor],
) -> QuantizedActivation:
    """Return the activation in FP8: by one kernel, or of `product` by the activation's."""
    tokens, width = values_TI.shape[0], weight_OI.shape[0] // 2
    assert weight_OI.shape[0] == 2 * width, f"{weight_OI.shape[0]} rows are not as many gates as ups"
    values_TI, weight_OI, weight_scale_O1 = unit_stride(values_TI), weight_OI.contiguous(), weight_scale_O1.contiguous()
    assert x_scale.ndim == 0 or x_scale.is_contiguous(), x_scale.stride()
    tile = tile_for(tokens, weight_OI) if width % EIGHT == 0 and serves(values_TI, weight_OI) else None
    if tile is None or tile.shared:
        return silu_mul_fp8(product(values_TI, x_scale, weight_OI, weight_scale_O1, dtype), scale, None)
    assert values_TI.dtype == weight_OI.dtype == torch.float8_e4m3fn, (values_TI.dtype, weight_OI.dtype)
    out = empty_fp8(values_TI, width, scale)
    launch_ring_gated(out, values_TI, x_scale, weight_OI, weight_scale_O1, dtype, tile)
    return out
