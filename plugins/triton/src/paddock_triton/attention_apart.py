"""Decode attention whose warps take keys of their own: a tile is a part for each, and parts meet after the last tile.

Keys are multiplied as K Q^T, so that rows of queries are the tensor core's shorter side, of which 8 suffice, and values as
V^T P^T, a product for each warp. So no maximum, sum or probability passes between warps while keys are read.

W warps, N keys of a tile, S = N / W keys of a part, M rows of queries, D head size, C columns of values: all, or half of them
where FP8 values are read in pairs. Logits are kept in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paddock_triton.attention_tile import halves


@triton.jit
def empty_parts(spec: tl.constexpr) -> tl.tuple:
    """Return (sums of even columns or of all, of odd columns, of exponentials, maxima) before the first tile."""
    acc_WCM = tl.full([spec.parts, spec.pad // spec.words, spec.block_m], 0, tl.float32)
    sum_WM = tl.full([spec.parts, spec.block_m], 0, tl.float32)
    max_WM = tl.full([spec.parts, spec.block_m], float("-inf"), tl.float32)
    return acc_WCM, acc_WCM if spec.pairs else sum_WM, sum_WM, max_WM


@triton.jit
def _turned(
    v_NC: tl.tensor, key_start: tl.tensor, end: tl.tensor, dtype: tl.constexpr, MASKED: tl.constexpr, spec: tl.constexpr
) -> tl.tensor:
    """Return each part's values [W, C, S]; where masked zeros from key `end` on, for zero times NaN is NaN."""
    keys: tl.constexpr = spec.block_n // spec.parts
    v_WCS = tl.permute(tl.reshape(v_NC.to(dtype), [spec.parts, keys, spec.pad // spec.words]), (0, 2, 1))
    if MASKED:
        key_WS = key_start + tl.arange(0, spec.parts)[:, None] * keys + tl.arange(0, keys)[None, :]
        v_WCS = tl.where((key_WS < end)[:, None, :], v_WCS, tl.zeros_like(v_WCS))
    return v_WCS


@triton.jit
def absorb_parts(
    state: tl.tuple, q_DM: tl.tensor, k_ND: tl.tensor, v_NC: tl.tensor, key_start: tl.tensor, end: tl.tensor, factor: tl.tensor,
    MASKED: tl.constexpr, spec: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return the state after a tile of keys, of which those from `end` on are not seen where it is masked.

    `factor` makes products base-2 logits.
    """
    acc_WCM, odd_WCM, sum_WM, max_WM = state
    logits_NM = tl.dot(k_ND.to(q_DM.dtype), q_DM)
    if MASKED:
        key_N = key_start + tl.arange(0, spec.block_n)
        logits_NM = tl.where((key_N < end)[:, None], logits_NM, float("-inf"))
    logits_WSM = tl.reshape(logits_NM, [spec.parts, spec.block_n // spec.parts, spec.block_m])
    new_WM = tl.maximum(max_WM, tl.max(logits_WSM, 1) * factor)
    shift_WM = new_WM
    if MASKED:  # a part may have seen nothing yet
        shift_WM = tl.where(new_WM == float("-inf"), 0.0, new_WM)
    alpha_WM = tl.exp2(max_WM - shift_WM)
    p_WSM = tl.exp2(logits_WSM * factor - shift_WM[:, None, :])
    sum_WM = sum_WM * alpha_WM + tl.sum(p_WSM, 1)
    dtype: tl.constexpr = q_DM.dtype
    p_WSM, alpha_W1M = p_WSM.to(dtype), alpha_WM[:, None, :]
    if spec.pairs:
        v_NC, odd_NC = halves(v_NC)
        odd_WCS = _turned(odd_NC, key_start, end, dtype, MASKED, spec)
        odd_WCM = tl.dot(odd_WCS, p_WSM, odd_WCM * alpha_W1M)
    v_WCS = _turned(v_NC, key_start, end, dtype, MASKED, spec)
    acc_WCM = tl.dot(v_WCS, p_WSM, acc_WCM * alpha_W1M)
    return acc_WCM, odd_WCM, sum_WM, new_WM


@triton.jit
def joined_parts(state: tl.tuple, spec: tl.constexpr) -> tl.tuple:
    """Return what all parts have seen: (sums of values [M, D], of exponentials [M], maxima [M])."""
    acc_WCM, odd_WCM, sum_WM, max_WM = state
    max_M = tl.max(max_WM, 0)
    shift_M = tl.where(max_M == float("-inf"), 0.0, max_M)
    weight_WM = tl.exp2(max_WM - shift_M[None, :])
    weight_W1M = weight_WM[:, None, :]
    acc_MC = tl.trans(tl.sum(acc_WCM * weight_W1M, 0))
    if spec.pairs:
        odd_MC = tl.trans(tl.sum(odd_WCM * weight_W1M, 0))
        acc_MC = tl.reshape(tl.join(acc_MC, odd_MC), [spec.block_m, spec.pad])
    return acc_MC, tl.sum(sum_WM * weight_WM, 0), max_M
