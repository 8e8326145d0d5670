"""Weights laid out for the CPU's matrix kernels (oneDNN), once, instead of at every product.

M rows of the input, I input features, O output features. Milliseconds for all of SmolLM2-135M's linears, one thread of an
EPYC with AVX-512 BF16, torch 2.13, plain against packed:

| M | float32 | bfloat16 |
| --- | --- | --- |
| 1 | 18.3 / 15.2 | 16.6 / 9.5 |
| 4 | 37.3 / 16.3 | 21.5 / 11.4 |
| 16 | 72.2 / 44.3 | 34.5 / 24.0 |
| 64 | 233.7 / 168.4 | 92.6 / 82.5 |
| 256 | 757.2 / 656.6 | 350.3 / 335.6 |

Packing for another M than 16 changes nothing that can be measured. The packed copy replaces the plain one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 16  # the batch the layout is chosen for
_SMALLEST = 1 << 16  # elements; below this the kernel's own start takes as long as the product


def pack(weight_OI: Tensor) -> Tensor | None:
    """Return the weight in the kernel's layout, or None where that is not to be had or not worth it."""
    if weight_OI.device.type != "cpu" or weight_OI.numel() < _SMALLEST or not _supported(weight_OI.dtype):
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _ROWS)
    return packed


def multiply(x_MI: Tensor, packed: Tensor) -> Tensor:
    """Return x W^T [M, O]."""
    y_MO: Tensor = torch.ops.mkldnn._linear_pointwise(x_MI, packed, None, "none", [], "")
    return y_MO


def _supported(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    if not torch._C._has_mkldnn or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))
