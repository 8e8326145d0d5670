"""Norms of the residual stream, one program a token, the row in registers: every input is read once.

T tokens, E model size; B the power of two from E up, what a row fills of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import TWO_DELTAS, QuantizedActivation, takes
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.fp8 import empty_fp8, scale_arguments, store_row
from paddock_triton.launch import launch
from paddock_triton.rows import power_of_2, row_warps, unit_stride


@triton.jit
def _read_row(
    x_ptr: tl.tensor, delta_ptr: tl.tensor, more_ptr: tl.tensor, sum_ptr: tl.tensor, x_stride: tl.tensor, delta_stride: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return this program's row in float32 [B], zeros beyond its width; with a delta, the rounded sum, which is stored too.

    `more_ptr`, contiguous, is added to the delta first, and their sum rounded.
    """
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.arange(0, BLOCK)
    inside_B = column_B < WIDTH
    x_B = tl.load(x_ptr + row * x_stride + column_B, mask=inside_B, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta_B = tl.load(delta_ptr + row * delta_stride + column_B, mask=inside_B, other=0.0)
        if more_ptr is not None:
            more_B = tl.load(more_ptr + row * WIDTH + column_B, mask=inside_B, other=0.0)
            delta_B = (delta_B.to(tl.float32) + more_B.to(tl.float32)).to(delta_B.dtype)
        x_B += delta_B.to(tl.float32)
        sum_B = x_B.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + column_B, sum_B, mask=inside_B)
        x_B = sum_B.to(tl.float32)
    return x_B


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor, delta_ptr: tl.tensor, weight_ptr: tl.tensor, sum_ptr: tl.tensor, out_ptr: tl.tensor,
    scale_ptr: tl.tensor, token_scale_ptr: tl.tensor, bound: tl.tensor,
    x_stride: tl.tensor, delta_stride: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Write the sum, if there is a delta, and its norm, rounded before and after the weight; then in FP8, if there is a scale."""
    start_next()
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.arange(0, BLOCK)
    inside_B = column_B < WIDTH
    weight_B = tl.load(weight_ptr + column_B, mask=inside_B, other=0.0)  # asked for first: it need not wait for the sum
    wait()
    x_B = _read_row(x_ptr, delta_ptr, None, sum_ptr, x_stride, delta_stride, WIDTH, BLOCK)
    scale = tl.rsqrt(tl.sum(x_B * x_B) / WIDTH + eps)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    h_B = ((x_B * scale).to(dtype).to(tl.float32) * weight_B.to(tl.float32)).to(dtype)
    store_row(out_ptr, scale_ptr, token_scale_ptr, bound, row, h_B, WIDTH, BLOCK, GROUP)


@triton.jit
def _layer_norm_kernel(
    x_ptr: tl.tensor, delta_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, more_ptr: tl.tensor, sum_ptr: tl.tensor,
    out_ptr: tl.tensor, scale_ptr: tl.tensor, token_scale_ptr: tl.tensor, bound: tl.tensor,
    x_stride: tl.tensor, delta_stride: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Write the sum, if there is a delta, and its norm, rounded once; then in FP8, if there is a scale."""
    start_next()
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.arange(0, BLOCK)
    inside_B = column_B < WIDTH
    weight_B = tl.load(weight_ptr + column_B, mask=inside_B, other=0.0)
    wait()
    x_B = _read_row(x_ptr, delta_ptr, more_ptr, sum_ptr, x_stride, delta_stride, WIDTH, BLOCK)
    centred_B = tl.where(inside_B, x_B - tl.sum(x_B) / WIDTH, 0.0)
    scale = tl.rsqrt(tl.sum(centred_B * centred_B) / WIDTH + eps)
    h_B = centred_B * scale * weight_B.to(tl.float32)
    if bias_ptr is not None:
        h_B += tl.load(bias_ptr + column_B, mask=inside_B, other=0.0).to(tl.float32)
    store_row(out_ptr, scale_ptr, token_scale_ptr, bound, row, h_B.to(x_ptr.dtype.element_ty), WIDTH, BLOCK, GROUP)


