"""The candidate for FP8 products of few tokens, as far as it goes without a GPU: who takes which steps, and its roles as threads.

T tokens, I input features, O output features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import QuantizedActivation, reference
from paddock.layers.reference import FP8
from paddock.testing.oracle import relative_rms
from paddock_triton import int4_bringing, int4_parts, ops_activation
from paddock_triton.rows import blocks_of
from tests.bench import fp8_few_candidate as candidate
from tests.bench import fp8_ring_gated
from tests.bench.fp8_few_candidate import idle, launch_ring, launch_ring_gated, takes
from tests.bench.fp8_ring_tiles import MIXES, RINGS, RingTile
from tests.integration.gluon_on_cpu import Device

TILES = [tile for tiles in RINGS.values() for tile in tiles]
# Outputs and inputs of the products of Llama-3.1-70B's layers, and of 8B's.
WEIGHTS = (
    *((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the arithmetic of who takes what be called as Python's."""
    for name in ("first_unit", "program_of", "uneven", "first_of", "owner_of", "share_of", "place_in"):
        monkeypatch.setattr(int4_bringing, name, getattr(int4_bringing, name).fn)


def _pieces(program: int, programs: int, span: int, tiles: int, tile: RingTile) -> list[tuple[int, int, int]]:
    """Return a program's pieces: the tile, the first step of it and how many."""
    first, count = int4_bringing.share_of(program, programs, span, tiles, tile.shared, tile.lead)
    found, t = list[tuple[int, int, int]](), 0
    while t < count:
        number, block = int4_bringing.place_in(program, programs, first, t, span, tile.shared)
        taken = min(span - block, count - t)
        last = int4_bringing.place_in(program, programs, first, t + taken - 1, span, tile.shared)
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
    """Of each tile that is timed. Steps differ by one at most; who waits does so last, for parts that are the first of others."""
    for cut in {(each.rows, each.pieces, each.shared, each.places, each.lead): each for each in TILES}.values():
        span, tiles = blocks_of(inputs, cut.pieces * 128), blocks_of(outputs, cut.rows)
        tile, programs = cut.given_out(tiles, span, processors)
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
        halves = (counts, counts[programs // 2 :]) if not tile.lead else (counts[: programs // 2], counts[programs // 2 :])
        assert all(max(half) - min(half) <= 1 for half in halves)
        assert 0 <= counts[-1] + 1 - counts[0] - tile.lead <= 2, "another lead"
        assert 2 * counts[0] >= sum(counts) // programs
        kept = {(work[0][0], program) for program, work in enumerate(works) if work[0][1] > 0}
        assert all(block == 0 for work in works for _, block, _ in work[1:]), "a part that is not a program's first"
        waited = set[tuple[int, int]]()
        for program, work in enumerate(works):
            assert all(count == span for _, block, count in work[:-1] if block == 0), "a wait that is not a program's last"
            number, block, count = work[-1]
            if block == 0 and count < span:
                last = int4_bringing.owner_of(number * span + span - 1, programs, tiles * span, tile.lead)
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
    """Have the candidate's launches run by roles on a CPU; they count in `counted`."""
    device = Device(seed)

    def launch(
        kernel: Any, grid: tuple[int], *args: Any, num_warps: int, maxnreg: int | None, launch_pdl: bool = False, **options: Any
    ) -> None:
        tile = options["spec"]
        assert grid[0] <= programs * tile.places
        early = {"waiting": grid[0] * (tile.teams + 1), "asked": grid[0] * tile.pieces}  # all but who copies weights
        before = threading.Thread(target=device.end_before, args=(given.arrive,), kwargs=early, daemon=True)
        before.start()
        device.run(kernel, grid[0], args, options)
        before.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidate, "launch", launch)
        patch.setattr(candidate, "processors", lambda _device: programs)
        patch.setattr(candidate, "counters", lambda _device, count: counted[:count])
        patch.setattr(candidate, "_DTYPES", {torch.bfloat16: torch.bfloat16})
        device.pretend(patch, [candidate, fp8_ring_gated, int4_bringing, int4_parts, ops_activation])
        yield


def _product(given: Given, programs: int, seed: int, tile: RingTile, counted: Tensor) -> Tensor:
    """Return the product by roles on a CPU."""
    out_TO = torch.full((len(given.x_TI), len(given.weight_OI)), torch.nan)
    with _threads(given, programs, seed, counted):
        launch_ring(out_TO, given.late_TI, given.late_scale, given.weight_OI, given.scale_O1, tile)
    return out_TO


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
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


@pytest.mark.parametrize("tile", [tiles[at] for tiles in RINGS.values() for at in (0, 2, -1)], ids=lambda tile: tile.name)
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


def test_more_tokens_than_a_tile_s_take_more_tiles() -> None:
    """Each tile of the weight once for each so many tokens."""
    given, counted = Given(13, 200, 1040, per_token=True), torch.zeros(64, dtype=torch.int32)
    found = _product(given, 5, 0, RingTile(tokens=8, teams=2, slots=3), counted)
    assert relative_rms(found, given.expected_TO()) < 1e-6


def test_whole_tiles_are_taken_where_few_programs_idle() -> None:
    """Of 64 outputs, on 132 multiprocessors: 128 and 896 tiles, not 160, nor any of 8B's."""
    whole = [idle(MIXES[16][0], outputs, 132) <= 0.05 for outputs, _ in WEIGHTS]
    assert whole == [False, True, True, True, False, False, False, False]


def test_what_the_copy_engine_cannot_bring_is_refused() -> None:
    """Rows that do not begin at multiples of 16 bytes, and inputs that lie apart."""
    x_TI, weight_OI = torch.zeros(4, 1040).to(FP8), torch.zeros(64, 1040).to(FP8)
    assert takes(x_TI, weight_OI)
    assert not takes(x_TI[:, :1032].contiguous(), weight_OI)
    assert not takes(x_TI, weight_OI[:, 8:])
    assert not takes(x_TI, weight_OI[:, ::2])


@pytest.mark.parametrize(
    "cut",
    [
        {"teams": 3},
        {"halves": 3},
        {"blocks": 3},
        {"deep": True, "halves": 2},
        {"shared": False, "lead": 1},
        {"teams": 4, "halves": 2},
    ],
)
def test_no_tile_is_cut_as_the_kernel_cannot(cut: dict[str, Any]) -> None:
    """It would give wrong numbers without a word."""
    with pytest.raises(AssertionError, match="RingTile"):
        RingTile(**{"tokens": 16, "teams": 2, "slots": 4} | cut)


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
def test_sums_that_a_team_hands_over_meet_in_no_bank(tokens: int) -> None:
    """Sixteen threads store two neighbours each at once, of four rows: each of the 32 banks takes one of them."""
    layout = RingTile(tokens=tokens, teams=2, slots=2, deep=True).handed_shared
    for eight in range(tokens // 8):
        for first_row in range(0, 64, 4):
            banks = []
            for row in range(first_row, first_row + 4):
                turned = eight ^ row // layout.per_phase % layout.max_phase
                banks += [(row * tokens + turned * layout.vec + column) % 32 for column in range(8)]
            assert sorted(banks) == [*range(32)]
