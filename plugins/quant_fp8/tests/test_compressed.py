from __future__ import annotations

from typing import Any

import pytest

from paddock.axes import EMBED, FFN, FP8_STATIC, FP8_TOKEN, PLAIN, VOCAB, Linear, Part
from paddock.errors import ModelConfigError, PlanError
from paddock.plugins import CheckpointFacts
from paddock_quant_fp8.compressed import detect
from paddock_quant_fp8.schemes import BLOCK, ROW, TENSOR, CompressedFp8, Stored

EMB = Part("embed", EMBED, 32)
GATE_UP = Linear("gate_up", (Part("gate", FFN, 48, source="mlp.gate_proj"), Part("up", FFN, 48, source="mlp.up_proj")), EMB)
DOWN = Linear("down", (Part("down", EMBED, 32, source="mlp.down_proj"),), Part("ffn", FFN, 48))
HEAD = Linear("lm_head", (Part("tokens", VOCAB, 99, source="lm_head"),), EMB)
DOWN_PATH, GATE_PATH = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj"
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
WEIGHTS, STATIC = FLOAT | {"strategy": "tensor"}, FLOAT | {"strategy": "tensor"}
DYNAMIC, INT4 = FLOAT | {"strategy": "token", "dynamic": True}, FLOAT | {"num_bits": 4, "type": "int", "strategy": "group"}


def group(weights: Any = WEIGHTS, inputs: Any = STATIC, targets: Any = ("Linear",), **more: Any) -> dict[str, Any]:
    """Return a config group."""
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, "output_activations": None} | more


def facts(*groups: dict[str, Any], key: str = "quantization_config", **more: Any) -> CheckpointFacts:
    """Return a config.json with these groups."""
    entry = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
    listed = {f"group_{i}": each for i, each in enumerate(groups)}
    return CheckpointFacts(config={key: entry | {"config_groups": listed} | more}, dtype="bfloat16")


def stored(scheme: CompressedFp8 | None, path: str = DOWN_PATH, linear: Linear = DOWN) -> Stored:
    """Return how a linear is stored, which must not be plainly."""
    assert scheme is not None
    how = scheme.stored(path, linear)
    assert how is not None
    return how


@pytest.mark.parametrize(
    ("weights", "inputs", "expected"),
    [
        (WEIGHTS, STATIC, (TENSOR, FP8_STATIC, 0)),
        (FLOAT, FLOAT, (TENSOR, FP8_STATIC, 0)),  # no strategy: a scale a tensor
        (FLOAT | {"group_size": -1}, DYNAMIC, (ROW, FP8_TOKEN, 0)),
        (FLOAT | {"strategy": "channel"}, DYNAMIC, (ROW, FP8_TOKEN, 0)),
        (WEIGHTS, FLOAT | {"strategy": "tensor", "dynamic": True}, (TENSOR, FP8_TOKEN, 0)),
        (FLOAT | {"strategy": "channel"}, None, (ROW, PLAIN, 0)),
        (FLOAT | {"strategy": "block"}, FLOAT | {"strategy": "group", "group_size": 128, "dynamic": True}, (BLOCK, PLAIN, 128)),
    ],
)
def test_arguments_say_what_a_scale_covers_and_how_inputs_are_scaled(weights: Any, inputs: Any, expected: Any) -> None:
    """Every combination that float-quantized and naive-quantized allow."""
    how = stored(detect(facts(group(weights, inputs), ignore=None)))
    assert (how.scales, how.input_format, how.group) == expected


def test_blocks_are_read_as_older_versions_wrote_them() -> None:
    """Two sizes with an x between them are the list of today."""
    for written in ([64, 32], "64x32"):
        assert stored(detect(facts(group(FLOAT | {"strategy": "block", "block_structure": written}, None)))).block == (64, 32)


def test_extra_arguments_change_nothing() -> None:
    """Observers and what newer versions add do not change what is stored."""
    noisy = group(WEIGHTS | {"observer": "minmax", "observer_kwargs": {}, "scale_dtype": None}, STATIC | {"actorder": None})
    plain = detect(facts(group()))
    assert detect(facts(noisy, version="0.20", transform_config={}, sparsity_config={}, global_compression_ratio=1.2)) == plain


def test_the_old_key_and_presets_are_read() -> None:
    """compression_config came first and names no method; a group may be a preset's name with its targets."""
    old = facts(group(), key="compression_config", quant_method=None)
    assert detect(old) == detect(facts(group()))
    preset = detect(facts(config_groups={"FP8_DYNAMIC": ["Linear"]}))
    assert (stored(preset).scales, stored(preset).input_format) == (ROW, FP8_TOKEN)


