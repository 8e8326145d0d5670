"""Activations to FP8: with a scale known before the run, or one for each token.

T tokens, I features; B elements of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import QuantizedActivation
from paddock_triton.counters import counters
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.fp8 import empty_fp8, in_groups, to_fp8, token_scale
from paddock_triton.launch import launch
from paddock_triton.meeting import (
    LEAST_QUANTISATION,
    MOST_ALONE,
    PARTS,
    TWICE_PART,
    largest_of_parts,
    largest_of_row,
    part_of,
    parts_ahead,
    shared_scale,
)
from paddock_triton.ops_activation import place
from paddock_triton.rows import blocks_of, power_of_2, row_warps, unit_stride

# Percent of 4.3 TB/s on an H200 for 4096 tokens of 8192, 14848 and 28672. Static: blocks of 1024 on 4 warps 88, 91, 95; 2048 on 4
# 89, 95, 99; 2048 on 8 86, 88, 92. By token: the row in registers 87, 84, 72; read a second time out of the caches 80, 89, 81.
_BLOCK, _WARPS = 2048, 4
_IN_REGISTERS, _LOOP_WARPS = 8192, 16


@triton.jit
def _load(row_ptr: tl.tensor, column_B: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Return these columns of a row in float32 [B], zeros beyond its width."""
    return tl.load(row_ptr + column_B, mask=column_B < WIDTH, other=0.0).to(tl.float32)


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
    x_B = _load(x_ptr + row * stride, column_B, WIDTH)
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
    x_B = in_groups(scale_ptr, bound, row, start, _load(x_ptr + row * stride, column_B, WIDTH), WIDTH, BLOCK, GROUP)
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
        x_B = _load(x_ptr + row * stride, column_B, WIDTH)
        scale = token_scale(tl.max(tl.abs(x_B)), bound)
        tl.store(out_ptr + row * WIDTH + column_B, to_fp8(x_B, scale), mask=column_B < WIDTH)
    else:
        largest_B = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            largest_B = tl.maximum(largest_B, tl.abs(_load(x_ptr + row * stride, start + column_B, WIDTH)))
        scale = token_scale(tl.max(largest_B), bound)
        for start in range(0, WIDTH, BLOCK):  # all of it again, out of the caches
            x_B = _load(x_ptr + row * stride, start + column_B, WIDTH)
            tl.store(out_ptr + row * WIDTH + start + column_B, to_fp8(x_B, scale), mask=start + column_B < WIDTH)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _shared_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, largest_ptr: tl.tensor, counters_ptr: tl.tensor,
    stride: tl.tensor, bound: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Write a part of a row by the row's own scale, which its programs find together."""
    start_next()
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    column_B = part * BLOCK + tl.arange(0, BLOCK)
    wait()
    x_B = _load(x_ptr + row * stride, column_B, WIDTH)
    scale = shared_scale(x_B, largest_ptr, counters_ptr, row, part, bound, parts, LANES)
    tl.store(scale_ptr + row, scale, mask=part == 0)
    tl.store(out_ptr + row * WIDTH + column_B, to_fp8(x_B, scale), mask=column_B < WIDTH)


@triton.jit
def _largest_kernel(
    x_ptr: tl.tensor, largest_ptr: tl.tensor, stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Write down the largest magnitude of a part of a row."""
    start_next()
    row, column_B = place(WIDTH, BLOCK)
    wait()
    tl.store(largest_ptr + tl.program_id(0), tl.max(tl.abs(_load(x_ptr + row * stride, column_B, WIDTH))))


@triton.jit
def _part_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, largest_ptr: tl.tensor, stride: tl.tensor, bound: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Write a part of a row by the row's scale, which follows from what was written down of all parts."""
    start_next()
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row, column_B = place(WIDTH, BLOCK)
    wait()
    x_B = _load(x_ptr + row * stride, column_B, WIDTH)
    scale = token_scale(largest_of_row(largest_ptr, row, parts, LANES), bound)
    tl.store(scale_ptr + row, scale, mask=tl.program_id(0) % parts == 0)
    tl.store(out_ptr + row * WIDTH + column_B, to_fp8(x_B, scale), mask=column_B < WIDTH)


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
    for each in parts_ahead(width, x_TI.device, LEAST_QUANTISATION):
        launch_shared(out, x_TI, bound, each)
    part = part_of(tokens, width, x_TI.device, LEAST_QUANTISATION)
    if part is not None:
        launch_shared(out, x_TI, bound, part)
    elif width > MOST_ALONE:
        launch_twice(out, x_TI, bound, TWICE_PART)
    else:
        launch_rows(out, x_TI, bound)
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


def launch_shared(out: QuantizedActivation, x_TI: Tensor, bound: float | None, part: int) -> None:
    """Let programs share a row, each `part` of its features."""
    tokens, width = x_TI.shape
    largest_TP = largest_of_parts(tokens, width, part, x_TI)
    launch(
        _shared_kernel, (largest_TP.numel(),),
        x_TI, out.values_TI, out.scale, largest_TP, counters(x_TI.device, tokens), x_TI.stride(0), bound, WIDTH=width, BLOCK=part,
        LANES=power_of_2(largest_TP.shape[1]), num_warps=PARTS[part], **DEPENDENT,
    )  # fmt: skip


def launch_twice(out: QuantizedActivation, x_TI: Tensor, bound: float | None, part: int) -> None:
    """Let programs each take `part` features of a row, in two launches: the first finds what the second's scale needs."""
    tokens, width = x_TI.shape
    largest_TP = largest_of_parts(tokens, width, part, x_TI)
    grid, warps = (largest_TP.numel(),), PARTS[part]
    launch(
        _largest_kernel, grid, x_TI, largest_TP, x_TI.stride(0), WIDTH=width, BLOCK=part, num_warps=warps, **DEPENDENT
    )  # fmt: skip
    launch(
        _part_kernel, grid,
        x_TI, out.values_TI, out.scale, largest_TP, x_TI.stride(0), bound, WIDTH=width, BLOCK=part,
        LANES=power_of_2(largest_TP.shape[1]), num_warps=warps, **DEPENDENT,
    )  # fmt: skip
