"""The ops at the sizes of a model small enough for any test: 64 wide, 8 heads of 8 on 2, 96 in the MLP, in float32.

Heads smaller than a warp, blocks larger than a row, and q, k and v as slices of one fused projection.
T tokens, H query heads, K KV heads, D head size, E model size, F feed-forward size, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import LayerKV, reference
from paddock.testing.oracle import assert_close, poisoned
from paddock_triton import ops_activation, ops_norm, ops_rope

HEADS, KV_HEADS, HEAD, WIDTH, FFN, POSITIONS, PAGE = 8, 2, 8, 64, 96, 512, 16
TOKENS = (1, 2, 3, 12, 15, 16, 17, 31, 63, 200) if torch.cuda.is_available() else (1, 3, 16, 31)


def _normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(device)


def _fused(tokens: int, device: torch.device) -> list[Tensor]:
    """Return q, k and v as the projection leaves them: slices of [T, 96]."""
    qkv_TX = _normal(tokens, (HEADS + 2 * KV_HEADS) * HEAD, device=device)
    parts = torch.split_with_sizes(qkv_TX, [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], dim=-1)
    return [part.view(tokens, -1, HEAD) for part in parts]


def _layers(device: torch.device) -> list[LayerKV]:
    """Return the pages of three layers, which lie in one allocation as an executor's do, full of NaN."""
    pages = torch.full((3, 2, 20, PAGE, KV_HEADS, HEAD), torch.nan, device=device)
    return [LayerKV(k_pages, v_pages) for k_pages, v_pages in pages]


def _table(device: torch.device) -> Tensor:
    angles_LJ = torch.arange(POSITIONS)[:, None] * 1e4 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
    return torch.cat((angles_LJ.cos(), angles_LJ.sin()), dim=-1).to(device)


@pytest.mark.parametrize("tokens", TOKENS)
def test_heads_of_eight_are_rotated_and_kept_as_the_twin_keeps_them(tokens: int, device: torch.device) -> None:
    """q, and every byte of all three layers' pages, are the twin's; the layers beside it stay as they were."""
    generator = torch.Generator().manual_seed(tokens)
    positions_T = torch.randint(POSITIONS, (tokens,), generator=generator).to(device)
    slots_T = torch.randperm(20 * PAGE, generator=generator)[:tokens].to(device)
    found, expected = _layers(device), _layers(device)
    scale = torch.ones((), device=device)
    for layer in (0, 1, 2):
        q_THD, k_TKD, v_TKD = _fused(tokens, device)
        for op, layers in ((ops_rope.rope_and_cache, found), (reference.rope_and_cache, expected)):
            with poisoned():
                rotated_THD = op(q_THD, k_TKD, v_TKD, _table(device), positions_T, layers[layer], slots_T, scale, scale)
            if layers is found:
                mine_THD = rotated_THD
        assert_close(mine_THD, rotated_THD, op="rope_and_cache")
        for one, other in zip(found, expected, strict=True):
            for mine, theirs in ((one.k_pages_NPKD, other.k_pages_NPKD), (one.v_pages_NPKD, other.v_pages_NPKD)):
                assert torch.equal(mine.isnan(), theirs.isnan())
                assert_close(mine.nan_to_num(), theirs.nan_to_num(), op="rope_and_cache")


@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_narrower_than_a_block_equal_the_twins(tokens: int, device: torch.device) -> None:
    """Norms of 64 and a gated MLP of 96, which leave most of a block's lanes idle."""
    x_TE, delta_TE, weight_E = (_normal(*shape, device=device) for shape in ((tokens, WIDTH), (tokens, WIDTH), (WIDTH,)))
    ops: list[tuple[Callable[..., Any], Callable[..., Any], str, tuple[Any, ...]]] = [
        (ops_norm.rms_norm, reference.rms_norm, "rms_norm", (x_TE, weight_E, 1e-6)),
        (ops_norm.add_rms_norm, reference.add_rms_norm, "rms_norm", (x_TE, delta_TE, weight_E, 1e-6)),
        (ops_activation.silu_mul, reference.silu_mul, "silu_mul", (_normal(tokens, 2 * FFN, device=device) * 4,)),
    ]
    for op, twin, name, given in ops:
        with poisoned():
            found = op(*given)
        mine, theirs = (x if isinstance(x, tuple) else (x,) for x in (found, twin(*given)))
        for one, other in zip(mine, theirs, strict=True):
            assert_close(one, other, op=name, at=f"T{tokens}")
