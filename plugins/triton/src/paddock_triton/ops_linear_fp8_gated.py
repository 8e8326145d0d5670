"""FP8 products that end in silu(gate) * up in FP8 by a static scale: what the linear behind gate and up takes, in one launch.

T tokens, I input features, F feed-forward size, O = 2F output features, gate before up; B rows of the weight in a block, half of
them gates, H = B / 2 features; M tokens of a tile.

A block holds the gate and the up row of each of its features. Rows of a product are summed independently of each other, here by
the functions of `ops_linear_fp8`, and gate, up and silu are rounded where `silu_mul_fp8` rounds them: the bits are those of
`linear_fp8` and then `silu_mul_fp8`, and, as few tokens are summed alike, of `linear_fp8_fast` and then that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import QuantizedActivation
from paddock_triton.dependence import DEPENDENT, start_next
from paddock_triton.failures import named
from paddock_triton.fp8 import empty_fp8, to_fp8
from paddock_triton.launch import launch
from paddock_triton.ops_activation import silu_times
from paddock_triton.ops_activation_fp8 import silu_mul_fp8
from paddock_triton.ops_linear_fp8 import (
    FEW,
    MOST_TOKENS,
    ONE,
    FewTile,
    OneTile,
    few_product,
    linear_fp8,
    linear_fp8_fast,
    one_product,
)
from paddock_triton.rows import blocks_of, power_of_2, unit_stride

# Of one token: with fewer a program has so little to read that activating at its end takes longer than a kernel behind it. On an
# H200, microseconds of a layer of 70B (8,192), activated in the product and behind it: one token 211.7, 213.5; 64 tokens 304.7,
# 309.5; of 8B (4,096): one token 71.2, 69.7; 64 tokens 344.4, 345.8 (`python -m tests.bench.layer_stack`,
# while attention rotated as well, which decision 52 did not keep).
LEAST_INPUTS = 8192
_APART = tl.constexpr(8)  # rows between a feature's gate and its up: the matrix unit gives a thread both of them
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _gated(gate: tl.tensor, up: tl.tensor, out_scale: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Return silu(gate) * up in FP8 by the static scale, gate and up rounded to DTYPE first."""
    h = silu_times(gate.to(DTYPE).to(tl.float32), up.to(DTYPE).to(tl.float32), DTYPE)
    return to_fp8(h.to(tl.float32), out_scale)


