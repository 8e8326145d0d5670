"""ModelOpt checkpoints with FP8 keys and values and plain weights: served as the plain model with FP8 KV and their scales."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paddock.errors import CheckpointError, ModelConfigError
from paddock.planning.rebuild import scheme
from paddock.planning.serial import from_json, to_json
from paddock_quant_fp8.schemes import ModelOptKv
from tests.zoo.test_fp8_plans import TOKENS, on_gpus, plain_folder
from tests.zoo.test_published_fp8 import built, logits, planned, rewrite

IN_CONFIG: dict[str, Any] = {"quant_method": "modelopt", "producer": {"name": "modelopt"}, "ignore": []}
IN_CONFIG |= {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
BESIDE: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
SPELLINGS = {"config.json": (IN_CONFIG, None), "hf_quant_config.json": (None, BESIDE), "both": (IN_CONFIG, BESIDE)}


def folders(parent: Path, scale: float | None = 0.004) -> tuple[Path, Path]:
    """Write a plain Llama with KV scales, or without; return its folder and that of a copy, which tests describe."""
    plain, alone = parent / "plain", parent / "alone"
    for folder in (plain, alone):
        folder.mkdir()
        tensors = plain_folder(folder)
        if scale is not None:
            for i in range(2):
                tensors[f"model.layers.{i}.self_attn.k_proj.k_scale"] = torch.tensor(scale * (i + 1))
                tensors[f"model.layers.{i}.self_attn.v_proj.v_scale"] = torch.tensor(scale * (i + 2))
        save_file(tensors, folder / "model.safetensors")
    return plain, alone


def describe(folder: Path, entry: dict[str, Any] | None, file: dict[str, Any] | None) -> None:
    """Write what config.json and hf_quant_config.json say of the quantisation, each left out when it is None."""
    rewrite(folder, quantization_config=entry)
    if file is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": file}))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_is_the_plain_model_with_fp8_kv_and_the_checkpoints_scales(tmp_path: Path, spelling: str) -> None:
    """Unasked: the logits of the plain folder asked for FP8 KV, to the last bit, and others than with scales of 1."""
    plain, alone = folders(tmp_path)
    describe(alone, *SPELLINGS[spelling])
    plan, as_asked = planned(alone), planned(plain, kv_cache_dtype="fp8")
    assert (plan.choice("quantization").value, plan.kv_cache_dtype, plan.issues) == ("modelopt-kv", "fp8", ())
    assert plan.choice("kv_cache_dtype").reason == "the checkpoint was calibrated for it"
    assert (plan.ledger.weights, plan.ledger.page_bytes) == (as_asked.ledger.weights, as_asked.ledger.page_bytes)
    assert scheme(from_json(to_json(plan))) == ModelOptKv(dtype="float32")
    seen = logits(built(plan, alone), TOKENS)
    assert torch.equal(seen, logits(built(as_asked, plain), TOKENS))
    stored = load_file(alone / "model.safetensors")
    save_file({name: torch.ones(()) if name.endswith("_scale") else x for name, x in stored.items()}, alone / "model.safetensors")
    assert not torch.equal(seen, logits(built(plan, alone), TOKENS))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_kv_in_another_dtype_is_what_was_asked_for(tmp_path: Path, spelling: str) -> None:
    """The scales then stay unread, as those of every FP8 checkpoint do."""
    plain, alone = folders(tmp_path)
    describe(alone, *SPELLINGS[spelling])
    plan = planned(alone, kv_cache_dtype="float32")
    assert (plan.kv_cache_dtype, plan.issues) == ("float32", ())
    assert torch.equal(logits(built(plan, alone), TOKENS), logits(built(planned(plain), plain), TOKENS))


def test_missing_scales_are_a_warning_and_an_error_when_strict(tmp_path: Path) -> None:
    """They count as 1: the description announces what the weights do not hold."""
    _, alone = folders(tmp_path, scale=None)
    describe(alone, IN_CONFIG, BESIDE)
    (warning,) = planned(alone).issues
    assert (warning.level, warning.code) == ("warning", "kv_scales_are_one")
    assert warning.message.startswith("the description of the checkpoint announces FP8 KV, but it holds no scales")
    assert [issue.code for issue in planned(alone, strict=True).errors] == ["kv_scales_are_one"]
    assert torch.isfinite(logits(built(planned(alone), alone), TOKENS)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_scales_that_are_all_1_are_a_warning_and_an_error_when_strict(tmp_path: Path, dtype: torch.dtype) -> None:
    """Tools write them that calibrate none; where one is another number, somebody did."""
    _, alone = folders(tmp_path)
    describe(alone, IN_CONFIG, None)
    stored = load_file(alone / "model.safetensors")
    ones = {name: torch.ones((), dtype=dtype) if name.endswith("_scale") else each for name, each in stored.items()}
    save_file(ones, alone / "model.safetensors")
    (warning,) = planned(alone).issues
    assert (warning.level, warning.code) == ("warning", "kv_scales_are_one")
    assert warning.message.startswith("all 4 scales of FP8 keys and values that the checkpoint holds are 1")
    assert [issue.code for issue in planned(alone, strict=True).errors] == ["kv_scales_are_one"]
    one = torch.tensor([0.5], dtype=dtype)
    save_file(ones | {"model.layers.1.self_attn.v_proj.v_scale": one}, alone / "model.safetensors")
    assert not planned(alone, strict=True).issues


@pytest.mark.parametrize(("copy", "read"), [(0.004, True), (0.00401, True), (0.008, False)])
def test_copies_of_a_scale_that_contradict_each_other_are_an_error(tmp_path: Path, copy: float, read: bool) -> None:
    """Under another name of the same scale; with both numbers, and no error where keys and values are not kept in FP8."""
    _, alone = folders(tmp_path)
    describe(alone, IN_CONFIG, None)
    stored = load_file(alone / "model.safetensors")
    copies = {f"model.layers.0.self_attn.{name}": torch.tensor(copy) for name in ("k_scale", "k_proj.output_scale")}
    save_file(stored | copies, alone / "model.safetensors")
    errors = planned(alone).errors
    assert [error.code for error in errors] == ([] if read else ["kv_scales_contradict"])
    for error in errors:
        assert (
            "model.layers.0.self_attn.k_proj.k_scale is 0.004 and model.layers.0.self_attn.k_proj.output_scale" in error.message
        )
        assert "model.layers.0.self_attn.k_scale is 0.008" in error.message
        assert "kv_cache_dtype" in error.fix
    assert not planned(alone, kv_cache_dtype="float32").errors


def test_one_scale_for_both_is_no_copy_of_either(tmp_path: Path) -> None:
    """`kv_scale` beside scales of keys and of values is neither's, and stays unread."""
    _, alone = folders(tmp_path)
    describe(alone, IN_CONFIG, None)
    before = logits(built(planned(alone), alone), TOKENS)
    stored = load_file(alone / "model.safetensors")
    save_file(stored | {"model.layers.1.self_attn.kv_scale": torch.tensor(0.012)}, alone / "model.safetensors")
    assert not planned(alone).issues
    assert torch.equal(logits(built(planned(alone), alone), TOKENS), before)


