"""Norms and activations against their plain-torch twins.

T tokens, E features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from paddock.layers import reference
from paddock.testing.oracle import assert_close, poisoned
from paddock_triton import ops_activation, ops_norm

OPS: dict[str, Callable[..., Any]] = {
    "rms_norm": ops_norm.rms_norm,
    "add_rms_norm": ops_norm.add_rms_norm,
    "layer_norm": ops_norm.layer_norm,
    "add_layer_norm": ops_norm.add_layer_norm,
    "silu_mul": ops_activation.silu_mul,
    "gelu": ops_activation.gelu,
}
WIDTHS = (576, 4096, 8192, 14848, 16384)


@pytest.mark.parametrize("name", OPS)
def test_an_op_keeps_its_contract(name: str, device: torch.device) -> None:
    """Odd sizes, no tokens at all, and every output element written."""
    for tokens in (0, 1, 7):  # in every dtype and in more sizes: `test_capabilities`, on a GPU
        for width in (2, 14, 126, 576):
            _compare(name, _given(name, tokens, width, torch.float32, device))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OPS)
def test_an_op_keeps_its_contract_at_published_widths(
    name: str, width: int, device: torch.device, dtypes: list[torch.dtype]
) -> None:
    """Rows as wide as real models have them, a width in each dtype in turn."""
    dtype = dtypes[-1 - WIDTHS.index(width) % len(dtypes)]
    for tokens in (1, 7, 63, 123) if device.type == "cuda" else (2,):
        _compare(name, _given(name, tokens, width, dtype, device))


@pytest.mark.memcheck
@pytest.mark.parametrize("name", OPS)
def test_rows_may_lie_apart(name: str, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """A slice of a wider tensor, at an odd offset, and a transposed tensor give what their copies give."""
    for dtype in dtypes:
        matrices = {i for i, x in enumerate(_given(name, 7, 66, dtype, device)) if isinstance(x, Tensor) and x.ndim == 2}
        for spread in (_slice, _transposed):
            given = _given(name, 7, 66, dtype, device)
            _compare(name, tuple(spread(x) if i in matrices else x for i, x in enumerate(given)))


@pytest.mark.parametrize("name", OPS)
def test_a_token_does_not_depend_on_the_others(name: str, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """A row alone gives bit for bit what it gives among others."""
    for dtype in dtypes:
        given = _given(name, 7, 1152, dtype, device)
        matrices = {i for i, x in enumerate(given) if isinstance(x, Tensor) and x.ndim == 2}
        together = _outputs(OPS[name](*given))
        alone = _outputs(OPS[name](*(x[3:4] if i in matrices else x for i, x in enumerate(given))))
        assert all(torch.equal(many[3:4], one) for many, one in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm"])
def test_a_bias_is_optional(name: str, device: torch.device, dtypes: list[torch.dtype]) -> None:
    """Without a bias nothing is added."""
    for dtype in dtypes:
        given = _given(name, 7, 66, dtype, device)
        _compare(name, (*given[:-2], None, given[-1]))


@pytest.mark.parametrize("bias", [True, False])
def test_two_deltas_are_added_to_each_other_first(bias: bool, device: torch.device) -> None:
    """Bit for bit what the rounded sum of both gives as one delta, and not what adding one after the other gives."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    for tokens, width in ((0, 66), (1, 14848), (7, 576)):
        x_TE, delta_TE, weight_E, bias_E, eps = _given("add_layer_norm", tokens, width, dtype, device)
        more_TE, rest = delta_TE.flip(-1) * 0.7, (weight_E, bias_E if bias else None, eps)
        with poisoned():
            found = ops_norm.add_layer_norm(x_TE, delta_TE, *rest, more_TE=more_TE)
        spread = ops_norm.add_layer_norm(x_TE, delta_TE, *rest, more_TE=_slice(more_TE))
        expected = ops_norm.add_layer_norm(x_TE, delta_TE + more_TE, *rest)
        assert all(torch.equal(one, other) for one, other in zip(found + spread, expected * 2, strict=True))
        assert torch.equal(found[0], reference.add_layer_norm(x_TE, delta_TE, *rest, more_TE=more_TE)[0])
        assert not tokens or not torch.equal(found[0], x_TE + delta_TE + more_TE)


def test_rms_norm_rounds_before_the_weight(device: torch.device) -> None:
    """The normalised value is rounded to the input's dtype, and only then multiplied by the weight."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    x_TE, weight_E, eps = _given("rms_norm", 63, 512, dtype, device)
    found, expected = ops_norm.rms_norm(x_TE, weight_E, eps), reference.rms_norm(x_TE, weight_E, eps)
    tipped = (found != expected).float().mean()  # by another order of summation; a rounding left out tips a quarter
    assert tipped < 2e-3


def test_a_large_input_does_not_overflow_an_activation(device: torch.device) -> None:
    """SiLU and GELU of +-large values are x and 0."""
    x_TF = torch.tensor([[-1e4, -100.0, -20.0, 20.0, 100.0, 1e4]], device=device)
    twice_T2F = torch.cat((x_TF, torch.ones_like(x_TF)), dim=1)
    assert_close(ops_activation.silu_mul(twice_T2F), reference.silu_mul(twice_T2F), op="silu_mul")
    assert_close(ops_activation.gelu(x_TF), reference.gelu(x_TF), op="gelu")


def _compare(name: str, given: tuple[Any, ...]) -> None:
    """Compare with the twin in float32; a norm of a sum is compared on the sum as rounded."""
    with poisoned():
        outputs = _outputs(OPS[name](*given))
    if name.startswith("add_"):
        expected = given[0].float() + given[1].float()
        assert_close(outputs[0], expected, op="add")
        name, given = name.removeprefix("add_"), (outputs[0], *given[2:])
    wide = tuple(x.float() if isinstance(x, Tensor) else x for x in given)
    assert_close(outputs[-1], getattr(reference, name)(*wide), op=name, at=f"{tuple(given[0].shape)}")


def _outputs(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _given(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x_TE, delta_TE, weight_E, bias_E = normal(tokens, width), normal(tokens, width), normal(width), normal(width)
    return {
        "rms_norm": (x_TE, weight_E, 1e-5),
        "add_rms_norm": (x_TE, delta_TE, weight_E, 1e-5),
        "layer_norm": (x_TE, weight_E, bias_E, 1e-5),
        "add_layer_norm": (x_TE, delta_TE, weight_E, bias_E, 1e-5),
        "silu_mul": (torch.cat((x_TE, delta_TE), dim=1),),
        "gelu": (x_TE,),
    }[name]


def _slice(x_TE: Tensor) -> Tensor:
    wide_TE = torch.full((x_TE.shape[0], x_TE.shape[1] + 5), torch.nan, dtype=x_TE.dtype, device=x_TE.device)
    wide_TE[:, 3:-2] = x_TE
    return wide_TE[:, 3:-2]


def _transposed(x_TE: Tensor) -> Tensor:
    return x_TE.t().contiguous().t()
