"""Tensors that are not what a format means, and files cut short: refused by the plan in loading's words, nothing allocated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from plugins.quant_awq.tests.written import FORMATS
from safetensors.torch import load_file, save_file
from torch import Tensor

from paddock import LLM, axes
from paddock.checkpoint.targets import Target
from paddock.cli.main import main
from paddock.config import FP8_ATTENTION
from paddock.errors import CheckpointError, PlanError
from paddock.execution import build
from paddock.layers import reference_attention, targets
from paddock.planning import rebuild
from paddock.planning.kv_scales import QUERIES
from paddock.planning.plan import Plan, Wanted
from paddock.planning.wanted import wanted_scales, wanted_tensors
from paddock.planning.weights import stored_tensors
from tests.zoo.formats import WRITTEN, Written
from tests.zoo.test_fp8_plans import DOWN, config_only, edited, plain_folder
from tests.zoo.test_published_fp8 import NAMES, PUBLISHED, built, copied, planned
from tests.zoo.test_quantised_checkpoints import FAMILIES, written_to
from tests.zoo.test_stored_scales import GROUP, STORES, folder_of, written

WEIGHTS, META = "model.safetensors", torch.device("meta")
ZEROS = torch.zeros(32, 48)
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "e5m2": ({"weight": ZEROS.to(torch.float8_e5m2)}, "is F8_E5M2, of shape [32, 48]; the model wants F8_E4M3 [32, 48]"),
    "fnuz": ({"weight": ZEROS.to(torch.float8_e4m3fnuz)}, "is F8_E4M3FNUZ, of shape [32, 48]; the model wants F8_E4M3 [32, 48]"),
    "e5m2fnuz": ({"weight": ZEROS.to(torch.float8_e5m2fnuz)}, "is F8_E5M2FNUZ, of shape [32, 48]; the model wants F8_E4M3"),
    "bytes": ({"weight": ZEROS.to(torch.uint8)}, "is U8, of shape [32, 48]; the model wants F8_E4M3 [32, 48]"),
    "plain": ({"weight": ZEROS}, "is F32, of shape [32, 48]; the model wants F8_E4M3 [32, 48]"),
    "rows": ({"weight": torch.zeros(31, 48).to(torch.float8_e4m3fn)}, "has shape [31, 48]; the model wants F8_E4M3 [32, 48]"),
    "turned": ({"weight": torch.zeros(48, 32).to(torch.float8_e4m3fn)}, "has shape [48, 32]; the model wants F8_E4M3 [32, 48]"),
    "scale of rows": ({"weight_scale": torch.ones(32, 1)}, "has shape [32, 1]; the model wants F32 []"),
    "scale of a kind": ({"weight_scale": torch.ones((), dtype=torch.int32)}, "is I32, of shape []; the model wants F32 []"),
}


def loading_says(plan: Plan, folder: Path) -> CheckpointError:
    """Return the error of loading what the plan refuses."""
    with pytest.raises(CheckpointError) as caught:
        built(evolve(plan, issues=()), folder)
    return caught.value


def refused_alike(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """Check that plan and loading say the same, and that nothing is built of such a folder; return what they say."""
    plan = planned(folder, **options)
    (issue,), said = plan.errors, loading_says(plan, folder)
    assert (issue.code, issue.message, issue.fix) == ("weights_do_not_fit", said.message, said.fix)
    assert main(["plan", str(folder), "--device", "cpu"]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_model", lambda *_: pytest.fail("a model is built"))
        with pytest.raises(PlanError) as caught:
            LLM(str(folder), device="cpu", **options)
    assert caught.value.message == said.message
    return f"{said.message} {said.fix}"


@pytest.mark.parametrize("name", BAD)
def test_a_tensor_of_another_kind_is_refused_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Other FP8 layouts, plain weights under the right name, other shapes: stored and wanted are both said, and the way out."""
    changed, said = BAD[name]
    error = refused_alike(edited("modelopt-fp8", tmp_path, **changed), monkeypatch)
    assert f"'{DOWN}.{next(iter(changed))}': {said}" in error
    assert ("whose FP8 weights are F8_E4M3" in error) == ("is F8_E" in said)


def test_all_that_do_not_fit_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding, norm and head beside the linears; of a plain model too."""
    stored = plain_folder(tmp_path)
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in stored.items()}, tmp_path / WEIGHTS)
    error = refused_alike(tmp_path, monkeypatch)
    assert f"({len(stored)} of its tensors)" in error
    assert "and 1 more" in error
    assert "'model.embed_tokens.weight': has shape [124, 32]; the model wants F32 [62, 32]" in error


def test_a_wrong_scale_of_keys_is_refused_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a head is not what attention takes."""
    folder = copied("modelopt-fp8-kv", tmp_path)
    stored = load_file(folder / WEIGHTS)
    (name,) = [name for name in stored if name.startswith("model.layers.1.") and name.endswith("k_scale")]
    save_file(stored | {name: torch.ones(2)}, folder / WEIGHTS)
    assert f"'{name}': has shape [2]; the model wants F32 []" in refused_alike(folder, monkeypatch)


