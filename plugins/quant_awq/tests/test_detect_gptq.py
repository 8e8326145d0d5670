"""Which GPTQ checkpoints are recognised, what they store, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from plugins.quant_awq.tests.made import found, linear, scheme_of

from paddock.axes import EMBED, VOCAB, Linear, Part
from paddock.errors import ModelConfigError, PlanError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
HEAD = Linear("lm_head", (Part("tokens", VOCAB, 96, source="lm_head"),), Part("embed", EMBED, 256))


def test_a_checkpoint_stores_words_zero_points_scales_and_an_order() -> None:
    """Qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], and g_idx [in] that may be missing in order."""
    tensors = {t.name: t for t in scheme_of(GPTQ).tensors("down", linear(96, 256)) if t.name != "spare_bias"}
    assert {name: (t.dtype, t.shape(96, 256), t.optional) for name, t in tensors.items()} == {
        "qweight": ("int32", (32, 96), False),
        "qzeros": ("int32", (2, 12), False),
        "scales": ("float16", (2, 96), False),
        "g_idx": ("int32", (256,), True),
    }
    ordered = scheme_of(GPTQ | {"desc_act": True}).tensors("down", linear(96, 256))
    assert not any(tensor.optional for tensor in ordered if tensor.name == "g_idx")
    assert not scheme_of(GPTQ | {"desc_act": True, "group_size": -1}).reorders


def test_the_version_says_what_is_stored_of_a_zero_point() -> None:
    """Version 1, the default, stores one less."""
    assert scheme_of(GPTQ).zero_offset == 1
    assert scheme_of(GPTQ | {"checkpoint_format": "gptq"}).zero_offset == 1
    assert scheme_of(GPTQ | {"checkpoint_format": "gptq_v2"}).zero_offset == 0
    assert scheme_of(GPTQ | {"format": "gptq_v2"}).zero_offset == 0


def test_the_old_file_means_the_same() -> None:
    """`quantize_config.json` beside a config.json that says nothing; config.json goes first where it says something."""
    old = {key: value for key, value in GPTQ.items() if key != "quant_method"}
    old |= {"damp_percent": 0.01, "true_sequential": True, "static_groups": False, "model_name_or_path": None}
    assert found({}, files={"quantize_config.json": old}) == scheme_of(GPTQ)
    assert found({"quant_method": "other"}, files={"quantize_config.json": old}) is None
    assert found({}, files={"quantize_config.json": {"quant_method": "awq", "bits": 4}}) is None


@pytest.mark.parametrize("layout", ["marlin", "gptq_p", "bitblas", "qqq", "exl3"])
def test_other_layouts_are_refused_by_name(layout: str) -> None:
    """The error says which layouts are read."""
    with pytest.raises(ModelConfigError, match=layout) as error:
        found(GPTQ | {"checkpoint_format": layout})
    assert "gptq_v2" in error.value.fix
    with pytest.raises(ModelConfigError, match="marlin"):
        found(GPTQ | {"is_marlin_format": True})


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"bits": 8}, "bits"),
        ({"bits": 3}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        ({"dynamic": {"-:(": {}}}, "regular expression"),
        ({"modules_in_block_to_quantize": [[1]]}, "modules_in_block_to_quantize"),
        ({"adapter": {"name": "lora"}}, "adapter"),
        ({"rotation": "hadamard"}, "rotation"),
    ],
)
def test_what_is_not_supported_is_named(entry: dict[str, Any], named: str) -> None:
    """Other widths, settings of single layers and unknown keys are errors, never guesses."""
    with pytest.raises(ModelConfigError) as error:
        found(GPTQ | entry)
    assert named in str(error.value)
    assert error.value.fix


def test_modules_are_left_plain_by_pattern_and_by_list() -> None:
    """Patterns of `dynamic` with "-:" match from the start of a path; `modules_in_block_to_quantize` lists what is stored."""
    skipping = scheme_of(GPTQ | {"dynamic": {r"-:model\.layers\.0\.": {}}})
    assert skipping.is_plain("model.layers.0.mlp.down_proj")
    assert not skipping.is_plain("model.layers.1.mlp.down_proj")
    listing = scheme_of(GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]})
    assert not listing.is_plain("model.layers.0.mlp.down_proj")
    assert listing.is_plain("model.layers.0.mlp.up_proj")


def test_the_head_is_quantised_only_where_it_says_so() -> None:
    """`lm_head` true stores the vocabulary projection like any linear."""
    assert scheme_of(GPTQ).tensors("lm_head", HEAD)[0].name == "weight"
    assert scheme_of(GPTQ | {"lm_head": True}).tensors("lm_head", HEAD)[1].name == "qweight"


@pytest.mark.parametrize("listed", ["mlp.down_proj", 1, {"mlp": 1}, [[1]], [""]])
def test_modules_in_a_block_are_a_list(listed: Any) -> None:
    """A text is not taken for its letters."""
    with pytest.raises(ModelConfigError, match="modules_in_block_to_quantize"):
        found(GPTQ | {"modules_in_block_to_quantize": listed})


def test_words_must_be_whole() -> None:
    """Eight inputs to a word of weights, eight outputs to a word of zero points."""
    with pytest.raises(PlanError, match="44 outputs"):
        scheme_of(GPTQ).tensors("down", linear(44, 256))
    with pytest.raises(PlanError, match="204 inputs"):
        scheme_of(GPTQ | {"group_size": -1}).tensors("down", linear(40, 204))


def test_what_transformers_writes_is_read() -> None:
    """Every key of transformers' own GPTQConfig passes."""
    import json

    from transformers import GPTQConfig

    assert found(json.loads(json.dumps(GPTQConfig(bits=4).to_dict()))) is not None
