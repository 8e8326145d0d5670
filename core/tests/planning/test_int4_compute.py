"""How products with 4-bit weights take their inputs: chosen once, with a reason, and refused where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve, frozen
from core.tests.planning.made import HEAD, LAYERS, MLP, NUM_KV, WIDTH, Grouped, cpu, gpus, planned

from paddock.axes import Scheme
from paddock.errors import OptionError, PlanError
from paddock.planning import rebuild
from paddock.planning.hardware import GIB
from paddock.planning.int4_compute import W4A8_FROM, W8A8_FROM
from paddock.planning.padding import Padding, StepShape
from paddock.planning.serial import fingerprint, from_json, to_json
from paddock.plugins import CheckpointFacts, QuantizationSpec, hookimpl

HERE = __name__
OUTPUTS = 3 * WIDTH + 2 * NUM_KV * HEAD + MLP  # of a layer's linears: q, o and down; k and v; up


@frozen(kw_only=True)
class Rounding(Grouped):
    """The made-up format, whose inputs can be rounded to FP8 from some number of tokens on."""

    name: str = "rounding"
    fp8_inputs_from: int | None = None
    fp8_weights_from: int | None = None
    keeps: bool = False

    def with_fp8_from(self, inputs: int | None, weights: int | None, *, keep: bool = False) -> Scheme:
        """Return the scheme with other numbers."""
        return evolve(self, fp8_inputs_from=inputs, fp8_weights_from=weights, keeps=keep)


def detect(facts: CheckpointFacts) -> Rounding | None:
    """Return the scheme of a checkpoint that says `rounding`; its `fp8` says that it was made for rounded inputs."""
    entry = facts.config.get("quantization_config") or {}
    made_for = 1 if entry.get("fp8") else None
    return Rounding(dtype=facts.dtype, fp8_inputs_from=made_for) if entry.get("quant_method") == "rounding" else None


class RoundingPlugin:
    """Brings the format."""

    @hookimpl
    def paddock_quantizations(self) -> list[QuantizationSpec]:
        """Return it."""
        return [QuantizationSpec(name="rounding", detect=f"{HERE}:detect", method=f"{HERE}:method")]


def chosen(hardware: Any = None, *, fp8: bool = False, **options: Any) -> Any:
    """Return the plan of a 4-bit checkpoint."""
    raw = {"quantization_config": {"quant_method": "rounding", "fp8": fp8}}
    return planned(raw, hardware, plugins=[RoundingPlugin()], **options)


def test_few_tokens_stay_as_they_are_and_many_are_rounded_on_a_gpu() -> None:
    """The border is in the plan, and in what it says."""
    plan = chosen()
    assert plan.fp8_inputs_from == W4A8_FROM
    choice = plan.choice("int4_compute")
    assert choice.value == f"w4a16 below {W4A8_FROM} tokens a step, w4a8 from there on"
    assert "docs/benchmarks/quality.md" in choice.reason
    reasons = {each.value: each.reason for each in choice.rejected}
    assert reasons.keys() == {"w4a16", "w4a8"}
    assert "15 % sooner" in reasons["w4a8"]


def test_a_small_step_counts_as_it_is_padded() -> None:
    """More than 8 decodes are 16 tokens, so they are rounded, captured or not; 8 are not."""
    padded = {decodes: Padding(256).padded(StepShape(decodes=decodes)) for decodes in (8, 9, 15, 16)}
    assert {decodes: shape.tokens >= W4A8_FROM for decodes, shape in padded.items() if shape} == {
        8: False,
        9: True,
        15: True,
        16: True,
    }


@pytest.mark.parametrize(
    ("hardware", "options", "why"),
    [
        (cpu(), {}, "a CPU has no FP8 products"),
        (gpus(capability=(8, 0)), {"dtype": "bfloat16"}, r"needs compute capability 8.9, Made GPU has 8.0"),
        (gpus(), {"dtype": "float32"}, "float32 is chosen to be exact"),
    ],
)
def test_inputs_stay_as_they_are_where_rounding_wins_nothing(hardware: Any, options: Any, why: str) -> None:
    """On a CPU, on a GPU without FP8 and in float32; the plan says why."""
    plan = chosen(hardware, **options)
    assert plan.fp8_inputs_from is None
    (rejected,) = plan.choice("int4_compute").rejected
    assert plan.choice("int4_compute").value == "w4a16"
    assert (rejected.value, why in rejected.reason) == ("w4a8", True)


@pytest.mark.parametrize("hardware", [cpu(), gpus(), gpus(capability=(8, 9))])
def test_what_is_asked_for_is_taken(hardware: Any) -> None:
    """Both, whatever the checkpoint was made for; a CPU computes the definition."""
    for fp8 in (False, True):
        assert chosen(hardware, fp8=fp8, int4_compute="w4a8").fp8_inputs_from == 1
        plan = chosen(hardware, fp8=fp8, int4_compute="w4a16")
        assert plan.fp8_inputs_from is None
        assert plan.choice("int4_compute").reason == "asked for"


def test_a_checkpoint_made_for_rounded_inputs_gets_them() -> None:
    """For every step, on a CPU too; the plan says why, and what else there is."""
    for hardware in (cpu(), gpus()):
        plan = chosen(hardware, fp8=True)
        assert plan.fp8_inputs_from == 1
        assert plan.choice("int4_compute").reason == "the checkpoint was made for it"


@pytest.mark.parametrize(
    ("options", "says"),
    [({"int4_compute": "w4a8"}, "int4_compute is 'w4a8', which needs"), ({"fp8": True}, "rounding computes w4a8, which needs")],
)
def test_fp8_inputs_on_a_gpu_without_fp8_are_refused(options: Any, says: str) -> None:
    """Asked for or the checkpoint's: the error has the GPU, what it lacks and the way out, which works."""
    old = gpus(capability=(8, 0))
    with pytest.raises(PlanError, match=f"{says} compute capability 8.9, Made GPU has 8.0") as error:
        chosen(old, **options)
    assert error.value.fix == "set int4_compute to w4a16, or use a GPU of compute capability 8.9 or later"
    assert chosen(old, **options | {"int4_compute": "w4a16"}).fp8_inputs_from is None


