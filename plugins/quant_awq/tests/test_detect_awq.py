from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from attrs import evolve

from paddock.axes import EMBED, FFN, VOCAB, Linear, Part
from paddock.errors import ModelConfigError, PlanError
from paddock.plugins import CheckpointFacts
from paddock_quant_awq.autoawq import detect
from paddock_quant_awq.plugin import paddock_quantizations
from paddock_quant_awq.scheme import AWQ_GEMM, Int4Scheme

EMB = Part("embed", EMBED, 256)
GATE_UP = Linear("gate_up", (Part("gate", FFN, 48, source="mlp.gate_proj"), Part("up", FFN, 48, source="mlp.up_proj")), EMB)
HEAD = Linear("lm_head", (Part("tokens", VOCAB, 99, source="lm_head"),), EMB)
PATH = "model.layers.0.mlp.gate_proj"


def found(**entry: Any) -> Int4Scheme | None:
    """Return what is detected in a config.json with this quantisation entry."""
    return detect(CheckpointFacts(config={"quantization_config": entry}, dtype="bfloat16"))


def shapes(scheme: Int4Scheme | None, linear: Linear = GATE_UP, path: str = PATH) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of what holds a linear, by name."""
    assert scheme is not None
    tensors = scheme.tensors(path, linear)
    return {tensor.name: (tensor.dtype, tensor.shape(linear.out_size, linear.in_size)) for tensor in tensors}


@pytest.mark.parametrize(("group", "groups"), [(128, 2), (64, 4), (32, 8), (-1, 1)])
def test_a_gemm_checkpoint_stores_words_zero_points_and_scales(group: int, groups: int) -> None:
    """Three tensors: qweight [in, out / 8], qzeros [groups, out / 8] and scales [groups, out], whatever the group size."""
    scheme = found(quant_method="awq", bits=4, group_size=group, zero_point=True, version="gemm", modules_to_not_convert=None)
    assert shapes(scheme) == {
        "qweight": ("int32", (256, 12)),
        "qzeros": ("int32", (groups, 12)),
        "scales": ("float16", (groups, 96)),
    }


def test_the_old_file_means_the_same() -> None:
    """`quant_config.json` with w_bit and q_group_size beside a config.json that says nothing."""
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    scheme = detect(CheckpointFacts(config={}, files={"quant_config.json": old}, dtype="bfloat16"))
    assert scheme == found(quant_method="awq", bits=4, group_size=64, zero_point=True, version="gemm")
    assert scheme == found(quant_method="awq", w_bit=4, q_group_size=64, zero_point=True, version="GEMM")


def test_config_json_goes_before_the_old_file() -> None:
    """A checkpoint whose config.json names another method is not AWQ, whatever file lies beside it."""
    files = {"quant_config.json": {"w_bit": 4, "q_group_size": 64}}
    assert detect(CheckpointFacts(config={"quantization_config": {"quant_method": "fp8"}}, files=files, dtype="float16")) is None
    assert detect(CheckpointFacts(config={"compression_config": {}}, files=files, dtype="float16")) is None
    assert detect(CheckpointFacts(config={}, files={"quant_config.json": {"quant_algo": "x"}}, dtype="float16")) is None
    assert detect(CheckpointFacts(config={}, dtype="float16")) is None


@pytest.mark.parametrize(
    ("entry", "plain"), [("gate_proj", False), ("mlp", True), ("layers.0", True), ("_proj", True), ("self_attn", False)]
)
def test_a_skipped_name_is_any_piece_of_the_path(entry: str, plain: bool) -> None:
    """`modules_to_not_convert` matches anywhere in the path; where it splits what runs as one product it is an error."""
    scheme = found(quant_method="awq", modules_to_not_convert=[entry])
    if entry == "gate_proj":
        with pytest.raises(PlanError, match=r"leaves model\.layers\.0\.mlp\.gate_proj plain"):
            shapes(scheme)
    else:
        assert ("weight" in shapes(scheme)) is plain


def test_the_head_is_never_quantised() -> None:
    """AutoAWQ leaves the vocabulary projection plain; 99 rows would not pack into words either."""
    assert shapes(found(quant_method="awq"), HEAD, "lm_head") == {"weight": ("bfloat16", (99, 256))}


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", "exllama", "ipex"])
def test_other_layouts_are_refused_by_name(version: str) -> None:
    """Layouts that hold the same numbers in another order are errors that say which layout to use."""
    with pytest.raises(ModelConfigError, match=version) as error:
        found(quant_method="awq", version=version)
    assert "GEMM" in error.value.fix
    with pytest.raises(ModelConfigError, match="llm-awq"):
        found(quant_method="awq", version="gemm", backend="llm-awq")


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"bits": 3}, "bits"),
        ({"w_bit": 8}, "w_bit"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 128, "q_group_size": 64}, "q_group_size"),
        ({"zero_point": 0}, "zero_point"),
        ({"desc_act": True}, "desc_act"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"rotation": 1}, "rotation"),
    ],
)
def test_what_is_not_supported_is_named(entry: dict[str, Any], named: str) -> None:
    """Other widths, missing zero points, contradictions and unknown keys are errors, never guesses."""
    with pytest.raises(ModelConfigError, match=named):
        found(quant_method="awq", **entry)


def test_what_transformers_writes_is_read() -> None:
    """Every key of transformers' own AwqConfig passes."""
    import json

    from transformers import AwqConfig

    assert found(**json.loads(json.dumps(AwqConfig().to_dict()))) == found(quant_method="awq")


