"""Products with INT4 weights against their plain-torch twins. The kernels are for Hopper's matrix unit; elsewhere the twin runs.

T tokens, I input features, O output features, G groups of inputs.
"""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import reference
from paddock.layers.int4 import Int4Form, Int4Weight, int4_weight
from paddock.layers.reference import FP8
from paddock.plugins import OpSpec
from paddock.testing.oracle import assert_close, poisoned
from paddock_triton import ops_linear_int4
from paddock_triton.int4_spec import Int4Tile
from paddock_triton.ops_linear_int4 import launch_int4, linear_int4, linear_int4_fp8
from paddock_triton.plugin import paddock_ops

BF16, FP16 = torch.bfloat16, torch.float16
TOKENS = (0, 1, 3, 8, 9, 16, 17, 33, 64, 65, 128, 129, 300)
LEAST_OUTPUTS = 32
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
    *(evolve(tile, shared=shared) for tile in ops_linear_int4._FP8_DEEP.values() for shared in (False, True)),
    *ops_linear_int4._MANY_FP8,
    ops_linear_int4._FP8_MANY_NARROW,
    Int4Tile(tokens=64, teams=2, halves=2, slots=6, late=True),
    ops_linear_int4._FP8_OTHER_GROUPS,
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
    """No token, one, tiles of each size and several, with 16-bit inputs and with FP8 ones; a dtype with each kind of zeros.

    An error is relative to at least `LEAST_OUTPUTS` outputs together: products of one alone may cancel to next to nothing.
    """
    dtype = BF16 if zeros else FP16
    weight = _weight(shape, device, zeros=zeros, dtype=dtype)
    for tokens in TOKENS:
        draws = -(-LEAST_OUTPUTS // (tokens * shape[0])) if tokens else 1
        x_NTI = _tokens(draws * tokens, shape[1], device, dtype).view(draws, tokens, shape[1])
        with poisoned():
            found = [linear_int4(x_TI, weight) for x_TI in x_NTI]
        assert (found[0].dtype, found[0].shape) == (dtype, (tokens, shape[0]))
        expected = reference.linear_int4(x_NTI.flatten(0, 1).float(), weight)
        assert_close(torch.cat(found), expected, op="linear_int4", dtype=dtype, at=f"T{tokens}")
        inputs = [reference.quantize_fp8_token(x_TI) for x_TI in x_NTI]
        with poisoned():
            found = [linear_int4_fp8(xq.values_TI, xq.scale, weight, dtype) for xq in inputs]
        expected = torch.cat([reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32) for xq in inputs])
        assert_close(torch.cat(found), expected, op="linear_int4_fp8", dtype=dtype, at=f"T{tokens}")


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
@pytest.mark.parametrize(
    "tile", [tile for tile in (*ops_linear_int4._MANY_FP8, *ops_linear_int4._MANY_HALVES) if tile.waves], ids=str
)
def test_tiles_that_whole_ones_leave_are_shared(tile: Int4Tile, device: torch.device) -> None:
    """Twice over the same counters, with last tiles of rows and tokens that are not full, none to share, one of few steps."""
    fp8 = tile in ops_linear_int4._MANY_FP8
    for outputs, tokens in ((1984, 3001), (128 * 132, tile.tokens), (128 * 133, tile.tokens)):
        weight = _weight((outputs, 640, 128), device, zeros=True, dtype=BF16)
        x_TI = _tokens(tokens, 640, device, BF16)
        xq = reference.quantize_fp8_token(x_TI)
        given, scale_T1 = (xq.values_TI, xq.scale) if fp8 else (x_TI, None)
        expected = (
            reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, torch.float32)
            if fp8
            else reference.linear_int4(x_TI.float(), weight)
        )
        for _ in range(2):
            with poisoned():
                found = torch.empty(tokens, outputs, dtype=BF16, device=device)
            launch_int4(found, given, scale_T1, weight, tile)
            assert_close(found, expected, op="linear_int4_fp8" if fp8 else "linear_int4", dtype=BF16, at=f"O{outputs} T{tokens}")


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
    monkeypatch.setattr("paddock_triton.counters._counters_of", {})
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear_int4(x_TI, weight)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
        assert torch.equal(linear_int4(x_TI, weight), expected)


def test_other_groups_run_in_plain_torch(device: torch.device) -> None:
    """Groups that no step is made of, as a shard that slices them may have, give what the twin gives."""
    weight = _weight((70, 144, 48), device, zeros=True, dtype=FP16)
    x_TI = _tokens(3, 144, device, FP16)
    assert torch.equal(linear_int4(x_TI, weight), reference.linear_int4(x_TI, weight))
    xq = reference.quantize_fp8_token(x_TI)
    found = linear_int4_fp8(xq.values_TI, xq.scale, weight, FP16)
    assert torch.equal(found, reference.linear_int4_fp8(xq.values_TI, xq.scale, weight, FP16))


@pytest.mark.parametrize("spec", [spec for spec in paddock_ops() if spec.groups], ids=lambda spec: spec.op)
def test_the_groups_that_are_declared_are_those_that_the_kernels_take(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan's warning rests on it: no other group is served, and none that is declared runs in plain torch."""
    monkeypatch.setattr(ops_linear_int4, "runs_on", lambda device: True)
    nothing = torch.empty(0, dtype=torch.uint8)
    for group in range(1, 1025):
        form = Int4Form(inputs=group, outputs=1, group=group)
        served = ops_linear_int4._serves(nothing, Int4Weight(form=form, packed=nothing, scales=nothing))
        assert served == spec.serves_groups_of(group), group


def test_both_products_declare_their_groups() -> None:
    """So that planning can say what neither serves."""
    assert [spec.op for spec in paddock_ops() if spec.groups] == ["linear_int4", "linear_int4_fp8"]