def test_all_contradictions_are_listed_in_order(tmp_path: Path) -> None:
    """Each with its copies; the order is that of names, whatever the file's."""
    _, alone = folders(tmp_path)
    describe(alone, IN_CONFIG, None)
    stored = load_file(alone / "model.safetensors")
    copies = {f"model.layers.{i}.self_attn.attn.{kind}_scale": torch.tensor(0.5) for i in (1, 0) for kind in "vk"}
    save_file(stored | copies, alone / "model.safetensors")
    (error,) = planned(alone).errors
    first, *cases = error.message.split("\n    ")
    assert first.endswith("contradict each other:")
    assert cases[0] == "model.layers.0.self_attn.attn.k_scale is 0.5 and model.layers.0.self_attn.k_proj.k_scale is 0.004"
    assert [case.split()[0] for case in cases] == sorted(copies)


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e5, float("nan")])
def test_scales_that_cannot_be_are_refused(tmp_path: Path, bad: float) -> None:
    """By the name of the layer, as of every checkpoint."""
    _, alone = folders(tmp_path, scale=bad)
    describe(alone, None, BESIDE)
    with pytest.raises(CheckpointError, match=r"the k scale of model\.layers\.0\.self_attn is"):
        built(planned(alone), alone)


def test_quantised_weights_that_nobody_announced_are_said_by_the_plan(tmp_path: Path) -> None:
    """The description means plain weights; scales of weights beside them are an error of the plan."""
    _, alone = folders(tmp_path)
    describe(alone, IN_CONFIG, None)
    name = "model.layers.0.mlp.down_proj.weight_scale"
    save_file(load_file(alone / "model.safetensors") | {name: torch.ones(())}, alone / "model.safetensors")
    (issue,) = planned(alone).errors
    assert issue.code == "checkpoint_disagrees"
    assert "down_proj: config.json means weight; the checkpoint holds weight, weight_scale" in issue.message


def test_nvfp4_keys_and_values_are_refused_by_name(tmp_path: Path) -> None:
    """In either file."""
    _, alone = folders(tmp_path)
    for entry, file, said in (
        (IN_CONFIG | {"kv_cache_scheme": "NVFP4"}, None, "quantization_config.kv_cache_scheme is 'NVFP4'"),
        (None, {"quant_algo": None, "kv_cache_quant_algo": "NVFP4"}, "quantization.kv_cache_quant_algo is 'NVFP4'"),
    ):
        describe(alone, entry, file)
        with pytest.raises(ModelConfigError, match=re.escape(said)):
            planned(alone)


def test_a_gpu_without_fp8_products_serves_it(tmp_path: Path) -> None:
    """Nothing is multiplied in FP8, so no compute capability is asked for; FP8 pages are the backend's matter."""
    _, alone = folders(tmp_path)
    describe(alone, None, BESIDE)
    plan = on_gpus(alone, (8, 0))
    assert (plan.scheme, plan.kv_cache_dtype, plan.errors) == ("modelopt-kv", "fp8", ())
