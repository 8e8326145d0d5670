"""Rows that several programs share: each takes a part, and all find the row's largest magnitude together.

A scale a token needs the whole row before the first value can be written. Where tokens are few a row by one program is mostly
that program's reading: 4.9 us for one token of 28,672 features on an H200. Programs that share a row meet: each writes its
part's largest down, counts itself, waits until all have, and reads what the others wrote. It keeps its values in registers
meanwhile, and a maximum is the same in any order, so what comes out has the bits of a row by one program.

Who waits for others must not keep them from starting: a launch has at most as many programs as there are multiprocessors. Kernels
before it end by themselves, and none behind it starts before all of its programs have.

Where tokens are many, a row that one program cannot hold takes two launches: the first writes each part's largest down, the
second reads those and computes the part again. Nobody waits for anybody then.

P parts of a row, B elements of a part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from paddock_triton.attention_tuning import processors
from paddock_triton.fp8 import token_scale
from paddock_triton.launch import launches_nothing
from paddock_triton.rows import blocks_of

# Features of a part, the smallest for which there are multiprocessors enough, and warps. On an H200, us by one program, in parts
# of 2048, of 8192: SiLU 28672, 8 tokens 5.35, 3.42, 4.28; 53248, 1 token 21.04, 3.23, 4.20; GELU 18176, 1 token 4.67, 3.15, 4.14;
# 59392, 8 tokens 23.42, -, 4.49.
PARTS = {2048: 4, 8192: 8}
# Features of the narrowest row that is shared. The quantisation alone, as above: 14848, 1 token 2.43, 2.87; 28672 3.44, 2.89.
LEAST_ACTIVATION, LEAST_QUANTISATION = 12288, 20480
# Features of the widest row that one program takes, and of a part of a wider one in two launches. On an H200, us by one program,
# in two launches of 2048, of 8192: SiLU 53248, 64 tokens 23.16, 8.71, 10.91; GELU 59392, 64 tokens 24.52, 10.52, 12.58, 4096
# tokens 512.71, 491.32, 530.85; 18176, 4096 tokens 109.95, 152.49, 202.86 (`python -m tests.bench.shared_rows`).
MOST_ALONE, TWICE_PART = 32768, 2048


def part_of(tokens: int, width: int, device: torch.device, least: int) -> int | None:
    """Return how many features a program takes of a row that programs share while it runs; None where they share none.

    `least` is the width of the narrowest row that they share, LEAST_ACTIVATION or LEAST_QUANTISATION.
    """
    if device.type != "cuda" or knobs.runtime.interpret or width < least:  # the interpreter runs one after the other
        return None
    most = processors(device)
    return next((part for part in PARTS if tokens * blocks_of(width, part) <= most), None)


def parts_ahead(width: int, device: torch.device, least: int) -> tuple[int, ...]:
    """Return, where kernels are compiled ahead, the parts that one number of tokens or another takes; elsewhere none."""
    return tuple(PARTS) if launches_nothing() and part_of(1, width, device, least) is not None else ()


def largest_of_parts(tokens: int, width: int, part: int, like: Tensor) -> Tensor:
    """Return memory for the largest magnitude of each part [T, P] float32."""
    return like.new_empty((tokens, blocks_of(width, part)), dtype=torch.float32)


@triton.jit
def wait_for_all(counter_ptr: tl.tensor, PARTS: tl.constexpr) -> None:
    """Return once all programs of a row have counted themselves."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < PARTS:
        pass


@triton.jit
def largest_of_row(largest_ptr: tl.tensor, row: tl.tensor, PARTS: tl.constexpr, LANES: tl.constexpr) -> tl.tensor:
    """Return the largest of what was written down for a row's parts. LANES is the power of two from PARTS up."""
    p_P = tl.arange(0, LANES)
    return tl.max(tl.load(largest_ptr + row * PARTS + p_P, mask=p_P < PARTS, other=0.0, cache_modifier=".cg"))


@triton.jit
def shared_scale(
    h_B: tl.tensor, largest_ptr: tl.tensor, counters_ptr: tl.tensor, row: tl.tensor, part: tl.tensor, bound: tl.tensor,
    PARTS: tl.constexpr, LANES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a row's scale, of which this program holds a part [B] in float32. LANES is the power of two from PARTS up."""
    tl.store(largest_ptr + row * PARTS + part, tl.max(tl.abs(h_B)))
    tl.debug_barrier()  # the part's largest is there before the program counts itself
    counter_ptr = counters_ptr + row
    tl.atomic_add(counter_ptr, 1)
    wait_for_all(counter_ptr, PARTS)
    largest = largest_of_row(largest_ptr, row, PARTS, LANES)
    if tl.atomic_add(counter_ptr, 1) == 2 * PARTS - 1:  # the last to leave: nobody waits any more
        tl.store(counter_ptr, 0)
    return token_scale(largest, bound)
