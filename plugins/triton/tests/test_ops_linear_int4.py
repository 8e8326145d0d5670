"""Products with INT4 weights against their plain-torch twins. The kernels are for Hopper's matrix unit; elsewhere the twin runs.

T tokens, I input features, O output features, G groups of inputs.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import reference
from paddock.layers.int4 import Int4Weight, int4_weight
from paddock.layers.reference import FP8
from paddock.testing.oracle import assert_close, poisoned
from paddock_triton import int4_bringing, ops_linear_int4
from paddock_triton.int4_spec import Int4Spec, Int4Tile
from paddock_triton.ops_linear_int4 import launch_int4, linear_int4, linear_int4_fp8

BF16, FP16 = torch.bfloat16, torch.float16
TOKENS = (0, 1, 3, 8, 9, 16, 17, 33, 64, 65, 128, 129, 300)
# (O, I, group): whole tiles, outputs and inputs that fill up, every size of groups, groups over several steps, over all inputs.
WEIGHTS = [
    (512, 512, 128),
    (200, 640, 128),
    (1984, 1024, 128),
    (80, 576, 32),
    (320, 4544, 64),
    (130, 768, 64),
    (192, 1024, 256),
    (64, 1152, 384),
    (96, 512, 512),
    (2048, 8192, 128),
    (1, 128, 128),
    (17, 32, 32),
    (3, 96, 32),
]
TILES = [
    *ops_linear_int4._FP8.values(),
    *(evolve(ops_linear_int4._FP8[most], shared=False) for most in (8, 16)),
    *(evolve(ops_linear_int4._FP8[most], deep=False) for most in (8, 16)),
    *ops_linear_int4._FP8_FEW_ROWS.values(),
    ops_linear_int4._FP8_MANY,
    ops_linear_int4._FP8_MANY_NARROW,
    evolve(ops_linear_int4._FP8_MANY_NARROW, shared=True),
    Int4Tile(tokens=128, teams=3, slots=5, late=True),
    Int4Tile(tokens=128, teams=2, slots=4, steps=2, shared=False, late=True),
    Int4Tile(tokens=64, teams=2, slots=6),
]

FP8_GROUPS = [ops_linear_int4._FP8_OTHER_GROUPS, *(evolve(ops_linear_int4._FP8[most], deep=False) for most in (8, 16, 32))]
# (tile, whether inputs are FP8, group): each that a product is cut by.
CUTS = [
    *((tile, True, 128) for tile in TILES),
    *((tile, True, group) for tile in FP8_GROUPS for group in (32, 64, 256)),
    *((tile, False, 128) for tile in (*ops_linear_int4._HALVES.values(), ops_linear_int4._HALVES_MANY)),
    *((evolve(tile, deep=False), False, group) for tile in ops_linear_int4._HALVES.values() for group in (32, 64, 256)),
]


def _weight(shape: tuple[int, int, int], device: torch.device, *, zeros: bool, dtype: torch.dtype) -> Int4Weight:
    outputs, inputs, group = shape
    generator = torch.Generator(device).manual_seed(sum(shape))

    def nibbles(*size: int) -> Tensor:
        return torch.randint(0, 16, size, dtype=torch.uint8, generator=generator, device=device)

    scales_GO = torch.rand(inputs // group, outputs, generator=generator, device=device) * 0.01 + 0.001
    return int4_weight(nibbles(outputs, inputs), scales_GO.to(dtype), nibbles(inputs // group, outputs) if zeros else None)


def _tokens(count: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return activations whose mean is not 0: zero points count."""
    generator = torch.Generator(device).manual_seed(count)
    return (torch.randn(count, inputs, generator=generator, device=device) + 0.3).to(dtype)


