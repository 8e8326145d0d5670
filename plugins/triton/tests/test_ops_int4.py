"""A 4-bit weight in FP8 against its plain-torch twin.

O output features, I input features, G groups of inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("triton")

from paddock.layers import reference
from paddock.layers.int4 import Int4Weight, int4_weight
from paddock.testing.oracle import poisoned
from paddock_triton import ops_int4
from paddock_triton.ops_int4 import Fp8Tile, int4_to_fp8, launch_to_fp8

Words = NDArray[np.uint32]

ON_GPU = torch.cuda.is_available()
# (O, I, group): outputs and inputs that fill up, groups below, at and above a block, one over all inputs, one that no kernel is
# for, a published shape.
WEIGHTS = [
    (64, 128, 128),
    (80, 576, 32),
    (70, 144, 48),
    (16, 512, 256),
    (33, 320, 320),
    (130, 192, 64),
    (1, 384, 384),
    (33, 40, 8),
    *([(8192, 14848, 128)] if ON_GPU else []),
]
TILES = [
    Fp8Tile(outputs=outputs, blocks=blocks, shared=shared)
    for outputs, blocks in ((64, 1), (64, 4), (256, 2))
    for shared in (False, True)
]
KINDS = [(True, torch.float16), (False, torch.float32), *([(True, torch.float32), (False, torch.float16)] if ON_GPU else [])]
CUTS = [
    (tile, group)
    for group in (128, 32, 384)
    for tile in TILES
    if ON_GPU or group == 128 or (tile.blocks == 4 and not tile.shared)
]


def _weight(shape: tuple[int, int, int], device: torch.device, *, zeros: bool, dtype: torch.dtype) -> Int4Weight:
    outputs, inputs, group = shape
    generator = torch.Generator(device).manual_seed(sum(shape))
    codes_OI, zeros_GO = (
        torch.randint(0, 16, size, dtype=torch.uint8, generator=generator, device=device)
        for size in ((outputs, inputs), (inputs // group, outputs))
    )
    scales_GO = (torch.rand(inputs // group, outputs, generator=generator, device=device) * 0.01 + 0.001).to(dtype)
    return int4_weight(codes_OI, scales_GO, zeros_GO if zeros else None)


@pytest.mark.memcheck
@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(("zeros", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_a_weight_becomes_fp8_as_defined(
    shape: tuple[int, int, int], zeros: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Every number, the largest that a row's scale allows included, and nothing beyond the edges."""
    weight = _weight(shape, device, zeros=zeros, dtype=dtype)
    row_scale_O1 = weight.row_scales()
    with poisoned():
        found = int4_to_fp8(weight, row_scale_O1)
    expected = reference.int4_to_fp8(weight, row_scale_O1)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.float(), expected.float())


@pytest.mark.memcheck
@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(("tile", "group"), CUTS, ids=str)
def test_a_weight_is_the_same_however_it_is_cut(tile: Fp8Tile, group: int, device: torch.device) -> None:
    """More outputs than a program's, and fewer in the last; more blocks than a program's, and fewer."""
    weight = _weight((tile.outputs + 34, 384, group), device, zeros=True, dtype=torch.float16)
    row_scale_O1 = weight.row_scales()
    with poisoned():
        found = launch_to_fp8(weight, row_scale_O1, tile)
    assert torch.equal(found.float(), reference.int4_to_fp8(weight, row_scale_O1).float())


@pytest.mark.usefixtures("rounding")
def test_numbers_beyond_the_largest_are_the_largest(device: torch.device) -> None:
    """With scales that are not the weight's own: every output saturates."""
    weight = _weight((64, 128, 128), device, zeros=False, dtype=torch.float16)
    row_scale_O1 = torch.full((64, 1), 1e-7, device=device)
    found = int4_to_fp8(weight, row_scale_O1).float()
    assert torch.equal(found, reference.int4_to_fp8(weight, row_scale_O1).float())
    assert {448.0, -448.0} <= {*found.flatten().tolist()}


def _bytes(word: Words) -> Words:
    """Return the four bytes of each word, least first."""
    return np.stack([word >> np.uint32(8 * place) & np.uint32(255) for place in range(4)], axis=-1)


def _word(four: Words) -> Words:
    """Return four bytes as a word."""
    first, second, third, fourth = np.moveaxis(four, -1, 0)
    word: Words = first | second << np.uint32(8) | third << np.uint32(16) | fourth << np.uint32(24)
    return word


def _permuted(a: Words, b: Words, chosen: Words) -> Words:
    """Return what `prmt.b32` does: each nibble of `chosen` names a byte of eight, and 8 more its sign eight times."""
    eight = np.concatenate([_bytes(a), _bytes(b)], axis=-1)
    nibbles = np.stack([chosen >> np.uint32(4 * place) & np.uint32(15) for place in range(4)], axis=-1)
    found = np.take_along_axis(eight, (nibbles & np.uint32(7)).astype(np.int64), axis=-1)
    return _word(np.where(nibbles & np.uint32(8) > 0, (found >> np.uint32(7)) * np.uint32(255), found))


def _chosen(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Return what `lop3.b32` does: of each bit, the table's answer to those of a, b and c."""
    answer = np.zeros_like(a)
    for place in np.arange(32, dtype=np.uint32):
        of_a, of_b, of_c = (each >> place & np.uint32(1) for each in (a, b, c))
        answer |= (table >> (of_a << np.uint32(2) | of_b << np.uint32(1) | of_c) & np.uint32(1)) << place
    return answer


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "shl": np.left_shift,
    "shr": np.right_shift,
    "and": np.bitwise_and,
    "lop3": _chosen,
    "prmt": _permuted,
}


def _run(text: str, given: dict[str, Words]) -> dict[str, Words]:
    """Return what every register holds once instructions for 32 bits have run; numbers are what each register has first."""
    held = dict(given)
    count = len(next(iter(given.values())))
    for name, operands in re.findall(r"^(\w+)\.b32 (.*);$", text, re.MULTILINE):
        to, *others = operands.split(", ")
        values = [held[each] if each in held else np.full(count, int(each, 0), np.uint32) for each in others]
        held[to] = INSTRUCTIONS[name](*values)
    return held


def test_the_instructions_look_every_code_up() -> None:
    """Run one by one without a GPU: in each place each code of either output becomes the byte of its own table."""
    generator = np.random.default_rng(0)
    words, *tables = generator.integers(0, 2**32, (9, 4096), dtype=np.uint32)
    held = _run(ops_int4._LOOK_UP.value, {"$2": words} | {f"${3 + place}": table for place, table in enumerate(tables)})
    codes_NI = _bytes(words)
    for found, codes, four in (("$0", codes_NI & np.uint32(15), tables[:4]), ("$1", codes_NI >> np.uint32(4), tables[4:])):
        table_N16 = np.concatenate([_bytes(each) for each in four], axis=-1)
        assert {*codes.flatten().tolist()} == {*range(16)}
        assert np.array_equal(_bytes(held[found]), np.take_along_axis(table_N16, codes.astype(np.int64), axis=-1))