def test_the_closest_target_wins() -> None:
    """A path goes before a pattern, a pattern before a class, whatever the groups' order."""
    by_class = group(FLOAT | {"strategy": "channel"}, DYNAMIC)
    by_pattern, by_path = group(WEIGHTS, None, [r"re:.*mlp\..*"]), group(WEIGHTS, DYNAMIC, [DOWN_PATH], format="naive-quantized")
    scheme = detect(facts(by_class, by_pattern, by_path, format="mixed-precision"))
    assert stored(scheme).input_format == FP8_TOKEN
    assert stored(scheme).scales == TENSOR
    assert stored(scheme, GATE_PATH, GATE_UP).input_format == PLAIN
    assert stored(scheme, "lm_head", HEAD).scales == ROW


def test_ignored_linears_and_those_of_no_group_are_plain() -> None:
    """`ignore` goes before any target; what no target names was never quantised."""
    scheme = detect(facts(group(targets=[r"re:.*down_proj"]), ignore=[r"re:.*layers\.0\."]))
    assert scheme is not None
    assert scheme.stored("model.layers.0.mlp.down_proj", DOWN) is None
    assert scheme.stored(GATE_PATH, GATE_UP) is None
    assert stored(scheme).scales == TENSOR


def test_parts_of_one_product_must_be_stored_alike() -> None:
    """Gate per tensor beside up per row is an error that names both and how each is stored."""
    up = group(FLOAT | {"strategy": "channel"}, targets=["re:.*up_proj"])
    scheme = detect(facts(group(), up))
    assert scheme is not None
    with pytest.raises(PlanError, match=r"gate_proj as FP8 with a scale a tensor.*up_proj as FP8 with a scale a row"):
        scheme.tensors(GATE_PATH, GATE_UP)


def test_kv_scales_are_announced_by_their_own_scheme() -> None:
    """A static scale a tensor keeps KV in FP8."""
    scheme = detect(facts(group(), kv_cache_scheme=FLOAT | {"strategy": "tensor"}))
    assert scheme is not None
    assert scheme.kv_cache_dtype == "fp8"


@pytest.mark.parametrize(
    ("groups", "more", "named"),
    [
        ([group(WEIGHTS | {"strategy": "group", "group_size": 64})], {}, "strategy is 'group'"),
        ([group(WEIGHTS | {"symmetric": False})], {}, "symmetric is False"),
        ([group(WEIGHTS | {"dynamic": True})], {}, "weights.dynamic is True"),
        ([group(inputs=FLOAT | {"type": "int"})], {}, "input_activations is"),
        ([group(inputs=FLOAT | {"strategy": "token"})], {}, "input_activations is"),
        ([group(inputs=FLOAT | {"dynamic": "local"})], {}, "input_activations is"),
        ([group(FLOAT | {"strategy": "block"}, STATIC)], {}, "dynamic or null beside weights scaled by blocks"),
        ([group(FLOAT | {"strategy": "block", "block_structure": "128 by 128"}, None)], {}, "block_structure is '128 by 128'"),
        ([group(FLOAT | {"strategy": "block", "block_structure": "0x128"}, None)], {}, r"block_structure is \[0, 128\]"),
        ([group(), group(None, STATIC, ["LlamaAttention"])], {}, "group_1 of compressed-tensors quantise no weights"),
        ([group(), group(INT4, None, ["re:.*mlp"])], {}, "group_1 of compressed-tensors are not FP8"),
        ([group(format="pack-quantized")], {}, "format is 'pack-quantized'"),
        ([group(output_activations=FLOAT)], {}, "output_activations"),
        ([group(targets=[])], {}, "targets"),
        ([group(targets=["re:(("])], {}, "regular expression"),
        ([group()], {"ignore": ["re:*"]}, "regular expression"),
        ([group()], {"kv_cache_scheme": FLOAT | {"strategy": "attn_head"}}, "one scale for all heads"),
        ([group()], {"kv_cache_scheme": FLOAT | {"type": "int"}}, "kv_cache_scheme"),
        ([group()], {"kv_cache_scheme": FLOAT | {"dynamic": True}}, "kv_cache_scheme"),
        ([group()], {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ([group()], {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ([group()], {"group_sizes": 3}, "group_sizes"),
        ([], {}, "config_groups"),
    ],
)
def test_what_is_not_supported_is_named(groups: list[dict[str, Any]], more: dict[str, Any], named: str) -> None:
    """Whatever would change the arithmetic and is not read is an error with key and value, or with what is allowed."""
    with pytest.raises(ModelConfigError, match=named):
        detect(facts(*groups, **more))


def test_integers_and_other_tools_are_left_to_other_formats() -> None:
    """A checkpoint without any FP8 group is not claimed."""
    assert detect(facts(group(INT4, None), format="pack-quantized")) is None
    assert detect(CheckpointFacts(config={"quantization_config": {"quant_method": "fp8"}}, dtype="float16")) is None
    assert detect(CheckpointFacts(config={}, dtype="float16")) is None
