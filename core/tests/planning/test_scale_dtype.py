"""What dtype scales are kept in: that of the weights' files, as far as they are at hand and the format leaves a choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from core.tests.planning.made import HERE, RAW, Grouped, gpus, registry, source
from safetensors.torch import save_file

from paddock.axes import VOCAB, Linear, Tensor, TensorAxis
from paddock.checkpoint.index import stored_names
from paddock.config import EngineConfig
from paddock.planning import rebuild
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.planning.serial import fingerprint, from_json, to_json
from paddock.plugins import CheckpointFacts, QuantizationSpec, hookimpl

SCALED = {"quantization_config": {"quant_method": "scaled"}}
LINEARS = {"q": 64, "k": 32, "v": 32, "o": 64, "up": 128, "down": 64}  # and their outputs
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@frozen(kw_only=True)
class Scaled:
    """A byte a weight, and a scale a row in any float dtype."""

    dtype: str
    scale_dtype: str = "float16"
    scale_name: str = "scales"
    name: str = "scaled"
    kv_cache_dtype: str | None = None

    def with_scale_dtype(self, dtype: str) -> Scaled:
        """Return it with scales in another dtype."""
        return evolve(self, scale_dtype=dtype)

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return bytes and scales, or the plain weight of the head."""
        axes = (TensorAxis("out"), TensorAxis("in"))
        if linear.out[0].axis == VOCAB:
            return (Tensor("weight", self.dtype, axes),)
        return (Tensor("bytes", "uint8", axes), Tensor("scales", self.scale_dtype, (axes[0],)))


def detect_scaled(facts: CheckpointFacts) -> Scaled | None:
    """Return the scheme of a checkpoint that says `scaled`."""
    entry = facts.config.get("quantization_config") or {}
    return Scaled(dtype=facts.dtype) if entry.get("quant_method") == "scaled" else None


class ScalingPlugin:
    """Brings the format."""

    @hookimpl
    def paddock_quantizations(self) -> list[QuantizationSpec]:
        """Return it."""
        return [QuantizationSpec(name="scaled", detect=f"{__name__}:detect_scaled", method=f"{HERE}:method")]


def plan_of(folder: Path, scales: dict[str, torch.dtype] | torch.dtype | None, raw: dict[str, Any] = SCALED) -> Plan:
    """Return the plan of a folder whose linears have scales of these dtypes, by the linear's name; None for no weights."""
    if scales is not None:
        dtypes = scales if isinstance(scales, dict) else dict.fromkeys(LINEARS, scales)
        stored = {f"layers.{i}.{name}.scales": torch.zeros(1, dtype=dtypes[name]) for i in range(4) for name in LINEARS}
        bytes_ = {name.replace("scales", "bytes"): torch.zeros(1, dtype=torch.uint8) for name in stored}
        more = {"layers.0.act.scales": torch.zeros(1, dtype=torch.float64), "head.weight": torch.zeros(1)}
        save_file(stored | bytes_ | more, folder / "model.safetensors")
    files = evolve(source(RAW | raw, tensor_names=stored_names(folder)), folder=folder)
    return resolve(EngineConfig(model="made", attention_backend="torch"), registry(ScalingPlugin()), gpus(), files)


@pytest.mark.parametrize(
    ("scales", "kept", "reason"),
    [
        (F32, "float32", "as the checkpoint stores them"),
        (BF16, "bfloat16", "as the checkpoint stores them"),
        (F16, "float16", "as the checkpoint stores them"),
        (torch.float64, "float32", "the checkpoint stores them in float64"),
        (dict.fromkeys(LINEARS, F16) | {"v": F32}, "float32", "the checkpoint stores them in float16, float32"),
        (dict.fromkeys(LINEARS, F16) | {"down": BF16}, "float32", "the checkpoint stores them in bfloat16, float16"),
        (torch.int32, "float16", "usual for scaled: no file of weights at hand says otherwise"),
        (None, "float16", "usual for scaled: no file of weights at hand says otherwise"),
    ],
)
def test_scales_are_kept_in_a_dtype_that_holds_all_that_are_stored(
    tmp_path: Path, scales: dict[str, torch.dtype] | torch.dtype | None, kept: str, reason: str
) -> None:
    """Of every part of a fused product, not of tensors that are no linear's; the ledger counts them, the worker knows."""
    plan = plan_of(tmp_path, scales)
    assert (plan.scale_dtype, plan.choice("scale_dtype").value, plan.choice("scale_dtype").reason) == (kept, kept, reason)
    rows, weights, biases = sum(LINEARS.values()), 64 * 128 + 64 * 64 + 2 * 64 * 128, 2 * 128
    assert plan.ledger.weights.layers == 4 * (weights + biases + rows * (4 if kept == "float32" else 2))
    worker = from_json(to_json(plan))
    assert rebuild.scheme(worker) == Scaled(dtype="bfloat16", scale_dtype=kept)


def test_files_that_are_not_sound_say_nothing(tmp_path: Path) -> None:
    """Loading says what is wrong with them; the plan takes what is usual."""
    plan_of(tmp_path, F32)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    assert plan_of(tmp_path, None).scale_dtype == "float16"


def test_a_format_that_leaves_no_choice_has_no_such_field(tmp_path: Path) -> None:
    """Its scales are as it declares them, whatever is stored; nothing is written down."""
    plan = plan_of(tmp_path, F32, {"quantization_config": {"quant_method": "grouped"}})
    assert plan.scale_dtype is None
    assert "scale_dtype" not in {choice.name for choice in plan.choices}
    assert rebuild.scheme(from_json(to_json(plan))) == Grouped(dtype="bfloat16")


def test_plans_that_keep_scales_otherwise_share_no_compiled_kernels(tmp_path: Path) -> None:
    """The dtype is part of the fingerprint."""
    assert fingerprint(plan_of(tmp_path, F32)) != fingerprint(plan_of(tmp_path, F16))
