"""Numbers that cannot be are refused with the linear, the number and the way out; the formats' own vectors hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plugins.quant_awq.tests.made import empty, linear, load, made, named, scheme_of, weight
from plugins.quant_awq.tests.written import FORMATS, Stored

from paddock.errors import CheckpointError

GROUP = 32


def stored_as(name: str, outs: int = 16, ins: int = 64) -> Stored:
    """Return a written linear."""
    return FORMATS[name].store(weight(outs, ins), GROUP)[0]


def refusal(name: str, stored: Stored, *sizes: int, **entry: Any) -> CheckpointError:
    """Return the error of finalising what was stored."""
    layer = empty(scheme_of(FORMATS[name].entry(GROUP) | entry), linear(16, 64, *sizes))
    load(layer, stored)
    with pytest.raises(CheckpointError) as error:
        layer.finalise()
    assert error.value.fix
    return error.value


def put(name: str, index: Any, value: Any) -> Callable[[Stored], None]:
    """Return what writes a value into a stored tensor."""

    def write(stored: Stored) -> None:
        stored[name][index] = value

    return write


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("gptq", put("qzeros", (0, 0), -1), "qzeros (stored less 1) of down hold 16, which must be from 0 to 15"),
        ("gptq-ordered", put("g_idx", 5, 2), "g_idx of down hold 2, which must be a group from 0 to 1"),
        ("gptq-ordered", put("g_idx", 5, -1), "g_idx of down hold -1"),
        ("gptq-ordered", lambda stored: stored["g_idx"].zero_(), "g_idx gives group 0 64 inputs, not 32"),
        ("gptq", put("scales", (0, 3), float("nan")), "scales of down hold nan"),
        ("gptq", put("scales", (0, 3), 0.0), "scales of down hold 0, which must be a number other than 0"),
        ("unpacked", put("weight", (1, 2), 8), "weight of down hold 8, which must be from -8 to 7"),
        ("unpacked-asymmetric", put("weight_zero_point", (1, 0), -9), "weight_zero_point of down hold -9"),
        ("packed", put("weight_shape", 0, 17), "weight_shape says [17, 64]; the model wants [16, 64]"),
        ("packed", put("weight_scale", (0, 0), float("inf")), "scales of down hold inf"),
        ("modelopt", put("weight_scale", (0, 0), -1.0), "scales of down hold -1"),
        ("modelopt-w4a8", lambda stored: stored["input_scale"].fill_(0.0), "input_scale of down hold 0"),
        ("modelopt-w4a8", lambda stored: stored["weight_scale_2"].fill_(float("nan")), "weight_scale_2 of down hold nan"),
    ],
)
def test_a_number_that_cannot_be_is_named(name: str, spoil: Callable[[Stored], object], says: str) -> None:
    """The tensor, the linear, the number and what it may be."""
    stored = stored_as(name)
    spoil(stored)
    assert says in refusal(name, named(stored)).message


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("awq", put("scales", (0, 3), float("nan")), "scales of p1 hold nan"),
        ("packed", put("weight_scale", (3, 0), 0.0), "scales of p1 hold 0"),
        ("gptq", put("qzeros", (0, 0), -1), "qzeros (stored less 1) of p1 hold 16"),
        ("gptq-ordered", put("g_idx", 5, -1), "g_idx of p1 hold -1"),
        ("gptq", lambda stored: stored.update(bias=torch.ones(16)), "bias of p1 hold 1"),
        ("unpacked", put("weight", (1, 2), 8), "weight of p1 hold 8"),
        ("unpacked-asymmetric", put("weight_zero_point", (1, 0), -9), "weight_zero_point of p1 hold -9"),
        ("modelopt", lambda stored: stored.update(pre_quant_scale=torch.zeros(64)), "pre_quant_scale of p1 hold 0"),
        ("modelopt-w4a8", lambda stored: stored["input_scale"].fill_(0.0), "input_scale of p1 hold 0"),
    ],
)
def test_the_part_that_holds_it_is_the_one_that_is_named(name: str, spoil: Callable[[Stored], object], says: str) -> None:
    """Of three that run as one product the second, as the checkpoint calls it."""
    first, second, third = (stored_as(name) for _ in range(3))
    spoil(second)
    parts = {**named(first, "p0"), **named(second, "p1"), **named(third, "p2")}
    assert says in refusal(name, parts, 16, 16, 16).message


@pytest.mark.parametrize(
    ("name", "entry"),
    [("gptq", {"checkpoint_format": "gptq_v2"}), ("auto-round-gptq", {"packing_format": "auto_round"})],
)
def test_symmetric_zero_points_of_another_version_are_refused(name: str, entry: dict[str, Any]) -> None:
    """Version 1 stores 7 for 8: read as version 2 all weights would be off by a scale; without `sym` they are what is meant."""
    stored = named(stored_as(name))
    error = refusal(name, stored, sym=True, **entry)
    assert "qzeros (stored less 0) of down hold 7, which must be 8 where sym is true" in error.message
    assert "checkpoint_format gptq" in error.fix
    varied = made(scheme_of(FORMATS[name].entry(GROUP) | entry | {"sym": False}), linear(16, 64), stored)
    assert "group_zeros" in dict(varied.named_parameters())


def test_a_factor_of_0_or_of_one_part_alone_is_refused() -> None:
    """Parts that run as one product share their input, and so what it is multiplied with."""
    factor = torch.ones(64)
    factor[3] = 0
    assert (
        "pre_quant_scale of down hold 0"
        in refusal("modelopt", named(stored_as("modelopt")) | {"down.pre_quant_scale": factor}).message
    )
    parts = {**named(stored_as("modelopt"), "p0"), **named(stored_as("modelopt"), "p1")}
    error = refusal("modelopt", parts | {"p1.pre_quant_scale": torch.full((64,), 2.0)}, 16, 16)
    assert "p0: its pre_quant_scale differs from that of p1" in error.message


def test_orders_of_parts_that_differ_are_refused() -> None:
    """q, k and v have one input; with desc_act they have one order."""
    first, second = stored_as("gptq-ordered"), stored_as("gptq-ordered")
    second["g_idx"] = second["g_idx"].flip(0)
    error = refusal("gptq-ordered", {**named(first, "p0"), **named(second, "p1")}, 16, 16)
    assert "p0: its g_idx differs from that of p1" in error.message


def test_an_order_without_desc_act_is_honoured() -> None:
    """The tensors decide: a g_idx that reorders means what it says."""
    stored, meaning_OI = FORMATS["gptq-ordered"].store(weight(16, 64), GROUP)
    layer = made(scheme_of(FORMATS["gptq"].entry(GROUP)), linear(16, 64), named(stored))
    assert torch.equal(layer.method.dequantise(layer), meaning_OI)
    del stored["g_idx"]
    layer = made(scheme_of(FORMATS["gptq"].entry(GROUP)), linear(16, 64), named(stored))
    assert "input_order" not in dict(layer.named_parameters())


def test_negative_scales_are_data_where_tools_write_them() -> None:
    """AutoRound's symmetric rounding chooses the sign of a scale."""
    stored, meaning_OI = FORMATS["auto-round-gptq"].store(weight(16, 64), GROUP)
    stored["scales"][0] *= -1
    layer = made(scheme_of(FORMATS["auto-round-gptq"].entry(GROUP)), linear(16, 64), named(stored))
    meaning_OI[:, :GROUP] *= -1
    assert torch.equal(layer.method.dequantise(layer), meaning_OI)


