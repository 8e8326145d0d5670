"""What planning makes of a checkpoint's tensor names, and of plain ones that are to be quantised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from attrs import evolve, frozen
from core.tests.planning.made import HERE, RAW, gpus, planned, registry, source

from paddock.axes import VOCAB, Linear, Tensor, TensorAxis
from paddock.config import EngineConfig
from paddock.errors import ModelConfigError, PaddockError, PlanError
from paddock.planning import rebuild
from paddock.planning.plan import Plan
from paddock.planning.resolve import resolve
from paddock.planning.serial import from_json, to_json
from paddock.plugins import CheckpointFacts, QuantizationSpec, hookimpl

GROUPED = {"quantization_config": {"quant_method": "grouped"}}
LINEARS = ("q", "k", "v", "o", "up", "down")
PLAIN = {f"layers.{i}.{linear}.weight" for i in range(4) for linear in LINEARS} | {"head.weight"}
WORDS = {f"layers.{i}.{linear}.{name}" for i in range(4) for linear in LINEARS for name in ("words", "scales")} | {"head.weight"}
NORMS = {f"{prefix}norm.{name}" for prefix in ("", *(f"layers.{i}." for i in range(4))) for name in ("weight", "bias")}
REST = NORMS | {"tokens.weight"} | {f"layers.{i}.{linear}.bias" for i in range(4) for linear in "qkv"}
KV_SCALES = {f"layers.{i}.{name}" for i in range(4) for name in ("k_proj.k_scale", "v_proj.v_scale")}


@frozen(kw_only=True)
class Halved:
    """One byte a weight, and a scale a row."""

    dtype: str
    name: str = "halved"
    kv_cache_dtype: str | None = None

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return values and scales, or the plain weight of the head."""
        axes = (TensorAxis("out"), TensorAxis("in"))
        if linear.out[0].axis == VOCAB:
            return (Tensor("weight", self.dtype, axes),)
        return (Tensor("weight", "int8", axes), Tensor("weight_scale", "float32", (axes[0], TensorAxis("in", group=-1))))


def detect_halved(facts: CheckpointFacts) -> Halved | None:
    """Return the scheme of a checkpoint that says `halved`."""
    entry = facts.config.get("quantization_config") or {}
    return halve(facts) if entry.get("quant_method") == "halved" else None


def halve(facts: CheckpointFacts) -> Halved:
    """Return the scheme a plain checkpoint is kept in."""
    return Halved(dtype=facts.dtype)


class HalvingPlugin:
    """Brings a format that plain checkpoints may be quantised to."""

    @hookimpl
    def paddock_quantizations(self) -> list[QuantizationSpec]:
        """Return the format."""
        here = __name__
        return [QuantizationSpec(name="halved", detect=f"{here}:detect_halved", method=f"{HERE}:method", online=f"{here}:halve")]


def with_names(names: Iterable[str], raw: dict[str, Any] | None = None, plugins: tuple[object, ...] = (), **options: Any) -> Plan:
    """Return the plan of a folder whose weights hold these tensors and REST, with the backend that serves every format."""
    return of_names(REST.union(names), raw, plugins, **options)


def of_names(names: Iterable[str], raw: dict[str, Any] | None = None, plugins: tuple[object, ...] = (), **options: Any) -> Plan:
    """Return the plan of a folder whose weights hold these tensors alone."""
    files = source({**RAW, **(raw or {})}, tensor_names=frozenset(names))
    return resolve(EngineConfig(model="made", attention_backend="torch", **options), registry(*plugins), gpus(), files)


def test_a_plain_checkpoint_is_quantised_when_a_format_that_can_is_asked_for() -> None:
    """The ledger counts what is kept, the choice says why, and a worker finds the same scheme in the plan's JSON."""
    plan, plain = planned(plugins=[HalvingPlugin()], quantization="halved"), planned()
    assert plan.choice("quantization").value == "halved"
    assert "plain" in plan.choice("quantization").reason
    outs = 64 + 32 + 32 + 64 + 128 + 64  # rows of a layer's linears, each with a scale of four bytes; biases of q, k and v
    weights = (plain.ledger.weights.layers - 4 * 2 * 128) // 2
    assert plan.ledger.weights.layers == weights + 4 * (4 * outs + 2 * 128)
    assert rebuild.scheme(from_json(to_json(plan))) == Halved(dtype="bfloat16")
    assert planned(plugins=[HalvingPlugin()]).quantization is None


