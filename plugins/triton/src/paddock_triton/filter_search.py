"""Closing in on the edge that a filter draws through a row: pivots, tallies at them, and the bracket they leave.

V vocabulary; L lanes of a program, K pivots. A bracket is six scalars: a logit from which up there is enough, its count and mass
of tokens, and a higher one from which there is not, with its own. Pivots are logits, not yet divided by the temperature, which
changes no order.

Mass is a whole number of 2^-40 of the largest token's, summed in int64: of eight tokens, which are added in float32. So neither
how a row is split nor the order of atomics shows, and tokens do not depend on their neighbours. The reference adds in float64: a
token may be in here and out there where the edge of top-p is as near as 1e-7 of the row's mass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddock_triton.ops_sampling import rank_of

EACH = tl.constexpr(8)  # tokens of a lane in flight, their mass added in float32
UNIT = tl.constexpr(1 << 40)  # of mass
_LAST = tl.constexpr(0x7FFFFFFF)
_FURTHEST = tl.constexpr(30.0)  # scaled: all that lies below has 1e-13 of the largest token's mass


@triton.jit
def unranked(rank: tl.tensor) -> tl.tensor:
    """Return the float32 of a `rank_of`."""
    return tl.where(rank < 0, rank ^ _LAST, rank).to(tl.float32, bitcast=True)


@triton.jit
def first_pivots(lowest: tl.tensor, top: tl.tensor, temperature: tl.tensor, PIVOTS: tl.constexpr) -> tl.tensor:
    """Return [K] ascending: the lowest, so that all is counted, then denser the nearer the top, where mass is."""
    k_K = tl.arange(0, PIVOTS)
    far_K = 1.0 - k_K.to(tl.float32) / PIVOTS
    pivot_K = tl.maximum(top - _FURTHEST * temperature * far_K * far_K, lowest)
    return tl.where(k_K == 0, lowest, pivot_K)


@triton.jit
def pivots_between(low: tl.tensor, high: tl.tensor, step: tl.tensor, PIVOTS: tl.constexpr) -> tl.tensor:
    """Return [K] between two logits: evenly, or every fourth step evenly among all float32, so that outliers cost no more."""
    k_K = tl.arange(0, PIVOTS) + 1
    share_K = k_K.to(tl.float32) / (PIVOTS + 1)
    even_K = tl.maximum(tl.minimum(low * (1.0 - share_K) + high * share_K, high), low)
    first, last = rank_of(low).to(tl.int64), rank_of(high).to(tl.int64)
    among_K = unranked((first + (last - first) * k_K // (PIVOTS + 1)).to(tl.int32))
    return tl.where(step % 4 == 0, among_K, even_K)


@triton.jit
def mass_of(x: tl.tensor, top: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """Return the probability of logits over that of the top one, in float32."""
    return tl.exp2((x - top) * rate)


@triton.jit
def tally(
    row_ptr: tl.tensor, pivot_K: tl.tensor, top: tl.tensor, rate: tl.tensor, chunk: tl.tensor, chunks: tl.tensor,
    VOCAB: tl.constexpr, PIVOTS: tl.constexpr, LANES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return how many tokens of a chunk lie at or above each pivot [K], and their mass [K]."""
    lane_L = tl.arange(0, LANES)
    count_KL = tl.zeros([PIVOTS, LANES], tl.float32)
    mass_KL = tl.zeros([PIVOTS, LANES], tl.int64)
    for start in range(0, VOCAB, chunks * LANES * EACH):
        sum_KL = tl.zeros([PIVOTS, LANES], tl.float32)
        for each in tl.static_range(EACH):
            at_L = start + (chunk * EACH + each) * LANES + lane_L
            x_L = tl.load(row_ptr + at_L, mask=at_L < VOCAB, other=-float("inf")).to(tl.float32)
            above_KL = tl.where(x_L[None, :] >= pivot_K[:, None], 1.0, 0.0)  # three instructions a pivot; five with a mask
            count_KL += above_KL
            sum_KL += above_KL * mass_of(x_L, top, rate)[None, :]
        mass_KL += (sum_KL * UNIT).to(tl.int64)
    return tl.sum(count_KL.to(tl.int32), axis=1), tl.sum(mass_KL, axis=1)


