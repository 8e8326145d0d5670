"""The Triton attention is causal attention, whatever the pages, lengths, heads and features."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from paddock.testing.kernels import HEADS, check_attention

ON_GPU = torch.cuda.is_available()
FEATURES = ("alibi", "sliding_window", "softcap")
ALL_HEADS = (
    [*HEADS, (3, 1, 48), (16, 1, 80), (29, 1, 64), (6, 6, 96), (71, 1, 64), (4, 2, 256)] if ON_GPU else [(6, 2, 16), (3, 1, 48)]
)
PAGES = (16, 32, 64, 128) if ON_GPU else (16,)


def _check(halves: list[torch.dtype], turn: int, device: torch.device, **options: object) -> None:
    """Check in one of the dtypes, as it is their turn: the declared combinations have them all (`test_capabilities`)."""
    from paddock_triton.attention import create

    check_attention(create, device=device, dtypes=[halves[turn % len(halves)]], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("heads", "page_size"), list(product(ALL_HEADS, PAGES)), ids=str)
def test_attention_equals_dense_attention(
    heads: tuple[int, int, int], page_size: int, halves: list[torch.dtype], device: torch.device
) -> None:
    """Every head shape, page border and mix of decodes and prefills agrees with float64."""
    _check(halves, ALL_HEADS.index(heads) + PAGES.index(page_size), device, heads=[heads], page_sizes=[page_size])


@pytest.mark.gpu  # the interpreter has them in mixed steps
@pytest.mark.parametrize(
    ("feature", "heads"), list(product(FEATURES, [(8, 2, 128), (29, 1, 64), (71, 1, 64), (4, 2, 256)])), ids=str
)
def test_attention_features_equal_dense_attention(
    feature: str, heads: tuple[int, int, int], halves: list[torch.dtype], device: torch.device
) -> None:
    """Biases, windows and caps agree in decodes and prefills alike."""
    _check(halves, ALL_HEADS.index(heads) + FEATURES.index(feature), device, heads=[heads], page_sizes=[64], features=[feature])


@pytest.mark.parametrize(
    "heads", [(8, 1, 128), (9, 3, 64), (16, 1, 80), (71, 1, 64), (4, 2, 256)] if ON_GPU else [(4, 2, 32)], ids=str
)
@pytest.mark.parametrize("page_size", [16, 64])
def test_attention_reads_fp8_pages_through_their_scales(
    heads: tuple[int, int, int], page_size: int, halves: list[torch.dtype], device: torch.device
) -> None:
    """FP8 pages give what their dequantised values give."""
    _check(halves, heads[0] + page_size // 64, device, heads=[heads], page_sizes=[page_size], fp8_pages=True)
