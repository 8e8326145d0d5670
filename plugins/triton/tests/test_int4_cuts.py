"""How products with INT4 weights are cut, copied and counted: what needs no GPU to be seen.

T tokens, I input features, G groups of inputs.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

pytest.importorskip("triton")

from plugins.triton.tests.ring_arithmetic import call_plainly

from paddock.layers import reference
from paddock.layers.int4 import Int4Form, Int4Weight, int4_weight
from paddock.layers.reference import FP8
from paddock.testing.oracle import poisoned
from paddock_triton import ops_linear_int4, ring
from paddock_triton.counters import counters
from paddock_triton.int4_spec import Int4Spec, Int4Tile
from paddock_triton.ops_linear_int4 import linear_int4, linear_int4_fp8
from paddock_triton.rows import aligned

BF16, FP16 = torch.bfloat16, torch.float16
FP8_TILES = [
    *ops_linear_int4._FP8.values(),
    *ops_linear_int4._FP8_DEEP.values(),
    ops_linear_int4._FP8_MANY,
    ops_linear_int4._FP8_MANY_NARROW,
]
FP8_GROUPS = [ops_linear_int4._FP8_OTHER_GROUPS, *(ops_linear_int4._FP8[most] for most in (8, 16, 32))]
# (tile, whether inputs are FP8, group): each that a product is cut by.
CUTS = [
    *((tile, True, 128) for tile in FP8_TILES),
    *((tile, True, group) for tile in FP8_GROUPS for group in (32, 64, 256)),
    *((tile, False, 128) for tile in (*ops_linear_int4._HALVES.values(), ops_linear_int4._HALVES_MANY)),
    *((evolve(tile, deep=False), False, group) for tile in ops_linear_int4._HALVES.values() for group in (32, 64, 256)),
]


def _weight(outputs: int, inputs: int, group: int, *, zeros: bool = True, dtype: torch.dtype = BF16) -> Int4Weight:
    """Return a weight of zeros: its sizes matter here."""
    groups_GO = torch.zeros(inputs // group, outputs, dtype=torch.uint8)
    return int4_weight(torch.zeros(outputs, inputs, dtype=torch.uint8), groups_GO.to(dtype), groups_GO if zeros else None)


def _large(outputs: int, inputs: int, group: int) -> Int4Weight:
    """Return a weight that has sizes and no memory."""
    form = Int4Form(inputs=inputs, outputs=outputs, group=group)
    packed = torch.empty(form.blocks, form.slabs, 1024, dtype=torch.uint8, device="meta")
    scales = torch.empty(form.group_rows, form.filled_outputs, dtype=torch.float32, device="meta")
    return Int4Weight(form=form, packed=packed, scales=scales)


@pytest.mark.parametrize("scale_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "symmetric"])
@pytest.mark.parametrize(("tile", "fp8", "group"), CUTS, ids=str)
def test_a_step_waits_for_as_many_bytes_as_are_copied(
    tile: Int4Tile, fp8: bool, group: int, zeros: bool, scale_dtype: torch.dtype
) -> None:
    """Fewer, and it would begin before they are there; more, and it would wait for ever."""
    weight = _weight(192, 1024, group, zeros=zeros, dtype=scale_dtype)
    x_TI = torch.zeros(3, 1024, dtype=FP8 if fp8 else BF16)
    spec = ops_linear_int4._spec(tile, weight, fp8=fp8)
    sums = torch.zeros(16, 16, dtype=BF16) if spec.late else None
    described = ops_linear_int4._described(weight, x_TI, sums, spec)
    packed, scales, zeros_of, x, sums_of, late_scales = (math.prod(d.block_shape) * d.base.element_size() for d in described)
    assert spec.weight_bytes == spec.pieces * packed + scales + zeros_of * (zeros and not spec.late)
    assert spec.token_bytes == spec.row_groups * x
    if spec.late:
        assert spec.late_weight_bytes == late_scales + spec.teams * spec.halves * zeros_of * zeros
        assert spec.late_token_bytes == 2 * sums_of


def _grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the list that the grid of every launch goes to, of which none is made; every device counts as a Hopper GPU."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(ops_linear_int4, "launch", lambda _kernel, grid, *_args, **_options: grids.append(grid))
    monkeypatch.setattr(ops_linear_int4, "runs_on", lambda _device: True)
    monkeypatch.setattr(ops_linear_int4, "processors", lambda _device: 132)
    return grids


@pytest.mark.parametrize("group", [64, 128])
def test_a_prompt_of_131072_tokens_fits_a_grid(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid's second and third side end at 65,535."""
    grids = _grids(monkeypatch)
    weight = _weight(64, 128, group)
    x_TI = torch.zeros(131_072, 128, dtype=BF16)
    linear_int4(x_TI, weight)
    linear_int4_fp8(x_TI.to(FP8), torch.ones(131_072, 1), weight, BF16)
    assert len(grids) == (4 if group == 128 else 3)  # of each product, and of what it needs of x
    assert all(side <= 65_535 for grid in grids for side in grid[1:]), grids