@named("rms_norm")
def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Return x / rms(x), rounded to x's dtype and then multiplied by the weight."""
    return _plain(_rms_norm_kernel, x_TE, None, (weight_E,), eps)[1]


@named("add_rms_norm")
def add_rms_norm(x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x + delta, its rms_norm)."""
    return _plain(_rms_norm_kernel, x_TE, delta_TE, (weight_E,), eps)


@named("rms_norm_fp8")
def rms_norm_fp8(
    x_TE: Tensor,
    delta_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    scale: Tensor | None,
    bound: float | None,
    group: int | None = None,
) -> tuple[Tensor, QuantizedActivation]:
    """Return (x + delta, its rms_norm in FP8), rounded to x's dtype in between."""
    return _fp8(_rms_norm_kernel, x_TE, delta_TE, (weight_E,), eps, scale, bound, group)


@named("layer_norm")
def layer_norm(x_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / std * weight + bias, rounded once."""
    return _plain(_layer_norm_kernel, x_TE, None, (weight_E, bias_E, None), eps)[1]


@takes(TWO_DELTAS)
@named("add_layer_norm")
def add_layer_norm(
    x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float, *, more_TE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (x + delta, its layer_norm). `more_TE` is added to the delta first."""
    return _plain(_layer_norm_kernel, x_TE, delta_TE, (weight_E, bias_E, _dense(more_TE)), eps)


@takes(TWO_DELTAS)
@named("layer_norm_fp8")
def layer_norm_fp8(
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
    """Return (x + delta, its layer_norm in FP8), rounded to x's dtype in between. `more_TE` is added to the delta first."""
    return _fp8(_layer_norm_kernel, x_TE, delta_TE, (weight_E, bias_E, _dense(more_TE)), eps, scale, bound, group)


def _dense(more_TE: Tensor | None) -> Tensor | None:
    return None if more_TE is None else more_TE.contiguous()


def _plain(
    kernel: Any, x_TE: Tensor, delta_TE: Tensor | None, vectors: tuple[Tensor | None, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """Return (sum, norm) in x's dtype; without a delta the sum is x."""
    x_TE = unit_stride(x_TE)
    sum_TE, h_TE = x_TE if delta_TE is None else torch.empty_like(x_TE), torch.empty_like(x_TE)
    _launch(kernel, x_TE, delta_TE, vectors, sum_TE, h_TE, (None, None, None), eps)
    return sum_TE, h_TE


def _fp8(
    kernel: Any,
    x_TE: Tensor,
    delta_TE: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    eps: float,
    scale: Tensor | None,
    bound: float | None,
    group: int | None,
) -> tuple[Tensor, QuantizedActivation]:
    """Return (sum, norm in FP8); without a delta the sum is x."""
    x_TE = unit_stride(x_TE)
    sum_TE, h = x_TE if delta_TE is None else torch.empty_like(x_TE), empty_fp8(x_TE, x_TE.shape[1], scale, group)
    scales = scale_arguments(h, scale, bound)
    _launch(kernel, x_TE, delta_TE, vectors, sum_TE, h.values_TI, scales, eps, None if scale is not None else group)
    return sum_TE, h


def _launch(
    kernel: Any,
    x_TE: Tensor,
    delta_TE: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    sum_TE: Tensor,
    h_TE: Tensor,
    scales: tuple[Tensor | None, Tensor | None, float | None],
    eps: float,
    group: int | None = None,
) -> None:
    delta_TE, written_TE = (None, None) if delta_TE is None else (unit_stride(delta_TE), sum_TE)
    tokens, width = x_TE.shape
    block = power_of_2(width)
    strides = x_TE.stride(0), 0 if delta_TE is None else delta_TE.stride(0)
    if tokens:
        launch(
            kernel, (tokens,),
            x_TE, delta_TE, *vectors, written_TE, h_TE, *scales, *strides, eps, WIDTH=width, BLOCK=block, GROUP=group,
            num_warps=row_warps(block), **DEPENDENT,
        )  # fmt: skip
