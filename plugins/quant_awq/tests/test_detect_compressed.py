"""Which compressed-tensors checkpoints are recognised as 4-bit, what they store, and what is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from plugins.quant_awq.tests.made import found, linear, scheme_of
from plugins.quant_awq.tests.written import compressed_entry

from paddock.axes import EMBED, FP8_TOKEN, PLAIN, VOCAB, Linear, Part
from paddock.errors import ModelConfigError
from paddock_quant_awq.scheme import PACKED, UNPACKED, Int4Scheme


def shapes(scheme: Int4Scheme, outs: int = 20, ins: int = 256) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of what holds a linear, by name."""
    tensors = scheme.tensors("down", linear(outs, ins))
    return {t.name: (t.dtype, t.shape(outs, ins)) for t in tensors}


def changed(path: str, value: Any, **keys: Any) -> dict[str, Any]:
    """Return an entry with one value at a dotted path replaced."""
    entry = copy.deepcopy(compressed_entry(128, **keys))
    *outer, last = path.split(".")
    place = entry
    for key in outer:
        place = place[key]
    place[last] = value
    return entry


def test_packed_integers_lie_along_the_inputs_and_zero_points_along_the_outputs() -> None:
    """weight_packed [out, in / 8], weight_scale [out, groups], weight_zero_point [ceil(out / 8), groups], weight_shape [2]."""
    packed = {"weight_packed": ("int32", (20, 32)), "weight_shape": ("int64", (2,)), "weight_scale": ("float32", (20, 2))}
    assert shapes(scheme_of(compressed_entry(128))) == packed
    zeros = {"weight_zero_point": ("int32", (3, 2))}
    assert shapes(scheme_of(compressed_entry(128, symmetric=False))) == packed | zeros
    channel = shapes(scheme_of(compressed_entry(-1, symmetric=False)))
    assert (channel["weight_scale"][1], channel["weight_zero_point"][1]) == ((20, 1), (3, 1))


def test_4544_inputs_are_568_words() -> None:
    """Falcon-7B's inputs in groups of 64."""
    assert shapes(scheme_of(compressed_entry(64)), 16, 4544)["weight_packed"] == ("int32", (16, 568))


def test_unpacked_integers_are_an_int8_each() -> None:
    """Format int-quantized: weight [out, in] and weight_zero_point [out, groups]."""
    scheme = scheme_of(compressed_entry(128, symmetric=False, format_="int-quantized"))
    assert scheme.packing == UNPACKED
    assert shapes(scheme)["weight"] == ("int8", (20, 256))
    assert shapes(scheme)["weight_zero_point"] == ("int8", (20, 2))


def test_scales_are_read_in_the_dtype_the_model_was_saved_in() -> None:
    """Whatever dtype it is run in."""
    for saved in ("bfloat16", "float16"):
        scheme = scheme_of(compressed_entry(128), torch_dtype=saved, dtype="float32")
        assert shapes(scheme)["weight_scale"][0] == saved


def test_fp8_activations_make_it_another_format() -> None:
    """W4AFP8 has its own name, for a GPU must have FP8; of the same tensors."""
    plain, fp8 = scheme_of(compressed_entry(128)), scheme_of(compressed_entry(128, fp8=True))
    assert (plain.name, plain.input_format) == ("compressed-tensors-w4a16", PLAIN)
    assert (fp8.name, fp8.input_format) == ("compressed-tensors-w4a8", FP8_TOKEN)
    assert shapes(plain) == shapes(fp8)


def test_what_is_not_of_4_bit_integers_is_left_to_others() -> None:
    """FP8, 8-bit integers, other methods: not recognised, and no error."""
    assert found(changed("config_groups.group_0.weights.num_bits", 8)) is None
    assert found(changed("config_groups.group_0.weights.type", "float")) is None
    assert found({"quant_method": "fp8"}) is None
    assert found({}) is None


def test_the_old_key_means_the_same() -> None:
    """`compression_config` in place of `quantization_config`."""
    assert found({}, compression_config=compressed_entry(128)) == scheme_of(compressed_entry(128))


def test_targets_and_ignored_modules_go_by_path_pattern_and_class() -> None:
    """An entry is an exact path, a pattern from the start of it, or the class Linear."""
    scheme = scheme_of(changed("ignore", ["lm_head", "re:model.layers.0.*", "model.layers.3.mlp.down_proj"]))
    plain = ["model.layers.0.mlp.up_proj", "model.layers.3.mlp.down_proj"]
    assert all(scheme.is_plain(path) for path in plain)
    assert not any(scheme.is_plain(path) for path in ["model.layers.3.mlp.up_proj", "x.model.layers.0.mlp.up_proj"])
    some = scheme_of(changed("config_groups.group_0.targets", ["re:.*mlp.*"]))
    assert some.is_plain("model.layers.0.self_attn.q_proj")
    assert not some.is_plain("model.layers.0.mlp.up_proj")


