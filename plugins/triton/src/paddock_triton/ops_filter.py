"""Top-k, top-p and min-p without sorting: the least logit that stays in a row is closed in on, then `ops_sampling` draws.

R rows, V vocabulary; L lanes of a program, K pivots, S steps, F tokens found, J of them at a time. A step is a pass over a row
that counts the tokens, and adds up their probability mass, from each of K pivots up: between two of them lies the edge, and
there the next step's pivots lie (`filter_search`), until F tokens at most are left. The first steps, and the pass that writes
those tokens down, are launches of their own, of as many programs to a row as fill the GPU. Then one program takes a row: it does
what steps are left and lets each token written down serve as a pivot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.filter_search import (
    EACH,
    UNIT,
    first_pivots,
    is_wide,
    known,
    mass_of,
    narrowed,
    part_of,
    pivots_between,
    tally,
    to_list,
    whole,
)
from paddock_triton.launch import launch
from paddock_triton.ops_sampling import race
from paddock_triton.rows import blocks_of, pieces_of, unit_stride

# 256 rows of 128,256 normal logits on an H100, us for top-k 50 and top-p 0.9, the draw left out. 8 pivots with 32, 16, 8 warps:
# 287 and 542, 361 and 687, 396 and 803; 16 pivots with 16 warps 459 and 852, and 484 and 866 where 1024 are found. Since pivots
# take three instructions a token and the writing down is split: 257 and 566 with 3 steps launched, 263 and 400 with 4; for a row
# 36 and 120, 40 and 54 (with 16 warps 30 and 38).
_PIVOTS, _WARPS, _FOUND, _STEPS = 8, 32, 512, 4
_PROGRAMS = 264  # two a multiprocessor of an H200
_J = tl.constexpr(16)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
_PARAMETERS = ["top_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"]  # slices, which begin anywhere


@triton.jit
def _row(
    top_ptr: tl.tensor, temperature_ptr: tl.tensor, top_k_ptr: tl.tensor, top_p_ptr: tl.tensor, min_p_ptr: tl.tensor,
    row: tl.tensor,
) -> tl.tuple:  # fmt: skip
    """Return a row's top logit, temperature, top-k, top-p, least scaled logit by min-p, and whether there is a search at all."""
    top, temperature = tl.load(top_ptr + row), tl.load(temperature_ptr + row)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    floor = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)), -float("inf"))
    searched = (temperature > 0) & (tl.abs(top) < float("inf")) & ((top_k > 0) | (top_p < 1))
    return top, temperature, top_k, top_p, floor, searched