def test_weights_of_large_steps_may_be_rounded_where_that_is_asked_for() -> None:
    """The plan says from how many tokens on, what it costs, and counts the weight that is held beside the step."""
    plan, w4a8 = chosen(int4_compute="w8a8"), chosen(int4_compute="w4a8")
    assert (plan.fp8_inputs_from, plan.fp8_weights_from) == (1, W8A8_FROM)
    choice = plan.choice("int4_compute")
    assert choice.value == f"w4a8 below {W8A8_FROM} tokens a step, weights rounded to FP8 from there on"
    assert "docs/benchmarks/quality.md" in choice.reason
    assert plan.ledgers[0].workspace.weights == MLP * WIDTH
    assert w4a8.ledgers[0].workspace.weights == 0
    assert plan.weight_bytes - w4a8.weight_bytes == 4 * LAYERS * OUTPUTS  # a float32 scale an output of 4 bits
    small = chosen(int4_compute="w8a8", max_num_batched_tokens=W8A8_FROM - 1)
    assert small.ledgers[0].workspace.weights == 0
    assert getattr(rebuild.scheme(from_json(to_json(plan))), "fp8_weights_from", 0) == W8A8_FROM


def test_rounded_weights_may_be_kept_where_that_is_asked_for() -> None:
    """The plan says so and counts a byte a weight, in all layers, and no weight beside the step; a worker is told."""
    made, plan = chosen(int4_compute="w8a8"), chosen(int4_compute="w8a8", keep_fp8_weights=True)
    assert [each.value for each in made.choice("int4_compute").rejected] == ["keep_fp8_weights"]
    assert plan.choice("int4_compute").value == f"{made.choice('int4_compute').value}, and kept"
    weights = LAYERS * (2 * WIDTH * WIDTH + 2 * NUM_KV * HEAD * WIDTH + 2 * MLP * WIDTH)
    assert plan.ledgers[0].weights == evolve(made.ledgers[0].weights, copies=weights)
    assert plan.weight_bytes - made.weight_bytes == weights
    assert plan.ledgers[0].workspace.weights == 0
    assert [getattr(rebuild.scheme(from_json(to_json(each))), "keeps", None) for each in (made, plan)] == [False, True]
    assert fingerprint(made) != fingerprint(plan)


