from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from paddock.axes import EMBED, FFN, FP8_STATIC, FP8_TOKEN, PLAIN, VOCAB, Linear, Part
from paddock.errors import CheckpointError
from paddock.layers import LinearLayer, Ops, QuantizedActivation, reference
from paddock_quant_fp8.detect import RowwiseFp8, TensorwiseFp8
from paddock_quant_fp8.method import linear_method

EMB = Part("embed", EMBED, 24)
GATE_UP = Linear("gate_up", (Part("gate", FFN, 7, source="gate"), Part("up", FFN, 9, source="up")), EMB)
ROWWISE = RowwiseFp8(dtype="float32")
STATIC = TensorwiseFp8(dtype="float32", input_format=FP8_STATIC)
DYNAMIC = TensorwiseFp8(dtype="float32", input_format=FP8_TOKEN)
SCHEMES = [ROWWISE, STATIC, DYNAMIC]
FP8 = torch.float8_e4m3fn


def made(scheme: RowwiseFp8 | TensorwiseFp8) -> LinearLayer:
    """Return a layer with random weights, not yet finalised, its parts' scales all different."""
    dtype = getattr(torch, scheme.dtype)
    layer = LinearLayer(GATE_UP, linear_method(scheme, "gate", GATE_UP), dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    layer.randomise(generator)
    scale = layer.get_parameter("weight_scale")
    scale.copy_(torch.rand(scale.shape, generator=generator) * 0.01 + 0.001)
    return layer


def made_final(scheme: RowwiseFp8 | TensorwiseFp8) -> LinearLayer:
    """Return the same layer, finalised."""
    layer = made(scheme)
    layer.finalise()
    return layer


def inputs(tokens: int = 5) -> Tensor:
    """Return activations of unit size."""
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("scheme", SCHEMES, ids=["rowwise", "static", "dynamic"])
@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_apply_multiplies_what_dequantise_says(scheme: RowwiseFp8 | TensorwiseFp8, tokens: int) -> None:
    """The product equals the dequantised activation times the dequantised weight."""
    layer = made(scheme)
    layer.finalise()
    x = inputs(tokens)
    scale = layer.method.input_scale(layer)
    q = reference.quantize_fp8_token(x, 1200.0) if scale is None else reference.quantize_fp8_static(x, scale)
    expected = (q.values_TI.double() * q.scale.double()) @ layer.method.dequantise(layer).double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(q), layer(x), rtol=0, atol=0)


def test_each_part_keeps_its_own_scale() -> None:
    """Scalars of fused parts become rows: 7 of the first, 9 of the second."""
    layer = made(STATIC)
    layer.get_parameter("weight_scale").copy_(torch.tensor([0.5, 2.0]))
    before = layer.get_parameter("weight").float()
    layer.finalise()
    expected = torch.cat((before[:7] * 0.5, before[7:] * 2.0))
    torch.testing.assert_close(layer.method.dequantise(layer), expected, rtol=0, atol=0)


def test_the_largest_input_scale_serves_all_parts() -> None:
    """Parts calibrated apart share one activation; the largest scale clips none of them."""
    layer = made(STATIC)
    layer.get_parameter("input_scale").copy_(torch.tensor([0.25, 0.5]))
    layer.finalise()
    scale = layer.method.input_scale(layer)
    assert scale is not None
    assert scale.shape == ()
    assert scale.item() == 0.5


def test_the_row_scaled_format_clips_activations_at_its_bound() -> None:
    """A token with an outlier of 4800 gets the scale 1200 / 448, and the outlier arrives as 1200, in FP8's largest number."""
    layer = made(ROWWISE)
    layer.get_parameter("weight").copy_(torch.eye(16, 24).to(FP8))
    layer.get_parameter("weight_scale").fill_(1.0)
    layer.finalise()
    x = torch.zeros(1, 24)
    x[0, 3], x[0, 4] = -4800.0, 1200.0 / 448
    y = layer(x)
    assert y[0, 3].item() == pytest.approx(-1200.0)
    assert y[0, 4].item() == pytest.approx(1200.0 / 448)
    assert layer.method.input_bound == 1200.0
    unbounded = made(DYNAMIC)
    assert unbounded.method.input_bound is None


def test_a_static_scale_saturates_and_gives_no_nan() -> None:
    """An activation beyond 448 scales is clipped to them."""
    layer = made(STATIC)
    layer.get_parameter("weight").copy_(torch.eye(16, 24).to(FP8))
    layer.get_parameter("weight_scale").fill_(1.0)
    layer.get_parameter("input_scale").fill_(0.5)
    layer.finalise()
    x = torch.full((2, 24), 1e6)
    assert torch.equal(layer(x), torch.full((2, 16), 224.0))


