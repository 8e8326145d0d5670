"""4-bit weights in groups that the chosen kernels are not for: planning says so, with what would let them."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import frozen
from core.tests.planning.made import LAYERS, ParallelPlugin, cpu, gpus, planned
from core.tests.planning.test_int4_compute import Rounding

from paddock.axes import Linear, Tensor, TensorAxis
from paddock.planning.plan import Plan
from paddock.planning.serial import from_json, to_json
from paddock.plugins import CheckpointFacts, Issue, OpSpec, QuantizationSpec, hookimpl

HERE = __name__


@frozen(kw_only=True)
class Sized(Rounding):
    """The made-up format in groups of `group` inputs, which ranks may cut at every 8."""

    group: int

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return words and scales, or the plain weight of the head and of what is called `o`."""
        stored = super().tensors(path, linear)
        if len(stored) == 1 or path.endswith(".o"):
            return (Tensor("weight", self.dtype, (TensorAxis("out"), TensorAxis("in"))),)
        words, _ = stored
        groups = TensorAxis("in", group=-1) if self.group == -1 else TensorAxis("in", group=self.group, cut=8)
        return words, Tensor("scales", "float16", (groups, TensorAxis("out")))


def detect(facts: CheckpointFacts) -> Sized | None:
    """Return the scheme of a checkpoint that says `sized`."""
    entry = facts.config.get("quantization_config") or {}
    if entry.get("quant_method") != "sized":
        return None
    return Sized(dtype=facts.dtype, group=entry["group"])


class KernelsPlugin:
    """Brings the format, and products with 4-bit weights on GPUs: one for some groups, the other for more."""

    def __init__(self, groups: tuple[int, ...] = (8, 16, 32)) -> None:
        """Declare what `linear_int4` is for."""
        self._groups = groups

    @hookimpl
    def paddock_quantizations(self) -> list[QuantizationSpec]:
        """Return the format."""
        return [QuantizationSpec(name="sized", detect=f"{HERE}:detect", method=f"{HERE}:method")]

    @hookimpl
    def paddock_ops(self) -> list[OpSpec]:
        """Return the products."""
        both: dict[str, Any] = {"devices": ("cuda",), "rank": 5, "min_compute_capability": (9, 0)}
        return [
            OpSpec(op="linear_int4", implementation=f"{HERE}:product", groups=self._groups, **both),
            OpSpec(op="linear_int4_fp8", implementation=f"{HERE}:product", groups=(4, 16), **both),
        ]


def plan_of(group: int, hardware: Any = None, plugins: Any = (), *, kernels: Any = None, **options: Any) -> Plan:
    """Return the plan of a checkpoint in groups of that many inputs."""
    raw = {"quantization_config": {"quant_method": "sized", "group": group}}
    return planned(raw, hardware, plugins=[kernels or KernelsPlugin(), *plugins], **options)


def said(plan: Plan) -> list[Issue]:
    """Return what the plan says of groups."""
    return [issue for issue in plan.issues if issue.code == "int4_in_plain_torch"]


def test_groups_that_no_kernel_is_for_are_a_warning_with_the_way_out() -> None:
    """How many linears, the first, their groups, what is served, and the sizes that divide their inputs."""
    (issue,) = said(plan_of(4, int4_compute="w4a16"))
    assert issue.level == "warning"
    count = LAYERS * len(("q", "k", "v", "up", "down"))
    assert issue.message == (
        f"{count} 4-bit linears run in plain torch, slowly, because no kernel is for their groups: "
        f"{count} in groups of 4 inputs, the first layers.0.q (linear_int4 takes groups of 8, 16, multiples of 32)"
    )
    assert issue.fix == (
        "quantise the model again with --group-size 32 or 16 or 8, "
        "or set ops to linear_int4=paddock to say that plain torch is enough"
    )


@pytest.mark.parametrize("group", [8, 16, 32, 64, -1])
def test_groups_that_the_kernels_are_for_are_no_matter(group: int) -> None:
    """Those they declare, multiples of the largest, and whole rows of such."""
    assert said(plan_of(group, int4_compute="w4a16")) == []


def test_each_product_that_is_used_counts() -> None:
    """By number of tokens both are, and one of them suffices; of one scheme only its own."""
    assert said(plan_of(8, int4_compute="w4a16")) == []
    (fp8,) = said(plan_of(8, int4_compute="w4a8"))
    assert fp8.message.endswith("(linear_int4_fp8 takes groups of 4, multiples of 16)")
    (both,) = said(plan_of(8))
    assert (
        "linear_int4 takes groups of 8, 16, multiples of 32; linear_int4_fp8 takes groups of 4, multiples of 16" in both.message
    )
    assert "--group-size 16, or set ops to linear_int4=paddock and linear_int4_fp8=paddock" in both.fix


@pytest.mark.parametrize("group", [64, -1])
def test_groups_are_those_a_rank_holds(group: int) -> None:
    """Four ranks hold 32 inputs of down each, so that their groups are of 32, whether they were of 64 or of whole rows."""
    parallel, wide = [ParallelPlugin()], KernelsPlugin(groups=(64,))
    assert said(plan_of(group, gpus(4), parallel, kernels=wide, tensor_parallel_size=2, int4_compute="w4a16")) == []
    (issue,) = said(plan_of(group, gpus(4), parallel, kernels=wide, tensor_parallel_size=4, int4_compute="w4a16"))
    assert f": {LAYERS} in groups of 32 inputs, the first layers.0.down (" in issue.message
    assert issue.fix.startswith("use an FP8 checkpoint of the model, or ")


@pytest.mark.parametrize(
    "case",
    [
        {"hardware": cpu()},
        {"hardware": gpus(capability=(8, 0))},
        {"int4_compute": "w4a16", "ops": {"linear_int4": "paddock"}},
    ],
    ids=["CPU", "older GPU", "asked for"],
)
def test_nothing_is_said_where_plain_torch_was_chosen(case: dict[str, Any]) -> None:
    """On a CPU, on a GPU that the kernels are not for, and where plain torch was asked for."""
    assert said(plan_of(4, **case)) == []


def test_under_strict_it_is_an_error_and_the_way_out_that_it_names_works() -> None:
    """As every warning of a plan is."""
    strict: dict[str, Any] = {"int4_compute": "w4a16", "attention_backend": "torch", "strict": True}
    assert [issue.code for issue in plan_of(4, **strict).errors] == ["int4_in_plain_torch"]
    assert plan_of(4, **strict, ops={"linear_int4": "paddock"}).errors == ()


def test_what_kernels_declare_travels_with_the_plan() -> None:
    """A plan read back is the plan."""
    plan = plan_of(4)
    assert from_json(to_json(plan)) == plan
