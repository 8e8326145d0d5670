from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from paddock.axes import EMBED, FFN, FP8_STATIC, FP8_TOKEN, PLAIN, VOCAB, Linear, Part
from paddock.errors import ModelConfigError
from paddock.plugins import CheckpointFacts
from paddock_quant_fp8.modelopt import ALGORITHMS, FILE, detect, detect_kv
from paddock_quant_fp8.schemes import BLOCK, ROW, TENSOR

DOWN = Linear("down", (Part("down", EMBED, 32, source="mlp.down_proj"),), Part("ffn", FFN, 48))
HEAD = Linear("lm_head", (Part("tokens", VOCAB, 99, source="lm_head"),), Part("embed", EMBED, 32))
DOWN_PATH = "model.layers.1.mlp.down_proj"
FP8: dict[str, Any] = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
GROUP = {"weights": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}
IN_CONFIG: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8", "config_groups": {"group_0": GROUP}}
KV_IN_CONFIG: dict[str, Any] = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
IN_CONFIG |= KV_IN_CONFIG | {"ignore": ["lm_head"]}


def facts(entry: dict[str, Any] | None = None, file: dict[str, Any] | None = None, **config: Any) -> CheckpointFacts:
    """Return what config.json and hf_quant_config.json say, each left out when it is None."""
    files = {} if file is None else {FILE: {"producer": {"name": "modelopt"}, "quantization": file}}
    raw = config if entry is None else {"quantization_config": entry} | config
    return CheckpointFacts(config=raw, dtype="bfloat16", files=files)


@pytest.mark.parametrize(
    ("algorithm", "stored"),
    [
        ("FP8", (TENSOR, FP8_STATIC, ["weight", "weight_scale", "input_scale"])),
        ("FP8_PER_CHANNEL_PER_TOKEN", (ROW, FP8_TOKEN, ["weight", "weight_scale"])),
        ("fp8_pb_wo", (BLOCK, PLAIN, ["weight", "weight_scale"])),
    ],
)
def test_each_algorithm_says_what_a_scale_covers_and_how_inputs_are_scaled(algorithm: str, stored: Any) -> None:
    """Names are those of quant_algo, in either case; from the file alone and from config.json alone."""
    for found in (detect(facts(file={"quant_algo": algorithm})), detect(facts(IN_CONFIG | {"quant_algo": algorithm}))):
        assert found is not None
        how = found.stored(DOWN_PATH, DOWN)
        assert how is not None
        assert (how.scales, how.input_format, [tensor.name for tensor in how.tensors]) == stored


def test_either_file_says_the_same_as_both() -> None:
    """KV and the list of plain modules are spelt differently in the two files."""
    both = detect(facts(IN_CONFIG, FP8))
    assert both is not None
    assert both == detect(facts(IN_CONFIG)) == detect(facts(file=FP8))
    assert (both.kv_cache_dtype, both.skipped) == ("fp8", ("lm_head",))
    assert both.tensors("lm_head", HEAD)[0].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("said", "quantised"),
    [
        ({"exclude_modules": []}, True),
        ({"exclude_modules": ["model.embed_tokens"]}, True),
        ({"exclude_modules": ["*lm_head*"]}, False),
        ({"exclude_modules": None}, False),
        ({}, False),
    ],
)
def test_a_list_without_the_head_means_that_it_is_quantised(said: dict[str, Any], quantised: bool) -> None:
    """In either file; where nothing lists what is plain, the head is, as the tool leaves it unasked."""
    in_config = {"ignore": said["exclude_modules"]} if said else {}
    for found in (
        detect(facts(file={"quant_algo": "FP8"} | said)),
        detect(facts({"quant_method": "modelopt", "quant_algo": "FP8"} | in_config)),
    ):
        assert found is not None
        assert [tensor.name for tensor in found.tensors("lm_head", HEAD)] == (
            ["weight", "weight_scale", "input_scale"] if quantised else ["weight"]
        )
        assert found.stored(DOWN_PATH, DOWN) is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_algo": None}, "config.json says quant_algo FP8; hf_quant_config.json says no quant_algo"),
        ({"quant_algo": "W4A16_AWQ"}, "config.json says quant_algo FP8; hf_quant_config.json says quant_algo W4A16_AWQ"),
        ({"kv_cache_quant_algo": None}, r"KV fp8, .*; hf_quant_config.json says .* KV plain"),
        ({"exclude_modules": ["lm_head", "x*"]}, r"plain modules lm_head; .* plain modules lm_head, x\*"),
    ],
)
def test_two_files_that_disagree_are_both_quoted(change: dict[str, Any], said: str) -> None:
    """Neither wins: the error says what each says."""
    with pytest.raises(ModelConfigError, match=said):
        detect(facts(IN_CONFIG, FP8 | change))


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "NVFP4", "MIXED_PRECISION", "W8A8_SQ_PER_CHANNEL"])
def test_other_algorithms_are_left_to_other_formats(algorithm: str) -> None:
    """What is no FP8 is not claimed, wherever it is said."""
    assert detect(facts(file={"quant_algo": algorithm})) is None
    assert detect(facts({"quant_method": "modelopt", "quant_algo": algorithm})) is None


