"""Activations that hand FP8 to the linear behind them: values rounded to their input's dtype, then quantised.

By a static scale or one a group a program takes a block of a row. With a scale a token it holds a whole row in its registers, or
programs share the row (`parts`).

T tokens, F feed-forward size; B elements of a block.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import QuantizedActivation
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.fp8 import empty_fp8, in_groups, store_row, to_fp8
from paddock_triton.launch import launch
from paddock_triton.ops_activation import GELU_BLOCK, SILU_BLOCK, WARPS, place
from paddock_triton.parts import MOST_ALONE, Kind, launch_by_token, values_at
from paddock_triton.rows import blocks_of, power_of_2, row_warps, unit_stride


@triton.jit
def _static_kernel(
    x_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor, stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of a row by the static scale."""
    start_next()
    row, column_B = place(WIDTH, BLOCK)
    wait()
    h_B = values_at(x_ptr + row * stride, column_B, WIDTH, KIND)
    tl.store(out_ptr + row * WIDTH + column_B, to_fp8(h_B, tl.load(scale_ptr)), mask=column_B < WIDTH)


@triton.jit
def _group_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, stride: tl.tensor, bound: tl.tensor, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of a row, and a scale for each of its groups."""
    start_next()
    row, column_B = place(WIDTH, BLOCK)
    start = tl.program_id(0) % ((WIDTH + BLOCK - 1) // BLOCK) * BLOCK
    wait()
    h_B = values_at(x_ptr + row * stride, column_B, WIDTH, KIND)
    h_B = in_groups(scale_ptr, bound, row, start, h_B, WIDTH, BLOCK, GROUP)
    tl.store(out_ptr + row * WIDTH + column_B, h_B, mask=column_B < WIDTH)


@triton.jit
def _token_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, stride: tl.tensor, bound: tl.tensor, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Write one row and its scale."""
    start_next()
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.arange(0, BLOCK)
    wait()
    h_B = values_at(x_ptr + row * stride, column_B, WIDTH, KIND)
    store_row(out_ptr, None, scale_ptr, bound, row, h_B, WIDTH, BLOCK, None)


@named("silu_mul_fp8")
def silu_mul_fp8(gate_up_T2F: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None) -> QuantizedActivation:
    """Return silu(gate) * up in FP8, rounded to its input's dtype in between."""
    return _quantized(gate_up_T2F, gate_up_T2F.shape[1] // 2, scale, bound, group, block=SILU_BLOCK, kind="silu_mul")


@named("gelu_fp8")
def gelu_fp8(x_TF: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None) -> QuantizedActivation:
    """Return gelu(x) in FP8, rounded to x's dtype in between."""
    return _quantized(x_TF, x_TF.shape[1], scale, bound, group, block=GELU_BLOCK, kind="gelu")


def _quantized(
    x_TX: Tensor, width: int, scale: Tensor | None, bound: float | None, group: int | None, *, block: int, kind: Kind
) -> QuantizedActivation:
    x_TX = unit_stride(x_TX)
    tokens, out = x_TX.shape[0], empty_fp8(x_TX, width, scale, group)
    if not tokens:
        return out
    if scale is not None:
        grid = (tokens * blocks_of(width, block),)
        launch(
            _static_kernel, grid,
            x_TX, scale, out.values_TI, x_TX.stride(0), WIDTH=width, BLOCK=block, KIND=kind, num_warps=WARPS, **DEPENDENT,
        )  # fmt: skip
        return out
    if group is not None:
        launch(
            _group_kernel, (tokens * blocks_of(width, block),),
            x_TX, out.values_TI, out.scale, x_TX.stride(0), bound, WIDTH=width, BLOCK=block, GROUP=group, KIND=kind,
            num_warps=WARPS, **DEPENDENT,
        )  # fmt: skip
        return out
    launch_by_token(out, x_TX, bound, kind, alone=partial(launch_rows, out, x_TX, bound, kind))
    return out


def launch_rows(out: QuantizedActivation, x_TX: Tensor, bound: float | None, kind: Kind) -> None:
    """Let one program hold a row, of at most MOST_ALONE features, in its registers."""
    tokens, width = out.values_TI.shape
    assert width <= MOST_ALONE, f"a row of {width} features does not fit a program's registers"
    block = power_of_2(width)
    launch(
        _token_kernel, (tokens,),
        x_TX, out.values_TI, out.scale, x_TX.stride(0), bound, WIDTH=width, BLOCK=block, KIND=kind, num_warps=row_warps(block),
        **DEPENDENT,
    )  # fmt: skip
