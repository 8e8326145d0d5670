"""Norms of the residual stream, one program a token, the row in registers: every input is read once.

T tokens, E model size; B the power of two from E up, what a row fills of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.launch import launch
from paddock_triton.rows import power_of_2, row_warps, unit_stride


@triton.jit
def _read_row(
    x_ptr: tl.tensor, delta_ptr: tl.tensor, sum_ptr: tl.tensor, x_stride: tl.tensor, delta_stride: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return this program's row in float32 [B], zeros beyond its width; with a delta, the rounded sum, which is stored too."""
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.arange(0, BLOCK)
    inside_B = column_B < WIDTH
    x_B = tl.load(x_ptr + row * x_stride + column_B, mask=inside_B, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x_B += tl.load(delta_ptr + row * delta_stride + column_B, mask=inside_B, other=0.0).to(tl.float32)
        sum_B = x_B.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + column_B, sum_B, mask=inside_B)
        x_B = sum_B.to(tl.float32)
    return x_B


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor, delta_ptr: tl.tensor, weight_ptr: tl.tensor, sum_ptr: tl.tensor, out_ptr: tl.tensor,
    x_stride: tl.tensor, delta_stride: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write the sum, if there is a delta, and its norm, rounded before and after the weight."""
    start_next()
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.arange(0, BLOCK)
    inside_B = column_B < WIDTH
    weight_B = tl.load(weight_ptr + column_B, mask=inside_B, other=0.0)  # asked for first: it need not wait for the sum
    wait()
    x_B = _read_row(x_ptr, delta_ptr, sum_ptr, x_stride, delta_stride, WIDTH, BLOCK)
    scale = tl.rsqrt(tl.sum(x_B * x_B) / WIDTH + eps)
    h_B = (x_B * scale).to(out_ptr.dtype.element_ty).to(tl.float32) * weight_B.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column_B, h_B.to(out_ptr.dtype.element_ty), mask=inside_B)


@triton.jit
def _layer_norm_kernel(
    x_ptr: tl.tensor, delta_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, sum_ptr: tl.tensor, out_ptr: tl.tensor,
    x_stride: tl.tensor, delta_stride: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write the sum, if there is a delta, and its norm, rounded once."""
    start_next()
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.arange(0, BLOCK)
    inside_B = column_B < WIDTH
    weight_B = tl.load(weight_ptr + column_B, mask=inside_B, other=0.0)
    wait()
    x_B = _read_row(x_ptr, delta_ptr, sum_ptr, x_stride, delta_stride, WIDTH, BLOCK)
    centred_B = tl.where(inside_B, x_B - tl.sum(x_B) / WIDTH, 0.0)
    scale = tl.rsqrt(tl.sum(centred_B * centred_B) / WIDTH + eps)
    h_B = centred_B * scale * weight_B.to(tl.float32)
    if bias_ptr is not None:
        h_B += tl.load(bias_ptr + column_B, mask=inside_B, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column_B, h_B.to(out_ptr.dtype.element_ty), mask=inside_B)


@named("rms_norm")
def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Return x / rms(x), rounded to x's dtype and then multiplied by the weight."""
    return _rms_norm(x_TE, None, None, weight_E, eps)


@named("add_rms_norm")
def add_rms_norm(x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x + delta, its rms_norm)."""
    x_TE = unit_stride(x_TE)
    sum_TE = torch.empty_like(x_TE)
    return sum_TE, _rms_norm(x_TE, delta_TE, sum_TE, weight_E, eps)


@named("layer_norm")
def layer_norm(x_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / std * weight + bias, rounded once."""
    return _layer_norm(x_TE, None, None, weight_E, bias_E, eps)


@named("add_layer_norm")
def add_layer_norm(x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x + delta, its layer_norm)."""
    x_TE = unit_stride(x_TE)
    sum_TE = torch.empty_like(x_TE)
    return sum_TE, _layer_norm(x_TE, delta_TE, sum_TE, weight_E, bias_E, eps)


def _rms_norm(x_TE: Tensor, delta_TE: Tensor | None, sum_TE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
    x_TE, delta_TE = unit_stride(x_TE), None if delta_TE is None else unit_stride(delta_TE)
    (tokens, width), h_TE = x_TE.shape, torch.empty_like(x_TE)
    block = power_of_2(width)
    strides = x_TE.stride(0), 0 if delta_TE is None else delta_TE.stride(0)
    if tokens:
        launch(
            _rms_norm_kernel, (tokens,),
            x_TE, delta_TE, weight_E, sum_TE, h_TE, *strides, eps, WIDTH=width, BLOCK=block, num_warps=row_warps(block),
            **DEPENDENT,
        )  # fmt: skip
    return h_TE


def _layer_norm(
    x_TE: Tensor, delta_TE: Tensor | None, sum_TE: Tensor | None, weight_E: Tensor, bias_E: Tensor | None, eps: float
) -> Tensor:
    x_TE, delta_TE = unit_stride(x_TE), None if delta_TE is None else unit_stride(delta_TE)
    (tokens, width), h_TE = x_TE.shape, torch.empty_like(x_TE)
    block = power_of_2(width)
    strides = x_TE.stride(0), 0 if delta_TE is None else delta_TE.stride(0)
    if tokens:
        launch(
            _layer_norm_kernel, (tokens,),
            x_TE, delta_TE, weight_E, bias_E, sum_TE, h_TE, *strides, eps, WIDTH=width, BLOCK=block, num_warps=row_warps(block),
            **DEPENDENT,
        )  # fmt: skip
    return h_TE
