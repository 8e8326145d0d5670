"""Whether a kernel computes what its twin computes, by the bounds of `paddock.testing.oracle`: no time of a wrong one counts.

T tokens, R rows, Q queries, L keys, H query heads, K KV heads, D head size, N pages, P tokens a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from paddock.bench.kernels.attention_cases import Laid, rows_of
from paddock.bench.kernels.case import Make
from paddock.bench.kernels.fp8_cases import GATED
from paddock.layers import LayerKV, QuantizedActivation
from paddock.layers.fp8_attention import attend_in_fp8
from paddock.layers.reference import FP8
from paddock.testing.kernels import Comparison, comparisons, page_comparisons, widened
from paddock.testing.oracle import ROUNDINGS, UNIT_ROUNDOFF, bound, dense_attention, poisoned, relative_rms

# FP8 values a twin's arithmetic may tip to their neighbour where they lie on a tie: a GPU's torch divides by a reciprocal, and
# adds a row up in another order. Of few values a share would allow none.
TIPPED_SHARE, FEW_TIPPED = 1e-3, 2
# Likewise behind a product whose sums the matrix unit keeps to 14 bits: 1.1 to 1.6 % of values, an error of all of 0.3 to 0.6 %
# (modelled as in decision 63). A block of wrong values shows in the error, many values beside the right ones in the share.
TIPPED_BY_SUMS, ERROR_OF_SUMS = 0.03, 0.01
_SIGN = 0x80  # of an e4m3 value
_SCALE_UNITS = 4  # roundings of float32 between two ways to divide
_QUERIES = 32  # of a prompt's start, middle and end, each compared with dense attention in float64


@frozen(kw_only=True)
class Verdict:
    """The worst of a comparison: what was compared, how far apart it is and may be."""

    what: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        """Return whether it is as near as the bound asks."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        """Return `relative RMS error of y: 0.3, allowed 0.004`."""
        return f"{self.what}: {self.error:.3g}, allowed {self.allowed:.3g}"


def op_verdict(op: str, implementation: Callable[..., Any], twin: Callable[..., Any], make: Make) -> Verdict:
    """Return how an implementation compares with its twin, run in float32 where the result is not in FP8."""
    arguments, apart = make(0), make(0)
    with poisoned():
        found = implementation(*arguments)
    return _worst(_compared(op, twin, arguments, apart, found))


def attention_verdict(attend: Callable[[Tensor, LayerKV], Tensor], laid: Laid) -> Verdict:
    """Return how attention compares with dense float64 attention: every decode, and queries of every prompt.

    FP8 products are held to their definition.
    """
    q_THD, kv = laid.case.make(0)
    with poisoned():
        out_THD = attend(q_THD, kv)
    found, expected = zip(*_attention_parts(laid, q_THD, kv, out_THD), strict=True)
    whole = bool(out_THD.isfinite().all())
    error = relative_rms(torch.cat(found), torch.cat(expected)) if whole else float("inf")
    allowed = bound("attention_fp8", torch.bfloat16) if laid.params.in_fp8 else bound("attention", q_THD.dtype)
    return Verdict(what="relative RMS error", error=error, allowed=allowed)


def _compared(
    op: str, twin: Callable[..., Any], arguments: tuple[Any, ...], apart: tuple[Any, ...], found: Any
) -> Iterator[Verdict]:
    """Yield every comparison of what was found, for `arguments`, with what the twin makes of the same arguments `apart`."""
    if op in ("rope_and_cache", "cache_kv"):
        yield from map(_judged, _pages_compared(op, twin, arguments, apart, found))
    elif isinstance(found, QuantizedActivation):
        yield from _quantised(op, found, twin(*apart), arguments[0].dtype)
    elif isinstance(found, tuple) and isinstance(found[-1], QuantizedActivation):
        expected_TE, expected = twin(*apart)
        yield _floats("add", "the sum", found[0], expected_TE)
        yield from _quantised(op, found[-1], expected, arguments[0].dtype)
    else:
        yield from map(_judged, comparisons(op, twin, apart, found))


def _quantised(op: str, found: QuantizedActivation, expected: QuantizedActivation, dtype: torch.dtype) -> Iterator[Verdict]:
    """Yield the comparison of scales and of values; a scale follows the largest value of a norm or an activation, as rounded."""
    plain = op.removesuffix("_fp8")
    allowed = bound(plain, dtype) if plain in ROUNDINGS else _SCALE_UNITS * UNIT_ROUNDOFF[torch.float32]
    yield Verdict(what="relative error of scales", error=relative_rms(found.scale, expected.scale), allowed=allowed)
    if op not in GATED:
        yield _tipped(found.values_TI, expected.values_TI)
        return
    error = relative_rms(found.values_TI.float(), expected.values_TI.float())
    yield _unlike(found.values_TI, expected.values_TI, TIPPED_BY_SUMS)
    yield Verdict(what="relative RMS error of FP8 values", error=error, allowed=ERROR_OF_SUMS)


def _pages_compared(
    op: str, twin: Callable[..., Any], arguments: tuple[Any, ...], apart: tuple[Any, ...], found: Any
) -> Iterator[Comparison]:
    """Return the comparison of rotated queries, and of all pages, the rows beside the slots included."""
    kv = next(each for each in arguments if isinstance(each, LayerKV))
    fp8 = kv.k_pages_NPKD.dtype == FP8
    wide = widened(apart)
    expected = twin(*wide)
    if fp8:  # a key is rounded to the activations' type before it becomes FP8: the pages are what the narrow twin writes
        twin(*apart)
    expected_kv = next(each for each in (apart if fp8 else wide) if isinstance(each, LayerKV))
    return page_comparisons(op, found, kv, expected, expected_kv)


def _judged(each: Comparison) -> Verdict:
    if each.actual.dtype == FP8:
        return _tipped(each.actual, each.expected)
    if not each.actual.is_floating_point():
        return _tokens(each.actual, each.expected)
    return _floats(each.row, each.what, each.actual, each.expected)


def _attention_parts(laid: Laid, q_THD: Tensor, kv: LayerKV, out_THD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for s, (length, new) in enumerate(zip(laid.step.lens, laid.step.news, strict=True)):
        k_LKD, v_LKD = (rows_of(laid, pages_NPKD, s) for pages_NPKD in (kv.k_pages_NPKD, kv.v_pages_NPKD))
        for first, last in _spans(new):
            here, seen = slice(start + first, start + last), length - new + last
            if laid.params.in_fp8:
                yield out_THD[here], attend_in_fp8(q_THD[here].float(), k_LKD[:seen], v_LKD[:seen], laid.params)
            else:
                yield out_THD[here], _dense(q_THD[here], k_LKD[:seen], v_LKD[:seen], scale=laid.params.scale)
        start += new


def _spans(new: int) -> list[tuple[int, int]]:
    if new <= 3 * _QUERIES:
        return [(0, new)]
    return [(first, first + _QUERIES) for first in (0, new // 2, new - _QUERIES)]


def _dense(q_QHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, *, scale: float) -> Tensor:
    """Return dense attention, one KV head after the other: float64 copies of all of a long sequence would not fit."""
    group = q_QHD.shape[1] // k_LKD.shape[1]
    heads = (
        dense_attention(q_QHD[:, k * group : (k + 1) * group], k_LKD[:, k : k + 1], v_LKD[:, k : k + 1], scale=scale)
        for k in range(k_LKD.shape[1])
    )
    return torch.cat(list(heads), dim=1)


def _floats(row: str, what: str, actual: Tensor, expected: Tensor) -> Verdict:
    allowed = bound(row, actual.dtype) if row in ROUNDINGS else 0.0  # what the table does not name moves values as they are
    return Verdict(what=f"relative RMS error of {what}", error=relative_rms(actual, expected), allowed=allowed)


def _tipped(actual: Tensor, expected: Tensor) -> Verdict:
    """Return how many FP8 values are unlike the twin's; one that is not even its neighbour is one too many."""
    steps = (_order(actual) - _order(expected)).abs()
    if steps.numel() and steps.max() > 1:
        return Verdict(what="FP8 values from the twin's, in steps", error=steps.max().item(), allowed=1.0)
    return _unlike(actual, expected, max(TIPPED_SHARE, FEW_TIPPED / max(actual.numel(), 1)))


def _order(values: Tensor) -> Tensor:
    """Return e4m3 values as whole numbers, of which neighbours are one apart; both zeros are 0."""
    code = values.view(torch.uint8).int()
    return torch.where(code < _SIGN, code, _SIGN - code)


def _unlike(actual: Tensor, expected: Tensor, allowed: float) -> Verdict:
    unlike = int((actual.view(torch.uint8) != expected.view(torch.uint8)).sum()) / max(actual.numel(), 1)
    return Verdict(what="share of FP8 values unlike the twin's", error=unlike, allowed=allowed)


def _tokens(actual: Tensor, expected: Tensor) -> Verdict:
    unlike = (actual != expected).float().mean().item()
    return Verdict(what="share of tokens unlike the twin's", error=unlike, allowed=0.0)


def _worst(verdicts: Iterator[Verdict]) -> Verdict:
    """Return the one furthest beyond its bound, or nearest to it."""
    return max(verdicts, key=lambda verdict: (not verdict.right, verdict.error / (verdict.allowed or 1.0)))
