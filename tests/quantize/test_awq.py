"""The recipe `awq`: what it writes, in every layout and for every family, and what it saves beside plain rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paddock.errors import CheckpointError
from paddock.testing.oracle import relative_rms
from paddock_quant_awq.recipes import layer as layer_work
from tests.quantize.int4 import decoded
from tests.quantize.made import LAYERS, LINEARS, logits_of, random_falcon, random_llama, run, sequences, tensors_of, write_model

Quantised = Callable[[str, str, bool | None], Path]
FORMATS = ("compressed-tensors", "autoawq", "modelopt")
GROUP = 32
PATHS = [f"model.layers.{i}.{linear}" for i in range(LAYERS) for linear in LINEARS]
SUFFIXES = {
    "compressed-tensors": {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"},
    "autoawq": {"qweight", "qzeros", "scales"},
    "modelopt": {"weight", "weight_scale"},
}
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
TOGETHER = dict.fromkeys(QKV, QKV) | dict.fromkeys(GATE_UP, GATE_UP)


def _biased() -> Any:
    """Return a Llama whose every query head has its own values, with biases that are not zero."""
    model = random_llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True)
    return _with_biases(model)


def _with_biases(model: Any) -> Any:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.bias", "_h.bias", "dense.bias", "query_key_value.bias")):
            parameter.normal_()
    return model


RW = {
    "new_decoder_architecture": False,
    "multi_query": False,
    "parallel_attn": False,
    "alibi": True,
    "bias": True,
    "num_kv_heads": 4,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": random_llama,
    "llama-biased": _biased,
    "falcon-7b": lambda: random_falcon(new_decoder_architecture=False, num_kv_heads=None),
    "falcon-40b": random_falcon,
    "falcon-rw": lambda: _with_biases(random_falcon(**RW)),
}


@pytest.fixture(scope="module")
def quantised(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """Return what gives the Llama's folder in a format, by a scheme, with zero points or not; each is made once."""

    @cache
    def made(format_: str, scheme: str, zero_points: bool | None) -> Path:
        out = tmp_path_factory.mktemp("awq") / "out"
        run(llama, out, "awq", format=format_, scheme=scheme, zero_points=zero_points)
        return out

    return made


def meaning_of(model: Any, folder: Path, format_: str) -> Any:
    """Return a model of transformers with the weights that a quantised folder stands for."""
    state = decoded(tensors_of(folder), format_)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@torch.inference_mode()
def layer_outputs(model: Any, changed: Any = None) -> list[Tensor]:
    """Return the output of every layer for the calibration text, each layer of `changed` on what the plain one is given."""
    blocks = model.model.layers
    found: list[Tensor] = []

    def see(index: int) -> Any:
        def hook(_: object, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            layer = blocks[index] if changed is None else changed.model.layers[index]
            layer_output = output if changed is None else layer(*arguments, **options)
            found.append(layer_output if isinstance(layer_output, Tensor) else layer_output[0])

        return hook

    handles = [block.register_forward_hook(see(i), with_kwargs=True) for i, block in enumerate(blocks)]
    model(sequences(), use_cache=False)
    for handle in handles:
        handle.remove()
    return [output.clone() for output in found]


def rounded_plainly(model: Any) -> Any:
    """Return the model with every linear of its layers rounded to 0..15 over the range of a group, 0 within it."""
    for path in PATHS:
        weight = model.get_submodule(path).weight
        grouped = weight.view(len(weight), -1, GROUP)
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale).round()
        weight.copy_((((grouped / scale).round() + zero).clamp(0, 15) - zero).mul(scale).view_as(weight))
    return model


def salient(factor: float = 20.0) -> Any:
    """Return a Llama that computes what the plain one does, three channels of each norm larger and their weights smaller."""
    model = random_llama()
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, fed in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[[5, 20, 41]] *= factor
            for linear in fed:
                linear.weight[:, [5, 20, 41]] /= factor
    return model


def layer_errors(make: Callable[[], Any], folder: Path) -> tuple[list[float], list[float]]:
    """Return the error of each layer's output by `awq` and by plain rounding, on the calibration text."""
    source = write_model(folder / "plain/llama", make())
    run(source, folder / "out", "awq", format="compressed-tensors")
    plain = layer_outputs(make())
    found = []
    for changed in (meaning_of(make(), folder / "out", "compressed-tensors"), rounded_plainly(make())):
        outputs = layer_outputs(make(), changed)
        found.append([(a - b).square().mean().item() for a, b in zip(outputs, plain, strict=True)])
    return found[0], found[1]


def test_salient_channels_cost_less_than_plain_rounding_makes_them(tmp_path: Path) -> None:
    """Where a few large channels have small weights, the error of every layer's output is less than a quarter."""
    ours, simple = layer_errors(salient, tmp_path)
    assert all(a < b / 4 for a, b in zip(ours, simple, strict=True)), (ours, simple)


