"""K and V into their pages, with and without rotation, against the plain-torch twins.

T tokens, H query heads, K KV heads, D head size, L positions, N pages, P tokens a page.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import LayerKV, reference
from paddock.testing.oracle import assert_close, poisoned
from paddock_triton import ops_rope

HEADS = ((9, 3, 64), (71, 1, 64), (8, 2, 48), (5, 5, 80), (16, 16, 96), (32, 8, 128), (3, 1, 256))  # (H, K, D)
PAGE, PAGES, POSITIONS = 16, 12, 300


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_q_is_rotated_and_k_and_v_are_in_their_slots(
    heads: tuple[int, int, int], device: torch.device, dtypes: list[torch.dtype]
) -> None:
    """Views of a fused projection are taken as they are; no other row of the pages is touched."""
    for dtype in dtypes:
        for tokens in (0, 1, 7, 63, 123) if device.type == "cuda" else (0, 5):
            q_THD, k_TKD, v_TKD = _fused(tokens, *heads, dtype, device)
            _check(q_THD, k_TKD, v_TKD, page_dtype=dtype)


@pytest.mark.memcheck
def test_heads_may_lie_apart(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Groups of queries, one key and one value side by side, as Falcon projects them, and heads in any other layout."""
    tokens = 7 if device.type == "cuda" else 2
    for dtype in dtypes:
        for kv_heads, queries in ((4, 6), (1, 71), (5, 1), (3, 29), (8, 16)):
            groups_TKXD = _normal((tokens, kv_heads, queries + 2, 64), dtype, device)
            q_TKGD, k_TKD, v_TKD = groups_TKXD[:, :, :-2], groups_TKXD[:, :, -2], groups_TKXD[:, :, -1]
            _check(q_TKGD, k_TKD, v_TKD, page_dtype=dtype)
            _check(q_TKGD.mT.contiguous().mT, k_TKD, v_TKD, page_dtype=dtype)
        q_THD, k_TKD, v_TKD = (_normal((tokens, 64, heads), dtype, device).mT for heads in (6, 2, 2))
        _check(q_THD, k_TKD, v_TKD, page_dtype=dtype)


