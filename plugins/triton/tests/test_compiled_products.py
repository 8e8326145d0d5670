"""What products with INT4 and FP8 weights compile to for Hopper: instructions, registers, memory, the order of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plugins.triton.tests.apart import said

pytest.importorskip("triton")

from paddock_triton.int4_spec import MOST_BY_WARPS

MANY_SUMS, MOST_STACK, SHARED = 128, 320, 232_448  # float32 of a thread, bytes of a thread, bytes of a block on an H200
STACK = {(False, 64): 8, (True, 64): 80}  # bytes, by (FP8, tokens of a cut): with Triton 3.7; in the late steps of four teams
STACK_OF_GROUPS = {(False, 64): 16, (False, 128): 64}  # likewise, where a step has several groups; with either Triton
KINDS = {"torch.float8_e4m3fn": "e4m3", "torch.bfloat16": "bf16", "torch.float16": "f16"}


@pytest.fixture(scope="module")
def int4_tiles() -> list[dict[str, Any]]:
    """Return what tiles of a product with INT4 weights compile to, every one where there is a GPU, with processors to match."""
    return said("products_for_hopper", *(["every"] if torch.cuda.is_available() else []), "int4")  # type: ignore[no-any-return]


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
    return said("products_for_hopper", "gated")  # type: ignore[no-any-return]


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