def test_no_layer_is_worse_than_by_plain_rounding(tmp_path: Path) -> None:
    """On the calibration text, of a model without such channels; and the search gains something."""
    ours, simple = layer_errors(random_llama, tmp_path)
    assert all(a <= b * 1.001 for a, b in zip(ours, simple, strict=True)), (ours, simple)
    assert sum(ours) < sum(simple) * 0.9, (ours, simple)


def test_a_search_that_ends_badly_leaves_plain_rounding(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scaled weights make the layer's output worse, norms are the source's and weights are rounded as they are."""
    harmful = torch.logspace(-3, 3, 192)
    monkeypatch.setattr(layer_work, "candidates", lambda x_mean_I, w_mean_I: iter([harmful[: len(x_mean_I)]]))
    run(llama, tmp_path / "out", "awq")
    found = decoded(tensors_of(tmp_path / "out"), "compressed-tensors")
    for name, tensor in rounded_plainly(random_llama()).state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format_", FORMATS)
def test_paddock_gives_the_logits_of_the_dequantised_weights(tmp_path: Path, family: str, format_: str) -> None:
    """Transformers with what the checkpoint stands for, decoded here; and that is no copy of the source."""
    make = FAMILIES[family]
    source = write_model(tmp_path / "plain" / family, make())
    run(source, tmp_path / "out", "awq", format=format_)
    with torch.inference_mode():
        meant = meaning_of(make(), tmp_path / "out", format_)(sequences()).logits
        plain = make()(sequences()).logits
    assert relative_rms(logits_of(tmp_path / "out"), meant) < 1e-4
    assert 1e-2 < relative_rms(meant, plain) < 1


@pytest.mark.parametrize(
    ("format_", "zero_points"), [("compressed-tensors", False), ("compressed-tensors", True), ("modelopt", None)]
)
def test_w4a8_is_w4a16_with_activations_in_fp8(quantised: Quantised, format_: str, zero_points: bool | None) -> None:
    """The weights are the same; activations differ by their rounding alone."""
    w4a8, w4a16 = (quantised(format_, scheme, zero_points) for scheme in ("w4a8", "w4a16"))
    found, without = tensors_of(w4a8), tensors_of(w4a16)
    assert all(torch.equal(found[name], tensor) for name, tensor in without.items())
    extra = {"input_scale", "weight_scale_2"} if format_ == "modelopt" else set()
    assert found.keys() - without.keys() == {f"{path}.{name}" for path in PATHS for name in extra}
    error = relative_rms(logits_of(w4a8), logits_of(w4a16))
    assert 1e-3 < error < 0.25, error


def test_the_static_scales_of_w4a8_are_those_of_its_inputs_and_weights(quantised: Quantised) -> None:
    """Largest magnitude / 448, of the inputs as they are after folding; parts of one product share both."""
    found = tensors_of(quantised("modelopt", "w4a8", None))
    inputs: dict[str, Tensor] = {}
    model = random_llama()
    for path in PATHS:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, given, path=path: inputs.update({path: given[0].abs().amax((0, 1))}))
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    with torch.inference_mode():
        model(sequences())
    for path in PATHS:
        layer, block, name = path.rsplit(".", 2)
        factor = found.get(f"{path}.pre_quant_scale")
        if factor is None:
            norm = f"{layer}.{norms[block]}.weight"
            factor = found[norm] / model.state_dict()[norm]
        assert found[f"{path}.input_scale"].item() == pytest.approx((inputs[path] * factor).max().item() / 448, rel=1e-4)
        parts = [f"{layer}.{block}.{each}" for each in TOGETHER.get(name, (name,))]
        unscaled = {key: tensor for key, tensor in found.items() if "pre_quant" not in key}
        plain = [decoded(unscaled, "modelopt")[f"{part}.weight"] for part in parts]
        largest = max(weight.abs().max().item() for weight in plain)
        assert found[f"{path}.weight_scale_2"].item() == pytest.approx(largest / 448, rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "zero_points", "written"),
    [("w4a16", None, True), ("w4a16", False, False), ("w4a8", None, True), ("w4a8", False, False)],
)
def test_compressed_tensors_has_zero_points_unless_they_are_declined(
    quantised: Quantised, scheme: str, zero_points: bool | None, written: bool
) -> None:
    """In the tensors and in the description alike."""
    folder = quantised("compressed-tensors", scheme, zero_points)
    found = tensors_of(folder)
    assert {f"{path}.weight_zero_point" in found for path in PATHS} == {written}
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert section["config_groups"]["group_0"]["weights"]["symmetric"] is not written


@pytest.mark.parametrize("format_", FORMATS)
def test_the_tensors_are_those_of_the_format(quantised: Quantised, format_: str) -> None:
    """Names and shapes; embeddings, the head and the last norm are the source's, bit for bit."""
    found, source = tensors_of(quantised(format_, "w4a16", None)), random_llama().state_dict()
    expected = {name for name in source if name.removesuffix(".weight") not in PATHS}
    for path in PATHS:
        outputs, inputs = source[f"{path}.weight"].shape
        expected |= {f"{path}.{suffix}" for suffix in SUFFIXES[format_]}
        if format_ == "compressed-tensors":
            assert tuple(found[f"{path}.weight_packed"].shape) == (outputs, inputs // 8)
            assert found[f"{path}.weight_shape"].tolist() == [outputs, inputs]
            assert tuple(found[f"{path}.weight_zero_point"].shape) == (outputs // 8, inputs // GROUP)
        elif format_ == "autoawq":
            assert tuple(found[f"{path}.qweight"].shape) == (inputs, outputs // 8)
            assert tuple(found[f"{path}.qzeros"].shape) == (inputs // GROUP, outputs // 8)
            assert found[f"{path}.scales"].dtype == torch.float16
        else:
            assert tuple(found[f"{path}.weight"].shape) == (outputs // 2, inputs)
            assert found[f"{path}.weight_scale"].dtype == torch.float32
            if path.endswith(("o_proj", "down_proj")):
                expected.add(f"{path}.pre_quant_scale")
    assert found.keys() == expected
    for name in source:
        if "layers" not in name:
            assert torch.equal(found[name], source[name]), name


def test_one_norm_of_falcon_7b_is_divided_for_both_branches(tmp_path: Path) -> None:
    """What multiplies the columns of query_key_value and of dense_h_to_4h is what divided the norm."""
    make = FAMILIES["falcon-7b"]
    source = write_model(tmp_path / "plain/falcon", make())
    run(source, tmp_path / "out", "awq", format="modelopt")
    found, plain = tensors_of(tmp_path / "out"), make().state_dict()
    for i in range(LAYERS):
        norm = f"transformer.h.{i}.input_layernorm"
        ratio = plain[f"{norm}.weight"] / found[f"{norm}.weight"]
        assert ratio.std() > 0.01
        torch.testing.assert_close(plain[f"{norm}.bias"], found[f"{norm}.bias"] * ratio, rtol=1e-5, atol=1e-6)
        meant = decoded(found, "modelopt")
        for linear in ("self_attention.query_key_value", "mlp.dense_h_to_4h"):
            weight = plain[f"transformer.h.{i}.{linear}.weight"]
            error = relative_rms(meant[f"transformer.h.{i}.{linear}.weight"] / ratio, weight)
            assert error < 0.2, (i, linear, error)
            assert f"transformer.h.{i}.{linear}.pre_quant_scale" not in found


@pytest.mark.parametrize("format_", ["compressed-tensors", "autoawq"])
def test_values_that_query_heads_share_are_divided_for_all_of_them(tmp_path: Path, format_: str) -> None:
    """What divided a head of values, weight and bias, is what multiplies the columns of o of each query head that reads it."""
    model = _with_biases(random_llama(num_key_value_heads=2, attention_bias=True))
    run(write_model(tmp_path / "plain/llama", model), tmp_path / "out", "awq", format=format_)
    found, plain = decoded(tensors_of(tmp_path / "out"), format_), model.state_dict()
    for i in range(LAYERS):
        block = f"model.layers.{i}.self_attn"
        ratio = plain[f"{block}.v_proj.bias"] / found[f"{block}.v_proj.bias"]
        assert ratio.std() > 0.01
        each_head = ratio.view(2, 1, -1).expand(2, 2, -1).flatten()
        norm = f"model.layers.{i}.input_layernorm.weight"
        meant = found[f"{block}.v_proj.weight"] * ratio[:, None] * found[norm] / plain[norm]
        assert relative_rms(meant, plain[f"{block}.v_proj.weight"]) < 0.15
        assert relative_rms(found[f"{block}.o_proj.weight"] / each_head, plain[f"{block}.o_proj.weight"]) < 0.15


@pytest.mark.parametrize("format_", FORMATS)
def test_a_bfloat16_model_keeps_bfloat16_beside_its_weights(tmp_path: Path, format_: str) -> None:
    """Norms are in it, and scales where the layout keeps the model's dtype; the folder gives the logits of what it stands for."""
    model = random_llama(torch.bfloat16)
    source = write_model(tmp_path / "plain/llama", model)
    run(source, tmp_path / "out", "awq", format=format_)
    found = tensors_of(tmp_path / "out")
    plain = {tensor.dtype for name, tensor in found.items() if name.endswith(("norm.weight", "pre_quant_scale"))}
    scales = {tensor.dtype for name, tensor in found.items() if name.endswith((".weight_scale", ".scales"))}
    assert plain == {torch.bfloat16}
    assert scales == {{"compressed-tensors": torch.bfloat16, "autoawq": torch.float16, "modelopt": torch.float32}[format_]}
    meant = meaning_of(random_llama(), tmp_path / "out", format_)
    with torch.inference_mode():
        expected = meant(sequences()).logits
    assert relative_rms(logits_of(tmp_path / "out"), expected) < 1e-4


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """By name."""
    model = random_llama()
    model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    source = write_model(tmp_path / "plain/llama", model)
    with pytest.raises(CheckpointError, match=r"the weights of model\.layers\.1\.mlp\.gate_proj hold values that are not finite"):
        run(source, tmp_path / "out", "awq")
