"""Decodes whose warps take keys of their own: what they give is what a decode gives.

H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve

pytest.importorskip("triton")

from paddock.layers import LayerKV, reference
from paddock_triton import attention
from paddock_triton.attention_tile import Tile

ON_GPU = torch.cuda.is_available()
TILE = Tile(block_m=8, block_n=64, warps=4, stages=3, tma=True, pairs=True, apart=True)
# Lengths at the edges of warps' keys and of tiles, in pieces and whole.
LENGTHS = (1, 15, 16, 17, 48, 63, 64, 65, 128, 300) if ON_GPU else (1, 17, 64, 130)
HEADS = [(8, 1, 128), (6, 2, 64), (16, 2, 128), (29, 1, 64), (6, 2, 80)] if ON_GPU else [(6, 2, 16)]


def _serve(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have decodes cut so, rows enough for a group's heads."""

    def tile_of(q_THD: torch.Tensor, kv: LayerKV) -> Tile:
        group = q_THD.shape[1] // kv.k_pages_NPKD.shape[2]
        return evolve(tile, block_m=8 if group <= 8 else 16 if group <= 16 else 32)

    monkeypatch.setattr(attention, "decode_tile", tile_of)


@pytest.mark.memcheck
@pytest.mark.parametrize("cut", [{}, {"warps": 2}, {"tma": False}], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_parts_meet_in_what_attention_is(
    heads: tuple[int, int, int],
    cut: dict[str, Any],
    halves: list[torch.dtype],
    case: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of FP8 pages and plain ones, warps that see nothing among them; what no token has written is NaN."""
    _serve(evolve(TILE, **cut), monkeypatch)
    for page_size in (64, 16) if ON_GPU or not cut else (64,):
        for kv_dtype in (reference.FP8, halves[-1]):
            step = case([(n - 1, 1) for n in LENGTHS], heads, dtype=halves[-1], page_size=page_size, kv_dtype=kv_dtype)
            backend, params = attention.create(step.needs, step.q_THD.device), step.params()
            step.check(step.attend(backend, params), params, f"{kv_dtype} in pages of {page_size}")


def test_a_nan_that_a_query_sees_shows(
    halves: list[torch.dtype], case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a value of a whole tile, and of the last one."""
    _serve(TILE, monkeypatch)
    for key in (3, 66):
        step = case([(69, 1)], (4, 1, 16), dtype=halves[-1], kv_dtype=halves[-1])
        page = int(step.inputs.block_tables_SM[0, key // 64])
        step.kv.v_pages_NPKD[page, key % 64, 0, 5] = torch.nan
        out_THD = step.attend(attention.create(step.needs, step.q_THD.device), step.params())
        assert bool(out_THD[..., 5].isnan().all())
        assert not bool(out_THD[..., 6].isnan().any())


@pytest.mark.parametrize("feature", ["alibi", "sliding_window", "softcap"])
def test_what_parts_do_not_know_is_refused(
    feature: str, halves: list[torch.dtype], case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be left out without a word."""
    _serve(TILE, monkeypatch)
    step = case([(5, 1)], (4, 1, 16), dtype=halves[-1])
    with pytest.raises(AssertionError, match="knows nothing of"):
        step.attend(attention.create(step.needs, step.q_THD.device), step.params(feature))