@pytest.mark.parametrize(
    ("options", "says", "fix"),
    [
        ({}, "int4_compute is 'auto', which rounds none", "set int4_compute to w8a8 with 4-bit weights"),
        ({"int4_compute": "w4a8"}, "int4_compute is 'w4a8', which rounds none", "set int4_compute to w8a8"),
        (
            {"int4_compute": "w8a8", "max_num_batched_tokens": W8A8_FROM - 1},
            f"for steps of {W8A8_FROM} tokens and more, and the largest has {W8A8_FROM - 1}",
            f"raise max_num_batched_tokens to {W8A8_FROM} or more, or leave out keep_fp8_weights",
        ),
    ],
)
def test_to_keep_weights_that_no_step_rounds_is_refused(options: Any, says: str, fix: str) -> None:
    """Before memory is taken for nothing, with what rounds them."""
    with pytest.raises(PlanError, match=says) as error:
        chosen(keep_fp8_weights=True, **options)
    assert fix in str(error.value.fix)


def test_to_keep_weights_that_are_not_4_bit_is_refused() -> None:
    """Whatever else is asked."""
    for asked in ("auto", "w8a8"):
        with pytest.raises(PlanError, match=r"keep_fp8_weights keeps 4-bit weights .* and quantization is"):
            planned(keep_fp8_weights=True, int4_compute=asked)


def test_what_does_not_fit_with_kept_weights_is_told_that_it_does_without() -> None:
    """The way out names the option and the bytes."""
    plan = chosen(int4_compute="w8a8")
    small = gpus(gib=(plan.ledger.needed_bytes + plan.ledger.page_bytes) / 0.92 / GIB)
    assert not chosen(small, int4_compute="w8a8", max_model_len=plan.max_model_len).errors
    (issue,) = chosen(small, int4_compute="w8a8", keep_fp8_weights=True, max_model_len=plan.max_model_len).errors
    assert "leave out keep_fp8_weights (" in issue.fix


def test_a_choice_for_weights_that_are_not_4_bit_is_refused() -> None:
    """It would do nothing; left at auto, the plan has no word about it."""
    with pytest.raises(PlanError, match="int4_compute is 'w4a8', but the weights are no 4-bit integers") as error:
        planned(int4_compute="w4a8")
    assert "leave int4_compute at auto" in error.value.fix
    plan = planned()
    assert plan.fp8_inputs_from is None
    assert not [choice for choice in plan.choices if choice.name == "int4_compute"]


def test_an_unknown_choice_names_the_known_ones() -> None:
    """A typing mistake is found before anything is read."""
    with pytest.raises(OptionError, match="int4_compute is 'w4a4'") as error:
        chosen(int4_compute="w4a4")
    assert "w4a8" in error.value.fix


def test_a_worker_gets_the_scheme_as_planned() -> None:
    """Through JSON, whatever the checkpoint was made for; plans that compute differently have different fingerprints."""
    plans = [chosen(fp8=fp8, int4_compute=asked) for fp8 in (False, True) for asked in ("auto", "w4a16", "w4a8")]
    schemes = [rebuild.scheme(from_json(to_json(plan))) for plan in plans]
    assert [getattr(scheme, "fp8_inputs_from", 0) for scheme in schemes] == [W4A8_FROM, None, 1, 1, None, 1]
    assert len({fingerprint(plan) for plan in plans[:3]}) == 3