def test_a_format_that_cannot_names_those_that_can() -> None:
    """Asking for a checkpoint's format on a plain one is an error with the way out."""
    with pytest.raises(PlanError, match="'grouped', but the checkpoint is not quantised") as caught:
        planned(plugins=[HalvingPlugin()], quantization="grouped")
    assert caught.value.fix.endswith("quantised while it is read as halved")


def test_another_format_than_the_checkpoints_is_refused() -> None:
    """Both names are said; nothing is quantised twice."""
    with pytest.raises(PlanError, match="quantization is 'halved', but the checkpoint is quantised as 'grouped'"):
        planned(GROUPED, plugins=[HalvingPlugin()], quantization="halved")


@pytest.mark.parametrize(
    ("entry", "files", "said"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}, "'modelopt' (quant_algo 'NVFP4')"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            {},
            "'compressed-tensors' (format 'pack-quantized')",
        ),
        (None, {"hf_quant_config.json": {"quantization": {"quant_algo": "W4A8_AWQ"}}}, "'modelopt' (quant_algo 'W4A8_AWQ')"),
        ({"quant_method": "bitsandbytes"}, {}, "'bitsandbytes'"),
        (None, {"hf_quant_config.json": {"quantization": {"quant_algo": None}}}, "'modelopt' (quant_algo None)"),
    ],
)
def test_a_format_nobody_reads_is_named_with_what_tells_it_apart(entry: Any, files: Any, said: str) -> None:
    """One tool writes many formats: the error says which."""
    raw = RAW if entry is None else RAW | {"quantization_config": entry}
    with pytest.raises(PaddockError) as caught:
        resolve(EngineConfig(model="made"), registry(), gpus(), source(raw, quantization_files=files))
    assert f"quantised as {said}" in caught.value.message


@pytest.mark.parametrize("entry", ["fp8", ["fp8"], 8, True])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_description_that_is_no_object_is_refused(key: str, entry: Any) -> None:
    """It says that the weights are quantised, so they are not read as plain ones."""
    with pytest.raises(ModelConfigError, match=f"{key} is ") as caught:
        resolve(EngineConfig(model="made"), registry(), gpus(), source(RAW | {key: entry}))
    assert "must be an object" in caught.value.fix


def test_a_gpu_too_old_for_a_format_is_refused_by_plan() -> None:
    """The error names the format, what it needs and what there is, before anything is allocated."""

    class Demanding:
        @hookimpl
        def paddock_quantizations(self) -> Any:
            (spec,) = HalvingPlugin().paddock_quantizations()
            return [evolve(spec, min_compute_capability=(8, 9))]

    with pytest.raises(PlanError, match=r"halved needs compute capability 8\.9, Made GPU has 8\.0") as error:
        planned({}, gpus(capability=(8, 0)), plugins=[Demanding()], quantization="halved")
    assert error.value.fix == "use a GPU of compute capability 8.9 or later"
    assert planned({}, gpus(capability=(8, 9)), plugins=[Demanding()], quantization="halved").quantization is not None


@pytest.mark.parametrize(("names", "raw"), [(PLAIN, {}), (WORDS | KV_SCALES, GROUPED), ({*PLAIN, "layers.0.up.bias"}, {})])
def test_tensors_as_the_config_describes_them_are_no_issue(names: set[str], raw: dict[str, Any]) -> None:
    """Biases, norms, embeddings and KV scales are none of a format's tensors."""
    assert not with_names(names, raw).issues


@pytest.mark.parametrize(
    ("names", "raw", "said"),
    [
        (PLAIN, GROUPED, "layers.0.down: config.json means scales, words; the checkpoint holds weight"),
        (WORDS, {}, "layers.0.down: config.json means weight; the checkpoint holds scales, words"),
        (WORDS - {"layers.2.o.scales"}, GROUPED, "layers.2.o: config.json means scales, words; the checkpoint holds words"),
        (
            PLAIN | {"layers.1.q.weight_scale"},
            {},
            "layers.1.q: config.json means weight; the checkpoint holds weight, weight_scale",
        ),
        (PLAIN - {"head.weight"}, {}, "head: config.json means weight; the checkpoint holds nothing"),
    ],
)
def test_config_and_tensors_that_disagree_are_one_error_with_both(names: set[str], raw: dict[str, Any], said: str) -> None:
    """The plan says, linear by linear, what config.json means and what the weights hold."""
    (issue,) = with_names(names, raw, kv_cache_dtype="bfloat16").errors
    assert issue.code == "checkpoint_disagrees"
    assert said in issue.message


