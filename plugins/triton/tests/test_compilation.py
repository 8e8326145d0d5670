"""The kernels compile for the GPUs they are for, wherever the tests run, and no more of them than there must be."""

from __future__ import annotations

from typing import Any

import pytest
from plugins.triton.tests.apart import said

pytest.importorskip("triton")

_EARLY = {"starts the next", "waits", "ld.global"}


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[str]]:
    """Return the kernels that each example compiles, those left out that one before it has."""
    return said("compile_for_hopper")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ahead() -> dict[str, Any]:
    """Return what was compiled ahead, and by the launches that followed; each time the kernel, and whether in a thread."""
    return said("compile_for_hopper", "ahead")  # type: ignore[no-any-return]


def test_every_kernel_compiles_for_hopper_without_one(compiled: dict[str, list[str]]) -> None:
    """Each op's kernel, and attention's in every tile shape, become machine code, of which the interpreter knows nothing."""
    no_new_ones = {name for name in compiled if " tokens" in name} | {
        "linear_fp8_fast",
        "linear_silu_mul_fp8_fast",
    }  # the exact products'
    assert {name for name, kernels in compiled.items() if not kernels} <= no_new_ones
    assert {"_decode", "_prefill_async"} <= set(compiled["attention, bfloat16 pages of 64"])
    assert {"_decode", "_prefill_async"} <= set(compiled["attention, FP8 pages of 64"])
    assert {"_decode", "_prefill"} <= set(compiled["attention, bfloat16 pages of 64, ALiBi"])


def test_a_norm_sums_in_one_order_whatever_it_emits() -> None:
    """A thread holds the same values of a row for a plain norm and for FP8: both are the same bits before they are FP8."""
    orders = said("compile_for_hopper", "orders")
    assert set(orders) == {"_rms_norm_kernel", "_layer_norm_kernel"}
    assert all(len(layouts) == 1 for layouts in orders.values()), orders


def test_a_kernel_that_starts_early_waits_before_it_writes() -> None:
    """It lets the next one start and waits for its turn; sooner it reads weights at most, and what samples reads nothing."""
    found = said("compile_for_hopper", "turns")
    sampling = {"_race_kernel", "_finish_kernel", "_step_kernel", "_least_kernel"}
    assert {"_rms_norm_kernel", "_few_kernel", "_decode", *sampling} <= set(found)
    assert {name: said for name, said in found.items() if not {"starts the next", "waits"} <= {*said} <= _EARLY} == {}
    assert {name for name in sampling if "ld.global" in found[name]} == set()


def test_other_numbers_of_tokens_compile_nothing(compiled: dict[str, list[str]]) -> None:
    """A kernel compiled amid serving would hold every sequence up: how many tokens a step has is no part of a kernel."""
    others = {name: kernels for name, kernels in compiled.items() if " tokens" in name}
    assert others
    assert not {name: kernels for name, kernels in others.items() if kernels}


def test_what_was_compiled_ahead_is_what_launches_need(ahead: dict[str, Any], compiled: dict[str, list[str]]) -> None:
    """Every kernel is compiled in a thread and found by its launch, options of the launch and all; none is compiled again."""
    assert {name for name, _ in ahead["ahead"]} == {name for kernels in compiled.values() for name in kernels}
    assert all(in_thread for _, in_thread in ahead["ahead"])
    assert {name for name, _ in ahead["launched"]} <= {ahead["failing"]}


def test_what_does_not_compile_ahead_is_told_by_its_launch(ahead: dict[str, Any]) -> None:
    """The error is the one there is without compiling ahead: it names op, tensors and cause."""
    (message,) = ahead["messages"]
    assert message.startswith("kernel gelu does not run on x_TF [20, 512] bfloat16: RuntimeError: made to fail")
