"""How close is close enough: one measure, one table of bounds, and outputs that start as NaN.

The measure is the relative root-mean-square error against a float64 (or float32) reference. A bound is a number of roundings
of the dtype; it is never widened to make a machine pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ODD_SIZES = (1, 7, 63, 123)  # off every power of two that a kernel tiles by
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}

# (op, reason): how many roundings of the output's dtype its error may amount to. A rounding errs by at most one unit, so the
# root mean square of n independent ones stays below n units, and kernels accumulate in float32 throughout.
ROUNDINGS = {
    "embed": (0, "copied"),
    "rms_norm": (2, "the normalised value is rounded, then its product with the weight"),
    "add": (1, "rounded once"),
    "layer_norm": (1, "rounded once at the end"),
    "silu_mul": (2, "silu is rounded, then its product with up"),
    "gelu": (1, "rounded once at the end"),
    "rope_and_cache": (1, "rotated in float32, rounded once"),
    "cache_kv": (0, "stored as given"),
    "linear": (1, "accumulated in float32, rounded once"),
    "linear_fp8": (
        1,
        "blocks of 256 products in 14 bits, 2e-4 (half a rounding of float16), their sums in float32, rounded once",
    ),
    "linear_fp8_fast": (
        2,
        "the matrix unit's own sums, whose 14 bits and a rounding came to 3e-3 in bfloat16, a third more than it",
    ),
    "linear_fp8_blocks": (1, "blocks of 128 products in 14 bits, 2e-4, times their scales in float32, rounded once"),
    "linear_int4": (1, "the sum of x * (code - zero) * scale in float32, rounded once"),
    "linear_int4_fp8": (
        2,
        "a group's products in 14 bits, of codes whose zero points are taken off later: 4e-4 where tokens' mean is 0.3 of their "
        "deviation, a rounding of float16; their sums in float32, rounded once",
    ),
    "int4_to_fp8": (0, "a quotient of float32 rounded once, as defined"),
    "attention_fp8": (
        3,
        "the output once; sums in another order tip few probabilities to the FP8 value beside. On a GPU held to bfloat16's "
        "whatever the dtype: what a float16 output may be off there has not been measured",
    ),
    "attention": (2, "probabilities are rounded before they meet V, and the output once"),
}
_BLOCK = 1 << 20  # values summed at a time: float64 copies of a large result would not fit beside it, nor in a CPU's cache
_FLOAT32_UNITS = 16  # in float32 the order of summation shows: thousands of terms, errors adding as their square root


def bound(op: str, dtype: torch.dtype) -> float:
    """Return the largest relative RMS error `op` may have in `dtype`."""
    roundings, _ = ROUNDINGS[op]
    units = _FLOAT32_UNITS * max(roundings, 1) if dtype == torch.float32 else roundings
    return units * UNIT_ROUNDOFF[dtype]


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Return rms(actual - expected) / rms(expected): infinite where a value is not finite, 0 for two empty tensors.

    Summed in float64 where `actual` lies, a block at a time: copied to the host and summed there, the results that
    `paddock bench kernels` compares, 3e9 values, take a thread of an EPYC 70 to 96 ns each.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    blocks = zip(*(torch.split(x.detach().flatten(), _BLOCK) for x in (actual, expected.to(actual.device))), strict=True)
    error = size = torch.zeros((), dtype=torch.float64, device=actual.device)
    for actual_X, expected_X in blocks:
        expected64_X = expected_X.double()
        error = error + (actual_X.double() - expected64_X).square().sum()
        size = size + expected64_X.square().sum()
    return _ratio(error.item(), size.item())


def _ratio(error: float, size: float) -> float:
    """Return the root of a sum of squares over another, infinite where the first is not finite."""
    if not math.isfinite(error):
        return math.inf
    return 0.0 if error == 0 else math.inf if size == 0 else math.sqrt(error / size)


def assert_close(actual: Tensor, expected: Tensor, *, op: str, dtype: torch.dtype | None = None, at: str = "") -> None:
    """Check that `actual` is as near `expected` as the table allows `op` in `dtype` (that of `actual` unless given)."""
    dtype = dtype or actual.dtype
    error, allowed = relative_rms(actual, expected), bound(op, dtype)
    assert error <= allowed, f"{op} {at} in {dtype}: relative RMS error {error:.3g}, allowed {allowed:.3g} ({ROUNDINGS[op][1]})"


@contextmanager
def poisoned() -> Iterator[None]:
    """Make every uninitialised float tensor allocated inside start as NaN, so that an element nobody writes is seen.

    Torch fills memory so in deterministic mode (`torch.utils.deterministic.fill_uninitialized_memory`, on by default).
    """
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # the public function imports the compiler: seconds
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warn)


def dense_attention(
    q_QHD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    *,
    scale: float,
    slopes_H: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return causal attention of a sequence's last Q tokens over all its L, in float64 and term by term.

    Q queries, L keys, H query heads, K KV heads, D head size.
    """
    num_queries, num_heads = q_QHD.shape[:2]
    length, group = k_LKD.shape[0], num_heads // k_LKD.shape[1]
    k_LHD, v_LHD = (x.double().repeat_interleave(group, dim=1) for x in (k_LKD, v_LKD))
    logits_HQL = torch.einsum("qhd,lhd->hql", q_QHD.double(), k_LHD) * scale
    if softcap is not None:
        logits_HQL = softcap * torch.tanh(logits_HQL / softcap)
    key_L = torch.arange(length, device=q_QHD.device)
    query_Q1 = torch.arange(length - num_queries, length, device=q_QHD.device)[:, None]
    if slopes_H is not None:
        logits_HQL = logits_HQL + slopes_H.double()[:, None, None] * scale * key_L
    unseen_QL = key_L > query_Q1
    if window is not None:
        unseen_QL |= key_L <= query_Q1 - window
    return torch.einsum("hql,lhd->qhd", logits_HQL.masked_fill(unseen_QL, -math.inf).softmax(-1), v_LHD)
