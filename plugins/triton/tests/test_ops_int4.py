"""A 4-bit weight in FP8 against its plain-torch twin.

O output features, I input features, G groups of inputs.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from paddock.layers import reference
from paddock.layers.int4 import int4_weight
from paddock.testing.oracle import poisoned, relative_rms
from paddock_triton.ops_int4 import int4_to_fp8

ON_GPU = torch.cuda.is_available()
# (O, I, group): outputs and inputs that fill up, groups below, at and above a block, one over all inputs, a published shape.
WEIGHTS = [
    (64, 128, 128),
    (80, 576, 32),
    (70, 144, 48),
    (16, 512, 256),
    (33, 320, 320),
    *([(8192, 14848, 128)] if ON_GPU else []),
]


@pytest.mark.memcheck
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_a_weight_becomes_fp8_as_defined(shape: tuple[int, int, int], zeros: bool, device: torch.device) -> None:
    """Every number, the largest that a row's scale allows included, and nothing beyond the edges."""
    outputs, inputs, group = shape
    generator = torch.Generator(device).manual_seed(sum(shape))
    codes_OI, zeros_GO = (
        torch.randint(0, 16, size, dtype=torch.uint8, generator=generator, device=device)
        for size in ((outputs, inputs), (inputs // group, outputs))
    )
    scales_GO = (torch.rand(inputs // group, outputs, generator=generator, device=device) * 0.01 + 0.001).to(torch.float16)
    weight = int4_weight(codes_OI, scales_GO, zeros_GO if zeros else None)
    row_scale_O1 = weight.row_scales()
    with poisoned():
        found = int4_to_fp8(weight, row_scale_O1)
    expected = reference.int4_to_fp8(weight, row_scale_O1)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if ON_GPU:
        assert torch.equal(found.float(), expected.float())
    else:  # the interpreter does not round as IEEE says: a number in a wrong place would be off by much more
        assert relative_rms(found.float(), expected.float()) < 0.06
