"""The kernels that filter before they draw, against the reference and against the definitions in float64.

R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from paddock.execution import randomness, sampling_reference
from paddock_triton import ops_filter, ops_sampling
from paddock_triton.filter_search import EACH
from paddock_triton.rows import pieces_of

ON_GPU = torch.cuda.is_available()
VOCAB = 128_256 if ON_GPU else 300
EDGE = 2e-6  # of a row's mass: float32 sums may differ from the reference's by it
ALL = tuple(product((0, 1, 7, 40, VOCAB - 1, VOCAB), (1.0, 0.9, 0.3, 1e-6), (0.0, 0.02, 1.0)))
SETTINGS = ALL[::5] if ON_GPU else ALL[::14]
Maker = Callable[[torch.Generator], torch.Tensor]
ROWS: dict[str, Maker] = {
    "normal": lambda g: torch.randn(VOCAB, generator=g),
    "steep": lambda g: 12 * torch.randn(VOCAB, generator=g),
    "tied": lambda g: torch.randn(VOCAB, generator=g).mul_(2).round_(),
    "equal": lambda g: torch.full((VOCAB,), 0.3),
    "masked": lambda g: torch.randn(VOCAB, generator=g).masked_fill_(torch.rand(VOCAB, generator=g) < 0.9, -torch.inf),
    "outliers": lambda g: torch.randn(VOCAB, generator=g) - 3e38 * (torch.rand(VOCAB, generator=g) < 0.5),
    "zeros of both signs": lambda g: torch.zeros(VOCAB).copysign(torch.randn(VOCAB, generator=g)),
}
SIZES = {"as it is": (8, 512, 32), "few pivots, many steps, split rows": (4, 8, 1)}


@pytest.fixture(params=SIZES)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let the edge be closed in on in few steps, and in many, over rows that even here are several programs'; return which."""
    for name, value in zip(("_PIVOTS", "_FOUND", "_WARPS"), SIZES[request.param], strict=True):
        monkeypatch.setattr(ops_filter, name, value)
    return [*SIZES].index(request.param)


@pytest.mark.parametrize("kind", ROWS)
def test_what_stays_is_what_the_definitions_leave(device: torch.device, kind: str, sizes: int) -> None:
    """Every filter and combination, over rows with ties, infinities and outliers, keeps the tokens that float64 keeps.

    Without a GPU each kind of row and size has a few of them, others than the next.
    """
    rows = _rows(SETTINGS if ON_GPU else ALL[2 * list(ROWS).index(kind) + sizes :: 37], kind)
    top_R, _ = sampling_reference.most_likely(rows["logits_RV"])
    given = [x.to(device) for x in (rows["logits_RV"], top_R, rows["temperature_R"], *_filters(rows))]
    least_R = ops_filter.least_scaled(*given).cpu()
    for i in range(len(least_R)):
        scaled_V = (rows["logits_RV"][i] - top_R[i]) / rows["temperature_R"][i]
        top_k, top_p, min_p = (x[i] for x in _filters(rows))
        _check_row(scaled_V, scaled_V >= least_R[i], int(top_k), float(top_p), min_p)


def test_a_filtered_draw_takes_the_token_the_reference_takes(device: torch.device) -> None:
    """Filtered, drawn and greedy rows of one call."""
    rows = _rows(SETTINGS, "normal")
    rows["temperature_R"][::9] = 0.0
    expected_R = sampling_reference.draw_filtered(*_arguments(rows, torch.device("cpu")))
    assert torch.equal(ops_filter.draw_filtered(*_arguments(rows, device)).cpu(), expected_R)


