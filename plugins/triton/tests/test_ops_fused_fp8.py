"""Norms and activations that emit FP8, against the plain op followed by the quantisation.

T tokens, E features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import QuantizedActivation, reference
from paddock.testing import oracle
from paddock.testing.oracle import UNIT_ROUNDOFF, poisoned
from paddock_triton import ops_activation, ops_activation_fp8, ops_norm, ops_quantize

FUSED: dict[str, Callable[..., Any]] = {
    "rms_norm": ops_norm.rms_norm_fp8,
    "layer_norm": ops_norm.layer_norm_fp8,
    "silu_mul": ops_activation_fp8.silu_mul_fp8,
    "gelu": ops_activation_fp8.gelu_fp8,
}
PLAIN: dict[str, Callable[..., Any]] = {
    "rms_norm": ops_norm.rms_norm,
    "add_rms_norm": ops_norm.add_rms_norm,
    "layer_norm": ops_norm.layer_norm,
    "add_layer_norm": ops_norm.add_layer_norm,
    "silu_mul": ops_activation.silu_mul,
    "gelu": ops_activation.gelu,
}
CASES = [(name, with_delta) for name in FUSED for with_delta in ((True, False) if "norm" in name else (False,))]
WIDTHS = (2, 126, 576)
PUBLISHED = (4096, 8192, 14336, 14848, 28672)  # and for activations rows too wide for the registers
TOO_WIDE = (32768 + 56, 53248, 59392)
TIPPED = 1e-3  # FP8 values that another order of summation may tip to their neighbour
Scale = tuple[float | None, float | None, int | None]
# Static; a token's own; its groups' own; a token's, bounded; its groups', bounded.
SCALES: list[Scale] = [(0.0123, None, None), (None, None, None), (None, None, 128), (None, 0.75, None), (None, 0.75, 64)]


def _given(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device, *, delta: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if name in ("silu_mul", "gelu"):
        return (normal(tokens, 2 * width if name == "silu_mul" else width),)
    vectors = (normal(width), normal(width)) if name == "layer_norm" else (normal(width),)
    return normal(tokens, width), normal(tokens, width) if delta else None, *vectors, 1e-5


def _scale(value: float | None, device: torch.device) -> Tensor | None:
    return None if value is None else torch.tensor(value, device=device)


def _apart(
    name: str, given: tuple[Any, ...], scale: Tensor | None, bound: float | None, group: int | None
) -> tuple[Tensor | None, QuantizedActivation]:
    """Return (sum, FP8) by the plain kernel and then the quantising one."""
    total = None
    if "norm" in name:
        x_TE, delta_TE, *rest = given
        if delta_TE is None:
            total, h_TE = x_TE, PLAIN[name](x_TE, *rest)
        else:
            total, h_TE = PLAIN[f"add_{name}"](x_TE, delta_TE, *rest)
    else:
        h_TE = PLAIN[name](*given)
    if scale is None:
        return total, ops_quantize.quantize_fp8_token(h_TE, bound, group)
    return total, ops_quantize.quantize_fp8_static(h_TE, scale)


def _split(found: Any) -> tuple[Tensor | None, QuantizedActivation]:
    return (None, found) if isinstance(found, QuantizedActivation) else found


def _compare(name: str, given: tuple[Any, ...], scales: Scale) -> None:
    """Hold the fused kernel to the two, bit for bit.

    On a GPU each kernel adds a row up in the order its own layout gives, which float32 shows and 16 bits round away.
    """
    value, bound, group = scales
    scale = _scale(value, given[0].device)
    with poisoned():
        total, found = _split(FUSED[name](*given, scale, bound, group))
    expected_total, expected = _apart(name, given, scale, bound, group)
    at = f"{name} {tuple(given[0].shape)} {given[0].dtype} {scales}"
    if total is not None:
        assert expected_total is not None
        assert torch.equal(total, expected_total), at
    assert found.values_TI.shape == expected.values_TI.shape
    if "norm" in name and given[0].is_cuda and given[0].dtype == torch.float32:
        _next_to_all_are(name, found, expected, torch.float32)
        return
    assert torch.equal(found.scale, expected.scale), at
    assert torch.equal(found.values_TI.float(), expected.values_TI.float()), at


def _next_to_all_are(name: str, found: QuantizedActivation, expected: QuantizedActivation, dtype: torch.dtype) -> None:
    """Hold scales to the op's roundings, and FP8 values to what another order of summation may tip."""
    torch.testing.assert_close(found.scale, expected.scale, rtol=max(oracle.bound(name, dtype), 2 * UNIT_ROUNDOFF[dtype]), atol=0)
    if found.values_TI.numel():
        assert (found.values_TI.float() != expected.values_TI.float()).float().mean() < TIPPED


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize(("name", "delta"), CASES)
def test_one_kernel_gives_the_bits_of_two(
    name: str, delta: bool, scales: Scale, device: torch.device, dtypes: list[torch.dtype]
) -> None:
    """Odd sizes, no tokens at all: sum, values and scales are those of the plain op and then the quantisation.

    The widths take the dtypes in turn, another one with each kind of scale.
    """
    for turn, width in enumerate(WIDTHS, SCALES.index(scales)):
        for tokens in (0, 1, 7):
            _compare(name, _given(name, tokens, width, dtypes[turn % len(dtypes)], device, delta=delta), scales)


