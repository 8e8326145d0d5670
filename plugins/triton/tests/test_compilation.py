"""The kernels compile for the GPUs they are for, wherever the tests run, and no more of them than there must be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from paddock_triton.int4_spec import MOST_BY_WARPS

_EARLY = {"starts the next", "waits", "ld.global"}
MANY_SUMS, MOST_STACK, SHARED = 128, 320, 232_448  # float32 of a thread, bytes of a thread, bytes of a block on an H200
STACK = {(False, 64): 8, (True, 64): 80}  # bytes, by (FP8, tokens of a cut): with Triton 3.7; in the late steps of four teams
STACK_OF_GROUPS = {(False, 64): 16, (False, 128): 64}  # likewise, where a step has several groups; with either Triton
KINDS = {"torch.float8_e4m3fn": "e4m3", "torch.bfloat16": "bf16", "torch.float16": "f16"}
SCRIPT, PRODUCTS = "compile_for_hopper", "products_for_hopper"


def _said(*words: str, script: str = SCRIPT) -> Any:
    """Return what a script prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"plugins.triton.tests.{script}", *words]
    root = Path(__file__).parents[3]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[str]]:
    """Return the kernels that each example compiles, those left out that one before it has."""
    return _said()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def ahead() -> dict[str, Any]:
    """Return what was compiled ahead, and by the launches that followed; each time the kernel, and whether in a thread."""
    return _said("ahead")  # type: ignore[no-any-return]


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
    orders = _said("orders")
    assert set(orders) == {"_rms_norm_kernel", "_layer_norm_kernel"}
    assert all(len(layouts) == 1 for layouts in orders.values()), orders


def test_a_kernel_that_starts_early_waits_before_it_writes() -> None:
    """It lets the next one start and waits for its turn; sooner it reads weights at most, and what samples reads nothing."""
    found = _said("turns")
    sampling = {"_race_kernel", "_finish_kernel", "_step_kernel", "_least_kernel"}
    assert {"_rms_norm_kernel", "_few_kernel", "_decode", *sampling} <= set(found)
    assert {name: said for name, said in found.items() if not {"starts the next", "waits"} <= {*said} <= _EARLY} == {}
    assert {name for name in sampling if "ld.global" in found[name]} == set()


@pytest.fixture(scope="module")
def int4_tiles() -> list[dict[str, Any]]:
    """Return what tiles of a product with INT4 weights compile to, every one where there is a GPU, with processors to match."""
    return _said(*(["every"] if torch.cuda.is_available() else []), "int4", script=PRODUCTS)  # type: ignore[no-any-return]


def test_int4_codes_are_the_matrix_units_operand_in_registers(int4_tiles: list[dict[str, Any]]) -> None:
    """FP8 by the unit's instruction for 8 bits as wide as a cut, 16 bits by that for 16, or by each warp's for few tokens."""
    for tile in int4_tiles:
        columns, kind = tile["columns"], KINDS[tile["inputs"]]
        if kind == "e4m3":
            wanted = f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3"
        elif columns > MOST_BY_WARPS:
            wanted = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
        else:
            wanted = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        assert [wanted, "registers"] in tile["products"], tile
        assert {where for _, where in tile["products"]} == {"registers"}, tile


def test_an_int4_product_fits_registers_and_shared_memory(int4_tiles: list[dict[str, Any]]) -> None:
    """Where a thread has 128 sums or more it may keep some of the rest in its stack; elsewhere nothing but what is stated."""
    for tile in int4_tiles:
        fp8, stack = KINDS[tile["inputs"]] == "e4m3", STACK if tile["group"] >= 128 else STACK_OF_GROUPS
        most = MOST_STACK if tile["sums"] >= MANY_SUMS else stack.get((fp8, tile["columns"]), 0)
        assert tile["stack"] <= most, tile
        assert tile["shared"] <= SHARED, tile


@pytest.fixture(scope="module")
def gated_products() -> list[dict[str, Any]]:
    """Return what products that end in an activation, and plain ones, compile to."""
    return _said("gated", script=PRODUCTS)  # type: ignore[no-any-return]


def test_a_product_sums_in_one_order_whatever_it_ends_in(gated_products: list[dict[str, Any]]) -> None:
    """A thread has the same products of the same inputs, so that gate and up are the same bits before they are activated."""
    for product in gated_products:
        assert product["plain"]["sums"], product
        assert product["gated"]["sums"] == product["plain"]["sums"], product


def test_an_activation_costs_a_product_no_room(gated_products: list[dict[str, Any]]) -> None:
    """No stack and no more shared memory; as many programs of published weights fit a multiprocessor at once."""
    for product in gated_products:
        plain, gated = product["plain"], product["gated"]
        assert gated["stack"] == 0, product
        assert gated["shared"] <= plain["shared"], product
        if product["rows"] > 1000:
            assert gated["registers"] <= -(-plain["registers"] // 8) * 8, product  # registers are given out by eights


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
