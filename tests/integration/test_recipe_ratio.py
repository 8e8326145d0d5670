"""The benchmark that holds the static FP8 recipe to Meta's own: what it runs, on a CPU and a small model."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from tests.bench.recipe_ratio import OFFICIAL, STATIC, Shape, lines, quantization_of, write

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder with a config.json alone."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_both_recipes_run_and_the_ratio_is_that_of_their_speeds(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the requests that the whole model's plan lets in, and no more than asked for, over the layers asked for."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    static, official, ratio = lines(source, (Shape(isl=8, osl=4),), layers=2, most=3, gpu="1xH200", runs=1)
    assert [(line["recipe"], line["layers"], line["requests"]) for line in (static, official)] == [
        (STATIC, 2, 3),
        (OFFICIAL, 2, 3),
    ]
    expected = static["output_tokens_per_second"] / official["output_tokens_per_second"]
    assert ratio == {"shape": "8/4", "static_over_official": pytest.approx(expected, abs=1e-3)}


def test_meta_s_recipe_leaves_attention_and_the_outer_layers_plain(source: Path, tmp_path: Path) -> None:
    """As its published checkpoints list them; of a part of the layers the first and the last are that part's."""
    config = json.loads((write(source, tmp_path / "part", OFFICIAL, 3) / "config.json").read_text())
    plain = config["quantization_config"]["modules_to_not_convert"]
    assert config["num_hidden_layers"] == 3
    assert {name for name in plain if ".mlp." in name} == {
        f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 2) for part in ("gate", "up", "down")
    }
    assert sum(".self_attn." in name for name in plain) == 3 * 4
    assert quantization_of(STATIC, 3)["ignored_layers"] == ["lm_head"]


@pytest.mark.parametrize("text", ["2048", "2048/0", "a/b", "1/2/3", "-1/2"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    """By its name, with one that is."""
    with pytest.raises(click.BadParameter, match="is no ISL/OSL"):
        Shape.of(text)


def test_more_layers_than_the_model_has_are_refused(source: Path, tmp_path: Path) -> None:
    """A ratio of them would be of another model."""
    with pytest.raises(click.BadParameter, match="--layers is 5, and the model has 4: give 1 to 4"):
        write(source, tmp_path / "part", STATIC, 5)
    assert not (tmp_path / "part").exists()
