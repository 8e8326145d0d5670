"""What the FP8 recipes write: the tensors of their formats, with the scales a direct computation gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paddock.checkpoint.source import open_source
from paddock.plugins import CheckpointFacts, resolve
from paddock.quantize import stack
from paddock.testing.oracle import relative_rms
from paddock_quant_fp8.plugin import paddock_quantizations
from tests.quantize.made import (
    FALCON,
    LAYERS,
    LENGTH,
    LINEARS,
    dequantised,
    logits_of,
    random_falcon,
    random_llama,
    run,
    sequences,
    tensors_of,
    write_model,
)

FP8 = torch.float8_e4m3fn
RECIPES = ("fp8-static", "fp8-dynamic", "fp8-official")
PATHS = [f"model.layers.{i}.{linear}" for i in range(LAYERS) for linear in LINEARS]
INNER_FFN = [f"model.layers.{i}.mlp.{name}_proj" for i in range(1, LAYERS - 1) for name in ("gate", "up", "down")]
QUANTISED = {"fp8-static": PATHS, "fp8-dynamic": PATHS, "fp8-official": INNER_FFN}
# An FP8 number is off by at most a sixteenth of itself. These random models multiply that layer by layer; a wrong scale, part or
# order gives errors above 1.
LOGITS_BOUND = 0.25


@torch.inference_mode()
def observed(model: Any) -> tuple[dict[str, float], Any]:
    """Return the largest magnitude each linear of a model of transformers is given over the text, and its KV cache."""
    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        def see(_: object, arguments: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), arguments[0].abs().max().item())

        return see

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    cache = model(sequences(), use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    return largest, cache


def reference_logits(model: Any) -> Tensor:
    """Return the logits of transformers for the calibration text."""
    with torch.inference_mode():
        logits: Tensor = model(sequences()).logits
    return logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_writes_the_tensors_of_its_format_and_copies_the_others(llama: Path, tmp_path: Path, recipe: str) -> None:
    """Names, dtypes and shapes are the format's; what is not quantised is the source's, bit for bit."""
    run(llama, tmp_path / "out", recipe)
    found, source = tensors_of(tmp_path / "out"), random_llama().state_dict()
    expected = set(source)
    for path in QUANTISED[recipe]:
        weight, scale = found[f"{path}.weight"], found[f"{path}.weight_scale"]
        assert (weight.dtype, weight.shape) == (FP8, source[f"{path}.weight"].shape)
        assert (scale.dtype, tuple(scale.shape)) == (torch.float32, () if recipe == "fp8-static" else (len(weight), 1))
        expected.add(f"{path}.weight_scale")
        if recipe == "fp8-static":
            assert (found[f"{path}.input_scale"].dtype, tuple(found[f"{path}.input_scale"].shape)) == (torch.float32, ())
            expected.add(f"{path}.input_scale")
    assert found.keys() == expected
    for name in source.keys() - {f"{path}.weight" for path in QUANTISED[recipe]}:
        assert torch.equal(found[name], source[name]), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_the_source_s_to_the_precision_of_fp8(llama: Path, tmp_path: Path, recipe: str) -> None:
    """Every scale is its tensor's or row's largest magnitude / 448, and no weight is off by more than half a step."""
    run(llama, tmp_path / "out", recipe)
    found, source = tensors_of(tmp_path / "out"), random_llama().state_dict()
    plain = dequantised(found)
    for path in QUANTISED[recipe]:
        weight = source[f"{path}.weight"]
        amax = weight.abs().max() if recipe == "fp8-static" else weight.abs().amax(1, keepdim=True)
        torch.testing.assert_close(found[f"{path}.weight_scale"], amax / 448, rtol=1e-6, atol=0)
        half_step = torch.maximum(weight.abs() / 16, amax / 448 * 2.0**-10)
        assert ((plain[f"{path}.weight"] - weight).abs() <= half_step * 1.001).all(), path


@pytest.mark.parametrize("batch_tokens", [stack.BATCH_TOKENS, 4 * LENGTH, 1])
def test_static_scales_are_those_transformers_sees(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    """Each input scale is the largest magnitude over the text / 448, whatever runs at once; parts of a product share it."""
    monkeypatch.setattr(stack, "BATCH_TOKENS", batch_tokens)
    run(llama, tmp_path / "out", "fp8-static", kv_cache_dtype="fp8")
    found = tensors_of(tmp_path / "out")
    largest, cache = observed(random_llama())
    for path in PATHS:
        assert found[f"{path}.input_scale"].item() == pytest.approx(largest[path] / 448, rel=1e-4), path
    for i in range(LAYERS):
        block = f"model.layers.{i}.self_attn"
        assert len({found[f"{block}.{name}_proj.input_scale"].item() for name in "qkv"}) == 1
        for kind, values in (("k", cache.layers[i].keys), ("v", cache.layers[i].values)):
            scale = found[f"{block}.{kind}_proj.{kind}_scale"]
            assert (scale.dtype, tuple(scale.shape)) == (torch.float32, ())
            assert scale.item() == pytest.approx(values.abs().max().item() / 448, rel=1e-4)


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "fp8-official"])
def test_kv_scales_can_be_added_to_recipes_that_need_no_text(llama: Path, tmp_path: Path, recipe: str) -> None:
    """They are the rotated keys' and the values' largest magnitude / 448; the linears are as without them."""
    run(llama, tmp_path / "with", recipe, kv_cache_dtype="fp8")
    run(llama, tmp_path / "without", recipe)
    found, without = tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without")
    _, cache = observed(random_llama())
    for i in range(LAYERS):
        for kind, values in (("k", cache.layers[i].keys), ("v", cache.layers[i].values)):
            scale = found.pop(f"model.layers.{i}.self_attn.{kind}_scale")
            assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (1,))
            assert scale.item() == pytest.approx(values.abs().max().item() / 448, rel=1e-4)
    assert found.keys() == without.keys()
    assert all(torch.equal(found[name].view(torch.uint8), without[name].view(torch.uint8)) for name in found)


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_stay_near_the_source_s(llama: Path, tmp_path: Path, recipe: str) -> None:
    """Transformers with the weights the checkpoint stands for."""
    run(llama, tmp_path / "out", recipe)
    model = random_llama()
    expected = reference_logits(model)
    model.load_state_dict(dequantised(tensors_of(tmp_path / "out")))
    error = relative_rms(reference_logits(model), expected)
    assert 1e-3 < error < LOGITS_BOUND, error


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kv_cache_dtype", [None, "fp8"])
def test_paddock_runs_what_it_wrote(llama: Path, tmp_path: Path, recipe: str, kv_cache_dtype: str | None) -> None:
    """The folder loads, and its logits are near the source's; a format that no plugin reads yet is skipped."""
    run(llama, tmp_path / "out", recipe, kv_cache_dtype=kv_cache_dtype)
    source = open_source(str(tmp_path / "out"))
    facts = CheckpointFacts(config=source.config, dtype="float32", files=source.quantization_files)
    if all(resolve(spec.detect)(facts) is None for spec in paddock_quantizations()):
        pytest.skip(f"no plugin reads {source.config['quantization_config']['quant_method']} yet")
    found = logits_of(tmp_path / "out", kv_cache_dtype=kv_cache_dtype or "float32")
    error = relative_rms(found, reference_logits(random_llama()))
    assert 1e-3 < error < LOGITS_BOUND, error