@pytest.mark.parametrize(("name", "whose"), [("scaled_zeros", "llm-awq"), ("SCB", "bitsandbytes")])
def test_tensors_of_a_format_that_nothing_reads_are_said_to_be_its(name: str, whose: str) -> None:
    """Whatever config.json says: by what it alone calls them, with what is read."""
    (issue,) = with_names(PLAIN | {f"layers.1.q.{name}"}, kv_cache_dtype="bfloat16").errors
    assert f"tensors called {name} are {whose}'s, which nothing here reads" in issue.fix
    assert "paddock list quantizations" in issue.fix


def test_a_long_disagreement_is_cut() -> None:
    """Ten linears are shown, the others counted."""
    (issue,) = with_names(PLAIN, GROUPED, kv_cache_dtype="bfloat16").errors
    assert issue.message.endswith("and 14 more")
    assert issue.message.count("the checkpoint holds") == 10


def test_a_plain_checkpoint_to_be_quantised_must_be_plain() -> None:
    """What is read is the plain weight, whatever is kept."""
    asked: dict[str, Any] = {"plugins": (HalvingPlugin(),), "quantization": "halved"}
    assert not with_names(PLAIN, **asked).issues
    assert [issue.code for issue in with_names(WORDS, **asked).errors] == ["checkpoint_disagrees"]


@pytest.mark.parametrize("gone", [{"tokens.weight"}, {"norm.bias"}, {"layers.2.k.bias", "layers.3.norm.weight"}, REST])
def test_embeddings_norms_and_biases_that_are_missing_are_said(gone: set[str]) -> None:
    """All of them by name, the first ten where there are more."""
    (error,) = of_names((PLAIN | REST) - gone).issues
    assert (error.level, error.code) == ("error", "weights_are_missing")
    first, *listed = error.message.split("\n    ")
    assert f"does not hold {len(gone)} of the model's tensors" in first
    said = {f"{name}: missing" for name in gone}
    assert listed[-1] == f"and {len(gone) - 10} more" if len(gone) > 10 else set(listed) == said
    assert said.issuperset(listed[:10])


def test_what_is_there_in_place_of_what_is_missing_is_said_too() -> None:
    """Not what is read, nor what may stay unread."""
    names = (PLAIN | REST | KV_SCALES | {"layers.0.q_scale", "model.last.weight"}) - {"norm.weight"}
    (error,) = of_names(names).issues
    assert error.message.split("\n    ")[1:] == [
        "norm.weight: missing",
        "model.last.weight: unexpected, nothing of the model takes it",
    ]


def test_a_tied_table_may_be_held_under_either_name() -> None:
    """Its own or the head's; the error names both where neither is there."""
    names = (PLAIN | REST) - {"head.weight", "tokens.weight"}
    for name in ("head.weight", "tokens.weight"):
        assert not of_names({*names, name}, {"tied": True}).issues
    (error,) = of_names(names, {"tied": True}).issues
    assert error.message.endswith("\n    tokens.weight or head.weight: missing")


def test_a_plain_checkpoint_to_be_quantised_lacks_a_bias() -> None:
    """What is read is compared, whatever is kept."""
    plan = of_names((PLAIN | REST) - {"layers.1.v.bias"}, plugins=(HalvingPlugin(),), quantization="halved")
    assert [(issue.code, issue.message.splitlines()[1:]) for issue in plan.issues] == [
        ("weights_are_missing", ["    layers.1.v.bias: missing"])
    ]


def test_dummy_weights_agree_with_everything() -> None:
    """What is not read is not compared."""
    assert not with_names(WORDS, load_format="dummy").issues


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        (set(), "no scales of FP8 keys and values for every layer"),
        ({name for name in KV_SCALES if "layers.2" not in name}, "for 1 of 4 layers"),
        ({name for name in KV_SCALES if "k_scale" in name}, "for every layer"),
        (KV_SCALES, None),
        ({f"layers.{i}.attention.kv_scale" for i in range(4)}, None),
        ({f"layers.{i}.{kind}_proj.output_scale" for i in range(4) for kind in "kv"}, None),
    ],
)
def test_kv_scales_that_are_announced_and_missing_are_said(scales: set[str], said: str | None) -> None:
    """A scheme that is made for FP8 KV needs a scale for keys and one for values in each layer, under any name."""
    issues = with_names(WORDS | scales, GROUPED).issues
    assert [issue.code for issue in issues] == ([] if said is None else ["kv_scales_are_one"])
    assert said is None or said in issues[0].message
    assert all(issue.level == "error" for issue in with_names(WORDS | scales, GROUPED, strict=True).issues)
