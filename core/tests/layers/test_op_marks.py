"""Ops of plugins that know nothing of heads in groups or of a second delta go on working; those that do are given them.

T tokens, H query heads, K KV heads, G query heads of a KV head, X heads of a group, D head size, E features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from paddock.layers import HEADS_APART, TWO_DELTAS, LayerKV, Ops, reference, takes
from paddock.layers.op_marks import side_by_side, taken
from paddock.testing.kernels import check_cache_op, check_op

TOKENS, KV_HEADS, QUERIES, SIZE = 5, 3, 4, 8


def in_groups(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [T, K, G, D], k and v [T, K, D] as views of groups."""
    groups_TKXD = torch.randn(tokens, KV_HEADS, QUERIES + 2, SIZE)
    return groups_TKXD[:, :, :-2], groups_TKXD[:, :, -2], groups_TKXD[:, :, -1]


def pages() -> LayerKV:
    """Return a page of zeros."""
    return LayerKV(*(torch.zeros(1, 16, KV_HEADS, SIZE) for _ in range(2)))


def lies_side_by_side(x_THD: Tensor) -> bool:
    """Return whether x is [T, H, D] with a token's heads in one run."""
    return x_THD.ndim == 3 and x_THD.stride()[1:] == (SIZE, 1)


@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
def test_an_op_that_wants_heads_side_by_side_is_given_them_so(tokens: int) -> None:
    """Rotation and pages are those of the op that takes them apart; with a mark the op is bound as it is, and given views."""
    seen: list[Tensor] = []

    def rope_and_cache(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        seen.extend((q, k, v))
        return reference.rope_and_cache(q, k, v, *rest)

    def cache_kv(k: Tensor, v: Tensor, *rest: Any) -> None:
        seen.extend((k, v))
        reference.cache_kv(k, v, *rest)

    q, k, v = in_groups(tokens)
    positions_T, slots_T, table_LD = torch.arange(tokens), torch.arange(tokens), torch.randn(16, SIZE)
    old = Ops.bind({"rope_and_cache": rope_and_cache, "cache_kv": cache_kv})
    found, expected = [pages(), pages()], [pages(), pages()]
    out_THD = old.rope_and_cache(q, k, v, table_LD, positions_T, found[0], slots_T, None, None)
    old.cache_kv(k, v, found[1], slots_T, None, None)
    assert len(seen) == 5
    assert all(lies_side_by_side(x_THD) for x_THD in seen)
    new = Ops.bind({"rope_and_cache": takes(HEADS_APART)(rope_and_cache), "cache_kv": takes(HEADS_APART)(cache_kv)})
    assert (new.rope_and_cache, new.cache_kv) == (rope_and_cache, cache_kv)
    assert torch.equal(out_THD, new.rope_and_cache(q, k, v, table_LD, positions_T, expected[0], slots_T, None, None))
    new.cache_kv(k, v, expected[1], slots_T, None, None)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.k_pages_NPKD, other.k_pages_NPKD)
        assert torch.equal(one.v_pages_NPKD, other.v_pages_NPKD)
    assert all(given is wanted for given, wanted in zip(seen[5:], (q, k, v, k, v), strict=True))


def test_heads_that_lie_side_by_side_are_not_copied() -> None:
    """Slices of a projection, one group, and groups of one head are views."""
    rows_TI = torch.randn(TOKENS, 6 * SIZE)
    one_group = rows_TI.view(TOKENS, 1, 6, SIZE)[:, :, :-2]
    for x_THD in (rows_TI[:, SIZE : 3 * SIZE].view(TOKENS, 2, SIZE), one_group):
        assert side_by_side(x_THD).data_ptr() == x_THD.data_ptr()
        assert lies_side_by_side(side_by_side(x_THD))
    q, k, _ = in_groups()
    for x_THD in (q, k):
        assert lies_side_by_side(side_by_side(x_THD))
        assert torch.equal(side_by_side(x_THD), x_THD.reshape(TOKENS, -1, SIZE))


def one_delta(op: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op as plugins had it before there was a second delta."""

    def summed(x_TE: Tensor, delta_TE: Tensor | None, weight_E: Tensor, bias_E: Tensor | None, eps: float, *rest: Any) -> Any:
        return op(x_TE, delta_TE, weight_E, bias_E, eps, *rest)

    return summed


OLD: dict[str, Callable[..., Any]] = {
    "add_layer_norm": one_delta(reference.add_layer_norm),
    "layer_norm_fp8": one_delta(reference.layer_norm_fp8),
    "layer_norm": lambda *given: reference.layer_norm(*given),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("brought", [(), *((name,) for name in OLD), tuple(OLD)], ids=str)
def test_two_deltas_are_summed_before_an_op_that_takes_one(brought: tuple[str, ...], dtype: torch.dtype) -> None:
    """The reference, a plugin's plain op, its fused one, and what is fused of its parts: the same bits, two rounded sums."""
    ops = evolve(Ops.bind({name: OLD[name] for name in brought}))
    x_TE, delta_TE, more_TE = (torch.randn(7, 66).to(dtype) for _ in range(3))
    weight_E, bias_E, eps = torch.randn(66).to(dtype), torch.randn(66).to(dtype), 1e-5
    expected_TE = x_TE + (delta_TE + more_TE)
    h_TE = reference.layer_norm(expected_TE, weight_E, bias_E, eps)
    sum_TE, found_TE = ops.add_layer_norm(x_TE, delta_TE, weight_E, bias_E, eps, more_TE=more_TE)
    assert torch.equal(sum_TE, expected_TE)
    assert torch.equal(found_TE, h_TE)
    sum_TE, found = ops.layer_norm_fp8(x_TE, delta_TE, weight_E, bias_E, eps, None, None, more_TE=more_TE)
    assert torch.equal(sum_TE, expected_TE)
    assert torch.equal(found.values_TI.float(), reference.quantize_fp8_token(h_TE).values_TI.float())
    assert dtype == torch.float32 or not torch.equal(expected_TE, x_TE + delta_TE + more_TE)


def test_the_contracts_hold_an_op_to_its_marks() -> None:
    """One that says it takes groups and reads them in another order, and one that loses the second delta, are found out."""

    @takes(HEADS_APART)
    def shuffled(q: Tensor, *rest: Any) -> Tensor:
        return reference.rope_and_cache(q if q.ndim == 3 else q.transpose(1, 2), *rest)

    @takes(TWO_DELTAS)
    def forgetful(*given: Any, more_TE: Tensor | None = None) -> Any:
        return reference.add_layer_norm(*given)

    with pytest.raises(AssertionError, match="in groups"):
        check_cache_op("rope_and_cache", shuffled)
    with pytest.raises(AssertionError, match="two deltas"):
        check_op("add_layer_norm", forgetful)
    check_cache_op("rope_and_cache", lambda *given: reference.rope_and_cache(*given), dtypes=[torch.float32])
    assert taken(reference.rope_and_cache) == taken(reference.cache_kv) == {HEADS_APART}
    assert taken(reference.add_layer_norm) == taken(reference.layer_norm_fp8) == {TWO_DELTAS}
