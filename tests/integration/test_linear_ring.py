"""Products of few tokens by the ring as far as they go without a GPU: who takes which steps, and the kernel's roles as threads.

T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

pytest.importorskip("triton")

from plugins.triton.tests.ring_arithmetic import call_plainly

from paddock.layers import QuantizedActivation, reference
from paddock.layers.reference import FP8
from paddock.testing.oracle import relative_rms
from paddock_triton import linear_ring, linear_ring_gated, ops_activation, ring, ring_parts
from paddock_triton.linear_ring import (
    TILES,
    launch_ring,
    launch_ring_blocks,
    launch_ring_gated,
    launch_ring_plain,
    serves,
    tile_for,
)
from paddock_triton.linear_ring_spec import RingTile
from paddock_triton.rows import blocks_of
from tests.integration.gluon_on_cpu import Device

CUTS = [evolve(tile, shared=shared) for tile in TILES.values() for shared in (True, False)]
# Outputs and inputs of the products of Llama-3.1-70B's layers, and of 8B's.
WEIGHTS = (
    *((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
)


def _name(tile: RingTile) -> str:
    return f"{tile.tokens} tokens, {'shared' if tile.shared else 'whole'}"


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the arithmetic of who takes what be called as Python's."""
    call_plainly(monkeypatch)


def _pieces(program: int, programs: int, span: int, tiles: int, tile: RingTile) -> list[tuple[int, int, int]]:
    """Return a program's pieces: the tile, the first step of it and how many."""
    first, count = ring.share_of(program, programs, span, tiles, tile.shared, tile.waves)
    found, t = list[tuple[int, int, int]](), 0
    while t < count:
        number, block = ring.place_in(program, programs, first, t, span, tiles, tile.shared, tile.waves)
        taken = min(span - block, count - t)
        last = ring.place_in(program, programs, first, t + taken - 1, span, tiles, tile.shared, tile.waves)
        assert last == (number, block + taken - 1)
        found.append((number, block, taken))
        t += taken
    return found


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("processors", [132, 114, 7])
@pytest.mark.parametrize(("outputs", "inputs"), WEIGHTS)
def test_programs_take_every_step_once_and_parts_meet_where_they_are_waited_for(
    outputs: int, inputs: int, processors: int
) -> None:
    """Of each tile. Steps differ by one at most; who waits does so last, for parts that are the first of others."""
    for tile in {(each.pieces, each.shared): each for each in CUTS}.values():
        span, tiles = blocks_of(inputs, tile.pieces * 128), blocks_of(outputs, tile.rows)
        programs = min(processors, tiles * (span if tile.shared else 1))
        works = [_pieces(each, programs, span, tiles, tile) for each in range(programs)]
        assert all(works), "a program without work"
        taken = sorted(piece for work in works for piece in work)
        ends = [(number, 0) for number in range(tiles)]
        for number, block, count in taken:  # each tile's pieces follow one another
            assert ends[number] == (number, block)
            ends[number] = (number, block + count)
        assert ends == [(number, span) for number in range(tiles)]
        if not tile.shared:
            assert all(count == span for _, _, count in taken)
            continue
        counts = [sum(count for _, _, count in work) for work in works]
        assert max(counts) - min(counts) <= 1
        kept = {(work[0][0], program) for program, work in enumerate(works) if work[0][1] > 0}
        assert all(block == 0 for work in works for _, block, _ in work[1:]), "a part that is not a program's first"
        waited = set[tuple[int, int]]()
        for program, work in enumerate(works):
            assert all(count == span for _, block, count in work[:-1] if block == 0), "a wait that is not a program's last"
            number, block, count = work[-1]
            if block == 0 and count < span:
                last = ring.program_of(number * span + span - 1, programs, tiles * span)
                waited |= {(number, other) for other in range(program + 1, last + 1)}
        assert kept == waited


class Given:
    """A product's operands, x and its scale written only when the kernel before ends."""

    def __init__(self, tokens: int, outputs: int, inputs: int, *, per_token: bool) -> None:
        draw = torch.Generator().manual_seed(outputs + tokens)
        self.x_TI = torch.randn(tokens, inputs, generator=draw).to(FP8)
        self.scale = torch.rand(tokens, 1, generator=draw) if per_token else torch.tensor(0.7)
        self.weight_OI, self.scale_O1 = (
            torch.randn(outputs, inputs, generator=draw).to(FP8),
            torch.rand(outputs, 1, generator=draw),
        )
        self.late_TI, self.late_scale = torch.full((tokens, inputs), torch.nan).to(FP8), torch.full_like(self.scale, torch.nan)

    def arrive(self) -> None:
        """Write what the kernel before writes."""
        self.late_TI.view(torch.uint8).copy_(self.x_TI.view(torch.uint8))
        self.late_scale.copy_(self.scale)

    def expected_TO(self) -> Tensor:
        """Return the twin's product."""
        return reference.linear_fp8(self.x_TI, self.scale, self.weight_OI, self.scale_O1, torch.float32)


