"""Weights rounded to 4 bits, and the tensors each layout stores them in, read back by this plugin's own method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plugins.quant_awq.tests.made import linear, made, scheme_of, weight

from paddock_quant_awq.recipes.chosen import Chosen
from paddock_quant_awq.recipes.descriptions import description
from paddock_quant_awq.recipes.layouts import layout
from paddock_quant_awq.recipes.rounding import Rounded, Rounding

GROUP = 32
ROUNDINGS = {
    "zero points": Rounding(group=GROUP, divisor=None, scale_dtype=torch.float16),
    "7.5": Rounding(group=GROUP, divisor=7.5, scale_dtype=torch.bfloat16),
    "7": Rounding(group=GROUP, divisor=7.0, scale_dtype=torch.float32),
}


def spread(values_OG: torch.Tensor) -> torch.Tensor:
    """Return a value for each input of a group."""
    return values_OG.float().repeat_interleave(GROUP, dim=1)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_no_weight_is_off_by_more_than_half_a_step(name: str) -> None:
    """But for the largest of a group, which may lie half a step and what rounding the scale lost beyond the last number."""
    weight_OI = weight(24, 128)
    r = ROUNDINGS[name].rounded(weight_OI)
    steps_OI = (r.meaning() - weight_OI).abs() / spread(r.scales_OG)
    assert steps_OI.max() <= (0.51 if name != "7.5" else 0.55)
    assert r.codes_OI.min() == 0 or name == "7"
    assert r.codes_OI.max() == 15


@pytest.mark.parametrize("name", ROUNDINGS)
def test_weights_of_zero_stay_zero(name: str) -> None:
    """In groups whose weights are all above 0, all below, and all zero; and scales are above 0."""
    weight_OI = weight(6, 96)
    weight_OI[:2] = weight_OI[:2].abs() + 1
    weight_OI[2:4] = -weight_OI[2:4].abs() - 1
    weight_OI[:4, ::5] = 0
    weight_OI[4:] = 0
    r = ROUNDINGS[name].rounded(weight_OI)
    assert (r.meaning()[weight_OI == 0] == 0).all()
    assert (r.scales_OG > 0).all()
    assert ((r.meaning() - weight_OI).abs() <= spread(r.scales_OG) * 0.56).all()


@pytest.mark.parametrize("name", ROUNDINGS)
def test_half_of_a_range_has_steps_of_half_the_size(name: str) -> None:
    """And weights beyond it are the last of the numbers."""
    weight_OI = weight(4, 64)
    plain, half = ROUNDINGS[name].rounded(weight_OI), ROUNDINGS[name].rounded(weight_OI, torch.full((4, 2), 0.5))
    torch.testing.assert_close(half.scales_OG.float() * 2, plain.scales_OG.float(), rtol=2**-8, atol=0)
    assert (half.codes_OI == 0).any(-1).all()
    largest_OG = weight_OI.view(4, 2, GROUP).abs().amax(-1)
    assert (half.meaning().abs() <= spread(largest_OG) * 0.58).all()  # 8 steps where 7 are half of the largest


@pytest.mark.parametrize(("name", "ratio"), [("zero points", 15 / 14), ("7.5", 7.5 / 7), ("7", 1.0)])
def test_a_wider_range_has_the_numbers_of_a_grid_of_seven_steps(name: str, ratio: float) -> None:
    """Weights of -7 .. 7 are exact with 14 steps from end to end; by their own range no format but 7 has them."""
    weight_OI = torch.randint(-7, 8, (4, 64), generator=torch.Generator().manual_seed(1)).float()
    weight_OI[:, ::GROUP], weight_OI[:, 1::GROUP] = -7, 7
    parts_OG = torch.full((4, 2), ratio)
    torch.testing.assert_close(ROUNDINGS[name].rounded(weight_OI, parts_OG).meaning(), weight_OI, rtol=2**-8, atol=0)
    assert torch.equal(ROUNDINGS[name].rounded(weight_OI).meaning(), weight_OI) == (ratio == 1)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_wider_range_cuts_nothing_off(name: str) -> None:
    """Steps are longer by as much, and no weight is further than half a step from its number, zero points included."""
    weight_OI = weight(64, 64)
    plain, wider = ROUNDINGS[name].rounded(weight_OI), ROUNDINGS[name].rounded(weight_OI, torch.full((64, 2), 15 / 14))
    torch.testing.assert_close(wider.scales_OG.float(), plain.scales_OG.float() * 15 / 14, rtol=2**-7, atol=0)
    assert ((wider.meaning() - weight_OI).abs() <= spread(wider.scales_OG) * 0.51).all()


def test_compressed_tensors_words() -> None:
    """-8..7 in order are 0x76543210 and 0xfedcba98."""
    codes_OI = torch.arange(16, dtype=torch.uint8)[None]
    store = layout(Chosen(format="compressed-tensors", scheme="w4a16", group_size=GROUP, zero_points=False), torch.bfloat16).store
    stored = store("p", Rounded(codes_OI=codes_OI, scales_OG=torch.ones(1, 1), zeros_OG=None))
    words = stored["p.weight_packed"]
    assert words is not None
    assert [word & 0xFFFFFFFF for word in words.flatten().tolist()] == [0x76543210, 0xFEDCBA98]
    shape = stored["p.weight_shape"]
    assert shape is not None
    assert (shape.tolist(), shape.dtype) == ([1, 16], torch.int64)
    assert stored["p.weight"] is None


def test_compressed_tensors_words_of_zero_points() -> None:
    """Outputs 0..7 in order are 0x76543210, a word a group."""
    zeros_OG = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 3)
    store = layout(Chosen(format="compressed-tensors", scheme="w4a16", group_size=GROUP, zero_points=True), torch.bfloat16).store
    codes_OI = torch.zeros(8, 3 * GROUP, dtype=torch.uint8)
    words = store("p", Rounded(codes_OI=codes_OI, scales_OG=torch.ones(8, 3), zeros_OG=zeros_OG))["p.weight_zero_point"]
    assert words is not None
    assert words.tolist() == [[0x76543210] * 3]


def test_autoawq_words() -> None:
    """Outputs 0..7 in order are 0x75316420, of weights and of zero points alike."""
    codes_OI, zeros_OG = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 32), torch.arange(8, dtype=torch.uint8)[:, None]
    store = layout(Chosen(format="autoawq", scheme="w4a16", group_size=GROUP, zero_points=True), torch.bfloat16).store
    stored = store("p", Rounded(codes_OI=codes_OI, scales_OG=torch.ones(8, 1), zeros_OG=zeros_OG))
    for name, count in (("qweight", 32), ("qzeros", 1)):
        words = stored[f"p.{name}"]
        assert words is not None
        assert words.tolist() == [[0x75316420]] * count


def test_modelopt_bytes() -> None:
    """The even output is in the low nibble, in two's complement: -8, 7 is 0x78 and 1, -1 is 0xf1."""
    codes_OI = torch.tensor([[0, 9], [15, 7]], dtype=torch.uint8)
    store = layout(Chosen(format="modelopt", scheme="w4a16", group_size=GROUP, zero_points=False), torch.bfloat16).store
    stored = store("p", Rounded(codes_OI=codes_OI, scales_OG=torch.ones(2, 1), zeros_OG=None))["p.weight"]
    assert stored is not None
    assert stored.tolist() == [[0x78, 0xF1]]


