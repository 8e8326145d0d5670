"""How sums of FP8 products are kept: exactly unless speed is asked for, and refused where no product is in FP8."""

from __future__ import annotations

import pytest
from core.tests.planning.made import RAW, gpus, planned

from paddock.axes import Tensor, TensorAxis
from paddock.errors import OptionError, PlanError
from paddock.planning.fp8_accumulation import choose_accumulation
from paddock.planning.notes import Notes
from paddock.planning.weights import Tensors
from paddock.plugins import OpSpec

STORED: Tensors = {"layers.0.up": (Tensor("weight", "float8_e4m3fn"), Tensor("weight_scale", "float32"))}
BLOCKS = (TensorAxis("out", group=128), TensorAxis("in", group=128))
IN_BLOCKS: Tensors = {"layers.0.up": (Tensor("weight", "float8_e4m3fn"), Tensor("weight_scale_inv", "float32", BLOCKS))}


def _ops(exact: int, fast: int) -> list[OpSpec]:
    """Return both products, of these ranks."""
    ranks = {"linear_fp8": exact, "linear_fp8_fast": fast}
    return [OpSpec(op=op, implementation=f"somewhere:{op}", devices=("cuda",), rank=rank) for op, rank in ranks.items()]


def _chosen(
    asked: str, ops: list[OpSpec], stored: Tensors, *, rounds_weights: bool = False, owners: dict[str, str] | None = None
) -> tuple[str, Notes]:
    notes = Notes()
    chosen = choose_accumulation(
        asked, stored, ops, owners=owners or {}, rounds_weights=rounds_weights, scheme="made", notes=notes
    )
    return chosen, notes


def test_sums_are_exact_unless_speed_is_asked_for() -> None:
    """Of a model in FP8 the plan says that there is a choice and what it costs; of another it says nothing."""
    found, notes = _chosen("exact", _ops(10, 10), STORED)
    (choice,) = notes.choices
    assert (found, choice.value, [each.value for each in choice.rejected]) == ("exact", "exact", ["fast"])
    plain = planned(RAW, gpus())
    assert plain.fp8_accumulation == "exact"
    assert not [choice for choice in plain.choices if choice.name == "fp8_accumulation"]


@pytest.mark.parametrize(("stored", "rounds_weights"), [(STORED, False), ({}, True)], ids=["stored", "rounded"])
def test_fast_sums_are_taken_where_they_are_asked_for(stored: Tensors, rounds_weights: bool) -> None:
    """Of weights in FP8, and of 4-bit ones that become FP8 in large steps."""
    found, notes = _chosen("fast", _ops(10, 10), stored, rounds_weights=rounds_weights)
    assert (found, notes.choices[0].reason.startswith("asked for; "), notes.issues) == ("fast", True, [])


def test_a_plugin_with_exact_sums_alone_keeps_them() -> None:
    """Rather than fall to the plain-torch product; the plan warns."""
    found, notes = _chosen("fast", _ops(10, 0), STORED)
    (issue,) = notes.issues
    assert (found, issue.level, issue.code) == ("exact", "warning", "fp8_sums_stay_exact")
    assert "somewhere:linear_fp8" in issue.message


def test_an_exact_product_that_was_asked_for_by_name_is_not_replaced() -> None:
    """Unless whose fast one is meant was said too."""
    owners = {"linear_fp8": "mine"}
    with pytest.raises(PlanError, match="ops asks for linear_fp8 of mine") as error:
        _chosen("fast", _ops(10, 10), STORED, owners=owners)
    assert "ops linear_fp8_fast=mine" in error.value.fix
    assert _chosen("exact", _ops(10, 10), STORED, owners=owners)[0] == "exact"
    assert _chosen("fast", _ops(10, 10), STORED, owners=owners | {"linear_fp8_fast": "mine"})[0] == "fast"


@pytest.mark.parametrize("owner", ["mine", "paddock"])
def test_an_exact_product_that_ends_in_an_activation_is_not_replaced_either(owner: str) -> None:
    """Each way out that the error names is one; where sums stay exact anyway, what was asked for runs and nothing is refused."""
    owners = {"linear_silu_mul_fp8": owner}
    said = f"'fast', which calls linear_silu_mul_fp8_fast, but ops asks for linear_silu_mul_fp8 of {owner}"
    with pytest.raises(PlanError, match=said) as error:
        _chosen("fast", _ops(10, 10), STORED, owners=owners)
    assert "leave fp8_accumulation at exact" in error.value.fix
    assert "leave linear_silu_mul_fp8 out of ops" in error.value.fix
    assert f"ops linear_silu_mul_fp8_fast={owner}" in error.value.fix
    assert _chosen("exact", _ops(10, 10), STORED, owners=owners)[0] == "exact"
    assert _chosen("fast", _ops(10, 10), STORED, owners={})[0] == "fast"
    assert _chosen("fast", _ops(10, 10), STORED, owners=owners | {"linear_silu_mul_fp8_fast": owner})[0] == "fast"
    assert _chosen("fast", _ops(10, 0), STORED, owners=owners)[0] == "exact"


def test_fast_sums_of_nothing_are_refused() -> None:
    """With the way out."""
    with pytest.raises(PlanError, match=r"fp8_accumulation is 'fast', but no product is in FP8 \(quantization none\)") as error:
        planned(RAW, gpus(), fp8_accumulation="fast")
    assert "leave fp8_accumulation at exact" in error.value.fix
    with pytest.raises(OptionError, match="fp8_accumulation is 'quick'"):
        planned(RAW, gpus(), fp8_accumulation="quick")


def test_products_with_scales_of_blocks_have_exact_sums_alone() -> None:
    """Their op has no other: fast sums are refused, unless other products of the checkpoint can have them; nothing is chosen."""
    found, notes = _chosen("exact", _ops(10, 10), IN_BLOCKS)
    assert (found, notes.choices) == ("exact", [])
    with pytest.raises(PlanError, match=r"'fast', but products with scales of blocks have exact sums alone"):
        _chosen("fast", _ops(10, 10), IN_BLOCKS)
    rows = (TensorAxis("out"), TensorAxis("in", group=-1))
    by_row: Tensors = {"layers.0.down": (Tensor("weight", "float8_e4m3fn"), Tensor("weight_scale", "float32", rows))}
    assert _chosen("fast", _ops(10, 10), {**IN_BLOCKS, **by_row})[0] == "fast"
