"""The one way a number becomes FP8 e4m3 here.

T tokens, I features, G groups of V of them; B elements of a block, a row of them or a part of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paddock.errors import KernelError
from paddock.layers import QuantizedActivation
from paddock_triton.rows import blocks_of

FP8_MAX = tl.constexpr(448.0)
_MIN_SCALE = tl.constexpr(1.0 / (448.0 * 512.0))  # the floor of FBGEMM's row-wise scales
_MOST_GROUP = 1024  # features: the least block that a program quantises by groups
_ABOVE = tl.constexpr(456.0)  # rounds to 448


@triton.jit
def quotient(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return x / scale (float32, rounded as IEEE division does), no larger than rounds to 448 in FP8 e4m3; NaN stays NaN.

    One division a scale and a Newton step a value: a division a value took 1.7 to 2.5 times as long for one token on an H200, and
    both agree on 4096 x 8192 random values at four scales. A negative zero loses its sign.
    """
    reach = tl.zeros_like(x) + scale * _ABOVE
    inverse = tl.zeros_like(x) + tl.div_rn(1.0, scale)
    x = tl.clamp(x, -reach, reach, propagate_nan=tl.PropagateNan.ALL)
    guess = x * inverse
    return tl.fma(tl.fma(-guess, tl.zeros_like(x) + scale, x), inverse, guess)


@triton.jit
def to_fp8(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return x / scale, as `quotient` does, in FP8 e4m3: saturated at 448."""
    return quotient(x, scale).to(tl.float8e4nv)


@triton.jit
def emitted(x: tl.tensor, DTYPE: tl.constexpr, scale_ptr: tl.tensor) -> tl.tensor:
    """Return x rounded to DTYPE, and then in FP8 where there is a static scale."""
    y = x.to(DTYPE)
    if scale_ptr is not None:
        y = to_fp8(y.to(tl.float32), tl.load(scale_ptr))
    return y


@triton.jit
def token_scale(largest: tl.tensor, bound: tl.tensor) -> tl.tensor:
    """Return what maps the largest magnitude, or the bound if there is one below it, to 448."""
    if bound is not None:
        largest = tl.minimum(largest, bound)
    return tl.maximum(tl.div_rn(largest, FP8_MAX), _MIN_SCALE)


@triton.jit
def in_groups(
    token_scale_ptr: tl.tensor, bound: tl.tensor, row: tl.tensor, start: tl.tensor, h_B: tl.tensor, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return part of a row, from `start` on, whole groups of it, in FP8 by scales of its groups, which are written."""
    group: tl.constexpr = min(GROUP, BLOCK)
    groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    h_GV = tl.reshape(h_B.to(tl.float32), [BLOCK // group, group])
    scale_G = token_scale(tl.max(tl.abs(h_GV), 1), bound)
    g_G = start // GROUP + tl.arange(0, BLOCK // group)
    tl.store(token_scale_ptr + row * groups + g_G, scale_G, mask=g_G < groups)
    return tl.reshape(to_fp8(h_GV, scale_G[:, None]), [BLOCK])


@triton.jit
def store_row(
    out_ptr: tl.tensor, scale_ptr: tl.tensor, token_scale_ptr: tl.tensor, bound: tl.tensor, row: tl.tensor, h_B: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Write a whole row, zero beyond its width: as it is, in FP8 by the static scale, or by its own, which are written too.

    With a GROUP, a power of two, each so many features have a scale of their own.
    """
    # left alone, sixteen FP8 values a thread would spread to the sums before them: in another order than those of a plain row
    column_B = tl.max_contiguous(tl.arange(0, BLOCK), 8) if BLOCK >= 8 else tl.arange(0, BLOCK)
    if scale_ptr is not None:
        h_B = to_fp8(h_B.to(tl.float32), tl.load(scale_ptr))
    elif GROUP is not None:
        h_B = in_groups(token_scale_ptr, bound, row, 0, h_B, WIDTH, BLOCK, GROUP)
    elif token_scale_ptr is not None:
        h_B = h_B.to(tl.float32)
        scale = token_scale(tl.max(tl.abs(h_B)), bound)
        tl.store(token_scale_ptr + row, scale)
        h_B = to_fp8(h_B, scale)
    tl.store(out_ptr + row * WIDTH + column_B, h_B, mask=column_B < WIDTH)


def empty_fp8(x_TX: Tensor, width: int, scale: Tensor | None, group: int | None = None) -> QuantizedActivation:
    """Return memory for x's tokens in FP8 [T, width] with the static scale, or with memory for one a token (and group) [T, G].

    Raises KernelError for a group that no kernel is for.
    """
    if group is not None and (group & (group - 1) or group > _MOST_GROUP):
        raise KernelError(
            f"no kernel is for groups of {group} features, only for powers of two up to {_MOST_GROUP}",
            fix="choose the core's own in plain torch for all that emits FP8: --op quantize_fp8_token=paddock, and so on",
        )
    values_TI = x_TX.new_empty((x_TX.shape[0], width), dtype=torch.float8_e4m3fn)
    if scale is None:
        scale = x_TX.new_empty((x_TX.shape[0], 1 if group is None else blocks_of(width, group)), dtype=torch.float32)
    return QuantizedActivation(values_TI, scale)


def scale_arguments(
    out: QuantizedActivation, scale: Tensor | None, bound: float | None
) -> tuple[Tensor | None, Tensor | None, float | None]:
    """Return what a kernel is given of scales: the static one, where each token's own goes, the bound of those."""
    return (None, out.scale, bound) if scale is None else (scale, None, None)
