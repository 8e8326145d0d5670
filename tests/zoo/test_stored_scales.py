"""4-bit checkpoints whose scales are stored in float32, or in several dtypes: kept as they are stored, and counted so."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.quant_awq.tests.written import FORMATS, Meaning, awq, gptq, packed, unpacked
from safetensors.torch import load_file, save_file
from torch import Tensor

from paddock.planning import int4_compute
from paddock.planning.plan import Plan
from paddock.planning.serial import from_json, to_json
from paddock.testing.oracle import relative_rms
from tests.zoo.formats import Written
from tests.zoo.test_fp8_plans import TOKENS
from tests.zoo.test_published_fp8 import built, logits, planned
from tests.zoo.test_quantised_checkpoints import FAMILIES, plain, written_to

GROUP = 16
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
STORES: dict[str, Callable[..., Meaning]] = {
    "awq": awq,
    "gptq": gptq,
    "gptq-asymmetric": partial(gptq, symmetric=False),
    "auto-round-gptq": gptq,
    "auto-round-awq": awq,
    "packed": packed,
    "packed-asymmetric": partial(packed, symmetric=False),
    "unpacked": unpacked,
    "packed-w4a8": packed,
}


def written(name: str, dtype: torch.dtype) -> Written:
    """Return a format whose scales are stored in `dtype`."""
    return Written(entry=FORMATS[name].entry(GROUP), store=lambda weight_OI: STORES[name](weight_OI, GROUP, dtype=dtype))


def folder_of(parent: Path, name: str, dtype: torch.dtype, family: str = "llama") -> tuple[Path, dict[str, Tensor]]:
    """Write a whole folder, its config.json saying bfloat16; return it and the weights it stands for."""
    folder = parent / f"{name}-{str(dtype).removeprefix('torch.')}"
    folder.mkdir()
    meant = written_to(folder, family, written(name, dtype))
    architecture = "LlamaForCausalLM" if family == "llama" else "FalconForCausalLM"
    raw: dict[str, Any] = {"architectures": [architecture], "dtype": "bfloat16", **FAMILIES[family][1]}
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": written(name, dtype).entry}))
    return folder, meant


def in_16_bits(folder: Path, dtype: torch.dtype) -> None:
    """Round the scales of a folder, as reading them into 16 bits would."""
    stored = load_file(folder / "model.safetensors")
    rounded = {name: x.to(dtype) if name.endswith((".scales", "weight_scale")) else x for name, x in stored.items()}
    save_file(rounded, folder / "model.safetensors")


def held(plan: Plan, folder: Path, *names: str) -> int:
    """Return the bytes of the loaded parameters of these names, of all linears."""
    parameters = dict(built(plan, folder).model.named_parameters())
    return sum(x.nbytes for name, x in parameters.items() if name.endswith(names))


@pytest.mark.parametrize("name", STORES)
def test_float32_scales_give_the_logits_of_what_they_stand_for(tmp_path: Path, name: str) -> None:
    """The same codes with scales of 16 bits are 50 times as far from the exact arithmetic, or further."""
    folder, meant = folder_of(tmp_path, name, F32)
    plan = planned(folder, int4_compute="w4a16")
    assert (plan.scale_dtype, plan.choice("scale_dtype").reason) == ("float32", "as the checkpoint stores them")
    exact = logits(plain("llama", written(name, F32), meant), TOKENS)
    error = relative_rms(logits(built(plan, folder), TOKENS), exact)
    for dtype in (F16, BF16):
        in_16_bits(folder, dtype)
        rounded = planned(folder, int4_compute="w4a16")
        assert rounded.scale_dtype == str(dtype).removeprefix("torch.")
        assert relative_rms(logits(built(rounded, folder), TOKENS), exact) > 50 * error


@pytest.mark.parametrize("name", STORES)
def test_the_ledger_counts_scales_as_they_are_kept(tmp_path: Path, name: str) -> None:
    """Four bytes a group in float32, two in 16 bits, those that fill up tiles too: as many as the loaded layers hold."""
    counted, kept = {}, {}
    for dtype in (F32, BF16):
        folder, _ = folder_of(tmp_path, name, dtype)
        plan = planned(folder, int4_compute="w4a16")
        counted[dtype] = plan.ledger.weights.layers
        kept[dtype] = held(plan, folder, "group_scales")
        if name in ("awq", "packed", "packed-asymmetric"):  # the others are smaller once they are repacked
            assert counted[dtype] == held(plan, folder, "packed", "group_scales", "group_zeros")
    groups = sum(-(-outs // 64) * 64 * 128 // GROUP for outs in (32 + 16 + 16, 32, 48 + 48, 32))  # inputs fill up 128
    assert (kept[F32], kept[BF16]) == (2 * 4 * groups, 2 * 2 * groups)
    assert counted[F32] - counted[BF16] == kept[F32] - kept[BF16]


@pytest.mark.parametrize("compute", ["w4a16", "w4a8", "w8a8"])
def test_every_way_to_multiply_takes_float32_scales(tmp_path: Path, compute: str) -> None:
    """With inputs as they are, rounded to FP8, and weights rounded too."""
    folder, meant = folder_of(tmp_path, "awq", F32)
    exact = logits(plain("llama", written("awq", F32), meant), TOKENS)
    assert relative_rms(logits(built(planned(folder, int4_compute=compute), folder), TOKENS), exact) < 0.1


@pytest.mark.parametrize(("name", "family"), [("awq", "llama"), ("packed", "llama"), ("awq", "falcon-40b")])
def test_fp8_weights_that_are_kept_give_the_logits_of_those_that_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, family: str
) -> None:
    """To the bit, where every step is a large one; and take the bytes that the plan counts."""
    folder, _ = folder_of(tmp_path, name, F16, family)
    monkeypatch.setattr(int4_compute, "W8A8_FROM", 2)
    w4a8, made, kept = (
        planned(folder, int4_compute=compute, keep_fp8_weights=keep)
        for compute, keep in (("w4a8", False), ("w8a8", False), ("w8a8", True))
    )
    found = [logits(built(plan, folder), TOKENS) for plan in (w4a8, made, kept)]
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[1])
    assert held(kept, folder, "fp8_weight") == kept.ledger.weights.copies > 0
    assert held(made, folder, "fp8_weight") == made.ledger.weights.copies == 0


def test_scales_of_several_dtypes_are_kept_in_one_that_holds_all(tmp_path: Path) -> None:
    """One linear in float16, the others in bfloat16: neither holds the other's, float32 holds both."""
    folder, _ = folder_of(tmp_path, "gptq", BF16)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.scales"
    save_file(stored | {name: stored[name].half()}, folder / "model.safetensors")
    plan = planned(folder)
    assert plan.choice("scale_dtype").value == "float32"
    assert plan.choice("scale_dtype").reason == "the checkpoint stores them in bfloat16, float16"


