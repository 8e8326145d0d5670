"""KV pages of all layers in one allocation.

N pages, P tokens a page, K KV heads, D head size.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from paddock.errors import PlanError
from paddock.layers.attention import LayerKV

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}


def allocate_kv(
    *, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: str, device: torch.device
) -> list[LayerKV]:
    """Return each layer's K and V pages, zeroed views of one allocation. `dtype` is a name of `DTYPES`.

    Raises PlanError when the device has not that much memory left.
    """
    shape = (num_layers, 2, num_pages, page_size, num_kv_heads, head_dim)
    try:
        pages_L2NPKD = _zeros(shape, DTYPES[dtype], device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        size = math.prod(shape) * DTYPES[dtype].itemsize / 2**30
        raise PlanError(
            f"{num_pages} KV pages take {size:.2f} GiB, more than {device} has left",
            fix="lower gpu_memory_utilization, kv_cache_memory_bytes or max_model_len",
        ) from error
    return [LayerKV(k_pages_NPKD, v_pages_NPKD) for k_pages_NPKD, v_pages_NPKD in pages_L2NPKD]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros, which on a CPU take no memory until written: the kernel hands out its zero page."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device).view(dtype).view(shape)
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