@pytest.mark.usefixtures("sizes")
def test_a_row_s_edge_ignores_how_many_programs_it_has(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a row is split, as its neighbours' number decides, the least logit that stays has the same bits."""
    rows = _rows([one for one in SETTINGS if one[2] < 1], "normal")
    top_R, _ = sampling_reference.most_likely(rows["logits_RV"])
    given = [x.to(device) for x in (rows["logits_RV"], top_R, rows["temperature_R"], *_filters(rows))]
    found = []
    for programs in (1, 2 * len(top_R), 1000 * len(top_R)):
        monkeypatch.setattr(ops_filter, "_PROGRAMS", programs)
        found.append(ops_filter.least_scaled(*given))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_row_in_odd_numbers_of_pieces_keeps_what_the_definitions_leave(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five blocks shared by one, three and five programs: all find the edge that float64 finds, to the bit."""
    blocks, lanes = 5, 32
    for name, value in (("_PIVOTS", 4), ("_FOUND", 8), ("_WARPS", lanes // 32)):
        monkeypatch.setattr(ops_filter, name, value)
    rows = _rows([(0, 0.9, 0.02), (40, 1.0, 0.0)], "normal")
    vocab = blocks * lanes * EACH.value - 40
    rows["logits_RV"] = torch.randn(2, vocab, generator=torch.Generator().manual_seed(3))
    top_R, _ = sampling_reference.most_likely(rows["logits_RV"])
    given = [x.to(device) for x in (rows["logits_RV"], top_R, rows["temperature_R"], *_filters(rows))]
    found = {}
    for most in (1, 3, 5):
        monkeypatch.setattr(ops_filter, "_PROGRAMS", 2 * most)
        found[pieces_of(blocks, most)] = ops_filter.least_scaled(*given).cpu()
    assert set(found) == {1, 3, 5}
    assert all(torch.equal(least_R, found[1]) for least_R in found.values())
    for i, least in enumerate(found[1]):
        scaled_V = (rows["logits_RV"][i] - top_R[i]) / rows["temperature_R"][i]
        top_k, top_p, min_p = (x[i] for x in _filters(rows))
        _check_row(scaled_V, scaled_V >= least, int(top_k), float(top_p), min_p)


@pytest.mark.parametrize(("pivots", "found"), [(4, 8), (8, 64)], ids=["every step launched counts", "steps are left out"])
def test_what_memory_held_before_shows_in_no_edge(
    device: torch.device, pivots: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pivots of steps still to come, or left out, are memory nobody wrote: whatever is there, the edge is the same."""
    for name, value in (("_PIVOTS", pivots), ("_FOUND", found), ("_WARPS", 1)):
        monkeypatch.setattr(ops_filter, name, value)
    rows, empty = _rows([(5, 0.9, 0.0), (VOCAB // 2, 1.0, 0.0), (0, 0.99, 0.0)], "normal"), torch.empty
    top_R, _ = sampling_reference.most_likely(rows["logits_RV"])
    given = [x.to(device) for x in (rows["logits_RV"], top_R, rows["temperature_R"], *_filters(rows))]
    least_R = ops_filter.least_scaled(*given)
    stays_RV = (given[0] - given[1][:, None]) / given[2][:, None] >= least_R[:, None]
    edge_R = given[0].masked_fill(~stays_RV, torch.inf).amin(-1)
    just_above_R = edge_R.nextafter(top_R.to(device))

    def filled(left_R: torch.Tensor, *size: Any, **kind: Any) -> torch.Tensor:
        x = empty(*size, **kind)
        if not x.is_floating_point():
            return x.fill_(7)
        return x.copy_(left_R[:, None].expand_as(x)) if x.dim() > 1 else x.fill_(torch.nan)

    for left_R in (torch.full_like(edge_R, torch.nan), just_above_R):
        monkeypatch.setattr(torch, "empty", partial(filled, left_R))
        assert torch.equal(ops_filter.least_scaled(*given), least_R)


def test_filters_turned_off_leave_the_draw_as_it_is(device: torch.device) -> None:
    """A row that wants no filter draws what `draw` draws, and costs no pass more."""
    arguments = _arguments(_rows([(0, 1.0, 0.0)] * 5, "normal"), device)
    drawn_R = ops_sampling.draw(*arguments[:4], *arguments[-2:])
    assert torch.equal(ops_filter.draw_filtered(*arguments), drawn_R)


def test_unusable_rows_end_and_harm_no_neighbour(device: torch.device) -> None:
    """NaN, infinity and rows of -inf give some token of the vocabulary; the others draw as if alone."""
    rows = _rows([(5, 0.9, 0.0)] * 6, "normal")
    rows["logits_RV"][0, 11], rows["logits_RV"][1, 5], rows["logits_RV"][2] = torch.nan, torch.inf, -torch.inf
    arguments = _arguments(rows, device)
    token_R = ops_filter.draw_filtered(*arguments)
    assert ((token_R >= 0) & (token_R < VOCAB)).all()
    alone_R = ops_filter.draw_filtered(*(x[3:] for x in arguments))
    assert torch.equal(token_R[3:], alone_R)


def test_half_precision_logits_are_read_as_float32(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Rounded logits, equal in many places, are filtered as the same numbers in float32."""
    for dtype in dtypes:
        logits_RV, *rest = _arguments(_rows(SETTINGS[::3], "normal"), device)
        half_RV = logits_RV.to(dtype)
        best = sampling_reference.most_likely(half_RV)
        one_R = ops_filter.draw_filtered(half_RV, *best, *rest[2:])
        assert torch.equal(one_R, ops_filter.draw_filtered(half_RV.float(), *best, *rest[2:]))


def test_no_rows_give_no_tokens(device: torch.device) -> None:
    """A step that samples nothing launches nothing."""
    arguments = _arguments(_rows([(5, 0.9, 0.0)], "normal"), device)
    assert ops_filter.draw_filtered(*(x[:0] for x in arguments)).tolist() == []


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_a_captured_draw_follows_what_its_arguments_hold(device: torch.device) -> None:
    """A graph replayed over other logits and parameters gives what calls outside of it give."""
    first, second = (_arguments(_rows(SETTINGS[i:14:2], kind), device) for i, kind in enumerate(("steep", "normal")))
    held = [x.clone() for x in first]
    ops_filter.draw_filtered(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_R = ops_filter.draw_filtered(*held)
    for arguments in (first, second):
        for mine, given in zip(held, arguments, strict=True):
            mine.copy_(given)
        graph.replay()
        assert torch.equal(token_R, ops_filter.draw_filtered(*arguments))


def _rows(settings: Any, kind: str) -> dict[str, torch.Tensor]:
    """Return a row for each setting of top-k, top-p and min-p, at temperatures from 0.3 up."""
    generator, count = torch.Generator().manual_seed(7), len(settings)
    top_k, top_p, min_p = zip(*settings, strict=True)
    return {
        "logits_RV": torch.stack([ROWS[kind](generator) for _ in range(count)]),
        "temperature_R": torch.linspace(0.3, 2.0, count),
        "top_k_R": torch.tensor(top_k, dtype=torch.int32),
        "top_p_R": torch.tensor(top_p),
        "min_p_R": torch.tensor(min_p),
        "seed_R2": torch.tensor([randomness.seed_words(seed) for seed in range(count)], dtype=torch.int32).T.contiguous().T,
        "position_R": torch.arange(count, dtype=torch.int32),
    }


def _filters(rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return rows["top_k_R"], rows["top_p_R"], rows["min_p_R"]


def _arguments(rows: dict[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return the arguments of `draw_filtered`."""
    best = sampling_reference.most_likely(rows["logits_RV"])
    noise = (rows["seed_R2"], rows["position_R"])
    return [x.to(device) for x in (rows["logits_RV"], *best, rows["temperature_R"], *_filters(rows), *noise)]


def _check_row(scaled_V: torch.Tensor, kept_V: torch.Tensor, top_k: int, top_p: float, min_p: torch.Tensor) -> None:
    """Hold what stays of a row beside what min-p and top-k leave, and top-p beside the mass it wants."""
    alive_V = scaled_V >= min_p.log()
    if 0 < top_k < alive_V.sum():
        alive_V &= scaled_V >= scaled_V.topk(top_k).values[-1]
    if top_p == 1:
        assert torch.equal(kept_V, alive_V)
        return
    mass_V = torch.where(alive_V, scaled_V.double().exp(), 0.0)
    least, total = scaled_V[kept_V].min(), mass_V.sum()
    assert torch.equal(kept_V, alive_V & (scaled_V >= least))
    assert mass_V[kept_V].sum() >= (top_p - EDGE) * total
    assert mass_V[scaled_V > least].sum() < (top_p + EDGE) * total
