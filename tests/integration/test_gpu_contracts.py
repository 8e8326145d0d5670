"""The contracts that kernels are held to, held by the plain-torch twins on a GPU too: there they are oracle and last resort."""

from __future__ import annotations

import pytest
import torch

from paddock.layers import reference, reference_attention
from paddock.testing.kernels import HEADS, check_attention, check_cache_op, check_op

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = (8, 2, 8)  # heads of 8, as the tiny models of the tests have them
ROW_OPS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "silu_mul", "gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [*HEADS, SMALL, (71, 1, 64), (4, 2, 256)], ids=str)
def test_plain_attention_is_dense_attention_on_a_gpu(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Every batch, page size and feature agrees with float64."""
    features = ("alibi", "sliding_window", "softcap")
    check_attention(reference_attention.create, device="cuda", dtypes=[dtype], heads=[heads], features=features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_attention_reads_fp8_pages_on_a_gpu(dtype: torch.dtype) -> None:
    """FP8 pages give what their dequantised values give."""
    check_attention(reference_attention.create, device="cuda", dtypes=[dtype], page_sizes=[16], fp8_pages=True)


@pytest.mark.parametrize("name", ROW_OPS)
def test_a_twin_keeps_its_contract_on_a_gpu(name: str) -> None:
    """In each dtype it is as near its float32 self as one rounding allows."""
    check_op(name, getattr(reference, name), device="cuda", dtypes=DTYPES)


@pytest.mark.parametrize("name", ["rope_and_cache", "cache_kv"])
def test_a_twin_that_writes_pages_keeps_its_contract_on_a_gpu(name: str) -> None:
    """Its slots hold what they should and no other row changes."""
    check_cache_op(name, getattr(reference, name), device="cuda", dtypes=DTYPES, heads=[*HEADS, SMALL])


def test_float32_products_are_not_cut_to_tf32() -> None:
    """Tokens in float32 are compared with a CPU's: ten bits of a factor instead of 23 would give others."""
    x_TI, weight_OI = (torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = torch.nn.functional.linear(x_TI.cuda(), weight_OI.cuda()).cpu().double()
    expected = x_TI.double() @ weight_OI.double().T
    assert ((found - expected).square().sum() / expected.square().sum()).sqrt() < 1e-6
