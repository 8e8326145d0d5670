"""The public tools read what `awq` writes: each test is skipped where its tool is not installed.

docs/decisions/0012-dependencies.md says how to install them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.quant_awq.tests.test_tools import module_alone
from safetensors.torch import load_file

from tests.quantize.int4 import decoded
from tests.quantize.made import random_falcon, random_llama, run, sequences, tensors_of, write_model
from tests.quantize.test_awq import GROUP, PATHS


@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize(("scheme", "zero_points"), [("w4a16", None), ("w4a16", False), ("w4a8", None), ("w4a8", False)])
def test_transformers_runs_it_by_compressed_tensors(tmp_path: Path, family: str, scheme: str, zero_points: bool | None) -> None:
    """It finds every tensor it wants and no other, and its decompressed weights are those the definition gives."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = write_model(tmp_path / "plain" / family, {"llama": random_llama, "falcon": random_falcon}[family]())
    run(source, tmp_path / "out", "awq", format="compressed-tensors", scheme=scheme, zero_points=zero_points)
    loading: Any = AutoModelForCausalLM.from_pretrained
    loaded, report = loading(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state = loaded.state_dict()
    for name, tensor in decoded(tensors_of(tmp_path / "out"), "compressed-tensors").items():
        torch.testing.assert_close(state[name].float(), tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scheme", "zero_points", "preset"), [("w4a16", None, "W4A16_ASYM"), ("w4a16", False, "W4A16"), ("w4a8", False, "W4AFP8")]
)
def test_compressed_tensors_knows_its_presets(
    llama: Path, tmp_path: Path, scheme: str, zero_points: bool | None, preset: str
) -> None:
    """Its own classes accept the description, and it is their preset but for the group size."""
    library = pytest.importorskip("compressed_tensors.quantization")
    run(llama, tmp_path / "out", "awq", scheme=scheme, zero_points=zero_points)
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    (ours,) = library.QuantizationConfig.model_validate(section).config_groups.values()
    theirs = library.preset_name_to_scheme(preset, ["Linear"])
    keys = ("num_bits", "type", "strategy", "dynamic", "symmetric")
    assert ours.format == "pack-quantized"
    assert ours.weights.group_size == GROUP
    for side in ("weights", "input_activations"):
        mine, their = getattr(ours, side), getattr(theirs, side)
        assert (mine is None) == (their is None)
        if mine is not None:
            assert [getattr(mine, key) for key in keys] == [getattr(their, key) for key in keys]


def test_autoawq_unpacks_the_same_weights(llama: Path, tmp_path: Path) -> None:
    """Its own unpacking and dequantisation of every linear."""
    packing = module_alone("awq", "utils", "packing_utils.py")
    run(llama, tmp_path / "out", "awq", format="autoawq")
    found = tensors_of(tmp_path / "out")
    plain = decoded(found, "autoawq")
    for path in PATHS:
        scales = found[f"{path}.scales"].float()
        theirs_IO = packing.dequantize_gemm(found[f"{path}.qweight"], found[f"{path}.qzeros"], scales, 4, GROUP)
        assert torch.equal(theirs_IO.T, plain[f"{path}.weight"]), path


def test_modelopt_packs_the_same_bytes_and_says_the_same(llama: Path, tmp_path: Path) -> None:
    """Its packing of the numbers we stand for is ours, and hf_quant_config.json means to it what our config.json says."""
    quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")
    convert = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    for scheme, algorithm in (("w4a16", "W4A16_AWQ"), ("w4a8", "W4A8_AWQ")):
        out = tmp_path / scheme
        run(llama, out, "awq", format="modelopt", scheme=scheme)
        found = tensors_of(out)
        plain = decoded({name: tensor for name, tensor in found.items() if "pre_quant" not in name}, "modelopt")
        for path in PATHS:
            theirs = quant_utils.pack_int4_in_uint8(plain[f"{path}.weight"], found[f"{path}.weight_scale"], GROUP)
            assert torch.equal(theirs, found[f"{path}.weight"]), path
        file = json.loads((out / "hf_quant_config.json").read_text())
        theirs = convert.convert_hf_quant_config_format(copy.deepcopy(file))
        ours = json.loads((out / "config.json").read_text())["quantization_config"]
        assert theirs["quant_algo"] == ours["quant_algo"] == algorithm
        assert {key: theirs[key] for key in ("quant_method", "ignore")} == {key: ours[key] for key in ("quant_method", "ignore")}


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_modelopt_itself_exports_tensors_of_the_same_names_and_kinds(llama: Path, tmp_path: Path, scheme: str) -> None:
    """Its own AWQ, calibrated on the same sequences: the same tensors, dtypes, shapes and description, whatever the numbers."""
    quantization = pytest.importorskip("modelopt.torch.quantization")
    export = pytest.importorskip("modelopt.torch.export")
    name = {"w4a16": "INT4_AWQ_CFG", "w4a8": "W4A8_AWQ_BETA_CFG"}[scheme]
    model = random_llama()
    model.config.architectures = ["LlamaForCausalLM"]
    quantization.quantize(model, _with_group(copy.deepcopy(getattr(quantization, name))), lambda m: m(sequences()))
    with torch.inference_mode():
        export.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    run(llama, tmp_path / "ours", "awq", format="modelopt", scheme=scheme)
    theirs, ours = load_file(tmp_path / "theirs/model.safetensors"), tensors_of(tmp_path / "ours")
    kinds = [{name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in side.items()} for side in (ours, theirs)]
    assert kinds[0] == kinds[1]
    older = [json.loads((tmp_path / side / "hf_quant_config.json").read_text())["quantization"] for side in ("ours", "theirs")]
    older[1]["exclude_modules"].remove("model.embed_tokens")  # no linear, so nothing to exclude
    assert older[0] == older[1]


def _with_group(value: Any) -> Any:
    """Return a configuration whose blocks of 128 along the inputs are of the tests' size."""
    if isinstance(value, dict):
        return {key: GROUP if key == -1 and each == 128 else _with_group(each) for key, each in value.items()}
    return [_with_group(each) for each in value] if isinstance(value, list) else value
