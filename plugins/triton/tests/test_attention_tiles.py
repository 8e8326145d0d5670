"""Decodes that take two tiles of keys at a time, against float64 and FP8 arithmetic against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import LayerKV
from paddock.layers.reference import FP8
from paddock.testing.kernels import AttentionCase
from paddock_triton import attention, attention_decode
from paddock_triton.attention import TritonAttention
from paddock_triton.attention_tile import Tile, absorb
from paddock_triton.attention_tuning import decode_tile

ON_GPU = torch.cuda.is_available()
HALVES = (torch.float16, torch.bfloat16) if ON_GPU else (torch.float16,)  # the interpreter cuts bfloat16 off
HEADS = [(8, 1, 128), (9, 3, 64), (29, 1, 64), (4, 2, 256), (6, 2, 48)] if ON_GPU else [(6, 2, 32), (3, 1, 48)]
# One key, tiles that fill up and those that begin, an odd number of them, pieces of several programs.
BATCH = [(0, 1), (62, 1), (63, 1), (64, 1), (127, 1), (128, 1), (300, 1), (640, 1)]
FEATURES = ("", "alibi", "sliding_window", "softcap")


def _two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have decodes take two tiles at a time; return the list that each launch's number of tiles goes to."""
    taken: list[int] = []

    def tile_of(q_THD: Tensor, kv: LayerKV) -> Tile:
        tile = evolve(decode_tile(q_THD, kv), tiles=2, stages=2)
        taken.append(tile.tiles)
        return tile

    monkeypatch.setattr(attention, "decode_tile", tile_of)
    return taken


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_two_tiles_give_what_one_by_one_gives(
    heads: tuple[int, int, int], feature: str, case: Callable[..., AttentionCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over pages of 16 bits and of FP8, and in FP8 arithmetic, with small pages and with those that hold a tile."""
    taken = _two_at_a_time(monkeypatch)
    for turn, (dtype, kept, in_fp8) in enumerate(
        (d, k, f) for d in HALVES for k, f in ((None, False), (FP8, False), (FP8, True))
    ):
        step = case(BATCH, heads, dtype=dtype, page_size=(64, 16)[turn % 2], kv_dtype=kept)
        params = evolve(step.params(*filter(None, [feature])), in_fp8=in_fp8)
        step.check(step.attend(TritonAttention(step.q_THD.device), params), params, f"{heads} {feature} {kept} {in_fp8}")
    assert set(taken) == {2}


@pytest.mark.skipif(ON_GPU, reason="a function of a compiled kernel cannot be replaced")
def test_the_second_tile_counts(case: Callable[..., AttentionCase], monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out, the result is another: what is checked above reads pairs."""
    _two_at_a_time(monkeypatch)
    step = case([(640, 1)], (6, 2, 32), dtype=torch.float16, page_size=64)
    params = step.params()

    def first_alone(*given: Any) -> Any:
        return absorb(*given[:4], *given[6:12], False, given[12])

    monkeypatch.setattr(attention_decode, "absorb_two", first_alone)
    with pytest.raises(AssertionError, match="relative RMS"):
        step.check(step.attend(TritonAttention(step.q_THD.device), params), params)
