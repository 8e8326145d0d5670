"""What every 4-bit linear does, shown on AutoAWQ's: rounding, memory, random parameters, no copies from the host."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from plugins.quant_awq.tests.made import CPU, empty, linear, load, made, named, scheme_of, weight
from plugins.quant_awq.tests.written import FORMATS
from torch.utils._python_dispatch import TorchDispatchMode

from paddock.axes import EMBED, FP8_TOKEN, PLAIN, VOCAB, Linear, Part
from paddock.errors import CheckpointError
from paddock.layers import LinearLayer, Ops, TakesFewPlain, int4, reference
from paddock.layers.int4 import Int4Weight, unpack
from paddock.testing.oracle import assert_close, relative_rms
from paddock_quant_awq import scheme as schemes
from paddock_quant_awq.method import Int4Method, linear_method


def random(name: str, outs: int, ins: int, group: int, dtype: str = "float32") -> LinearLayer:
    """Return a layer with random parameters, as load format `dummy` makes them."""
    layer = empty(scheme_of(FORMATS[name].entry(group), dtype=dtype), linear(outs, ins))
    layer.randomise(torch.Generator().manual_seed(1))
    layer.finalise()
    return layer


def note(called: list[str], op: str, *given: Any) -> Any:
    """Run an op as it is defined, and note it."""
    called.append(op)
    return getattr(reference, op)(*given)


class HostValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensors made of values on the host."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        self.count += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["awq", "gptq-ordered", "packed-w4a8"])
def test_a_product_takes_no_values_from_the_host(name: str) -> None:
    """A copy from the host would break off the capture of a decode step as a CUDA graph."""
    stored, _ = FORMATS[name].store(weight(32, 64), 32)
    layer, x = made(scheme_of(FORMATS[name].entry(32)), linear(32, 64), named(stored)), torch.ones(2, 64)
    with HostValues() as seen:  # type: ignore[no-untyped-call]
        torch.tensor([1, 2])
        assert seen.count == 1
        layer(x)
    assert seen.count == 1


@pytest.mark.parametrize(("name", "op"), [("awq", "linear_int4"), ("packed-w4a8", "linear_int4_fp8")])
def test_products_are_the_ops_bound_to_the_layer(name: str, op: str) -> None:
    """A kernel bound as the op gets the weight in the core's form; one that quantises is used too."""
    calls: list[Int4Weight] = []

    def bound(*given: Any) -> Any:
        calls.append(next(each for each in given if isinstance(each, Int4Weight)))
        return getattr(reference, op)(*given)

    layer, x = random(name, 32, 64, 32), torch.randn(3, 64, generator=torch.Generator().manual_seed(6))
    expected, doubled = layer(x), layer(2 * x)
    layer.ops = Ops.bind({op: bound, "quantize_fp8_token": lambda x, limit: reference.quantize_fp8_token(2 * x, limit)})
    assert torch.equal(layer(x), doubled if op == "linear_int4_fp8" else expected)
    (weight,) = calls
    assert weight.packed is layer.get_parameter("packed")
    assert (weight.zeros is None) == (name != "awq")


@pytest.mark.parametrize("name", ["awq", "modelopt", "packed-w4a8"])
def test_few_tokens_are_taken_plain_and_many_rounded(name: str) -> None:
    """From the scheme's number of tokens on, whatever the checkpoint was made for; the layer asks for its inputs so."""
    for border in (None, 1, 4):
        scheme = scheme_of(FORMATS[name].entry(32)).with_fp8_from(border, None)
        layer = empty(scheme, linear(32, 64))
        layer.randomise(torch.Generator().manual_seed(1))
        layer.finalise()
        called: list[str] = []
        noted = {op: partial(note, called, op) for op in ("linear_int4", "linear_int4_fp8")}
        layer.ops = Ops.bind(noted)
        for tokens in (1, 3, 4, 9):
            layer(torch.ones(tokens, 64))
        assert called == ["linear_int4_fp8" if border and tokens >= border else "linear_int4" for tokens in (1, 3, 4, 9)]
        assert layer.method.input_format == (PLAIN if border is None else FP8_TOKEN)
        assert isinstance(layer.method, TakesFewPlain)
        assert layer.method.input_format_from == (border or 1)


