"""Activations to FP8: with a scale known before the run, or one for each token.

T tokens, I features; B elements of a block.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import QuantizedActivation
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.fp8 import empty_fp8, in_groups, to_fp8, token_scale
from paddock_triton.launch import launch
from paddock_triton.parts import launch_by_token, plain_at
from paddock_triton.rows import blocks_of, power_of_2, row_warps, unit_stride

# Percent of 4.3 TB/s on an H200 for 4096 tokens of 8192, 14848 and 28672. Static: blocks of 1024 on 4 warps 88, 91, 95; 2048 on 4
# 89, 95, 99; 2048 on 8 86, 88, 92. By token: the row in registers 87, 84, 72; read a second time out of the caches 80, 89, 81.
_BLOCK, _WARPS = 2048, 4
_IN_REGISTERS, _LOOP_WARPS = 8192, 16


@triton.jit
def _static_kernel(
    x_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor, stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Write a block of one row."""
    start_next()
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column_B = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    wait()
    x_B = plain_at(x_ptr + row * stride, column_B, WIDTH)
    tl.store(out_ptr + row * WIDTH + column_B, to_fp8(x_B, tl.load(scale_ptr)), mask=column_B < WIDTH)


@triton.jit
def _group_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, stride: tl.tensor, bound: tl.tensor, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of a row, and a scale for each of its groups."""
    start_next()
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row, start = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    column_B = start + tl.arange(0, BLOCK)
    wait()
    x_B = in_groups(scale_ptr, bound, row, start, plain_at(x_ptr + row * stride, column_B, WIDTH), WIDTH, BLOCK, GROUP)
    tl.store(out_ptr + row * WIDTH + column_B, x_B, mask=column_B < WIDTH)


@triton.jit
def _token_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, stride: tl.tensor, bound: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write one row and its scale."""
    start_next()
    row = tl.program_id(0).to(tl.int64)
    column_B = tl.arange(0, BLOCK)
    wait()
    if WIDTH <= BLOCK:
        x_B = plain_at(x_ptr + row * stride, column_B, WIDTH)
        scale = token_scale(tl.max(tl.abs(x_B)), bound)
        tl.store(out_ptr + row * WIDTH + column_B, to_fp8(x_B, scale), mask=column_B < WIDTH)
    else:
        largest_B = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            largest_B = tl.maximum(largest_B, tl.abs(plain_at(x_ptr + row * stride, start + column_B, WIDTH)))
        scale = token_scale(tl.max(largest_B), bound)
        for start in range(0, WIDTH, BLOCK):  # all of it again, out of the caches
            x_B = plain_at(x_ptr + row * stride, start + column_B, WIDTH)
            tl.store(out_ptr + row * WIDTH + start + column_B, to_fp8(x_B, scale), mask=start + column_B < WIDTH)
    tl.store(scale_ptr + row, scale)


@named("quantize_fp8_static")
def quantize_fp8_static(x_TI: Tensor, scale: Tensor) -> QuantizedActivation:
    """Return x / scale in FP8, saturated at 448; `scale` [] float32."""
    x_TI = unit_stride(x_TI)
    (tokens, width), out = x_TI.shape, empty_fp8(x_TI, x_TI.shape[1], scale)
    if tokens:
        grid = (tokens * blocks_of(width, _BLOCK),)
        launch(
            _static_kernel,
            grid,
            x_TI,
            scale,
            out.values_TI,
            x_TI.stride(0),
            WIDTH=width,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            **DEPENDENT,
        )
    return out


@named("quantize_fp8_token")
def quantize_fp8_token(x_TI: Tensor, bound: float | None = None, group: int | None = None) -> QuantizedActivation:
    """Return x in FP8 with a scale [T, 1] that maps each token's largest magnitude, at most `bound`, to 448.

    With a group, a power of two, the scale is [T, G], one for each run of so many features.
    """
    x_TI = unit_stride(x_TI)
    (tokens, width), out = x_TI.shape, empty_fp8(x_TI, x_TI.shape[1], None, group)
    if not tokens:
        return out
    if group is not None:
        launch(
            _group_kernel, (tokens * blocks_of(width, _BLOCK),),
            x_TI, out.values_TI, out.scale, x_TI.stride(0), bound, WIDTH=width, BLOCK=_BLOCK, GROUP=group, num_warps=_WARPS,
            **DEPENDENT,
        )  # fmt: skip
        return out
    launch_by_token(out, x_TI, bound, "plain", alone=partial(launch_rows, out, x_TI, bound))
    return out


def launch_rows(out: QuantizedActivation, x_TI: Tensor, bound: float | None) -> None:
    """Let one program take a row."""
    tokens, width = x_TI.shape
    block = min(power_of_2(width), _IN_REGISTERS)
    warps = row_warps(block) if width <= block else _LOOP_WARPS
    launch(
        _token_kernel, (tokens,),
        x_TI, out.values_TI, out.scale, x_TI.stride(0), bound, WIDTH=width, BLOCK=block, num_warps=warps, **DEPENDENT
    )  # fmt: skip
