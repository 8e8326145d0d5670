"""What config.json and its neighbours say, by the formats' words, and by the libraries that define them where installed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.quantize.made import LAYERS, LINEARS, dequantised, random_llama, run, sequences, tensors_of


def described(folder: Path, file: str = "config.json") -> Any:
    """Return a JSON file of a folder."""
    return json.loads((folder / file).read_text())


@pytest.mark.parametrize("kv", [None, "fp8"])
def test_fp8_static_is_described_as_modelopt_does(llama: Path, tmp_path: Path, kv: str | None) -> None:
    """In both files."""
    run(llama, tmp_path / "out", "fp8-static", kv_cache_dtype=kv)
    newer, older = described(tmp_path / "out")["quantization_config"], described(tmp_path / "out", "hf_quant_config.json")
    eight = {"dynamic": False, "num_bits": 8, "type": "float"}
    assert (newer["quant_method"], newer["quant_algo"], newer["ignore"]) == ("modelopt", "FP8", ["lm_head"])
    assert newer["config_groups"] == {"group_0": {"input_activations": eight, "weights": eight, "targets": ["Linear"]}}
    assert newer.get("kv_cache_scheme") == (eight if kv else None)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8" if kv else None, "exclude_modules": ["lm_head"]}
    assert older["quantization"] == quantization
    assert older["producer"]["name"] == newer["producer"]["name"] == "modelopt"


def test_fp8_official_lists_every_plain_linear(llama: Path, tmp_path: Path) -> None:
    """By full path: all of the first and the last layer, attention between them, the head."""
    run(llama, tmp_path / "out", "fp8-official")
    description = described(tmp_path / "out")["quantization_config"]
    plain = {f"model.layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS if i in (0, LAYERS - 1) or "attn" in name}
    assert description.pop("modules_to_not_convert") == [*sorted(plain, key=_order), "lm_head"]
    assert description == {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def _order(path: str) -> tuple[int, int]:
    _, _, layer, linear = path.split(".", 3)
    return int(layer), LINEARS.index(linear)


@pytest.mark.parametrize("kv", [None, "fp8"])
def test_fp8_dynamic_is_described_as_the_preset_of_compressed_tensors(llama: Path, tmp_path: Path, kv: str | None) -> None:
    """Channel weights, token activations at run time."""
    run(llama, tmp_path / "out", "fp8-dynamic", kv_cache_dtype=kv)
    description = described(tmp_path / "out")["quantization_config"]
    assert (description["quant_method"], description["format"]) == ("compressed-tensors", "float-quantized")
    assert (description["ignore"], description["quantization_status"]) == (["lm_head"], "compressed")
    (group,) = description["config_groups"].values()
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {**eight, "strategy": "channel", "dynamic": False}
    assert group["input_activations"] == {**eight, "strategy": "token", "dynamic": True}
    assert description["kv_cache_scheme"] == ({**eight, "strategy": "tensor", "dynamic": False} if kv else None)


def test_compressed_tensors_reads_its_description(llama: Path, tmp_path: Path) -> None:
    """Its own classes accept it, and it is their preset FP8_DYNAMIC."""
    library = pytest.importorskip("compressed_tensors.quantization")
    run(llama, tmp_path / "out", "fp8-dynamic", kv_cache_dtype="fp8")
    parsed = library.QuantizationConfig.model_validate(described(tmp_path / "out")["quantization_config"])
    preset = library.preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    (group,) = parsed.config_groups.values()
    for side in ("weights", "input_activations"):
        ours, theirs = getattr(group, side), getattr(preset, side)
        assert [getattr(ours, key) for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")] == [
            getattr(theirs, key) for key in ("num_bits", "type", "strategy", "dynamic", "symmetric")
        ]
    assert parsed.kv_cache_scheme.strategy == "tensor"


def test_transformers_runs_fp8_dynamic_by_compressed_tensors(llama: Path, tmp_path: Path) -> None:
    """It finds every tensor it wants and no other, and its decompressed weights are those the definition gives."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    run(llama, tmp_path / "out", "fp8-dynamic")
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
    for name, tensor in dequantised(tensors_of(tmp_path / "out")).items():
        torch.testing.assert_close(state[name].float(), tensor, rtol=1e-6, atol=0)


def test_transformers_wants_the_tensors_that_fp8_official_writes(llama: Path, tmp_path: Path) -> None:
    """Its own config reads the description; the modules it multiplies by hold those names, shapes and types.

    What runs them is FBGEMM's, on a GPU, and left out.
    """
    integration = pytest.importorskip("transformers.integrations.fbgemm_fp8")
    from transformers.quantizers.auto import AutoQuantizationConfig

    run(llama, tmp_path / "out", "fp8-official")
    description = described(tmp_path / "out")["quantization_config"]
    config = AutoQuantizationConfig.from_dict(dict(description))
    assert (type(config).__name__, config.activation_scale_ub) == ("FbgemmFp8Config", 1200.0)
    written, quantised = tensors_of(tmp_path / "out"), 0
    for path, module in random_llama().named_modules():
        if isinstance(module, torch.nn.Linear):
            held = {name.removeprefix(f"{path}."): each for name, each in written.items() if name.startswith(f"{path}.")}
            plain = path in config.modules_to_not_convert
            wanted = module if plain else integration.FbgemmFp8Linear(module.in_features, module.out_features, bias=False)
            kinds = (
                {name: (each.dtype, each.shape) for name, each in tensors.items()} for tensors in (wanted.state_dict(), held)
            )
            assert len({str(each) for each in kinds}) == 1, path
            quantised += not plain
    assert quantised == 3 * (LAYERS - 2)


def test_modelopt_itself_writes_the_same_checkpoint(llama: Path, tmp_path: Path) -> None:
    """Calibrated on the same sequences its exporter writes the same tensors, bit for bit, and the same description."""
    quantization = pytest.importorskip("modelopt.torch.quantization")
    export = pytest.importorskip("modelopt.torch.export")
    combined = quantization.utils.update_quant_cfg_with_kv_cache_quant(
        copy.deepcopy(quantization.FP8_DEFAULT_CFG), quantization.FP8_KV_CFG["quant_cfg"]
    )
    model = random_llama()
    model.config.architectures = ["LlamaForCausalLM"]
    quantization.quantize(model, combined, lambda m: m(sequences()))
    with torch.inference_mode():
        export.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    run(llama, tmp_path / "ours", "fp8-static", kv_cache_dtype="fp8")
    theirs, ours = load_file(tmp_path / "theirs/model.safetensors"), tensors_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        if name.endswith(("input_scale", "k_scale", "v_scale")):  # sums in another order
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=0)
        else:
            assert torch.equal(tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)), name
    for key in ("quant_method", "quant_algo", "config_groups", "kv_cache_scheme"):
        descriptions = (described(tmp_path / side)["quantization_config"] for side in ("ours", "theirs"))
        assert len({json.dumps(each[key], sort_keys=True) for each in descriptions}) == 1