def test_other_tools_are_not_claimed() -> None:
    """A config.json that names another tool wins over a file of ModelOpt's."""
    assert detect(facts({"quant_method": "fp8", "activation_scheme": "static"}, FP8)) is None
    assert detect(facts(file=FP8, compression_config={"config_groups": {}})) is None
    assert detect(facts()) is None


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"kv_cache_quant_algo": "INT8"}, r"hf_quant_config\.json: quantization\.kv_cache_quant_algo is 'INT8'"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float", "dynamic": False}}, "kv_cache_scheme"),
        ({"exclude_modules": "lm_head"}, "exclude_modules"),
        ({"svd_rank": 8}, "svd_rank"),
    ],
)
def test_what_is_not_supported_is_named(entry: dict[str, Any], named: str) -> None:
    """Unknown keys and KV caches in other than FP8 are errors, never guesses."""
    with pytest.raises(ModelConfigError, match=named):
        detect(facts(file={"quant_algo": "FP8"} | entry))


def test_the_user_may_let_a_key_pass() -> None:
    """By the name that the error gives, of either file; a module that is listed twice is listed."""
    twice = {"exclude_modules": ["lm_head", "lm_head"], "svd_rank": 8}
    both = evolve(
        facts(IN_CONFIG | {"novelty": 1}, FP8 | twice), ignored_keys=("quantization_config.novelty", "quantization.svd_rank")
    )
    assert detect(both) == detect(facts(IN_CONFIG))


def test_every_algorithm_declares_where_its_scales_lie() -> None:
    """The block-scaled one has 128 by 128; shapes for 200 outputs and 300 inputs follow."""
    shapes = {name: how.tensors[1].shape(200, 300) for name, how in ALGORITHMS.items()}
    assert shapes == {"FP8": (), "FP8_PER_CHANNEL_PER_TOKEN": (200, 1), "FP8_PB_WO": (2, 3)}


@pytest.mark.parametrize("said", [{"quant_algo": None}, {}, {"quant_algo": "NO_QUANT"}, {"quant_algo": "no_quant"}])
def test_fp8_kv_alone_leaves_every_linear_plain(said: dict[str, Any]) -> None:
    """However a file says that weights are not quantised; from the file, from config.json, from both."""
    beside = said | {"kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    entry = said | KV_IN_CONFIG | {"quant_method": "modelopt", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
    for described in (facts(file=beside), facts(entry), facts(entry, beside), facts(entry, beside | {"quant_algo": None})):
        found = detect_kv(described)
        assert detect(described) is None
        assert found is not None
        assert (found.name, found.kv_cache_dtype) == ("modelopt-kv", "fp8")
        assert found.stored(DOWN_PATH, DOWN) is None
        for path, linear in ((DOWN_PATH, DOWN), ("lm_head", HEAD)):
            assert [(tensor.name, tensor.dtype) for tensor in found.tensors(path, linear)] == [("weight", "bfloat16")]


@pytest.mark.parametrize(
    "described",
    [
        facts(file={"quant_algo": None, "kv_cache_quant_algo": None}),
        facts({"quant_method": "modelopt", "ignore": []}),
        facts({"quant_method": "modelopt", "config_groups": {"group_0": GROUP}} | KV_IN_CONFIG),
        facts({"quant_method": "compressed-tensors"} | KV_IN_CONFIG),
        facts({"quant_method": "fp8", "activation_scheme": "static"}, {"kv_cache_quant_algo": "FP8"}),
        facts(IN_CONFIG, FP8),
        facts(file={"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}),
        facts(file={"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "NVFP4"}),
        facts(),
    ],
)
def test_what_is_more_or_less_than_fp8_kv_is_not_claimed(described: CheckpointFacts) -> None:
    """Without KV, with groups of quantised modules, with an algorithm, of another tool, or without any description."""
    assert detect_kv(described) is None


@pytest.mark.parametrize(
    ("entry", "file", "named"),
    [
        (None, {"kv_cache_quant_algo": "NVFP4"}, r"hf_quant_config\.json: quantization\.kv_cache_quant_algo is 'NVFP4'"),
        (None, {"quant_algo": None, "kv_cache_quant_algo": ""}, "kv_cache_quant_algo is ''"),
        (None, {"kv_cache_quant_algo": "FP8", "quantized_layers": {"a": 1}}, "quantized_layers"),
        (None, {"kv_cache_quant_algo": "FP8", "exclude_modules": "lm_head"}, "exclude_modules"),
        ({"kv_cache_scheme": "NVFP4"}, None, r"config\.json: quantization_config\.kv_cache_scheme is 'NVFP4'"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}}, None, "kv_cache_scheme"),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, None, "kv_cache_scheme"),
        (KV_IN_CONFIG, {"quant_algo": None, "ignore": []}, "config.json says quant_algo none, KV fp8, .* KV plain"),
        (KV_IN_CONFIG, FP8, "config.json says no quant_algo; hf_quant_config.json says quant_algo FP8"),
    ],
)
def test_kv_alone_in_other_than_fp8_is_named(entry: dict[str, Any] | None, file: dict[str, Any] | None, named: str) -> None:
    """NVFP4 and scales found at run time are refused by name, and so are keys that say more and two files that disagree."""
    with pytest.raises(ModelConfigError, match=named):
        detect_kv(facts(None if entry is None else {"quant_method": "modelopt"} | entry, file))
