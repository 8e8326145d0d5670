"""Activations that hand FP8 to the linear behind them, in one launch: values rounded to their input's dtype, then quantised.

T tokens, F feed-forward size; B elements of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import QuantizedActivation
from paddock_triton.counters import counters
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.fp8 import empty_fp8, in_groups, store_row, to_fp8, token_scale
from paddock_triton.launch import launch
from paddock_triton.meeting import (
    LEAST_ACTIVATION,
    MOST_ALONE,
    PARTS,
    TWICE_PART,
    largest_of_parts,
    largest_of_row,
    part_of,
    parts_ahead,
    shared_scale,
)
from paddock_triton.ops_activation import GELU_BLOCK, SILU_BLOCK, WARPS, gelu_at, place, silu_mul_at
from paddock_triton.rows import blocks_of, power_of_2, unit_stride

# A scale a token takes the whole row. Where tokens are many a program holds it alone: one of Llama-70B's 28,672 still fits into
# the registers of 16 warps (SiLU on an H200: 64 tokens 5.5 us, 4096 202). A wider one takes two launches; by one program,
# computed twice a block at a time, it is what tests and `tests/bench/shared_rows.py` hold these to.
_BLOCK, _MOST_WARPS = 8192, 16


@triton.jit
def _at(row_ptr: tl.tensor, column_B: tl.tensor, WIDTH: tl.constexpr, GATED: tl.constexpr) -> tl.tensor:
    """Return these columns of a row of the activation [B]."""
    if GATED:
        h_B = silu_mul_at(row_ptr, column_B, WIDTH)
    else:
        h_B = gelu_at(row_ptr, column_B, WIDTH)
    return h_B


@triton.jit
def _static_kernel(
    x_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor, stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of a row by the static scale."""
    start_next()
    row, column_B = place(WIDTH, BLOCK)
    wait()
    h_B = _at(x_ptr + row * stride, column_B, WIDTH, GATED).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column_B, to_fp8(h_B, tl.load(scale_ptr)), mask=column_B < WIDTH)


@triton.jit
def _group_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, stride: tl.tensor, bound: tl.tensor, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of a row, and a scale for each of its groups."""
    start_next()
    row, column_B = place(WIDTH, BLOCK)
    start = tl.program_id(0) % ((WIDTH + BLOCK - 1) // BLOCK) * BLOCK
    wait()
    h_B = _at(x_ptr + row * stride, column_B, WIDTH, GATED)
    h_B = in_groups(scale_ptr, bound, row, start, h_B, WIDTH, BLOCK, GROUP)
    tl.store(out_ptr + row * WIDTH + column_B, h_B, mask=column_B < WIDTH)


@triton.jit
def _token_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, stride: tl.tensor, bound: tl.tensor, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, GATED: tl.constexpr,
) -> None:  # fmt: skip
    """Write one row and its scale."""
    start_next()
    row = tl.program_id(0).to(tl.int64)
    row_ptr, column_B = x_ptr + row * stride, tl.arange(0, BLOCK)
    wait()
    if WIDTH <= BLOCK:
        store_row(out_ptr, None, scale_ptr, bound, row, _at(row_ptr, column_B, WIDTH, GATED), WIDTH, BLOCK, None)
    else:
        largest_B = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            largest_B = tl.maximum(largest_B, tl.abs(_at(row_ptr, start + column_B, WIDTH, GATED).to(tl.float32)))
        scale = token_scale(tl.max(largest_B), bound)
        tl.store(scale_ptr + row, scale)
        for start in range(0, WIDTH, BLOCK):  # all of it again, out of the caches
            h_B = _at(row_ptr, start + column_B, WIDTH, GATED).to(tl.float32)
            tl.store(out_ptr + row * WIDTH + start + column_B, to_fp8(h_B, scale), mask=start + column_B < WIDTH)


@triton.jit
def _shared_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, largest_ptr: tl.tensor, counters_ptr: tl.tensor,
    stride: tl.tensor, bound: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, GATED: tl.constexpr,
) -> None:  # fmt: skip
    """Write a part of a row by the row's own scale, which its programs find together."""
    start_next()
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    part = tl.program_id(0) % parts
    row, column_B = place(WIDTH, BLOCK)
    wait()
    h_B = _at(x_ptr + row * stride, column_B, WIDTH, GATED).to(tl.float32)
    scale = shared_scale(h_B, largest_ptr, counters_ptr, row, part, bound, parts, LANES)
    tl.store(scale_ptr + row, scale, mask=part == 0)
    tl.store(out_ptr + row * WIDTH + column_B, to_fp8(h_B, scale), mask=column_B < WIDTH)


@triton.jit
def _largest_kernel(
    x_ptr: tl.tensor, largest_ptr: tl.tensor, stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr
) -> None:
    """Write down the largest magnitude of a part of a row."""
    start_next()
    row, column_B = place(WIDTH, BLOCK)
    wait()
    h_B = _at(x_ptr + row * stride, column_B, WIDTH, GATED).to(tl.float32)
    tl.store(largest_ptr + tl.program_id(0), tl.max(tl.abs(h_B)))