def test_what_gptqmodel_writes_is_read() -> None:
    """It names the layout thrice, and GPTQ's own keys beside it; each of the three may say what is refused."""
    entry = {"quant_method": "awq", "method": "awq", "bits": 4, "group_size": 128, "desc_act": False, "lm_head": False}
    entry |= {"version": "gemm", "format": "gemm", "checkpoint_format": "gemm", "pack_dtype": "int32", "zero_point": True}
    entry |= {"meta": {"quantizer": ["gptqmodel:5.0.0"]}, "pack_impl": "cpu", "dynamic": None}
    assert found(**entry) == found(quant_method="awq")
    for key in ("version", "format", "checkpoint_format"):
        with pytest.raises(ModelConfigError, match="in layout 'gemv_fast'"):
            found(**entry | {key: "gemv_fast"})
    changes: list[tuple[str, Any]] = [("lm_head", True), ("pack_dtype", "int16"), ("dynamic", {"-:.*down_proj": {}})]
    for key, value in changes:
        with pytest.raises(ModelConfigError, match=key):
            found(**entry | {key: value})


def test_groups_and_words_must_be_whole() -> None:
    """4544 inputs do not divide into groups of 128, nor 44 outputs into words: both are errors with the numbers."""
    falcon = Linear("dense", (Part("dense", EMBED, 4544, source="dense"),), Part("attended", EMBED, 4544))
    scheme = Int4Scheme(name="awq", packing=AWQ_GEMM, dtype="float16", group_size=128)
    with pytest.raises(PlanError, match="4544 inputs") as error:
        scheme.tensors("dense", falcon)
    assert "as 64 does" in error.value.fix
    assert evolve(scheme, group_size=64).tensors("dense", falcon)
    odd = Linear("odd", (Part("odd", EMBED, 44, source="odd"), Part("even", EMBED, 48, source="even")), EMB)
    with pytest.raises(PlanError, match="'odd' has 44 outputs") as error:
        evolve(scheme, group_size=64).tensors("odd", odd)
    assert "ranks" not in error.value.fix  # the whole linear's outputs do not fill its words


def test_the_descriptors_light_references_import_no_torch() -> None:
    """Planning detects the formats in a process that has not imported torch."""
    lines = ["import sys", "from paddock.plugins import CheckpointFacts, resolve"]
    facts = "CheckpointFacts(config={'quantization_config': {'quant_method': 'awq'}}, dtype='float16')"
    lines += [f"resolve({spec.detect!r})({facts})" for spec in paddock_quantizations()] + ["assert 'torch' not in sys.modules"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_zero_points_are_stored_whatever_the_description_says() -> None:
    """AutoRound writes `zero_point` false where every one is 8, and scales of either sign."""
    plain, symmetric = found(quant_method="awq"), found(quant_method="awq", zero_point=False)
    assert shapes(symmetric) == shapes(plain)
    assert plain is not None
    assert symmetric == evolve(plain, signed_scales=True)
    assert found(quant_method="awq", autoround_version="0.4.5") == symmetric


def test_an_empty_entry_leaves_the_word_to_the_old_file() -> None:
    """It says nothing, as an absent one."""
    files = {"quant_config.json": {"w_bit": 4, "q_group_size": 64}}
    scheme = detect(CheckpointFacts(config={"quantization_config": {}}, files=files, dtype="bfloat16"))
    assert scheme == found(quant_method="awq", group_size=64)


def test_the_user_may_let_a_key_pass() -> None:
    """By the name that the error gives, in config.json and in the old file."""
    entry = {"quant_method": "awq", "novelty": 1}
    passed = ("quantization_config.novelty", "novelty")
    facts = CheckpointFacts(config={"quantization_config": entry}, dtype="bfloat16", ignored_keys=passed)
    old = CheckpointFacts(config={}, files={"quant_config.json": entry | {"bits": 4}}, dtype="bfloat16")
    assert detect(facts) == detect(evolve(old, ignored_keys=passed)) == found(quant_method="awq")
    with pytest.raises(ModelConfigError, match=r"quant_config\.json holds 1 .*novelty = 1"):
        detect(old)
