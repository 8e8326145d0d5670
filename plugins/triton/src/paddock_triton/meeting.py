"""Rows that several programs share: each takes a part, and all find the row's largest magnitude together.

A scale a token needs the whole row before the first value can be written. Where tokens are few a row by one program is mostly
that program's reading: 4.9 us for one token of 28,672 features on an H200. Programs that share a row meet: each writes its
part's largest down, counts itself, waits until all have, and reads what the others wrote. It keeps its values in registers
meanwhile, and a maximum is the same in any order, so what comes out has the bits of a row by one program.

Who waits for others must not keep them from starting: a launch has at most as many programs as there are multiprocessors. Kernels
before it end by themselves, and none behind it starts before all of its programs have.

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
from paddock_triton.rows import blocks_of

# Features of a part, the smallest for which there are multiprocessors enough, and warps. Not timed: see tests/bench/shared_rows.
PARTS = {2048: 4, 8192: 8}
SHARED = False  # whether ops share rows: not before `python -m tests.bench.shared_rows` has run on a GPU
LEAST_WIDTH = 12288  # a shorter row is read by one program while others would still be meeting


def part_of(tokens: int, width: int, device: torch.device) -> int | None:
    """Return how many features of a row a program takes where rows are shared; None where each is better left to one."""
    if device.type != "cuda" or knobs.runtime.interpret or width < LEAST_WIDTH:  # the interpreter runs one after the other
        return None
    most = processors(device)
    return next((part for part in PARTS if tokens * blocks_of(width, part) <= most), None)


def largest_of_parts(tokens: int, width: int, part: int, like: Tensor) -> Tensor:
    """Return memory for the largest magnitude of each part [T, P] float32."""
    return like.new_empty((tokens, blocks_of(width, part)), dtype=torch.float32)


@triton.jit
def wait_for_all(counter_ptr: tl.tensor, PARTS: tl.constexpr) -> None:
    """Return once all programs of a row have counted themselves."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < PARTS:
        pass


@triton.jit
def shared_scale(
    h_B: tl.tensor, largest_ptr: tl.tensor, counters_ptr: tl.tensor, row: tl.tensor, part: tl.tensor, bound: tl.tensor,
    PARTS: tl.constexpr, LANES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a row's scale, of which this program holds a part [B] in float32. LANES is the power of two from PARTS up."""
    largest_ptr += row * PARTS
    tl.store(largest_ptr + part, tl.max(tl.abs(h_B)))
    tl.debug_barrier()  # the part's largest is there before the program counts itself
    counter_ptr = counters_ptr + row
    tl.atomic_add(counter_ptr, 1)
    wait_for_all(counter_ptr, PARTS)
    p_P = tl.arange(0, LANES)
    largest_P = tl.load(largest_ptr + p_P, mask=p_P < PARTS, other=0.0, cache_modifier=".cg")
    if tl.atomic_add(counter_ptr, 1) == 2 * PARTS - 1:  # the last to leave: nobody waits any more
        tl.store(counter_ptr, 0)
    return token_scale(tl.max(largest_P), bound)