@pytest.mark.parametrize("inputs", [128, 576, 1040])
def test_inputs_are_turned_as_the_codes_lie(inputs: int, device: torch.device) -> None:
    """Of sixteen inputs 4 t + 2 b + e, those with b = 0 come first."""
    x_TI = torch.arange(3 * inputs, device=device).remainder(2000).to(FP16).view(3, inputs)
    with poisoned():
        found = ops_linear_int4._turned(x_TI)
    order = [4 * t + 2 * b + e for b in range(2) for t in range(4) for e in range(2)]
    assert torch.equal(found.view(3, -1, 16), x_TI.view(3, -1, 16)[:, :, order])


def test_sums_of_values_are_those_of_groups(device: torch.device) -> None:
    """As two bfloat16 of which the second is what the first leaves; groups that only fill up give 0."""
    values_TI = (torch.randn(5, 640, generator=torch.Generator(device).manual_seed(5), device=device) + 0.3).to(FP8)
    with poisoned():
        sums = ops_linear_int4._sums(values_TI, blocks=6)
    expected_TG = torch.nn.functional.pad(values_TI.float(), (0, 128)).view(5, -1, 128).sum(2)
    assert torch.equal(sums[:5, 6:], torch.zeros_like(sums[:5, 6:]))
    torch.testing.assert_close((sums[:5].float() + sums[5:].float())[:, :6], expected_TG, rtol=2.0**-16, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP8], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_begin_where_the_copy_engine_can(tokens: int, dtype: torch.dtype) -> None:
    """Whatever rows are given, one alone too: at multiples of 16 bytes, with inputs side by side; copied only if need be."""
    wide_TI = torch.arange(tokens * 1406).remainder(200).view(tokens, 1406).to(dtype)
    for x_TI in (wide_TI[:, 3:643], wide_TI[:, :640], wide_TI[:, :1280:2], wide_TI[:, :640].T.contiguous().T):
        found = aligned(x_TI)
        assert (found.stride(1), found.stride(0) * found.element_size() % 16, found.data_ptr() % 16) == (1, 0, 0)
        assert torch.equal(found.float(), x_TI.float())
    whole_TI = wide_TI[:, :640].clone(memory_format=torch.contiguous_format)
    assert aligned(whole_TI) is whole_TI