@pytest.mark.memcheck
def test_values_at_odd_addresses_are_read_whole(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Nothing is assumed of where a view begins."""
    for dtype in dtypes:
        rows_TX = _normal((7, 3 * 64 + 5), dtype, device)[:, 3:-2]
        q_THD, k_TKD, v_TKD = (rows_TX[:, i * 64 : i * 64 + 64].view(-1, 1, 64) for i in range(3))
        _check(q_THD, k_TKD, v_TKD, page_dtype=dtype)


@pytest.mark.memcheck
@pytest.mark.gpu
def test_fp8_pages_hold_what_the_twin_would_write(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Values divided by their scales, saturated; only a tie that rotation tips may round to the neighbouring value."""
    if device.type != "cuda":
        pytest.skip("the interpreter cuts FP8 off instead of rounding it")
    for dtype in dtypes:
        for scales in ((None, None), (torch.tensor(0.011, device=device), torch.tensor(0.7, device=device))):
            q_THD, k_TKD, v_TKD = _fused(123, 8, 2, 128, dtype, device)
            k_TKD[3] *= 1e3
            found, expected, slots_T = _both(q_THD, k_TKD, v_TKD, torch.float8_e4m3fn, *scales)
            k_found, k_expected = (_rows(kv.k_pages_NPKD)[slots_T] for kv in (found, expected))
            assert (k_found != k_expected).float().mean() < 1e-3
            assert torch.equal(_rows(found.v_pages_NPKD), _rows(expected.v_pages_NPKD))


def test_exact_values_go_through_fp8_pages_unchanged(device: torch.device) -> None:
    """What FP8 holds exactly is stored exactly, and what is too large for it becomes 448."""
    k_TKD = torch.tensor([1.0, -2.5, 448.0, 1e6, -1e6, 0.0, 0.015625, 8.0], device=device).view(2, 1, 4)
    kv, slots_T = _pages(1, 4, torch.float8_e4m3fn, device), torch.tensor([17, 3], device=device)
    half = torch.tensor(0.5, device=device)
    ops_rope.cache_kv(k_TKD, -k_TKD, kv, slots_T, half, None)
    k_RKD, v_RKD = (pages_NPKD.float().flatten(0, 1)[slots_T].flatten() for pages_NPKD in (kv.k_pages_NPKD, kv.v_pages_NPKD))
    assert k_RKD.tolist() == [2.0, -5.0, 448.0, 448.0, -448.0, 0.0, 0.03125, 16.0]
    assert v_RKD.tolist() == [-1.0, 2.5, -448.0, -448.0, 448.0, 0.0, -0.015625, -8.0]


def test_unrotated_keys_and_values_are_stored_as_they_are(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Without rotary positions the pages hold the very bits given."""
    for dtype in dtypes:
        for tokens in (0, 1, 7, 63) if device.type == "cuda" else (0, 1, 7):
            _, k_TKD, v_TKD = _fused(tokens, 8, 5, 48, dtype, device)
            kv, slots_T = _pages(5, 48, dtype, device), _slots(tokens, device)
            ops_rope.cache_kv(k_TKD, v_TKD, kv, slots_T, None, None)
            for pages_NPKD, x_TKD in ((kv.k_pages_NPKD, k_TKD), (kv.v_pages_NPKD, v_TKD)):
                assert torch.equal(pages_NPKD.flatten(0, 1)[slots_T], x_TKD)
                assert int(pages_NPKD.isnan().sum()) == (PAGES * PAGE - tokens) * 5 * 48


def _check(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, page_dtype: torch.dtype) -> None:
    table_LD, positions_T = _table(q_THD.shape[-1], q_THD.device), _positions(len(q_THD), q_THD.device)
    kv, slots_T = _pages(k_TKD.shape[1], k_TKD.shape[2], page_dtype, q_THD.device), _slots(len(q_THD), q_THD.device)
    with poisoned():
        rotated_THD = ops_rope.rope_and_cache(q_THD, k_TKD, v_TKD, table_LD, positions_T, kv, slots_T, None, None)
    wide = _pages(k_TKD.shape[1], k_TKD.shape[2], torch.float32, q_THD.device)
    q_THD = q_THD.flatten(1, -2)  # the twin is given queries side by side
    given = (q_THD.float(), k_TKD.float(), v_TKD.float(), table_LD, positions_T, wide, slots_T, None, None)
    assert rotated_THD.is_contiguous()
    assert_close(rotated_THD, reference.rope_and_cache(*given), op="rope_and_cache")
    k_RKD, v_RKD = kv.k_pages_NPKD.flatten(0, 1), kv.v_pages_NPKD.flatten(0, 1)
    assert_close(k_RKD[slots_T], wide.k_pages_NPKD.flatten(0, 1)[slots_T], op="rope_and_cache")
    assert torch.equal(v_RKD[slots_T], v_TKD)
    assert int(k_RKD.isnan().sum()) == int(v_RKD.isnan().sum()) == (PAGES * PAGE - len(q_THD)) * v_RKD[0].numel()


def _both(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, page_dtype: torch.dtype, k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[LayerKV, LayerKV, Tensor]:
    """Return the pages of the kernel, those of the twin, and the slots written."""
    slots_T, pages = _slots(len(q_THD), q_THD.device), []
    for op in (ops_rope.rope_and_cache, reference.rope_and_cache):
        kv = _pages(k_TKD.shape[1], k_TKD.shape[2], page_dtype, q_THD.device)
        table_LD, positions_T = _table(q_THD.shape[2], q_THD.device), _positions(len(q_THD), q_THD.device)
        op(q_THD, k_TKD, v_TKD, table_LD, positions_T, kv, slots_T, k_scale, v_scale)
        pages.append(kv)
    return pages[0], pages[1], slots_T


def _rows(pages_NPKD: Tensor) -> Tensor:
    return pages_NPKD.view(torch.uint8).flatten(0, 1)


def _fused(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    qkv_TX = _normal((tokens, (heads + 2 * kv_heads) * size), dtype, device)
    parts = torch.split_with_sizes(qkv_TX, [heads * size, kv_heads * size, kv_heads * size], dim=-1)
    return tuple(part.view(tokens, part.shape[1] // size, size) for part in parts)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to(device, dtype)


def _table(size: int, device: torch.device) -> Tensor:
    angles_LJ = torch.arange(POSITIONS)[:, None] * torch.logspace(0, -3, size // 2)
    return torch.cat((angles_LJ.cos(), angles_LJ.sin()), dim=-1).to(device)


def _positions(tokens: int, device: torch.device) -> Tensor:
    return torch.randint(POSITIONS, (tokens,), generator=torch.Generator().manual_seed(tokens)).to(device)


def _slots(tokens: int, device: torch.device) -> Tensor:
    return torch.randperm(PAGES * PAGE, generator=torch.Generator().manual_seed(tokens))[:tokens].to(device)


def _pages(kv_heads: int, size: int, dtype: torch.dtype, device: torch.device) -> LayerKV:
    shape = (PAGES, PAGE, kv_heads, size)
    if dtype == torch.float8_e4m3fn:
        k_NPKD, v_NPKD = (torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype) for _ in range(2))
    else:
        k_NPKD, v_NPKD = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
    return LayerKV(k_NPKD, v_NPKD)
