"""KV pages of all layers in one allocation."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from paddock.errors import PlanError
from paddock.execution.kvcache import DTYPES, allocate_kv

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"num_layers": 3, "num_pages": 5, "page_size": 4, "num_kv_heads": 2, "head_dim": 8, "device": CPU}


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_are_disjoint_zeroed_views_of_one_allocation(dtype: Any) -> None:
    """Each layer's K and V is contiguous, zero, and shares nothing with the others but the storage."""
    layers = allocate_kv(dtype=dtype, **SHAPE)
    pages = [half for layer in layers for half in (layer.k_pages_NPKD, layer.v_pages_NPKD)]
    assert len(layers) == 3
    assert {half.untyped_storage().data_ptr() for half in pages} == {pages[0].untyped_storage().data_ptr()}
    for number, half in enumerate(pages):
        assert half.shape == (5, 4, 2, 8)
        assert half.is_contiguous()
        assert half.dtype == DTYPES[dtype]
        assert not half.float().any()
        half.copy_(torch.full_like(half.float(), number + 1))
    assert [float(half.float().mean()) for half in pages] == [1, 2, 3, 4, 5, 6]


def resident_mib() -> Any:
    """Return how much memory of this process is backed by RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def test_unwritten_pages_take_no_memory_on_a_cpu() -> None:
    """A pool of 2 GiB adds next to nothing to the resident size until it is written."""
    before = resident_mib()
    (layer, *_) = allocate_kv(dtype="float32", **{**SHAPE, "num_pages": 1_400_000})
    assert resident_mib() - before < 64
    layer.k_pages_NPKD[: 1 << 19] = 1.0
    assert resident_mib() - before > 100


def test_too_many_pages_are_an_error_with_a_way_out() -> None:
    """More memory than the machine can address names the pages, the size and the options."""
    with pytest.raises(PlanError, match=r"KV pages take .* GiB") as caught:
        allocate_kv(dtype="float32", **{**SHAPE, "num_pages": 2**52})
    assert "kv_cache_memory_bytes" in caught.value.fix