@contextmanager
def _threads(given: Given, programs: int, seed: int, counted: Tensor) -> Iterator[None]:
    """Have launches run by roles on a CPU; they count in `counted`."""
    device = Device(seed)

    def launch(
        kernel: Any, grid: tuple[int], *args: Any, num_warps: int, maxnreg: int | None, launch_pdl: bool = False, **options: Any
    ) -> None:
        tile = options["spec"]
        assert grid[0] <= programs
        waiting, asked = grid[0] * (tile.teams + 1), grid[0] * tile.pieces  # all but who copies weights
        device.run_behind(given.arrive, kernel, grid[0], args, options, waiting=waiting, asked=asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_ring, "launch", launch)
        patch.setattr(linear_ring, "processors", lambda _device: programs)
        patch.setattr(linear_ring, "counters", lambda _device, count: counted[:count])
        patch.setattr(linear_ring, "_DTYPES", {torch.bfloat16: torch.bfloat16})
        device.pretend(patch, [linear_ring, linear_ring_gated, ring, ring_parts, ops_activation])
        patch.setattr(linear_ring, "fetch", lambda _at: None)
        yield


def _product(given: Given, programs: int, seed: int, tile: RingTile, counted: Tensor) -> Tensor:
    """Return the product by roles on a CPU."""
    out_TO = torch.full((len(given.x_TI), len(given.weight_OI)), torch.nan)
    with _threads(given, programs, seed, counted):
        launch_ring(out_TO, given.late_TI, given.late_scale, given.weight_OI, given.scale_O1, tile)
    return out_TO


@pytest.mark.parametrize("tile", CUTS, ids=_name)
def test_roles_give_the_product_in_whatever_order_they_run(tile: RingTile) -> None:
    """Weights before the kernel before ends, all else after it; tokens, outputs and inputs that fill no tile.

    There are more steps than slots. Twice over, on counters that each launch leaves at zero.
    """
    counted = torch.zeros(64, dtype=torch.int32)
    for programs, outputs, per_token in ((7, 328, True), (2, 600, False)):
        given = Given(tile.tokens - 3, outputs, 2064, per_token=per_token)
        found = [_product(given, programs, seed, tile, counted) for seed in range(2)]
        assert relative_rms(found[0], given.expected_TO()) < 1e-6
        assert torch.equal(*found)  # parts are added in one order
        assert not counted.any()


@pytest.mark.parametrize("tile", CUTS, ids=_name)
def test_products_of_128_inputs_meet_the_scales_of_their_block(tile: RingTile) -> None:
    """Each token's and the weight's, in parts of tiles and whole ones, that fill none."""
    for programs, outputs, run in ((3, 328, 64), (7, 200, 128)):
        given, counted = Given(tile.tokens - 3, outputs, 2064, per_token=True), torch.zeros(64, dtype=torch.int32)
        draw = torch.Generator().manual_seed(run)
        given.scale = torch.rand(tile.tokens - 3, 17, generator=draw)
        given.late_scale = torch.full_like(given.scale, torch.nan)
        scale_QG = torch.rand(blocks_of(outputs, run), 17, generator=draw)
        out_TO = torch.full((tile.tokens - 3, outputs), torch.nan)
        with _threads(given, programs, 0, counted):
            launch_ring_blocks(out_TO, given.late_TI, given.late_scale, given.weight_OI, scale_QG, run, tile)
        expected_TO = reference.linear_fp8_blocks(given.x_TI, given.scale, given.weight_OI, scale_QG, (run, 128), torch.float32)
        assert relative_rms(out_TO, expected_TO) < 1e-6
        assert not counted.any()


