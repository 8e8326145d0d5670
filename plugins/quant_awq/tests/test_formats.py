"""Every 4-bit format means, once loaded, what its writer wrote, and multiplies as that does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.quant_awq.tests.made import CPU, linear, made, named, scheme_of, weight
from plugins.quant_awq.tests.written import FORMATS, packed

from paddock.axes import FP8_TOKEN, PLAIN
from paddock.layers import LinearLayer, int4, reference
from paddock.testing.oracle import bound, relative_rms
from paddock_quant_awq.method import Int4Method

HELD = {"packed", "group_scales"}


def loaded(name: str, outs: int, ins: int, group: int, seed: int = 0) -> tuple[LinearLayer, torch.Tensor]:
    """Return a layer of a written checkpoint and the weight it stands for."""
    stored, meaning_OI = FORMATS[name].store(weight(outs, ins, seed), group)
    return made(scheme_of(FORMATS[name].entry(group)), linear(outs, ins), named(stored)), meaning_OI


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    eights=st.integers(1, 4),
    ragged=st.integers(0, 7),
    groups=st.integers(1, 5),
    group=st.sampled_from([8, 16, 32, 64, 128, -1]),
    seed=st.integers(0, 9),
)
def test_a_loaded_weight_is_what_was_written(name: str, eights: int, ragged: int, groups: int, group: int, seed: int) -> None:
    """For every format, group size and shape it allows, ragged outputs included: to the last bit."""
    outs = 8 * eights + ragged // FORMATS[name].together * FORMATS[name].together
    layer, meaning_OI = loaded(name, outs, groups * (72 if group == -1 else group), group, seed)
    assert torch.equal(layer.method.dequantise(layer), meaning_OI)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_meaning(name: str) -> None:
    """They equal x W^T, activations rounded to FP8 first where the format says so, within the oracle's bound for a linear."""
    layer, meaning_OI = loaded(name, 24, 256, 64)
    x_TI = torch.randn(7, 256, generator=torch.Generator().manual_seed(3))
    seen = reference.quantize_fp8_token(x_TI)
    seen_TI = seen.values_TI.double() * seen.scale.double() if FORMATS[name].fp8 else x_TI.double()
    expected_TO = seen_TI @ meaning_OI.double().T
    assert relative_rms(layer(x_TI), expected_TO) <= bound("linear", torch.float32)
    assert layer.method.input_format == (FP8_TOKEN if FORMATS[name].fp8 else PLAIN)
    if FORMATS[name].fp8:
        assert torch.equal(layer(seen), layer(x_TI))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_lies_in_one_form(name: str) -> None:
    """After finalise names, shapes and dtypes are the same whatever the checkpoint; zeros are kept only where needed."""
    layer, _ = loaded(name, 24, 256, 64)
    assert isinstance(layer.method, Int4Method)
    held = dict(layer.named_parameters())
    assert (held["packed"].shape, held["packed"].dtype) == ((2, 4, 1024), torch.uint8)
    assert held["group_scales"].shape == (4, 64)
    assert held["group_scales"].is_contiguous()
    varied = name in ("awq", "auto-round-awq", "gptq-v2") or name.endswith("asymmetric")
    assert held.keys() == HELD | ({"group_zeros"} if varied else set()) | ({"input_order"} if name == "gptq-ordered" else set())
    if varied:
        assert (held["group_zeros"].shape, held["group_zeros"].dtype) == ((4, 32), torch.uint8)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sizes", [(16, 8, 8), (24, 40), (72, 40, 88)])
def test_parts_that_run_as_one_product_each_keep_their_own(
    name: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused parts are stored apart, and lie one after another, wherever slabs and pieces begin."""
    monkeypatch.setitem(int4.PIECE_BYTES, "cpu", 1)
    parts = [FORMATS[name].store(weight(size, 64, i), 16) for i, size in enumerate(sizes)]
    stored = {key: value for i, (part, _) in enumerate(parts) for key, value in named(part, f"p{i}").items()}
    layer = made(scheme_of(FORMATS[name].entry(16)), linear(0, 64, *sizes), stored)
    assert torch.equal(layer.method.dequantise(layer), torch.cat([meaning for _, meaning in parts]))


def test_parts_of_ragged_size_keep_their_zero_points() -> None:
    """compressed-tensors packs zero points along the outputs of each part: 12 and 5 outputs are two words and one."""
    parts = [packed(weight(size, 64, size), 32, symmetric=False) for size in (12, 5)]
    stored = {key: value for i, (part, _) in enumerate(parts) for key, value in named(part, f"p{i}").items()}
    layer = made(scheme_of(FORMATS["packed-asymmetric"].entry(32)), linear(0, 64, 12, 5), stored)
    assert torch.equal(layer.method.dequantise(layer), torch.cat([meaning for _, meaning in parts]))


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_are_unpacked_in_bounded_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many outputs are held in float32 at a time changes neither what is repacked nor what is multiplied."""
    whole, _ = loaded(name, 136, 128, 32)
    x_TI = torch.randn(3, 128, generator=torch.Generator().manual_seed(6))
    expected_TO = whole(x_TI)
    monkeypatch.setitem(int4.PIECE_BYTES, "cpu", 1)
    pieces, _ = loaded(name, 136, 128, 32)
    assert isinstance(pieces.method, Int4Method)
    assert pieces.method.form is not None
    assert [rows.stop - rows.start for rows in int4.pieces(pieces.method.form, CPU)] == [64, 64, 8]
    assert torch.equal(pieces.get_parameter("packed"), whole.get_parameter("packed"))
    assert relative_rms(pieces(x_TI), expected_TO) <= bound("linear", torch.float32)


def test_symmetric_gptq_checkpoints_keep_no_zero_points() -> None:
    """Version 1 stores 7 for a zero point of 8, version 2 stores 8: the same checkpoint."""
    weight_OI = weight(16, 64)
    first, second = FORMATS["gptq"].store(weight_OI, 32)[0], dict(FORMATS["gptq"].store(weight_OI, 32)[0])
    assert first["qzeros"].tolist() == [[0x77777777] * 2] * 2
    second["qzeros"] = torch.full_like(first["qzeros"], -0x77777778)
    layers = [
        made(scheme_of(FORMATS["gptq"].entry(32) | {"checkpoint_format": version}), linear(16, 64), named(stored))
        for version, stored in (("gptq", first), ("gptq_v2", second))
    ]
    assert torch.equal(*(layer.method.dequantise(layer) for layer in layers))
    assert all(dict(layer.named_parameters()).keys() == HELD for layer in layers)


def test_inputs_in_another_order_are_put_in_groups_once() -> None:
    """desc_act: the weight lies group by group, and inputs are reordered on the way; g_idx itself is gone."""
    layer, meaning_OI = loaded("gptq-ordered", 16, 128, 32)
    order_I = layer.get_parameter("input_order")
    assert not torch.equal(order_I, torch.arange(128))
    assert sorted(order_I.tolist()) == list(range(128))
    x_TI = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    assert relative_rms(layer(x_TI), x_TI.double() @ meaning_OI.double().T) <= bound("linear", torch.float32)