@triton.jit
def _gated_one_kernel(
    x_ptr: tl.tensor, x_scale_ptr: tl.tensor, weight_ptr: tl.tensor, scale_ptr: tl.tensor, out_scale_ptr: tl.tensor,
    out_ptr: tl.tensor, WIDTH: tl.constexpr, IN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of one token's features: a row of the block is a gate, the next the up that goes with it."""
    start_next()
    out_scale = tl.load(out_scale_ptr)  # a parameter, as the weight is: at hand when the sums are
    b_B = tl.arange(0, BLOCK_B)
    feature_B = tl.program_id(0) * (BLOCK_B // 2) + b_B // 2
    inside_B, o_B = feature_B < WIDTH, b_B % 2 * WIDTH + feature_B
    even: tl.constexpr = WIDTH % (BLOCK_B // 2) == 0 and IN % BLOCK_J == 0
    y_B = one_product(x_ptr, x_scale_ptr, weight_ptr, scale_ptr, o_B, inside_B, IN, even, BLOCK_B, BLOCK_J)
    gate_H, up_H = tl.split(tl.reshape(y_B, [BLOCK_B // 2, 2]))
    f_H = tl.program_id(0) * (BLOCK_B // 2) + tl.arange(0, BLOCK_B // 2)
    tl.store(out_ptr + f_H, _gated(gate_H, up_H, out_scale, DTYPE), mask=f_H < WIDTH)


@triton.jit(do_not_specialize=["tokens"])  # as the plain kernel of few tokens
def _gated_few_kernel(
    x_ptr: tl.tensor, x_scale_ptr: tl.tensor, weight_ptr: tl.tensor, scale_ptr: tl.tensor, out_scale_ptr: tl.tensor,
    out_ptr: tl.tensor, tokens: tl.tensor, x_stride: tl.tensor, PER_TOKEN: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of a few tokens' features: eight rows of gates, the eight of ups that go with them, and so on."""
    start_next()
    out_scale = tl.load(out_scale_ptr)
    b_B, m_M = tl.arange(0, BLOCK_B), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature_B = tl.program_id(0) * (BLOCK_B // 2) + b_B // (2 * _APART) * _APART + b_B % _APART
    inside_B, o_B = feature_B < WIDTH, b_B // _APART % 2 * WIDTH + feature_B
    even: tl.constexpr = WIDTH % (BLOCK_B // 2) == 0 and IN % BLOCK_J == 0
    y_BM = few_product(
        x_ptr, x_scale_ptr, weight_ptr, scale_ptr, o_B, inside_B, m_M, m_M < tokens, x_stride, PER_TOKEN, IN, even, BLOCK_M,
        BLOCK_B, BLOCK_J, STAGES, AHEAD,
    )  # fmt: skip
    y_RPAM = tl.reshape(y_BM, [BLOCK_B // (2 * _APART), 2, _APART, BLOCK_M])  # R runs of rows, P gate or up, A features
    gate_RAM, up_RAM = tl.split(tl.permute(y_RPAM, (0, 2, 3, 1)))
    h_HM = tl.reshape(_gated(gate_RAM, up_RAM, out_scale, DTYPE), [BLOCK_B // 2, BLOCK_M])
    f_H = tl.program_id(0) * (BLOCK_B // 2) + tl.arange(0, BLOCK_B // 2)
    out_HM = out_ptr + m_M.to(tl.int64)[None, :] * WIDTH + f_H[:, None]
    tl.store(out_HM, h_HM, mask=(f_H < WIDTH)[:, None] & (m_M < tokens)[None, :])


@named("linear_silu_mul_fp8")
def linear_silu_mul_fp8(
    values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype, scale: Tensor
) -> QuantizedActivation:
    """Return silu(gate) * up in FP8 by the static `scale` [], for gate and up, the halves of x W^T, rounded to `dtype`.

    More than 64 tokens, and one of fewer than 8,192 features, are `linear_fp8` and then `silu_mul_fp8`.
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
    if tokens > MOST_TOKENS or (tokens == 1 and weight_OI.shape[1] < LEAST_INPUTS):
        return silu_mul_fp8(product(values_TI, x_scale, weight_OI, weight_scale_O1, dtype), scale, None)
    values_TI, weight_OI, weight_scale_O1 = unit_stride(values_TI), weight_OI.contiguous(), weight_scale_O1.contiguous()
    assert values_TI.dtype == weight_OI.dtype == torch.float8_e4m3fn, (values_TI.dtype, weight_OI.dtype)
    assert x_scale.ndim == 0 or x_scale.is_contiguous(), x_scale.stride()
    out = empty_fp8(values_TI, width, scale)
    if tokens == 1:
        launch_gated_one(out, values_TI, x_scale, weight_OI, weight_scale_O1, dtype, ONE)
    elif tokens:
        tile = FEW[max(16, power_of_2(tokens))]
        launch_gated_few(out, values_TI, x_scale, weight_OI, weight_scale_O1, dtype, tile)
    return out


def launch_gated_one(
    out: QuantizedActivation,
    values_TI: Tensor,
    x_scale: Tensor,
    weight_OI: Tensor,
    weight_scale_O1: Tensor,
    dtype: torch.dtype,
    tile: OneTile,
) -> None:
    """Multiply one token by fused multiply-adds, and activate."""
    width, inputs = out.values_TI.shape[1], weight_OI.shape[1]
    block_j = max(min(tile.block_i, power_of_2(inputs)), 16)
    launch(
        _gated_one_kernel, (blocks_of(width, tile.block_o // 2),),
        values_TI, x_scale, weight_OI, weight_scale_O1, out.scale, out.values_TI, WIDTH=width, IN=inputs, DTYPE=_DTYPES[dtype],
        BLOCK_B=tile.block_o, BLOCK_J=block_j, num_warps=tile.warps, **DEPENDENT,
    )  # fmt: skip


def launch_gated_few(
    out: QuantizedActivation,
    values_TI: Tensor,
    x_scale: Tensor,
    weight_OI: Tensor,
    weight_scale_O1: Tensor,
    dtype: torch.dtype,
    tile: FewTile,
) -> None:
    """Multiply tokens by the matrix unit, `tile.rows` at a time, and activate."""
    (tokens, width), inputs = out.values_TI.shape, weight_OI.shape[1]
    launch(
        _gated_few_kernel, (blocks_of(width, tile.block_o // 2), blocks_of(tokens, tile.rows)),
        values_TI, x_scale, weight_OI, weight_scale_O1, out.scale, out.values_TI, tokens, values_TI.stride(0),
        PER_TOKEN=int(x_scale.ndim > 0), WIDTH=width, IN=inputs, DTYPE=_DTYPES[dtype], BLOCK_M=tile.rows, BLOCK_B=tile.block_o,
        BLOCK_J=tile.block_i, STAGES=tile.stages, AHEAD=tile.ahead, num_warps=tile.warps, **DEPENDENT,
    )  # fmt: skip
