"""What an implementation of an op may take beyond what every one must: marked on it, and done before it where the mark is absent.

T tokens, H query heads, K KV heads, G = H / K query heads of one KV head, D head size, E model size, I = H * D or K * D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Op = TypeVar("Op", bound=Callable[..., Any])

HEADS_APART = "heads_apart"  # `rope_and_cache`, `cache_kv`: heads at any stride, and queries in groups [T, K, G, D]
TWO_DELTAS = "two_deltas"  # `add_layer_norm`, `layer_norm_fp8`: a keyword `more_TE`, added to the delta first

_MARK = "paddock_takes"


def takes(*marks: str) -> Callable[[Op], Op]:
    """Return a decorator that marks an implementation of an op with what it takes: `HEADS_APART`, `TWO_DELTAS`."""

    def mark(op: Op) -> Op:
        setattr(op, _MARK, frozenset(marks))
        return op

    return mark


def taken(op: Callable[..., Any]) -> frozenset[str]:
    """Return the marks of an implementation."""
    found: frozenset[str] = getattr(op, _MARK, frozenset())
    return found


def side_by_side(x_THD: Tensor) -> Tensor:
    """Return heads [T, H, D], or [T, K, G, D], as [T, H, D] with a token's in one run: a view where they lie so, else a copy."""
    x_TI, head_dim = x_THD.flatten(1), x_THD.shape[-1]
    return x_TI.view(len(x_TI), x_TI.shape[1] // head_dim, head_dim)


def rotates_heads_apart(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `rope_and_cache` that takes heads apart: `op` if it is marked so, else one that lays them side by side for it."""
    if HEADS_APART in taken(op):
        return op

    @takes(HEADS_APART)
    def rope_and_cache(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *rest: Any) -> Tensor:
        return op(side_by_side(q_THD), side_by_side(k_TKD), side_by_side(v_TKD), *rest)

    return rope_and_cache


def keeps_heads_apart(op: Callable[..., None]) -> Callable[..., None]:
    """Return a `cache_kv` that takes heads apart: `op` if it is marked so, else one that lays them side by side for it."""
    if HEADS_APART in taken(op):
        return op

    @takes(HEADS_APART)
    def cache_kv(k_TKD: Tensor, v_TKD: Tensor, *rest: Any) -> None:
        op(side_by_side(k_TKD), side_by_side(v_TKD), *rest)

    return cache_kv


def adds_two_deltas(op: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `add_layer_norm` or `layer_norm_fp8` that takes `more_TE`: `op` if marked so, else one that adds it before."""
    if TWO_DELTAS in taken(op):
        return op

    @takes(TWO_DELTAS)
    def layer_norm(x_TE: Tensor, delta_TE: Tensor | None, *rest: Any, more_TE: Tensor | None = None) -> Any:
        return op(x_TE, delta_TE if delta_TE is None or more_TE is None else delta_TE + more_TE, *rest)

    return layer_norm
