from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from paddock.axes import EMBED, FFN, FP8_STATIC, FP8_TOKEN, VOCAB, Linear, Part
from paddock.errors import ModelConfigError, PlanError
from paddock.plugins import CheckpointFacts
from paddock_quant_fp8.detect import RowwiseFp8, TensorwiseFp8, detect_autofp8, detect_fbgemm
from paddock_quant_fp8.plugin import paddock_quantizations

EMB = Part("embed", EMBED, 32)
GATE_UP = Linear("gate_up", (Part("gate", FFN, 48, source="mlp.gate_proj"), Part("up", FFN, 48, source="mlp.up_proj")), EMB)
DOWN = Linear("down", (Part("down", EMBED, 32, source="mlp.down_proj"),), Part("ffn", FFN, 48))
HEAD = Linear("lm_head", (Part("tokens", VOCAB, 99, source="lm_head"),), EMB)


def facts(**entry: Any) -> CheckpointFacts:
    """Return a config.json with this quantisation entry, or with none."""
    return CheckpointFacts(config={"quantization_config": entry} if entry else {}, dtype="bfloat16")


def names(scheme: RowwiseFp8 | TensorwiseFp8, path: str, linear: Linear = DOWN) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, dtype and shape of what holds a linear."""
    tensors = scheme.tensors(path, linear)
    return [(tensor.name, tensor.dtype, tensor.shape(linear.out_size, linear.in_size)) for tensor in tensors]


PLAIN = [("weight", "bfloat16", (32, 48))]
ROWWISE = [("weight", "float8_e4m3fn", (32, 48)), ("weight_scale", "float32", (32, 1))]


def test_a_row_scaled_checkpoint_stores_a_scale_a_row() -> None:
    """`fbgemm_fp8`: FP8 weight [out, in], float32 scales [out, 1], activations per token clipped at 1200 by default."""
    scheme = detect_fbgemm(facts(quant_method="fbgemm_fp8", modules_to_not_convert=None))
    assert scheme is not None
    assert (scheme.input_format, scheme.activation_bound, scheme.kv_cache_dtype) == (FP8_TOKEN, 1200.0, None)
    assert names(scheme, "model.layers.1.mlp.down_proj") == ROWWISE


@pytest.mark.parametrize(
    ("entry", "plain"),
    [
        ("model.layers.1.mlp.down_proj", True),  # the path itself
        ("down_proj", True),  # its last name
        ("model.layers.1", True),  # a module around it
        ("mlp", True),  # a name in between
        ("model.layers.11", False),
        ("model.layers.1.mlp.down", False),
        ("model.layers", True),
        ("proj", False),
    ],
)
def test_a_skipped_name_means_path_leaf_or_module_around(entry: str, plain: bool) -> None:
    """`modules_to_not_convert` of `fbgemm_fp8` names a path, a last name, or any module around; never part of a name."""
    scheme = detect_fbgemm(facts(quant_method="fbgemm_fp8", modules_to_not_convert=[entry]))
    assert scheme is not None
    assert names(scheme, "model.layers.1.mlp.down_proj") == (PLAIN if plain else ROWWISE)


@pytest.mark.parametrize(
    ("entry", "plain"),
    [
        ("model.layers.1.mlp.down_proj", True),
        ("model.layers.1", True),
        ("down_proj", True),  # as transformers lists them
        ("mlp.down_proj", True),
        ("proj", False),
        ("mlp", False),
        ("model.layers.11", False),
    ],
)
@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
def test_an_ignored_layer_means_path_or_module_around(key: str, entry: str, plain: bool) -> None:
    """`ignored_layers` of `fp8`, in either spelling, names a path, a module around it or the names it ends in."""
    scheme = detect_autofp8(facts(quant_method="fp8", activation_scheme="dynamic", **{key: [entry]}))
    assert scheme is not None
    assert (names(scheme, "model.layers.1.mlp.down_proj") == PLAIN) is plain


def test_static_checkpoints_store_two_scalars_a_part_and_dynamic_ones_one() -> None:
    """`fp8`: a weight scale, and when static an input scale, for each fused part."""
    static = detect_autofp8(facts(quant_method="fp8", activation_scheme="static", kv_cache_scheme="static"))
    dynamic = detect_autofp8(facts(quant_method="fp8", activation_scheme="dynamic"))
    assert static is not None
    assert dynamic is not None
    assert (static.input_format, static.kv_cache_dtype) == (FP8_STATIC, "fp8")
    assert (dynamic.input_format, dynamic.kv_cache_dtype) == (FP8_TOKEN, None)
    assert [name for name, _, _ in names(static, "mlp.gate_proj", GATE_UP)] == ["weight", "weight_scale", "input_scale"]
    assert names(dynamic, "mlp.gate_proj", GATE_UP)[1:] == [("weight_scale", "float32", ())]


def test_what_transformers_writes_is_read() -> None:
    """Its keys beside the format do not change what is stored."""
    own = {"modules_to_convert": None, "dequantize": False, "scale_fmt": "float", "expert_dtype": "fp8"}
    scheme = detect_autofp8(facts(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128], **own))
    assert scheme == TensorwiseFp8(dtype="bfloat16", input_format=FP8_TOKEN, block=(128, 128))
    assert names(scheme, "mlp.down_proj")[1] == ("weight_scale_inv", "float32", (1, 1))


def test_the_head_is_never_quantised() -> None:
    """No FP8 writer quantises the vocabulary projection, named in its list or not."""
    for scheme in (RowwiseFp8(dtype="float16"), TensorwiseFp8(dtype="float16", input_format=FP8_STATIC)):
        assert names(scheme, "lm_head", HEAD) == [("weight", "float16", (99, 32))]


def test_fused_parts_must_agree() -> None:
    """A list that skips up but not gate is an error naming both."""
    scheme = RowwiseFp8(dtype="bfloat16", skipped=("model.layers.0.mlp.up_proj",))
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.up_proj plain but quantises model\.layers\.0\.mlp\.gate_proj"):
        scheme.tensors("model.layers.0.mlp.gate_proj", GATE_UP)


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors", "awq", "fp8_e5m2", None])
def test_other_formats_are_not_claimed(method: str | None) -> None:
    """What this plugin does not read is left to others, FP8 or not."""
    entry = facts(quant_method=method, quant_algo="FP8")
    assert detect_fbgemm(entry) is None
    assert detect_autofp8(entry) is None
    assert detect_autofp8(facts()) is None


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"activation_scheme": "static", "weight_block_size": [128, 128]}, "activation_scheme"),
        ({"activation_scheme": "dynamic", "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"activation_scheme": "dynamic", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"activation_scheme": "both"}, "activation_scheme"),
        ({}, "activation_scheme is None"),
        ({"activation_scheme": None}, "activation_scheme is None"),
        ({"activation_scheme": "static", "kv_cache_scheme": "dynamic"}, "kv_cache_scheme"),
        ({"activation_scheme": "static", "fmt": "e5m2"}, "fmt"),
        ({"activation_scheme": "static", "ignored_layers": "lm_head"}, "ignored_layers"),
        ({"activation_scheme": "static", "group_size": 128}, "group_size"),
        ({"activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        ({"activation_scheme": "dynamic", "modules_to_convert": ["model.embed_tokens"]}, "modules_to_convert"),
    ],
)
def test_what_is_not_supported_is_named(entry: dict[str, Any], named: str) -> None:
    """Block scales, unknown schemes and unknown keys are errors, never guesses."""
    with pytest.raises(ModelConfigError, match=named):
        detect_autofp8(facts(quant_method="fp8", **entry))


def test_the_descriptors_light_references_import_no_torch() -> None:
    """Planning detects formats in a process that has not imported torch."""
    references = [spec.detect for spec in paddock_quantizations()]
    lines = ["import sys", "from paddock.plugins import CheckpointFacts, resolve"]
    lines += [f"for r in {references!r}: assert resolve(r)(CheckpointFacts(config={{}}, dtype='float16')) is None"]
    subprocess.run([sys.executable, "-c", "\n".join([*lines, "assert 'torch' not in sys.modules"])], check=True)