def test_row_scales_of_a_bfloat16_model_are_bfloat16_and_divided_by_as_stored(tmp_path: Path) -> None:
    """As compressed-tensors keeps them: weights are divided by the rounded scale, so that nothing is lost in rounding it."""
    model = random_llama(torch.bfloat16)
    source = write_model(tmp_path / "plain", model)
    run(source, tmp_path / "out", "fp8-dynamic")
    found = tensors_of(tmp_path / "out")
    for path in PATHS:
        weight, scale = model.state_dict()[f"{path}.weight"].float(), found[f"{path}.weight_scale"]
        assert scale.dtype == torch.bfloat16
        assert torch.equal(scale, (weight.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16))
        expected = (weight / scale.float()).clamp(-448, 448).to(FP8)
        assert torch.equal(found[f"{path}.weight"].view(torch.uint8), expected.view(torch.uint8))


def test_a_falcon_is_quantised_with_kv_scales_beside_its_fused_projection(tmp_path: Path) -> None:
    """Another family needs no line of its own: scales are those transformers sees, names those of its attention block."""
    source = write_model(tmp_path / "falcon", random_falcon())
    run(source, tmp_path / "out", "fp8-static", kv_cache_dtype="fp8")
    found = tensors_of(tmp_path / "out")
    largest, cache = observed(random_falcon())
    names = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    for i in range(FALCON["num_hidden_layers"]):
        for name in names:
            path = f"transformer.h.{i}.{name}"
            assert found[f"{path}.weight"].dtype == FP8
            assert found[f"{path}.input_scale"].item() == pytest.approx(largest[path] / 448, rel=1e-4)
        block, layer = f"transformer.h.{i}.self_attention", cache.layers[i]
        assert found[f"{block}.k_scale"].item() == pytest.approx(layer.keys.abs().max().item() / 448, rel=1e-4)
        assert found[f"{block}.v_scale"].item() == pytest.approx(layer.values.abs().max().item() / 448, rel=1e-4)


def test_biases_are_copied(tmp_path: Path) -> None:
    """They stay in the source's dtype beside the weights in FP8."""
    model = random_llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    source = write_model(tmp_path / "plain", model)
    run(source, tmp_path / "out", "fp8-static")
    found, largest = tensors_of(tmp_path / "out"), observed(model)[0]
    for path in PATHS:
        assert torch.equal(found[f"{path}.bias"], model.state_dict()[f"{path}.bias"])
        assert found[f"{path}.input_scale"].item() == pytest.approx(largest[path] / 448, rel=1e-4), path


def test_a_tied_model_keeps_its_one_table(tmp_path: Path) -> None:
    """The head is the embedding: it is copied once, and named as plain all the same."""
    source = write_model(tmp_path / "tied", random_llama(tie_word_embeddings=True))
    run(source, tmp_path / "out", "fp8-dynamic")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
