"""FP8 checkpoints made by the tools that publish them, planned and loaded as users load them, against those tools' own logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from paddock.assemble import plan
from paddock.config import EngineConfig
from paddock.execution.build import build_model, fill_model
from paddock.layers import reference_attention
from paddock.layers.parameters import torch_dtype
from paddock.planning import rebuild
from paddock.planning.plan import Plan
from paddock.testing.contracts import BuiltModel
from paddock.testing.oracle import relative_rms

PUBLISHED = Path(__file__).parent / "published"
NAMES = sorted(path.name for path in PUBLISHED.iterdir())
# One FP8 rounding that falls the other way shifts one number by a sixteenth; a wrong scale, axis or list shifts them all.
BOUND = 2e-3
CPU = torch.device("cpu")


def planned(folder: Path, **options: Any) -> Plan:
    """Return the plan of a folder on this machine's CPU in float32."""
    return plan(EngineConfig(model=str(folder), device="cpu", dtype="float32", **options))


def built(made: Plan, folder: Path) -> BuiltModel:
    """Return the loaded model of a plan, its pages in the planned dtype."""
    assert not made.errors, made.errors
    needs = rebuild.attention_needs(made)
    backend = reference_attention.create(needs, CPU)
    model = build_model(made, backend, CPU)
    fill_model(made, model, folder, CPU)
    pages = "float8_e4m3fn" if made.kv_cache_dtype == "fp8" else made.kv_cache_dtype
    return BuiltModel(
        config=rebuild.parsed_config(made),
        table=rebuild.weight_table(made),
        needs=needs,
        model=model,
        backend=backend,
        dtype=torch_dtype(pages),
        num_layers=made.num_layers,
    )


def error_of(folder: Path, **options: Any) -> float:
    """Return how far the logits of a folder are from those its tool computed."""
    expected = load_file(folder / "expected.safetensors")
    return relative_rms(logits(built(planned(folder, **options), folder), expected["token_ids"]), expected["logits"])


def logits(model: BuiltModel, token_ids: Tensor) -> Tensor:
    """Return the logits of all tokens but two in one step, and of these one by one."""
    tokens = token_ids.tolist()
    return model.run([("a", tokens[:-2])], [("a", tokens[-2:-1])], [("a", tokens[-1:])])["a"]


def copied(name: str, folder: Path) -> Path:
    """Return a copy that a test may change."""
    return Path(shutil.copytree(PUBLISHED / name, folder / name))


def rewrite(folder: Path, **entry: Any) -> None:
    """Replace keys of config.json, or take those away that are None."""
    config = json.loads((folder / "config.json").read_text()) | entry
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("name", NAMES)
def test_a_published_checkpoint_gives_the_logits_its_tool_computes(name: str) -> None:
    """Config, lists, tensors, scales and rounding of activations mean what they mean to the tool that wrote them."""
    assert error_of(PUBLISHED / name) < BOUND


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("modelopt")])
@pytest.mark.parametrize("kept", ["config.json", "hf_quant_config.json"])
def test_either_file_of_modelopt_is_enough(tmp_path: Path, name: str, kept: str) -> None:
    """Older exports describe themselves in hf_quant_config.json alone, hub copies often in config.json alone."""
    folder = copied(name, tmp_path)
    if kept == "config.json":
        (folder / "hf_quant_config.json").unlink()
    else:
        rewrite(folder, quantization_config=None)
    assert error_of(folder) < BOUND


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("compressed")])
def test_the_old_key_of_compressed_tensors_is_read(tmp_path: Path, name: str) -> None:
    """Before transformers knew the format its description was called compression_config."""
    folder = copied(name, tmp_path)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    del entry["quant_method"]
    rewrite(folder, quantization_config=None, compression_config=entry)
    assert error_of(folder) < BOUND


def test_calibrated_kv_scales_choose_fp8_pages() -> None:
    """A checkpoint with KV scales keeps KV in FP8, unasked and without a warning; one without keeps it plain."""
    for name in NAMES:
        plan = planned(PUBLISHED / name)
        assert plan.kv_cache_dtype == ("fp8" if name.endswith("-kv") else "float32")
        assert not [issue for issue in plan.issues if issue.code == "kv_scales_are_one"]


def test_fp8_pages_without_scales_are_a_warning_and_an_error_when_strict() -> None:
    """The weights at hand show that nobody calibrated KV, whatever the config announces."""
    folder = PUBLISHED / "modelopt-fp8"
    (warning,) = [issue for issue in planned(folder, kv_cache_dtype="fp8").issues if issue.code == "kv_scales_are_one"]
    assert warning.level == "warning"
    assert "every layer" in warning.message
    assert [issue.code for issue in planned(folder, kv_cache_dtype="fp8", strict=True).errors] == ["kv_scales_are_one"]