@pytest.mark.parametrize("name", ["awq", "gptq", "packed"])
def test_wrong_words_of_4_bits_are_refused_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In another shape, and in another dtype."""
    folder, _ = folder_of(tmp_path, name, torch.float16)
    stored = load_file(folder / WEIGHTS)
    first = next(each for each in sorted(stored) if each.endswith(("qweight", "weight_packed")))
    save_file(stored | {first: stored[first].T.contiguous()}, folder / WEIGHTS)
    assert f"'{first}': has shape" in refused_alike(folder, monkeypatch)
    save_file(stored | {first: stored[first].float()}, folder / WEIGHTS)
    assert f"'{first}': is F32" in refused_alike(folder, monkeypatch)


def test_a_plain_checkpoint_to_be_quantised_must_hold_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is compared, not what is kept."""
    stored = plain_folder(tmp_path)
    assert not planned(tmp_path, quantization="fp8").errors
    save_file(stored | {f"{DOWN}.weight": stored[f"{DOWN}.weight"].to(torch.float8_e4m3fn)}, tmp_path / WEIGHTS)
    assert "is F8_E4M3, of shape [32, 48]; the model wants F32" in refused_alike(tmp_path, monkeypatch, quantization="fp8")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_is_cut_short_is_named_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    """Amid its header or its data, as the only file and as one of two."""
    folder = copied("modelopt-fp8", tmp_path)
    stored = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}  # the file itself is cut
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    assert f"{WEIGHTS}: " in refused_alike(folder, monkeypatch)
    (folder / WEIGHTS).unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(sorted(stored))}
    for file in files:
        save_file({name: tensor for name, tensor in stored.items() if weight_map[name] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert not planned(folder).errors
    (folder / files[1]).write_bytes((folder / files[1]).read_bytes()[:keep])
    assert f"{files[1]}: " in refused_alike(folder, monkeypatch)
    (folder / files[1]).unlink()
    assert f"{files[1]}: missing" in refused_alike(folder, monkeypatch)
    (folder / files[0]).unlink()
    assert not planned(folder).errors  # no file of weights is at hand: config.json alone is planned


def test_what_is_not_read_is_not_compared(tmp_path: Path) -> None:
    """Weights that are drawn need none that fit."""
    folder = edited("modelopt-fp8", tmp_path, weight=ZEROS)
    assert planned(folder).errors
    assert not planned(folder, load_format="dummy").errors


def names_of(target: Target) -> Iterator[str]:
    """Yield every name under which a target is looked for."""
    yield from (target.name, *target.aliases)


def agree(folder: Path, **options: Any) -> None:
    """Check that planning wants of every name just what the parameters of the built model are filled with."""
    plan = planned(folder, **options)
    backend = reference_attention.create(rebuild.attention_needs(plan), META)
    filled = {
        name: Wanted(str(target.view.dtype).removeprefix("torch.") if target.rows is None else target.rows.dtype, target.shape)
        for target in targets(build.build_model(plan, backend, META))
        for name in names_of(target)
        if not name.endswith(".act.scales")  # of an activation: no table declares them
    }
    table, scheme = rebuild.weight_table(plan), rebuild.scheme(plan)
    held = stored_tensors(table, axes.Unquantized(plan.dtype) if "quantization" in options else scheme)
    queries = QUERIES if plan.attention_compute == FP8_ATTENTION else ()
    wanted = wanted_scales(filled, table, queries) | wanted_tensors(table, held, plan.dtype)
    assert filled == wanted


@pytest.mark.parametrize("name", NAMES)
def test_planning_wants_of_published_checkpoints_what_loading_does(name: str) -> None:
    """Every name, dtype and shape, of published FP8 checkpoints."""
    agree(PUBLISHED / name)
    assert not planned(PUBLISHED / name).errors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*WRITTEN, *STORES, *(f"kept {name}" for name in FORMATS), "none", "online"])
def test_planning_wants_what_loading_does(tmp_path: Path, family: str, name: str) -> None:
    """Every name, dtype and shape, of every format with every family; and no checkpoint that is right is refused."""
    raw, options = dict(FAMILIES[family][1]), {"quantization": "fp8"} if name == "online" else {}
    if name in WRITTEN or name in STORES:
        format_: Written = WRITTEN[name] if name in WRITTEN else written(name, torch.float32)
        written_to(tmp_path, family, format_)
        raw["quantization_config"] = format_.entry
    elif name not in ("none", "online"):
        raw["quantization_config"] = FORMATS[name.removeprefix("kept ")].entry(GROUP)
    architecture = "LlamaForCausalLM" if family == "llama" else "FalconForCausalLM"
    folder = config_only(tmp_path, architectures=[architecture], **raw)
    assert not planned(folder, **options).errors
    agree(folder, **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_planning_wants_of_tied_heads_and_biases_what_loading_does(tmp_path: Path, tied: bool, bias: bool) -> None:
    """A copy of the embedding's table under the head's name is compared too."""
    raw = FAMILIES["llama"][1] | {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    agree(config_only(tmp_path, **raw))
    agree(tmp_path, kv_cache_dtype="fp8", attention_compute="fp8", attention_backend="torch")