@triton.jit
def _sought(
    row: tl.tensor, rows: tl.tensor, top: tl.tensor, lowest: tl.tensor, top_k: tl.tensor, top_p: tl.tensor,
    pivots_ptr: tl.tensor, sums_ptr: tl.tensor, steps: tl.tensor, STEPS: tl.constexpr, PIVOTS: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return the bracket, after some steps, of the edge sought first: that of top-k, or of top-p where top-k takes none out."""
    count, mass = whole(sums_ptr, row, PIVOTS)
    by_count = (top_k > 0) & (top_k < count)
    need_count, need_mass = tl.where(by_count, top_k, 0), tl.where(by_count, 0, part_of(top_p, mass))
    start = (lowest, count, mass)
    return known(start, pivots_ptr, sums_ptr, row, rows, top, need_count, need_mass, steps, STEPS, PIVOTS)


@triton.jit(do_not_specialize=["rows", "step", "chunks"], do_not_specialize_on_alignment=_PARAMETERS)
def _step_kernel(
    logits_ptr: tl.tensor, top_ptr: tl.tensor, temperature_ptr: tl.tensor, top_k_ptr: tl.tensor, top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor, pivots_ptr: tl.tensor, sums_ptr: tl.tensor, found_ptr: tl.tensor, size_ptr: tl.tensor,
    stride: tl.tensor, rows: tl.tensor, step: tl.tensor, chunks: tl.tensor,
    STEPS: tl.constexpr, VOCAB: tl.constexpr, PIVOTS: tl.constexpr, LANES: tl.constexpr, FOUND: tl.constexpr,
) -> None:  # fmt: skip
    """Add a chunk's counts and masses at a step's pivots to the row's, which start at 0; after all steps write tokens down."""
    start_next()
    wait()
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    top, temperature, top_k, top_p, floor, searched = _row(top_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row)
    if searched == 0:
        return
    lowest, row_ptr = tl.maximum(top + floor * temperature, _LOWEST), logits_ptr + row * stride
    pivot_K, wide = first_pivots(lowest, top, temperature, PIVOTS), searched
    low, high, fits = lowest, top, searched  # of what to write down, which only the last launch reads
    if step == 0:  # the sums are still being added to
        tl.store(size_ptr + row, 0)
    else:
        bracket = _sought(row, rows, top, lowest, top_k, top_p, pivots_ptr, sums_ptr, step, STEPS, PIVOTS)
        wide = is_wide(bracket, FOUND)
        pivot_K = pivots_between(bracket[0], bracket[3], step, PIVOTS)
        low, low_count, _, high, high_count, _ = to_list(bracket, top, FOUND)
        fits = low_count - high_count <= FOUND
    if step < STEPS:
        if wide:
            rate = tl.minimum(_LOG2_E / temperature, 1e38)
            count_K, mass_K = tally(row_ptr, pivot_K, top, rate, chunk, chunks, VOCAB, PIVOTS, LANES)
            at, k_K = step * rows + row, tl.arange(0, PIVOTS)
            tl.store(pivots_ptr + at * PIVOTS + k_K, pivot_K)  # the same from every chunk
            tl.atomic_add(sums_ptr + 2 * at * PIVOTS + k_K, count_K.to(tl.int64), sem="relaxed")
            tl.atomic_add(sums_ptr + (2 * at + 1) * PIVOTS + k_K, mass_K, sem="relaxed")
    elif fits:
        _write_down(row_ptr, found_ptr + row * FOUND, size_ptr + row, low, high, chunk, chunks, VOCAB, LANES)


@triton.jit
def _write_down(
    row_ptr: tl.tensor, found_ptr: tl.tensor, size_ptr: tl.tensor, low: tl.tensor, high: tl.tensor, chunk: tl.tensor,
    chunks: tl.tensor, VOCAB: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Write a chunk's logits from `low` to under `high`, in any order, after the `size` already there."""
    size_L = size_ptr + tl.zeros([LANES], tl.int32)
    for start in range(0, VOCAB, chunks * LANES * EACH):
        for each in tl.static_range(EACH):
            at_L = start + (chunk * EACH + each) * LANES + tl.arange(0, LANES)
            x_L = tl.load(row_ptr + at_L, mask=at_L < VOCAB, other=-float("inf")).to(tl.float32)
            among_L = (x_L >= low) & (x_L < high)
            place_L = tl.atomic_add(size_L, 1, mask=among_L, sem="relaxed")
            tl.store(found_ptr + place_L, x_L, mask=among_L)


@triton.jit
def _least_found(
    found_ptr: tl.tensor, size: tl.tensor, above: tl.tuple, need_count: tl.tensor, need_mass: tl.tensor,
    top: tl.tensor, rate: tl.tensor, FOUND: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return the largest logit found from which up there is enough, its count and mass; `above` are those above all found."""
    at_F = tl.arange(0, FOUND)
    x_F = tl.load(found_ptr + at_F, mask=at_F < size, other=-float("inf"))
    count_F, mass_F = tl.zeros([FOUND], tl.int32) + above[0], tl.zeros([FOUND], tl.int64) + above[1]
    for start in range(0, size, _J):
        at_J = start + tl.arange(0, _J)
        x_J = tl.load(found_ptr + at_J, mask=at_J < size, other=-float("inf"))
        mass_J = (mass_of(x_J, top, rate) * UNIT).to(tl.int64)
        above_JF = x_J[:, None] >= x_F[None, :]
        count_F += tl.sum(above_JF.to(tl.int32), axis=0)
        mass_F += tl.sum(tl.where(above_JF, mass_J[:, None], 0), axis=0)
    enough_F = (count_F >= need_count) & (mass_F >= need_mass)
    last = tl.min(tl.where(at_F < size, x_F, float("inf")))  # enough, whatever rounding says
    least = tl.maximum(tl.max(tl.where(enough_F, x_F, -float("inf"))), last)
    here_F = x_F == least
    return least, tl.max(tl.where(here_F, count_F, 0)), tl.max(tl.where(here_F, mass_F, 0))


@triton.jit
def _edge(
    bracket: tl.tuple, listed: tl.tensor, row_ptr: tl.tensor, found_ptr: tl.tensor, size_ptr: tl.tensor,
    need_count: tl.tensor, need_mass: tl.tensor, top: tl.tensor, rate: tl.tensor, step: tl.tensor,
    VOCAB: tl.constexpr, PIVOTS: tl.constexpr, LANES: tl.constexpr, FOUND: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return the largest logit of a bracket from which up there is enough, its count and mass; and how many tokens are listed.

    `listed` says that a bracket that is not wide has been written down. 0 are listed where some lie above those.
    """
    low, low_count, low_mass, high, high_count, high_mass = bracket
    while is_wide((low, low_count, low_mass, high, high_count, high_mass), FOUND):
        pivot_K = pivots_between(low, high, step, PIVOTS)
        count_K, mass_K = tally(row_ptr, pivot_K, top, rate, 0, 1, VOCAB, PIVOTS, LANES)
        low, low_count, low_mass, high, high_count, high_mass = narrowed(
            (low, low_count, low_mass, high, high_count, high_mass), pivot_K, count_K, mass_K, need_count, need_mass
        )
        step += 1
        listed = step < 0
    low, low_count, low_mass, high, high_count, high_mass = to_list(
        (low, low_count, low_mass, high, high_count, high_mass), top, FOUND
    )
    size = low_count - high_count
    if (size > 0) & (size <= FOUND):  # else all are equal
        if listed == 0:
            tl.debug_barrier()  # the last list has been read
            tl.store(size_ptr, 0)
            tl.debug_barrier()
            _write_down(row_ptr, found_ptr, size_ptr, low, high, 0, 1, VOCAB, LANES)
            tl.debug_barrier()
        low, low_count, low_mass = _least_found(found_ptr, size, (high_count, high_mass), need_count, need_mass, top, rate, FOUND)
    return low, low_count, low_mass, tl.where((high_count == 0) & (size <= FOUND), size, 0)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=_PARAMETERS)
def _least_kernel(
    logits_ptr: tl.tensor, top_ptr: tl.tensor, temperature_ptr: tl.tensor, top_k_ptr: tl.tensor, top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor, pivots_ptr: tl.tensor, sums_ptr: tl.tensor, found_ptr: tl.tensor, size_ptr: tl.tensor,
    least_ptr: tl.tensor, stride: tl.tensor, rows: tl.tensor,
    STEPS: tl.constexpr, VOCAB: tl.constexpr, PIVOTS: tl.constexpr, LANES: tl.constexpr, FOUND: tl.constexpr,
) -> None:  # fmt: skip
    """Write the least scaled logit of a row that stays in the draw: (logit - top) / temperature."""
    start_next()
    wait()
    row = tl.program_id(0).to(tl.int64)
    top, temperature, top_k, top_p, floor, searched = _row(top_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row)
    scaled = floor
    if searched:
        rate = tl.minimum(_LOG2_E / temperature, 1e38)
        least = tl.maximum(top + floor * temperature, _LOWEST)
        count, mass = whole(sums_ptr, row, PIVOTS)
        by_count, listed = (top_k > 0) & (top_k < count), count * 0
        for turn in range(2):  # top-k, then top-p of what it leaves
            need_count, need_mass = tl.where(turn == 0, top_k, 0), tl.where(turn == 0, 0, part_of(top_p, mass))
            if tl.where(turn == 0, by_count, top_p < 1):
                second = (turn == 1) & by_count
                steps = tl.where(second, 1, STEPS)  # the later ones sought the edge of top-k
                low, low_count, low_mass, high, high_count, high_mass = known(
                    (least, count, mass), pivots_ptr, sums_ptr, row, rows, top, need_count, need_mass, steps, STEPS, PIVOTS
                )
                complete = listed > 0
                bracket = (
                    tl.where(complete, least, low), tl.where(complete, listed, low_count), low_mass, high,
                    tl.where(complete, 0, high_count), tl.where(complete, 0, high_mass),
                )  # fmt: skip
                least, count, mass, listed = _edge(
                    bracket, complete | (second == 0), logits_ptr + row * stride, found_ptr + row * FOUND, size_ptr + row,
                    need_count, need_mass, top, rate, steps, VOCAB, PIVOTS, LANES, FOUND,
                )  # fmt: skip
        below = tl.where(least > _LOWEST, least - top, -float("inf"))
        scaled = tl.maximum(floor, tl.div_rn(below, temperature))
    tl.store(least_ptr + row, scaled)


@named("draw_filtered")
def draw_filtered(
    logits_RV: Tensor,
    top_R: Tensor,
    token_R: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R2: Tensor,
    position_R: Tensor,
) -> Tensor:
    """Return a `draw` [R] from what min-p, top-k and top-p leave of each row; rows without them cost no pass more."""
    logits_RV, temperature_R = unit_stride(logits_RV), temperature_R.contiguous()
    least_R = least_scaled(logits_RV, top_R, temperature_R, top_k_R.contiguous(), top_p_R.contiguous(), min_p_R.contiguous())
    return race(
        logits_RV, top_R=top_R, kept_R=token_R, temperature_R=temperature_R, least_R=least_R, seed_R2=seed_R2,
        position_R=position_R,
    )  # fmt: skip


def least_scaled(
    logits_RV: Tensor, top_R: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """Return the least (logit - top) / temperature that stays in each row [R]; -inf where all do. All [R] lie dense."""
    rows, vocab = logits_RV.shape
    device, lanes = logits_RV.device, 32 * _WARPS
    least_R = torch.empty(rows, dtype=torch.float32, device=device)
    if not rows:
        return least_R
    chunks = pieces_of(blocks_of(vocab, lanes * EACH.value), _PROGRAMS // rows)
    pivots_SRK = torch.empty((_STEPS, rows, _PIVOTS), dtype=torch.float32, device=device)
    sums_SR2K = torch.zeros((_STEPS, rows, 2, _PIVOTS), dtype=torch.int64, device=device)
    found_RF = torch.empty((rows, _FOUND), dtype=torch.float32, device=device)
    size_R = torch.empty(rows, dtype=torch.int32, device=device)
    row = (logits_RV, top_R, temperature_R, top_k_R, top_p_R, min_p_R, pivots_SRK, sums_SR2K, found_RF, size_R)
    sizes = {"STEPS": _STEPS, "VOCAB": vocab, "PIVOTS": _PIVOTS, "LANES": lanes, "FOUND": _FOUND, "num_warps": _WARPS}
    sizes |= DEPENDENT
    for step in range(_STEPS + 1):
        launch(_step_kernel, (rows * chunks,), *row, logits_RV.stride(0), rows, step, chunks, **sizes)
    launch(_least_kernel, (rows,), *row, least_R, logits_RV.stride(0), rows, **sizes)
    return least_R