def test_float32_scales_beyond_16_bits_are_read(tmp_path: Path) -> None:
    """Smaller than float16 can be: they used to become 0."""
    folder, _ = folder_of(tmp_path, "gptq", F32)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.scales"
    save_file(stored | {name: stored[name] * 1e-9}, folder / "model.safetensors")
    assert torch.isfinite(logits(built(planned(folder), folder), TOKENS)).all()


def test_scales_of_an_activation_say_nothing_of_those_of_weights(tmp_path: Path) -> None:
    """Falcon's `mlp.act.scales` in float32 beside weights whose scales are float16."""
    folder, _ = folder_of(tmp_path, "awq", F16, "falcon-40b")
    stored = load_file(folder / "model.safetensors")
    more = {f"transformer.h.{i}.mlp.act.scales": torch.ones(128) for i in range(2)}
    save_file(stored | more, folder / "model.safetensors")
    assert planned(folder).scale_dtype == "float16"


def test_shards_are_looked_into_and_a_plan_without_weights_takes_what_is_usual(tmp_path: Path) -> None:
    """The index names no dtypes; where a file of it is missing nothing is known, and the plan says so."""
    folder, _ = folder_of(tmp_path, "awq", F32)
    stored = load_file(folder / "model.safetensors")
    halves = {f"model-0000{i}-of-00002.safetensors": sorted(stored)[i - 1 :: 2] for i in (1, 2)}
    for file, names in halves.items():
        save_file({name: stored[name] for name in names}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, names in halves.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert planned(folder).scale_dtype == "float32"
    (folder / "model-00002-of-00002.safetensors").unlink()
    plan = planned(folder)
    assert plan.scale_dtype == "float16"
    assert plan.choice("scale_dtype").reason == "usual for awq: no file of weights at hand says otherwise"


def test_a_worker_keeps_scales_as_planned(tmp_path: Path) -> None:
    """From the plan's JSON alone, and loads the very same numbers."""
    folder, _ = folder_of(tmp_path, "packed", F32)
    plan = planned(folder)
    here, there = (dict(built(each, folder).model.named_parameters()) for each in (plan, from_json(to_json(plan))))
    scales = {name: x for name, x in here.items() if name.endswith("group_scales")}
    assert {x.dtype for x in scales.values()} == {F32}
    assert all(torch.equal(x, there[name]) for name, x in scales.items())