def test_a_head_nobody_ignores_is_quantised() -> None:
    """Targets say Linear, and the head is one."""
    head = Linear("lm_head", (Part("tokens", VOCAB, 96, source="lm_head"),), Part("embed", EMBED, 256))
    assert scheme_of(compressed_entry(128)).tensors("lm_head", head)[0].name == "weight"
    assert scheme_of(changed("ignore", [])).tensors("lm_head", head)[0].name == "weight_packed"


@pytest.mark.parametrize(
    ("target", "ignored", "layers", "quantised"),
    [
        ("Linear", "lm_head", True, False),
        ("Module", "-", True, True),
        ("LinearBase", "-", True, True),
        ("FalconLinear", "-", True, False),  # Falcon's own class, which no head is of
        ("Linear", "FalconLinear", False, True),
    ],
)
def test_a_class_means_its_heirs_and_a_head_is_no_falcon_linear(target: str, ignored: str, layers: bool, quantised: bool) -> None:
    """Linears are of every class above theirs, and only those of layers are of Falcon's own."""
    entry = changed("config_groups.group_0.targets", [target]) | {"ignore": [ignored]}
    head = Linear("lm_head", (Part("tokens", VOCAB, 96, source="lm_head"),), Part("embed", EMBED, 256))
    scheme = scheme_of(entry)
    assert ("weight_packed" in shapes(scheme)) is layers
    assert (scheme.tensors("lm_head", head)[0].name == "weight_packed") is quantised


def test_groups_of_their_own_format_and_strategy_left_out_are_understood() -> None:
    """A group's `format` overrides that above; without a strategy the group size says it."""
    entry = changed("format", "mixed-precision")
    entry["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert scheme_of(entry).packing == PACKED
    assert scheme_of(changed("config_groups.group_0.weights.strategy", None)).group_size == 128
    entry = changed("config_groups.group_0.weights.strategy", None)
    entry["config_groups"]["group_0"]["weights"]["group_size"] = -1
    assert scheme_of(entry).group_size == -1
    assert scheme_of(changed("config_groups.group_0.weights.actorder", "group")).reorders
    assert not scheme_of(changed("config_groups.group_0.weights.actorder", "weight")).reorders


def test_kv_scales_are_announced() -> None:
    """Static FP8 with one scale each for K and V."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert scheme_of(changed("kv_cache_scheme", scheme)).kv_cache_dtype == "fp8"
    for change in ({"strategy": "attn_head"}, {"symmetric": False}, {"dynamic": True}):
        with pytest.raises(ModelConfigError, match="kv_cache_scheme"):
            found(changed("kv_cache_scheme", scheme | change))


WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("format", "marlin-24", "marlin-24"),
        ("format", "mixed-precision", "mixed-precision"),
        (f"{WEIGHTS}.strategy", "tensor", "strategy"),
        (f"{WEIGHTS}.strategy", "block", "strategy"),
        (f"{WEIGHTS}.group_size", 0, "group_size"),
        (f"{WEIGHTS}.group_size", None, "group_size"),
        (f"{WEIGHTS}.symmetric", "yes", "symmetric"),
        (f"{WEIGHTS}.actorder", "random", "actorder"),
        ("config_groups.group_0.input_activations", {"num_bits": 8, "type": "int"}, "input_activations"),
        ("config_groups.group_0.output_activations", {"num_bits": 8}, "output_activations"),
        ("config_groups.group_1", {"targets": ["re:.*o_proj"], "weights": {"num_bits": 8, "type": "float"}}, "not mixed"),
        ("config_groups.group_0.targets", [], "targets"),
        ("config_groups.group_0.targets", None, "targets"),
        ("config_groups.group_0.targets", "Linear", "targets"),
        ("ignore", ["re:("], "regular expression"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
        ("transform_config", {"config_groups": {"u": 1}}, "transform_config"),
        ("novelty", 1, "novelty"),
    ],
)
def test_what_is_not_supported_is_named(path: str, value: Any, named: str) -> None:
    """Sparse, rotated, mixed or otherwise rounded checkpoints are errors that name the key and the way out."""
    with pytest.raises(ModelConfigError) as error:
        found(changed(path, value))
    assert named in str(error.value)
    assert error.value.fix