@pytest.mark.parametrize(
    ("format_", "scheme", "zero_points"),
    [
        ("compressed-tensors", "w4a16", True),
        ("compressed-tensors", "w4a16", False),
        ("compressed-tensors", "w4a8", True),
        ("compressed-tensors", "w4a8", False),
        ("autoawq", "w4a16", True),
        ("modelopt", "w4a16", False),
        ("modelopt", "w4a8", False),
    ],
)
def test_what_is_stored_means_the_rounded_weight(format_: str, scheme: str, zero_points: bool) -> None:
    """The description is recognised as what was chosen, and its method gives the weight to the last bit."""
    chosen = Chosen(format=format_, scheme=scheme, group_size=GROUP, zero_points=zero_points)
    how = layout(chosen, torch.float32)
    r = how.rounding.rounded(weight(16, 96))
    stored = {name: tensor for name, tensor in how.store("down", r).items() if tensor is not None}
    if how.static_inputs:
        stored |= {f"down.{name}": torch.ones(()) for name in ("input_scale", "weight_scale_2")}
    files: dict[str, Any] = dict(description(chosen, {"torch_dtype": "float32"}, ("lm_head",)))
    config = files.pop("config.json")
    recognised = scheme_of(config["quantization_config"], files=files, torch_dtype="float32")
    assert (recognised.group_size, recognised.fp8_inputs) == (GROUP, scheme == "w4a8")
    layer = made(recognised, linear(16, 96), stored)
    assert torch.equal(layer.method.dequantise(layer), r.meaning())