@triton.jit
def narrowed(
    bracket: tl.tuple, pivot_K: tl.tensor, count_K: tl.tensor, mass_K: tl.tensor, need_count: tl.tensor, need_mass: tl.tensor
) -> tl.tuple:
    """Return the bracket that pivots leave of a bracket: (low, its count, its mass, high, its count, its mass)."""
    low, low_count, low_mass, high, high_count, high_mass = bracket
    enough_K = (count_K >= need_count) & (mass_K >= need_mass)
    up_K, down_K = (pivot_K > low) & enough_K, (pivot_K > low) & (enough_K == 0)
    return (
        tl.max(tl.where(up_K, pivot_K, low)),
        tl.min(tl.where(up_K, count_K, low_count)),
        tl.min(tl.where(up_K, mass_K, low_mass)),
        tl.min(tl.where(down_K, pivot_K, high)),
        tl.max(tl.where(down_K, count_K, high_count)),
        tl.max(tl.where(down_K, mass_K, high_mass)),
    )


@triton.jit
def known(
    start: tl.tuple, pivots_ptr: tl.tensor, sums_ptr: tl.tensor, row: tl.tensor, rows: tl.tensor, top: tl.tensor,
    need_count: tl.tensor, need_mass: tl.tensor, steps: tl.tensor, STEPS: tl.constexpr, PIVOTS: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return the bracket after the first `steps` launched. From `start`, a logit with its count and mass, up there is enough."""
    least, count, mass = start
    bracket = (least, count, mass, unranked(rank_of(top) + 1), count * 0, mass * 0)
    for step in tl.static_range(STEPS):
        at, k_K = step * rows + row, tl.arange(0, PIVOTS)
        pivot_K = tl.load(pivots_ptr + at * PIVOTS + k_K)
        count_K = tl.load(sums_ptr + 2 * at * PIVOTS + k_K).to(tl.int32)
        mass_K = tl.load(sums_ptr + (2 * at + 1) * PIVOTS + k_K)
        taken = (step < steps) & (tl.max(count_K) > 0)  # a step not needed was left out
        bracket = narrowed(bracket, tl.where(taken, pivot_K, -float("inf")), count_K, mass_K, need_count, need_mass)
    return bracket


@triton.jit
def is_wide(bracket: tl.tuple, FOUND: tl.constexpr) -> tl.tensor:
    """Return whether a bracket wants another step: more than F tokens, not all of them equal."""
    return (bracket[1] - bracket[4] > FOUND) & (rank_of(bracket[3]).to(tl.int64) - rank_of(bracket[0]) > 1)


@triton.jit
def to_list(bracket: tl.tuple, top: tl.tensor, FOUND: tl.constexpr) -> tl.tuple:
    """Return the bracket to write down: up to the top where that is F tokens at most, so that top-p finds all top-k left."""
    low, low_count, low_mass, high, high_count, high_mass = bracket
    few = low_count <= FOUND
    high = tl.where(few, unranked(rank_of(top) + 1), high)
    return low, low_count, low_mass, high, tl.where(few, 0, high_count), tl.where(few, 0, high_mass)


@triton.jit
def whole(sums_ptr: tl.tensor, row: tl.tensor, PIVOTS: tl.constexpr) -> tl.tuple:
    """Return how many tokens min-p leaves, and their mass: those of the first step's lowest pivot."""
    return tl.load(sums_ptr + 2 * row * PIVOTS).to(tl.int32), tl.load(sums_ptr + (2 * row + 1) * PIVOTS)


@triton.jit
def part_of(top_p: tl.tensor, mass: tl.tensor) -> tl.tensor:
    """Return the mass top-p wants, 1 at least: the top token stays."""
    return tl.maximum((top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)
