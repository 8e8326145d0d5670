"""What cannot be quantised is refused, with the value and the way out, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from paddock.config import EngineConfig
from paddock.errors import CheckpointError, OptionError, PaddockError, PluginError
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.run import quantize
from tests.quantize.made import random_llama, run, write_model

REFUSED: dict[str, tuple[dict[str, Any], type[PaddockError], str, str]] = {
    "unknown recipe": ({"recipe": "fp8-statik"}, PluginError, "recipe 'fp8-statik'", "did you mean 'fp8-static'?"),
    "kv dtype": ({"kv_cache_dtype": "fp4"}, OptionError, "KV cache in 'fp4'", "fp8"),
    "too short": ({"samples": 10_000}, OptionError, "and 10000 are wanted", "longer text"),
    "not one sequence": ({"sequence_length": 9_000, "samples": None}, OptionError, "0 sequences of 9000", "longer text"),
    "too long": ({"sequence_length": 65, "samples": 2}, OptionError, "at most 64 tokens", "lower"),
    "no samples": ({"samples": 0}, OptionError, "samples is 0", "at least 1"),
    "no text": ({"calibration": "/nowhere/text.txt"}, OptionError, "/nowhere/text.txt cannot be read", "path"),
    "a text without a name": ({"calibration": ""}, OptionError, "calibration is ''", "or default"),
    "samples not read": ({"recipe": "fp8-official", "samples": 3}, OptionError, "samples is 3", "leave"),
    "length not read": (
        {"recipe": "fp8-dynamic", "calibration": "default", "sequence_length": 24},
        OptionError,
        "sequence_length is 24, but nothing would read it",
        "leave",
    ),
    "group size not read": ({"group_size": 64}, OptionError, "'fp8-static' does not read", "leave group_size out"),
    "no group": ({"recipe": "awq", "group_size": 0}, OptionError, "group_size is 0", "at least 1"),
    "group of no kernel": ({"recipe": "awq", "group_size": 48}, OptionError, "group_size is 48", "use 128, 64 or 32"),
    "group too large": (
        {"recipe": "awq", "group_size": 64},
        OptionError,
        "mlp.down_proj has 96 inputs: 1.5 groups",
        "--group-size 32",
    ),
    "format": ({"recipe": "awq", "format": "gguf"}, OptionError, "format is 'gguf'", "autoawq"),
    "scheme": ({"recipe": "awq", "scheme": "w4a4"}, OptionError, "scheme is 'w4a4'", "w4a8"),
    "autoawq in fp8": (
        {"recipe": "awq", "format": "autoawq", "scheme": "w4a8"},
        OptionError,
        "no word for",
        "compressed-tensors",
    ),
    "zero points": ({"recipe": "awq", "zero_points": "no"}, OptionError, "zero_points is 'no'", "give True or False"),
    "autoawq without zero points": (
        {"recipe": "awq", "format": "autoawq", "zero_points": False},
        OptionError,
        "zero_points is False, and AutoAWQ's layout always has them",
        "leave --no-zero-points out, or use --format compressed-tensors",
    ),
    "too many ranks": (
        {"recipe": "awq", "tp_compatible": 3},
        OptionError,
        "tp_compatible is 3: part 'q' has 4 heads",
        "divides 4",
    ),
    "groups on ranks": (
        {"recipe": "awq", "tp_compatible": 4},
        OptionError,
        "divides the 16 inputs of self_attn.o_proj, nor the 24 inputs of mlp.down_proj on each of 4 ranks",
        "use --tp-compatible 1",
    ),
    "awq and kv scales": (
        {"recipe": "awq", "kv_cache_dtype": "fp8"},
        OptionError,
        "no scales for a KV cache",
        "leave --kv-cache",
    ),
    "gate text alone": ({"gate_text": Path("x")}, OptionError, "there is no gate", "--gate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(llama: Path, tmp_path: Path, case: str) -> None:
    """The value and the way out are said."""
    changes, kind, says, fix = REFUSED[case]
    with pytest.raises(kind) as raised:
        run(llama, tmp_path / "out", **({"recipe": "fp8-static"} | changes))
    assert says in raised.value.message
    assert fix in raised.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["dangling", "file/below"])
def test_a_folder_that_cannot_be_is_refused(llama: Path, tmp_path: Path, place: str) -> None:
    """Behind a link to nothing, or below a file: another name is the way out, not room on the disk."""
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OptionError, match="out is") as raised:
        run(llama, tmp_path / place, "fp8-dynamic")
    assert raised.value.fix == "name a new folder"
    assert (tmp_path / "file").read_text() == "kept"


def test_a_text_without_a_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    """An engine can do with token ids; calibration reads words."""
    config = EngineConfig(model=str(llama), device="cpu", tokenizer="none")
    with pytest.raises(OptionError, match="tokenizer is 'none'"):
        quantize(config, QuantizeOptions(recipe="fp8-static", out=tmp_path / "out", samples=2, sequence_length=24))
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_no_utf8_is_refused(llama: Path, tmp_path: Path) -> None:
    """By byte."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    with pytest.raises(OptionError, match="not UTF-8: line 1, byte 4 is 0xe9"):
        run(llama, tmp_path / "out", "fp8-static", calibration=str(tmp_path / "latin.txt"))


def test_a_quantised_source_is_refused(llama: Path, tmp_path: Path) -> None:
    """Quantising twice is never meant."""
    run(llama, tmp_path / "once", "fp8-official")
    with pytest.raises(CheckpointError, match=r"quantised already \(fbgemm_fp8\)") as raised:
        run(tmp_path / "once", tmp_path / "twice", "fp8-dynamic")
    assert "made from" in raised.value.fix


def test_a_source_with_a_tensor_too_few_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """All that is wrong with it is said at once."""
    source = write_model(tmp_path / "plain/llama", random_llama())
    state = {name: t for name, t in random_llama().state_dict().items() if "layers.3.mlp" not in name}
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down_proj\.weight': missing"):
        run(source, tmp_path / "out", "fp8-dynamic")
    assert not (tmp_path / "out").exists()


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """A scale cannot fit them; the layer and the linear are named."""
    model = random_llama()
    model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    source = write_model(tmp_path / "plain/llama", model)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.\w+_proj hold values that are not finite"):
        run(source, tmp_path / "out", "fp8-static")


def test_the_official_recipe_needs_a_layer_between_first_and_last(tmp_path: Path) -> None:
    """Two layers would leave nothing to quantise."""
    source = write_model(tmp_path / "plain/llama", random_llama(num_hidden_layers=2))
    with pytest.raises(OptionError, match="the model has 2"):
        run(source, tmp_path / "out", "fp8-official")