def rounding_weights(name: str, *, keep: bool = False) -> LinearLayer:
    """Return a layer whose weights are rounded to FP8 from 4 tokens on, each time, or once and kept."""
    layer = empty(scheme_of(FORMATS[name].entry(32)).with_fp8_from(1, 4, keep=keep), linear(32, 64))
    layer.randomise(torch.Generator().manual_seed(1))
    layer.finalise()
    return layer


@pytest.mark.parametrize("name", ["awq", "modelopt", "packed-w4a8"])
def test_weights_of_large_steps_are_rounded_too(name: str) -> None:
    """From the scheme's number of tokens on the product is a plain FP8 one, near what it was."""
    layer = rounding_weights(name)
    called: list[str] = []
    layer.ops = Ops.bind({op: partial(note, called, op) for op in ("linear_int4_fp8", "int4_to_fp8", "linear_fp8")})
    x_TI = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    few, many = layer(x_TI[:3]), layer(x_TI)
    assert called == ["linear_int4_fp8", "int4_to_fp8", "linear_fp8"]
    assert 0 < relative_rms(many[:3], few) < 0.04


@pytest.mark.parametrize("name", ["awq", "modelopt", "packed-w4a8"])
def test_what_weights_are_divided_by_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out once, where weights are ever rounded, so that no step does: a scale an output, that of the layer's weight."""
    assert "row_scale" not in dict(random(name, 32, 64, 32).named_parameters())
    layer, given = rounding_weights(name), list[torch.Tensor]()

    def divided(weight: Int4Weight, row_scale_O1: torch.Tensor) -> torch.Tensor:
        assert torch.equal(row_scale_O1, row_scales(weight))
        given.append(row_scale_O1)
        return reference.int4_to_fp8(weight, row_scale_O1)

    row_scales = Int4Weight.row_scales
    monkeypatch.setattr(Int4Weight, "row_scales", None)
    layer.ops = Ops.bind({"int4_to_fp8": divided})
    layer(torch.ones(4, 64))
    assert given == [layer.get_parameter("row_scale")]


@pytest.mark.parametrize("name", ["awq", "modelopt", "packed-w4a8"])
def test_weights_that_are_kept_in_fp8_give_the_same_bits_and_are_made_once(name: str) -> None:
    """Where the layer is finalised; no step makes them, and smaller steps do without."""
    made, (kept, called) = rounding_weights(name), (rounding_weights(name, keep=True), list[str]())
    assert kept.get_parameter("fp8_weight").shape == (32, 64)
    assert "fp8_weight" not in dict(made.named_parameters())
    x_TI = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    expected = [made(x_TI[:tokens]) for tokens in (3, 4)]
    kept.ops = Ops.bind({op: partial(note, called, op) for op in ("linear_int4_fp8", "int4_to_fp8", "linear_fp8")})
    assert all(torch.equal(kept(x_TI[: len(each)]), each) for each in expected)
    assert called == ["linear_int4_fp8", "linear_fp8"]


def test_the_tiles_that_are_counted_are_those_that_are_kept() -> None:
    """Planning knows without torch what the core's layout fills up to."""
    assert (schemes.OUTPUTS, schemes.BLOCK) == (int4.OUTPUTS, int4.BLOCK)


@pytest.mark.parametrize("name", ["awq", "auto-round-awq", "packed-asymmetric", "packed", "modelopt"])
@pytest.mark.parametrize(("sizes", "ins", "group"), [((80,), 4544, 64), ((72, 40, 24), 200, -1), ((64,), 96, 32)])
def test_what_is_kept_is_what_planning_counts(name: str, sizes: tuple[int, ...], ins: int, group: int) -> None:
    """To the byte, ragged outputs and inputs and fused parts included."""
    whole, scheme = linear(0, ins, *sizes), scheme_of(FORMATS[name].entry(group))
    layer = empty(scheme, whole)
    layer.randomise(torch.Generator().manual_seed(1))
    layer.finalise()
    counted = sum(
        tensor.held(sizes, ins) * {"int32": 4, "uint8": 1, "float16": 2, "float32": 4}[tensor.dtype]
        for tensor in scheme.tensors("p0", whole)
        if not tensor.optional
    )
    assert sum(parameter.nbytes for parameter in layer.parameters()) == counted


@pytest.mark.parametrize("name", ["awq", "gptq", "packed-asymmetric", "modelopt"])
def test_storage_stays_near_four_bits_a_weight(name: str) -> None:
    """A group of 128 costs 4 bits a weight, beside its scale of 16 or 32 bits and 4 of a zero point that is not 8."""
    layer = random(name, 256, 512, 128, "bfloat16")
    bits = 8 * sum(parameter.nbytes for parameter in layer.parameters())
    a_group = {"awq": 20, "gptq": 16, "packed-asymmetric": 36, "modelopt": 32}[name]
    assert bits / (256 * 512) == 4 + a_group / 128