@triton.jit
def _part_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, largest_ptr: tl.tensor, stride: tl.tensor, bound: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, GATED: tl.constexpr,
) -> None:  # fmt: skip
    """Write a part of a row by the row's scale, which follows from what was written down of all parts."""
    start_next()
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row, column_B = place(WIDTH, BLOCK)
    wait()
    h_B = _at(x_ptr + row * stride, column_B, WIDTH, GATED).to(tl.float32)
    scale = token_scale(largest_of_row(largest_ptr, row, parts, LANES), bound)
    tl.store(scale_ptr + row, scale, mask=tl.program_id(0) % parts == 0)
    tl.store(out_ptr + row * WIDTH + column_B, to_fp8(h_B, scale), mask=column_B < WIDTH)


@named("silu_mul_fp8")
def silu_mul_fp8(gate_up_T2F: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None) -> QuantizedActivation:
    """Return silu(gate) * up in FP8, rounded to its input's dtype in between."""
    return _quantized(gate_up_T2F, gate_up_T2F.shape[1] // 2, scale, bound, group, block=SILU_BLOCK, gated=True)


@named("gelu_fp8")
def gelu_fp8(x_TF: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None) -> QuantizedActivation:
    """Return gelu(x) in FP8, rounded to x's dtype in between."""
    return _quantized(x_TF, x_TF.shape[1], scale, bound, group, block=GELU_BLOCK, gated=False)


def _quantized(
    x_TX: Tensor, width: int, scale: Tensor | None, bound: float | None, group: int | None, *, block: int, gated: bool
) -> QuantizedActivation:
    x_TX = unit_stride(x_TX)
    tokens, out = x_TX.shape[0], empty_fp8(x_TX, width, scale, group)
    if not tokens:
        return out
    if scale is not None:
        grid = (tokens * blocks_of(width, block),)
        launch(
            _static_kernel, grid,
            x_TX, scale, out.values_TI, x_TX.stride(0), WIDTH=width, BLOCK=block, GATED=gated, num_warps=WARPS, **DEPENDENT,
        )  # fmt: skip
        return out
    if group is not None:
        launch(
            _group_kernel, (tokens * blocks_of(width, block),),
            x_TX, out.values_TI, out.scale, x_TX.stride(0), bound, WIDTH=width, BLOCK=block, GROUP=group, GATED=gated,
            num_warps=WARPS, **DEPENDENT,
        )  # fmt: skip
        return out
    for each in parts_ahead(width, x_TX.device, LEAST_ACTIVATION):
        launch_shared(out, x_TX, bound, each, gated=gated)
    part = part_of(tokens, width, x_TX.device, LEAST_ACTIVATION)
    if part is not None:
        launch_shared(out, x_TX, bound, part, gated=gated)
    elif width > MOST_ALONE:
        launch_twice(out, x_TX, bound, TWICE_PART, gated=gated)
    else:
        launch_rows(out, x_TX, bound, gated=gated)
    return out


def launch_rows(out: QuantizedActivation, x_TX: Tensor, bound: float | None, *, gated: bool) -> None:
    """Let one program take a row."""
    tokens, width = out.values_TI.shape
    block = power_of_2(width) if width <= MOST_ALONE else _BLOCK
    warps = min(max(block // 1024, 1), _MOST_WARPS)
    launch(
        _token_kernel, (tokens,),
        x_TX, out.values_TI, out.scale, x_TX.stride(0), bound, WIDTH=width, BLOCK=block, GATED=gated, num_warps=warps,
        **DEPENDENT,
    )  # fmt: skip


def launch_shared(out: QuantizedActivation, x_TX: Tensor, bound: float | None, part: int, *, gated: bool) -> None:
    """Let programs share a row, each `part` of its features."""
    tokens, width = out.values_TI.shape
    largest_TP = largest_of_parts(tokens, width, part, x_TX)
    launch(
        _shared_kernel, (largest_TP.numel(),),
        x_TX, out.values_TI, out.scale, largest_TP, counters(x_TX.device, tokens), x_TX.stride(0), bound, WIDTH=width, BLOCK=part,
        LANES=power_of_2(largest_TP.shape[1]), GATED=gated, num_warps=PARTS[part], **DEPENDENT,
    )  # fmt: skip


def launch_twice(out: QuantizedActivation, x_TX: Tensor, bound: float | None, part: int, *, gated: bool) -> None:
    """Let programs each take `part` features of a row, in two launches: the first finds what the second's scale needs."""
    tokens, width = out.values_TI.shape
    largest_TP = largest_of_parts(tokens, width, part, x_TX)
    grid, warps = (largest_TP.numel(),), PARTS[part]
    launch(
        _largest_kernel, grid,
        x_TX, largest_TP, x_TX.stride(0), WIDTH=width, BLOCK=part, GATED=gated, num_warps=warps, **DEPENDENT,
    )  # fmt: skip
    launch(
        _part_kernel, grid,
        x_TX, out.values_TI, out.scale, largest_TP, x_TX.stride(0), bound, WIDTH=width, BLOCK=part,
        LANES=power_of_2(largest_TP.shape[1]), GATED=gated, num_warps=warps, **DEPENDENT,
    )  # fmt: skip