@pytest.mark.parametrize(
    ("fp8", "group", "cut"),
    [
        (False, 128, {"halves": 2}),
        (False, 128, {"cuts": 2}),
        (False, 128, {"late": True}),
        (True, 64, {"halves": 2}),
        (True, 32, {"late": True}),
        (True, 256, {"late": True}),
        (True, 256, {"deep": True}),
        (True, 128, {"deep": True, "late": True}),
        (True, 128, {"teams": 3}),
        (True, 128, {"shared": False, "waves": True}),
        (True, 128, {"teams": 2, "halves": 2}),
        (True, 128, {"teams": 2, "cuts": 2}),
        (True, 256, {"teams": 2, "halves": 2}),
        (True, 128, {"teams": 4, "halves": 2, "late": True}),
    ],
)
def test_no_tile_is_cut_as_the_kernel_cannot(fp8: bool, group: int, cut: dict[str, Any]) -> None:
    """It would give wrong numbers without a word."""
    tile = evolve(Int4Tile(tokens=16, teams=4, slots=4), **cut)
    with pytest.raises(AssertionError, match="Int4Tile"):
        Int4Spec(tile=tile, fp8=fp8, zeros=True, group=group, scale_bytes=2)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_every_tile_that_is_picked_is_one_that_the_kernel_can_take(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tokens and sizes there are; each is among those whose copies are counted above, but for who shares tiles."""
    monkeypatch.setattr(ops_linear_int4, "processors", lambda _device: 132)
    known = [(evolve(tile, shared=True, waves=False), fp8) for tile, fp8, of_group in CUTS if of_group == group]
    for outputs, inputs in ((64, 512), (8192, 8192), (10240, 8192), (14848, 59392), (57344, 8192)):
        weight = _large(outputs, inputs, group)
        for tokens in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 300, 4096, 131_072):
            for pick, fp8 in ((ops_linear_int4._fp8_tile, True), (ops_linear_int4._halves_tile, False)):
                tile = pick(tokens, weight)
                ops_linear_int4._spec(tile, weight, fp8=fp8)
                assert (evolve(tile, shared=True, waves=False), fp8) in known, (tokens, outputs)
                assert len(ops_linear_int4._asked_for(tile)) == 1


@pytest.mark.parametrize(
    ("programs", "units"), [(1, 1), (1, 7), (3, 3), (132, 133), (132, 4000), (132, 58_720_256), (131, 2**31 - 1)]
)
def test_programs_share_all_steps_evenly(programs: int, units: int) -> None:
    """Each has its own, all have them all, none has two more than another; in 32 bits, whatever a step's size."""
    first_unit, program_of = ring.first_unit.fn, ring.program_of.fn
    with np.errstate(over="raise"):
        firsts = [int(first_unit(np.int32(each), np.int32(programs), np.int32(units))) for each in range(programs + 1)]
        owners = [program_of(np.int32(unit), np.int32(programs), np.int32(units)) for unit in firsts[:-1]]
        last_owners = [program_of(np.int32(unit - 1), np.int32(programs), np.int32(units)) for unit in firsts[1:]]
    assert (firsts[0], firsts[-1]) == (0, units)
    assert {after - first for first, after in pairwise(firsts)} <= {units // programs, units // programs + 1}
    assert owners == last_owners == [*range(programs)]


@pytest.mark.parametrize("waves", [False, True], ids=["all shared", "in waves"])
@pytest.mark.parametrize(
    ("tiles", "span", "programs"),
    [
        (1, 4, 4),
        (3, 5, 4),
        (10, 7, 66),
        (5, 64, 132),
        (200, 3, 132),
        (7, 9, 1),
        (264, 5, 132),
        (133, 5, 132),
        (133, 1, 132),
        (1856, 493, 132),
    ],
)
def test_as_many_parts_of_a_tile_are_kept_as_are_waited_for(
    tiles: int, span: int, programs: int, waves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program keeps one part at most, before it begins the tile that it may have to wait for; none waits for an earlier one.

    In waves each takes whole tiles first, equally many, side by side with the others'. Every step is taken once.
    """
    call_plainly(monkeypatch)
    whole, steps, counts = int(ring.whole_tiles(programs, tiles, waves)), [0] * tiles, list[int]()
    assert whole == (tiles // programs * programs if waves else 0)
    kept: dict[int, list[int]] = {}  # by tile: the programs that go on with it
    waiting: dict[int, int] = {}  # by tile: the program that begins it
    for program in range(programs):
        first, count = ring.share_of(program, programs, span, tiles, True, waves)
        counts.append(count)
        t = 0
        while t < count:
            tile, block = ring.place_in(program, programs, first, t, span, tiles, True, waves)
            taken = min(span - block, count - t)
            assert steps[tile] == block  # parts are taken in the order of programs
            steps[tile] += taken
            if t // span < whole // programs:
                assert (tile, block, taken) == (program + t // span * programs, 0, span)
            elif block > 0:
                assert program not in waiting.values()
                kept.setdefault(tile, []).append(program)
            elif taken < span:
                assert t + taken == count
                waiting[tile] = program
            t += taken
    assert steps == [span] * tiles
    assert max(counts) - min(counts) <= 1
    assert kept.keys() == waiting.keys()
    for tile, parts in kept.items():
        last = int(ring.program_of((tile - whole) * span + span - 1, programs, (tiles - whole) * span))
        assert parts == [*range(waiting[tile] + 1, last + 1)]


def test_tiles_of_many_tokens_are_compiled_ahead_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them the largest step takes: a step of another size would compile another amid serving."""
    monkeypatch.setattr(ops_linear_int4, "processors", lambda _device: 132)
    monkeypatch.setattr(ops_linear_int4, "launches_nothing", lambda: True)
    for outputs in (8192, 10240, 57344):
        weight = _large(outputs, 8192, 128)
        for pick, fewest in ((ops_linear_int4._fp8_tile, 257), (ops_linear_int4._halves_tile, 129)):
            asked = {ops_linear_int4._asked_for(pick(tokens, weight)) for tokens in (300, 512, 700, 1024, 4096, 8192)}
            assert len(asked) == 1
            assert {pick(tokens, weight) for tokens in range(fewest, 9000, 61)} <= {*asked.pop()}


def test_counters_that_a_graph_may_use_are_never_replaced(device: torch.device) -> None:
    """A product with more tiles than they count leaves them where they are: a captured step goes on counting there."""
    kept = counters(device, 1)
    more = counters(device, 2 * len(kept))
    assert (len(more), int(more.count_nonzero())) == (2 * len(kept), 0)
    assert counters(device, len(kept)).data_ptr() == kept.data_ptr() != more.data_ptr()


def test_plain_torch_computes_nothing_while_kernels_are_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads what an op returns then, and a product in plain torch compiles nothing."""

    def never(*_: Any) -> None:
        raise AssertionError("computed")

    weight, x_TI = _weight(70, 144, 48), torch.zeros(3, 144, dtype=BF16)
    monkeypatch.setattr(ops_linear_int4, "launches_nothing", lambda: True)
    for op in ("linear_int4", "linear_int4_fp8"):
        monkeypatch.setattr(reference, op, never)
    found, found_fp8 = linear_int4(x_TI, weight), linear_int4_fp8(x_TI.to(FP8), torch.ones(3, 1), weight, FP16)
    assert (found.shape, found.dtype, found_fp8.shape, found_fp8.dtype) == ((3, 70), BF16, (3, 70), FP16)