@pytest.mark.parametrize("name", ["awq", "packed-w4a8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_output_has_the_planned_dtype_and_is_rounded_once(name: str, dtype: str) -> None:
    """Half-precision results are the float32 results, rounded."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(6)).to(getattr(torch, dtype))
    assert torch.equal(random(name, 32, 64, 32, dtype)(x), random(name, 32, 64, 32)(x.float()).to(getattr(torch, dtype)))


@pytest.mark.parametrize("tokens", [0, 1, 7, 63])
def test_any_number_of_tokens_is_multiplied(tokens: int) -> None:
    """None included."""
    layer = random("awq", 32, 64, 32)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(6))
    assert_close(layer(x), x.double() @ layer.method.dequantise(layer).double().T, op="linear", dtype=torch.float32)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_no_positive_number_is_refused(bad: float) -> None:
    """A corrupt scale is an error naming the linear and the number."""
    stored, _ = FORMATS["awq"].store(weight(32, 64), 32)
    stored["scales"][1, 3] = bad
    layer = empty(scheme_of(FORMATS["awq"].entry(32)), linear(32, 64))
    load(layer, named(stored))
    with pytest.raises(CheckpointError, match=f"scales of down hold {bad:g}"):
        layer.finalise()


@pytest.mark.parametrize("name", FORMATS)
def test_random_parameters_keep_the_magnitude(name: str) -> None:
    """Dummy words use all sixteen numbers and multiply unit inputs into outputs of about one."""
    layer = random(name, 64, 512, 64)
    assert set(unpack(layer.get_parameter("packed")).flatten().tolist()) == set(range(16))
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(2))
    assert 0.7 < layer(x).std().item() < 1.3


@pytest.mark.parametrize("name", ["modelopt", "modelopt-w4a8"])
def test_inputs_are_multiplied_by_what_modelopt_could_not_fold(name: str) -> None:
    """pre_quant_scale goes onto the input before it is rounded; the linear then asks for plain activations."""
    factor_I = torch.linspace(0.5, 2, 64)
    stored, meaning_OI = FORMATS[name].store(weight(16, 64) / factor_I, 32)
    layer = made(scheme_of(FORMATS[name].entry(32)), linear(16, 64), named(stored) | {"down.pre_quant_scale": factor_I})
    assert layer.method.input_format == PLAIN
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(6))
    error = relative_rms(layer(x), (x * factor_I) @ meaning_OI.T)
    assert error < (0.04 if FORMATS[name].fp8 else 1e-6)
    assert (error > 1e-3) == FORMATS[name].fp8


def test_w4a8_is_no_further_from_the_weight_than_modelopts_own_formula() -> None:
    """The codes are exact in FP8 and scales multiply float32 sums; ModelOpt's formula rounds code * scale to FP8 again."""
    stored, meaning_OI = FORMATS["modelopt-w4a8"].store(weight(48, 256), 64)
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(6))
    stored["input_scale"] = x.abs().max() / 448
    layer = made(scheme_of(FORMATS["modelopt-w4a8"].entry(64)), linear(48, 256), named(stored))
    fp8, second = torch.float8_e4m3fn, stored["weight_scale_2"]
    xq_TI, w8_OI = (x / stored["input_scale"]).clamp(-448, 448).to(fp8), (meaning_OI / second).clamp(-448, 448).to(fp8)
    theirs = (xq_TI.double() @ w8_OI.double().T) * stored["input_scale"].double() * second.double()
    exact = x.double() @ meaning_OI.double().T
    assert relative_rms(layer(x), theirs) < 0.06
    assert relative_rms(layer(x), exact) < relative_rms(theirs, exact)


def test_a_linear_left_alone_is_plain() -> None:
    """What the checkpoint does not quantise is stored in the planned dtype."""
    head = Linear("lm_head", (Part("tokens", VOCAB, 11, source="lm_head"),), Part("embed", EMBED, 64))
    plain = linear_method(scheme_of(FORMATS["awq"].entry(32), dtype="bfloat16"), "lm_head", head)
    assert not isinstance(plain, Int4Method)
    assert plain.input_format == PLAIN
    assert plain.create(head, CPU)["weight"].dtype == torch.bfloat16
