"""FP8 rows with a scale a token, by several programs a row: each takes a part, in two launches.

A scale a token needs the whole row before the first value can be written, and where tokens are few a row by one program is mostly
that program's reading. In parts, a first launch writes down the largest magnitude of each part; a second reads those of its row,
finds the scale, and computes its part again. No program waits for another of its launch. Values are computed as one program
computes them and a maximum is the same in any order, so what comes out has the bits of a row by one program.

T tokens, I features, P parts of a row, B elements of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import QuantizedActivation
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.fp8 import to_fp8, token_scale
from paddock_triton.launch import launch, launches_nothing
from paddock_triton.ops_activation import gelu_at, place, silu_mul_at
from paddock_triton.rows import blocks_of, power_of_2

Kind = Literal["silu_mul", "gelu", "plain"]

# Features of a part, and warps. On an H200 (Triton 3.6), us by one program, in parts of 2048, of 8192: SiLU 28672, 1 token 5.49,
# 2.81, 4.33; 53248, 8 tokens 21.51, 3.84, 5.04; GELU 59392, 4096 tokens 511, 488, 528; the quantisation of 14848, 1 token 2.70,
# 2.26, 2.68.
PART, WARPS = 2048, 4
# Features of the narrowest row in parts (14336 is the narrowest measured), and most programs of a launch: two a multiprocessor of
# an H200, a fixed number, so that no device is asked. As above, by one program and in parts: SiLU 14336, 8 tokens (56 programs)
# 3.70, 3.07, 64 (448) 4.03, 4.90; GELU 59392, 8 (232) 23.65, 4.14; the quantisation of 14848, 64 (512) 3.04, 3.45.
LEAST_WIDTH, MOST_PROGRAMS = 12288, 264
# Features of the widest row that an activation's program holds in registers; wider ones are in parts whatever the tokens. SiLU of
# 53248 for 4096 tokens: 490 by one program that computed each row twice, 444 in parts. The quantisation alone stays with one
# program, which reads a row twice out of the caches: 59392 for 4096 tokens 276, in parts 322.
MOST_ALONE = 32768


def in_parts(tokens: int, width: int, kind: Kind) -> bool:
    """Return whether several programs share each of `tokens` rows of `width` features."""
    if kind != "plain" and width > MOST_ALONE:
        return True
    return width >= LEAST_WIDTH and tokens * blocks_of(width, PART) <= MOST_PROGRAMS


def launch_by_token(out: QuantizedActivation, x_TX: Tensor, bound: float | None, kind: Kind, alone: Callable[[], None]) -> None:
    """Have rows written by their own scales, in parts or, by `alone`, each by one program.

    Where kernels are compiled ahead, those are asked for that any number of tokens takes, so that none is compiled amid serving.
    """
    tokens, width = out.values_TI.shape
    numbers = (1, MOST_PROGRAMS + 1) if launches_nothing() else (tokens,)  # few tokens and many
    ways = {in_parts(number, width, kind) for number in numbers}
    if True in ways:
        launch_parts(out, x_TX, bound, kind)
    if False in ways:
        alone()


def launch_parts(out: QuantizedActivation, x_TX: Tensor, bound: float | None, kind: Kind) -> None:
    """Let programs each take a part of a row: the first launch finds what the second's scale needs."""
    tokens, width = out.values_TI.shape
    largest_TP = x_TX.new_empty((tokens, blocks_of(width, PART)), dtype=torch.float32)
    grid = (largest_TP.numel(),)
    launch(
        _largest_kernel, grid,
        x_TX, largest_TP, x_TX.stride(0), WIDTH=width, BLOCK=PART, KIND=kind, num_warps=WARPS, **DEPENDENT,
    )  # fmt: skip
    launch(
        _part_kernel, grid,
        x_TX, out.values_TI, out.scale, largest_TP, x_TX.stride(0), bound, WIDTH=width, BLOCK=PART,
        LANES=power_of_2(largest_TP.shape[1]), KIND=kind, num_warps=WARPS, **DEPENDENT,
    )  # fmt: skip


@triton.jit
def plain_at(row_ptr: tl.tensor, column_B: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Return these columns of a row in float32 [B]; zeros beyond its width."""
    return tl.load(row_ptr + column_B, mask=column_B < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def values_at(row_ptr: tl.tensor, column_B: tl.tensor, WIDTH: tl.constexpr, KIND: tl.constexpr) -> tl.tensor:
    """Return what is quantised of these columns of a row, a `Kind` of value, in float32 [B]; zeros beyond its width."""
    if KIND == "silu_mul":
        h_B = silu_mul_at(row_ptr, column_B, WIDTH)
    elif KIND == "gelu":
        h_B = gelu_at(row_ptr, column_B, WIDTH)
    else:
        h_B = plain_at(row_ptr, column_B, WIDTH)
    return h_B.to(tl.float32)


@triton.jit
def _largest_kernel(
    x_ptr: tl.tensor, largest_ptr: tl.tensor, stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr
) -> None:
    """Write down the largest magnitude of a part of a row."""
    start_next()
    row, column_B = place(WIDTH, BLOCK)
    wait()
    h_B = values_at(x_ptr + row * stride, column_B, WIDTH, KIND)
    tl.store(largest_ptr + tl.program_id(0), tl.max(tl.abs(h_B)))


@triton.jit
def _part_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, largest_ptr: tl.tensor, stride: tl.tensor, bound: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Write a part of a row by the row's scale, from what was written down of all parts. LANES is the power of two from P up."""
    start_next()
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row, column_B = place(WIDTH, BLOCK)
    wait()
    h_B = values_at(x_ptr + row * stride, column_B, WIDTH, KIND)
    p_P = tl.arange(0, LANES)
    largest_P = tl.load(largest_ptr + row * parts + p_P, mask=p_P < parts, other=0.0, cache_modifier=".cg")
    scale = token_scale(tl.max(largest_P), bound)
    tl.store(scale_ptr + row, scale, mask=tl.program_id(0) % parts == 0)
    tl.store(out_ptr + row * WIDTH + column_B, to_fp8(h_B, scale), mask=column_B < WIDTH)
