"""What attention multiplies in: plainly unless FP8 is asked for, and refused where that cannot be."""

from __future__ import annotations

import pytest
from core.tests.planning.made import RAW, cpu, gpus, planned

from paddock.errors import OptionError, PlanError, PluginError
from paddock.planning.serial import fingerprint, from_json, to_json
from paddock.plugins import AttentionSpec, hookimpl

FP8_KV = {"kv_cache_dtype": "fp8", "attention_compute": "fp8"}


class NarrowPlugin:
    """A backend for FP8 pages that multiplies in FP8 where `computes` says so."""

    def __init__(self, *computes: str) -> None:
        self.computes = computes

    @hookimpl
    def paddock_attention_backends(self) -> list[AttentionSpec]:
        """Return it, of the highest rank."""
        return [
            AttentionSpec(
                name="narrow",
                factory="somewhere:factory",
                devices=("cuda",),
                dtypes=("bfloat16",),
                kv_cache_dtypes=("fp8", "bfloat16"),
                page_sizes=(64,),
                computes=self.computes,
                rank=20,
            )
        ]


def test_attention_is_plain_unless_fp8_is_asked_for() -> None:
    """Over FP8 pages the plan says that there is a choice and what it costs; over others there is none."""
    plan = planned(RAW, gpus(), kv_cache_dtype="fp8")
    choice = plan.choice("attention_compute")
    assert (plan.attention_compute, choice.value) == ("plain", "plain")
    (rejected,) = choice.rejected
    assert rejected.value == "fp8"
    assert "docs/benchmarks/quality.md" in rejected.reason
    assert not [choice for choice in planned(RAW, gpus()).choices if choice.name == "attention_compute"]


def test_fp8_is_taken_by_a_backend_that_declares_it() -> None:
    """One of higher rank that does not is passed over, and the plan says why."""
    assert planned(RAW, gpus(), plugins=[NarrowPlugin("plain", "fp8")], **FP8_KV).attention.name == "narrow"
    plan = planned(RAW, gpus(), plugins=[NarrowPlugin("plain")], **FP8_KV)
    assert plan.attention.name == "torch"
    rejected = {each.value: each.reason for each in plan.choice("attention_backend").rejected}
    assert rejected["narrow"] == "does not multiply in fp8"
    choice = plan.choice("attention_compute")
    assert (choice.value, choice.reason.startswith("asked for; ")) == ("fp8", True)
    assert "wins nothing" in planned(RAW, cpu(), **FP8_KV).choice("attention_compute").reason


def test_fp8_is_refused_over_pages_that_are_not() -> None:
    """The error names what KV is kept in, and both ways out."""
    for options in ({}, {"kv_cache_dtype": "bfloat16"}):
        with pytest.raises(PlanError, match=r"attention_compute is 'fp8', .* KV is kept in bfloat16") as error:
            planned(RAW, gpus(), attention_compute="fp8", **options)
        assert error.value.fix == "set kv_cache_dtype to fp8, or leave attention_compute at plain"


def test_a_checkpoint_calibrated_for_fp8_keys_needs_no_more_than_the_option() -> None:
    """Its KV is FP8 of itself; and no other KV is taken in its place."""
    plan = planned({"quantization_config": {"quant_method": "grouped"}}, gpus(), attention_compute="fp8")
    assert (plan.kv_cache_dtype, plan.attention_compute) == ("fp8", "fp8")


def test_a_backend_asked_for_that_cannot_is_refused() -> None:
    """With the way out."""
    with pytest.raises(PlanError, match=r"attention_backend is 'narrow', .* does not multiply in fp8") as error:
        planned(RAW, gpus(), plugins=[NarrowPlugin("plain")], attention_backend="narrow", **FP8_KV)
    assert "leave attention_compute at plain" in error.value.fix


def test_the_choice_is_part_of_the_plan() -> None:
    """It is written and read back, and plans that differ in it alone are told apart."""
    plain, fp8 = (planned(RAW, gpus(), **(FP8_KV | {"attention_compute": each})) for each in ("plain", "fp8"))
    assert from_json(to_json(fp8)) == fp8
    assert fingerprint(plain) != fingerprint(fp8)


def test_an_unknown_kind_is_refused() -> None:
    """By the option and by a backend's description."""
    with pytest.raises(OptionError, match="attention_compute is 'fp4'") as error:
        planned(RAW, gpus(), attention_compute="fp4")
    assert "fp8" in error.value.fix
    with pytest.raises(PluginError, match="computes holds 'fp4'"):
        NarrowPlugin("fp4").paddock_attention_backends()