@pytest.mark.parametrize(("name", "delta"), CASES)
def test_one_kernel_gives_the_bits_of_two_at_published_widths(
    name: str, delta: bool, device: torch.device, dtypes: list[torch.dtype]
) -> None:
    """Rows as wide as real models have them, activations in rows that do not fit into registers too."""
    on_gpu = device.type == "cuda"
    for width in (*(PUBLISHED if on_gpu else PUBLISHED[::3]), *(() if "norm" in name else TOO_WIDE[: 3 if on_gpu else 1])):
        for tokens in (1, 63) if on_gpu else (1,):
            for scales in SCALES[:3]:
                _compare(name, _given(name, tokens, width, dtypes[-1], device, delta=delta), scales)


@pytest.mark.memcheck
@pytest.mark.parametrize(("name", "delta"), CASES)
def test_rows_may_lie_apart(name: str, delta: bool, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """A slice of a wider tensor, at an odd offset, and a transposed tensor give what their copies give.

    Without a GPU each dtype has one of the two.
    """
    for turn, dtype in enumerate(dtypes):
        given = _given(name, 7, 66, dtype, device, delta=delta)
        for spread in SPREADS if device.type == "cuda" else SPREADS[turn % 2 :][:1]:
            lying = tuple(spread(x) if isinstance(x, Tensor) and x.ndim == 2 else x for x in given)
            for value, bound, group in SCALES[:3]:
                scale = _scale(value, device)
                found, expected = (_split(FUSED[name](*each, scale, bound, group))[1] for each in (lying, given))
                assert torch.equal(found.values_TI.float(), expected.values_TI.float())
                assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_two_deltas_are_added_to_each_other_first(scales: Scale, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Sum, values and scales are those of one delta, the rounded sum of both; where there is none, nothing is added."""
    (value, bound, group), dtype = scales, dtypes[-1]
    x_TE, delta_TE, *vectors = _given("layer_norm", 7, 576, dtype, device, delta=True)
    rest = (*vectors, _scale(value, device), bound, group)
    more_TE = delta_TE.flip(-1) * 0.7
    with poisoned():
        total_TE, found = ops_norm.layer_norm_fp8(x_TE, delta_TE, *rest, more_TE=more_TE)
    expected_TE, expected = ops_norm.layer_norm_fp8(x_TE, delta_TE + more_TE, *rest)
    assert torch.equal(total_TE, expected_TE)
    assert not torch.equal(total_TE, x_TE + delta_TE)
    assert torch.equal(found.values_TI.float(), expected.values_TI.float())
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "delta"), CASES)
def test_next_to_all_values_are_the_twin_s(name: str, delta: bool, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Scales are within a rounding of the norm or activation; FP8 values differ where another order of summation tips them."""
    for dtype in dtypes:
        for value, bound, group in SCALES:
            given, scale = _given(name, 63, 576, dtype, device, delta=delta), _scale(value, device)
            (_, found), (_, expected) = (
                _split(op(*given, scale, bound, group)) for op in (FUSED[name], getattr(reference, f"{name}_fp8"))
            )
            _next_to_all_are(name, found, expected, dtype)


@pytest.mark.parametrize("scales", [(0.25, None), (None, None), (None, 3.5)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_exact_values_become_the_twin_s(name: str, scales: Scale, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Norms of plus and minus one, activations far from zero: every step is exact, so the interpreter shows them too."""
    size = 16 if name == "gelu" else 1
    value, bound = (None if x is None else x * size for x in scales)
    signs_E = torch.tensor([1.0, -1.0] * 4, device=device)
    factors_E = torch.tensor([7.0, 7.0, 3.5, -3.5, 1.75, 1.75, 0.5, 0.0], device=device)
    for dtype in dtypes:
        x_TE, weight_E = signs_E.repeat(3, 1).to(dtype), factors_E.to(dtype)
        given = {
            "rms_norm": (x_TE * 0.75, x_TE * 0.25, weight_E, 0.0),
            "layer_norm": (x_TE, None, weight_E, torch.zeros_like(weight_E), 0.0),
            "silu_mul": (torch.cat((x_TE.abs() * 64, x_TE * weight_E / 64), dim=1),),
            "gelu": (x_TE.abs() * 16 * weight_E,),
        }[name]
        scale = _scale(value, device)
        (_, found), (_, expected) = (_split(op(*given, scale, bound)) for op in (FUSED[name], getattr(reference, f"{name}_fp8")))
        assert torch.equal(found.values_TI.float(), expected.values_TI.float())
        assert torch.equal(found.scale, expected.scale)
        assert len(set(found.values_TI.float().flatten().tolist())) >= 4


def _slice(x_TE: Tensor) -> Tensor:
    wide_TE = torch.full((x_TE.shape[0], x_TE.shape[1] + 5), torch.nan, dtype=x_TE.dtype, device=x_TE.device)
    wide_TE[:, 3:-2] = x_TE
    return wide_TE[:, 3:-2]


def _transposed(x_TE: Tensor) -> Tensor:
    return x_TE.t().contiguous().t()


SPREADS = (_slice, _transposed)
