"""Activations to FP8 against the plain-torch twins.

T tokens, I features.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from paddock.errors import KernelError
from paddock.layers import QuantizedActivation, reference
from paddock_triton import ops_quantize

ON_GPU = torch.cuda.is_available()
SIZES = ((0, 64), (1, 14), (7, 126), *(((63, 576), (7, 8192), (3, 14848)) if ON_GPU else ((9, 576), (1, 8192), (1, 14848))))


@pytest.mark.usefixtures("rounding")
def test_fp8_activations_equal_the_twins(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Values and scales are exactly the twin's, bounded or not, with outliers, ties and rows of zeros.

    The twin runs on the CPU: on a GPU torch divides by a number as it multiplies with its reciprocal.
    """
    for dtype in dtypes:
        for tokens, features in SIZES:
            x_TI = _normal(tokens, features, dtype, device)
            for bound in (None, 1.5):
                for group in (None, 32, 128):
                    found = ops_quantize.quantize_fp8_token(x_TI, bound, group)
                    _same(found, reference.quantize_fp8_token(x_TI.cpu(), bound, group))
            for scale in (0.0123, 0.5):
                static = torch.tensor(scale, device=device)
                _same(ops_quantize.quantize_fp8_static(x_TI, static), reference.quantize_fp8_static(x_TI.cpu(), static.cpu()))


@pytest.mark.parametrize("group", [48, 2048])
def test_groups_that_no_kernel_is_for_are_refused(group: int, device: torch.device) -> None:
    """Widths that are no power of two, and those wider than a program's block, which would get a block's scale."""
    with pytest.raises(KernelError, match=f"no kernel is for groups of {group} features") as caught:
        ops_quantize.quantize_fp8_token(torch.ones(2, 4096, device=device), None, group)
    assert "--op quantize_fp8_token=paddock" in caught.value.fix


def test_exact_values_become_fp8_unchanged(device: torch.device, dtypes: list[torch.dtype]) -> None:
    """A row whose quotients FP8 holds exactly comes back exactly; a row of zeros has the least scale."""
    row_I = torch.tensor([448.0, -448.0, 7.0, -0.25, 0.0, 1.75], device=device)
    for dtype in dtypes:
        x_TI = torch.stack((row_I, row_I * 0.5, row_I * 0.0)).to(dtype)
        found = ops_quantize.quantize_fp8_token(x_TI)
        assert found.scale.flatten().tolist() == pytest.approx([1.0, 0.5, 1 / (448 * 512)])
        assert torch.equal(found.values_TI.float() * found.scale, x_TI.float())
        static = ops_quantize.quantize_fp8_static(x_TI, torch.tensor(0.25, device=device))
        assert torch.equal(static.values_TI.float(), (x_TI.float() * 4).clamp(-448, 448))


@pytest.mark.memcheck
def test_a_bound_clips_and_a_strided_row_is_read_where_it_lies(device: torch.device) -> None:
    """Values above the bound saturate; a slice of a wider tensor needs no copy."""
    wide_TI = torch.full((2, 9), torch.nan, device=device)
    wide_TI[:, 1:8] = torch.tensor([2.0, -8.0, 1.0, 0.5, 16.0, -16.0, 0.0], device=device)
    found = ops_quantize.quantize_fp8_token(wide_TI[:, 1:8], 7.0)
    assert found.scale.flatten().tolist() == [7.0 / 448] * 2
    assert found.values_TI[1].float().tolist() == [128.0, -448.0, 64.0, 32.0, 448.0, -448.0, 0.0]


def _same(found: QuantizedActivation, expected: QuantizedActivation) -> None:
    assert torch.equal(found.scale.cpu(), expected.scale)
    assert torch.equal(found.values_TI.cpu().float(), expected.values_TI.float())


def _normal(tokens: int, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x_TI = torch.randn(tokens, features, generator=torch.Generator().manual_seed(features))
    x_TI[:, ::7] = (x_TI[:, ::7] * 16).round() / 16
    x_TI[2:3] = 0.0
    x_TI[4:5, :3] = 5e4
    return x_TI.to(device, dtype)