@pytest.mark.memcheck
@pytest.mark.gpu
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_any_tokens_times_any_weight(shape: tuple[int, int, int], zeros: bool, device: torch.device) -> None:
    """No token, one, tiles of each size and several, with 16-bit inputs and with FP8 ones; a dtype with each kind of zeros."""
    dtype = BF16 if zeros else FP16
    weight = _weight(shape, device, zeros=zeros, dtype=dtype)
    for tokens in TOKENS:
        x_TI = _tokens(tokens, shape[1], device, dtype)
        with poisoned():
            found = linear_int4(x_TI, weight)
        assert (found.dtype, found.shape) == (dtype, (tokens, shape[0]))
        assert_close(found, reference.linear_int4(x_TI.float(), weight), op="linear_int4", dtype=dtype, at=f"T{tokens}")
        xq = reference.quantize_fp8_token(x_TI)
        with poisoned():
            found = linear_int4_fp8(xq.values_TI, xq.scale, weight, dtype)
        expected = reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32)
        assert_close(found, expected, op="linear_int4_fp8", dtype=dtype, at=f"T{tokens}")


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "16 bits"])
@pytest.mark.parametrize("group", [32, 128, 256])
def test_scales_may_be_in_float32(group: int, fp8: bool, device: torch.device) -> None:
    """ModelOpt's are."""
    weight = _weight((320, 1024, group), device, zeros=False, dtype=torch.float32)
    for tokens in (1, 9, 33, 65, 300):
        x_TI = _tokens(tokens, 1024, device, BF16)
        if fp8:
            xq = reference.quantize_fp8_token(x_TI)
            with poisoned():
                found = linear_int4_fp8(xq.values_TI, xq.scale, weight, BF16)
            expected = reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32)
        else:
            with poisoned():
                found = linear_int4(x_TI, weight)
            expected = reference.linear_int4(x_TI.float(), weight)
        assert_close(found, expected, op="linear_int4_fp8" if fp8 else "linear_int4", dtype=BF16, at=f"T{tokens}")


