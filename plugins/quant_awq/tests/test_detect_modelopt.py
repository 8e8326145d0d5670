"""Which ModelOpt checkpoints are recognised as INT4 AWQ, what they store, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from plugins.quant_awq.tests.made import found, linear, scheme_of

from paddock.axes import FP8_TOKEN, PLAIN
from paddock.errors import ModelConfigError, PlanError

ENTRY = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head"]}
INNER = {"quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
INNER |= {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


def beside(**keys: Any) -> dict[str, Any]:
    """Return hf_quant_config.json with some keys of its inner object replaced."""
    return {"hf_quant_config.json": {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": INNER | keys}}


def test_two_outputs_share_a_byte() -> None:
    """Weight [out / 2, in] uint8, weight_scale [out, groups], and pre_quant_scale [in] that may be missing."""
    tensors = scheme_of(ENTRY).tensors("down", linear(96, 256))
    assert {t.name: (t.dtype, t.shape(96, 256), t.optional) for t in tensors} == {
        "weight": ("uint8", (48, 256), False),
        "weight_scale": ("float32", (96, 2), False),
        "pre_quant_scale": ("float32", (256,), True),
    }
    with pytest.raises(PlanError, match="33 outputs"):
        scheme_of(ENTRY).tensors("down", linear(33, 256))


def test_w4a8_stores_two_scalars_more_and_is_another_format() -> None:
    """weight_scale_2 and input_scale; its name is its own, for a GPU must have FP8."""
    scheme = scheme_of(ENTRY | {"quant_algo": "W4A8_AWQ"})
    names = [t.name for t in scheme.tensors("down", linear(96, 256)) if not t.axes]
    assert names == ["weight_scale_2", "input_scale"]
    assert (scheme.name, scheme.input_format) == ("modelopt-w4a8", FP8_TOKEN)
    assert (scheme_of(ENTRY).name, scheme_of(ENTRY).input_format) == ("modelopt-w4a16", PLAIN)


def test_either_file_will_do_and_both_are_read() -> None:
    """config.json alone says no group size: the file beside it does, and 128 stands where neither does."""
    assert found({}, files=beside()) == scheme_of(ENTRY)
    assert scheme_of(ENTRY).group_size == 128
    assert scheme_of(ENTRY, files=beside(group_size=64)).group_size == 64
    groups = {"group_0": {"weights": {"dynamic": False, "num_bits": 4, "type": "int", "group_size": 32}, "targets": ["Linear"]}}
    assert scheme_of(ENTRY | {"config_groups": groups}).group_size == 32
    assert scheme_of({**ENTRY, "quant_method": "modelopt_awq"}).group_size == 128


def test_modules_are_left_plain_by_wildcards() -> None:
    """Shell patterns over whole paths, and whole modules by their name; without a list only the head is plain."""
    scheme = scheme_of(ENTRY | {"ignore": ["lm_head", "model.layers.0.self_attn*", "*.router", "model.layers.7"]})
    assert scheme.is_plain("model.layers.0.self_attn.q_proj")
    assert scheme.is_plain("model.layers.3.router")
    assert scheme.is_plain("model.layers.7.mlp.up_proj")
    assert not scheme.is_plain("model.layers.70.mlp.up_proj")
    older = scheme_of(ENTRY | {"ignore": ["lm_head", "self_attn", "layers.1"]})  # parts of paths
    assert older.is_plain("model.layers.0.self_attn.q_proj")
    assert older.is_plain("model.layers.1.mlp.up_proj")
    assert not older.is_plain("model.layers.10.mlp.up_proj")
    listless = scheme_of({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"})
    assert not listless.quantises_head
    assert scheme_of(ENTRY | {"ignore": []}).quantises_head


def test_other_algorithms_are_left_to_others() -> None:
    """FP8 and the rest are not recognised, and no error."""
    assert found({"quant_method": "modelopt", "quant_algo": "FP8"}) is None
    assert found({}, files=beside(quant_algo="FP8")) is None
    assert found({"quant_method": "awq", "bits": 4}, files=beside()) == scheme_of({"quant_method": "awq", "bits": 4})


def test_kv_scales_are_announced() -> None:
    """In either spelling."""
    assert scheme_of(ENTRY).kv_cache_dtype is None
    assert scheme_of({}, files=beside(kv_cache_quant_algo="FP8")).kv_cache_dtype == "fp8"
    assert scheme_of(ENTRY | {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}).kv_cache_dtype == "fp8"


@pytest.mark.parametrize(
    ("entry", "files", "named"),
    [
        (ENTRY, beside(quant_algo="W4A8_AWQ"), "different algorithms"),
        (ENTRY, beside(has_zero_point=True), "has_zero_point"),
        (ENTRY | {"group_size": 64}, beside(), "group_size"),
        (ENTRY | {"group_size": 0}, {}, "group_size"),
        (ENTRY, beside(group_size="128"), "hf_quant_config.json: quantization.group_size is '128'"),
        (ENTRY, beside(kv_cache_quant_algo="NVFP4"), "hf_quant_config.json: quantization.kv_cache_quant_algo is 'NVFP4'"),
        (ENTRY | {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}}, {}, "kv_cache_scheme"),
        (ENTRY | {"ignore": "lm_head"}, {}, "ignore"),
        (ENTRY | {"novelty": 1}, {}, "novelty"),
    ],
)
def test_what_is_not_supported_is_named(entry: dict[str, Any], files: dict[str, Any], named: str) -> None:
    """Contradictions, zero points and unknown keys are errors that name the key and the way out."""
    with pytest.raises(ModelConfigError) as error:
        found(entry, files=files)
    assert named in str(error.value)
    assert error.value.fix
