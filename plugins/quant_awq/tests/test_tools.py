"""The public tools' own tensors and their own dequantised weights: each test is skipped where its tool is not installed.

`make tools` installs them: docs/decisions/0012-dependencies.md.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.quant_awq.tests.made import linear, made, named, scheme_of, weight
from plugins.quant_awq.tests.written import FORMATS, rounded
from torch import Tensor

from paddock.layers import LinearLayer, reference
from paddock.testing.oracle import UNIT_ROUNDOFF, bound, relative_rms

OUTS, INS, GROUP = 64, 256, 64
PRESETS = {
    "W4A16": {"symmetric": True},
    "W4A16_ASYM": {"symmetric": False},
    "W4AFP8": {"symmetric": True},
}


def agrees(layer: LinearLayer, theirs_OI: Tensor) -> None:
    """Check that a layer's weight is the tool's to the last bit, and that its product is within the oracle's bound."""
    assert torch.equal(layer.method.dequantise(layer), theirs_OI.float())
    x_TI = torch.randn(7, layer.linear.in_size, generator=torch.Generator().manual_seed(1))
    seen_TI = x_TI.double()
    if layer.method.input_format != "plain":
        xq = reference.quantize_fp8_token(x_TI)
        seen_TI = xq.values_TI.double() * xq.scale.double()
    assert relative_rms(layer(x_TI), seen_TI @ theirs_OI.double().T) <= bound("linear", torch.float32)


def module_alone(package: str, *path: str) -> Any:
    """Return one file of a package as a module, without what importing the package would import."""
    pytest.importorskip(package) if package not in _NOT_IMPORTED else None
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    file = Path(next(iter(spec.submodule_search_locations)), *path)
    found = importlib.util.spec_from_file_location(f"{package}_alone", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


_NOT_IMPORTED = frozenset({"awq"})  # imports models and kernels that nothing here needs


@pytest.mark.parametrize("format_", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channel", [False, True])
def test_compressed_tensors_agrees(preset: str, format_: str, channel: bool) -> None:
    """Its compressor's tensors, read by the configuration it serialises, mean what its decompressor gives."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quant_scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    scheme = quant_scheme.preset_name_to_scheme(preset, ["Linear"])
    strategy = {"strategy": "channel", "group_size": None} if channel else {"strategy": "group", "group_size": GROUP}
    scheme.weights = quantization.QuantizationArgs(num_bits=4, type="int", dynamic=False, **strategy, **PRESETS[preset])
    scheme.format = format_
    r = rounded(weight(OUTS, INS), -1 if channel else GROUP, symmetric=scheme.weights.symmetric, dtype=torch.bfloat16)
    state = {"weight": r.meaning, "weight_scale": r.scales_OG}
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = r.zeros_OG.to(torch.int8)
    compressor = compressors.BaseCompressor.load_from_registry(format_)
    stored = {key: value for key, value in compressor.compress(dict(state), scheme).items() if value is not None}
    theirs_OI = compressor.decompress(dict(stored), scheme)["weight"]
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=format_)
    entry = json.loads(config.model_dump_json())
    ours = scheme_of(entry | {"quant_method": "compressed-tensors"}, torch_dtype="bfloat16")
    assert ours.fp8_inputs == (preset == "W4AFP8")
    layer = made(ours, linear(OUTS, INS), named(stored))
    assert relative_rms(layer.method.dequantise(layer), theirs_OI.float()) < 2**-8  # theirs is rounded to the scales' dtype
    agrees(layer, r.meaning)


def test_autoawq_agrees() -> None:
    """Its own unpacking and dequantisation of gemm tensors."""
    packing = module_alone("awq", "utils", "packing_utils.py")
    stored, _ = FORMATS["awq"].store(weight(OUTS, INS), GROUP)
    single = stored["scales"].float()
    theirs_IO = packing.dequantize_gemm(stored["qweight"], stored["qzeros"], single, 4, GROUP)
    agrees(made(scheme_of(FORMATS["awq"].entry(GROUP)), linear(OUTS, INS), named(stored)), theirs_IO.T)


@pytest.mark.parametrize("zeros", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("module", ["qlinear_torch_zp", "qlinear_torch"])
def test_auto_round_agrees(module: str, zeros: str) -> None:
    """Its packing of GPTQ's layout, zero points less one and as they are, and its own product."""
    qlinear = pytest.importorskip(f"auto_round_extension.torch.{module}")
    r = rounded(weight(OUTS, INS), GROUP, symmetric=zeros == "symmetric")
    zeros_OG = (r.zeros_OG + 8).clamp(min=1)
    codes_OI = r.numbers_OI + 8
    size = INS // r.scales_OG.shape[1]
    spread = [x.float().repeat_interleave(size, dim=1) for x in (zeros_OG, r.scales_OG)]
    meaning_OI = (codes_OI.float() - spread[0]) * spread[1]
    theirs = qlinear.QuantLinear(4, GROUP, INS, OUTS, bias=False)
    theirs.device = torch.device("cpu")
    plain = torch.nn.Linear(INS, OUTS, bias=False)
    plain.weight.data = meaning_OI
    theirs.pack(plain, r.scales_OG, zeros_OG, None, device="cpu")
    stored = {name: getattr(theirs, name).detach().cpu() for name in ("qweight", "qzeros", "scales")}
    packing = "auto_round:auto_gptq" if module == "qlinear_torch_zp" else "auto_round:gptqmodel"
    entry = FORMATS["auto-round-gptq"].entry(GROUP) | {"packing_format": packing, "sym": zeros == "symmetric"}
    layer = made(scheme_of(entry), linear(OUTS, INS), named(stored))
    agrees(layer, meaning_OI)
    theirs.dequant_dtype = torch.int16
    x_TI = torch.randn(5, INS, generator=torch.Generator().manual_seed(2))
    assert relative_rms(layer(x_TI), theirs(x_TI)) < UNIT_ROUNDOFF[torch.float16]  # theirs makes the weight in float16


def test_modelopt_agrees() -> None:
    """Its own packing of two outputs to a byte."""
    quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")
    r = rounded(weight(OUTS, INS), GROUP, symmetric=True, dtype=torch.float32)
    stored = {"weight": quant_utils.pack_int4_in_uint8(r.meaning, r.scales_OG, GROUP), "weight_scale": r.scales_OG}
    entry = FORMATS["modelopt"].entry(GROUP)
    agrees(made(scheme_of(entry), linear(OUTS, INS), named(stored)), r.meaning)
    convert = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    for algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
        inner: dict[str, Any] = {"quant_algo": algorithm, "group_size": GROUP, "has_zero_point": False, "pre_quant_scale": True}
        inner |= {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        file = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": inner}
        theirs = json.loads(json.dumps(convert.convert_hf_quant_config_format(json.loads(json.dumps(file)))))
        both = scheme_of(theirs, files={"hf_quant_config.json": file})
        assert both == scheme_of({}, files={"hf_quant_config.json": file})
        assert (both.group_size, both.fp8_inputs) == (GROUP, algorithm == "W4A8_AWQ")
        assert scheme_of(theirs).group_size == 128  # its config.json says none
