"""A product that ends in an activation is one op only where its parts would run as they were chosen."""

from __future__ import annotations

import pytest
from core.tests.planning.made import gpus, planned, registry

from paddock.config import EngineConfig
from paddock.planning.backends import choose_ops
from paddock.planning.fused_ops import PARTS_OF_PRODUCTS, with_chosen_parts
from paddock.planning.notes import Notes
from paddock.plugins import OpSpec, hookimpl
from paddock.plugins.builtin import OPS

FUSED, PARTS = "linear_silu_mul_fp8", ("linear_fp8", "silu_mul_fp8")
FAST, FAST_PARTS = "linear_silu_mul_fp8_fast", ("linear_fp8_fast", "silu_mul_fp8")
OWN, OWN_FAST = (f"paddock.layers.reference:{op}" for op in (FUSED, FAST))


def _specs(where: str, *ops: str, rank: int) -> list[OpSpec]:
    return [OpSpec(op=op, implementation=f"{where}:{op}", devices=("cuda",), rank=rank) for op in ops]


class Kernels:
    """Brings the product and its parts, of exact and of fast sums."""

    @hookimpl
    def paddock_ops(self) -> list[OpSpec]:
        """Return the ops."""
        return _specs("kernels", FUSED, *PARTS, FAST, FAST_PARTS[0], rank=10)


class Slower:
    """Brings the parts alone, of a lower rank."""

    @hookimpl
    def paddock_ops(self) -> list[OpSpec]:
        """Return the ops."""
        return _specs("slower", *PARTS, FAST_PARTS[0], rank=5)


class Quicker:
    """Brings an op of a higher rank, a part of one of the products at least."""

    def __init__(self, op: str) -> None:
        """Say which."""
        self.op = op

    @hookimpl
    def paddock_ops(self) -> list[OpSpec]:
        """Return the op."""
        return _specs("quicker", self.op, rank=20)


def _chosen(*plugins: object, **owners: str) -> tuple[dict[str, str], Notes]:
    """Return the implementation of each op, and what was written down."""
    notes, found = Notes(), registry(*plugins)
    config = EngineConfig(model="made", ops=owners)
    ops = choose_ops(config, found, gpus(), "bfloat16", notes)
    kept = with_chosen_parts(ops, found, owners=owners, notes=notes)
    assert [spec.op for spec in kept] == [spec.op for spec in ops]
    return {spec.op: spec.implementation for spec in kept}, notes


def test_the_parts_are_ops() -> None:
    """Those of the products known here are."""
    assert {FUSED: PARTS, FAST: FAST_PARTS} == PARTS_OF_PRODUCTS
    assert {FUSED, *PARTS, FAST, *FAST_PARTS} <= OPS.keys()


@pytest.mark.parametrize(
    "owners",
    [
        {},
        {"linear_fp8": "Kernels"},
        {"linear_fp8": "Kernels", "silu_mul_fp8": "kernels"},
        {FUSED: "Kernels"},
        {FUSED: "Kernels", "linear_fp8": "Slower"},
        {"silu_mul": "paddock"},
    ],
    ids=str,
)
def test_one_op_does_both_where_nothing_speaks_for_its_parts(owners: dict[str, str]) -> None:
    """The plugin that was asked for a part does both parts in one; a product asked for by name stays whatever its parts are."""
    found, notes = _chosen(Kernels(), Slower(), **owners)
    assert found[FUSED] == f"kernels:{FUSED}"
    (choice,) = (choice for choice in notes.choices if choice.name == f"op {FUSED}")
    assert choice.value == f"kernels:{FUSED}"


@pytest.mark.parametrize(
    ("owners", "reason"),
    [
        ({"linear_fp8": "paddock"}, "linear_fp8 is asked of paddock"),
        ({"silu_mul_fp8": "Slower"}, "silu_mul_fp8 is asked of Slower"),
        ({"linear_fp8": "Kernels", "silu_mul_fp8": "paddock"}, "silu_mul_fp8 is asked of paddock"),
    ],
    ids=str,
)
def test_a_part_asked_of_another_plugin_runs(owners: dict[str, str], reason: str) -> None:
    """The core's own product is chosen, which runs the bound parts; the plan says so and why, and who is no longer relied on."""
    found, notes = _chosen(Kernels(), Slower(), **owners)
    assert found[FUSED] == OWN
    (choice,) = (choice for choice in notes.choices if choice.name == f"op {FUSED}")
    assert (choice.value, choice.reason) == (OWN, "runs linear_fp8, then silu_mul_fp8")
    assert [(each.value, each.reason) for each in choice.rejected] == [(f"kernels:{FUSED}", reason)]
    assert [used.distribution for used in notes.used if used.name == FUSED] == ["paddock"]


@pytest.mark.parametrize(
    ("part", "own"),
    [("silu_mul_fp8", (OWN, OWN_FAST)), ("linear_fp8", (OWN, None)), ("linear_fp8_fast", (None, OWN_FAST))],
    ids=str,
)
def test_a_part_of_a_higher_rank_runs(part: str, own: tuple[str | None, str | None]) -> None:
    """A product does not outrank what it would replace, and one of its sums alone is left to its parts where that is enough."""
    found, notes = _chosen(Kernels(), Quicker(part))
    assert found[part] == f"quicker:{part}"
    for op, expected in zip((FUSED, FAST), own, strict=True):
        assert found[op] == (expected or f"kernels:{op}")
    assert f"rank 10, below that of {part} (20)" in str(notes.choices)


def test_a_part_of_the_fast_product_asked_of_another_plugin_runs() -> None:
    """The exact one, which has another part, stays; the fast one stays where it was asked for itself."""
    found, notes = _chosen(Kernels(), Slower(), linear_fp8_fast="Slower")
    assert (found[FUSED], found[FAST]) == (f"kernels:{FUSED}", OWN_FAST)
    (choice,) = (choice for choice in notes.choices if choice.name == f"op {FAST}")
    assert (choice.value, choice.reason) == (OWN_FAST, "runs linear_fp8_fast, then silu_mul_fp8")
    assert [each.reason for each in choice.rejected] == ["linear_fp8_fast is asked of Slower"]
    assert (
        _chosen(Kernels(), Slower(), linear_fp8_fast="Slower", linear_silu_mul_fp8_fast="Kernels")[0][FAST] == f"kernels:{FAST}"
    )
    found, _ = _chosen(Kernels(), Slower(), linear_fp8="Slower")
    assert (found[FUSED], found[FAST]) == (OWN, f"kernels:{FAST}")


def test_the_core_s_own_is_chosen_where_nobody_fuses() -> None:
    """Nothing is said of parts then."""
    found, notes = _chosen(Slower())
    assert found[FUSED] == OWN
    (choice,) = (choice for choice in notes.choices if choice.name == f"op {FUSED}")
    assert choice.reason.startswith("rank 0")


def test_a_plan_says_what_runs() -> None:
    """From the option to the plan."""
    asked = planned(plugins=[Kernels()], ops={"linear_fp8": "paddock"})
    plain = planned(plugins=[Kernels()])
    assert [next(s.implementation for s in plan.ops if s.op == FUSED) for plan in (asked, plain)] == [OWN, f"kernels:{FUSED}"]
    assert asked.choice(f"op {FUSED}").reason == "runs linear_fp8, then silu_mul_fp8"
