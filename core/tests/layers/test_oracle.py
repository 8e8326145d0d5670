"""The measure of the oracle, over results of more than one block; and a short sequence's error beside a long one."""

from __future__ import annotations

import math

import pytest
import torch

from paddock.testing.kernels import attention_case
from paddock.testing.oracle import dense_attention, relative_rms

BEYOND_A_BLOCK = (1 << 20) + 123


def test_a_large_result_is_measured_whole() -> None:
    """By hand: the error and the size are sums over all blocks; an error in the last value alone counts."""
    expected = torch.full((BEYOND_A_BLOCK,), 2.0)
    assert relative_rms(expected, expected) == 0
    assert relative_rms(expected.bfloat16() * 1.5, expected) == pytest.approx(0.5)
    actual = expected.clone()
    actual[-1] += 3.0
    assert relative_rms(actual, expected) == pytest.approx(1.5 / math.sqrt(BEYOND_A_BLOCK))


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_infinitely_wrong(place: int, value: float) -> None:
    """In any block, also where the reference has the same."""
    expected = torch.ones(BEYOND_A_BLOCK)
    actual = expected.clone()
    actual[place] = value
    assert relative_rms(actual, expected) == relative_rms(actual, actual) == math.inf


def test_nothing_is_right_and_anything_beside_zeros_is_wrong() -> None:
    """Empty tensors agree; an error has no size to be relative to where the reference is zero."""
    assert relative_rms(torch.empty(0), torch.empty(0)) == 0
    assert relative_rms(torch.ones(3), torch.zeros(3)) == math.inf


def test_a_short_sequence_is_held_to_its_own_bound() -> None:
    """One token off by five percent in a step of 300 is lost in the whole and found in its sequence."""
    case = attention_case([(20, 1), (0, 300)], (2, 1, 16), dtype=torch.float32)
    params, start, parts = case.params(), 0, []
    for name, count in case.chunks:
        k_LKD, v_LKD = (case.pages.rows(name, pages) for pages in (case.kv.k_pages_NPKD, case.kv.v_pages_NPKD))
        parts.append(dense_attention(case.q_THD[start : start + count], k_LKD, v_LKD, scale=params.scale).float())
        start += count
    case.check(torch.cat(parts), params)
    with pytest.raises(AssertionError, match="sequence 0: 1 new of 21"):
        case.check(torch.cat([parts[0] * 1.05, *parts[1:]]), params)
