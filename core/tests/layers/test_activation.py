"""An activation after a linear: one op where it may be, and what happens without it everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paddock import axes
from paddock.layers import LinearLayer, Ops, QuantizedActivation, allocate, reference
from paddock.layers.activation import ActivationKind, ActivationLayer
from paddock.layers.formats import InputFormat
from paddock.layers.quantized import Activation

EMBED, FFN = axes.Part("embed", axes.EMBED, 6), axes.Part("ffn", axes.FFN, 4, source="act")
CPU = torch.device("cpu")
SCALE = torch.tensor(0.25)


def linear_of(outputs: int, inputs: axes.Part, *, bias: bool = False) -> axes.Linear:
    """Return the declaration of a linear with so many outputs."""
    return axes.Linear("linear", (axes.Part("rows", axes.FFN, outputs, source="rows"),), inputs, bias=bias)


class Fp8:
    """An FP8 weight with scales of ones; it notes what is asked of it."""

    def __init__(self, input_format: str, *, border: int = 1) -> None:
        self.input_format, self.input_bound, self.input_format_from = input_format, None, border
        self.tensors = (axes.Tensor("weight", "float8_e4m3fn", (axes.TensorAxis("out"), axes.TensorAxis("in"))),)
        self.asked: list[str] = []

    def create(self, linear: axes.Linear, device: torch.device) -> dict[str, Tensor]:
        """Return the weight."""
        return allocate(linear, self.tensors, device)

    def finalise(self, layer: LinearLayer) -> None:
        """Change nothing."""

    def input_scale(self, layer: LinearLayer) -> Tensor | None:
        """Return the static scale, of a format that has one."""
        return SCALE if self.input_format == axes.FP8_STATIC else None

    def apply(self, layer: LinearLayer, x_TI: Activation) -> Tensor:
        """Return x W^T."""
        self.asked.append("apply")
        xq = reference.quantize_fp8_static(x_TI, SCALE) if isinstance(x_TI, Tensor) else x_TI
        return reference.linear_fp8(xq.values_TI, xq.scale, *self._weight(layer), torch.bfloat16)

    def dequantise(self, layer: LinearLayer) -> Tensor:
        """Return W."""
        return layer.get_parameter("weight").float()

    def randomise(self, layer: LinearLayer, generator: torch.Generator) -> None:
        """Draw the weight."""
        values = torch.randn(layer.get_parameter("weight").shape, generator=generator)
        layer.get_parameter("weight").copy_(values.to(reference.FP8))

    def _weight(self, layer: LinearLayer) -> tuple[Tensor, Tensor]:
        weight_OI = layer.get_parameter("weight")
        return weight_OI, torch.ones(len(weight_OI), 1)


class Fusing(Fp8):
    """One that can end in an activation."""

    def apply_silu_mul(self, layer: LinearLayer, xq: QuantizedActivation, scale: Tensor) -> QuantizedActivation:
        """Return silu(gate) * up in FP8."""
        self.asked.append("apply_silu_mul")
        return reference.linear_silu_mul_fp8(xq.values_TI, xq.scale, *self._weight(layer), torch.bfloat16, scale)


def layer_of(method: Fp8, outputs: int, inputs: axes.Part, *, bias: bool = False, **options: Any) -> LinearLayer:
    """Return a layer with a drawn weight."""
    layer = LinearLayer(linear_of(outputs, inputs, bias=bias), method, torch.bfloat16, CPU, **options)
    layer.randomise(torch.Generator().manual_seed(3))
    return layer


def activation_before(method: Fp8, *, kind: ActivationKind = "silu_mul", awq: bool = False) -> ActivationLayer:
    """Return an activation that feeds a linear of this method, formats settled; with `awq` it is divided by scales of two."""
    emits = InputFormat(Ops())
    emits.feed(layer_of(method, 6, FFN))
    emits.settle()
    activation = ActivationLayer(kind, Ops(), emits, CPU, scaled=FFN if awq else None)
    if activation.scales is not None:
        activation.scales.fill_(2.0)
    return activation


def inputs(tokens: int = 3) -> QuantizedActivation:
    """Return activations of unit size, in FP8."""
    return reference.quantize_fp8_static(torch.randn(tokens, 6, generator=torch.Generator().manual_seed(4)), SCALE)


def same(found: Activation, expected: Activation) -> bool:
    """Return whether two activations are of one kind and have the same bits."""
    if isinstance(found, QuantizedActivation) and isinstance(expected, QuantizedActivation):
        return torch.equal(found.values_TI.view(torch.uint8), expected.values_TI.view(torch.uint8)) and found.scale is SCALE
    return isinstance(found, Tensor) and isinstance(expected, Tensor) and torch.equal(found, expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_linear_and_the_activation_after_it_may_be_one_op(tokens: int) -> None:
    """Gate and up by a method that offers it, FP8 by a static scale before and behind: the bits are those of two."""
    method = Fusing(axes.FP8_STATIC)
    gate_up, silu, x = layer_of(method, 8, EMBED), activation_before(Fp8(axes.FP8_STATIC)), inputs(tokens)
    found = silu.after(gate_up, x)
    assert method.asked == ["apply_silu_mul"]
    assert same(found, silu(gate_up(x)))
    assert isinstance(found, QuantizedActivation)
    assert found.values_TI.shape == (tokens, 4)


def doubled(y: Tensor) -> Tensor:
    """Return what two equal ranks would add up to."""
    return 2 * y


APART: dict[str, dict[str, Any]] = {
    "a method that does not offer it": {"method": Fp8(axes.FP8_STATIC)},
    "a plain input": {"x": inputs().values_TI.float()},
    "a bias": {"linear": {"bias": True}},
    "a sum over ranks": {"linear": {"reduce": doubled}},
    "columns of other ranks": {"linear": {"gather": lambda y: y.repeat(1, 2)}},
    "another activation": {"activation": {"kind": "gelu"}},
    "scales of AWQ": {"activation": {"awq": True}},
    "a scale a token behind": {"behind": Fp8(axes.FP8_TOKEN)},
    "a plain linear behind": {"behind": Fp8(axes.PLAIN)},
    "too few tokens for FP8 behind": {"behind": Fp8(axes.FP8_STATIC, border=4)},
}


@pytest.mark.parametrize("given", APART.values(), ids=APART.keys())
def test_elsewhere_the_linear_runs_and_then_the_activation(given: dict[str, Any]) -> None:
    """What one op could not compute, or would compute from another input, is two."""
    method, x = given.get("method", Fusing(axes.FP8_STATIC)), given.get("x", inputs())
    gate_up = layer_of(method, 8, EMBED, **given.get("linear", {}))
    if gate_up.bias is not None:
        gate_up.bias.fill_(0.5)
    activation = activation_before(given.get("behind", Fp8(axes.FP8_STATIC)), **given.get("activation", {}))
    method.asked.clear()
    found = activation.after(gate_up, x)
    assert method.asked == ["apply"]
    expected = activation(gate_up(x))
    if isinstance(found, QuantizedActivation) and isinstance(expected, QuantizedActivation):
        assert torch.equal(found.values_TI.view(torch.uint8), expected.values_TI.view(torch.uint8))
        assert torch.equal(found.scale, expected.scale)
    else:
        assert same(found, expected)