def test_known_bytes_mean_known_numbers() -> None:
    """ModelOpt: rows -8 and 7 of a column are the byte 0x78, 1 and -1 are 0xF1; compressed-tensors: -8..-1 are 0x76543210."""
    scheme = scheme_of(FORMATS["modelopt"].entry(8))
    stored = {"weight": torch.tensor([[0x78, 0xF1] + [0] * 6], dtype=torch.uint8), "weight_scale": torch.full((2, 1), 0.5)}
    layer = made(scheme, linear(2, 8), named(stored))
    assert layer.method.dequantise(layer)[:, :2].tolist() == [[-4.0, 0.5], [3.5, -0.5]]
    scheme = scheme_of(FORMATS["packed"].entry(8))
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    layer = made(scheme, linear(1, 8), named({"weight_packed": word, "weight_scale": torch.ones(1, 1)}))
    assert layer.method.dequantise(layer).tolist() == [[float(q) for q in range(-8, 0)]]
    word = torch.tensor([[0x75316420]] * 8, dtype=torch.int32)
    stored = {"qweight": word, "qzeros": torch.zeros(1, 1, dtype=torch.int32), "scales": torch.ones(1, 8)}
    layer = made(scheme_of(FORMATS["awq"].entry(8)), linear(8, 8), named(stored))
    assert layer.method.dequantise(layer)[:, 0].tolist() == [float(q) for q in range(8)]


def test_a_bias_of_zeros_that_the_model_lacks_is_let_pass() -> None:
    """AutoGPTQ wrote one for every linear; one that is not zero would change the model, and is refused."""
    stored = named(stored_as("gptq"))
    layer = made(scheme_of(FORMATS["gptq"].entry(GROUP)), linear(16, 64), stored | {"down.bias": torch.zeros(16).half()})
    assert "spare_bias" not in dict(layer.named_parameters())
    assert layer.bias is None
    error = refusal("gptq", stored | {"down.bias": torch.full((16,), 0.5)})
    assert "bias of down hold 0.5, which must be 0: the model has no bias there" in error.message