@pytest.mark.parametrize("tile", CUTS, ids=_name)
def test_a_product_ends_in_its_activation(tile: RingTile) -> None:
    """Gates and ups that fill no tile, in parts of tiles too: what the twin gives, but for a value that a sum's order tips."""
    counted, scale = torch.zeros(64, dtype=torch.int32), torch.tensor(3.0)
    given = Given(tile.tokens - 3, 656, 2064, per_token=True)
    out = QuantizedActivation(torch.full((len(given.x_TI), 328), torch.nan), scale)
    with _threads(given, 3, 0, counted):
        launch_ring_gated(out, given.late_TI, given.late_scale, given.weight_OI, given.scale_O1, torch.bfloat16, tile)
    expected = reference.linear_silu_mul_fp8(given.x_TI, given.scale, given.weight_OI, given.scale_O1, torch.bfloat16, scale)
    assert expected.values_TI.float().count_nonzero() > 0.4 * out.values_TI.numel()
    assert (out.values_TI != expected.values_TI.float()).float().mean() < 1e-3
    assert relative_rms(out.values_TI, expected.values_TI.float()) < 3e-3
    assert not counted.any()


@pytest.mark.parametrize("tile", [cut for cut in CUTS if cut.tokens in (8, 64)], ids=_name)
def test_sixteen_bits_are_multiplied_without_scales(tile: RingTile) -> None:
    """Half as many inputs a step, in parts of tiles and whole ones, that fill none."""
    counted, given = torch.zeros(64, dtype=torch.int32), Given(tile.tokens - 3, 200, 1040, per_token=True)
    weight_OI = torch.randn(200, 1040, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    given.x_TI = torch.randn(given.x_TI.shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    given.late_TI, out_TO = torch.full_like(given.x_TI, torch.nan), torch.full((len(given.x_TI), 200), torch.nan)
    with _threads(given, 3, 0, counted):
        launch_ring_plain(out_TO, given.late_TI, weight_OI, evolve(tile, item=2))
    assert relative_rms(out_TO, given.x_TI.float() @ weight_OI.float().T) < 1e-6
    assert not counted.any()


def test_more_tokens_than_a_tile_s_take_more_tiles() -> None:
    """Each tile of the weight once for each so many tokens."""
    given, counted = Given(13, 200, 1040, per_token=True), torch.zeros(64, dtype=torch.int32)
    found = _product(given, 5, 0, RingTile(tokens=8, teams=2, slots=3), counted)
    assert relative_rms(found, given.expected_TO()) < 1e-6


@pytest.mark.parametrize(("outputs", "inputs"), WEIGHTS)
def test_whole_tiles_are_taken_where_memory_waits_for_few(outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 132 multiprocessors 160 tiles are shared: 28 would be read at a quarter of the speed. So are a few long ones."""
    monkeypatch.setattr(linear_ring, "processors", lambda _device: 132)
    tile = tile_for(17, torch.empty(outputs, inputs, dtype=FP8))
    assert (tile.tokens, tile.shared) == (32, outputs == 10240)
    assert tile_for(1, torch.empty(256, 65536, dtype=FP8)).shared


def test_a_kernel_of_its_own_is_for_64_tokens_of_what_the_copy_engine_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    """On compute capability 9, rows that begin at multiples of 16 bytes; tokens that do not are copied."""
    x_TI, weight_OI = torch.zeros(64, 1040).to(FP8), torch.zeros(64, 1040).to(FP8)
    assert not serves(x_TI, weight_OI)
    monkeypatch.setattr(linear_ring, "runs_on", lambda _device: True)
    assert serves(x_TI, weight_OI)
    assert serves(x_TI[:1, 8:], weight_OI)
    assert not serves(x_TI[:0], weight_OI)
    assert not serves(torch.zeros(65, 1040).to(FP8), weight_OI)
    assert not serves(x_TI, weight_OI[:, 8:])
    assert not serves(x_TI, torch.zeros(64, 1032).to(FP8))
    halves_TI = torch.zeros(64, 1032, dtype=torch.bfloat16)
    assert serves(halves_TI, halves_TI)
    assert not serves(halves_TI, torch.zeros(64, 1028, dtype=torch.bfloat16))


def test_no_tile_is_cut_as_the_kernel_cannot() -> None:
    """It would give wrong numbers without a word."""
    with pytest.raises(AssertionError, match="RingTile"):
        RingTile(tokens=16, teams=3, slots=4)


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
def test_sums_that_a_team_hands_over_meet_in_no_bank(tokens: int) -> None:
    """Sixteen threads store two neighbours each at once, of four rows: each of the 32 banks takes one of them."""
    layout = RingTile(tokens=tokens, teams=2, slots=2).handed_shared
    for eight in range(tokens // 8):
        for first_row in range(0, 64, 4):
            banks = []
            for row in range(first_row, first_row + 4):
                turned = eight ^ row // layout.per_phase % layout.max_phase
                banks += [(row * tokens + turned * layout.vec + column) % 32 for column in range(8)]
            assert sorted(banks) == [*range(32)]
