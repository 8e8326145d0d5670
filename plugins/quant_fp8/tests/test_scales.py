"""Scales and the FP8 numbers they give, at the edges."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from paddock.axes import EMBED, FFN, KV_HEADS, VOCAB, Linear, Part, WeightTable
from paddock.errors import CheckpointError, OptionError
from paddock.layers.reference import FP8_MIN_SCALE
from paddock.quantize.recipe import PlainLayer, PlainLinear, RecipeInputs
from paddock_quant_fp8 import scales as loading
from paddock_quant_fp8.recipes import dynamic, modelopt, official, scales

EMB = Part("embed", EMBED, 8)
FUSED = Linear("qkv", (Part("qkv", KV_HEADS, 2, 4, "attn.query_key_value"),), EMB, fed_by="norm")
UP = Linear("up", (Part("up", FFN, 16, source="mlp.up"),), EMB, fed_by="norm")
HEAD = Linear("lm_head", (Part("tokens", VOCAB, 11, source="lm_head"),), EMB, fed_by="norm")
TABLE = WeightTable(outer=(HEAD,), layer=(FUSED, UP), num_layers=3, layer_source="h.{i}.")


def layer(index: int = 1) -> PlainLayer:
    """Return a layer whose queries, keys and values are one projection, with weights of ones."""
    linears = {
        "qkv": PlainLinear(declared=FUSED, weights={f"h.{index}.attn.query_key_value": torch.ones(8, 8)}),
        "up": PlainLinear(declared=UP, weights={f"h.{index}.mlp.up": torch.ones(16, 8)}),
    }
    return PlainLayer(index=index, linears=linears, attention_source=f"h.{index}.attn")


def inputs(**changes: str) -> RecipeInputs:
    """Return what a recipe is made for."""
    return RecipeInputs(**({"table": TABLE, "dtype": "bfloat16"} | changes))  # type: ignore[arg-type]


def test_a_weight_of_zeros_has_scale_one_and_a_row_of_zeros_the_floor() -> None:
    """Neither divides by nothing, and both give zeros."""
    zeros = torch.zeros(3, 4)
    assert scales.tensor_scale(zeros, "w").item() == 1
    assert torch.equal(scales.row_scales(zeros, "w"), torch.full((3, 1), FP8_MIN_SCALE))
    assert not scales.quantised(zeros, scales.row_scales(zeros, "w")).float().any()


def test_an_input_of_zeros_has_scale_one() -> None:
    """A linear that the text never woke is quantised all the same."""
    largest = scales.Largest()
    largest.see(torch.zeros(2, 3))
    assert largest.scale("x").item() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_wherever_it_was_seen(bad: float) -> None:
    """A later, finite, batch does not hide it."""
    weight = torch.ones(2, 3)
    weight[1, 1] = bad
    largest = scales.Largest()
    largest.see(weight)
    largest.see(torch.ones(2, 3))
    with pytest.raises(CheckpointError, match="x hold values that are not finite"):
        largest.scale("x")
    for scale in (scales.tensor_scale, scales.row_scales):
        with pytest.raises(CheckpointError, match="x hold values that are not finite"):
            scale(weight, "x")


def test_magnitudes_beyond_the_range_saturate() -> None:
    """As where a scale was rounded down: no number becomes NaN."""
    weight = torch.tensor([[448.0, -460.0, 1e6, 3.0]])
    assert scales.quantised(weight, torch.ones(())).float().tolist() == [[448.0, -448.0, 448.0, 3.0]]


def test_rows_are_divided_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how many rows are held in float32 at a time."""
    weight = torch.randn(13, 8, generator=torch.Generator().manual_seed(1))
    scale = scales.row_scales(weight, "w")
    whole = scales.quantised(weight, scale)
    monkeypatch.setattr(loading, "CHUNK_BYTES", 4 * 8 * 3)
    assert torch.equal(scales.quantised(weight, scale).view(torch.uint8), whole.view(torch.uint8))


def tensor(made: Mapping[str, Tensor | None], name: str) -> Tensor:
    """Return a tensor that a recipe made."""
    found = made[name]
    assert found is not None
    return found


def test_where_the_projection_is_fused_kv_scales_are_named_by_the_block() -> None:
    """There is no k_proj to hang them on."""
    work = modelopt.create(inputs(kv_cache_dtype="fp8")).begin(layer())
    work.see_input("qkv", torch.full((2, 8), 4.48))
    work.see_input("up", torch.full((2, 8), -8.96))
    work.see_kv(torch.full((2, 2, 4), 448.0), torch.full((2, 2, 4), -224.0))
    made = work.tensors()
    assert tensor(made, "h.1.attn.k_scale").item() == 1
    assert tensor(made, "h.1.attn.v_scale").item() == 0.5
    assert tensor(made, "h.1.attn.query_key_value.input_scale").item() == pytest.approx(0.01)
    assert tensor(made, "h.1.mlp.up.input_scale").item() == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bfloat16", torch.bfloat16), ("float16", torch.float32), ("float32", torch.float32)]
)
def test_row_scales_are_stored_in_a_dtype_with_enough_small_numbers(dtype: str, stored: torch.dtype) -> None:
    """The smallest normal number of float16 is 6e-5, a row scale of a small weight less."""
    made = dynamic.create(inputs(dtype=dtype)).begin(layer()).tensors()
    assert tensor(made, "h.1.mlp.up.weight_scale").dtype == stored


@pytest.mark.parametrize(("index", "chosen"), [(0, []), (1, ["h.1.mlp.up"]), (2, [])])
def test_the_official_recipe_leaves_the_ends_and_attention_plain(index: int, chosen: list[str]) -> None:
    """And lists by name what it leaves plain."""
    recipe = official.create(inputs())
    made = recipe.begin(layer(index)).tensors()
    assert sorted(made) == sorted(f"{path}.{name}" for path in chosen for name in ("weight", "weight_scale"))
    listed = recipe.files({})["config.json"]["quantization_config"]["modules_to_not_convert"]
    assert listed == [
        "h.0.attn.query_key_value",
        "h.0.mlp.up",
        "h.1.attn.query_key_value",
        "h.2.attn.query_key_value",
        "h.2.mlp.up",
        "lm_head",
    ]


def test_the_official_recipe_wants_three_layers() -> None:
    """Two would all be left plain."""
    short = WeightTable(outer=(HEAD,), layer=(FUSED, UP), num_layers=2)
    with pytest.raises(OptionError, match="the model has 2"):
        official.create(RecipeInputs(table=short, dtype="bfloat16"))


def test_only_kv_scales_make_a_dynamic_recipe_read_text() -> None:
    """Without them nothing is run."""
    for create in (dynamic.create, official.create):
        assert not create(inputs()).calibrated
        assert create(inputs(kv_cache_dtype="fp8")).calibrated