@pytest.mark.parametrize("scale_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "symmetric"])
@pytest.mark.parametrize(("tile", "fp8", "group"), CUTS, ids=str)
def test_a_step_waits_for_as_many_bytes_as_are_copied(
    tile: Int4Tile, fp8: bool, group: int, zeros: bool, scale_dtype: torch.dtype
) -> None:
    """Fewer, and it would begin before they are there; more, and it would wait for ever."""
    cpu = torch.device("cpu")
    weight = _weight((192, 1024, group), cpu, zeros=zeros, dtype=scale_dtype)
    x_TI = _tokens(3, 1024, cpu, FP8 if fp8 else BF16)
    spec = ops_linear_int4._spec(tile, weight, fp8=fp8)
    sums = torch.zeros(16, 16, dtype=BF16 if spec.late else torch.float32)
    described = ops_linear_int4._described(weight, x_TI, sums if spec.late or spec.copies_sums else None, spec)
    packed, scales, zeros_of, x, sums_of, late_scales = (math.prod(d.block_shape) * d.base.element_size() for d in described)
    per_step = spec.boxes * packed + spec.row_boxes * (scales + zeros_of * (zeros and not spec.late))
    assert spec.weight_bytes == per_step
    assert spec.token_bytes == spec.row_groups * x + sums_of * spec.copies_sums
    if spec.late:
        assert spec.late_weight_bytes == spec.row_boxes * late_scales + spec.teams * spec.halves * zeros_of * zeros
        assert spec.late_token_bytes == 2 * sums_of


def _grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the list that the grid of every launch goes to, of which none is made; every device counts as a Hopper GPU."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(ops_linear_int4, "launch", lambda _kernel, grid, *_args, **_options: grids.append(grid))
    monkeypatch.setattr(ops_linear_int4, "runs_on", lambda _device: True)
    monkeypatch.setattr(ops_linear_int4, "_processors", lambda _device: 132)
    return grids


@pytest.mark.parametrize("group", [64, 128])
def test_a_prompt_of_131072_tokens_fits_a_grid(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid's second and third side end at 65,535."""
    grids = _grids(monkeypatch)
    weight = _weight((64, 128, group), torch.device("cpu"), zeros=True, dtype=BF16)
    x_TI = torch.zeros(131_072, 128, dtype=BF16)
    linear_int4(x_TI, weight)
    linear_int4_fp8(x_TI.to(FP8), torch.ones(131_072, 1), weight, BF16)
    assert len(grids) == 4  # of each product, and of what it needs of x
    assert all(side <= 65_535 for grid in grids for side in grid[1:]), grids


@pytest.mark.parametrize("inputs", [128, 576, 1040])
def test_inputs_are_turned_as_the_codes_lie(inputs: int, device: torch.device) -> None:
    """Of sixteen inputs 4 t + 2 b + e, those with b = 0 come first."""
    x_TI = torch.arange(3 * inputs, device=device).remainder(2000).to(FP16).view(3, inputs)
    with poisoned():
        found = ops_linear_int4._turned(x_TI)
    order = [4 * t + 2 * b + e for b in range(2) for t in range(4) for e in range(2)]
    assert torch.equal(found.view(3, -1, 16), x_TI.view(3, -1, 16)[:, :, order])


@pytest.mark.parametrize(("group", "late"), [(128, True), (128, False), (32, False), (256, False)])
def test_sums_of_values_are_those_of_groups_within_blocks(group: int, late: bool, device: torch.device) -> None:
    """In float32, or as two bfloat16 of which the second is what the first leaves; groups that only fill up give 0."""
    values_TI = _tokens(5, 640, device, FP8)
    tile = Int4Tile(tokens=64, teams=2, slots=4, late=late)
    spec = ops_linear_int4._spec(tile, _weight((64, 768, group), device, zeros=True, dtype=BF16), fp8=True)
    with poisoned():
        sums = ops_linear_int4._sums(values_TI, spec, blocks=6)
    size = min(group, 128)
    expected_TG = torch.nn.functional.pad(values_TI.float(), (0, 128)).view(5, -1, size).sum(2)
    if late:
        assert torch.equal(sums[:5, 6:], torch.zeros_like(sums[:5, 6:]))
        found_TG, bound = (sums[:5].float() + sums[5:].float())[:, :6], 2.0**-16
    else:
        found_TG, bound = sums[:, :5].T, 2.0**-20
    torch.testing.assert_close(found_TG, expected_TG, rtol=bound, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_gives_the_same(tile: Int4Tile, device: torch.device) -> None:
    """However a product is cut, with more programs than tiles and with fewer, and again over the counters that the first left."""
    for shape in ((2048, 8192, 128), (192, 640, 128)):
        weight = _weight(shape, device, zeros=True, dtype=BF16)
        for tokens in (3, 70, 300):
            xq = reference.quantize_fp8_token(_tokens(tokens, shape[1], device, BF16))
            expected = reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32)
            for _ in range(2):
                with poisoned():
                    found = torch.empty(tokens, shape[0], dtype=BF16, device=device)
                launch_int4(found, xq.values_TI, xq.scale, weight, tile)
                assert_close(found, expected, op="linear_int4_fp8", dtype=BF16, at=f"T{tokens}")


@pytest.mark.gpu
@pytest.mark.parametrize("group", [64, 128])
def test_more_tokens_than_a_grid_has_on_its_second_side(group: int, device: torch.device) -> None:
    """70,001 tokens, of a prompt or of several, give what the first and the last of them give alone."""
    weight = _weight((128, 256, group), device, zeros=True, dtype=BF16)
    x_TI = _tokens(70_001, 256, device, BF16)
    xq = reference.quantize_fp8_token(x_TI)
    found, found_fp8 = linear_int4(x_TI, weight), linear_int4_fp8(xq.values_TI, xq.scale, weight, BF16)
    for some in (slice(0, 9), slice(65_530, 65_540), slice(-9, None)):
        expected = reference.linear_int4(x_TI[some].float(), weight)
        assert_close(found[some], expected, op="linear_int4", dtype=BF16)
        expected = reference.linear_int4_fp8(xq.values_TI[some], xq.scale[some], weight, torch.float32)
        assert_close(found_fp8[some], expected, op="linear_int4_fp8", dtype=BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("tokens", [4, 12, 40, 100, 300])
def test_scales_may_be_negative_and_as_large_as_float16_holds(tokens: int, group: int, device: torch.device) -> None:
    """AutoRound chooses the sign of a scale; codes in FP8 are over 512, so that a scale is multiplied by it."""
    outputs, inputs = 320, 1024
    generator = torch.Generator(device).manual_seed(7)
    codes_OI = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator, device=device)
    zeros_GO = torch.full((inputs // group, outputs), 15, dtype=torch.uint8, device=device)
    signs_GO = torch.randint(0, 2, zeros_GO.shape, generator=generator, device=device) * 2 - 1
    weight = int4_weight(codes_OI, (signs_GO * torch.finfo(FP16).max).to(FP16), zeros_GO)
    x_TI = _tokens(tokens, inputs, device, BF16)
    found = linear_int4(x_TI, weight)
    assert_close(found, reference.linear_int4(x_TI.float(), weight), op="linear_int4", dtype=BF16)
    xq = reference.quantize_fp8_token(x_TI)
    found = linear_int4_fp8(xq.values_TI, xq.scale, weight, BF16)
    expected = reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32)
    assert_close(found, expected, op="linear_int4_fp8", dtype=BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("tokens", [4, 12, 40, 100, 300])
def test_what_is_no_number_stays_in_its_token(tokens: int, group: int, device: torch.device) -> None:
    """A token that has overflown leaves its neighbours' bits as they are, and is seen in its own outputs."""
    weight = _weight((200, 640, group), device, zeros=True, dtype=BF16)
    x_TI, bad = _tokens(tokens, 640, device, BF16), tokens // 2
    others_T = torch.arange(tokens, device=device) != bad
    clean = linear_int4(x_TI, weight)
    for value in (float("inf"), float("nan")):
        spoilt_TI = x_TI.clone()
        spoilt_TI[bad, ::7] = value
        found = linear_int4(spoilt_TI, weight)
        assert torch.equal(found[others_T], clean[others_T])
        assert not found[bad].isfinite().any()
    values_TI, scale_T1 = x_TI.to(FP8), torch.ones(tokens, 1, device=device)
    clean = linear_int4_fp8(values_TI, scale_T1, weight, BF16)
    values_TI[bad, 5] = float("nan")
    found = linear_int4_fp8(values_TI, scale_T1, weight, BF16)
    assert torch.equal(found[others_T], clean[others_T])
    assert bool(found[bad].isnan().all())


@pytest.mark.gpu
def test_a_sum_is_the_same_each_time(device: torch.device) -> None:
    """Parts of a tile are added up in one order, whoever is done last."""
    weight = _weight((2048, 8192, 128), device, zeros=True, dtype=BF16)
    x_TI = _tokens(5, 8192, device, BF16)
    first = linear_int4(x_TI, weight)
    for _ in range(20):
        assert torch.equal(linear_int4(x_TI, weight), first)


@pytest.mark.gpu
def test_a_token_does_not_depend_on_how_many_share_its_tile(device: torch.device) -> None:
    """A row has the same bits whoever is beside it, so padding changes nothing."""
    weight = _weight((512, 1024, 128), device, zeros=True, dtype=BF16)
    x_TI = _tokens(16, 1024, device, BF16)
    together = linear_int4(x_TI, weight)
    for count in (9, 12):
        assert torch.equal(linear_int4(x_TI[:count], weight), together[:count])


@pytest.mark.gpu
def test_rows_of_tokens_may_lie_apart(device: torch.device) -> None:
    """A slice of a wider activation, at an address the copy engine cannot begin at, gives what a copy does."""
    weight = _weight((192, 640, 128), device, zeros=True, dtype=BF16)
    wide_TI = _tokens(5, 700, device, BF16)
    for first in (0, 7, 8):
        x_TI = wide_TI[:, first : first + 640]
        assert torch.equal(linear_int4(x_TI, weight), linear_int4(x_TI.contiguous(), weight))
    values_TI, scale_T1 = wide_TI.to(FP8)[:, 3:643], torch.rand(5, 1, device=device)
    found = linear_int4_fp8(values_TI, scale_T1, weight, BF16)
    assert torch.equal(found, linear_int4_fp8(values_TI.contiguous(), scale_T1, weight, BF16))
    apart_T1 = torch.stack((scale_T1, torch.full_like(scale_T1, float("nan"))), dim=1).view(5, 2)[:, :1]
    assert torch.equal(found, linear_int4_fp8(values_TI, apart_T1, weight, BF16))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP8], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_begin_where_the_copy_engine_can(tokens: int, dtype: torch.dtype) -> None:
    """Whatever rows are given, one alone too: at multiples of 16 bytes, with inputs side by side; copied only if need be."""
    wide_TI = torch.arange(tokens * 1406).remainder(200).view(tokens, 1406).to(dtype)
    for x_TI in (wide_TI[:, 3:643], wide_TI[:, :640], wide_TI[:, :1280:2], wide_TI[:, :640].T.contiguous().T):
        found = ops_linear_int4._aligned(x_TI)
        assert (found.stride(1), found.stride(0) * found.element_size() % 16, found.data_ptr() % 16) == (1, 0, 0)
        assert torch.equal(found.float(), x_TI.float())
    whole_TI = wide_TI[:, :640].clone(memory_format=torch.contiguous_format)
    assert ops_linear_int4._aligned(whole_TI) is whole_TI


@pytest.mark.gpu
def test_a_graph_replays_with_other_tokens(device: torch.device) -> None:
    """Counters are zero again after each product, so a replay adds up its own parts."""
    weight = _weight((2048, 8192, 128), device, zeros=True, dtype=BF16)
    x_TI = _tokens(4, 8192, device, BF16)
    linear_int4(x_TI, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear_int4(linear_int4(x_TI, weight)[:, :2048].repeat(1, 4), weight)
    for seed in (1, 2):
        x_TI.copy_(_tokens(4, 8192, device, BF16) * seed)
        graph.replay()
        expected = linear_int4(linear_int4(x_TI, weight)[:, :2048].repeat(1, 4), weight)
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_graph_may_be_captured_before_anything_has_counted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counters are its own then, and set to zero by each replay; later products have others."""
    weight = _weight((2048, 8192, 128), device, zeros=True, dtype=BF16)
    x_TI = _tokens(4, 8192, device, BF16)
    expected = linear_int4(x_TI, weight)
    monkeypatch.setattr(ops_linear_int4, "_counters_of", {})
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear_int4(x_TI, weight)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
        assert torch.equal(linear_int4(x_TI, weight), expected)


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
        (True, 128, {"deep": True, "tokens": 32}),
        (True, 128, {"steps": 2, "halves": 2}),
    ],
)
def test_no_tile_is_cut_as_the_kernel_cannot(fp8: bool, group: int, cut: dict[str, Any]) -> None:
    """It would give wrong numbers without a word."""
    tile = evolve(Int4Tile(tokens=16, teams=4, slots=4), **cut)
    with pytest.raises(AssertionError, match="Int4Tile"):
        Int4Spec(tile=tile, fp8=fp8, zeros=True, group=group, scale_bytes=2)


@pytest.mark.parametrize(
    ("programs", "units"), [(1, 1), (1, 7), (3, 3), (132, 133), (132, 4000), (132, 58_720_256), (131, 2**31 - 1)]
)
def test_programs_share_all_steps_evenly(programs: int, units: int) -> None:
    """Each has its own, all have them all, none has two more than another; in 32 bits, whatever a step's size."""
    first_unit, program_of = int4_bringing.first_unit.fn, int4_bringing.program_of.fn
    with np.errstate(over="raise"):
        firsts = [int(first_unit(np.int32(each), np.int32(programs), np.int32(units))) for each in range(programs + 1)]
        owners = [program_of(np.int32(unit), np.int32(programs), np.int32(units)) for unit in firsts[:-1]]
        last_owners = [program_of(np.int32(unit - 1), np.int32(programs), np.int32(units)) for unit in firsts[1:]]
    assert (firsts[0], firsts[-1]) == (0, units)
    assert {after - first for first, after in pairwise(firsts)} <= {units // programs, units // programs + 1}
    assert owners == last_owners == [*range(programs)]


def test_counters_that_a_graph_may_use_are_never_replaced(device: torch.device) -> None:
    """A product with more tiles than they count leaves them where they are: a captured step goes on counting there."""
    kept = ops_linear_int4._counters(device, 1)
    more = ops_linear_int4._counters(device, 2 * len(kept))
    assert (len(more), int(more.count_nonzero())) == (2 * len(kept), 0)
    assert ops_linear_int4._counters(device, len(kept)).data_ptr() == kept.data_ptr() != more.data_ptr()


def test_other_groups_run_in_plain_torch(device: torch.device) -> None:
    """Groups that no step is made of, as a shard that slices them may have, give what the twin gives."""
    weight = _weight((70, 144, 48), device, zeros=True, dtype=FP16)
    x_TI = _tokens(3, 144, device, FP16)
    assert torch.equal(linear_int4(x_TI, weight), reference.linear_int4(x_TI, weight))
    xq = reference.quantize_fp8_token(x_TI)
    found = linear_int4_fp8(xq.values_TI, xq.scale, weight, FP16)
    assert torch.equal(found, reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, FP16))
