"""What a plugin's recipe is given of a layer, and what it may do with it: norms, biases, options, and running the layer again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import Tensor, nn

from paddock.config import EngineConfig
from paddock.errors import OptionError
from paddock.plugins import RecipeSpec, hookimpl
from paddock.quantize import again
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.recipe import PlainLayer, RecipeInputs
from paddock.quantize.run import quantize
from paddock.testing.oracle import relative_rms
from tests.quantize.made import LAYERS, LENGTH, SAMPLES, random_falcon, random_llama, sequences, tensors_of, write_model

GATE = "model.layers.1.mlp.gate_proj"


@frozen(kw_only=True)
class Seen:
    """What the recipe below was given of one layer, and the outputs of running it again three times."""

    plain: PlainLayer
    inputs: RecipeInputs
    outputs: tuple[Tensor, ...]


class Probe:
    """A recipe, its work and its plugin in one: it takes note of everything, halves every norm and drops every gate."""

    calibrated = True

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self.seen: list[Seen] = []
        self.layer: PlainLayer | None = None
        self.inputs: RecipeInputs | None = None

    @hookimpl
    def paddock_recipes(self) -> list[RecipeSpec]:
        """Return the recipe."""
        _PROBES[:] = [self]
        return [RecipeSpec(name="probe", create="tests.quantize.test_recipe_seam:create", options={"scheme", "group_size"})]

    def begin(self, layer: PlainLayer) -> Probe:
        """Take a layer."""
        self.layer = layer
        return self

    def files(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Describe nothing."""
        return {"config.json": config}

    def see_input(self, linear: str, x_TI: Tensor) -> None:
        """Ignore it."""

    def see_kv(self, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Ignore it."""

    def tensors(self) -> Mapping[str, Tensor | None]:
        """Run the layer as it is, with a gate of zeros, and as it is again."""
        layer, inputs = self.layer, self.inputs
        assert layer is not None
        assert layer.run_with is not None
        assert inputs is not None
        weights = {path: each for linear in layer.linears.values() for path, each in linear.weights.items()}
        zeros = {path: torch.zeros_like(each).double() for path, each in weights.items() if path.endswith("gate_proj")}
        outputs = tuple(layer.run_with(changed) for changed in ({}, zeros, {}))
        self.seen.append(Seen(plain=layer, inputs=inputs, outputs=outputs))
        halves: dict[str, Tensor | None] = {f"{norm.path}.weight": norm.weight_E / 2 for norm in layer.vectors.values()}
        return halves | {f"{path}.weight": None for path in zeros}


_PROBES: list[Probe] = []


def create(inputs: RecipeInputs) -> Probe:
    """Return the plugin that is being tested: a recipe is found by reference."""
    (probe,) = _PROBES
    probe.inputs = inputs
    return probe


def probed(source: Path, out: Path, **options: Any) -> Probe:
    """Run the recipe on six sequences of 24 tokens."""
    probe = Probe()
    asked: dict[str, Any] = {"calibration": str(source.parent / "text.txt"), "samples": SAMPLES, "sequence_length": LENGTH}
    config = EngineConfig(model=str(source), device="cpu")
    quantize(config, QuantizeOptions(recipe="probe", out=out, **(asked | options)), plugins=[probe])
    return probe


def after_layer(model: Any, index: int) -> Tensor:
    """Return what a layer of transformers' model gives for the calibration text [T, E]."""
    found: list[Tensor] = []
    block = model.model.layers[index]
    handle = block.register_forward_hook(lambda _, __, output: found.append(output if isinstance(output, Tensor) else output[0]))
    with torch.inference_mode():
        model(sequences(), use_cache=False)
    handle.remove()
    return found[0].flatten(0, 1)


@pytest.mark.parametrize("size", [64, 320])
def test_a_layer_runs_again_with_other_weights_and_keeps_its_own(tmp_path: Path, size: int) -> None:
    """Where weights are kept in the CPU kernels' layout too (320): the output is transformers' with those weights."""
    make: dict[str, Any] = {"hidden_size": size, "intermediate_size": 224}
    source = write_model(tmp_path / "plain/llama", random_llama(**make))
    probe = probed(source, tmp_path / "out")
    model = random_llama(**make)
    expected = after_layer(model, 1)
    gate: nn.Linear = model.get_submodule(GATE)
    gate.weight.zero_()
    without = after_layer(model, 1)
    first, zeroed, last = probe.seen[1].outputs
    assert relative_rms(first, expected) < 1e-5
    assert relative_rms(zeroed, without) < 1e-5
    assert relative_rms(zeroed, expected) > 0.1
    assert torch.equal(first, last)


def test_the_sample_is_bounded_and_evenly_spread(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six sequences every second where three fit, and one where none does."""
    whole = probed(llama, tmp_path / "whole").seen[2].outputs[0].view(SAMPLES, LENGTH, -1)
    monkeypatch.setattr(again, "SAMPLE_TOKENS", 3 * LENGTH + 5)
    some = probed(llama, tmp_path / "some").seen[2].outputs[0].view(3, LENGTH, -1)
    torch.testing.assert_close(some, whole[[0, 2, 4]], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(again, "SAMPLE_TOKENS", 1)
    assert probed(llama, tmp_path / "one").seen[2].outputs[0].shape == (LENGTH, 64)


def test_a_recipe_may_change_norms_and_leave_tensors_out(llama: Path, tmp_path: Path) -> None:
    """All others are the source's."""
    probed(llama, tmp_path / "out")
    found, source = tensors_of(tmp_path / "out"), random_llama().state_dict()
    assert found.keys() == {name for name in source if not name.endswith("gate_proj.weight")}
    for name, tensor in found.items():
        halved = "layernorm" in name
        assert torch.equal(tensor, source[name] / 2 if halved else source[name]), name


def test_norms_and_biases_are_given_by_checkpoint_prefix(tmp_path: Path) -> None:
    """Of a family with both."""
    rw = {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
    model = random_falcon(**rw, num_kv_heads=4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    source = write_model(tmp_path / "plain/falcon", model)
    state = model.state_dict()
    for index, seen in enumerate(probed(source, tmp_path / "out").seen):
        vectors, linears = seen.plain.vectors, seen.plain.linears
        assert {name: vector.path for name, vector in vectors.items()} == {
            "attention_norm": f"transformer.h.{index}.input_layernorm",
            "mlp_norm": f"transformer.h.{index}.post_attention_layernorm",
        }
        for vector in vectors.values():
            assert vector.bias_E is not None
            assert torch.equal(vector.weight_E, state[f"{vector.path}.weight"])
            assert torch.equal(vector.bias_E, state[f"{vector.path}.bias"])
        biases = {path: bias for linear in linears.values() for path, bias in linear.biases.items()}
        assert len(biases) == 4
        assert all(torch.equal(bias, state[f"{path}.bias"]) for path, bias in biases.items())


def test_a_recipe_is_given_the_options_it_says_it_reads(llama: Path, tmp_path: Path) -> None:
    """And those it does not are refused, with those it does."""
    probe = probed(llama, tmp_path / "out", scheme="w2", group_size=7)
    assert len(probe.seen) == LAYERS
    given = probe.seen[0].inputs
    assert (given.scheme, given.group_size, given.format, given.tp_compatible) == ("w2", 7, None, None)
    with pytest.raises(OptionError, match="format is 'x', which the recipe 'probe' does not read") as raised:
        probed(llama, tmp_path / "other", format="x")
    assert raised.value.fix == "leave format out; it reads group_size, scheme"