def test_a_token_of_zeros_gives_zeros() -> None:
    """The floor of the scale keeps a silent token from dividing by nothing."""
    layer = made(ROWWISE)
    layer.finalise()
    assert torch.equal(layer(torch.zeros(2, 24)), torch.zeros(2, 16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_output_has_the_planned_dtype_and_is_rounded_once(dtype: str) -> None:
    """Half-precision results are the float32 results, rounded."""
    half, exact = made(RowwiseFp8(dtype=dtype)), made(ROWWISE)
    half.finalise()
    exact.finalise()
    x = inputs().to(getattr(torch, dtype))
    assert half(x).dtype == getattr(torch, dtype)
    assert torch.equal(half(x), exact(x.float()).to(getattr(torch, dtype)))


def test_the_product_is_an_op() -> None:
    """A kernel bound as `linear_fp8` gets the values, both scales and the planned dtype; so do those that quantise."""
    layer = made(DYNAMIC)
    layer.finalise()
    seen: list[tuple[torch.dtype, ...]] = []

    def linear_fp8(*given: Any) -> Tensor:
        seen.append(tuple(x.dtype for x in given[:4]) + given[4:])
        return reference.linear_fp8(*given)

    layer.ops = Ops.bind(
        {"linear_fp8": linear_fp8, "quantize_fp8_token": lambda x, bound: reference.quantize_fp8_token(x * 2, bound)}
    )
    torch.testing.assert_close(layer(inputs()), 2 * made_final(DYNAMIC)(inputs()))
    assert seen == [(FP8, torch.float32, FP8, torch.float32, torch.float32)]


def test_gate_and_up_may_end_in_their_activation() -> None:
    """What the op bound as `linear_silu_mul_fp8` gets is what the product's gets, and the static scale of what comes behind."""
    halves = Linear("gate_up", (Part("gate", FFN, 8, source="gate"), Part("up", FFN, 8, source="up")), EMB)
    layer = LinearLayer(halves, linear_method(STATIC, "gate", halves), torch.float32, torch.device("cpu"))
    layer.randomise(torch.Generator().manual_seed(5))
    layer.get_parameter("weight_scale").copy_(torch.tensor([0.002, 0.003]))
    layer.finalise()
    method, scale, seen = layer.fuses_silu_mul, torch.tensor(0.01), list[tuple[Any, ...]]()

    def linear_silu_mul_fp8(*given: Any) -> QuantizedActivation:
        seen.append(given)
        return reference.linear_silu_mul_fp8(*given)

    layer.ops = Ops.bind({"linear_silu_mul_fp8": linear_silu_mul_fp8})
    xq = reference.quantize_fp8_static(inputs(), layer.get_parameter("input_scale"))
    assert method is not None
    found = method.apply_silu_mul(layer, xq, scale)
    assert torch.equal(found.values_TI.float(), reference.silu_mul_fp8(layer(xq), scale, None).values_TI.float())
    (given,) = seen
    assert given[0] is xq.values_TI
    assert given[1] is xq.scale
    assert given[2] is layer.get_parameter("weight")
    assert given[3] is layer.get_parameter("weight_scale")
    assert given[4] == torch.float32
    assert given[5] is scale


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 2e4])
@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_a_scale_that_is_no_positive_number_is_refused(name: str, bad: float) -> None:
    """A corrupt scale is an error naming the tensor, before anything is multiplied."""
    layer = made(STATIC)
    layer.get_parameter(name)[1] = bad
    with pytest.raises(CheckpointError, match=f"{name} of up holds"):
        layer.finalise()


@pytest.mark.parametrize("scheme", SCHEMES, ids=["rowwise", "static", "dynamic"])
def test_random_parameters_keep_the_magnitude(scheme: RowwiseFp8 | TensorwiseFp8) -> None:
    """Dummy weights are finite and multiply unit inputs into outputs of about one."""
    wide = Linear("wide", (Part("wide", FFN, 64, source="wide"),), Part("embed", EMBED, 512))
    layer = LinearLayer(wide, linear_method(scheme, "wide", wide), torch.float32, torch.device("cpu"))
    layer.randomise(torch.Generator().manual_seed(1))
    layer.finalise()
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(2))
    assert 0.8 < layer(x).std().item() < 1.2


def test_a_skipped_linear_is_plain() -> None:
    """What the checkpoint leaves alone multiplies in the planned dtype and takes plain activations."""
    head = Linear("lm_head", (Part("tokens", VOCAB, 11, source="lm_head"),), EMB)
    plain = linear_method(ROWWISE, "lm_head", head)
    assert plain.input_format == PLAIN
    assert plain.create(head, torch.device("cpu"))["weight"].dtype == torch.float32
